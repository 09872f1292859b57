"""Run a user's forward with call overrides, for code whose sizes cannot be set by attributes.

Example: ``x.view(b, t, 12, 64)`` with literal numbers has to use 9 heads in the slim model.

The code runs unchanged. Torch calls that state a size, or divide by one, are intercepted
(``torch.overrides.TorchFunctionMode``) and made with the numbers that are right for the thinner module. Other calls,
batch sizes and sequence lengths are as the code states them. ``torch.compile`` and ``torch.export`` see the overridden
calls.

A call is identified by its *site*: the lines of code that were running, from the module's own forward to the call. So
the site does not depend on other calls that a forward makes before, in train mode, with a cache or with labels. A line
with an override that is reached on a different path, or with other tensors or sizes than before, is refused.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from oto._torch import constant
from oto.errors import ClassChangedError, ScriptError, UnseenPathError
from oto.nn import functional as full_count
from oto.nn.calls import (
    TracedSizes,
    first_tensor,
    is_tracing,
    may_be_former,
    name_of,
    nesting,
    numbers_of,
    replaced,
    site_of_call,
    user_module,
)
from oto.nn.overrides import FullCount, Given, Json, Override, Overrides, Passed, Pieces, Sizes, from_json, to_json

Time = tuple[str, str, int]
"""A site, the name of a torch function, and the ordinal of its call there within one run."""


class OverriddenForward:
    """Replaces ``module.forward`` and overrides some of its calls.

    It has the same signature, which trainers and exporters read.

    Args:
        module: A module of any class.
        calls: The overrides, in the form of artifacts; see :mod:`oto.nn.overrides`.

    Raises:
        ClassChangedError: The lines of an override no longer exist.
        UnseenPathError: During a run, a call is not the one that an override is for.
    """

    def __init__(self, module: nn.Module, calls: Json, analyzed: bool = False) -> None:
        self.module = module
        self.overrides: Overrides = from_json(calls)
        for site, named in self.overrides.items():
            for how in itertools.chain.from_iterable(named.values()):
                _require_line(_last(site), how.home, module)
        self.methods = _by_method(type(module), self.overrides)
        self.analyzed = analyzed
        self.running = 0

    def as_analyzed(self) -> OverriddenForward:
        """The form that ``OTO`` records in place of this one: norms and means are plain ones over the kept entries, as
        in :class:`oto.nn.LayerNorm`, so that these can be pruned again; the full counts stay the same."""
        return OverriddenForward(self.module, self.calls, analyzed=True)

    @property
    def calls(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """The overrides in the form of artifacts."""
        return to_json(self.overrides)

    def install(self) -> None:
        """Replace the module's forward and the methods that it calls, because these may also be called directly."""
        held = vars(self.module)
        held["forward"] = self
        held.update({name: OverriddenMethod(self, name) for name in self.methods})

    def remove(self) -> None:
        """Restore the forward and methods of the module's class."""
        for name in ("forward", *self.methods):
            vars(self.module).pop(name, None)

    @property
    def is_idle(self) -> bool:
        """Whether no call is changed because the code states all sizes correctly by itself."""
        hows = [how for named in self.overrides.values() for each in named.values() for how in each]
        return not any(
            how.keep or isinstance(how, (Pieces, FullCount, Passed)) or getattr(how, "numbers", ()) for how in hows
        )

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own)

    @property
    def __code__(self) -> CodeType:
        return self._own.__code__

    @property
    def __globals__(self) -> dict[str, Any]:
        """Refuse ``torch.jit.script``, which reads this attribute and would compile the code without overrides."""
        raise ScriptError(f"the forward of {type(self.module).__name__}: some of its calls are overridden")

    @property
    def _own(self) -> MethodType:
        return MethodType(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run_overridden("forward", self.overrides, args, kwargs)

    def run_overridden(self, name: str, calls: Overrides, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a method of the class with its overrides."""
        learned = None if _LEARNED is None else _LEARNED.setdefault(id(self), {})
        interception = _Interception(calls, learned, self.analyzed)
        self.running += 1
        try:
            with interception:
                result = getattr(type(self.module), name)(self.module, *args, **kwargs)
        finally:
            self.running -= 1
        interception.require_times()
        return result


class OverriddenMethod:
    """Replaces a method that a module's forward calls, so that direct calls have the same overrides."""

    def __init__(self, forward: OverriddenForward, name: str) -> None:
        self.forward, self.name = forward, name

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also read pickles from before 0.2, in which the attribute had another name."""
        self.forward, self.name = state["told"] if "told" in state else state["forward"], state["name"]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(getattr(type(self.forward.module), self.name), self.forward.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calls, module = self.forward.methods[self.name], self.forward.module
        if self.forward.running:  # the overrides of the forward are active already
            return getattr(type(module), self.name)(module, *args, **kwargs)
        if calls is None:
            raise _refused(f"{type(module).__name__}.{self.name} is called directly, and not by the forward")
        return self.forward.run_overridden(self.name, calls, args, kwargs)


def _by_method(kind: type[nn.Module], calls: Overrides) -> dict[str, Overrides | None]:
    """For each method of the class that the forward calls, its overrides; ``None`` if they are ambiguous."""
    found: dict[str, dict[str, Any] | None] = {}
    for site, named in calls.items():
        lines = site.split("\n")
        for i, line in enumerate(lines):
            (name, _, text), within = line.partition(": "), "\n".join(lines[i:])
            method = inspect.getattr_static(kind, name, None)
            if not i or name == "forward" or not isinstance(method, FunctionType):
                continue
            if not text.isdecimal() and text not in _code(method):  # a method of another class with the same name
                continue
            own = found.setdefault(name, {})
            kept = any(how.keep or _follows(how) for hows in named.values() for how in hows)
            if own is not None and (kept or own.setdefault(within, named) != named):
                found[name] = None
    return dict(found)


_LEARNED: dict[int, dict[Time, Override]] | None = None
"""Inside :func:`learning`, what was learned for each :class:`OverriddenForward`, by its id. It cannot be kept in the
modules because they are restored after a run."""


@contextmanager
def learning(model: nn.Module) -> Iterator[None]:
    """Context manager in which runs record what identifies overridden calls: the Python module and the code's numbers.

    Later runs must state the same numbers. Numbers that the code gets right are no longer overridden.
    """
    global _LEARNED
    forwards = [m.forward for m in model.modules() if isinstance(m.forward, OverriddenForward)]
    learned_by: dict[int, dict[Time, Override]] = {}
    _LEARNED = learned_by
    try:
        yield
    finally:
        _LEARNED = None
        for forward in forwards:
            learned = learned_by.get(id(forward), {})
            forward.overrides = {
                site: {
                    name: [_left_alone(learned.get((site, name, i), how)) for i, how in enumerate(hows)]
                    for name, hows in named.items()
                }
                for site, named in forward.overrides.items()
            }
            forward.methods = _by_method(type(forward.module), forward.overrides)


def _left_alone(how: Override) -> Override:
    """The override without the numbers that the code gets right."""
    sizes = how.stated
    if sizes is None or not sizes.was:
        return how
    right = [all(was[i] == number for was in sizes.was) for i, (_, number) in enumerate(sizes.numbers)]
    numbers = tuple(pair for pair, own in zip(sizes.numbers, right, strict=True) if not own)
    was = tuple(tuple(x for x, own in zip(each, right, strict=True) if not own) for each in sizes.was)
    grows = tuple(place for place in sizes.grows if place in dict(numbers))
    return how.stating(replace(sizes, numbers=numbers, was=was, grows=grows))


def _follows(how: Override) -> bool:
    """Whether the value of removed entries is computed from kept results."""
    return isinstance(how, FullCount) and "rest" in how.keywords


# --- the user's code --------------------------------------------------------------------------------------------------


def _require_line(line: str, where: str | None, module: nn.Module) -> None:
    """Refuse code in which the line of an override no longer exists, if the source is available."""
    text = line.partition(": ")[2]
    if where in (None, "__main__") or where not in sys.modules or text.isdecimal() or text in _source(where):
        return
    if _source(where) and not any(text in _source(kind.__module__) for kind in type(module).__mro__):
        raise ClassChangedError(
            f"{where} has changed since {type(module).__name__} was made slim: a line no longer exists\n"
            f"  line    {line}\n  effect  it is not known which sizes to state\n"
            "  to fix  use the version of the code that the slim model was made with, or make the model slim again"
        )


@cache
def _source(name: str) -> frozenset[str]:
    """The lines of a Python module; empty if there is no source."""
    file = getattr(sys.modules.get(name), "__file__", None)
    return frozenset(line.strip() for line in linecache.getlines(file)) if file else frozenset()


@cache
def _code(method: FunctionType) -> frozenset[str]:
    """The lines of a method; empty if there is no source."""
    try:
        return frozenset(line.strip() for line in inspect.getsourcelines(method)[0])
    except OSError:
        return frozenset()


class _Interception(TorchFunctionMode):
    def __init__(self, calls: Overrides, learned: dict[Time, Override] | None, analyzed: bool = False) -> None:
        super().__init__()
        self.analyzed = analyzed
        self.calls = calls
        self.learned = learned
        self.depth = nesting()
        self.ends = {(_last(site), name) for site, named in calls.items() for name in named}
        self.names = {name for _, name in self.ends}
        self.former = any(map(may_be_former, calls))
        self.seen: dict[tuple[str, str], int] = {}
        self.kept: dict[tuple[str, str, int], Any] = {}
        self.traced = TracedSizes() if is_tracing() else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if self.traced is not None and self.traced.are_all((args, kwargs)):  # arithmetic on sizes, not a call
            result = func(*args, **kwargs)
            self.traced.add(result)
            return result
        if name not in self.names:
            return func(*args, **kwargs)
        site = site_of_call(self.depth)
        if self.former and name not in self.calls.get(site, {}) and (old := site_of_call(self.depth, True)) != site:
            site = old if name in self.calls.get(old, {}) else site
        hows = self.calls.get(site, {}).get(name)
        if hows is None:
            if (_last(site), name) in self.ends:
                raise _refused(f"{name} is called on a path that was not seen:\n    " + site.replace("\n", "\n    "))
            return func(*args, **kwargs)
        time = self.seen.get((site, name), 0)
        self.seen[site, name] = time + 1
        if len(hows) == 1:
            time = 0
        elif time >= len(hows):
            raise _refused(f"{name} is called more often than {len(hows)} times: {_last(site)}")
        how = hows[time]
        if type(how) is Override and not how.keep:
            return func(*args, **kwargs)
        if self.learned is not None:
            how = _seen(self.learned.get((site, name, time), how), args, kwargs, user_module(sys._getframe(1)))
            self.learned[site, name, time] = how
        _require_given(how, name, args, kwargs)
        result = self.call(how, func, args, kwargs)
        if how.keep:
            self.kept[site, name, time] = result
        return result

    def call(self, how: Override, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call with its override."""
        if isinstance(how, Pieces):
            return args[0].split(list(how.sizes), how.dim)
        if isinstance(how, Passed):
            x = first_tensor((args, kwargs))
            return func(*args, **kwargs) if x is None or x.numel() else x.new_empty(0)
        sizes = how.stated
        if sizes is not None and not (self.analyzed and isinstance(how, FullCount)):
            stated = numbers_of((args, kwargs), self.traced)
            new = _numbers(sizes, name_of(func), stated, self.learned is not None)
            args, kwargs = replaced((args, kwargs), new, self.traced)
        if isinstance(how, FullCount):
            return _of_what_is_left(how, func, args, kwargs) if self.analyzed else self.count(how, args, kwargs)
        return func(*args, **kwargs)

    def count(self, how: FullCount, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call that divides by the full count."""
        keywords = dict(how.keywords)
        if "rest" in keywords:
            keywords["rest"] = _computed(keywords["rest"], self.kept)
        return COUNTED[how.name](keywords, *args, **kwargs)

    def require_times(self) -> None:
        """Refuse a run that reached a site a different number of times than it has overrides."""
        for (site, name), times in self.seen.items():
            wanted = len(self.calls[site][name])
            if wanted > 1 and times != wanted:
                raise _refused(f"{name} is called {times} times, and not {wanted}: {_last(site)}")


def _last(site: str) -> str:
    return site.rpartition("\n")[2]


def _refused(what: str) -> UnseenPathError:
    return UnseenPathError(
        f"{what}\n"
        "  effect  the forward takes a different path than the one that was analyzed, and it is not known which sizes"
        " to state here; nothing was computed\n"
        "  to fix  pass OTO(...) an example that takes this path, or keep the widths that this module states:"
        " OTO(..., skip_patterns=[...])"
    )


def _require_given(how: Override, name: str, args: Any, kwargs: Any) -> None:
    """Refuse a call whose first tensor does not match the recorded one."""
    if how.takes is None or is_tracing():
        return
    x, sizes = first_tensor((args, kwargs)), how.takes.sizes
    if x is None or not _fits(how.takes, x) or any(size not in (None, x.shape[dim]) for dim, size in sizes):
        shape, wanted = None if x is None else tuple(x.shape), dict(sizes)
        raise _refused(f"{name} is given a tensor of shape {shape}, and not one with {wanted}, counted from the last")


def _fits(takes: Given, x: Tensor) -> bool:
    return takes.rank in (None, x.ndim) and all(-dim <= x.ndim for dim, _ in takes.sizes)


def _seen(how: Override, args: Any, kwargs: Any, home: str | None) -> Override:
    """The override with what identifies the call from now on: its Python module, first tensor, and own numbers."""
    x, takes = first_tensor((args, kwargs)), how.takes
    if takes is not None and x is not None and _fits(takes, x):
        takes = Given(takes.rank, tuple((dim, x.shape[dim]) for dim, _ in takes.sizes))
    how = replace(how, home=home, takes=takes)
    sizes, stated = how.stated, numbers_of((args, kwargs))
    if sizes is not None and len(stated) == (sizes.of or len(stated)):
        own = tuple(stated[place] for place, _ in sizes.numbers)
        if own not in sizes.was:
            how = how.stating(replace(sizes, was=(*sizes.was, own)))
    return how


def _of_what_is_left(how: FullCount, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a call that has a full count as a plain call over the kept entries."""
    states = _STATES.get(how.name)
    if states is not None:
        x = args[0] if args else kwargs["input"]
        full = how.keywords["full"]
        size = how.keywords["groups"] if states == "num_groups" else list(x.shape[-len(full) :])
        if states in kwargs:
            kwargs = {**kwargs, states: size}
        else:
            args = (x, size, *args[2:])
    return func(*args, **kwargs)


_STATES = {"layer_norm": "normalized_shape", "rms_norm": "normalized_shape", "group_norm": "num_groups"}
"""The second argument of the functions that take a size."""

UNIFORM = ("add", "sub", "mul", "div", "pow", "square", "abs", "neg", "rsqrt", "sqrt", "_to_copy", "to")
"""Operators that may compute the value of removed entries; a closed list, because files name them."""


def _computed(x: Any, kept: Mapping[tuple[str, str, int], Any]) -> Any:
    if isinstance(x, dict) and "kept" in x:
        site, name, time = x["kept"]
        return kept[site, name, time]
    if isinstance(x, dict):
        packet, overload = x["op"]
        if packet not in UNIFORM:
            raise _refused(f"the value of removed entries would be computed by {packet}.{overload}")
        op = getattr(getattr(torch.ops.aten, packet), overload)
        args = [_computed(item, kept) for item in x["args"]]
        like = [a for a in args if isinstance(a, Tensor)][:1]
        tensors = _wants_tensors(packet, overload)
        if like:  # the operator expects a tensor in place of a number
            args = [
                like[0].new_tensor(a) if wants and isinstance(a, (int, float)) else a
                for a, wants in zip(args, tensors, strict=False)
            ]
        return op(*args)
    return x


@constant
def _wants_tensors(packet: str, overload: str) -> tuple[bool, ...]:
    schema = getattr(getattr(torch.ops.aten, packet), overload)._schema
    return tuple(argument.type.kind() == "TensorType" for argument in schema.arguments)


def _numbers(how: Sizes, name: str, stated: list[Any], learning: bool) -> dict[int, Any]:
    """The numbers to state, by position. A call whose own numbers differ from the recorded ones is refused."""
    if len(stated) != (how.of or len(stated)):
        raise _refused(f"{name} is called with {len(stated)} numbers, and not {how.of}")
    new, own = dict(how.numbers), [stated[place] for place, _ in how.numbers]
    if learning or not how.was:
        return new
    was = dict(zip(new, how.was[0], strict=True))
    for place in how.grows:  # for example with the batch
        new[place] = new[place] * stated[place] // was[place]
    still = [
        [x for place, x in zip(new, numbers, strict=True) if place not in how.grows] for numbers in (own, *how.was)
    ]
    if not is_tracing() and still[0] not in still[1:]:
        seen = " or ".join(str(list(numbers)) for numbers in how.was)
        raise _refused(f"{name} states {own} in the places {[*new]}, and not {seen}")
    return new


def merge_rounds(old: Json, new: Json) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Combine the overrides of two rounds; the full counts are still those of the first round.

    Sizes by which the first round identified calls may then be any, unless the second round states them.
    """
    both = {
        site: {name: list(map(_unlearned, hows)) for name, hows in named.items()}
        for site, named in from_json(old).items()
    }
    for site, named in from_json(new).items():
        there = both.setdefault(site, {})
        for name, hows in named.items():
            if any(isinstance(how, Pieces) for how in hows):  # the first round has another name for the call
                name = next((n for n, each in there.items() if any(isinstance(h, Pieces) for h in each)), name)
            before = there.get(name, [Override()])
            passed = any(isinstance(how, Passed) for how in before)
            if passed and len(hows) != len(before):  # the second round did not see the calls that were passed over
                seen = sum(not isinstance(how, Passed) for how in before)
                if len(hows) not in (1, seen):
                    raise _uneven(name, site, seen, len(hows))
                left = iter(list(hows) * (seen if len(hows) == 1 else 1))
                hows = [Override() if isinstance(how, Passed) else next(left) for how in before]
            times = max(len(before), len(hows))
            if {len(before), len(hows)} - {1, times}:
                raise _uneven(name, site, len(before), len(hows))
            pairs = zip(before * (times // len(before)), list(hows) * (times // len(hows)), strict=True)
            there[name] = [_both(one, other) for one, other in pairs]
    return to_json(both)


def _uneven(name: str, site: str, first: int, second: int) -> RuntimeError:
    return RuntimeError(f"{name} has {first} overrides in one round, {second} in another: {site}")


def _unlearned(how: Override) -> Override:
    """An override without the sizes that identify its call, which may have changed."""
    if how.takes is not None:
        how = replace(how, takes=Given(how.takes.rank, tuple((dim, None) for dim, _ in how.takes.sizes)))
    return how if how.stated is None else how.stating(replace(how.stated, was=()))


def _both(before: Override, how: Override) -> Override:
    if how.home is not None or before == Override():  # ``how`` was learned while ``before`` was active
        return how
    common: dict[str, Any] = {"keep": before.keep or how.keep, "takes": how.takes or before.takes}
    common["home"] = how.home or before.home
    made = replace(before if type(how) is Override else how, **common)
    if isinstance(before, FullCount):
        own = how.keywords if isinstance(how, FullCount) else {}
        counts = {key: value for key, value in before.keywords.items() if key in ("full", "of")}
        name = how.name if isinstance(how, FullCount) else before.name
        made = FullCount(name=name, keywords={**before.keywords, **own, **counts}, **common)
    if before.stated is not None and how.stated is not None:
        numbers = tuple({**dict(before.stated.numbers), **dict(how.stated.numbers)}.items())
        of, grows = how.stated.of or before.stated.of, how.stated.grows or before.stated.grows
        return made.stating(replace(how.stated, numbers=numbers, of=of, grows=grows))
    stated = how.stated or before.stated
    return made if stated is None else made.stating(stated)


# Each takes the arguments of a torch function and calls its form with the full count; only the ratio of sizes matters.


def _dims(x: Tensor, dim: Any) -> list[int]:
    if dim is None or dim == ():
        return list(range(x.ndim))
    return [d % x.ndim for d in (dim if isinstance(dim, Iterable) else [dim])]


def _counts(how: Mapping[str, Any]) -> dict[str, Any]:
    return {"full": how["full"], "sizes": how["sizes"]}


def _others(how: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that give the value of removed entries, if it was not zero."""
    return {key: how[key] for key in ("rest", "along", "left", "of") if key in how}


def _layer_norm(
    how: Any,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return full_count.layer_norm(input, input.shape[-1:], weight, bias, eps, full=how["full"])


def _rms_norm(
    how: Any, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return full_count.rms_norm(input, input.shape[-len(how["full"]) :], weight, eps, full=how["full"])


def _group_norm(
    how: Any,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    return full_count.group_norm(input, how["groups"], weight, bias, eps, full=how["full"], width=how["width"])


def _batch_norm(
    how: Any, input: Tensor, running_mean: Any = None, running_var: Any = None, *args: Any, **named: Any
) -> Tensor:
    given = dict(zip(("weight", "bias", "training", "momentum", "eps"), args, strict=False)) | named
    return full_count.batch_norm(input, given.get("weight"), given.get("bias"), given.get("eps", 1e-5), **_counts(how))


def _mean(how: Any, input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    return full_count.mean(input, _dims(input, dim), keepdim, dtype=dtype, **_counts(how), **_others(how))


def _spread(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(how: Any, input: Tensor, dim: Any = None, *args: Any, keepdim: bool = False, **named: Any) -> Any:
        if isinstance(dim, bool):  # var(x, unbiased)
            args, dim = (dim, *args), None
        flags = [flag for flag in args if isinstance(flag, bool)]
        given = named.get("correction", named.get("unbiased", flags[0] if flags else None))
        keep = flags[1] if len(flags) > 1 else keepdim
        correction = 1 if given is None else given + 0
        return function(input, _dims(input, dim), correction, keep, **_counts(how), **_others(how))

    return run


def _grouped_mm(how: Any, *args: Any, **named: Any) -> Tensor:
    return full_count.grouped_mm(*args, **named)


def _loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(how: Any, input: Tensor, target: Tensor, *args: Any, **named: Any) -> Tensor:
        return function(input, target, *args, **named, **_counts(how))

    return run


COUNTED: dict[str, Callable[..., Any]] = {
    "grouped_mm": _grouped_mm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "mean": _mean,
    "var": _spread(full_count.var),
    "std": _spread(full_count.std),
    "var_mean": _spread(full_count.var_mean),
    "std_mean": _spread(full_count.std_mean),
    "mse_loss": _loss(full_count.mse_loss),
    "smooth_l1_loss": _loss(full_count.smooth_l1_loss),
    "huber_loss": _loss(full_count.huber_loss),
}
