"""How a call in the user's own code is made otherwise: plain values, and the JSON that artifacts hold of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Given:
    """By what the first tensor of a call is known.

    Attributes:
        rank: How many dimensions it has, where that is minded.
        sizes: Some of them, as pairs of a negative dimension and its size; ``None`` is any.
    """

    rank: int | None
    sizes: tuple[tuple[int, int | None], ...]


@dataclass(frozen=True, kw_only=True)
class Override:
    """A call that is left as it is.

    Attributes:
        keep: Keep the result for a later call, which computes of it what entries held that are gone.
        takes: Which tensor it is given.
        home: The Python module whose code calls.
    """

    keep: bool = False
    takes: Given | None = None
    home: str | None = None

    @property
    def stated(self) -> Sizes | None:
        """The numbers that are other ones."""
        return None

    def stating(self, sizes: Sizes) -> Override:
        """The same with other numbers."""
        return replace(sizes, keep=self.keep, takes=self.takes, home=self.home)


@dataclass(frozen=True, kw_only=True)
class Sizes(Override):
    """Other numbers among the arguments.

    Attributes:
        numbers: Pairs of a place and the number there.
        of: How many numbers there are in all.
        grows: Places whose number is for what the code stated then, and grows with what it states.
        was: What the code states in these places; one entry for each that was seen.
    """

    numbers: tuple[tuple[int, int | float], ...]
    of: int | None = None
    grows: tuple[int, ...] = ()
    was: tuple[tuple[int | float, ...], ...] = ()

    @property
    def stated(self) -> Sizes:
        return self


@dataclass(frozen=True, kw_only=True)
class Pieces(Override):
    """Pieces of other sizes."""

    sizes: tuple[int, ...]
    dim: int


@dataclass(frozen=True, kw_only=True)
class FullCount(Override):
    """A function of :mod:`oto.nn.functional`, which divides by the full count.

    Attributes:
        name: Of the function.
        keywords: Its further keywords. ``"rest"`` is what each entry held that is gone, computed of results that were
            kept, as ``{"op": [packet, overload], "args": [...]}`` and ``{"kept": [site, name, time]}``.
    """

    name: str
    keywords: Mapping[str, Any] = field(default_factory=dict)
    sizes: Sizes | None = None

    @property
    def stated(self) -> Sizes | None:
        return self.sizes

    def stating(self, sizes: Sizes) -> FullCount:
        return replace(self, sizes=replace(sizes, of=None))  # a count may have an "of" of its own


Overrides = Mapping[str, Mapping[str, Sequence[Override]]]
"""What to change: for each site, for the name of a torch function, how. One for every time that the site is met in a
run of the module, in their order; or one alone, which holds for all of them."""

Json = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
"""The same as artifacts hold it."""

_COMMON, _SIZES = {"keep", "takes", "in"}, {"numbers", "grows", "was"}


def from_json(calls: Json) -> dict[str, dict[str, list[Override]]]:
    """What an artifact says."""
    return {site: {name: list(map(_one, hows)) for name, hows in named.items()} for site, named in calls.items()}


def to_json(calls: Overrides) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What an artifact is to say."""
    return {site: {name: list(map(_plain, hows)) for name, hows in named.items()} for site, named in calls.items()}


def _one(how: Mapping[str, Any]) -> Override:
    takes = None
    if "takes" in how:
        rank, sizes = how["takes"]
        takes = Given(rank, tuple((dim, size) for dim, size in sizes))
    common: dict[str, Any] = {"keep": bool(how.get("keep")), "takes": takes, "home": how.get("in")}
    if "counted" in how:
        keywords = {key: value for key, value in how.items() if key not in _COMMON | _SIZES | {"counted"}}
        sizes = _sizes(how, {}) if "numbers" in how else None
        return FullCount(name=how["counted"], keywords=keywords, sizes=sizes, **common)
    if "numbers" in how:
        return _sizes(how, {"of": how.get("of"), **common})
    if "pieces" in how:
        pieces, dim = how["pieces"]
        return Pieces(sizes=tuple(pieces), dim=dim, **common)
    return Override(**common)


def _sizes(how: Mapping[str, Any], further: Mapping[str, Any]) -> Sizes:
    return Sizes(
        numbers=tuple((place, number) for place, number in how["numbers"]),
        grows=tuple(how.get("grows", ())),
        was=tuple(tuple(numbers) for numbers in how.get("was", ())),
        **further,
    )


def _plain(how: Override) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if (sizes := how.stated) is not None:
        made["numbers"] = [list(pair) for pair in sizes.numbers]
        made |= {"of": sizes.of} if sizes.of is not None else {}
        made |= {"grows": list(sizes.grows)} if sizes.grows else {}
        made |= {"was": [list(numbers) for numbers in sizes.was]} if sizes.was else {}
    if isinstance(how, Pieces):
        made["pieces"] = [list(how.sizes), how.dim]
    elif isinstance(how, FullCount):
        made |= {"counted": how.name, **how.keywords}
    made |= {"keep": True} if how.keep else {}
    made |= {"takes": [how.takes.rank, [list(pair) for pair in how.takes.sizes]]} if how.takes is not None else {}
    return made | ({"in": how.home} if how.home is not None else {})
