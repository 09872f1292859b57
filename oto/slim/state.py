"""Find what forwards have left in a model (caches), so that it can be analyzed and made slim without them."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from oto._torch import TorchDispatchMode, tree_leaves
from oto.errors import first_line, reraise_out_of_memory
from oto.slim.proof.compare import relative_error, tolerance
from oto.slim.proof.float64 import dtype_of
from oto.slim.proof.run import run
from oto.trace.stand_ins import on_meta
from oto.trace.state import Change, ModelState, tables, undone

log = logging.getLogger(__name__)


def left_since(state: ModelState, model: nn.Module, dummy_input: Any, known: Collection[str]) -> list[Change]:
    """State such as caches that a forward left in a model after its analysis; empty if the outputs depend on it.

    Args:
        state: What the model held when it was analyzed.
        model: The model, or a copy of it.
        known: Names of tensors that the analysis knows; they keep their present values.
    """
    changes = state.changes(model, known)
    if not changes:
        return []
    same = _computes_the_same(model, dummy_input, changes)
    log.info("the state that a forward left is %s", "undone" if same else "part of what the model computes")
    return changes if same else []


def left_before(model: nn.Module, dummy_input: Any) -> list[Change]:
    """Tables in containers and objects that a forward left before the analysis, and that the next forward recreates.

    They have no name under which a thinner table could replace them.
    """
    found = [] if on_meta(model) else tables(model)
    if not found:
        return []
    with _Met() as met:
        try:
            run(model, dummy_input)
        except Exception as failure:  # reported when the model is recorded
            reraise_out_of_memory(failure)
            return []
    found = [change for change in found if any(id(tensor) in met.ids for tensor in change.tensors)]
    if not found or _computes_the_same(model, dummy_input, found):
        return found
    alone: list[Change] = []
    for change in found[:_TRIES] if len(found) > 1 else ():
        alone += [change] if _computes_the_same(model, dummy_input, [*alone, change]) else []
    return alone


_TRIES = 8
"""The limit on containers that are tried one by one; a model with more constants in containers computes with them."""


class _Met(TorchDispatchMode):
    """Collects the tensors that are passed to calls."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ids: set[int] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ids.update(id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        return op(*args, **(kwargs or {}))


def _computes_the_same(model: nn.Module, dummy_input: Any, changes: list[Change]) -> bool:
    """Whether a model returns the same outputs on the example if some changes are undone."""
    try:
        now = run(model, dummy_input)
        with undone(changes):
            then = run(model, dummy_input)
    except Exception as failure:  # the model needs them
        reraise_out_of_memory(failure)
        log.info("what a forward left cannot be undone: %s", first_line(failure))
        return False
    return relative_error(now, then) <= tolerance(dtype_of(model))
