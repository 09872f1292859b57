"""The last emitter: replay the recorded calls of the example, with thinner tensors and matching sizes."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx, nn

from oto._torch import tree_flatten
from oto.axes.registry import known
from oto.errors import VerificationError, reraise_out_of_memory
from oto.groups import Kept, Partition
from oto.slim.edits import attribute
from oto.slim.graph.emit import emit_graph
from oto.slim.proof.compare import Check, relative_error, tolerance
from oto.slim.proof.float64 import double_input, throughout, widened
from oto.slim.proof.reference import CheckOptions, Reference
from oto.trace.record import record_data
from oto.trace.replay import difference, replayed
from oto.trace.run import Recording

RECORDED = (
    "recorded at the example's shapes and values: other shapes, and other paths through branches on values,"
    " are not in it"
)


def emit_recording(model: nn.Module, dummy_input: Any, partition: Partition, kept: Kept) -> fx.GraphModule:
    """Build the slim model from the calls that ``model`` makes on the example.

    Raises:
        EmitterError: One of the calls cannot be put into a graph.
    """
    with throughout(model):
        run = replayed(model, dummy_input, known, partition.found.graph.mode)
    return emit_graph(run, partition, kept)


def check_recording(
    reference: Reference, slim: fx.GraphModule, partition: Partition, kept: Kept, notes: list[str]
) -> list[Check]:
    """Compare a recording with the zeroed full model, on the example and on random inputs that take the same path.

    Numbers that left torch (``.item()``) were read in the model's dtype. If that makes a difference in float64, a
    second recording, made in float64, is compared there instead.
    """
    full, dummy_input = reference.model, reference.example.value

    def path(given: Any) -> Recording:
        with throughout(full):
            return record_data(full, given, known)

    example = path(dummy_input)

    def lacks(given: Any) -> str | None:
        try:
            return difference(example, path(given))
        except Exception as failure:  # parts of an input may have to match each other
            reraise_out_of_memory(failure)
            return "the model does not take it"

    def recorded() -> nn.Module:
        another = emit_recording(full, double_input(dummy_input), partition, kept)
        few = tolerance(reference.dtype) / 10
        if not alike(slim, another, few):
            raise VerificationError(
                f"the recording of {type(full).__name__} in float64 makes other calls than the one to be proved\n"
                "  effect  a mistake could not be distinguished from rounding, so no subnet is built\n"
                "  to fix  report the model; float64=False compares in its own dtype alone"
            )
        return another

    return reference.check(slim, CheckOptions(notes=notes, lacks=lacks, in_float64=recorded))


def alike(one: fx.GraphModule, other: fx.GraphModule, few: float) -> bool:
    """Whether two recordings make the same calls, with numbers and tensors that differ only by rounding.

    Args:
        few: The tolerance, relative to a number or to the largest entry of a tensor.
    """
    ours, theirs = list(one.graph.nodes), list(other.graph.nodes)
    same = dict(zip(ours, theirs, strict=False))

    def close(a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node):
            return same[a] is b
        if isinstance(a, float) and isinstance(b, float):
            return a == b or math.isclose(a, b, rel_tol=few) or (a != a and b != b)
        return bool(widened(a) == widened(b))

    def calls(a: fx.Node, b: fx.Node) -> bool:
        if a.op != b.op or a.target != b.target:
            return False
        if a.op == "get_attr":
            return tensors(attribute(one, str(a.target)), attribute(other, str(b.target)))
        if a.op == "call_module":
            mine, its = one.get_submodule(str(a.target)), other.get_submodule(str(b.target))
            if repr(mine) != repr(its) or mine.training != its.training:
                return False
            pairs = zip((*mine.parameters(), *mine.buffers()), (*its.parameters(), *its.buffers()), strict=True)
            if not all(tensors(x, y) for x, y in pairs):
                return False
        left, right = (tree_flatten((node.args, dict(node.kwargs))) for node in (a, b))
        return left[1] == right[1] and all(map(close, left[0], right[0]))

    def tensors(x: Tensor, y: Tensor) -> bool:
        x, y = (widened(t.detach()) for t in (x, y))
        return x.shape == y.shape and x.dtype == y.dtype and relative_error([y], [x]) <= few

    return len(ours) == len(theirs) and all(map(calls, ours, theirs))
