"""Compare the slim model with the full one in train mode: the same outputs, the same running statistics."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from oto._torch import TorchDispatchMode, tree_leaves, tree_map_only
from oto.errors import ShrinkError, first_line, reraise_out_of_memory
from oto.groups import Kept, Partition
from oto.slim.proof.compare import Check, checked
from oto.slim.proof.float64 import double_input, dtype_of, in_double, throughout, without_tf32
from oto.slim.proof.inputs import random_like
from oto.slim.pruned_shapes import PrunedShapes, pruned_shapes
from oto.trace.inputs import arguments
from oto.trace.outputs import tensors_in
from oto.trace.snapshot import preserved

log = logging.getLogger(__name__)


def check_training(
    full: nn.Module, slim: nn.Module, dummy_input: Any, partition: Partition, kept: Kept
) -> Check | None:
    """Compare the outputs of both models in train mode without randomness, and their buffers afterwards.

    Both models are restored. Returns ``None`` if the full model does not run in train mode on such an input, for
    example because it needs targets, or if its outputs hold no finite number.

    Raises:
        ShrinkError: The slim model fails on an input on which the full one runs.
    """
    for given in _tries(dummy_input):
        try:
            expected = trained(full, given)
        except Exception as failure:  # whatever a forward may need for training
            reraise_out_of_memory(failure)
            log.info("%s does not run in train mode on the example: %s", type(full).__name__, first_line(failure))
            continue
        try:
            found = trained(slim, given)
        except Exception as failure:
            reraise_out_of_memory(failure)
            raise ShrinkError(
                f"the slim {type(full).__name__} fails in train mode, where the full one runs: {first_line(failure)}\n"
                "  effect  nothing was changed\n"
                "  to fix  if that is in a part that only training uses, keep what it reads: skip_patterns=[...]"
            ) from failure
        pruned = pruned_shapes(partition, kept)
        made = _compared(dtype_of(full), pruned, expected, found)
        if not made.finite:
            log.info("%s gives no finite number in train mode on the example", type(full).__name__)
            return None
        if made.passed or dtype_of(full) == torch.float64:
            return made
        try:  # batch norm over a handful of values amplifies rounding; float64 decides
            expected, found = (trained(in_double(module), double_input(given)) for module in (full, slim))
        except Exception as failure:
            reraise_out_of_memory(failure)
            log.info("%s does not train in float64: %s", type(full).__name__, first_line(failure))
            return made
        return _compared(torch.float64, pruned, expected, found)
    return None


def _tries(dummy_input: Any) -> list[Any]:
    """The inputs to train on: the example, and a random batch of at least two, as batch norm needs several values."""
    first = next(t for t in tree_leaves(dummy_input) if isinstance(t, Tensor))
    return [dummy_input, *([random_like(dummy_input, 0, max(2, first.shape[0]))] if first.ndim else [])]


def _compared(dtype: torch.dtype, pruned: PrunedShapes, full: Trained, slim: Trained) -> Check:
    leaves = {name: leaf for leaf in pruned.found.graph.leaves for name in leaf.names}
    held = full[1].keys() & slim[1].keys() & leaves.keys()  # a forward may register further buffers
    both = {name: (pruned.prune(leaves[name], full[1][name]), slim[1][name]) for name in sorted(held)}
    given = [*full[0], *_by_module(both, 0)], [*slim[0], *_by_module(both, 1)]
    return checked("slim in train mode", dtype, *given)


def _by_module(buffers: Mapping[str, tuple[Tensor, Tensor]], which: int) -> list[Tensor]:
    """The buffers of each module and dtype as one tensor, so that errors are relative to the largest of them.

    A running mean of values that average to zero holds only rounding errors; beside the variance these do not count.
    """
    found: dict[tuple[str, torch.dtype], list[Tensor]] = {}
    for name, pair in buffers.items():
        found.setdefault((name.rpartition(".")[0], pair[0].dtype), []).append(pair[which].flatten())
    return [torch.cat(own) for own in found.values()]


def heads_in_training(
    full: nn.Module, slim: nn.Module, dummy_input: Any, partition: Partition, kept: Kept, overridden: bool = False
) -> tuple[list[Check], str]:
    """For a model with training-only parts, the proof that the slim model trains, or the reason why it must not.

    Args:
        overridden: Whether calls of the slim model are overridden; in training it may take a path that was not seen.
    """
    graph = partition.found.graph
    if graph.untrained is not None:
        return [], f"parts that only training may use could not be followed ({graph.untrained})"
    if graph.trained is None and not overridden:
        return [], ""
    try:
        made = check_training(full, slim, dummy_input, partition, kept)
    except ShrinkError as failure:
        return [], str(failure).splitlines()[0]
    if made is not None and not made.passed:
        return [], f"there it differs from the full one by {made.error:.1e}"
    return [] if made is None else [made], ""


def differs_in_training(full: nn.Module, slim: nn.Module, dummy_input: Any, partition: Partition, kept: Kept) -> str:
    """A note that a slim model differs from the full one in train mode.

    Empty if it does not differ, or if the full model does not run in train mode or is not reproducible there.
    """
    try:
        made = check_training(full, slim, dummy_input, partition, kept)
        if made is None or made.passed or not _repeats(full, dummy_input):
            return ""
        said = f"by {made.error:.1e}"
    except ShrinkError as failure:
        said = first_line(failure)
    except Exception as failure:  # tensors that cannot be compared, such as sparse buffers
        reraise_out_of_memory(failure)
        log.info("not compared in train mode: %s", first_line(failure))
        return ""
    return (
        f"in train mode it differs from the full one: {said}. What a forward does only while it trains was not"
        " analyzed; keep whole what that reads (skip_patterns=), if the slim model is to be trained"
    )


def _repeats(full: nn.Module, dummy_input: Any) -> bool:
    """Whether two runs in train mode give the same outputs; random numbers may come from outside of torch."""
    for given in _tries(dummy_input):
        try:
            one, other = trained(full, given), trained(full, given)
        except Exception as failure:  # as in the comparison, the first input that the model trains on counts
            reraise_out_of_memory(failure)
            continue
        return checked("", dtype_of(full), one[0], other[0]).passed
    return False


Trained = tuple[list[Tensor], dict[str, Tensor]]
"""Outputs, and buffers after the forward."""


def trained(module: nn.Module, given: Any) -> Trained:
    """The outputs of a module in train mode, and its buffers afterwards."""
    args, kwargs = tree_map_only(Tensor, lambda t: t.detach().clone(), arguments(given))
    modes = [(m, m.training) for m in module.modules()]
    all_eval = not any(training for _, training in modes)
    with preserved(module, given), without_tf32(), torch.inference_mode(), _Still(), throughout(module):  # type: ignore[no-untyped-call]
        torch.manual_seed(0)
        for m, training in modes:
            m.training = training or all_eval
        outputs = [t.clone() for t in tensors_in(module(*args, **kwargs))]
        buffers = {name: t.detach().clone() for name, t in module.named_buffers()}
    return outputs, buffers


class _Still(TorchDispatchMode):
    """Turns dropout off and replaces every random float by one: tensors of other sizes would draw other numbers."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        schema = getattr(op, "_schema", None)
        if schema is None or torch.Tag.nondeterministic_seeded not in getattr(op, "tags", ()):
            return op(*args, **kwargs)
        names = [argument.name for argument in schema.arguments]
        if "train" in names and names[1:2] == ["p"]:  # dropout, feature dropout, alpha dropout
            return args[0] if schema.is_mutable else args[0].clone()
        for name in ("dropout_p", "dropout"):  # of attention and of recurrent layers
            if name in names:
                place = names.index(name)
                if place < len(args):
                    args = (*args[:place], 0.0, *args[place + 1 :])
                return op(*args, **kwargs | ({name: 0.0} if name in kwargs else {}))
        result = op(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaf.fill_(1)
        return result
