"""Find out what the user's own class needs to run with thinner tensors, by running it.

The loop is in :mod:`~oto.slim.own_class.search`. It compares the calls of a thinner copy with those of the full model
(``compare``, ``detours``). At the first call that differs it tries repairs (``repairs``, one kind per file); each
proposes a new frozen value (``adaptation``). ``trials`` decides which groups are thinner in a try; the copy runs on a
``workbench``. ``layers`` adapts the layers of ``torch.nn``, ``overrides`` the torch functions that the class calls.
"""

from oto.slim.own_class.layers import plan_edits
from oto.slim.own_class.result import Decision, OwnClass
from oto.slim.own_class.search import at_counts, limited, own_class

__all__ = ["Decision", "OwnClass", "at_counts", "limited", "own_class", "plan_edits"]
