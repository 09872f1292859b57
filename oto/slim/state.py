"""What later forwards have left in a model, and a slim one of it is made without."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from torch import nn

from oto.errors import first_line, out_of_memory
from oto.slim.verify import TOLERANCE, relative_error, run
from oto.slim.wide import dtype_of
from oto.trace.state import Change, State, undone

log = logging.getLogger(__name__)


def left_since(state: State, model: nn.Module, dummy_input: Any, known: Collection[str]) -> list[Change]:
    """Caches and the like that a forward left in a model after it was analysed; none if it computes otherwise without.

    Args:
        state: What the model held when it was analysed.
        model: That one, or a copy of it.
        known: Names of tensors that the analysis knows; they count as they are now.
    """
    changes = state.changes(model, known)
    if not changes:
        return []
    try:
        now = run(model, dummy_input)
        with undone(changes):
            then = run(model, dummy_input)
    except Exception as failure:  # what is left of a cache may not do
        if out_of_memory(failure):
            raise
        log.info("the state that a forward left cannot be undone: %s", first_line(failure))
        return []
    same = relative_error(now, then) <= TOLERANCE.get(dtype_of(model), 1e-3)
    log.info("the state that a forward left is %s", "undone" if same else "part of what the model computes")
    return changes if same else []
