"""One file per family of operators. Importing this package registers them all."""

from oto.axes.rules import (
    attention,
    control,
    conv,
    creation,
    distance,
    index,
    linear,
    loss,
    norm,
    pointwise,
    pool,
    quantize,
    recurrent,
    reduce,
    routing,
    shape,
    vision,
)

__all__ = [
    "attention", "control", "conv", "creation", "distance", "index", "linear", "loss", "norm", "pointwise", "pool",
    "quantize", "recurrent", "reduce", "routing", "shape", "vision",
]  # fmt: skip
