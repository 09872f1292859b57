"""Runs the tutorials as their readers do, and keeps what they print for the site, in docs/tutorials.

    python docs/record.py             # all of them (`make tutorials`): half an hour or more
    python docs/record.py 01 08       # these

The command is the first one of the lesson's own docstring. The first line of a recording says how, where and when it
was made, and what of the script it is (`generate.py` says on the page if the script has changed since).
"""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "tutorials").glob("[0-9]*.py"))
RECORDINGS = ROOT / "docs" / "tutorials"


def command(script: Path) -> str:
    """How the docstring says that the lesson is run in its default size."""
    return re.search(r"^    ((?:python|torchrun) .*?) *(?:#.*)?$", script.read_text(), re.MULTILINE)[1]  # type: ignore[index]


def digest(script: Path) -> str:
    return hashlib.sha256(script.read_bytes()).hexdigest()[:12]


def record(script: Path) -> None:
    """Run one, and write what it printed; what it said besides (warnings) is passed on."""
    said = command(script)
    launcher, *rest = shlex.split(said)
    modules = ["-m", "torch.distributed.run"] if launcher == "torchrun" else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default", "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *modules, *rest], cwd=ROOT, env=environment, text=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise SystemExit(f"{said} failed:\n{done.stdout[-2000:]}")
    minutes = sum(getattr(after, t) - getattr(before, t) for t in ("ru_utime", "ru_stime")) / 60
    now = datetime.datetime.now(datetime.UTC)
    where = f"{processor()}, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    head = f"$ {said}  # {now:%Y-%m-%d}, {where}, {minutes:.1f} minutes of CPU time, script {digest(script)}"
    text = re.sub(r"\S+(?=/site-packages/)", "…", done.stdout).replace(str(ROOT), "…")
    RECORDINGS.mkdir(exist_ok=True)
    (RECORDINGS / f"{script.stem}.txt").write_text(f"{head}\n{text.rstrip()}\n")


def processor() -> str:
    found = re.search(
        r"^model name\s*: (.*)$",
        Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else "",
        re.MULTILINE,
    )
    return found[1] if found else platform.machine()


if __name__ == "__main__":
    for lesson in LESSONS:
        if not sys.argv[1:] or lesson.name[:2] in sys.argv[1:]:
            print(lesson.name, flush=True)
            record(lesson)
