"""The schema of a manifest: a closed list of entries, checked before a manifest is used.

The hashes of an artifact detect damage, but do not show who made it: whoever can write the folder can write any
manifest and seal it. So the same closed list is checked when reading as when writing. Every entry has a type and a
bound; names of classes, arguments and operators must be names that the writer uses; and what a name refers to is
checked again where it is looked up (:mod:`oto.slim.config.recipe`, :mod:`oto.slim.numbers`, :mod:`oto.slim.edits`).

Unknown entries are ignored, except among the edits, where they are refused.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any

import torch

from oto.nn.erased import THEN
from oto.nn.overridden import COUNTED, UNIFORM
from oto.slim.edits import SIZES

LARGEST = 2**31 - 1  # a size, a count, an index
LONGEST = 2**20  # characters of a text; a site holds the lines of code that were running
MOST_ROUNDS = 256  # each needs a copy of the model
MOST_MEMBERS = 255  # of a family; levels are bytes
MOST_BRACKETS = 2**21  # lists and objects in a JSON text; an empty one takes 64 bytes of memory

Check = Callable[[str, Any], None]
"""Checks a value, given its path in the manifest; raises :class:`Refusal`."""


class Refusal(ValueError):
    """A value that no writer writes; the message has its path in the manifest."""


def parse(text: bytes, most: int = MOST_BRACKETS) -> Any:
    """Parse JSON in which no object has a key twice, with memory bounded by its length.

    Raises:
        ValueError: The text is not such JSON.
    """
    if text.count(b"[") + text.count(b"{") > most:
        raise ValueError(f"it holds more than {most:,} lists and objects")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except RecursionError as failure:
        raise ValueError("it is nested too deep") from failure


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return made


def require(manifest: Any) -> None:
    """Refuse a manifest that contains anything that no writer writes.

    Raises:
        Refusal: There is such a value; the message says where.
    """
    require_files(manifest)
    _MANIFEST("", manifest)
    for name in ("levels", "entries") if manifest.get("members") else ():
        if name not in manifest:
            raise Refusal(f"it has members and no {name}")


def require_files(manifest: Any) -> None:
    """Refuse a manifest that does not list its files; everything else may be from a later version.

    Raises:
        Refusal: The list of files is missing or malformed.
    """
    _FILES("", manifest)
    for name in manifest["tensors"].keys() - manifest["files"].keys():
        raise Refusal(f"it says what tensors are in {name[:80]!r}, which is none of its files")


# --- kinds of values --------------------------------------------------------------------------------------------------


def _refuse(where: str, value: Any, wanted: str) -> Refusal:
    text = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return Refusal(f"{where or 'it'} is {text if len(text) < 80 else text[:80] + '...'}, and not {wanted}")


def _integer(least: int = 0, most: int = LARGEST) -> Check:
    def check(where: str, value: Any) -> None:
        if type(value) is not int or not least <= value <= most:
            raise _refuse(where, value, f"a whole number from {least} to {most}")

    return check


def _number(least: float = -(2**53), most: float = 2**53) -> Check:
    def check(where: str, value: Any) -> None:
        if type(value) not in (int, float) or not least <= value <= most:
            raise _refuse(where, value, f"a number from {least:g} to {most:g}")

    return check


def _text(where: str, value: Any, longest: int = LONGEST) -> None:
    if not isinstance(value, str) or len(value) > longest:
        raise _refuse(where, value, f"a text of at most {longest:,} characters")


def _name(where: str, value: Any) -> None:
    _text(where, value, 4096)


def _flag(where: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _refuse(where, value, "true or false")


def _any(where: str, value: Any) -> None:
    """Accept anything."""


def _one_of(*values: str) -> Check:
    def check(where: str, value: Any) -> None:
        if not isinstance(value, str) or value not in values:
            raise _refuse(where, value, f"one of {', '.join(values)}")

    return check


def _or_none(check: Check) -> Check:
    return lambda where, value: None if value is None else check(where, value)


def _either(wanted: str, checks: Mapping[type[Any], Check]) -> Check:
    """One check for each type of value."""

    def check(where: str, value: Any) -> None:
        if type(value) not in checks:
            raise _refuse(where, value, wanted)
        checks[type(value)](where, value)

    return check


def _list(check: Check, most: int | None = None) -> Check:
    def look(where: str, value: Any) -> None:
        if not isinstance(value, list) or len(value) > (len(value) if most is None else most):
            raise _refuse(where, value, "a list" if most is None else f"a list of at most {most}")
        inside = f"an item of {where}"  # there may be millions
        for item in value:
            check(inside, item)

    return look


def _tuple(*checks: Check) -> Check:
    def look(where: str, value: Any) -> None:
        if not isinstance(value, list) or len(value) != len(checks):
            raise _refuse(where, value, f"a list of {len(checks)}")
        for i, (check, item) in enumerate(zip(checks, value, strict=True)):
            check(f"{where}[{i}]", item)

    return look


def _table(check: Check, key: Check = _name) -> Check:
    def look(where: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise _refuse(where, value, "an object")
        for name, item in value.items():
            key(f"a name in {where}", name)
            check(f"{where}.{name[:80]}" if where else name[:80], item)

    return look


def _entries(needed: Mapping[str, Check], others: Mapping[str, Check] | None = None, closed: bool = True) -> Check:
    """An object with the entries of ``needed``, optionally those of ``others`` and, if ``closed``, no more."""
    known = {**needed, **(others or {})}

    def look(where: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise _refuse(where, value, "an object")
        for name in needed.keys() - value.keys():
            raise Refusal(f"{where or 'it'} has no {name}")
        for name, item in value.items():
            if name in known:
                known[name](f"{where}.{name}" if where else name, item)
            elif closed:
                raise Refusal(f"{where or 'it'} has an entry {name[:80]!r}, which nobody writes")

    return look


def _both(first: Check, *more: Check) -> Check:
    def look(where: str, value: Any) -> None:
        for check in (first, *more):
            check(where, value)

    return look


def _rising(where: str, value: Sequence[int]) -> None:
    if any(a >= b for a, b in itertools.pairwise(value)):
        raise Refusal(f"{where} does not rise")


# --- what a manifest holds --------------------------------------------------------------------------------------------

_COUNT, _SIZE = _integer(), _integer(1)
_SHAPES = _table(_list(_COUNT, 64))
_ATOMS = _both(_list(_COUNT), _rising)


def _file_name(where: str, value: Any) -> None:
    """A file in the folder itself, on any system, other than the manifest."""
    _text(where, value, 255)
    if not is_plain(value):
        raise Refusal(f"it names a file outside the folder: {value}")


def is_plain(name: str) -> bool:
    """Whether a name denotes a file in the folder itself, on any system."""
    return bool(name) and name not in (".", "..", "oto.json") and not set(name) & set("/\\:\0")


def _sha256(where: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise _refuse(where, value, "a SHA-256 in hexadecimal digits")


# swaps: the arguments of classes of oto.nn


def _left_of(left: str, full: str) -> Check:
    """Check that a kept count does not exceed its full count."""

    def look(where: str, value: Mapping[str, Any]) -> None:
        some, whole = ([x] if isinstance(x, int) else x for x in (value[left], value[full]))
        if len(some) != len(whole) or any(a > b for a, b in zip(some, whole, strict=True)):
            raise Refusal(f"{where}: {left} is not what is left of {full}")

    return look


def _heads(where: str, value: Mapping[str, Any]) -> None:
    heads, full = value["heads"], value["full_heads"]
    if len(heads) != value["num_heads"] or any(head >= full for head in heads):
        raise Refusal(f"{where}: heads are not num_heads of full_heads")


_LEFT = _list(_SIZE, 64)
_EPS = _number(0, 1e9)
_ARGUMENTS: dict[str, Check] = {
    "LayerNorm": _both(
        _entries({"normalized_shape": _LEFT, "full": _LEFT}, {"eps": _EPS, "weight": _flag, "bias": _flag}),
        _left_of("normalized_shape", "full"),
    ),
    "RMSNorm": _both(
        _entries({"normalized_shape": _LEFT, "full": _LEFT}, {"eps": _or_none(_EPS), "weight": _flag}),
        _left_of("normalized_shape", "full"),
    ),
    "GroupNorm": _both(
        _entries({"num_groups": _SIZE, "width": _SIZE, "full": _SIZE}, {"eps": _EPS, "affine": _flag}),
        _left_of("width", "full"),
    ),
    "MultiheadAttention": _both(
        _entries(
            dict.fromkeys(("embed_dim", "kdim", "vdim", "out_dim", "num_heads", "head_dim", "v_head_dim"), _SIZE)
            | {"scale": _number(), "heads": _ATOMS, "full_heads": _SIZE},
            dict.fromkeys(("packed", "bias", "out_bias", "batch_first"), _flag) | {"dropout": _number(0, 1)},
        ),
        _heads,
    ),
}


def _swap(where: str, value: Any) -> None:
    _entries({"class": _one_of(*_ARGUMENTS), "arguments": _table(lambda *_: None)})(where, value)
    _ARGUMENTS[value["class"]](f"{where}.arguments", value["arguments"])


# told: call overrides, see oto.nn.OverriddenForward


def _rest(where: str, value: Any) -> None:
    """The value of removed entries: a number, the result of a call, or one of a few operators on these."""
    if not isinstance(value, dict):
        _either("a number or an object", {int: _number(), float: _number(), bool: _flag})(where, value)
    elif "kept" in value:
        _entries({"kept": _tuple(_text, _name, _COUNT)})(where, value)
    else:
        _entries({"op": _tuple(_one_of(*UNIFORM), _name), "args": _list(_rest, 8)})(where, value)
        packet, overload = value["op"]
        _one_of(*getattr(torch.ops.aten, packet).overloads())(f"{where}.op", overload)


_COUNTS = _either("a count or a list of counts", {int: _SIZE, list: _LEFT})
_HOW = _entries(
    {},
    {
        "numbers": _list(_tuple(_COUNT, _number(-LARGEST, LARGEST))),
        "of": _COUNT,
        "grows": _list(_COUNT),
        "pieces": _tuple(_list(_COUNT), _integer(-64, 64)),
        "passed": _flag,
        "counted": _one_of(*COUNTED),
        "full": _COUNTS,
        "sizes": _COUNTS,
        "width": _SIZE,
        "groups": _SIZE,
        "rest": _rest,
        "along": _integer(-64, 64),
        "left": _COUNT,
        "keep": _flag,
        "takes": _tuple(_or_none(_integer(0, 64)), _list(_tuple(_integer(-64, 64), _or_none(_COUNT)), 64)),
        "was": _list(_list(_number())),
        "in": _or_none(_name),
    },
)


def _inner_path(where: str, value: Any) -> None:
    """The path of a module other than the model itself."""
    _name(where, value)
    if not value:
        raise Refusal(f"{where} is empty, which stands for the model itself")


# erased: what takes the place of modules, see oto.nn.ErasedForward

_WINDOW = _list(_tuple(_SIZE, _SIZE, _COUNT, _SIZE), 3)


_PLAIN = _either("a plain value", {bool: _flag, int: _number(), float: _number(), str: _text, NoneType: _any})


def _held(where: str, value: Any, depth: int = 3) -> None:
    """A plain value, or a list or an object of plain values."""
    if isinstance(value, dict) and depth:
        _table(lambda inside, item: _held(inside, item, depth - 1))(where, value)
    elif isinstance(value, list) and depth:
        _list(lambda inside, item: _held(inside, item, depth - 1), 64)(where, value)
    else:
        _PLAIN(where, value)


def _gives(where: str, value: Any) -> None:
    """What a call returns: one of its arguments, zeros, an empty tensor to concatenate, a plain value, or several of
    these."""
    kind = next((name for name in _GIVES if isinstance(value, dict) and name in value), "value")
    _GIVES[kind](where, value)


_GIVES: dict[str, Check] = {
    "given": _entries({"given": _name}, {"copy": _flag, "then": _list(_one_of(*THEN), 16)}),
    "zeros": _entries(
        {"zeros": _name}, {"last": _COUNT, "channels": _COUNT, "window": _WINDOW, "none": _integer(-64, -1)}
    ),
    "empty": _entries({"empty": _name}),
    "items": _entries({"items": _list(_gives, 64)}, {"list": _flag}),
    "value": _entries({"value": _PLAIN}),
}

_KEY = _list(_either("a name or a place", {str: _name, int: _COUNT}), 16)
_EDITS = _entries(
    {},
    {
        "attributes": _table(
            _table(_COUNT, key=_one_of(*sorted({name for names in SIZES.values() for name in names})))
        ),
        "swaps": _table(_swap),
        "stated": _table(_list(_tuple(_KEY, _number()))),
        "told": _table(_table(_table(_list(_HOW)), key=_text)),
        "config": _table(_either("a number or a list", {int: _number(), float: _number(), list: _list(_PLAIN, 4096)})),
        "dropped": _table(_one_of("none", "identity"), key=_inner_path),
        "untrained": _text,
        "erased": _table(_entries({"takes": _list(_name, 256), "gives": _gives}), key=_inner_path),
        "layers": _table(_ATOMS, key=_inner_path),
    },
)
_COST = _entries(dict.fromkeys(("params", "macs", "bytes"), _integer(0, 2**63)), closed=False)
_FILES = _entries(
    {
        "files": _table(_entries({"size": _integer(0, 2**63), "sha256": _sha256}), key=_file_name),
        "tensors": _table(_entries({"ties": _table(_name), "complex": _list(_name)})),
    },
    closed=False,
)
_CHECKS = _list(_entries({"what": _text, "dtype": _name, "error": _number(0), "tolerance": _number(0)}, closed=False))
_NUMBERS: dict[type[Any], Check] = {int: _number(), float: _number()}
_TARGET = _either(
    "a number or an object",
    {**_NUMBERS, dict: _table(_either("a number or an object", {**_NUMBERS, dict: _table(_number())}))},
)
_MEMBER = _entries(
    {"target": _TARGET, "edits": _EDITS},
    {
        "checks": _CHECKS,
        "notes": _list(_text),
        "emitter": _one_of("config", "module"),
        "cost": _entries({"before": _COST, "after": _COST}, closed=False),
        "trained": _flag,
        "score": _or_none(_number()),
    },
    closed=False,
)
_MANIFEST = _entries(
    {},
    {
        "versions": _table(_name),
        "model": _entries(
            {"class": _name, "modules": _table(_name), "code": _table(_sha256), "full_shapes": _SHAPES},
            {"numbers": _table(_table(_held))},
            closed=False,
        ),
        "earlier": _list(_entries({"edits": _EDITS, "shapes": _SHAPES, "kept": _table(_ATOMS)}), MOST_ROUNDS),
        "edits": _EDITS,
        "kept": _table(_ATOMS),
        "checks": _CHECKS,
        "no_program": _or_none(_text),
        "left_out": _list(_name),
        "notes": _list(_text),
        "emitter": _one_of("config", "module", "graph", "recording"),
        "why_graph": _or_none(_text),
        "cost": _entries({"before": _COST, "after": _COST}, closed=False),
        "members": _list(_MEMBER, MOST_MEMBERS),
        "levels": _table(_list(_integer(0, MOST_MEMBERS))),
        "entries": _table(_list(_or_none(_COUNT), 64)),
    },
    closed=False,
)
