"""How much memory is free."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


def available(model: nn.Module) -> int | None:
    """Free bytes on a model's device; ``None`` if unknown."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    known = [free for free in (_of_the_machine(), _of_the_container()) if free is not None]
    return min(known, default=None)


def _of_the_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kilobytes is None else int(kilobytes) * 1024


_CONTAINER = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def _of_the_container() -> int | None:
    """Bytes that the control group of this process may still allocate; inactive file pages count as free."""
    for limit, used, cached in _CONTAINER:
        try:
            most, now = Path(limit).read_text().strip(), int(Path(used).read_text())
            stat = dict(line.split() for line in Path(used).with_name("memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        return int(most) - now + int(stat.get(cached, 0)) if most.isdigit() else None
    return None


def size_of(count: float) -> str:
    """A number of bytes in readable units.

    >>> size_of(3.2e9), size_of(4e6)
    ('3.2 GB', '4 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
