"""A module of the user's own whose code states sizes that nobody can set: some of its calls are told others.

The code runs as it is. Of the torch functions that it calls, those that name a size, or that divide by one, are met on
their way (``torch.overrides.TorchFunctionMode``) and called with what is right for the thinner module. Other calls, the
batch and other lengths are as the code says. ``torch.compile`` and ``torch.export`` see the calls as they are made.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import CodeType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from oto.nn import functional as counted

Calls = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""What to change: for the name of a torch function, and how many calls of it came before in this forward (as a string,
for JSON), how."""


class Told:
    """The forward of a module, with some of its calls changed; it takes the place of ``module.forward``.

    It has the signature of that, which trainers and exporters read.

    Args:
        module: Of any class.
        calls: Which calls to change, and how:
            ``{"numbers": [[place, number], ...], "of": count}`` puts other numbers among the arguments, so many in all,
            ``{"pieces": [sizes, dim]}`` cuts pieces of other sizes,
            ``{"counted": name, ...}`` calls a function of :mod:`oto.nn.functional` with further keywords,
            ``{"keep": True}`` keeps the result for a later one: its ``"rest"`` is what each entry held that is gone,
            computed of such results, as ``{"op": [packet, overload], "args": [...]}`` and ``{"kept": [name, place]}``.
    """

    def __init__(self, module: nn.Module, calls: Calls) -> None:
        self.module = module
        self.calls = {name: dict(places) for name, places in calls.items()}

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own)

    @property
    def __code__(self) -> CodeType:
        return self._own.__code__

    @property
    def _own(self) -> MethodType:
        return MethodType(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Telling(self.calls):
            return type(self.module).forward(self.module, *args, **kwargs)


_UNTOLD = [0]  # how many modules of ours are running


def untold(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward of ours, whose calls stand in the place of one: nobody counts them, and none is told another size."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        _UNTOLD[0] += 1
        try:
            return forward(*args, **kwargs)
        finally:
            _UNTOLD[0] -= 1

    return run


class _Telling(TorchFunctionMode):
    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls
        self.seen = dict.fromkeys(calls, 0)
        self.kept: dict[tuple[str, str], Any] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if name in self.seen and not _UNTOLD[0]:
            place = str(self.seen[name])
            self.seen[name] += 1
            if place in self.calls[name]:
                how = self.calls[name][place]
                if "rest" in how:
                    how = {**how, "rest": _computed(how["rest"], self.kept)}
                result = told(how, func, args, kwargs)
                if "keep" in how:
                    self.kept[name, place] = result
                return result
        return func(*args, **kwargs)


UNIFORM = ("add", "sub", "mul", "div", "pow", "square", "abs", "neg", "rsqrt", "sqrt", "_to_copy", "to")
"""Operators that what is gone may be computed by; no others, for a file may say which."""


def _computed(x: Any, kept: Mapping[tuple[str, str], Any]) -> Any:
    if isinstance(x, dict) and "kept" in x:
        name, place = x["kept"]
        return kept[name, place]
    if isinstance(x, dict):
        packet, overload = x["op"]
        assert packet in UNIFORM, packet
        op = getattr(getattr(torch.ops.aten, packet), overload)
        args = [_computed(item, kept) for item in x["args"]]
        like = next((a for a in args if isinstance(a, Tensor)), None)
        tensors = [argument.type.kind() == "TensorType" for argument in op._schema.arguments]
        if like is not None:  # a number where the operator takes a tensor
            args = [
                like.new_tensor(a) if wants and isinstance(a, int | float) else a
                for a, wants in zip(args, tensors, strict=False)
            ]
        return op(*args)
    return x


def name_of(func: Callable[..., Any]) -> str:
    """What a torch function is called, as a function or as a method."""
    return getattr(func, "__name__", "")


def told(how: Mapping[str, Any], func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Make a call as it is to be made."""
    if "numbers" in how:
        found = len(numbers_of((args, dict(kwargs))))
        if found != how.get("of", found):
            raise RuntimeError(
                f"{name_of(func)} is called with {found} numbers, where the forward that was analysed has {how['of']}\n"
                "  effect  it takes another path here, and which sizes to state is not known\n"
                "  to fix  keep the widths that this module states: OTO(..., skip_patterns=[...])"
            )
        args, kwargs = replaced((args, dict(kwargs)), dict(how["numbers"]))
    if "pieces" in how:
        sizes, dim = how["pieces"]
        return args[0].split(list(sizes), dim)
    if "counted" in how:
        return COUNTED[how["counted"]](how, *args, **kwargs)
    return func(*args, **kwargs)


def both_told(old: Calls, new: Calls) -> dict[str, dict[str, Mapping[str, Any]]]:
    """What two rounds of changes tell a module together: what the first one counted is still counted in full."""
    both: dict[str, dict[str, Mapping[str, Any]]] = {name: dict(places) for name, places in old.items()}
    for name, places in new.items():
        for place, how in places.items():
            before = both.setdefault(name, {}).get(place, {})
            made = {**before, **how}
            if "numbers" in before and "numbers" in how:
                made["numbers"] = [list(pair) for pair in (dict(before["numbers"]) | dict(how["numbers"])).items()]
            if "full" in before:
                made["full"] = before["full"]
            both[name][place] = made
    return both


_is_tracing: Callable[[], bool] = vars(torch.jit)["is_tracing"]  # without a type in some releases


def numbers_of(arguments: Any) -> list[int | float]:
    """The numbers among arguments, in their order."""
    found: list[int | float] = []
    _walk(arguments, lambda number: found.append(number) or number)  # type: ignore[func-returns-value]
    return found


def replaced(arguments: Any, new: Mapping[int, int | float]) -> Any:
    """Arguments with other numbers in some places."""
    place = -1

    def put(number: int | float) -> int | float:
        nonlocal place
        place += 1
        return new.get(place, number)

    return _walk(arguments, put)


def _walk(x: Any, put: Callable[[Any], Any]) -> Any:
    if isinstance(x, Tensor):  # while TorchScript traces, sizes are tensors
        traced = _is_tracing()
        return put(x) if traced and x.ndim == 0 and x.dtype == torch.int64 else x
    if isinstance(x, bool):
        return x
    if isinstance(x, int | float | torch.SymInt):
        return put(x)
    if isinstance(x, torch.Size):
        return tuple(_walk(item, put) for item in x)
    if isinstance(x, tuple | list):
        return type(x)(_walk(item, put) for item in x)
    if isinstance(x, slice):
        return slice(_walk(x.start, put), _walk(x.stop, put), _walk(x.step, put))
    return {name: _walk(item, put) for name, item in x.items()} if isinstance(x, dict) else x


# a torch function's own arguments, and its thin form; of sizes that are not gone, only ratios count


def _dims(x: Tensor, dim: Any) -> list[int]:
    if dim is None or dim == ():
        return list(range(x.ndim))
    return [d % x.ndim for d in (dim if isinstance(dim, Iterable) else [dim])]


def _counts(how: Mapping[str, Any]) -> dict[str, Any]:
    return {"full": how["full"], "sizes": how["sizes"]}


def _others(how: Mapping[str, Any]) -> dict[str, Any]:
    """What the entries held that are gone, if it was not zero."""
    return {key: how[key] for key in ("rest", "along", "left", "of") if key in how}


def _layer_norm(how: Any, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
                bias: Tensor | None = None, eps: float = 1e-5, cudnn_enable: bool = True) -> Tensor:  # fmt: skip
    return counted.layer_norm(input, input.shape[-1:], weight, bias, eps, full=how["full"])


def _rms_norm(how: Any, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
              eps: float | None = None) -> Tensor:  # fmt: skip
    return counted.rms_norm(input, input.shape[-len(how["full"]) :], weight, eps, full=how["full"])


def _group_norm(how: Any, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
                eps: float = 1e-5, cudnn_enabled: bool = True) -> Tensor:  # fmt: skip
    return counted.group_norm(input, how["groups"], weight, bias, eps, full=how["full"], width=how["width"])


def _batch_norm(how: Any, input: Tensor, running_mean: Any = None, running_var: Any = None, *args: Any,
                **named: Any) -> Tensor:  # fmt: skip
    given = dict(zip(("weight", "bias", "training", "momentum", "eps"), args, strict=False)) | named
    return counted.batch_norm(input, given.get("weight"), given.get("bias"), given.get("eps", 1e-5), **_counts(how))


def _mean(how: Any, input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    return counted.mean(input, _dims(input, dim), keepdim, dtype=dtype, **_counts(how), **_others(how))


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
    return counted.grouped_mm(*args, **named)


COUNTED: dict[str, Callable[..., Any]] = {
    "grouped_mm": _grouped_mm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "mean": _mean,
    "var": _spread(counted.var),
    "std": _spread(counted.std),
    "var_mean": _spread(counted.var_mean),
    "std_mean": _spread(counted.std_mean),
}
