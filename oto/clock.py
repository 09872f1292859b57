"""The one clock. Whatever is measured is read here, so that a test can put a clock of its own in its place."""

from __future__ import annotations

import time

import torch


def now() -> float:
    """Seconds since some moment; only differences mean anything."""
    return time.perf_counter()


def synchronize(device: torch.device) -> None:
    """Wait for what was asked of an accelerator; the CPU has done it already."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
