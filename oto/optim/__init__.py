"""Sparse optimizers: each wraps a ``torch.optim.Optimizer`` and drives the least salient groups to zero."""

from __future__ import annotations

from oto.optim.base import SparseOptimizer
from oto.optim.choice import Choice
from oto.optim.cric import HESSOCRIC
from oto.optim.dhspg import DHSPG
from oto.optim.h2spg import H2SPG
from oto.optim.hesso import HESSO
from oto.optim.hspg import HSPG
from oto.optim.lhspg import LHSPG
from oto.optim.saliency import CRITERIA, Entries, Saliency
from oto.optim.schedule import Progress, Schedule
from oto.optim.target import Measure, Target

__all__ = [
    "CRITERIA",
    "DHSPG",
    "H2SPG",
    "HESSO",
    "HESSOCRIC",
    "HSPG",
    "LHSPG",
    "Choice",
    "Entries",
    "Measure",
    "Progress",
    "Saliency",
    "Schedule",
    "SparseOptimizer",
    "Target",
]
