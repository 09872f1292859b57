"""The model card (``README.md``) of a folder that the model's own library loads with ``from_pretrained``."""

from __future__ import annotations

from importlib import metadata
from typing import Protocol

from torch import nn

from oto.report.table import Described, cost_rows, subnet_lines


class Saved(Described, Protocol):
    """The part of a slim model that a card needs."""

    @property
    def model(self) -> nn.Module: ...


def card(subnet: Saved) -> str:
    """The text in Markdown: what became smaller, how it was proved, and what is needed to load it."""
    kind, library = type(subnet.model).__name__, type(subnet.model).__module__.partition(".")[0]
    head, *rows = cost_rows(subnet.cost_before, subnet.cost_after)
    table = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    lines = [
        "---",
        *([f"library_name: {library}"] if library in READERS else []),
        "tags: [pruning, oto]",
        "---",
        "",
        f"# {kind}, pruned",
        "",
        "A smaller network of the same class: whole channels and heads were trained to zero and left out.",
        "",
        *table,
        "",
        *(f"* {line}" for line in subnet_lines(subnet) if not line.startswith("saved in")),
        f"* written and read back with {library} {_version(library)}; other versions and programs may take other fields"
        " from the config",
        "",
    ]
    return "\n".join(lines)


READERS = ("transformers", "diffusers", "timm")
"""Libraries whose names may be the ``library_name`` of a model card."""


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "(of no package)"
