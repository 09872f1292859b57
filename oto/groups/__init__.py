"""Find node groups and zero-invariant groups, decide which stay whole, and compute their cost."""

from oto.groups.cost import Cost, Costs, cost
from oto.groups.node_group import Cut, NodeGroup, Slice
from oto.groups.partition import Kept, Partition, partition, pruned_groups, trainable

__all__ = [
    "Cost",
    "Costs",
    "Cut",
    "Kept",
    "NodeGroup",
    "Partition",
    "Slice",
    "cost",
    "partition",
    "pruned_groups",
    "trainable",
]
