"""Read samples for calibration from a file named on a command line: tensors, or a text.

| a file            | is                                                                                       |
|-------------------|------------------------------------------------------------------------------------------|
| ``.npz``          | arrays by name, as ``numpy.savez`` writes them                                           |
| ``.safetensors``  | tensors by name                                                                          |
| ``.pt``, ``.pth`` | tensors by name, as ``torch.save`` writes a dict of them                                 |
| ``.txt``          | a text, which the tokenizer in the model's folder reads; cut into pieces of equal length |

The first dimension of each tensor counts samples. Tensors named like arguments of ``forward`` are passed by name; if
there is only one and its name is no argument, it is the first argument. A tensor called ``labels``, ``label``, ``y``,
``target`` or ``targets`` holds the expected output, and decides the loss: the model's own, if ``forward`` takes an
argument of that name; cross entropy if it holds integers; mean squared error if it holds real numbers. For any other
loss the user passes a function.

Files are read without unpickling objects that could run code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oto.errors import GivenError, first_line, reraise_out_of_memory, some
from oto.given import imported, state_dict_of

LABELS = ("labels", "label", "y", "target", "targets")
"""Names of the tensor that holds the expected output."""

SUFFIXES = (".npz", ".safetensors", ".pt", ".pth", ".txt")

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Samples:
    """Tensors whose first dimension counts samples, by name.

    Attributes:
        file: The file from which they were read.
        model: The model to calibrate.
        tensors: The tensors by name.
    """

    file: Path
    model: nn.Module
    tensors: Batch

    @classmethod
    def read(cls, file: Path, model: nn.Module, folder: str | None, length: int, most: int) -> Samples:
        """Read a file.

        Args:
            file: The file; its suffix determines the format.
            model: The model to calibrate.
            folder: The folder of the tokenizer for a text; ``None`` if there is none.
            length: Number of tokens in each piece of a text.
            most: Maximum number of pieces of a text, which are spread evenly over it.

        Raises:
            GivenError: The file cannot be read, or holds no samples for the model.
        """
        if not file.is_file():
            raise GivenError(f"there is no file {file}\n  to fix  one of {', '.join(SUFFIXES)}")
        if file.suffix == ".txt":
            _require_next_token(file, model, folder)
            tensors = _pieces(file, str(folder), length, most)
        elif file.suffix == ".npz":
            tensors = _arrays(file)
        elif file.suffix in SUFFIXES:
            tensors = state_dict_of(file)
        else:
            raise GivenError(f"{file} is of no format that is read\n  to fix  one of {', '.join(SUFFIXES)}")
        return cls(file, model, _checked(file, tensors))

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def batches(self, size: int) -> list[Batch]:
        """All samples in order, in batches of at most ``size``."""
        parts = {name: tensor.split(size) for name, tensor in self.tensors.items()}
        return [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]

    @property
    def example(self) -> Any:
        """The first sample, as an example input."""
        first = {name: self.tensors[name][:1] for name in self.inputs}
        return first if self.by_name else first[self.inputs[0]]

    @cached_property
    def labels(self) -> str | None:
        """The name of the tensor that holds the expected output; ``None`` if there is none.

        Raises:
            GivenError: There are several candidates.
        """
        found = [name for name in LABELS if name in self.tensors]
        if len(found) > 1:
            raise GivenError(f"{self.file}: {some(found)} could all be labels\n  to fix  --loss module:function")
        return found[0] if found else None

    @cached_property
    def inputs(self) -> list[str]:
        """The names of the tensors that are passed to ``forward``, without labels."""
        return [name for name in self.tensors if name != self.labels]

    @cached_property
    def by_name(self) -> bool:
        """Whether tensors are passed to ``forward`` by name.

        Raises:
            GivenError: There are several, and ``forward`` has no arguments of these names; or there are none.
        """
        unknown = [name for name in self.inputs if name not in self._arguments]
        if unknown and len(self.inputs) > 1:
            raise GivenError(
                f"{type(self.model).__name__}.forward has no argument {some(unknown)}, which {self.file} holds\n"
                f"  effect  nothing was changed\n  to fix  it has {some(self._arguments)}; or --loss module:function"
            )
        if not self.inputs:
            raise GivenError(f"{self.file} holds labels and nothing else\n  to fix  add what the model takes")
        return not unknown

    @property
    def _arguments(self) -> list[str]:
        return list(inspect.signature(self.model.forward).parameters)

    # --- the loss -----------------------------------------------------------------------------------------------------

    def loss(self, named: str | None) -> Loss:
        """The loss, a function of a model and a batch.

        Args:
            named: ``module:function``, if the user names one; otherwise the labels determine the loss.

        Raises:
            GivenError: There is no such function, or no labels.
        """
        if named is not None:
            module, _, name = named.partition(":")
            found = imported(module, name) if name else None
            if not callable(found):
                raise GivenError(
                    f"--loss {named} is no function\n  to fix  module:function, called with model and batch"
                )
            return found  # type: ignore[no-any-return]
        if self.labels is None:
            raise GivenError(
                f"{self.file} says nothing of what should come out\n  effect  there is no loss, and nothing was changed"
                f"\n  to fix  add labels ({', '.join(LABELS)}); or --loss module:function, of the model and a batch"
            )
        return self._own if self.labels in self._arguments else self._by_labels

    def _output(self, model: nn.Module, batch: Batch, *labels: str) -> Any:
        if self.by_name or labels:
            return model(**{name: batch[name] for name in (*self.inputs, *labels)})
        return model(batch[self.inputs[0]])

    def _own(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss that the model computes from its labels."""
        output = self._output(model, batch, str(self.labels))
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise GivenError(
                f"{type(model).__name__} takes {self.labels}, and gives no loss\n  to fix  --loss module:function"
            )
        return loss

    def _by_labels(self, model: nn.Module, batch: Batch) -> Tensor:
        output, labels = self._output(model, batch), batch[str(self.labels)]
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
        if isinstance(found, Tensor) and found.ndim > 1:
            if not labels.is_floating_point() and labels.shape == (len(found), *found.shape[2:]):
                return F.cross_entropy(found, labels.long())
            if labels.is_floating_point() and labels.shape == found.shape:
                return F.mse_loss(found, labels.to(found.dtype))
        what = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(output).__name__}"
        raise GivenError(
            f"the output is {what}, and {self.labels} of {self.file} {tuple(labels.shape)}, {labels.dtype}\n"
            "  effect  no loss follows, and nothing was changed\n"
            "  to fix  classes: scores (N, classes, *) and whole numbers (N, *); values: both alike, of real numbers;"
            " else --loss module:function, of the model and a batch"
        )


def _arrays(file: Path) -> Batch:
    try:
        with np.load(file, allow_pickle=False) as held:
            return {name: torch.from_numpy(np.ascontiguousarray(held[name])) for name in held.files}
    except Exception as failure:  # there are many: of zip files, of pickles, of types that torch does not have
        reraise_out_of_memory(failure)
        raise GivenError(f"{file} cannot be read as plain arrays: {first_line(failure)}") from failure


def _checked(file: Path, tensors: Batch) -> Batch:
    """Return the tensors, after a check.

    Raises:
        GivenError: They have different numbers of samples, or fewer than two.
    """
    counts = {name: tensor.shape[0] if tensor.ndim else 0 for name, tensor in tensors.items()}
    if len({*counts.values()}) != 1 or min(counts.values()) < 2:
        held = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise GivenError(
            f"{file} holds {held or 'nothing'}\n  to fix  tensors whose first dimension counts samples, two or more,"
            " and equally many in each"
        )
    return tensors


def _require_next_token(file: Path, model: nn.Module, folder: str | None) -> None:
    """Raise ``GivenError`` if a text is given without a tokenizer, or for a model that does not predict next tokens."""
    if folder is None:
        raise GivenError(
            f"{file} is a text, and the model names no tokenizer\n"
            "  to fix  name the model as hf:FOLDER, whose tokenizer reads it; or pass a file of token ids, labels too"
        )
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    by_config: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    if not isinstance(model, by_config.get(type(getattr(model, "config", None)), ())):
        raise GivenError(
            f"{file} is a text, and {type(model).__name__} is no model of the next token\n"
            "  effect  what should come out is not known, and nothing was changed\n"
            "  to fix  a file of tensors with labels; or name a model for causal language modeling"
        )


def _pieces(file: Path, folder: str, length: int, most: int) -> Batch:
    """Pieces of a text, shape ``(pieces, length)``, as inputs and as labels."""
    from transformers import AutoTokenizer

    try:
        text = file.read_text(encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"][0]
    except Exception as failure:  # there are many: no tokenizer, no UTF-8
        reraise_out_of_memory(failure)
        raise GivenError(f"{file} cannot be read by the tokenizer of {folder}: {first_line(failure)}") from failure
    whole = ids[: len(ids) // length * length].view(-1, length)
    if len(whole) < 2:
        raise GivenError(
            f"{file} has {len(ids)} tokens, which is not two pieces of {length}\n  to fix  a longer text, or --context"
        )
    taken = torch.from_numpy(np.linspace(0, len(whole) - 1, min(most, len(whole))).round().astype(np.int64))
    return {"input_ids": whole[taken], "labels": whole[taken].clone()}
