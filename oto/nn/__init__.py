"""Small modules and functions for what stock classes cannot express."""

from oto.nn.modules import SWAPS, GroupNorm, LayerNorm, MultiheadAttention, RMSNorm

__all__ = ["SWAPS", "GroupNorm", "LayerNorm", "MultiheadAttention", "RMSNorm"]
