"""Prove a slim model: it holds the kept entries of the full model and computes the same."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from oto.errors import VerificationError, first_line, reraise_out_of_memory, some
from oto.progress import stage
from oto.slim.edits import Edits, Scale, attribute, named_tensors, pruned_tensor, renumbered, slim_copy
from oto.slim.proof import limits
from oto.slim.proof.compare import Check, require
from oto.slim.pruned_shapes import PrunedShapes
from oto.slim.source import Emitted, Source
from oto.trace.graph import Leaf

log = logging.getLogger(__name__)


def prove(source: Source, emitted: Emitted, checks: list[Check] | None = None) -> list[Check]:
    """Prove, if ``source.verify``, that a slim model holds the full model's kept entries and computes the same.

    Limits of the comparison are added to the notes: entries that are not finite, constant outputs, and parameters that
    no output depends on.

    Args:
        checks: The comparisons, if they have been made already.

    Raises:
        VerificationError: The slim model differs, or nothing could be compared.
    """
    if not source.verify:
        return []
    notes, reference = emitted.notes, source.reference
    require_held(source.model, emitted, source.pruned)
    checks = emitted.compare(reference) if checks is None else checks
    require(checks)
    notes.extend([*reference.full.notes, *reference.notes])
    notes.extend(limits.how_many_are_numbers(reference.partial))
    if emitted.emitter != "recording":  # recordings have a note of their own
        notes.extend(limits.other_paths(source.partition.found.graph.script))
    idle = limits.constant(reference.full)
    if idle:
        checks = checks + _with_random_constants(source, emitted, idle, notes)
    if checks and len(idle) < len(limits.floating(reference.full)):
        notes.extend(reference.unreached(emitted.model, _pruned_parameters(emitted, source.pruned)))
    return checks


def require_held(model: nn.Module, emitted: Emitted, pruned: PrunedShapes) -> None:
    """Check that a slim model holds the kept entries of the full one's tensors, bit for bit.

    A comparison of outputs cannot show that: an input may not look up every row of a table or activate every unit.

    Raises:
        VerificationError: The slim model holds something else.
    """
    slim, layers = _named(emitted), emitted.edits.layers if emitted.edits is not None else {}
    changed = {name for name in emitted.tensors if renumbered(name, layers) in emitted.changed}
    wrong: list[str] = []
    unknown: list[str] = []
    for leaf in pruned.found.graph.leaves:
        names = [name for name in leaf.names if name in emitted.tensors and name not in changed]
        own = {id(slim[name]): name for name in names if name in slim}
        if own:
            scales = emitted.scales.get(leaf.name, ())
            for name in own.values():
                same = _holds(slim[name].detach(), model, pruned, leaf, scales)
                (unknown if same is None else wrong).extend([] if same else [name])
    if unknown:
        emitted.notes.append(
            f"the entries of {some(unknown)} were not compared one by one: torch cannot compare tensors of their layout"
        )
    if wrong:
        raise VerificationError(
            f"the slim model does not hold the kept entries of the zeroed model: {some(wrong)}\n"
            "  effect  nothing was written\n"
            "  to fix  report the model; until then mark the groups concerned unprunable"
        )


_BLOCK = 1 << 22
"""How many entries are compared at a time, so that no second copy of a large table is made."""


def _holds(own: Tensor, model: nn.Module, pruned: PrunedShapes, leaf: Leaf, scales: Sequence[Scale]) -> bool | None:
    """Whether a slim tensor holds the kept entries of the full one; ``None`` if unknown."""
    full = attribute(model, leaf.names[0])
    if scales or own.layout != torch.strided or own.numel() <= _BLOCK or type(full.detach()) is not Tensor:
        return _same(pruned_tensor(model, pruned, leaf, scales), own)
    if own.shape != pruned.shape(leaf):
        return False
    rows = torch.from_numpy(np.flatnonzero(pruned.entries(leaf)[0])).to(full.device)
    step, at = max(1, _BLOCK * len(own) // own.numel()), 0
    for some_rows in rows.split(step):
        wanted = pruned.prune(leaf, full.detach().index_select(0, some_rows), known=1)
        if not (same := _same(wanted, own[at : at + len(some_rows)])):
            return same
        at += len(some_rows)
    return True


def _same(a: Tensor, b: Tensor) -> bool | None:
    """Whether two tensors are equal in dtype, shape and every entry; NaN equals NaN. ``None`` if unknown."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    try:
        return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, 0, 0, equal_nan=True))
    except (RuntimeError, NotImplementedError) as failure:  # layouts without such an operator
        log.info("not compared: %s", first_line(failure))
        return None


def _named(emitted: Emitted) -> dict[str, Tensor]:
    """The tensors of a slim model by their names in the full model."""
    held, layers = named_tensors(emitted.model), emitted.edits.layers if emitted.edits is not None else {}
    names = (
        {name: renumbered(name, layers) for name in emitted.tensors} if layers else dict(zip(held, held, strict=True))
    )
    return {name: held[new] for name, new in names.items() if new in held}


def _pruned_parameters(emitted: Emitted, pruned: PrunedShapes) -> dict[str, nn.Parameter]:
    """The parameters of a slim model that have lost entries and that its forward reads in eval mode."""
    own = {name: p for name, p in _named(emitted).items() if isinstance(p, nn.Parameter)}
    read = pruned.found.graph.read
    leaves = [leaf for leaf in pruned.found.graph.leaves if leaf.kind == "parameter" and leaf.value in read]
    smaller = [leaf for leaf in leaves if pruned.shape(leaf) != tuple(leaf.value.shape)]
    return {name: own[name] for leaf in smaller for name in leaf.names[:1] if name in own}


def _with_random_constants(source: Source, emitted: Emitted, idle: list[int], notes: list[str]) -> list[Check]:
    """If outputs are the same for every input, compare once more with random numbers in constant parameters."""
    stage("an output is constant: comparing with random numbers in constant parameters")
    said = f"of the full model, {_outputs(idle)} {'are' if len(idle) > 1 else 'is'} the same for every input"
    randomized = with_random_constants(source)
    other = replace(source, model=randomized, brief=True)
    try:
        checks = emitted.again(other).compare(other.reference)
        require(checks)
    except VerificationError:
        raise
    except Exception as failure:  # the code may fail with other numbers
        reraise_out_of_memory(failure)
        notes.append(f"{said}, so comparing them shows nothing ({first_line(failure)} with other numbers)")
        return []
    by_design = limits.constant(other.reference.full)
    moved = [i for i in idle if i not in by_design]
    if moved:
        notes.append(
            f"{said}, probably because a layer is initialized with zeros, so comparing shows nothing of what is before"
            " it. Compared again with random numbers in constant parameters; load trained weights to compare these"
        )
        return [replace(c, what=f"{c.what}, with other numbers in constant parameters") for c in checks]
    if len(idle) == len(limits.floating(source.reference.full)):
        notes.append(f"{said}, whatever the parameters are: comparing it shows nothing")
    return []


def _outputs(indices: list[int]) -> str:
    return f"output{'s' * (len(indices) > 1)} {some(map(str, indices))}"


def with_random_constants(source: Source) -> nn.Module:
    """A copy that shares a model's parameters, except constant ones, whose kept entries are random numbers."""
    model, pruned = source.model, source.pruned
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    zero = {leaf for segment in source.partition.erased(source.kept) for leaf in segment.writers}
    for leaf in pruned.found.graph.leaves:
        if not leaf.names or leaf in zero:
            continue
        tensor = attribute(model, leaf.names[0]).detach()
        if leaf.kind == "parameter" and tensor.is_floating_point() and tensor.numel() and tensor.min() == tensor.max():
            stays = torch.ones(tensor.shape, dtype=torch.bool)
            for dim, mask in enumerate(pruned.entries(leaf)):
                stays &= torch.from_numpy(mask).view(-1, *[1] * (tensor.ndim - dim - 1))
            drawn = torch.rand(tensor.shape, generator=generator) * 0.1 * stays
            tensor = tensor + drawn.to(tensor)
        tensors.update(dict.fromkeys(leaf.names, tensor))
    return slim_copy(model, tensors, Edits())
