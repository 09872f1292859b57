"""Artifacts that somebody made up, and a sandbox that notices what loading one does to the process."""

from __future__ import annotations

import builtins
import contextlib
import copy
import functools
import io
import json
import logging
import os
import random
import resource
import shutil
import sys
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from oto import load_subnet
from oto.errors import OTOError
from oto.io import artifact
from oto.slim.own_class.attributes import numbers

HONEST = ("torch", "sympy", "mpmath", "encodings", "transformers", "timm")  # what a load may import
MEMORY = 3 * 2**30  # bytes of addresses that a load may ask for, beside those that there are


@dataclass
class Kind:
    """An artifact, and what it is loaded with.

    Attributes:
        model: The full model; none where the program is loaded.
        given: What its forward takes.
        watched: Classes and modules that nothing of it may change.
    """

    folder: Path
    model: nn.Module | None
    given: Any
    watched: tuple[Any, ...] = ()


# --- the sandbox ------------------------------------------------------------------------------------------------------


class Held:
    """What a class or a module holds: the very same things, and in functions and members of enums what was there."""

    def __init__(self, thing: Any) -> None:
        self.values = dict(vars(thing))
        self.inside = {
            name: (getattr(value, "__code__", None), dict(vars(value)))
            for name, value in self.values.items()
            if isinstance(value, types.FunctionType | Enum)
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and not self.changed(other)

    __hash__ = None  # type: ignore[assignment]

    def changed(self, other: Held) -> list[str]:
        names = self.values.keys() | other.values.keys()
        moved = [n for n in names if self.values.get(n, self) is not other.values.get(n, other)]
        return moved + [
            n for n in self.inside.keys() | other.inside.keys() if self.inside.get(n) != other.inside.get(n)
        ]


def process(kind: Kind) -> dict[str, Any]:
    """What loading a file may not change, by name."""
    state: dict[str, Any] = {
        "sys.path": list(sys.path),
        "sys.meta_path": list(sys.meta_path),
        "sys.path_hooks": list(sys.path_hooks),
        "excepthook": sys.excepthook,
        "cwd": os.getcwd(),
        "environ": dict(os.environ),
        "umask": _umask(),
        "modules": {name for name in sys.modules if not name.startswith(HONEST)},
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "seed": torch.initial_seed(),
        "anomaly": torch.is_anomaly_enabled(),
        "device": torch.get_default_device(),
        "filters": list(warnings.filters),
        "levels": {name: logging.getLogger(name).level for name in ("", "torch", "torch.export", "oto")},
        "files": _open_files(),
        "folder": {p.name: p.lstat().st_size for p in kind.folder.iterdir()},
    }
    state["torch's numbers"] = bytes(torch.get_rng_state().numpy())
    state["numpy's numbers"] = repr(np.random.get_state())  # noqa: NPY002
    state["Python's numbers"] = random.getstate()
    own = [module for name, module in sys.modules.items() if name.startswith("oto.")]
    for thing in (*WATCHED, *_classes(kind), *kind.watched, *own):
        state[f"{getattr(thing, '__module__', '')} {thing.__name__}"] = Held(thing)
    for path, module in kind.model.named_modules() if kind.model is not None else ():
        state[f"numbers of {path}"] = dict(numbers(module))
    return state


def _open_files() -> list[str]:
    """The files on a disk that are open: pipes and devices come and go with threads of torch."""
    found = []
    for link in Path("/proc/self/fd").iterdir() if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):  # the folder itself, while it is read
            found.append(os.readlink(link))
    return sorted(name for name in found if name.startswith("/") and not name.startswith(("/dev/", "/proc/", "/memfd")))


WATCHED = (builtins, os, sys, copy, functools, Enum, nn.Module, nn.Linear, nn.LayerNorm, nn.MultiheadAttention, nn.GRU)


def _classes(kind: Kind) -> Iterator[Any]:
    """The classes of the model and of what it holds."""
    seen: dict[Any, None] = {}
    for module in kind.model.modules() if kind.model is not None else ():
        for held in (module, *vars(module).values()):
            for one in type(held).__mro__ if hasattr(held, "__dict__") else ():
                if one is not object and one.__module__ != "builtins":
                    seen[one] = None
    yield from seen


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """While inside, asking for gigabytes is a ``MemoryError``."""
    if not os.path.exists("/proc/self/statm"):
        yield
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What is not as it was: a name that both have, or one of them."""
    found = {}
    for name in before.keys() | after.keys():
        one, other = before.get(name), after.get(name)
        if one != other:
            found[name] = one.changed(other) if isinstance(one, Held) and isinstance(other, Held) else (one, other)
    return found


def accepted(kind: Kind) -> bool:
    """Whether an artifact loads, after which it runs.

    Another error than those of ``oto`` comes out of a load, or it changes anything of the process: the test fails. What
    the forward says of other weights and widths is between the model and whoever made them; but nothing changes there
    either.
    """
    before, slim = process(kind), None
    with little_memory(), contextlib.suppress(OTOError):
        slim = load_subnet(kind.folder, *([kind.model] if kind.model is not None else []))
    changed = differences(before, process(kind))
    assert not changed, changed
    if slim is None:
        return False
    with little_memory(), contextlib.suppress(Exception), torch.no_grad():
        slim(kind.given)
    str(slim)
    drawn = {name for name in before if name.endswith("numbers")}  # a forward may draw some
    changed = {name: how for name, how in differences(before, process(kind)).items() if name not in drawn}
    assert not changed, changed
    return True


# --- forgeries --------------------------------------------------------------------------------------------------------


def sealed(saved: Path, folder: Path, change: Callable[[Path, dict[str, Any]], Any], stamp: bool = True) -> Path:
    """A copy that was changed and sealed again, as whoever can write the folder can.

    Args:
        stamp: Also with the sizes and hashes that its files have now.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    manifest = json.loads((folder / "oto.json").read_text())
    change(folder, manifest)
    for name in manifest["files"] if stamp and isinstance(manifest.get("files"), dict) else ():
        held = manifest["files"][name]
        there = name in {path.name for path in folder.iterdir() if path.is_file()}
        if there and isinstance(held, dict) and "sha256" in held:
            manifest["files"][name] = artifact._stamp(folder / name)
    manifest.pop("digest", None)
    (folder / "oto.json").write_text(json.dumps({**manifest, "digest": artifact._digest(manifest)}))
    return folder


def edit_graph(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change the graph of a program."""
    path = folder / "model.pt2"
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    (name,) = (name for name in members if name.endswith("models/model.json"))
    graph = json.loads(members[name])
    change(graph)
    members[name] = json.dumps(graph).encode()
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    path.write_bytes(made.getvalue())


NAMES = [
    "__class__",
    "__dict__",
    "__class__.forward",
    "__init__.__globals__",
    "to_dict.__globals__.os.sys.path.0",
    "forward",
    "forward.__wrapped__",
    "_forward_hooks",
    "_modules",
    "training",
    "mode._value_",
    "train",
    "a",
    "",
    ".",
    "..",
    "norm",
    "config",
    "self",
    "weight",
    "a.weight",
    "0",
    "\x1b[2J",
    "x" * 300,
    "../x",
    "os.system",
    "eval",
]
JUNK = [
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        3,
        7,
        255,
        2**31,
        10**13,
        10**400,
        0.5,
        -1.5,
        1e300,
        "",
        "1",
        "identity",
        "\ud800",
    ),
    *("\x1b]0;x\x07", [], [0], [1, 2], [[0]], {}, {"x": 1}, {"__class__": "x"}),
    *NAMES,
]
EXPRESSIONS = [
    "9**9**9**9",
    "1<<(10**13)",
    "Pow(9,Pow(9,Pow(9,9)))",
    "Symbol('__import__')",
    "s0 + 1",
    "Integer(3)",
    "-1",
    "0",
    "Mul(Integer(2), Symbol('s0', positive=True))",
    "factorial(9999999)",
    "(lambda: 1)()",
    "L['x'].size()[0] < 5",
    "L['x'].__class__",
    "Integer('9' * 9)",
    "max(1, 2)",
    "True",
    "",
]


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Every place in JSON, as what holds it and the key."""
    for key, value in list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


def meddle(draw: random.Random, tree: Any, values: list[Any]) -> str:
    """One change of JSON, in place; what kind of."""
    held, key = draw.choice(list(places(tree)))
    value, how = held[key], draw.choice(("value", "near", "near", "near", "name", "gone", "twice", "moved"))
    if how == "near" and type(value) in (int, float):
        held[key] = draw.choice((value + 1, value - 1, value // 2, value * 2, float(value), -value))
    elif how == "near" and isinstance(value, str):
        held[key] = draw.choice((value + "x", value[:-1], value.upper(), value.replace(".", "_")))
    elif how == "name" and isinstance(held, dict):
        held[draw.choice(NAMES)] = held.pop(key)
    elif how == "gone":
        del held[key]
    elif how == "twice" and isinstance(held, list):
        held.extend([copy.deepcopy(value)] * draw.choice((1, 3)))
    elif how == "moved":
        other, place = draw.choice(list(places(tree)))
        held[key] = copy.deepcopy(other[place])
    else:
        how, held[key] = "value", draw.choice(values)
    return how


def edit(draw: random.Random, manifest: Any) -> str:
    """Another edit than any that was made, in one of the rounds."""
    rounds = [manifest, *manifest.get("earlier", ())]
    edits = draw.choice(rounds)["edits"]
    path = draw.choice([*manifest["model"]["modules"], *NAMES])
    name, value = draw.choice(NAMES), draw.choice(JUNK)
    which = draw.choice(sorted(edits))
    if which == "attributes":
        edits[which].setdefault(path, {})[draw.choice((name, "in_features", "out_features"))] = value
    elif which == "stated":
        edits[which].setdefault(path, []).append([draw.choice((name.split("."), [name], name)), value])
    elif which == "swaps":
        edits[which][path] = {"class": draw.choice(("LayerNorm", "RMSNorm", name)), "arguments": {"full": [value]}}
    elif which == "told":
        edits[which].setdefault(path, {})[f"forward: {name}"] = {
            draw.choice((name, "view")): [{"numbers": [[0, value]]}]
        }
    elif which == "untrained":
        edits[which] = value
    else:
        edits[which][draw.choice((path, name))] = draw.choice((value, "identity", "none"))
    return which


def operators() -> list[str]:
    """Names of operators, of all kinds that there are."""
    found = sorted({str(s.name).replace("::", ".") for s in torch._C._jit_get_all_schemas()})
    return [
        *(f"torch.ops.{name}.default" for name in found),
        "os.system",
        "math.factorial",
        "_operator.pow",
        "torch.load",
    ]


def nodes(graph: Any) -> list[Any]:
    found: list[Any] = graph["graph_module"]["graph"]["nodes"]
    return found


def meddle_with_graph(draw: random.Random, graph: Any) -> str:
    how = draw.choice(("value", "operator", "expression", "guard", "node"))
    if how == "operator":
        draw.choice(nodes(graph))["target"] = draw.choice(OPERATORS)
    elif how == "expression":
        found = [(held, key) for held, key in places(graph) if key == "expr_str"]
        for held, key in found:
            held[key] = draw.choice(EXPRESSIONS)
    elif how == "guard":
        graph["guards_code"] = [draw.choice(EXPRESSIONS)]
    elif how == "node":
        target, value = draw.choice(OPERATORS), draw.choice(({"as_int": 7}, {"as_string": "x"}, {"as_bool": True}))
        nodes(graph).insert(1, node(target, [value]))
    else:
        meddle(draw, draw.choice((graph, graph["graph_module"])), [*JUNK, *EXPRESSIONS])
    return f"graph: {how}"


def node(target: str, given: list[Any]) -> dict[str, Any]:
    """A call in a graph."""
    inputs = [{"name": f"a{i}", "arg": argument, "kind": 1} for i, argument in enumerate(given)]
    return {
        "target": target,
        "inputs": inputs,
        "outputs": [],
        "metadata": {},
        "is_hop_single_tensor_return": None,
        "name": "forged",
    }


OPERATORS = operators()


def meddle_with_bytes(draw: random.Random, file: Path) -> str:
    content = bytearray(file.read_bytes())
    at = draw.randrange(len(content))
    how = draw.choice(("flip", "flip", "cut", "repeat"))
    if how == "flip":
        for i in range(at, min(at + draw.choice((1, 4)), len(content))):
            content[i] ^= draw.randrange(1, 256)
    elif how == "cut":
        del content[at:]
    else:
        content += content[at:]
    file.write_bytes(bytes(content))
    return f"bytes: {how}"


def forged(kind: Kind, folder: Path, seed: int) -> tuple[Kind, str]:
    """A copy of an artifact with something changed, and what kind of a change it is."""
    draw = random.Random(seed)
    said = []

    def change(at: Path, manifest: dict[str, Any]) -> None:
        program = kind.model is None
        where = draw.choice(
            ("graph", "graph", "graph", "file", "manifest") if program else ("edit", "file", "manifest")
        )
        if where == "graph":
            edit_graph(at, lambda graph: said.append(meddle_with_graph(draw, graph)))
        elif where == "file":
            name = "model.pt2" if program else "model.safetensors"
            said.append(meddle_with_bytes(draw, at / name))
        elif where == "edit":
            said.append(f"edits: {edit(draw, manifest)}")
        else:
            part = manifest[draw.choice(sorted(manifest.keys() - {"digest", "format"}))]
            tree = part if isinstance(part, dict | list) and part and draw.random() < 0.5 else manifest
            said.append(f"manifest: {meddle(draw, tree, JUNK)}")

    return Kind(sealed(kind.folder, folder, change), kind.model, kind.given, kind.watched), said[0]
