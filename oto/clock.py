"""The clock for all measurements of time, in one place so that tests can replace it."""

from __future__ import annotations

import time

import torch


def now() -> float:
    """The time in seconds since an undefined moment; only differences are meaningful."""
    return time.perf_counter()


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished its queued work; does nothing on the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
