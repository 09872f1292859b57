"""Apply the rules to all calls of a graph, to find what every dimension is made of.

Example: in ``fc2(relu(fc1(x)))`` the rows of ``fc1.weight``, its bias and the columns of ``fc2.weight`` are one axis.
Each call is also written to a tape of elementary steps, which the proof (``invariance.py``) reads later.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat

import oto.axes.rules  # noqa: F401  registers the rules
from oto._torch import tree_leaves, tree_map_only
from oto.axes import terms as T
from oto.axes.call import Call, Operand, Tape
from oto.axes.registry import find, is_fixed
from oto.axes.terms import Reason, Term
from oto.trace.graph import Graph, Node, Value

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Propagation:
    """What every dimension of a graph is made of.

    Attributes:
        operands: The terms of every value.
        unknown: Nodes without a rule that fits; everything that they touch stays whole.
        coverage: The number of calls of each operator, by the kind of rule: "rule", "fixed", "unknown".
        strict_out_nodes: Whether outputs that another call reads may get thinner; or the names of outputs that may.
    """

    graph: Graph
    tape: Tape
    operands: dict[Value, Operand]
    unknown: list[Node] = field(default_factory=list)
    coverage: dict[str, Counter[str]] = field(default_factory=dict)
    strict_out_nodes: bool | frozenset[str] = False

    def terms(self, value: Value) -> tuple[Term, ...]:
        return tuple(T.resolve(term) for term in self.operands[value].terms)


def propagate(graph: Graph, strict_out_nodes: bool | frozenset[str] = False, strict: bool = False) -> Propagation:
    """Relate all dimensions of ``graph``.

    Every dimension of a parameter, buffer or constant starts as one axis. Dimensions of inputs and outputs are fixed.

    Args:
        strict_out_nodes: With ``True``, only outputs that no other call reads are fixed; an output that the model also
            reads itself, such as a hidden state, gets as thin as the network there. Otherwise the names of outputs
            (``Graph.output_names``) that are not fixed, whether another call reads them or not.
        strict: Raise if a rule fails, instead of keeping what the call touches whole.
    """
    coverage: dict[str, Counter[str]] = {"rule": Counter(), "fixed": Counter(), "unknown": Counter()}
    propagation = Propagation(graph, Tape(), {}, coverage=coverage, strict_out_nodes=strict_out_nodes)
    runs = [graph] if graph.trained is None else [graph, graph.trained]
    reader = {v: node.index for node in reversed(graph.calls) if node.index not in graph.dead for v in node.inputs()}
    _begin(propagation, runs, reader)
    for node in graph.calls:
        _follow(propagation, node, strict)
    _fix_outputs(propagation, runs, reader)
    return propagation


def _begin(propagation: Propagation, runs: Sequence[Graph], reader: Mapping[Value, int]) -> None:
    """Create the terms of what no call makes: parameters, buffers, constants and inputs.

    Args:
        reader: The index of the first call that reads a value.
    """
    graph, tape, operands = propagation.graph, propagation.tape, propagation.operands
    outside = Reason("its values were made outside torch, perhaps of what the model computed")
    data = any(run.mode == "real" for run in runs)  # without data nothing can leave torch and come back
    for leaf in graph.leaves:
        loose = data and not leaf.names
        operands[leaf.value] = tape.tensor([T.axis(n, outside if loose else None) for n in leaf.value.shape])
    for value in (value for run in runs for value in run.inputs):
        given = Reason("it is a dimension of an input", reader.get(value))
        operands[value] = tape.tensor([T.axis(n, given) for n in value.shape])


def _follow(propagation: Propagation, node: Node, strict: bool) -> None:
    """Apply the rule of one call, or keep everything that the call touches whole."""
    graph, tape, operands = propagation.graph, propagation.tape, propagation.operands
    call = Call(node, tape, operands, dead=node.index in graph.dead)
    rule = find(node.op)
    if rule is None:
        propagation.unknown.append(node)
        outputs = call.opaque(f"no rule for {node.op}")
    else:
        try:
            outputs = _apply(call, rule, operands)
        except Exception as failure:
            if strict:
                raise
            log.warning("the rule for %s does not fit this call: %r", node, failure)
            propagation.unknown.append(node)
            outputs = call.opaque(f"the rule for {node.op} does not fit this call ({failure!r})")
    if call.dead:
        tape.silence(call.steps)
    answer = "unknown" if node in propagation.unknown[-1:] else "fixed" if is_fixed(node.op) else "rule"
    # train-mode calls with a rule are not counted, as eval mode usually makes them too
    if node.index < len(graph.nodes) or answer == "unknown":
        propagation.coverage[answer][node.name] += 1
    for output, operand in zip(node.outputs, outputs, strict=True):
        if output is not None:
            assert operand is not None
            operands[output] = operand
    for before, after in node.written:  # written to, but not returned: its content is unknown from here on
        call.fix(operands[before], None, f"{node.op} writes to it")
        operands[after] = call.fresh(after.shape, f"{node.op} writes to it")


def _fix_outputs(propagation: Propagation, runs: Sequence[Graph], reader: Mapping[Value, int]) -> None:
    """Fix every dimension of the outputs, except outputs that ``strict_out_nodes`` frees."""
    freed = propagation.strict_out_nodes
    maker = {value: node.index for node in propagation.graph.calls for value in node.outputs if value is not None}
    named = freed if isinstance(freed, frozenset) else frozenset()
    for run in runs:
        for value, name in zip(run.outputs, chain(run.output_names, repeat("")), strict=False):
            free = name in named or (freed is True and value in reader)
            for term in () if free else propagation.operands[value].terms:
                T.fix(term, Reason("it is a dimension of an output", maker.get(value)))
        for value in run.enclosed:
            for term in () if freed is True and value in reader else propagation.operands[value].terms:
                T.fix(term, Reason("it is a dimension of a tensor in an object that is returned", maker.get(value)))


def _apply(call: Call, rule: object, operands: Mapping[Value, Operand]) -> list[Operand | None]:
    node = call.node
    args, kwargs = tree_map_only(Value, operands.__getitem__, (node.args, dict(node.kwargs)))
    result = rule(call, *args, **kwargs)  # type: ignore[operator]
    outputs = [x if isinstance(x, Operand) else None for x in tree_leaves(result)]
    assert len(outputs) == len(node.outputs), f"{len(outputs)} outputs described, {len(node.outputs)} returned"
    for operand, shape in zip(outputs, call.shapes, strict=True):
        assert (operand is None) == (shape is None) and (operand is None or operand.shape == shape), (
            f"{operand and operand.shape} described, {shape} returned"
        )
    return outputs
