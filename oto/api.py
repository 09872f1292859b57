"""The class ``OTO`` strings the stages together and decides nothing."""

from __future__ import annotations

import copy
import logging
import os
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oto._torch import tree_map_only, unwrapped
from oto.axes.registry import known
from oto.errors import (
    ArtefactError,
    EmitterError,
    OTOError,
    TargetError,
    TraceError,
    UnknownOpWarning,
    VerificationError,
    first_line,
    out_of_memory,
)
from oto.groups import Cost, Kept, NodeGroup, cost, partition
from oto.groups.policy import (
    carried_by_nodes,
    carried_by_operators,
    keep_at_least,
    keep_whole,
    matching,
    parameters_of,
    require_prunable,
    zeroing,
)
from oto.io.artefact import check_out_dir, writing
from oto.io.subnet import FULL, PROGRAM, WEIGHTS, describe, plain_edits, read_program, rebuild, write_program
from oto.optim import HESSO
from oto.report.draw import draw
from oto.report.explain import Explanation, explain
from oto.report.table import subnet_table
from oto.slim.graph import emit_graph
from oto.slim.module import Edits, plan_edits, tensors_of, thin_copy, thin_tensors
from oto.slim.own_class import class_bound
from oto.slim.plan import read_zeros, thinning
from oto.slim.verify import Check, check, require
from oto.trace.export import export
from oto.trace.found import as_found
from oto.trace.record import line_of, on_meta, record

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Subnet:
    """A verified slim model.

    Attributes:
        model: The slim module, in eval mode; it owns its memory.
        path: The folder of the artefact, ``None`` if it was not saved.
        emitter: ``"module"`` (the original class) or ``"graph"`` (a ``torch.fx.GraphModule``).
        why_graph: Why the original class could not be used, if it could not.
        max_error: Largest relative error against the zeroed full model, in float64 where the model runs in it.
        checks: Every comparison that was made.
        cost_before, cost_after: Parameters and MACs on the example input.
        kept: For each prunable group, the atoms that are left.
    """

    model: nn.Module
    path: Path | None
    emitter: str
    why_graph: str | None
    max_error: float
    checks: tuple[Check, ...]
    cost_before: Cost
    cost_after: Cost
    kept: Kept

    def __str__(self) -> str:
        return subnet_table(self)


class OTO:
    """From a model and one example input to a slim model that computes the same function.

    Args:
        model: Any module. It is not copied: the optimizer trains it, and ``construct_subnet`` reads its zeros. One
            inside ``torch.compile``, ``DistributedDataParallel`` or ``DataParallel`` is taken out of it; go on training
            with the wrapper, whose parameters are the same.
        dummy_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments of ``model.forward``.
        skip_patterns: What must not be zeroed: names or globs of parameters or of modules, or classes of modules.
        strict_out_nodes: Only outputs that nothing else in the model reads keep their size; by default all do. One that
            is returned on the way, such as a hidden state, then gets as thin as the network there.
        min_kept: Least number of atoms that every group keeps.
        keep_class: Prune only what a slim model of the model's own class can do without: groups whose size its code may
            state stay whole, and the class is run to see. By default everything is pruned, and a model whose code
            states a size that changed becomes a ``torch.fx.GraphModule``.

    Raises:
        DummyInputError: ``dummy_input`` is of another type.
        TraceError: ``forward`` fails on it.
        NothingPrunableError: Nothing can be removed; the message says why.

    Example:
        >>> import torch
        >>> from torch import Tensor, nn
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> oto = OTO(model, torch.randn(1, 3))
        >>> oto.random_set_zero_groups(target_group_sparsity=0.5)
        >>> subnet = oto.construct_subnet()
        >>> oto.compute_num_params(), subnet.cost_after.params
        (50, 26)
    """

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        *,
        skip_patterns: Iterable[str | type[nn.Module]] = (),
        strict_out_nodes: bool = False,
        min_kept: int = 1,
        keep_class: bool = False,
    ) -> None:
        self.model = model = unwrapped(model)
        self.dummy_input = dummy_input
        with _told(model, TraceError, "being followed on the dummy input"):
            graph = record(model, dummy_input, known, dead=keep_class)
        with _told(model, TraceError, "being analysed", "it was followed on the dummy input"):
            self.partition = partition(graph, strict_out_nodes)
        self._groups = keep_at_least(self.partition.groups, min_kept)
        self._keep_class = keep_class
        self._saved: Path | None = None
        if skip_patterns:
            self._keep_parameters(parameters_of(_listed(skip_patterns), model), "skip_patterns names it")
        if keep_class:
            with _told(model, TraceError, "its class was tried with less (keep_class)", "the analysis is done"):
                bound = class_bound(model, self.partition, self._groups, dummy_input)
            self._groups = keep_whole(self._groups, bound, "keep_class: the model's code may state its size")
        for node in self.partition.found.unknown:
            shapes = ", ".join(str(tuple(v.shape)) for v in node.inputs())
            warnings.warn(
                f"no rule for {node.op}\n  at      {node.module or type(model).__name__}, {node.source}\n"
                f"  shapes  {shapes}\n  effect  all dimensions it touches stay whole\n"
                "  to fix  add a rule (CONTRIBUTING.md), or nothing if this is fine",
                UnknownOpWarning,
                stacklevel=2,
            )
        require_prunable(self._groups, self.partition.found.graph)

    @property
    def node_groups(self) -> tuple[NodeGroup, ...]:
        """Every node group, prunable or not."""
        return self._groups

    def mark_unprunable_by_param_names(self, names: Iterable[str]) -> None:
        """Keep all entries of some parameters: groups that would zero entries of one stay whole.

        Mark before an optimizer is made. The inputs of a marked layer still shrink with the layer before it.

        Args:
            names: Names from ``model.named_parameters()``, or globs such as ``"layer1.*.weight"``.

        Raises:
            UnknownParameterError: A name matches nothing; nothing is marked then.
        """
        parameters = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        self._keep_parameters(matching(_listed(names), parameters), "it was marked unprunable")

    def mark_unprunable_by_node_ids(self, node_ids: Iterable[str | int]) -> None:
        """Keep all node groups that run through some nodes of the graph.

        Args:
            node_ids: As in the drawing of :meth:`visualize`: ``"node-12"``, or ``12``.

        Raises:
            UnknownNodeError: There is no such node; nothing is marked then.
        """
        marked = carried_by_nodes(_listed(node_ids), self.partition.graph)
        self._groups = keep_whole(self._groups, marked, "it was marked unprunable")

    def skip_operators(self, operators: Iterable[str]) -> None:
        """Keep all node groups that run through the results of some operators.

        Args:
            operators: Names as in :meth:`coverage`, long or short (``"aten.conv2d.default"``, ``"conv2d"``), or globs.

        Raises:
            UnknownNodeError: The model calls no such operator; nothing is marked then.
        """
        marked = carried_by_operators(_listed(operators), self.partition.graph)
        self._groups = keep_whole(self._groups, marked, "skip_operators names an operator that it runs through")

    def _keep_parameters(self, names: Iterable[str], reason: str) -> None:
        first = {alias: leaf.names[0] for leaf in self.partition.found.graph.leaves for alias in leaf.names}
        marked = zeroing(self._groups, {first.get(name, name) for name in names})
        self._groups = keep_whole(self._groups, marked, reason)

    def explain(self) -> Explanation:
        """What can be removed, and why the rest stays whole: print it, or take ``to_dict()``."""
        return explain(self.node_groups, self.partition)

    def coverage(self) -> dict[str, dict[str, int]]:
        """Operators of the model by the answer that exists for them, with the number of calls."""
        return {answer: dict(calls) for answer, calls in self.partition.found.coverage.items()}

    def visualize(
        self,
        out_dir: str | os.PathLike[str],
        view: bool = False,
        vertical: bool = True,
        by_node_groups: bool = True,
        display_params: bool = False,
        display_flops: bool = False,
    ) -> list[Path]:
        """Draw the graph: one colour per prunable node group, grey for what stays whole, repeated blocks once.

        Args:
            out_dir: Folder for ``<class of the model>.dot``; with graphviz, ``.svg``, ``.pdf`` and ``.png`` too.
            view: Open the SVG.
            vertical: From top to bottom, else from left to right.
            by_node_groups: Colour the node groups apart; else prunable calls are white.
            display_params: Show the shape of each parameter at the call that reads it.
            display_flops: Show the FLOPs of each call on the example input.

        Returns:
            The files that were written.

        Raises:
            MissingExtraError: pydot is not installed (``pip install 'oto[viz]'``).
        """
        return draw(
            self.partition, self.node_groups, Path(out_dir), type(self.model).__name__, view=view, vertical=vertical,
            by_node_groups=by_node_groups, display_params=display_params, display_flops=display_flops,
        )  # fmt: skip

    def hesso(self, **options: Any) -> HESSO:
        """The HESSO optimizer over all parameters of the model; options as in :class:`oto.optim.HESSO`."""
        return HESSO(self.model.named_parameters(), self.node_groups, **options)

    def random_set_zero_groups(self, target_group_sparsity: float = 0.5, seed: int = 0) -> None:
        """Zero a random choice of ZIGs in place, for checks.

        Raises:
            TargetError: The groups would have to give up their last atoms.
        """
        prunable = [g for g in self.node_groups if g.prunable]
        wanted = int(sum(g.size for g in prunable) * target_group_sparsity)
        generator = np.random.default_rng(seed)
        room = {g.name: g.size - g.min_kept for g in prunable}
        if not 0 <= target_group_sparsity < 1 or wanted > sum(room.values()):
            most = sum(room.values()) / sum(g.size for g in prunable)
            raise TargetError(
                f"target_group_sparsity={target_group_sparsity} cannot be reached: every group keeps its min_kept\n"
                f"  to fix  ask for a share in [0, {most:.4f}]"
            )
        # every group gives up its share of the atoms that it can spare, at random
        order = [(g, int(a)) for g in prunable for a in generator.permutation(g.size)[: room[g.name]]]
        chosen: dict[str, list[int]] = {}
        for i in generator.permutation(len(order))[:wanted]:
            group, atom = order[i]
            chosen.setdefault(group.name, []).append(atom)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for group in prunable:
                if group.name in chosen:
                    for piece in group.zeros:
                        entries = piece.of(parameters[piece.parameter])
                        entries.index_fill_(0, torch.tensor(chosen[group.name], device=entries.device), 0)

    def _cost(self, kept: Mapping[str, int] | None = None) -> Cost:
        return cost(self.partition, kept)

    def compute_num_params(self) -> int:
        """Entries of all parameters of the full model; a tied one counts once."""
        return self._cost().params

    def compute_macs(self) -> int:
        """Multiply–adds of the full model on the example input."""
        return self._cost().macs

    def compute_flops(self) -> int:
        """Twice the MACs."""
        return self._cost().flops

    @property
    def compressed_model_path(self) -> Path | None:
        """The slim weights of the last ``construct_subnet(out_dir)``."""
        return self._saved and self._saved / WEIGHTS

    @property
    def full_group_sparse_model_path(self) -> Path | None:
        """The zeroed full weights of the last ``construct_subnet(out_dir)``."""
        return self._saved and self._saved / FULL

    def construct_subnet(
        self, out_dir: str | os.PathLike[str] | None = None, *, emitter: str = "auto", save_full: bool = True
    ) -> Subnet:
        """Build the slim model from the zeros in the parameters, prove it equal, and save it.

        The original class is used where its code states no size that changed; else the traced graph. Either is
        compared with the zeroed full model on the example and on random inputs, in the model's dtype and in float64,
        and once more after it was saved and loaded.

        Args:
            out_dir: Folder for the artefact; nothing is saved if it is ``None``.
            emitter: ``"auto"``, ``"module"`` (the original class or an error) or ``"graph"``.
            save_full: Save the zeroed full weights beside the slim ones.

        Raises:
            VerificationError: The slim model differs. Nothing is written.
            EmitterError: The asked emitter cannot express the slim model, or neither can.
            NonFiniteParameterError: A parameter holds NaN or infinity.
            ArtefactError: ``out_dir`` cannot be written.
        """
        if emitter not in ("auto", "module", "graph"):
            raise EmitterError(f"emitter={emitter!r} is unknown\n  to fix  use 'auto', 'module' or 'graph'")
        if out_dir is not None:
            check_out_dir(out_dir)
        if on_meta(self.model):
            raise EmitterError(
                f"parameters of {type(self.model).__name__} are on the meta device, so there are no zeros to read\n"
                "  effect  groups and costs are known, a slim model cannot be made\n"
                "  to fix  give the model values (model.to_empty(device=...), load_state_dict) and a new OTO"
            )
        kept = read_zeros(self.node_groups, self.model)
        before, after = self._cost(), self._cost({name: len(atoms) for name, atoms in kept.items()})
        built = _told(self.model, EmitterError, "its slim model was built and verified", "the analysis is done")
        with built, as_found(self.model):
            slim, edits, tensors, checks, why = self._emit(kept, emitter)
        path = None
        if out_dir is not None:
            path = Path(out_dir)
            about = {"why_graph": why, "cost": {"before": vars(before), "after": vars(after)}}
            proved = f"the slim model was built, and right in {len(checks)} comparisons"
            saved = _told(self.model, ArtefactError, "its slim model was saved and loaded again", proved)
            with saved, as_found(self.model):
                checks += self._save(path, slim, edits, tensors, kept, checks, about, save_full)
        how = "graph" if edits is None else "module"
        return Subnet(slim, path, how, why, require(checks), tuple(checks), before, after, kept)

    def _emit(
        self, kept: Kept, emitter: str
    ) -> tuple[nn.Module, Edits | None, Mapping[str, Tensor], list[Check], str | None]:
        """The slim module, the edits that made it (if it is of the original class), its tensors, and the proof."""
        why: str | None = None
        if emitter != "graph":
            try:
                thin = thinning(self.partition, kept)
                edits = plan_edits(self.model, self.partition, thin)
                tensors = thin_tensors(self.model, thin)
                slim = thin_copy(self.model, tensors, edits).eval()
                checks = check(self.model, slim, self.dummy_input, batch=True, left=self._left(kept))
                require(checks)
                return slim, edits, tensors, checks, None
            except Exception as failure:  # anything that the user's own forward may raise at other sizes
                if out_of_memory(failure):
                    raise
                why = _first_lines(failure)
                if emitter == "module":
                    raise EmitterError(
                        f"{type(self.model).__name__} cannot be thinned as its own class: {why}\n"
                        "  effect  no slim model was made, and nothing was written\n"
                        f"  to fix  use emitter='graph', or {self._way_out}"
                    ) from failure
                log.info("the original class does not fit, using the graph: %s", why)
        try:
            exported = export(self.model, self.dummy_input, known)
            slim = emit_graph(exported, self.partition, kept)
        except EmitterError as failure:
            if why is None:
                raise
            raise EmitterError(
                f"{failure}\n  class   the original class does not do either: {why}\n  or      {self._way_out}"
            ) from failure
        checks = check(self.model, slim, self.dummy_input, batch=exported.dynamic, left=self._left(kept))
        try:
            require(checks)
        except VerificationError as failure:
            self._require_faithful_export(failure)
            raise
        held = [*slim.named_parameters(remove_duplicate=False), *slim.named_buffers(remove_duplicate=False)]
        return slim, None, dict(held), checks, why

    @property
    def _way_out(self) -> str:
        """What to do where the original class cannot express what was removed."""
        if self._keep_class:
            return "keep what that line reads whole: OTO(..., skip_patterns=[...])"
        return "prune only what the class can do without: OTO(..., keep_class=True)"

    def _left(self, kept: Kept) -> list[list[NDArray[np.bool_]]] | None:
        """For each output and each of its dimensions, what the slim model still has; ``None`` if that is all."""
        if not self.partition.found.strict_out_nodes:
            return None
        return [self.partition.entries(value, kept) for value in self.partition.found.graph.outputs]

    def _require_faithful_export(self, failure: Exception) -> None:
        """Tell a mistake of ours from one of torch.export, which may follow another path than the model itself."""
        dense = export(self.model, self.dummy_input, known)
        try:
            require(check(self.model, dense.module, self.dummy_input, batch=dense.dynamic))
        except VerificationError as unfaithful:
            raise EmitterError(
                f"torch.export's graph of {type(self.model).__name__} does not compute what the model does\n"
                + "\n".join(str(unfaithful).splitlines()[1:-2])
                + "\n  effect  no graph can be emitted, and nothing was written\n"
                "  to fix  look for code that runs otherwise while exporting (torch.compiler.is_exporting)"
            ) from failure

    def _save(self, out_dir: Path, slim: nn.Module, edits: Edits | None, tensors: Mapping[str, Tensor], kept: Kept,
              checks: list[Check], about: Mapping[str, Any], save_full: bool) -> list[Check]:  # fmt: skip
        """Write the artefact, and prove what it gives back before it is put in place. Artefacts live on the CPU."""
        full, given, portable, left = self.model, self.dummy_input, slim, self._left(kept)
        if next(self.model.parameters()).device.type != "cpu":
            full, given = copy.deepcopy(self.model).cpu(), tree_map_only(Tensor, Tensor.cpu, self.dummy_input)
            # a graph names devices, so it is made anew
            portable = (
                copy.deepcopy(slim).cpu()
                if edits is not None
                else emit_graph(export(full, given, known), self.partition, kept)
            )
        with writing(out_dir) as draft:
            draft.tensors(WEIGHTS, tensors)
            if save_full:
                draft.tensors(FULL, tensors_of(self.model, self.partition))
            no_program = write_program(draft, portable, given)
            again: list[Check] = []
            if edits is not None:
                again += check(
                    full, rebuild(full, draft.load(WEIGHTS), plain_edits(edits)), given, "reloaded", 1, left=left
                )
            if no_program is None:
                again += check(full, read_program(draft.file(PROGRAM)), given, "reloaded program", 1, left=left)
            require(again)
            manifest = {
                "emitter": "graph" if edits is None else "module",
                "model": describe(self.model, tensors if edits is not None else {}),
                "edits": plain_edits(edits or Edits()),
                "kept": {name: atoms.tolist() for name, atoms in kept.items()},
                "checks": [vars(c) for c in (*checks, *again)],
                "no_program": no_program,
            }
            draft.commit(manifest | dict(about))
        self._saved = out_dir
        return again


@contextmanager
def _told(model: nn.Module, error: type[OTOError], stage: str, proved: str = "") -> Iterator[None]:
    """Whatever the model's code raises is told as one of our errors, with the stage."""
    try:
        yield
    except Exception as failure:
        if isinstance(failure, OTOError) or out_of_memory(failure):
            raise
        line = line_of(failure)
        told = [f"{type(model).__name__} failed while {stage}: {first_line(failure)}"]
        told += [f"  at      {line}"] if line else []
        told += [f"  proved  {proved}"] if proved else []
        told += ["  effect  nothing was written; the model is as it was"]
        told += [
            "  to fix  see that line: the model is copied, and run in eval mode several times, on other values, on"
            " another batch size and in float64"
            if line
            else "  to fix  see the traceback above; if it is not about the model, it is a mistake of oto's: report it"
        ]
        raise error("\n".join(told)) from failure


def _listed(names: Any) -> list[Any]:
    return [names] if isinstance(names, str | int | type) else list(names)


def _first_lines(failure: Exception) -> str:
    where = traceback.extract_tb(failure.__traceback__)[-1]
    return first_line(failure) if str(failure) else f"{type(failure).__name__}: at {where.filename}:{where.lineno}"
