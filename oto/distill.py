"""Distillation: a loss with which a student learns the outputs of a teacher. It needs nothing else of ``oto``.

    distill = Distillation.of(model)                                    # the full model as it is now
    loss = distill(model, x, lambda output: cross_entropy(output, y))   # any loop, lightning's training_step
    oto.integrations.distill(trainer, distill)                          # Hugging Face, before trainer.train()

Three things can be compared, each at every position and averaged over positions:

* **logits** (Hinton et al., arXiv 1503.02531): ``T² KL(teacher || student)`` of the softmax of both at a temperature
  ``T``; the factor ``T²`` keeps gradients at one scale for every ``T``. By default ``T = 1``, as in Minitron (arXiv
  2408.11796).
* **hidden states**: ``1 - cos(student, teacher)`` of the outputs of modules, after a projection if widths differ.
* **attention**: ``KL(teacher || student)`` of the distributions over keys, head by head, or averaged over heads if the
  student has fewer.

Where we differ from the papers: Minitron scales the hidden-state part to the size of the logits part, and leaves out
the task loss. Here each part has a fixed weight, and by default the task loss is half of the total: before anything is
pruned the model equals its teacher, so without the task there would be no gradient to choose atoms by.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from oto.errors import OptionError, some

Captured = dict[str, list[Tensor]]
"""The outputs of modules in a forward, by name: one tensor for each call."""


# --- what is compared -------------------------------------------------------------------------------------------------


class SoftTargets(NamedTuple):
    """The ``k`` most likely classes of a teacher at each position. A ``DataLoader`` can batch it.

    Attributes:
        log_probs: Log probabilities at the temperature, shape ``(..., k)``.
        indices: Their classes, int32, shape ``(..., k)``.
        temperature: The temperature, shape ``()``, or one for each sample of a batch.
    """

    log_probs: Tensor
    indices: Tensor
    temperature: Tensor


def soft_targets(logits: Tensor, k: int, temperature: float = 1.0) -> SoftTargets:
    """The ``k`` most likely classes, to be stored if the teacher is too large to run beside the student.

    Probabilities are relative to all classes; the loss treats the remainder to 1 as one more class. To store them in
    half precision: ``targets._replace(log_probs=targets.log_probs.half())``.

    Args:
        logits: The teacher's logits, shape ``(..., classes)``.
        k: Number of classes; with all of them the loss is the same as with the teacher itself.
        temperature: The temperature of the :class:`Distillation` that uses them.

    Raises:
        OptionError: ``k`` is no number of classes.
    """
    if not isinstance(k, Integral) or k < 1:
        raise OptionError(f"k is {k!r}; it is the number of classes that are kept, at least 1")
    top = (_wide(logits.detach()) / temperature).log_softmax(-1).topk(min(int(k), logits.shape[-1]))
    return SoftTargets(top.values, top.indices.int(), torch.tensor(float(temperature)))


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``T² KL(softmax(teacher / T) || softmax(student / T))``, in at least float32.

    Args:
        student, teacher: Logits, shape ``(..., classes)``. A class at ``-inf`` in both adds nothing.

    Returns:
        Shape ``(...,)``.
    """
    log_q, log_p = ((_wide(x) / temperature).log_softmax(-1) for x in (student, teacher))
    p = log_p.exp()
    divergence: Tensor = (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1)
    return divergence * temperature**2


def divergence_from_top(student: Tensor, targets: SoftTargets, temperature: float = 1.0) -> Tensor:
    """:func:`divergence` from the most likely classes alone: all others count as one class.

    It is at most the full divergence, and equal to it if all classes are known.

    Args:
        student: Logits, shape ``(..., classes)``.

    Returns:
        Shape ``(...,)``.
    """
    log_p, indices = _wide(targets.log_probs), targets.indices.long()
    log_q = (_wide(student) / temperature).log_softmax(-1)
    known = log_q.gather(-1, indices)
    p = log_p.exp()
    divergence: Tensor = (p * (log_p - known).masked_fill(p == 0, 0)).sum(-1)
    if indices.shape[-1] < student.shape[-1]:
        rest_p = (1 - p.sum(-1)).clamp_min(0)  # probabilities stored in half precision may sum to more than 1
        rest_q = log_q.scatter(-1, indices, -torch.inf).logsumexp(-1)  # 1 - sum would cancel if little is left
        divergence += torch.special.xlogy(rest_p, rest_p) - rest_p * rest_q
    return divergence * temperature**2


def cosine_distance(student: Tensor, teacher: Tensor, dim: int = -1) -> Tensor:
    """``1 - cos`` along a dimension, which is removed from the result; in at least float32."""
    similarity: Tensor = nn.functional.cosine_similarity(_wide(student), _wide(teacher), dim=dim)
    return 1 - similarity


def attention_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(teacher || student)`` over keys.

    Args:
        student, teacher: Probabilities, shape ``(N, heads, queries, keys)``. If the numbers of heads differ, the
            averages over heads are compared.

    Returns:
        Shape ``(N, queries)``, averaged over heads.
    """
    q, p = _wide(student), _wide(teacher)
    if q.shape[1] != p.shape[1]:
        q, p = q.mean(1, keepdim=True), p.mean(1, keepdim=True)
    tiny = torch.finfo(q.dtype).tiny  # a masked key has probability 0 in both
    divergence: Tensor = (torch.special.xlogy(p, p) - p * q.clamp_min(tiny).log()).sum(-1)
    return divergence.mean(1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# --- the loss ---------------------------------------------------------------------------------------------------------


class Distillation(nn.Module):
    """``(1 - weight) · task + weight · (logits · KL + hidden_weight · cosine + attention · KL)``.

    The teacher is in eval mode and gets no gradients. It is not a submodule, so it is neither in checkpoints nor among
    ``parameters()``, and does not move with this module. It runs before the student, so that its activations are freed
    by then.

    Args:
        teacher: Any module with the student's inputs, or ``None`` if targets are given with each batch. :meth:`of`
            makes it from the model itself.
        weight: The share of distillation in the loss, in [0, 1]. With 1 no task loss is needed, which suits a model
            that has been pruned. While a model is being pruned keep it below 1: at first the teacher has nothing to
            teach.
        temperature: The number by which logits are divided before the softmax.
        logits, hidden_weight, attention: Weights of the three parts; 0 leaves a part out. Attention is read from
            ``output.attentions``, where models of transformers have it (``output_attentions=True``).
        hidden: Names of modules whose outputs are compared, or a mapping from the student's names to the teacher's.
            A wrapper around the student, such as ``DistributedDataParallel``, may stay. Modules of a compiled model
            cannot be observed, so pass the uncompiled model if hidden states are compared.
        projections: For names of the student's modules, a module that maps the output to the teacher's width. Their
            parameters are those of this module, ``distill.parameters()``, and need an optimizer; with several processes
            their gradients are averaged. Without a projection, different shapes are an error.
        dim, hidden_dim: The class dimension and the feature dimension; 1 for images of class scores.
        read: A function from an output to its logits, if the output is neither a tensor, nor a tuple that begins with
            them, nor has them as ``logits``.
        offload: Keep the teacher's parameters where they are, for example in CPU memory, and copy them to the inputs'
            device only for its forward. Otherwise the teacher moves to the device of the first inputs and stays there.

    Raises:
        OptionError: A value is out of range, or nothing would be compared.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> distill = Distillation.of(model, temperature=4.0)
        >>> x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
        >>> loss = distill(model, x, lambda output: nn.functional.cross_entropy(output, y))
        >>> loss.backward()
        >>> sorted(distill.parts)
        ['logits', 'task']
    """

    teacher: nn.Module | None
    _looked_at_temperature = False

    def __init__(
        self,
        teacher: nn.Module | None,
        *,
        weight: float = 0.5,
        temperature: float = 1.0,
        logits: float = 1.0,
        hidden: Sequence[str] | Mapping[str, str] = (),
        hidden_weight: float = 1.0,
        projections: Mapping[str, nn.Module] | None = None,
        attention: float = 0.0,
        dim: int = -1,
        hidden_dim: int = -1,
        read: Callable[[Any], Tensor] | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(hidden, str):
            hidden = [hidden]
        self.hidden = dict(hidden) if isinstance(hidden, Mapping) else {name: name for name in hidden}
        self.weight, self.temperature, self.offload = weight, temperature, offload
        self.weights = {"logits": logits, "hidden": hidden_weight if self.hidden else 0.0, "attention": attention}
        self._refuse(teacher, projections or {})
        self.dim, self.hidden_dim, self.read = dim, hidden_dim, read or logits_of
        self.projected = list(projections or {})
        self.projections = nn.ModuleList((projections or {}).values())
        for parameter in self.projections.parameters():
            parameter.register_post_accumulate_grad_hook(_averaged)
        object.__setattr__(self, "teacher", None if teacher is None else teacher.eval())  # not a submodule, see above
        self.parts: dict[str, Tensor] = {}
        """The parts of the last loss, detached and without their weights; for logging."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Distillation:
        """Distillation from a copy of the model as it is now.

        Args:
            model: The full model, before anything is pruned; it may be wrapped for several processes.
            dtype: Dtype of the copy's floating-point tensors, such as ``torch.bfloat16``. Inputs are cast to it.
            device: Device of the copy, such as ``"cpu"`` with ``offload=True``.
            **options: Options of :class:`Distillation`.

        Raises:
            OptionError: ``model`` is no module, or an option is invalid.
        """
        if not isinstance(model, nn.Module):
            raise OptionError(
                f"the teacher is a {'class' if isinstance(model, type) else type(model).__name__}, no torch.nn.Module\n"
                "  effect  there is nothing to copy\n  to fix  pass the module itself"
            )
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        copied: dict[int, Any] = {}
        for tensor in [*model.parameters(), *model.buffers()]:  # one by one, to make no full copy in the old dtype
            if type(tensor) in (nn.Parameter, Tensor):
                to = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                new = tensor.detach().to(device or tensor.device, to, copy=True)
                copied[id(tensor)] = nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new
        return cls(copy.deepcopy(model, copied).to(device=device, dtype=dtype).requires_grad_(False), **options)

    def forward(
        self,
        student: nn.Module,
        inputs: Any,
        loss: Callable[[Any], Tensor] | None = None,
        *,
        targets: SoftTargets | None = None,
        mask: Tensor | None = None,
        count: Tensor | float | None = None,
    ) -> Tensor:
        """Run teacher and student, and compare them.

        Args:
            student: The model that is trained, including its wrappers.
            inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments, as for ``OTO``.
            loss: The task loss, a function of the student's output; by default the output's own ``loss``.
            targets: The teacher's stored outputs, instead of running it; only for logits.
            mask: Which positions count, with the shape of the logits without the class dimension. By default
                ``inputs["attention_mask"]``, if it has that shape; otherwise all count.
            count: Number of positions in the whole step, if batches of different lengths are accumulated: the sum over
                positions is divided by it. By default each batch contributes its mean. With several processes it is the
                number of positions of all of them, divided by the number of processes. ``loss`` is not divided by it;
                that is up to you.

        Returns:
            The loss, a scalar. Each process has its own; average the gradients, as ``DistributedDataParallel`` does.

        Raises:
            OptionError: Something to be compared is missing or has a different shape, or there is no task loss.
        """
        args, kwargs = _arguments(inputs)
        ours, output = self.compare(
            student, inputs, lambda: student(*args, **kwargs), targets=targets, mask=mask, count=count
        )
        if self.weight == 1:
            return ours
        task = loss(output) if loss is not None else _entry(output, "loss")
        if not isinstance(task, Tensor):
            raise OptionError(
                f"the {type(output).__name__} of the student has no loss, and distillation has weight {self.weight}\n"
                "  effect  there is nothing to train the task by\n"
                "  to fix  pass the task's loss, such as lambda output: cross_entropy(output, y); or weight=1.0"
            )
        return self.combined(task, ours)

    def combined(self, task: Tensor, ours: Tensor) -> Tensor:
        """The weighted total of the task loss and of the loss that :meth:`compare` returns."""
        self.parts["task"] = task.detach()
        return (1 - self.weight) * task + self.weight * ours

    def compare(
        self,
        student: nn.Module,
        inputs: Any,
        run: Callable[[], Any],
        *,
        targets: SoftTargets | None = None,
        mask: Tensor | None = None,
        count: Tensor | float | None = None,
    ) -> tuple[Tensor, Any]:
        """The distillation loss alone, for a loop that runs the student itself.

        Args:
            student, inputs, targets, mask, count: As in :meth:`forward`.
            run: Runs the student on the inputs and returns its output.

        Returns:
            The loss, and what ``run`` returned.
        """
        if targets is not None:
            self._refuse_more_than_logits()
        taught, of_teacher = (targets, {}) if targets is not None else self._taught(student, inputs)
        with _capturing(student, self.hidden) as of_student:
            output = run()
        if mask is None and isinstance(inputs, Mapping):
            mask = inputs.get("attention_mask")
        return self._compared(output, taught, of_student, of_teacher, mask, count), output

    # --- inside -------------------------------------------------------------------------------------------------------

    def _refuse(self, teacher: nn.Module | None, projections: Mapping[str, nn.Module]) -> None:
        if not 0 <= self.weight <= 1:
            raise OptionError(f"weight is {self.weight!r}; it is the share of distillation in the loss, in [0, 1]")
        if not self.temperature > 0:
            raise OptionError(f"temperature is {self.temperature!r}; logits are divided by it, so it is above 0")
        if min(self.weights.values()) < 0 or not any(self.weights.values()):
            raise OptionError(
                f"the parts have the weights {self.weights}\n"
                "  effect  nothing is compared, or what differs is rewarded\n"
                "  to fix  logits=, hidden_weight= and attention= are at least 0, and one of them is above"
            )
        if teacher is None:
            self._refuse_more_than_logits()
        if unknown := [name for name in projections if name not in self.hidden]:
            raise OptionError(
                f"projections= has {some(unknown)}, which hidden= does not name\n  to fix  name it there, too"
            )

    def _refuse_more_than_logits(self) -> None:
        if self.hidden or self.weights["attention"]:
            raise OptionError(
                "without a teacher's forward there are no hidden states and no attention to compare with\n"
                "  effect  nothing was computed\n"
                "  to fix  targets= are for logits alone: leave hidden= and attention= out, or let a teacher run"
            )

    @torch.no_grad()
    def _taught(self, student: nn.Module, inputs: Any) -> tuple[Any, Captured]:
        teacher = self.teacher
        if teacher is None or any(inner is teacher for inner in _layers_of_wrapping(student)):
            raise OptionError(
                f"{'there is no teacher' if teacher is None else 'the student is its own teacher'}\n"
                "  effect  there is nothing to learn\n"
                "  to fix  Distillation.of(model) before pruning copies it; or pass targets= with each batch"
            )
        tensors = [*teacher.parameters(), *teacher.buffers()]
        device = next((x.device for x in _tensors(inputs)), None)
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), None)
        if device is not None and not self.offload and any(t.device != device for t in tensors):
            teacher.to(device)
        args, kwargs = _arguments(_cast(inputs, dtype))
        with _capturing(teacher, self.hidden.values()) as captured:
            if not self.offload or device is None:
                return teacher(*args, **kwargs), captured
            state = [*teacher.named_parameters(), *teacher.named_buffers()]
            return functional_call(teacher, {name: t.to(device) for name, t in state}, args, kwargs), captured

    def _compared(
        self,
        output: Any,
        taught: Any,
        of_student: Captured,
        of_teacher: Captured,
        mask: Tensor | None,
        count: Tensor | float | None,
    ) -> Tensor:
        values, positions = dict[str, list[Tensor]](), None
        if self.weights["logits"]:
            values["logits"] = [self._logits(output, taught)]
            positions = values["logits"][0].shape
        if self.hidden:
            values["hidden"] = [d for name in self.hidden for d in self._hidden(name, of_student, of_teacher)]
        if self.weights["attention"]:
            values["attention"] = _attention(output, taught)
        parts = {
            name: torch.stack([_mean(_at(one, positions, mask), mask, count) for one in each]).mean()
            for name, each in values.items()
        }
        self.parts = {name: part.detach() for name, part in parts.items()}
        return torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()

    def _logits(self, output: Any, taught: Any) -> Tensor:
        student = self.read(output).movedim(self.dim, -1)
        if isinstance(taught, SoftTargets):
            if self._is_of_another_temperature(taught):
                raise OptionError(
                    f"targets= were made at another temperature than {self.temperature}\n"
                    "  effect  probabilities of two temperatures cannot be compared\n"
                    "  to fix  soft_targets(logits, k, temperature) once more, or that temperature here"
                )
            taught = SoftTargets(*(x.to(student.device) for x in taught))
            _refuse_shapes("the logits", student.shape[:-1], taught.indices.shape[:-1])
            return divergence_from_top(student, taught, self.temperature)
        teacher = self.read(taught).movedim(self.dim, -1).to(student.device)
        _refuse_shapes("the logits", student.shape, teacher.shape)
        return divergence(student, teacher, self.temperature)

    def _is_of_another_temperature(self, targets: SoftTargets) -> bool:
        """Whether targets were made at another temperature; only the first check synchronizes with the device."""
        if self._looked_at_temperature and not targets.temperature.is_cpu:
            return False
        self._looked_at_temperature = True
        return bool((targets.temperature != self.temperature).any())

    def _hidden(self, name: str, of_student: Captured, of_teacher: Captured) -> Iterator[Tensor]:
        other = self.hidden[name]
        runs, teachers = len(of_student[name]), len(of_teacher[other])
        if not runs or runs != teachers:
            raise OptionError(
                f"{name!r} ran {runs} times in the student, {other!r} {teachers} in the teacher\n"
                "  effect  it is not known which outputs belong together\n"
                "  to fix  hidden= names modules that run, and equally often; in a compiled model none is seen to run:"
                " give the model itself"
            )
        project = self.projections[self.projected.index(name)] if name in self.projected else None
        for student, teacher in zip(of_student[name], of_teacher[other], strict=True):
            student = student if project is None else project(student)
            _refuse_shapes(f"the outputs of {name!r}", student.shape, teacher.shape)
            yield cosine_distance(student, teacher.to(student.device), self.hidden_dim)


def logits_of(output: Any) -> Tensor:
    """The logits of an output: the output itself, its ``logits``, or in a tuple the first tensor that is not a scalar.

    Raises:
        OptionError: The output has no logits.
    """
    if isinstance(output, Tensor):
        return output
    logits = _entry(output, "logits")
    if logits is None and isinstance(output, tuple | list):
        logits = next((x for x in output if isinstance(x, Tensor) and x.ndim), None)  # a loss may come first
    if not isinstance(logits, Tensor):
        raise OptionError(
            f"in a {type(output).__name__} it is not known what the logits are\n  effect  they cannot be compared\n"
            "  to fix  Distillation(read=lambda output: ...) says where they are"
        )
    return logits


def _attention(output: Any, taught: Any) -> list[Tensor]:
    student, teacher = ([*(_entry(x, "attentions") or ())] for x in (output, taught))
    if not student or len(student) != len(teacher) or any(x is None for x in (*student, *teacher)):
        raise OptionError(
            f"the student gives {len(student)} layers of attention, and the teacher {len(teacher)}\n"
            "  effect  they cannot be compared\n  to fix  both as deep, and models of transformers with"
            " output_attentions=True and attn_implementation='eager'"
        )
    return [attention_divergence(a, b.to(a.device)) for a, b in zip(student, teacher, strict=True)]


def _refuse_shapes(what: str, student: Sequence[int], teacher: Sequence[int]) -> None:
    if tuple(student) != tuple(teacher):
        raise OptionError(
            f"{what} have shape {tuple(student)} in the student, and {tuple(teacher)} in the teacher\n"
            "  effect  they cannot be compared\n  to fix  compare what is as wide in both; for hidden states,"
            " projections={name: nn.Linear(width of the student, width of the teacher)}"
        )


def _at(values: Tensor, positions: Sequence[int] | None, mask: Tensor | None) -> Tensor:
    """One value for each position of the logits: the average over further dimensions, or one overall average."""
    if positions is None or values.shape == positions:
        return values
    if values.shape[: len(positions)] != positions:
        return values.mean().expand(positions)
    rest = values.flatten(len(positions))
    if mask is None or mask.shape != values.shape:
        return rest.mean(-1)
    counted = mask.to(values.device).bool().flatten(len(positions))  # such as the tokens of a sentence with one class
    return rest.masked_fill(~counted, 0).sum(-1) / counted.sum(-1).clamp_min(1)


def _mean(values: Tensor, mask: Tensor | None, count: Tensor | float | None) -> Tensor:
    many: Tensor | float = values.numel()
    if mask is not None and mask.shape == values.shape:
        counted = mask.to(values.device).bool()
        values, many = values.masked_fill(~counted, 0), counted.sum().clamp_min(1)
    return values.sum() / (many if count is None else count)


def _averaged(parameter: Tensor) -> None:
    """Average a gradient over all processes; earlier accumulated gradients are equal in all of them, so they stay."""
    if dist.is_available() and dist.is_initialized() and parameter.grad is not None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


# --- runs of a model --------------------------------------------------------------------------------------------------


@contextmanager
def _capturing(model: nn.Module, names: Iterable[str]) -> Iterator[Captured]:
    """Context manager that captures the outputs of modules, except in forwards that checkpointing repeats later."""
    captured: Captured = {name: [] for name in names}
    hooks = [_named(model, name).register_forward_hook(_into(captured[name])) for name in captured]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


def _into(captured: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        captured.extend([*_tensors(output)][:1])

    return hook


def _named(model: nn.Module, name: str) -> nn.Module:
    known = dict[str, nn.Module]()
    for inner in _layers_of_wrapping(model):
        known = dict(inner.named_modules())
        if name in known:
            return known[name]
    raise OptionError(
        f"no module is called {name!r}\n  effect  its outputs cannot be compared\n"
        f"  to fix  hidden= names modules of both models, such as {some(filter(None, known))}"
    )


def _layers_of_wrapping(model: nn.Module) -> Iterator[nn.Module]:
    """The model, its only child, the only child of that, and so on."""
    yield model
    while len(children := list(model.children())) == 1:
        (model,) = children
        yield model


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | tuple | list):
        for item in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _tensors(item)


def _cast(tree: Any, dtype: torch.dtype | None) -> Any:
    """Cast the floating-point tensors of a tree to a dtype."""
    if isinstance(tree, Tensor):
        return tree.to(dtype) if dtype is not None and tree.is_floating_point() else tree
    if isinstance(tree, Mapping):
        return {key: _cast(item, dtype) for key, item in tree.items()}
    if isinstance(tree, tuple | list):
        items = [_cast(item, dtype) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def _entry(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
