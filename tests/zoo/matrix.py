"""One model through the whole pipeline: half of all atoms removed at random in float64, by its own class and a graph.

Used by the tests, by the documentation's table, and by hand::

    python -m tests.zoo.matrix transformers              # a whole zoo
    python -m tests.zoo.matrix transformers bert llama   # some of it
    python -m tests.zoo.matrix --why transformers bert   # what stays whole, and why
    python -m tests.zoo.matrix --segments --record timm resnet18   # a third of all segments erased, too
"""

from __future__ import annotations

import argparse
import copy
import importlib
import logging
import random
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from oto import OTO
from oto.axes import terms as T
from oto.errors import EmitterError, NothingPrunableError, OTOError, UnknownOpWarning, VerificationError
from oto.groups import NodeGroup, cost
from oto.slim.copying import copied
from oto.slim.proof.compare import relative_error
from oto.slim.proof.float64 import double_input, in_double
from oto.slim.proof.inputs import random_like
from oto.slim.proof.run import run
from oto.trace.inputs import arguments
from oto.trace.snapshot import preserved

from .choices import EVERY_GROUP, outcomes, trained
from .models import lively, settled
from .replay import replay
from .unchanged import Seen, trains_alike

Factory = Callable[[], tuple[nn.Module, Any]]

# where each zoo lives: module of this package and name of its dictionary
ZOOS = {
    "models": ("models", "ZOO"),
    "torchvision": ("torchvision_zoo", "ZOO"),
    "timm": ("timm_zoo", "ZOO"),
    "transformers": ("transformers_zoo", "ZOO"),
    "diffusers": ("diffusers_zoo", "ZOO"),
    "handmade": ("handmade", "ZOO"),
    "papers": ("papers", "ZOO"),
    "packages": ("packages_zoo", "ZOO"),
}


@dataclass
class Result:
    """What came of one model.

    Attributes:
        axes, atoms: Node groups that may lose atoms, with allow_graph=True, and their atoms.
        share: Share of all parameters that lies in such groups.
        class_share: The same of what the model's own class can do without.
        unknown: Operators without a rule, and how many axes of parameters each of them keeps.
        trace: How the model was followed: ``"meta"``, ``"fake"`` or ``"real"``.
        seconds: CPU time for everything; ``analysis`` is the part of tracing and analyzing.
        sensitivity: How far the output is from that on another input. Near zero, errors could hide.
        module, graph: Largest relative error of the slim model of its own class, and of the exported graph of all;
            ``None`` if it was not built, and then the reason is given.
        asked: CPU seconds for finding out what the class can do.
        replay: For a model that neither can express, the error of the recorded calls run on thinner tensors.
        choices, in_class: How many other counts were left (:mod:`.choices`), and for how many of them the slim model
            was of the model's own class; ``lost`` says of which it was not, and why.
        choice_error: The largest relative error of these.
        states: What is decided otherwise once the model was used, or is in train mode; nothing should.
        changed: What ``OTO`` or ``construct_subnet`` left otherwise than it was; nothing should.
        failure: Why there is no result at all, as the last lines of a traceback; ``None`` if there is one.
        class_commit, graph_commit: The commit at which the class and other counts were asked, and the graph exported.
        segments, erased: Segments that may go, and how many of them went, drawn at random, besides half of all atoms.
        segments_class: Whether the slim model without them was of the model's own class, or else a graph.
        segments_error: The error of that; ``None`` if none was built, and then ``segments_reason`` says why.
        segments_commit: The commit at which that was tried; empty if it was not.
    """

    name: str
    axes: int = 0
    atoms: int = 0
    share: float = 0.0
    parameters: int = 0
    unknown: tuple[tuple[str, int], ...] = ()
    trace: str = ""
    seconds: float = 0.0
    analysis: float = 0.0
    sensitivity: float = float("nan")
    module: float | None = None
    module_reason: str | None = None
    graph: float | None = None
    graph_reason: str | None = None
    replay: float | None = None
    class_share: float = 0.0
    asked: float = 0.0
    choices: int = 0
    in_class: int = 0
    lost: tuple[str, ...] = ()
    choice_error: float = 0.0
    states: str = ""
    failure: str | None = None
    changed: str = ""
    class_commit: str = ""
    graph_commit: str = ""
    segments: int = 0
    erased: int = 0
    segments_class: bool = False
    segments_error: float | None = None
    segments_reason: str | None = None
    segments_commit: str = ""

    TOLERANCE: ClassVar = 1e-9  # float64; verification has its own for the dtype of a model that does not run in that
    SENSITIVE: ClassVar = 1e-6

    @property
    def exact(self) -> bool:
        """Whether a thinner model was compared with the zeroed one and every comparison held."""
        shown = any(e is not None for e in (self.module, self.graph, self.replay)) or not self.axes
        return self.failure is None and shown and self.error <= self.TOLERANCE

    @property
    def error(self) -> float:
        """The largest; a replay in float64 stands for slim models of a narrower dtype."""
        built = [self.replay] if self.replay is not None else [self.module, self.graph, self.choice_error]
        return max((e for e in built if e is not None), default=0.0)

    @property
    def erases(self) -> bool:
        """Whether a model without segments was compared with the zeroed one, or there are none, and all held."""
        tried = self.segments_error is not None or not self.segments
        return self.failure is None and tried and (self.segments_error or 0.0) <= self.TOLERANCE

    @property
    def costly(self) -> tuple[str, ...]:
        """Unknown operators that keep axes of parameters whole."""
        return tuple(op for op, axes in self.unknown if axes)

    def __str__(self) -> str:
        def error(value: float | None, reason: str | None) -> str:
            return f"{value:.0e}" if value is not None else "-"

        line = (
            f"{self.name:28} {self.axes:5} axes {self.atoms:6} atoms {self.share:5.0%} of {self.parameters:9}"
            f" {self.trace:5}"
            f" {self.analysis:5.1f}/{self.seconds:5.1f} s  module {error(self.module, self.module_reason):6}"
            f" graph {error(self.graph, self.graph_reason):6} moves {self.sensitivity:.0e}"
            + (f" replay {self.replay:.0e}" if self.replay is not None else "")
            + f" class {self.class_share:.0%} in {self.asked:.1f} s, {self.in_class} of {self.choices} other counts"
        )
        more = [
            ("unknown", ", ".join(f"{op} ({n})" for op, n in self.unknown)),
            ("module", self.module_reason),
            ("graph", self.graph_reason),
            ("counts", "; ".join(self.lost)),
            ("segments", self._erased()),
            ("STATES", self.states),
            ("CHANGED", self.changed),
            ("FAILED", self.failure),
        ]
        return "\n".join([line, *(f"    {what}: {text}" for what, text in more if text)])

    def _erased(self) -> str:
        if not self.segments and not self.segments_reason:
            return ""
        form = "" if self.segments_error is None else " in its class" if self.segments_class else " as a graph"
        said = f"{self.erased} of {self.segments} erased{form}"
        error = "" if self.segments_error is None else f", {self.segments_error:.0e}"
        return said + error + (f"; {self.segments_reason}" if self.segments_reason else "")


def examine_segments(name: str, factory: Factory, *, share: float = 1 / 3, seed: int = 3) -> Result:
    """Erase a random third of all segments besides half of all atoms, build the slim model and compare it.

    Only the fields of segments are filled in, and ``failure``; never raises.
    """
    result = Result(name)
    begin = time.process_time()
    try:
        _examine_segments(result, factory, share, seed)
    except Exception as failure:
        result.failure = _told(failure)
    result.seconds = time.process_time() - begin
    return result


def _examine_segments(result: Result, factory: Factory, share: float, seed: int) -> None:
    model, inputs = prepared(factory)
    for graph in (False, True):  # the class may do without none of them; then a graph
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                oto = OTO(model, inputs, compress_mode="both", allow_graph=graph)
        except NothingPrunableError as failure:
            result.segments_reason = str(failure).splitlines()[0]
            return
        found = [group for group in oto.node_groups if group.segment and group.prunable]
        result.segments = len(found)
        if not found:
            return
        if not graph:
            drawn = random.Random(seed).sample(found, max(1, round(len(found) * share)))
            _zero_half(oto, drawn, seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                subnet = oto.construct_subnet(emitter="graph" if graph else "module")
        except EmitterError as failure:
            result.segments_reason = str(failure).splitlines()[0]
            if isinstance(failure.__cause__, VerificationError):
                result.segments_reason = " | ".join(line.strip() for line in str(failure.__cause__).splitlines()[1:5])
            continue
        errors = [c.error for c in subnet.checks if "as users run it" not in c.what and c.dtype == "float64"]
        result.segments_error = max(errors, default=subnet.max_error)
        result.segments_class, result.erased = not graph, len(oto.partition.erased(subnet.kept))
        return


def _zero_half(oto: OTO, segments: Sequence[NodeGroup], seed: int) -> None:
    """Half of all atoms at zero, and these segments."""
    parameters = dict(oto.model.named_parameters(remove_duplicate=False))
    generator = torch.Generator().manual_seed(seed)
    for group in oto.node_groups:
        if group.prunable and not group.segment:
            group.zero_(
                parameters,
                torch.randperm(group.size, generator=generator)[: min(group.size // 2, group.size - group.min_kept)],
            )
    for group in segments:
        group.zero_(parameters, torch.tensor([0]))


def _told(failure: Exception) -> str:
    where = traceback.extract_tb(failure.__traceback__)[-1]
    text = " | ".join(str(failure).splitlines()[:4])
    return f"{type(failure).__name__}: {text} ({where.filename.rpartition('/')[2]}:{where.lineno})"


def examine(
    name: str,
    factory: Factory,
    *,
    kind: str = "",
    share: float = 0.5,
    seed: int = 3,
    counts: bool = True,
    emitters: Iterable[str] = ("module", "graph"),
) -> Result:
    """Trace, analyze, zero a random half, build the slim model and compare it; never raises.

    Args:
        kind: The zoo that the model is of.
        counts: Leave other counts, and ask in other states of the model, too.
        emitters: The forms of slim models; a graph is made of what the class cannot do without, in any case.

    A verification failure is told apart from an emitter that cannot express the model: the error is then the one found.
    """
    result = Result(name)
    begin = time.process_time()
    try:
        _examine(result, factory, kind if counts else None, share, seed, tuple(emitters))
    except Exception as failure:
        result.failure = _told(failure)
    result.seconds = time.process_time() - begin
    return result


def prepared(factory: Factory) -> tuple[nn.Module, Any]:
    """The model with weights under which a mistake would show, and its inputs; in float64 if it runs in that."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs = factory()
        model = lively(model, inputs)
        wide = double_input(inputs)
        args, kwargs = arguments(wide)
        try:
            other = in_double(model)
            run(other, wide)  # first, so that what a process caches is as wide
            with preserved(other), torch.no_grad():
                other(*args, **kwargs)
            return in_double(model), wide  # as cold as the library made it
        except Exception:  # it is replayed in float64 all the same, with its own casts made to follow
            return model, inputs


def _examine(
    result: Result, factory: Factory, kind: str | None, share: float, seed: int, emitters: tuple[str, ...]
) -> None:
    model, inputs = prepared(factory)
    result.parameters = sum(p.numel() for p in model.parameters())
    untouched, seen = copy.deepcopy(model), Seen(model)
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownOpWarning)
        try:
            oto = OTO(model, inputs, allow_graph=True)
        except NothingPrunableError as failure:
            result.changed = seen.difference(model)
            result.module_reason = result.graph_reason = str(failure).splitlines()[0]
            return
    result.analysis = time.process_time() - begin
    result.changed = seen.difference(model)
    found = oto.partition.found
    result.trace = found.graph.mode
    prunable = [g for g in oto.node_groups if g.prunable]
    result.axes, result.atoms = len(prunable), sum(g.size for g in prunable)
    dense = oto.compute_num_params()
    result.share = 1 - cost(oto.partition, {g.name: 0 for g in prunable}).params / dense
    result.unknown = _unknown(oto)
    bound = _of_its_class(result, model, inputs)
    if bound is not None and kind is not None:
        _other_counts(result, kind, bound, inputs)
    if "graph" in emitters or bound is None:
        oto.random_set_zero_groups(share, seed=seed)
    else:
        bound.random_set_zero_groups(share, seed=seed)
    zeroed = run(model, inputs)
    wide = next(p.dtype for p in model.parameters() if p.is_floating_point()) == torch.float64
    with suppress(Exception):  # inputs may have to fit together
        result.sensitivity = relative_error(zeroed, run(model, random_like(inputs, 9)))
        if result.sensitivity < Result.SENSITIVE:  # what is left is too faint for the statistics of the dense network
            settled(model, inputs)
            zeroed = run(model, inputs)
            result.sensitivity = relative_error(zeroed, run(model, random_like(inputs, 9)))
    untouched.load_state_dict(model.state_dict())
    seen = Seen(model)
    for emitter, source in (("module", bound), ("graph", oto)):
        if source is None or (emitter not in emitters and bound is not None):
            continue
        error, reason = None, None
        try:
            subnet = source.construct_subnet(emitter=emitter)
            # as users run them, models that compute something in float32 do so in float64, too
            error = max((c.error for c in subnet.checks if "as users run it" not in c.what), default=subnet.max_error)
            if wide:
                error = max(error, relative_error(zeroed, run(subnet.model, inputs)))
        except (EmitterError, VerificationError) as failure:
            wrong = failure if isinstance(failure, VerificationError) else failure.__cause__
            if isinstance(wrong, VerificationError):
                reason = "VerificationError: " + " | ".join(line.strip() for line in str(wrong).splitlines()[1:5])
                if failure is wrong and emitter == "graph":  # it is what the analysis says, so the analysis is wrong
                    error = float("inf")
            else:
                reason = str(failure).splitlines()[0]
        setattr(result, emitter, error)
        setattr(result, f"{emitter}_reason", reason)
    result.changed = result.changed or seen.difference(model) or trains_alike(model, untouched, inputs)
    if (result.module is None and result.graph is None) or not wide:
        model, inputs = in_double(model), double_input(inputs)
        narrow = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # what the model makes without saying of which dtype
        try:
            result.replay = relative_error(run(model, inputs), replay(model, inputs))
        finally:
            torch.set_default_dtype(narrow)


def _of_its_class(result: Result, model: nn.Module, inputs: Any) -> OTO | None:
    """What the model's own class can do without, if anything."""
    begin = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnknownOpWarning)
            oto = OTO(model, inputs)
    except NothingPrunableError as failure:
        result.module_reason = str(failure).splitlines()[0]
        return None
    finally:
        result.asked = time.process_time() - begin
    free = {g.name: 0 for g in oto.node_groups if g.prunable}
    result.class_share = 1 - cost(oto.partition, free).params / oto.compute_num_params()
    return oto


def _other_counts(result: Result, kind: str, bound: OTO, inputs: Any) -> None:
    """What comes of other counts than half of everything, and of other states of the model."""
    name = f"{kind}-{result.name}"
    found = list(outcomes(name, bound, inputs))
    warm, training = _used(bound.model, inputs)
    result.states, used = _decided_otherwise(bound, warm, inputs, "used, in train mode")
    if name in EVERY_GROUP:  # which of the two it was
        for model, said in ((copied(bound.model, {}).train(), "in train mode"), (copied(warm, {}).eval(), "used")):
            result.states += _decided_otherwise(bound, model, inputs, said)[0]
    last = trained(used, inputs, training) if used is not None else None
    found += [last] if last is not None else []
    result.choices, result.in_class = len(found), sum(one.error is not None for one in found)
    result.lost = tuple(f"{one.choice}: {one.reason}" for one in found if one.error is None)
    result.choice_error = max((one.error for one in found if one.error is not None), default=0.0)


def _used(model: nn.Module, inputs: Any) -> tuple[nn.Module, bool]:
    """A copy in train mode, after a forward whose traces stay; and whether that was in train mode, too."""
    args, kwargs = arguments(inputs)
    for training in (True, False):  # detectors want targets to train
        used = copied(model, {}).train(training)
        try:
            used(*args, **kwargs)
            break
        except Exception:
            logging.getLogger(__name__).info("not used with training=%s", training, exc_info=True)
    return used.train(), training


def _decided_otherwise(bound: OTO, model: nn.Module, inputs: Any, said: str) -> tuple[str, OTO | None]:
    """What is decided of a model in another state than before."""
    try:
        oto = OTO(model, inputs)
    except OTOError as failure:
        return f"{said}: {type(failure).__name__}: {str(failure).splitlines()[0]}; ", None
    before, after = ({(g.name, g.size, g.prunable, g.min_kept, g.tie) for g in one.node_groups} for one in (bound, oto))
    differ = sorted({name for name, *_ in before ^ after})
    return (f"{said}: {len(differ)} groups such as {differ[0]}; " if differ else ""), oto


def _unknown(oto: OTO) -> tuple[tuple[str, int], ...]:
    found = oto.partition.found
    nodes = {node.index: str(node.op) for node in found.unknown}
    kept: Counter[str] = Counter(dict.fromkeys(nodes.values(), 0))
    axes = {
        axis for leaf in found.graph.leaves if leaf.trainable for t in found.terms(leaf.value) for axis in T.axes_of(t)
    }
    kept.update(
        nodes[axis.fixed.node]
        for axis in axes
        if axis.fixed is not None and axis.fixed.node in nodes and "rule for" in axis.fixed.text
    )
    return tuple(sorted(kept.items()))


def why(factory: Factory) -> str:
    """What stays whole, and why."""
    try:
        return str(OTO(*prepared(factory)).explain())
    except NothingPrunableError as nothing:
        return str(nothing)


def zoo(name: str) -> dict[str, Factory]:
    module, attribute = ZOOS[name]
    found: dict[str, Factory] = getattr(importlib.import_module(f"{__package__}.{module}"), attribute)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", choices=sorted(ZOOS))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--why", action="store_true")
    parser.add_argument("--no-graph", action="store_true")
    parser.add_argument("--segments", action="store_true", help="erase a third of all segments besides, and do no more")
    parser.add_argument("--record", action="store_true", help="leave the results for `make support-matrix`")
    parser.add_argument("--part", default="0/1", help="every n-th model from the i-th on, as i/n")
    given = parser.parse_args()
    first, step = map(int, given.part.split("/"))
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    factories = zoo(given.zoo)
    for name in given.names or list(factories)[first::step]:
        if given.why:
            print(f"{name}: {why(factories[name])}\n", flush=True)
        elif given.segments:
            result = examine_segments(name, factories[name])
            print(
                f"{result.name:28} {result.seconds:5.1f} s  {result.failure or result._erased() or 'no segments'}",
                flush=True,
            )
            if given.record:
                from .test_exact import written_segments

                written_segments(given.zoo, result)
        else:
            emitters = ("module",) if given.no_graph else ("module", "graph")
            result = examine(name, factories[name], kind=given.zoo, emitters=emitters)
            print(result, flush=True)
            if given.record:
                from .test_exact import written

                written(given.zoo, result)


if __name__ == "__main__":
    main()
