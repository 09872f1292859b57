"""A class that is made from a config, and the config that makes it in other sizes. Fields are found, not listed.

A field may state a size that changed if its value is such a size, or if it is unset and the class asks for it. Which of
them do is settled by trial: the class is built from the edited config on ``meta``, and every shape is compared.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import log2
from typing import Any

import torch
from torch import Tensor, nn

from oto.axes.terms import Sum, Term, count, resolve
from oto.axes.terms import size as size_of
from oto.errors import EmitterError, out_of_memory, some
from oto.slim.plan import Thinning

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
Fields = Mapping[str, Any]
"""Values by dotted path in a config: ``hidden_size``, ``text_config.hidden_size``, ``widths.0``."""

PROBE = 6
"""What an unset field is set to, to see whether any shape depends on it."""

MISFIT = float("inf")


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters and buffers."""
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tuple(t.shape) for name, t in held}


@dataclass(eq=False)
class Recipe:
    """A class and the config object that it was made from.

    Attributes:
        device: Where it is built to look at its shapes.
        stating: Fields that were found to state a size.
    """

    kind: Callable[[Any], nn.Module]
    config: Any
    device: str = "meta"
    stating: set[str] = field(default_factory=set)
    _known: dict[tuple[tuple[str, Any], ...], Shapes | None] = field(default_factory=dict)
    _implied: dict[str, int] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Recipe | None:
        """The recipe of a model: its class and ``model.config``, or the function that it says made it.

        ``None`` if neither makes its like.
        """
        for kind, config in _makers(model):
            for device in ("meta", "cpu"):  # a constructor that computes with its weights needs real ones
                recipe = cls(kind, config, device)
                if recipe.shapes({}) == shapes_of(model):
                    return recipe
        return None

    def edited(self, edits: Fields) -> Any:
        """A copy of the config with other values."""
        config = copy.deepcopy(self.config)
        for path, value in edits.items():
            *parents, last = path.split(".")
            held = config
            for name in parents:
                held = _get(held, name)
            if isinstance(held, list):
                held[int(last)] = value
            elif isinstance(held, dict):
                held[last] = value
            else:
                setattr(held, last, value)
        return config

    def make(self, edits: Fields, device: str | torch.device) -> nn.Module:
        """The class, made from the edited config. Nothing of the random state is used up."""
        config = self.edited(edits)
        with torch.random.fork_rng(), warnings.catch_warnings(), torch.device(device):
            warnings.simplefilter("ignore")
            return self.kind(config)

    def shapes(self, edits: Fields) -> Shapes | None:
        """The shapes that an edited config gives, as it reads once it was saved; ``None`` if it is refused."""
        key = tuple(sorted(edits.items()))
        if key not in self._known:
            try:
                self._known[key] = shapes_of(self.make(self._as_read(edits), self.device))
            except Exception as failure:  # anything that a constructor or a validator may raise
                if out_of_memory(failure):
                    raise
                log.debug("%s is refused: %s", dict(edits), failure)
                self._known[key] = None
        return self._known[key]

    def _as_read(self, edits: Fields) -> Fields:
        """The edits, if the edited config can be written and read again."""
        config = self.edited(edits)
        read = getattr(type(config), "from_dict", None)
        if read is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                again = dict(fields(read(config.to_dict())))
            lost = [path for path, value in edits.items() if again.get(path, value) != value]
            if lost:
                raise ValueError(f"{some(lost)} does not survive being written")
        return edits

    def fields(self) -> dict[str, Any]:
        """Numbers that the config states."""
        return {path: value for path, value in fields(self.config) if value is not None}

    def implied(self, sizes: Iterable[int]) -> dict[str, int]:
        """Fields that are unset or missing and state a size all the same, with that size.

        They are read when the class is made, shapes depend on them, and one of ``sizes`` changes nothing.
        """
        if self._implied is None:
            self._implied = {}
            for path in self._unset():
                if self.shapes({path: PROBE}) not in (None, self.shapes({})):
                    same = (n for n in sorted(sizes) if self.shapes({path: n}) == self.shapes({}))
                    self._implied.update((path, n) for n in [next(same, None)] if n is not None)
        return self._implied

    def _unset(self) -> list[str]:
        names: dict[str, None] = {}
        config = copy.deepcopy(self.config)
        nested = dict(configs(config))
        paths = {id(held): path for path, held in nested.items()}

        def seen(held: object, name: str) -> None:
            if id(held) in paths and not name.startswith("_"):
                path = paths[id(held)]
                names[f"{path}.{name}" if path else name] = None

        with _watched({type(held) for held in nested.values()}, seen), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.random.fork_rng(), torch.device(self.device):
                self.kind(config)
        return list(names)


class Keywords:
    """Keywords of a constructor that are numbers, as a config."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return copy.deepcopy(vars(self))


def _makers(model: nn.Module) -> Iterator[tuple[Callable[[Any], nn.Module], Any]]:
    """What may have made a model, and of what."""
    config = getattr(model, "config", None)
    if not isinstance(config, type) and callable(getattr(config, "to_dict", None)):
        yield type(model), config
    about = getattr(model, "pretrained_cfg", None)
    name = about.get("architecture") if isinstance(about, Mapping) else getattr(about, "architecture", None)
    function = _function(type(model), name) if isinstance(name, str) else None
    if function is not None:
        given = dict(getattr(model, MADE_WITH, {}))
        keywords = _keywords(type(model), lambda: function(**given))
        if keywords is not None:
            plain = keywords.to_dict()

            def again(config: Keywords) -> nn.Module:
                changed = {name: value for name, value in vars(config).items() if value != plain.get(name)}
                made: nn.Module = function(**given | changed)
                return made

            yield again, keywords


def _function(kind: type[Any], name: str) -> Callable[..., Any] | None:
    """A function by its name, in the package of a class."""
    package = kind.__module__.partition(".")[0]
    inside = [module for path, module in list(sys.modules.items()) if f"{path}.".startswith(f"{package}.")]
    found = (vars(module).get(name) for module in [sys.modules[kind.__module__], *inside] if module is not None)
    return next((function for function in found if inspect.isfunction(function)), None)


MADE_WITH = "_model_args"
"""Where a model may hold the keywords that the function was given."""


def _keywords(kind: Any, make: Callable[[], Any]) -> Keywords | None:
    """The numbers that a class is made with, where a function makes it; ``None`` if it does not."""
    plain, own = kind.__init__, "__init__" in vars(kind)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **keywords: Any) -> None:
        if type(self) is kind and not calls:
            calls.append((args, keywords))
        plain(self, *args, **keywords)

    kind.__init__ = init
    try:
        with torch.random.fork_rng(), warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            make()
    except Exception as failure:  # anything that a constructor may raise
        if out_of_memory(failure):
            raise
        log.debug("%s is not made again: %s", kind.__name__, failure)
    finally:
        if own:
            kind.__init__ = plain
        else:
            del kind.__init__
    if not calls:
        return None
    bound = inspect.signature(plain).bind(None, *calls[0][0], **calls[0][1])
    bound.apply_defaults()
    held = Keywords()
    for name, value in list(bound.arguments.items())[1:]:  # without the module itself
        vars(held)[name] = list(value) if isinstance(value, tuple) else value
    numbers = {path.split(".")[0] for path, _ in fields(held)}
    return Keywords(**{name: value for name, value in vars(held).items() if name in numbers})


def _get(held: Any, name: str) -> Any:
    if isinstance(held, list):
        return held[int(name)]
    return held[name] if isinstance(held, dict) else getattr(held, name)


def configs(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A config and all that it holds, by path."""
    yield path, config
    for name, value in vars(config).items():
        if not name.startswith("_") and hasattr(value, "__dict__") and callable(getattr(value, "to_dict", None)):
            yield from configs(value, f"{path}.{name}" if path else name)


def fields(config: Any) -> Iterator[tuple[str, int | float | None]]:
    """Every number in a config and in what it holds, and what is unset."""

    def numbers(path: str, value: Any) -> Iterator[tuple[str, int | float | None]]:
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            yield path, value
        elif isinstance(value, list | dict):
            for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
                if inner is not None:
                    yield from numbers(f"{path}.{name}", inner)

    for path, held in configs(config):
        for name, value in vars(held).items():
            if not name.startswith("_"):
                yield from numbers(f"{path}.{name}" if path else name, value)


@contextmanager
def _watched(kinds: Iterable[type[Any]], seen: Callable[[object, str], None]) -> Iterator[None]:
    """While inside, tell of every attribute that is read of objects of some classes and is unset or missing."""
    own: dict[Any, Any] = {kind: vars(kind).get("__getattribute__") for kind in kinds}

    def watching(kind: Any) -> Callable[[Any, str], Any]:
        plain = kind.__getattribute__

        def read(self: Any, name: str) -> Any:
            try:
                value = plain(self, name)
            except AttributeError:
                seen(self, name)
                raise
            if value is None:
                seen(self, name)
            return value

        return read

    made = {kind: watching(kind) for kind in own}
    try:
        for kind, read in made.items():
            kind.__getattribute__ = read
        yield
    finally:
        for kind, before in own.items():
            if before is None:
                del kind.__getattribute__
            else:
                kind.__getattribute__ = before


def _parts(term: Term) -> Iterator[Term]:
    """Every run of factors of a resolved term, and of what its sums hold."""
    for i in range(len(term)):
        for j in range(i + 1, len(term) + 1):
            yield term[i:j]
        factor = term[i]
        if isinstance(factor, Sum):
            for segment in factor.segments:
                yield from _parts(resolve(segment))


def solve(recipe: Recipe, thin: Thinning) -> dict[str, Any]:
    """The fields that give every parameter and buffer its thinner shape, and their values.

    Raises:
        EmitterError: There are none; the message names the tensors that would differ.
    """
    base = recipe.shapes({}) or {}
    leaves = [leaf for leaf in thin.found.graph.leaves if leaf.names]
    wanted = dict(base) | {name: thin.shape(leaf) for leaf in leaves for name in leaf.names if name in base}
    became = _became(thin)
    implied = recipe.implied(became)
    numbers = recipe.fields() | implied
    edits: dict[str, Any] = {}

    def off(edits: Fields) -> float:
        found = recipe.shapes({**implied, **edits})
        return MISFIT if found is None else _distance(found, wanted)

    tries = [(path, n) for path, value in numbers.items() for n in _candidates(value, became) if n != value]
    for some_of in ([(path, n) for path, n in tries if path in recipe.stating], tries):
        while (left := off(edits)) > 0:  # the largest step first, and what still is one after it
            rated = sorted((off(edits | {path: n}), i) for i, (path, n) in enumerate(some_of))
            for better, i in rated:
                path, n = some_of[i]
                if better < left and off(edits | {path: n}) < off(edits):
                    edits[path] = n
            if off(edits) == left:
                break
    if off(edits) > 0:
        found = recipe.shapes({**implied, **edits}) or {}
        wrong = [
            f"{name} is to be {list(shape)}, the class makes it {list(found.get(name, ()))}"
            for name, shape in wanted.items()
            if found.get(name) != shape
        ]
        raise EmitterError(f"no fields of the config give the class its sizes: {some(wrong, 3)}")
    recipe.stating.update(edits)
    for path, value in implied.items():  # stated only where it has to be
        if path not in edits:
            edits[path] = value
    for path in implied:
        without = {name: value for name, value in edits.items() if name != path}
        if recipe.shapes(without) == wanted:
            edits = without
    return edits


def _candidates(value: int | float, became: Mapping[int, set[int]]) -> list[int | float]:
    """What a number may be now: a size, or how many times another size a size is."""
    if isinstance(value, int):
        return sorted(became.get(value, ()))
    found: dict[float, None] = {}
    for base in became:
        for new in sorted(became.get(round(value * base), ())) if value > 0 and (value * base).is_integer() else ():
            found[new / base if int(new / base * base) == new else (new + 0.25) / base] = None
    return list(found)


def _became(thin: Thinning) -> dict[int, set[int]]:
    """For every size in the network, what the terms of that size became; the sizes that did not change among them."""
    terms = [term for leaf in thin.found.graph.leaves for term in thin.found.terms(leaf.value)]
    for rewrite in thin.found.tape.rewrites.values():
        terms += rewrite.terms
    became: dict[int, set[int]] = {}
    for term in dict.fromkeys(resolve(term) for term in terms):
        for part in _parts(term):
            became.setdefault(size_of(part), set()).add(count(part, thin.counts))
    became.pop(0, None)  # what is empty
    return became


def _distance(found: Shapes, wanted: Shapes) -> float:
    """How far shapes are off, in factors of two over all dimensions; infinite if they differ in kind."""
    if found.keys() != wanted.keys():
        return MISFIT
    total = 0.0
    for name, shape in wanted.items():
        other = found[name]
        if other != shape:
            if len(other) != len(shape) or 0 in shape or 0 in other:
                return MISFIT
            total += sum(abs(log2(a / b)) for a, b in zip(other, shape, strict=True))
    return total


def stock(model: nn.Module, tensors: Mapping[str, Tensor], edits: Fields, recipe: Recipe | None = None) -> nn.Module:
    """The class of ``model``, which may be on ``meta``, made from its config with other values, and its tensors.

    Raises:
        EmitterError: The class cannot be made, or has other tensors.
    """
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    recipe = recipe or Recipe.of(model)
    if recipe is None:
        raise EmitterError(f"{type(model).__name__} has no config that its class can be made from")
    try:
        slim = recipe.make(edits, device)
    except Exception as failure:
        if out_of_memory(failure):
            raise
        raise EmitterError(f"{type(model).__name__} cannot be made from {dict(edits)}: {failure}") from failure
    fill(slim, model, tensors)
    for name in ("generation_config", "pretrained_cfg", "default_cfg"):  # how it is used, and no module
        if hasattr(model, name):
            setattr(slim, name, copy.deepcopy(getattr(model, name)))
    if hasattr(model, MADE_WITH):
        now = {path.split(".")[0] for path in edits}
        keywords = {name: value for name, value in vars(recipe.edited(edits)).items() if name in now}
        setattr(slim, MADE_WITH, {**getattr(model, MADE_WITH), **keywords})
    return slim.eval()


def fill(slim: nn.Module, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of a module's own; ties hold. What no file holds stays as the constructor made it."""
    like = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    saved = slim.state_dict().keys()
    made: dict[int, nn.Parameter] = {}
    for name, old in list(slim.named_parameters(remove_duplicate=False)):
        if name not in tensors or tensors[name].shape != old.shape:
            raise EmitterError(f"{name} is {list(old.shape)}, and nothing of that shape is there for it")
        if id(old) not in made:
            made[id(old)] = nn.Parameter(tensors[name], like[name].requires_grad)
        _put(slim, name, made[id(old)])
    for name, buffer in list(slim.named_buffers(remove_duplicate=False)):
        if name in saved and name in tensors:
            _put(slim, name, tensors[name])
        elif name in like:
            _put(slim, name, like[name].detach().clone() if _near(buffer, like[name]) else buffer.to(like[name].dtype))


def _near(made: Tensor, held: Tensor) -> bool:
    """Whether a buffer that a constructor makes is the one that the model holds, as casts may have rounded it."""
    if held.is_meta or made.shape != held.shape:
        return False
    wide = torch.complex128 if held.is_complex() else torch.float64
    return torch.allclose(made.to(held.device, wide), held.to(wide), rtol=1e-2, atol=1e-6)


def _put(model: nn.Module, path: str, tensor: Tensor) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, tensor)
