"""One file per family of operators. Importing this package registers them all."""

from oto.axes.rules import attention, conv, creation, index, linear, norm, pointwise, pool, reduce, shape, vision

__all__ = ["attention", "conv", "creation", "index", "linear", "norm", "pointwise", "pool", "reduce", "shape", "vision"]
