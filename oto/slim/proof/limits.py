"""Find the limits of a comparison with the full model: NaN equals NaN, and a constant output equals itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from oto._torch import tree_leaves
from oto.errors import EmitterError, VerificationError, some
from oto.nn import OverriddenForward
from oto.slim.proof.compare import Check
from oto.slim.proof.full import FullModel
from oto.slim.proof.inputs import differs
from oto.slim.proof.reach import equal
from oto.slim.proof.run import run
from oto.trace.decisions import Script
from oto.trace.recorder import around_modules


def require_numbers(full: FullModel) -> None:
    """Refuse a full model whose outputs on the example hold no finite number, because NaN equals NaN.

    Raises:
        VerificationError: No entry of its outputs is finite, not even in float64.
    """
    own = full.outputs(full.example) or []
    if any(_is_number(x).any() for x in own) or not any(x.numel() for x in own):
        return
    wide = full.dtype != torch.float64 and full.runs_in_float64()  # the model's own dtype may overflow
    if wide and any(_is_number(x).any() for x in full.wide[full.example] or []):
        return
    broken = [name for name, held in full.model.named_buffers() if not _is_number(held).all()]
    given = [t for t in tree_leaves(full.example.value) if isinstance(t, Tensor) and not _is_number(t).all()]
    causes = [f"NaN or infinity in the example ({some(str(tuple(t.shape)) for t in given)})"] if given else []
    causes += [f"NaN or infinity in buffers: {some(broken)}"] if broken else []
    raise VerificationError(
        f"{type(full.model).__name__} gives no number on the example that could be compared, all is NaN or inf\n"
        f"  found   {'; '.join(causes or ['probably an overflow: all of its inputs are finite'])}\n"
        "  effect  a wrong slim model would give the same, so no subnet is built\n"
        "  to fix  pass an example of finite numbers on which the outputs are finite too"
    )


def require_own(full: FullModel, slim: nn.Module) -> None:
    """Refuse a slim model whose forward runs the full model: a function assigned to ``forward`` may refer to it.

    Raises:
        EmitterError: The slim model runs a module of the full one.
    """
    patched = [
        m for m in slim.modules() if "forward" in vars(m) and not isinstance(vars(m)["forward"], OverriddenForward)
    ]
    if not patched or slim is full.model:
        return
    own = {id(m) for m in slim.modules()}
    theirs = {
        id(m): name for name, m in full.model.named_modules() if id(m) not in own and any(True for _ in m.parameters())
    }
    met: list[str] = []
    with around_modules(lambda module, _: met.extend([theirs[id(module)]] if id(module) in theirs else [])):
        run(slim, full.example.value)
    if met:
        raise EmitterError(
            f"a forward that was put into the model (model.forward = ...) runs {met[0] or 'the full model'} itself,"
            " in the slim copy too\n"
            "  effect  the slim model would compute with the full weights, so it is not returned\n"
            "  to fix  remove it first (del model.forward), or assign a method: types.MethodType(f, model)"
        )


def how_many_are_numbers(partial: Sequence[Check]) -> list[str]:
    """A note on how many entries of the outputs are finite, as comparing the others shows little; none if all are."""
    if not partial:
        return []
    least = min(partial, key=lambda check: (check.finite or 0) / (check.entries or 1))
    return [
        f"of the outputs {least.finite:,} of {least.entries:,} entries are finite ({least.what}, {least.dtype}): the"
        " others are known only to be NaN, or the same infinity, in both models"
    ]


def other_paths(script: Script | None) -> list[str]:
    """A note if the code of a model may take other paths on other data, otherwise none."""
    if script is None or not script.written:
        return []
    return ["the model's code looks at values of its data: a path that no compared input took was not compared"]


def floating(full: FullModel) -> list[int]:
    """Indices of the floating-point outputs."""
    outputs = full.own.get(full.example) or full.wide.get(full.example) or ()
    return [i for i, x in enumerate(outputs) if x.is_floating_point() and x.numel()]


def constant(full: FullModel) -> list[int]:
    """Indices of the outputs that are zero or the same for every input, so comparing them shows nothing."""
    runs = [x for table in (full.own, full.wide) for x in table.values() if x is not None]
    return [i for i in floating(full) if not any(t[i].any() for t in runs) or _is_constant(full, i)]


def _is_constant(full: FullModel, i: int) -> bool:
    """Whether an output is the same for the example and for random inputs that differ from it."""
    others = [
        (table[full.example], outputs, given)
        for table in (full.own, full.wide)
        for given, outputs in table.items()
        if given != full.example and outputs is not None and table.get(full.example) is not None
    ]
    shown = False
    for first, other, given in others:
        assert first is not None
        a, b = first[i], other[i]
        if a.ndim != b.ndim or a.shape[1:] != b.shape[1:] or not differs(given.value, full.example.value):
            continue
        n = min(len(a), len(b)) if a.ndim else None
        if not equal(*((a, b) if n is None else (a[:n], b[:n]))):
            return False
        shown = True
    return shown


def _is_number(x: Tensor) -> Tensor:
    return torch.isfinite(x) if x.is_floating_point() or x.is_complex() else torch.ones_like(x, dtype=torch.bool)
