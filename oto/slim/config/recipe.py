"""How a model was made: from its class and a config, or by a function and its keywords, and which numbers they hold."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from oto.errors import EmitterError, reraise_out_of_memory, some
from oto.slim.edits import named_tensors

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
Fields = Mapping[str, Any]
"""Values by dotted path in a config: ``hidden_size``, ``text_config.hidden_size``, ``widths.0``; or a list with
the entries that are left: ``layer_types``."""

PROBE = 6
"""A value for an unset field, to test whether any shape depends on it."""


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters and buffers."""
    return {name: tuple(t.shape) for name, t in named_tensors(model).items()}


@dataclass(frozen=True)
class Depth:
    """A field of a config that states how many layers a list of the model has.

    Attributes:
        field: The path of the field.
        layers: The path of the list of layers.
        number: The number of layers.
        lists: The paths of lists in the config that have an entry for each layer.
        free: The layers that may be removed.
    """

    field: str
    layers: str
    number: int
    lists: tuple[str, ...] = ()
    free: tuple[int, ...] = ()


@dataclass(eq=False)
class Recipe:
    """A class and the config object that it was made from.

    Attributes:
        device: The device on which the model is built to compare shapes.
        stating: Fields that are known to state a size.
        depths: Fields that state numbers of layers, if they were searched for.
    """

    kind: Callable[[Any], nn.Module]
    config: Any
    device: str = "meta"
    stating: set[str] = field(default_factory=set)
    depths: tuple[Depth, ...] = ()
    _known: dict[tuple[tuple[str, Any], ...], Shapes | None] = field(default_factory=dict)
    _implied: dict[str, int] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Recipe | None:
        """The recipe of a model: its class and ``model.config``, or the function that it names as its maker.

        ``None`` if neither makes a model of the same shapes.
        """
        for kind, config in makers(model):
            for device in ("meta", "cpu"):  # a constructor that computes with its weights needs real tensors
                recipe = cls(kind, config, device)
                if recipe.shapes({}) == shapes_of(model):
                    return recipe
                if recipe.shapes({}) is not None:  # it can be made on this device, but has other sizes
                    break
        return None

    def edited(self, edits: Fields) -> Any:
        """A copy of the config with the edited values.

        Raises:
            EmitterError: A field is missing, or the value is not possible in a smaller model. This also validates
                values from artifacts.
        """
        config = copy.deepcopy(self.config)
        for path, value in edits.items():
            try:
                held, last = _holder(config, path)
                if not self._may_be(held, last, value):
                    raise ValueError
            except (KeyError, IndexError, ValueError) as failure:
                name = getattr(self.kind, "__name__", "the model")
                raise EmitterError(f"the config of {name} has no field {path!r} that may be {value!r}") from failure
            value = list(value) if isinstance(value, list | tuple) else value
            if isinstance(held, list | dict):
                held[last] = value  # type: ignore[index]
            else:
                setattr(held, str(last), value)
        return config

    def as_given(self, edits: Fields) -> dict[str, Any]:
        """The edits in the form that the model's maker accepts.

        For a function these are keywords with their whole values, otherwise dotted paths in the config object.
        """
        if not isinstance(self.config, Keywords):
            return dict(edits)
        names = dict.fromkeys(path.partition(".")[0] for path in edits)
        return {name: vars(self.edited(edits))[name] for name in names}

    def _may_be(self, held: Any, last: str | int, value: Any) -> bool:
        """Whether a value is allowed for a field: an integer that is not larger, a float that is not much larger, or
        for a list some of its entries in order."""
        if isinstance(held, list | dict):
            before = held[last]  # type: ignore[index]
        elif not str(last).isidentifier() or str(last).startswith("_"):
            return False
        else:
            before = vars(held).get(last)
            if before is None:
                return self._may_be_set(held, str(last)) and _is_size(value, max((PROBE, *self._widths())))
        if isinstance(value, list | tuple):
            rest: Iterator[Any] = iter(before if isinstance(before, list) else ())
            return all(any(one == own and type(one) is type(own) for own in rest) for one in value)
        if isinstance(before, float):
            return isinstance(value, float) and 0 < value <= max(before + 0.25, 1.0)
        return isinstance(before, int) and _is_size(value, before) and not isinstance(before, bool)

    def _may_be_set(self, held: Any, name: str) -> bool:
        """Whether a config has no value under a name, and its class defines nothing under it."""
        own = inspect.getattr_static(type(held), name, None)
        return (own is None or isinstance(own, property)) and getattr(held, name, None) is None

    def _widths(self) -> Iterator[int]:
        yield from (n for shape in (self.shapes({}) or {}).values() for n in shape)

    def make(self, edits: Fields, device: str | torch.device) -> nn.Module:
        """Build the model from the edited config; the random state is restored."""
        config = self.edited(edits)
        with apart(device):
            return self.kind(config)

    def shapes(self, edits: Fields) -> Shapes | None:
        """The shapes of the model that an edited config makes; ``None`` if it is refused, or changes when saved."""
        key = tuple(sorted((path, tuple(v) if isinstance(v, list) else v) for path, v in edits.items()))
        if key not in self._known:
            try:
                self._known[key] = shapes_of(self.make(self._as_read(edits), self.device))
            except Exception as failure:  # anything that a constructor or a validator may raise
                reraise_out_of_memory(failure)
                log.debug("%s is refused: %s", dict(edits), failure)
                self._known[key] = None
        return self._known[key]

    def _as_read(self, edits: Fields) -> Fields:
        """Return the edits, after checking that they survive writing and reading the config."""
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
        """The numbers that the config states, by path."""
        return {path: value for path, value in fields(self.config) if value is not None}

    def implied(self, sizes: Iterable[int]) -> dict[str, int]:
        """Fields that are unset or missing but still determine a size, with that size.

        The constructor reads them, shapes depend on them, and setting them to one of ``sizes`` changes no shape.
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

        with _watched({type(held) for held in nested.values()}, seen), apart(self.device):
            self.kind(config)
        return list(names)


@contextmanager
def apart(device: str | torch.device) -> Iterator[None]:
    """Context manager that creates tensors on a device, silences warnings, and restores the random state."""
    place = torch.device(device)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.random.fork_rng([place] if place.type == "cuda" else []))
        stack.enter_context(place)
        yield


class Keywords:
    """The numeric keywords of a constructor, in the form of a config."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def to_dict(self) -> dict[str, Any]:
        """The keywords as plain data."""
        return copy.deepcopy(vars(self))


Maker = tuple[Callable[[Any], nn.Module], Any]
"""What may have made a model: a callable and its argument."""

WRAPPED: list[Callable[[nn.Module], Iterable[Maker]]] = []
"""Further functions that yield makers, for modules that wrap a model made from a config."""


def makers(model: nn.Module) -> Iterator[Maker]:
    """The callables that may have made a model, each with its argument."""
    for further in WRAPPED:
        yield from further(model)
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
    """Find a function by name in the package of a class."""
    package = kind.__module__.partition(".")[0]
    inside = [module for path, module in list(sys.modules.items()) if f"{path}.".startswith(f"{package}.")]
    found = (vars(module).get(name) for module in [sys.modules[kind.__module__], *inside] if module is not None)
    return next((function for function in found if inspect.isfunction(function)), None)


MADE_WITH = "_model_args"
"""The attribute of a model that may hold the keywords passed to its function."""


def _keywords(kind: Any, make: Callable[[], Any]) -> Keywords | None:
    """The numbers that a function passes to the constructor of a class; ``None`` if it does not make that class."""
    plain, own = kind.__init__, "__init__" in vars(kind)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **keywords: Any) -> None:
        if type(self) is kind and not calls:
            calls.append((args, keywords))
        plain(self, *args, **keywords)

    kind.__init__ = init
    try:
        with apart("meta"):
            make()
    except Exception as failure:  # anything that a constructor may raise
        reraise_out_of_memory(failure)
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


def _holder(config: Any, path: str) -> tuple[Any, str | int]:
    """The config, list or dictionary that holds a field, and the field's key in it; the path leads through data only.

    Raises:
        KeyError, IndexError, ValueError: There is no such field.
    """
    held: Any = config
    *parents, last = path.split(".")
    for name in parents:
        if isinstance(held, list):
            held = held[int(name)]
        elif isinstance(held, dict):
            held = held[name]
        elif name.startswith("_"):
            raise KeyError(name)
        else:
            held = vars(held)[name]
        if not (isinstance(held, list | dict) or _is_config(held)):
            raise KeyError(name)
    return held, (int(last) if isinstance(held, list) else last)


def _is_size(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _is_config(value: Any) -> bool:
    """Whether a value that a config holds is itself a config."""
    return not isinstance(value, type) and hasattr(value, "__dict__") and callable(getattr(value, "to_dict", None))


def configs(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A config and all configs nested in it, each with its path."""
    yield path, config
    for name, value in vars(config).items():
        if not name.startswith("_") and _is_config(value):
            yield from configs(value, f"{path}.{name}" if path else name)


def fields(config: Any) -> Iterator[tuple[str, int | float | None]]:
    """Every number and every unset field in a config and in the configs nested in it."""

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
    """Context manager that reports every unset or missing attribute that is read from instances of some classes."""
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


_FILLS = {
    "normal_",
    "uniform_",
    "kaiming_normal_",
    "kaiming_uniform_",
    "xavier_normal_",
    "xavier_uniform_",
    "trunc_normal_",
    "erfinv_",
    "mul_",
    "add_",
    "clamp_",
    "zero_",
    "fill_",
}
"""Functions that initialize parameters in place; a truncated normal distribution takes four of them."""


class Unfilled(TorchFunctionMode):
    """Mode that skips the initialization of parameters, for a constructor whose parameters are all replaced afterwards.

    Initialization takes most of a constructor's time, and memory that is never written to is never allocated.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else (kwargs or {}).get("tensor")
        if func.__name__ in _FILLS and isinstance(first, nn.Parameter):
            return first
        return func(*args, **(kwargs or {}))
