"""The former name of :mod:`oto.nn.overridden`, where pickles from before 0.2 look for its classes."""

from oto.nn.overridden import OverriddenForward as Told
from oto.nn.overridden import OverriddenMethod as ToldMethod

__all__ = ["Told", "ToldMethod"]
