"""The contents of a sparse optimizer's checkpoint, and checks that a checkpoint fits.

    optimizer.state_dict()["param_groups"][0]["oto_atoms"]   # 0, 1, 2: free, redundant, pruned

All state of pruning is in a few entries of the first parameter group. (torch would drop further top-level keys of a
state dict, and would cast tensors in ``state`` to the dtype of the parameter.)

* ``oto_step``: number of steps taken, an int;
* ``oto_atoms``: the state of every atom, uint8 of shape ``(N,)``, prunable node group after node group;
* ``oto_sums``, ``oto_seen``: saliency criteria of every atom, float of shape ``(criteria, N)``, summed over
  ``oto_seen`` steps;
* ``oto_setup``: schedule, target and options as JSON, so that a checkpoint from a different setup is detected;
* ``oto_history``: ``history`` as JSON, at the last ``state_dict()``;
* ``oto_kept``: after the model was shrunk: which atoms of the full network it still has, bool of shape ``(full N,)``;
* for HSPG, DHSPG and H2SPG, ``oto_settled`` and ``oto_counts``: the state last read back from the device; and
  ``oto_by_choice``: how many groups were removed by the choice. For HESSO-CRIC, ``oto_walk``. For families,
  ``oto_levels``, ``oto_scores`` and ``oto_buffers``;
* within a period, with ``compensate=``, ``oto_fold``: the change of readers at each step, and how many steps remain.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from oto.errors import OTOError, SetupError, SetupWarning, ShrinkError, some, users_level


def ours(group: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a parameter group that hold state of pruning."""
    return {key: value for key, value in group.items() if key.startswith("oto_")}


def with_ours(saved: Mapping[str, Any], first: Mapping[str, Any], base: Optimizer) -> dict[str, Any]:
    """Add the state of pruning to the first parameter group of the wrapped optimizer's own state dict.

    Args:
        saved: The state dict; it is not changed.
        first: The first parameter group of the sparse optimizer.
        base: The wrapped optimizer.

    Raises:
        OTOError: The state dict has no parameter groups.
    """
    if not saved.get("param_groups"):
        raise OTOError(
            f"the state dict of {type(base).__name__} has no param_groups: {some(map(str, saved))}\n"
            "  effect  what pruning has to know cannot be saved with it\n"
            "  to fix  let its state_dict() hold param_groups as those of torch do"
        )
    own, *others = saved["param_groups"]
    return {**saved, "param_groups": [{**own, **ours(first)}, *others]}


def require_same_atoms(saved: Mapping[str, Any], here: Mapping[str, Any], atoms: int, removed: int) -> None:
    """Check that a checkpoint belongs to a model with the same atoms.

    Args:
        saved, here: The first parameter groups.
        atoms: Number of atoms of the model.
        removed: Number of atoms that were removed when the model was shrunk.

    Raises:
        OTOError: The two models were not shrunk to the same atoms, or the checkpoint is from a different model.
    """
    theirs, mine = saved.get("oto_kept"), here.get("oto_kept")
    left = f"{atoms} of {atoms + removed} groups"
    if theirs is None and mine is not None:
        raise OTOError(
            f"the state dict was saved before the model was shrunk, to {left}\n"
            "  effect  nothing was loaded\n"
            "  to fix  load it into the optimizer of the full model, and shrink then"
        )
    if theirs is not None and (mine is None or not same_mask(theirs, mine)):
        raise OTOError(
            f"the state dict was saved after the model was shrunk, to {int(theirs.sum())} of {len(theirs)} groups; "
            f"here are {left}, and not the same\n"
            "  effect  nothing was loaded\n"
            "  to fix  oto.shrink(optimizer, like=state_dict) on the full model first, then load"
        )
    if len(saved["oto_atoms"]) != atoms:
        raise OTOError(
            f"the state dict is for {len(saved['oto_atoms'])} prunable atoms, this optimizer has {atoms}\n"
            "  to fix  load it into an optimizer made for the same model with the same groups left whole"
        )


def same_mask(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and bool((left.cpu() == right.cpu()).all())


RENAMED = {"normalise": "normalize"}
"""Keys that had other names in state dicts from before 0.2."""


def require_same_setup(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Check that a checkpoint was saved under the same schedule, target and options.

    Args:
        saved, here: The first parameter groups.

    Raises:
        SetupError: The setups differ, and pruning has begun under one of the two. Before that, or if only ``align``
            differs, there is only a ``SetupWarning``.
    """
    mine: dict[str, Any] = json.loads(here["oto_setup"])
    theirs: dict[str, Any] = json.loads(saved.get("oto_setup", "null")) or mine
    theirs = {RENAMED.get(key, key): value for key, value in theirs.items()}
    differ = [key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)]
    if not differ:
        return
    step = saved["oto_step"]
    rows = [f"  {key}: {theirs.get(key)} in the checkpoint, {mine.get(key)} here" for key in differ]
    text = "\n".join([f"the state dict was saved after {step} steps under another setup", *rows])
    begun = any(step > setup.get("start_pruning_step", step) for setup in (theirs, mine))
    if not begun and not saved["oto_atoms"].any():
        text += "\n  effect  pruning had not begun, so what is asked for here counts"
        warnings.warn(text, SetupWarning, stacklevel=users_level())
        return
    if differ == ["align"]:  # its default depends on the device
        text += "\n  effect  what has gone stays gone; sizes are multiples of what is asked for here from now on"
        warnings.warn(text, SetupWarning, stacklevel=users_level())
        return
    raise SetupError(
        f"{text}\n  effect  pruning has begun there, or should have here: periods would be missed or cut short\n"
        "  to fix  make the optimizer as it was made then; to go on all the same, take 'oto_setup' out of"
        " state_dict['param_groups'][0]"
    )


def left_like(state_dict: Mapping[str, Any], have: Mapping[str, NDArray[np.bool_]]) -> dict[str, NDArray[np.bool_]]:
    """For each node group, which atoms of this model remained in another run whose model was shrunk; all if it was not.

    Args:
        state_dict: The state dict of the other run's optimizer.
        have: For each node group, which atoms of the full network this model has, bool.

    Raises:
        ShrinkError: The state dict belongs to another model, or to one with atoms that this model no longer has.
    """
    sizes = [len(own) for own in have.values()]
    first = state_dict["param_groups"][0] if state_dict.get("param_groups") else {}
    theirs = first.get("oto_kept")
    if theirs is None and len(first.get("oto_atoms", ())) == sum(sizes):
        theirs = torch.ones(sum(sizes), dtype=torch.bool)  # shrink had found nothing to remove there, or was not called
    if theirs is None or len(theirs) != sum(sizes):
        raise ShrinkError(
            "the state dict says nothing of what was left of this model: "
            + ("it is of no optimizer of this OTO" if theirs is None else f"it is of one of {len(theirs)} groups")
            + "\n  effect  nothing was changed\n"
            "  to fix  pass the state_dict() of the optimizer that oto made for this model"
        )
    masks = zip(have.items(), theirs.cpu().split_with_sizes(sizes), strict=True)
    left = {name: (own, mask.numpy()) for (name, own), mask in masks}
    if any((mask & ~own).any() for own, mask in left.values()):
        raise ShrinkError(
            "the state dict is of a model that has more left than this one\n  effect  nothing was changed\n"
            "  to fix  shrink the full model like it"
        )
    return {name: mask[own] for name, (own, mask) in left.items()}
