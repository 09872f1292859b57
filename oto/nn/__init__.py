"""Small modules and functions for what stock classes cannot express."""

from oto.nn.modules import SWAPS, GroupNorm, LayerNorm, MultiheadAttention, RMSNorm, TransformerEncoder
from oto.nn.told import Told
from oto.nn.untrained import Untrained

__all__ = [
    "SWAPS",
    "GroupNorm",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "Told",
    "TransformerEncoder",
    "Untrained",
]
