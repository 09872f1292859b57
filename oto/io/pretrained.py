"""Write a folder that the model's own library loads without ``oto``; the model's class writes the files.

The files are written into a scratch folder (:mod:`oto.atomic`), read back and compared there, and only then put in
place, while no other process may write there:

1. ``.oto-pretrained.json``, which lists every file, is renamed into the folder.
2. The files are renamed into it, ``config.json`` last: without it ``from_pretrained`` loads nothing, with it all.
3. ``.oto-pretrained.json`` is deleted.

If a save was killed in between, the next save finds the list. If every file is in place, the folder is complete and
only the list is deleted; otherwise the listed files are deleted too, unless they have changed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from oto.atomic import is_scratch, locked, rewording_os_errors, scratch, stamp, sync, unwritable
from oto.errors import ArtifactError, EmitterError, some
from oto.io.artifact import NOT_SAVED, check_out_dir
from oto.io.manifest import parse
from oto.slim.config.recipe import Recipe
from oto.slim.config.unstated import remedy, unlike

BESIDE = (".json", ".jinja", ".txt", ".model", ".tiktoken")
"""Suffixes of files beside the weights that define how inputs are made: tokenizers and processors."""

CONFIG = "config.json"
CARD = "README.md"
UNFINISHED = ".oto-pretrained.json"
WRITTEN_ANEW = ("config.json", "generation_config.json", ".index.json")


def save_pretrained(
    slim: nn.Module, out_dir: str | os.PathLike[str], tokenizer: Any = None, card: str = ""
) -> list[Path]:
    """Write config and weights with the class's own ``save_pretrained``, read them back and compare.

    Args:
        slim: A model whose ``config`` makes its class with its sizes.
        out_dir: A folder that is empty, does not exist yet, or was left half written by a killed save. A folder that
            already holds the same bytes stays unchanged.
        tokenizer: What to save beside the model (a tokenizer, a processor, or several): any object with a
            ``save_pretrained``. By default the files of the folder that the model was loaded from are copied.
        card: The text of ``README.md``, if wanted.

    Returns:
        The paths of the files.

    Raises:
        EmitterError: The class cannot be made from the config in these sizes; the message names them.
        ArtifactError: The folder cannot be written or holds files, or what was written reads back differently.
    """
    folder = Path(out_dir)
    _require_stated(slim)
    check_out_dir(folder)
    with rewording_os_errors(folder, NOT_SAVED), scratch(folder) as draft:
        with locked(folder):
            _end_what_broke_off(folder)
        there = _names(folder)
        if there and not (folder / CONFIG).is_file():  # with the config, the same model is already complete
            raise _holds(folder, there)
        try:
            _write(slim, draft, tokenizer, card)
        except safetensors.SafetensorError as failure:  # its own name for an OSError
            raise unwritable(folder, failure, NOT_SAVED) from failure
        written = sorted(path.relative_to(draft) for path in draft.rglob("*") if path.is_file())
        _put(draft, folder)
    return [folder / path for path in written]


def _write(slim: nn.Module, folder: Path, tokenizer: Any, card: str) -> None:
    slim.save_pretrained(folder)  # type: ignore[operator]
    extras = tokenizer if isinstance(tokenizer, list | tuple) else [] if tokenizer is None else [tokenizer]
    for extra in extras:
        extra.save_pretrained(folder)
    if tokenizer is None:
        _copy_beside(Path(str(getattr(slim.config, "_name_or_path", "") or "")), folder)
    if card and not (folder / CARD).exists():  # the hub's mixin writes its own
        (folder / CARD).write_text(card, encoding="utf-8")
    _require_same(slim, folder)


def _put(draft: Path, folder: Path) -> None:
    """Move the written files to their place, unless the same files are already there."""
    files = _stamps(draft)
    for path in (draft, *draft.rglob("*")):
        sync(path)
    listed = draft.parent / UNFINISHED
    listed.write_text(json.dumps(files), encoding="utf-8")
    sync(listed)
    with locked(folder):
        _end_what_broke_off(folder)
        if there := _names(folder):
            if files != _stamps(folder):
                raise _holds(folder, there)
            return
        os.replace(listed, folder / UNFINISHED)
        sync(folder)
        for path in sorted(draft.iterdir(), key=lambda path: path.name == CONFIG):
            if path.name == CONFIG:
                sync(folder)
            os.replace(path, folder / path.name)
        sync(folder)
        (folder / UNFINISHED).unlink()
        sync(folder)


def _end_what_broke_off(folder: Path) -> None:
    """Remove what a killed process put into a folder, unless the folder is complete."""
    try:
        files: dict[str, Any] = parse((folder / UNFINISHED).read_bytes())
        names = files.keys()
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
            raise ValueError("it names what is not below the folder")
    except FileNotFoundError:
        return
    except (ValueError, AttributeError) as failure:
        raise _holds(folder, [UNFINISHED]) from failure
    there = _stamps(folder)
    if any(there.get(name) != files[name] for name in names):
        for name in names:
            if there.get(name) == files[name]:
                (folder / name).unlink()
        below = {parent for name in names for parent in (folder / name).relative_to(folder).parents} - {Path()}
        for place in sorted(below, reverse=True):
            with suppress(OSError):  # the folder does not exist, or is not empty
                (folder / place).rmdir()
        sync(folder)
    (folder / UNFINISHED).unlink()
    sync(folder)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not is_scratch(path.name))


def _stamps(folder: Path) -> dict[str, Any]:
    """Size and hash of the files of a folder, by relative path, except files of a write in progress."""
    below = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        name.as_posix(): stamp(path)
        for name, path in below.items()
        if not is_scratch(name.parts[0]) and name.parts[0] != UNFINISHED
    }


def _holds(folder: Path, names: list[str]) -> ArtifactError:
    return ArtifactError(
        f"{folder} holds {some(names)}\n"
        "  effect  nothing was written, and nothing there was touched\n  to fix  choose a new folder"
    )


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
    raise EmitterError(f"{unlike(slim)}\n  effect  nothing was written\n{remedy(slim)}")


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
    """Check that every tensor that the class reads back equals the model's."""
    again = type(slim).from_pretrained(folder)  # type: ignore[attr-defined]
    own, read = slim.state_dict(), again.state_dict()
    made, remade = dict(slim.named_buffers()), dict(again.named_buffers())  # some are not saved
    wrong = [
        name for name in {**own, **read} if name not in own or name not in read or not _equal(own[name], read[name])
    ]
    wrong += [name for name in {**made, **remade} if name not in made or name not in remade]
    near = (name for name in made.keys() & remade.keys() if made[name].is_floating_point())
    wrong += [name for name in near if not torch.allclose(made[name].cpu().float(), remade[name].cpu().float(), 1e-2)]
    if wrong:
        raise ArtifactError(
            f"what {type(slim).__name__} wrote reads back differently: {some(sorted(wrong))}\n"
            "  effect  nothing was written\n"
            "  to fix  report the model; construct_subnet(out_dir) and load_subnet(out_dir, make_model) do not use it"
        )


def _equal(a: Any, b: Any) -> bool:
    return (
        torch.equal(a.cpu(), b.cpu()) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else bool(a == b)
    )
