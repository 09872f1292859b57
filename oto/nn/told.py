"""Where pickles of before 0.2 look for what is in :mod:`oto.nn.overridden` now."""

from oto.nn.overridden import OverriddenForward as Told
from oto.nn.overridden import OverriddenMethod as ToldMethod

__all__ = ["Told", "ToldMethod"]
