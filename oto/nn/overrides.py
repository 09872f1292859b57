"""Call overrides as plain values, and their JSON form in artifacts.

Example: ``Sizes(numbers=((1, 9),), of=3)`` makes ``x.view(b, 12, 64)`` with 9 in place of 12.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Given:
    """What identifies the first tensor of a call.

    Attributes:
        rank: Its number of dimensions, if that matters.
        sizes: Some of its sizes, as pairs of a negative dimension and its size; ``None`` matches any size.
    """

    rank: int | None
    sizes: tuple[tuple[int, int | None], ...]


@dataclass(frozen=True, kw_only=True)
class Override:
    """Base class of all overrides; itself an override that leaves the call unchanged.

    Attributes:
        keep: Keep the result for a later call that computes the value of removed entries from it.
        takes: What identifies the first tensor of the call.
        home: The Python module whose code makes the call.
    """

    keep: bool = False
    takes: Given | None = None
    home: str | None = None

    @property
    def stated(self) -> Sizes | None:
        """The numbers that are overridden."""
        return None

    def stating(self, sizes: Sizes) -> Override:
        """The same override with other numbers."""
        return replace(sizes, keep=self.keep, takes=self.takes, home=self.home)


@dataclass(frozen=True, kw_only=True)
class Sizes(Override):
    """Overrides numbers among the arguments.

    Attributes:
        numbers: Pairs of a position among the numbers and the number to state there.
        of: The total count of numbers among the arguments.
        grows: Positions whose number scales with the code's own number, such as a flattened batch.
        was: The code's own numbers at these positions; one entry for each combination that was seen.
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
    """Overrides the sizes of the pieces into which a call splits a tensor."""

    sizes: tuple[int, ...]
    dim: int


@dataclass(frozen=True, kw_only=True)
class FullCount(Override):
    """Replaces a call by a function of :mod:`oto.nn.functional`, which divides by the full count.

    Attributes:
        name: The name of the function.
        keywords: Its further keywords. ``"rest"`` is the value of each removed entry, computed from kept results, as
            ``{"op": [packet, overload], "args": [...]}`` and ``{"kept": [site, name, time]}``.
    """

    name: str
    keywords: Mapping[str, Any] = field(default_factory=dict)
    sizes: Sizes | None = None

    @property
    def stated(self) -> Sizes | None:
        return self.sizes

    def stating(self, sizes: Sizes) -> FullCount:
        return replace(self, sizes=replace(sizes, of=None))  # "of" is a keyword of a count


@dataclass(frozen=True, kw_only=True)
class Passed(Override):
    """Makes no call where the tensor that it is given has no entries, but gives an empty vector.

    ``torch.cat`` passes over it. Convolutions, pooling and interpolation refuse tensors without channels.
    """


Overrides = Mapping[str, Mapping[str, Sequence[Override]]]
"""For each site and name of a torch function, its overrides: one for every time that a run of the module reaches the
site, in order; or a single one for all times."""

Json = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
"""The overrides in the form of artifacts."""

_COMMON, _SIZES = {"keep", "takes", "in"}, {"numbers", "grows", "was"}


def from_json(calls: Json) -> dict[str, dict[str, list[Override]]]:
    """Read overrides from the form of artifacts."""
    return {site: {name: list(map(_one, hows)) for name, hows in named.items()} for site, named in calls.items()}


def to_json(calls: Overrides) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Write overrides in the form of artifacts."""
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
    return Passed(**common) if how.get("passed") else Override(**common)


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
    elif isinstance(how, Passed):
        made["passed"] = True
    elif isinstance(how, FullCount):
        made |= {"counted": how.name, **how.keywords}
    made |= {"keep": True} if how.keep else {}
    made |= {"takes": [how.takes.rank, [list(pair) for pair in how.takes.sizes]]} if how.takes is not None else {}
    return made | ({"in": how.home} if how.home is not None else {})
