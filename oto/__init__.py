"""Only Train Once: a model in, trained once, a physically smaller module out that computes the same function."""

from oto.api import OTO
from oto.axes.registry import rule as register_rule
from oto.io.subnet import load_subnet
from oto.optim.hesso import HESSO
from oto.subnet import Subnet

__all__ = ["HESSO", "OTO", "Subnet", "load_subnet", "register_rule"]
__version__ = "0.1.0"
