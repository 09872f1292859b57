"""Which of the long tests a run takes: all, or one part in rotation.

``--zoo-part 3/4`` takes the third of four parts of the zoo's models, and always the models that are new. Of the other
long tests it takes a part too, of at most :data:`OTHERS`. The parts are told apart by a hash of the name, so a test
stays in its part whatever else is added. ``--zoo-part auto/4`` takes the part by the commit's hash, so that runs on
consecutive commits take turns by chance, and the same commit always takes the same part. A part also exports its models
as graphs, which takes about as long as all the rest; a run of the whole zoo does so for every :data:`GRAPHS`-th model,
in turns by the commit, and for those that have no slim model of their own class.
"""

from __future__ import annotations

import re
import subprocess
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEW = 10  # a model is new for so many commits
OTHERS = 4  # long tests that are no models of the zoo are divided into so many parts at most
GRAPHS = 3  # of so many models one is exported as a graph in a run of the whole zoo


def parse(text: str) -> tuple[int, int]:
    """``"3/4"`` -> (3, 4).

    Raises:
        ValueError: It is no part.
    """
    match = re.fullmatch(r"(auto|\d+)/(\d+)", text)
    if match:
        of = int(match[2])
        part = int(_git("rev-parse", "HEAD")[:8] or "0", 16) % max(of, 1) + 1 if match[1] == "auto" else int(match[1])
        if 1 <= part <= of:
            return part, of
    raise ValueError(f"--zoo-part {text}: give a part and their number, such as 3/4, or auto/4")


def home(name: str, of: int) -> int:
    """The part, of so many, that a model lies in."""
    return zlib.crc32(name.encode()) % of + 1


def takes(k: int, of: int, test: str) -> bool:
    """Whether part ``k`` takes a long test that is no model."""
    return home(test, min(of, OTHERS)) == (k - 1) % min(of, OTHERS) + 1


def has_graph(name: str, whole: bool) -> bool:
    """Whether a run exports a model as a graph, too."""
    return not whole or home(name, GRAPHS) == int(_git("rev-parse", "HEAD")[:8] or "0", 16) % GRAPHS + 1


def seen_before() -> set[str] | None:
    """Models that the support matrix named some commits ago; ``None`` without that history: then none is new."""
    written = _git("show", f"HEAD~{NEW}:docs/support_matrix.md")
    return set(re.findall(r"^\| (\S+) \|", written, re.MULTILINE)) or None


def commit() -> str:
    """The commit that is checked out, in short; empty without git."""
    return _git("rev-parse", "--short", "HEAD").strip()


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
