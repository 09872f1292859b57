"""The class ``OTO``: a docstring and a call for each method. All that is known about a model is an ``Analysis``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from oto.analysis import CompressMode, Layout, Options, analyze
from oto.groups import Costs, NodeGroup, Partition
from oto.groups.align import Align
from oto.groups.policy import MinKept, Pattern
from oto.groups.segments import MinDepth
from oto.io.subnet import FULL, WEIGHTS
from oto.knowledge import LEVELS, Knowledge, mark_by_knowledge
from oto.pruning import Pruning
from oto.renamed import former
from oto.report.erasable import Erasable
from oto.report.explain import Explanation
from oto.shrinking import shrink
from oto.subnet import Build, Emitter, Subnet, build_subnet
from oto.training import Training


class OTO(Pruning):
    """From a model and one example input to a slim model that computes the same function.

    It can be copied and pickled where the model can; a copy does not know the optimizers that the first one made.

    Args:
        model: Any module. It is not copied: the optimizer trains it, ``construct_subnet`` reads its zeros. A wrapper of
            ``torch.compile`` or ``(Distributed)DataParallel`` is removed here; train with it, as it shares the model.
        dummy_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments of ``model.forward``.
        skip_patterns: What must not be zeroed: names or globs of parameters or modules, classes of modules, modules.
        only: The reverse, in the same form: only these weights are zeroed, with the biases and norms beside them. A
            group that would zero others too stays whole, as a residual stream does if one kind of layer is named.
        strict_out_nodes: By default all outputs keep their size; with ``True`` only those that nothing else in the
            model reads, and a hidden state that is returned gets as thin as the network there. Or names or globs of
            outputs that may get thinner: keys, fields or indices in the result (``["state", "hidden.0"]``).
        min_kept: Atoms that every group keeps at least, an int; or the share of its atoms, a float; or a mapping from
            names or globs of parameters to either. Optimizers take it too, and keep the greater of both.
        allow_graph: Prune whatever can be removed exactly. The slim model is a ``torch.fx.GraphModule`` if the class
            cannot express that; by default what the class cannot express, not even with overrides, stays whole.
        prune_frozen: Zero frozen parameters like all others, as for adapters that are trained on a frozen model. By
            default a group that would zero a parameter with ``requires_grad=False`` stays whole. Freeze before ``OTO``.
        drop_unreached: Leave out of the slim model what its forward never uses in eval mode, such as auxiliary heads.
            By default these stay, with thinner inputs, and the slim model can be trained with them.
        layout: ``"uniform"``: repeated blocks keep the same number of everything, each its own best atoms, so that one
            number states it for all; and what ``model.config``, or the keywords of the function that
            ``model.pretrained_cfg`` names, cannot state stays whole (an ``UnstatedWarning``, if they state nothing). Of
            segments whole layers go, where the config states their number.
            The slim model is of the stock class, see :meth:`Subnet.save_pretrained`. ``"stock"``: also, a width that is
            heads times the head width stays so. By default (``None`` or ``"free"``) every block has its own counts.
        tensor_parallel: Number of devices that heads, key and value heads and FFNs stay divisible by.
        compress_mode: ``"prune"``: channels, heads and the like go. ``"erase"``: whole segments go, such as the branch
            of a residual block, the attention or the MLP of a layer: see :meth:`erasable`. ``"both"``: all of them, in
            one budget.
        min_depth: How many segments of a run of repeated blocks stay, an int; or the share of them, a float; or a
            mapping from globs of module paths to either.
        everything: The former name of ``allow_graph``.

    Raises:
        OptionError, DummyInputError: ``model`` is no module, ``dummy_input`` no input, or an option is invalid.
        TraceError: ``forward`` fails on it.
        NothingPrunableError: Nothing can be removed; it says why, and its ``explanation`` is that of :meth:`explain`.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> oto = OTO(model, torch.randn(1, 3))
        >>> oto.random_set_zero_groups(target_group_sparsity=0.5)
        >>> oto.compute_num_params(), oto.construct_subnet().cost_after.params
        (50, 26)
    """

    def __init__(
        self, model: nn.Module, dummy_input: Any, *, skip_patterns: Iterable[Pattern] = (),
        only: Iterable[Pattern] | None = None, strict_out_nodes: bool | Iterable[str] = False, min_kept: MinKept = 1,
        allow_graph: bool = False, prune_frozen: bool = False, drop_unreached: bool = False,
        layout: Layout | None = None, tensor_parallel: int = 1, everything: bool | None = None,
        compress_mode: CompressMode = "prune", min_depth: MinDepth = 1,
    ) -> None:  # fmt: skip
        graph = allow_graph or former("everything", everything, "allow_graph") or False
        policies = skip_patterns, only, strict_out_nodes, min_kept, graph, prune_frozen, drop_unreached
        self._analysis = analyze(
            model, dummy_input, Options(*policies, layout, tensor_parallel, compress_mode, min_depth)
        )
        self._training = Training()
        self._saved: Path | None = None  # the folder of the last artifact

    def __repr__(self) -> str:
        return f"OTO({type(self.model).__name__}): {self._analysis.summary}"

    def __getstate__(self) -> dict[str, Any]:  # of copies, too
        return {**vars(self), "_training": Training()}

    @property
    def model(self) -> nn.Module:
        """The full model."""
        return self._analysis.model

    @property
    def dummy_input(self) -> Any:
        """The example input."""
        return self._analysis.example.given

    @property
    def partition(self) -> Partition:
        """The terms that every dimension of the model is made of."""
        return self._analysis.partition

    @property
    def node_groups(self) -> tuple[NodeGroup, ...]:
        """Every node group, prunable or not."""
        return self._analysis.groups

    @property
    def costs(self) -> Costs:
        """Parameters, MACs and bytes as functions of what the prunable groups keep."""
        return self._analysis.costs

    def mark_unprunable_by_param_names(self, names: Iterable[str]) -> None:
        """Keep groups whole that would zero entries of some parameters: names, or globs such as ``"layer1.*.weight"``.

        The inputs of a marked layer still shrink with the layer before it. Nothing is marked if a name matches nothing
        (``UnknownParameterError``), or an optimizer was made already (``TooLateError``).
        """
        self._analysis = self._training.markable(self._analysis).without_parameters(names)

    def mark_unprunable_by_node_ids(self, node_ids: Iterable[str | int]) -> None:
        """Keep whole what runs through some nodes of the drawing of :meth:`visualize`: ``"node-12"``, or ``12``.

        Nothing is marked if there is no such node (``UnknownNodeError``), or an optimizer already (``TooLateError``).
        """
        self._analysis = self._training.markable(self._analysis).without_nodes(node_ids)

    def skip_operators(self, operators: Iterable[str]) -> None:
        """Keep whole what runs through the results of some operators, by names as in :meth:`coverage`, long or short
        (``"aten.conv2d.default"``, ``"conv2d"``), or globs.

        Nothing is marked if there is no such call (``UnknownNodeError``), or an optimizer already (``TooLateError``).
        """
        self._analysis = self._training.markable(self._analysis).without_operators(operators)

    def mark_unprunable_by_knowledge(
        self, *, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor], share: float = 0.1,
        levels: Sequence[float] = LEVELS,
    ) -> Knowledge:  # fmt: skip
        """Keep the groups whole without which the loss rises most, as LoRAShear does before it prunes.

        Each group is thinned alone, by its atoms of least norm, measured, and put back: two losses of all batches for
        each group, no gradient. Nothing is marked if an optimizer was made already (``TooLateError``).

        Args:
            batches, loss: Held-out batches. ``loss`` takes the model, in eval mode, and a batch.
            share: Share of the groups that stay whole, in [0, 1).
            levels: Shares of its atoms that a group loses, in (0, 1).

        Returns:
            By how much the loss rises without what: print it.
        """
        analysis = self._training.markable(self._analysis)
        self._analysis, found = mark_by_knowledge(analysis, batches, loss, share, levels)
        return found

    def explain(self, *, search: bool = False) -> Explanation:
        """What can be removed, and why the rest stays whole: print it, or take ``to_dict()``.

        With ``search=True`` it also shows how the needs of the model's class were found: for each decision the line of
        its code, what was seen there, what was tried, and what was settled on.
        """
        return self._analysis.explain(search=search)

    def erasable(self) -> Erasable:
        """The segments that may go as a whole, what each saves, and why other branches stay: print it."""
        return self._analysis.erasable()

    def coverage(self) -> dict[str, dict[str, int]]:
        """The operators of the model by the kind of rule that they have, with the number of calls."""
        return self._analysis.coverage()

    def visualize(
        self, out_dir: str | os.PathLike[str], view: bool = False, vertical: bool = True, by_node_groups: bool = True,
        display_params: bool = False, display_flops: bool = False,
    ) -> list[Path]:  # fmt: skip
        """Draw the graph: one color per prunable node group, gray for what stays whole, repeated blocks once.

        Args:
            out_dir: Folder for ``<class of the model>.dot``; with graphviz, ``.svg``, ``.pdf`` and ``.png`` too.
            view, vertical: Open the SVG; draw from top to bottom instead of from left to right.
            by_node_groups: Give each node group a color; otherwise prunable calls are white.
            display_params, display_flops: Show at each call the shapes of the parameters it reads; its FLOPs.

        Returns:
            The files. Without pydot (``pip install 'oto[viz]'``) there is a ``MissingExtraError``.
        """
        shown = {"display_params": display_params, "display_flops": display_flops, "by_node_groups": by_node_groups}
        return self._analysis.draw(out_dir, view=view, vertical=vertical, **shown)

    def shrink(
        self, optimizer: Any = None, *, like: Mapping[str, Any] | None = None, averages: Iterable[Any] = (),
        shard: Callable[[nn.Module], Any] | None = None,
    ) -> nn.Module:  # fmt: skip
        """Make the model slim in the middle of training: all pruned atoms are removed.

        Call it between two steps, as often as you like. Training continues as it would have, only cheaper, if the
        optimizer treats entries one by one and gradients are not clipped by a norm over all of them; dropout draws
        different numbers. Model and optimizer stay the same objects, so schedulers, a ``GradScaler``, accelerate and a
        trainer keep working. What holds single parameters does not: wrap in ``DistributedDataParallel`` again (or there
        is a ``StaleWrapperError``), list parameters again. ``docs/after_pruning.md`` has details, also on resuming.

        Args:
            optimizer: One that this ``OTO`` made, or a wrapper with it as ``.optimizer``; by default the last one made.
            like: The ``state_dict()`` of the optimizer of another run: what it lacks is set to zero and removed.
            averages: Moving averages of the weights, or what holds them as ``.module`` or ``.ema``; made slim in place.
            shard: Where parameters are spread over processes (FSDP2), what spreads those of a model, in place; then
                every process has to call this (``docs/distributed.md``). It is called with every average, too.

        Returns:
            The model; unchanged, with a ``NotPrunedWarning``, if there was never anything to remove.

        Raises:
            ShrinkError: The class, or its config (``layout="uniform"``), cannot express it; the optimizer has state
                that cannot be sliced, or it or an average belongs to a different model. Nothing is changed.
            VerificationError: The slim model computes something else, in eval or train mode. Nothing is changed.
        """
        self._analysis, self._training = shrink(self._analysis, self._training, optimizer, like, averages, shard)
        return self.model

    def random_set_zero_groups(self, target_group_sparsity: float = 0.5, seed: int = 0) -> None:
        """Zero a random choice of ZIGs in place, for checks; within the layout, as far as whole steps of it allow, or
        there is a ``TargetError``."""
        self._analysis.zero_random_(target_group_sparsity, seed)

    def compute_num_params(self) -> int:
        """Entries of all parameters of the full model; a tied one counts once."""
        return self._analysis.cost().params

    def compute_macs(self) -> int:
        """Multiply–adds of the full model on the example input."""
        return self._analysis.cost().macs

    def compute_flops(self) -> int:
        """Twice the MACs."""
        return self._analysis.cost().flops

    def construct_subnet(
        self, out_dir: str | os.PathLike[str] | None = None, *, model: Any = None, emitter: Emitter = "auto",
        program: bool | None = None, save_full: bool = False, float64: bool | Literal["auto"] = "auto",
        verify: bool = True, report: bool = False, align: Align = 1,
    ) -> Subnet:  # fmt: skip
        """Build the slim model from the zeros in the parameters, prove it equal, and save it.

        The original class is used if it can express the slim model; otherwise the graph from ``torch.export``; if that
        fails too, the calls recorded on the example, which are valid at its shapes and values only. The slim model is
        compared with the zeroed full model on the example and on a random input, with a different batch size if that is
        free, in the model's dtype and in float64; on the example in inference mode, with torch's fast paths. What was
        saved is read back and compared. ``print(subnet)`` shows the limits of the result; if pruning has not finished,
        or nothing is zero, there is also a warning. The model may have been cast or moved since ``OTO(...)``: the
        example follows it. Wrappers that trainers put around a ``forward``, such as autocast, are ignored. Where
        parameters are spread over processes (FSDP2), every process has to call it (``docs/distributed.md``).

        Args:
            out_dir: Folder for the artifact; nothing is saved if it is ``None``.
            model: A model to make slim instead: a copy with other weights, such as their moving average, or a wrapper
                of one (see :meth:`oto.optim.SparseOptimizer.zero_pruned_in`, to be called first).
            emitter: ``"auto"``, or a single one: ``"config"`` (the class, made from an edited ``model.config``; tried
                first with ``layout="uniform"``), ``"module"`` (the class), ``"graph"`` or ``"recording"``.
            program: Also save the slim model as an exported program (``model.pt2``), which loads without the class. By
                default only if nothing else could be loaded, because the slim model is a graph.
            save_full, report: Save the zeroed full weights beside it; a ``report.html``, see :meth:`Subnet.report`.
            float64: Also compare in float64, which shows whether the slim model is equal or only similar: ``"auto"``,
                if it fits in memory; ``True`` or ``False``.
            verify: Compare at all. Without it, only whether an emitter can express the model is checked.
            align: Keep enough zero atoms to make sizes multiples, as in :meth:`oto.optim.Choice.of`: for zeros of an
                optimizer without ``align``.

        Raises:
            VerificationError: The slim model differs, or the full one gives no finite number. Nothing is written.
            EmitterError: No emitter, or not the requested one, can express the model; or no program can be written.
            NonFiniteParameterError, UnknownParameterError: A parameter holds NaN or infinity; ``model`` is not a copy
                of the model, or ``align`` names unknown parameters.
            ArtifactError: ``out_dir`` cannot be written, or holds a file of the same name that no artifact wrote.
        """
        wanted = Build.of(out_dir, emitter, program, save_full, float64, verify, report, align)
        subnet = build_subnet(self._analysis, self.model if model is None else model, wanted, self._training.optimizer)
        self._saved = subnet.path or self._saved
        return subnet

    @property
    def compressed_model_path(self) -> Path | None:
        """The slim weights of the last ``construct_subnet(out_dir)``."""
        return self._saved and self._saved / WEIGHTS

    @property
    def full_group_sparse_model_path(self) -> Path | None:
        """The zeroed full weights of the last ``construct_subnet(out_dir, save_full=True)``."""
        return self._saved / FULL if self._saved and (self._saved / FULL).is_file() else None
