"""What the user's own class needs to run with thinner tensors, found by running it.

The loop is in :mod:`~oto.slim.own_class.search`: compare the calls of a thinner copy with those of the full model
(``compare``, ``detours``), and at the first that differs try repairs (``repairs``, one kind per file), each a pure
proposal on a frozen value (``adaptation``). ``trials`` decides which groups are thinner in a try; the copy runs on a
``workbench``; ``layers`` knows the layers of ``torch.nn``, ``overrides`` the torch functions that the class calls.
"""

from oto.slim.own_class.layers import plan_edits
from oto.slim.own_class.result import Decision, OwnClass
from oto.slim.own_class.search import at_counts, limited, own_class

__all__ = ["Decision", "OwnClass", "at_counts", "limited", "own_class", "plan_edits"]
