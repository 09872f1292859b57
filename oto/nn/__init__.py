"""Small modules and functions for slim layers that stock classes cannot express."""

from __future__ import annotations

from typing import Any

from oto.nn.erased import ErasedForward
from oto.nn.modules import SWAPS, GroupNorm, LayerNorm, MultiheadAttention, RMSNorm, TransformerEncoder
from oto.nn.overridden import OverriddenForward
from oto.nn.untrained import Untrained
from oto.renamed import warn_of_former_name

__all__ = [
    "SWAPS",
    "ErasedForward",
    "GroupNorm",
    "LayerNorm",
    "MultiheadAttention",
    "OverriddenForward",
    "RMSNorm",
    "TransformerEncoder",
    "Untrained",
]


def __getattr__(name: str) -> Any:
    if name != "Told":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_of_former_name("oto.nn.Told", "oto.nn.OverriddenForward")
    return OverriddenForward
