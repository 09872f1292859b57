"""The example input of a model, converted once to arguments of ``forward``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from oto._torch import tree_leaves, tree_map_only
from oto.errors import DummyInputError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Example(NamedTuple):
    """Arguments of ``model.forward``; a pytree, so mapping over its tensors returns an example.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        alone: Whether the user passed a single tensor instead of a tuple.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    alone: bool = False

    @classmethod
    def of(cls, given: Any) -> Example:
        """Make an example from what a user passes; an :class:`Example` is returned unchanged.

        Args:
            given: A tensor, a tuple or list of positional arguments, or a mapping with string keys.

        Raises:
            DummyInputError: It is anything else, or holds no tensor.
        """
        if isinstance(given, Example):
            return given
        if isinstance(given, Tensor):
            example = cls((given,), {}, alone=True)
        elif isinstance(given, tuple | list):
            example = cls(tuple(given), {})
        elif isinstance(given, Mapping) and all(isinstance(key, str) for key in given):
            example = cls((), dict(given))
        else:
            raise DummyInputError(
                f"dummy_input is a {type(given).__name__}\n"
                "  expected  a tensor, a tuple of positional arguments, or a dict of keyword arguments of"
                " model.forward\n"
                "  to fix    pass for example torch.randn(1, 3, 224, 224), (x, mask) or {'input_ids': ids}"
            )
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((example.args, example.kwargs))):
            raise DummyInputError(
                "dummy_input holds no tensor, so the model cannot be followed from its inputs\n"
                "  to fix    pass the tensors that model.forward takes"
            )
        return example

    @property
    def given(self) -> Any:
        """The example as users pass it: a tensor, a tuple or a dict."""
        return self.args[0] if self.alone else self.kwargs or self.args


def arguments(example: Any) -> Arguments:
    """Positional and keyword arguments for one run; a tensor that is passed twice becomes two inputs.

    Args:
        example: An :class:`Example`, or what :meth:`Example.of` takes.
    """
    args, kwargs, _ = Example.of(example)
    separate: Arguments = tree_map_only(Tensor, lambda t: t.detach(), (args, kwargs))
    return separate
