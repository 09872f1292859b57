"""The table of rules: every operator has a rule, is *fixed* on purpose with a reason, or is *unknown*.

Keys are ``torch.ops.aten`` objects. A packet (``aten.add``) stands for all of its overloads and for its in-place
variant; an overload (``aten.add.Tensor``) only for itself. Operators of other libraries, which may not be installed,
are registered by name: ``"torchvision::nms"``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

from oto._torch import OpOverload, OpOverloadPacket
from oto.axes.call import Call
from oto.errors import DuplicateRuleError

Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)

RULES: dict[Any, Rule] = {}
FIXED: dict[Any, str] = {}
NAMED: dict[str, Rule] = {}  # operators of other libraries


def _variants(op: Any) -> list[Any]:
    """An operator and its in-place variant: ``add`` and ``add_``."""
    if not isinstance(op, OpOverloadPacket):
        return [op]
    namespace = getattr(torch.ops, str(op).partition(".")[0])
    twin = getattr(namespace, f"{op.__name__}_", None)
    return [op] if twin is None else [op, twin]


def _claim(op: Any) -> None:
    present = NAMED.get(op) if isinstance(op, str) else RULES.get(op)
    if present is not None:
        raise DuplicateRuleError(
            f"{op} has a rule already\n  in      {'fixed on purpose' if op in FIXED else present.__module__}\n"
            "  to fix  keep one of the two"
        )


def _of(op: Any) -> dict[Any, Rule]:
    return NAMED if isinstance(op, str) else RULES


def rule(*ops: Any) -> Callable[[R], R]:
    """Register the decorated function as the rule of ``ops``.

    It is called as ``rule(call, *args, **kwargs)`` with the operator's arguments, an ``Operand`` in place of each
    tensor, and returns an ``Operand`` for each output.

    Raises:
        DuplicateRuleError: An operator has a rule already.
    """

    def register(function: R) -> R:
        for op in ops:
            for variant in _variants(op):
                _claim(variant)
                _of(variant)[variant] = function
        return function

    return register


def fixed(*ops: Any, why: str) -> None:
    """Register ``ops`` as operators that deliberately keep every dimension they touch whole.

    Raises:
        DuplicateRuleError: An operator has a rule already.
    """

    def keep(call: Call, *args: Any, **kwargs: Any) -> Any:
        return call.opaque(why)

    for op in ops:
        for variant in _variants(op):
            _claim(variant)
            FIXED[variant] = why
            _of(variant)[variant] = keep


def find(op: Any) -> Rule | None:
    """The rule of an operator, or ``None`` if it is unknown."""
    own = RULES.get(op)
    if own is None and isinstance(op, OpOverload) and not _fills(op):
        own = RULES.get(op.overloadpacket) or NAMED.get(op._schema.name)
    return own


def is_fixed(op: Any) -> bool:
    """Whether an operator deliberately keeps every dimension it touches whole."""
    if op in FIXED:
        return True
    return isinstance(op, OpOverload) and (op.overloadpacket in FIXED or op._schema.name in FIXED)


@cache
def _fills(op: OpOverload) -> bool:
    """Whether an operator writes its result into ``out=``, a tensor that the rule of the packet does not get."""
    return any(a.is_out for a in op._schema.arguments)


def known(op: Any) -> bool:
    return find(op) is not None
