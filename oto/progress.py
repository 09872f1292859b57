"""A progress line for long work: the current stage, and for how long it has been running.

It appears after two seconds, on a terminal or in a notebook; ``OTO_DISABLE_TQDM=1`` disables it. Elsewhere it is logged
every ten seconds, at level INFO of ``oto.progress``.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

log = logging.getLogger(__name__)

PATIENCE = 2.0
"""Seconds before anything is shown."""
BETWEEN = 10.0
"""Seconds between lines in a log."""


class _Stages:
    """The stages of one piece of work. A single call may take minutes, so a thread updates the line."""

    def __init__(self, title: str, is_bar: bool) -> None:
        self.is_bar = is_bar
        self.title, self.text, self.start = title, title, time.time()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.show, daemon=True)
        self.thread.start()

    def show(self) -> None:
        if self.over.wait(PATIENCE):
            return
        if not self.is_bar:
            self.write()
            return
        from tqdm.auto import tqdm

        with tqdm(desc=self.text, bar_format="{desc} [{elapsed}]", leave=False, file=sys.stderr) as bar:
            bar.start_t = self.start
            while not self.over.wait(0.5):
                bar.set_description_str(self.text)

    def write(self) -> None:
        log.info("%s [%.0f s]", self.text, time.time() - self.start)
        while not self.over.wait(BETWEEN):
            log.info("%s [%.0f s]", self.text, time.time() - self.start)

    def close(self) -> None:
        self.over.set()
        self.thread.join()


_running: ContextVar[_Stages | None] = ContextVar("running", default=None)


@contextmanager
def stages(title: str) -> Iterator[None]:
    """Context manager in which the stages named by :func:`stage` are shown; nested ones share the outer line."""
    is_bar = _wanted()
    if _running.get() is not None or not (is_bar or log.isEnabledFor(logging.INFO)):
        yield
        return
    running = _Stages(title, is_bar)
    token = _running.set(running)
    try:
        yield
    finally:
        _running.reset(token)
        running.close()


def stage(name: str) -> None:
    """Begin the next stage of the work that is running."""
    log.debug(name)
    running = _running.get()
    if running is not None:
        running.text = f"{running.title}: {name}"


def _wanted() -> bool:
    if os.environ.get("OTO_DISABLE_TQDM", "").lower() not in ("", "0", "false"):
        return False
    shell = sys.modules.get("IPython")
    kernel = shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"
    return kernel or (sys.stderr is not None and sys.stderr.isatty())
