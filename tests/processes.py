"""Processes of their own, forked from one that has imported torch, oto and transformers: importing is most of what a
short one takes.

    server().Process(target=work)                       # starts in a moment
    run_script("tutorials/09_your_own_operator.py", "--smoke", cwd=folder)   # what it printed

Where the system cannot fork they are started from nothing.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from multiprocessing.context import BaseContext
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
IMPORTED = (
    "torch._dynamo",
    "torch.distributed.tensor",
    "oto",
    "sklearn.datasets",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
)

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
"""What is read when torch, huggingface_hub and tqdm are imported, so before any script says so."""


@cache
def server() -> BaseContext:
    """Of ``multiprocessing``; what a process is forked from is started the first time."""
    context = multiprocessing.get_context(METHOD)
    if METHOD == "forkserver":
        context.set_forkserver_preload([name for name in IMPORTED if find_spec(name.partition(".")[0]) is not None])
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with mock.patch.dict(os.environ, {**ENVIRONMENT, "PYTHONPATH": path}):
            multiprocessing.forkserver.ensure_running()
    return context


@dataclass(frozen=True)
class Ran:
    """What became of a process: its exit code, and what it printed."""

    code: int | None
    out: str
    err: str


def run_script(script: Path, *flags: str, cwd: Path, ranks: int = 0) -> str:
    """What a script prints, run as ``python script flags`` does it, or by as many processes as ``torchrun`` starts.

    Raises:
        AssertionError: It failed; the message has the end of what it said.
    """
    ran = processes(script, *flags, cwd=cwd, ranks=ranks)
    assert not any(one.code for one in ran), "\n".join(one.err[-3000:] for one in ran if one.code)
    return "".join(one.out for one in ran)


def processes(script: Path, *flags: str, cwd: Path, ranks: int = 0, timeout: float = 1800) -> list[Ran]:
    """Run a script in a process, or in several that find each other by what their environment says."""
    started, port = [], free_port()
    for rank in range(max(ranks, 1)):
        said = cwd / f"{script.stem}.{rank}"
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks else {}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks else {}
        process = server().Process(target=_run, args=(str(script), flags, str(cwd), str(said), ENVIRONMENT | own))
        process.start()
        started.append((process, said))
    for process, _ in started:
        process.join(timeout)
        process.kill()  # what has not ended by then
        process.join()
    return [
        Ran(process.exitcode, Path(f"{said}.out").read_text(), Path(f"{said}.err").read_text())
        for process, said in started
    ]


def free_port() -> str:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _run(script: str, flags: Sequence[str], cwd: str, said: str, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in ((1, f"{said}.out"), (2, f"{said}.err")):
        with open(path, "w") as file:
            os.dup2(file.fileno(), number)
    sys.argv = [script, *flags]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
