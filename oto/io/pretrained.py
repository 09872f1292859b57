"""A folder that the model's own library loads, written by the class itself, for processes without ``oto``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oto.errors import ArtefactError, EmitterError, some
from oto.io.artefact import check_out_dir
from oto.slim.recipe import Recipe
from oto.slim.unstated import REMEDY, unlike

BESIDE = (".json", ".jinja", ".txt", ".model", ".tiktoken")
"""What lies beside weights and says how inputs are made: tokenizers and processors."""

WRITTEN_ANEW = ("config.json", "generation_config.json", ".index.json")


def save_pretrained(slim: nn.Module, out_dir: str | os.PathLike[str], tokenizer: Any = None) -> list[Path]:
    """Write config and weights by the class's own ``save_pretrained``, read them back and compare.

    Args:
        slim: A model whose ``config`` makes its class in its sizes.
        out_dir: A folder that is empty or not there yet.
        tokenizer: What is to be saved beside it (a tokenizer, a processor, or several): anything that has a
            ``save_pretrained``. By default the files of the folder that the model was loaded from are copied.

    Returns:
        The files.

    Raises:
        EmitterError: The class cannot be made from the config in these sizes; the message names them.
        ArtefactError: The folder cannot be written or holds files, or what was written reads otherwise.
    """
    folder = Path(out_dir)
    _require_stated(slim)
    check_out_dir(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ArtefactError(
            f"{folder} holds {some(sorted(p.name for p in folder.iterdir()))}\n"
            "  effect  nothing was written, and nothing there was touched\n  to fix  choose a new folder"
        )
    slim.save_pretrained(folder)  # type: ignore[operator]
    extras = tokenizer if isinstance(tokenizer, list | tuple) else [] if tokenizer is None else [tokenizer]
    for extra in extras:
        extra.save_pretrained(folder)
    if tokenizer is None:
        _copy_beside(Path(str(getattr(slim.config, "_name_or_path", "") or "")), folder)
    _require_same(slim, folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _require_stated(slim: nn.Module) -> None:
    kind = type(slim).__name__
    missing = [name for name in ("config", "save_pretrained", "from_pretrained") if not hasattr(slim, name)]
    if missing:
        raise EmitterError(
            f"{kind} has no {some(missing)}, so its class writes no folder of its own\n"
            "  effect  nothing was written\n  to fix  construct_subnet(out_dir), and load_subnet(out_dir, make_model);"
            " what a function made is made again by function(**subnet.config), with subnet.model.state_dict()"
        )
    if Recipe.of(slim) is not None:
        return
    raise EmitterError(f"{unlike(slim)}\n  effect  nothing was written\n{REMEDY}")


def _copy_beside(source: Path, folder: Path) -> None:
    if not str(source) or str(source) == "." or not source.is_dir():
        return
    for path in _files(source):
        target = folder / path.name
        if path.name.endswith(BESIDE) and not path.name.endswith(WRITTEN_ANEW) and not target.exists():
            shutil.copyfile(path, target)


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file())


def _require_same(slim: nn.Module, folder: Path) -> None:
    """Compare every tensor of what the class reads with the model."""
    again = type(slim).from_pretrained(folder)  # type: ignore[attr-defined]
    own, read = slim.state_dict(), again.state_dict()
    made, remade = dict(slim.named_buffers()), dict(again.named_buffers())  # some are in no file
    wrong = [
        name for name in {**own, **read} if name not in own or name not in read or not _equal(own[name], read[name])
    ]
    wrong += [name for name in {**made, **remade} if name not in made or name not in remade]
    near = (name for name in made.keys() & remade.keys() if made[name].is_floating_point())
    wrong += [name for name in near if not torch.allclose(made[name].cpu().float(), remade[name].cpu().float(), 1e-2)]
    if wrong:
        raise ArtefactError(
            f"what {type(slim).__name__} wrote reads otherwise: {some(sorted(wrong))}\n"
            f"  effect  {folder} holds a model that is not the slim one\n"
            "  to fix  report the model; construct_subnet(out_dir) and load_subnet(out_dir, make_model) do not go by it"
        )


def _equal(a: Any, b: Any) -> bool:
    return (
        torch.equal(a.cpu(), b.cpu()) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else bool(a == b)
    )
