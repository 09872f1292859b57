"""The class ``OTO``: a docstring and a call for each method. The results of the analysis are in an ``Analysis``."""

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
    """Makes, from a model and one example input, a slim model that computes the same function.

    It can be copied and pickled if the model can; a copy has no reference to the optimizers that the original made.

    Args:
        model: Any module. It is not copied: the optimizer trains it, ``construct_subnet`` reads its zeros. A wrapper of
            ``torch.compile`` or ``(Distributed)DataParallel`` is removed here; train with it, as it shares the model.
        dummy_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments of ``model.forward``.
        skip_patterns: Parameters that must not be zeroed: names or globs of parameters or modules, module classes, or
            modules.
        only: The only weights that may be zeroed, in the same form, and with them the biases and norms of their groups.
            A group that would zero other weights too stays whole, such as a residual stream if only one kind of layer
            is named.
        strict_out_nodes: By default all outputs keep their size. With ``True``, only outputs that nothing else in the
            model reads do, and a returned hidden state gets as thin as the network is there. Or names or globs of
            outputs that may get thinner: keys, fields or indices in the result (``["state", "hidden.0"]``).
        min_kept: The minimum number of atoms of every group: an int; a float, as a share of its atoms; or a mapping
            from names or globs of parameters to either. Optimizers also take it; the larger value counts.
        allow_graph: Prune everything that can be removed exactly. If the class cannot express the slim model, it is a
            ``torch.fx.GraphModule``. By default, groups that the class cannot express, even with overrides, stay whole.
        prune_frozen: Zero frozen parameters like all others, for example for adapters on a frozen model. By default, a
            group that would zero a parameter with ``requires_grad=False`` stays whole. Freeze before ``OTO``.
        drop_unreached: Leave out of the slim model what its forward never uses in eval mode, such as auxiliary heads.
            By default these stay, with thinner inputs, and the slim model can be trained with them.
        layout: ``"uniform"``: repeated blocks keep equal numbers of atoms, each its own best ones, so that one number
            can state the size of all; sizes that ``model.config``, or the keywords of the function named by
            ``model.pretrained_cfg``, cannot state stay whole (with an ``UnstatedWarning`` if they state none). Of the
            segments, only whole layers are removed, if the config states their number. The slim model is of the stock
            class, see :meth:`Subnet.save_pretrained`. ``"stock"``: in addition, a width that is heads times the head
            width stays so. By default (``None`` or ``"free"``), every block has its own counts.
        tensor_parallel: Number of devices by which heads, key and value heads and FFNs stay divisible.
        compress_mode: ``"prune"``: atoms such as channels and heads are removed. ``"erase"``: whole segments are
            removed, such as the branch of a residual block, or the attention or MLP of a layer, see :meth:`erasable`.
            ``"both"``: both, within one budget.
        min_depth: The minimum number of segments that a run of repeated blocks keeps: an int; a float, as a share; or a
            mapping from globs of module paths to either, of which the largest counts.
        everything: The former name of ``allow_graph``.

    Raises:
        OptionError, DummyInputError: ``model`` is not a module, ``dummy_input`` not an input, or an option is invalid.
        TraceError: ``forward`` fails on the input.
        NothingPrunableError: Nothing can be removed; the message says why, and ``explanation`` holds the result of
            :meth:`explain`.
        TargetError, UnknownParameterError, UnknownNodeError: A value of ``min_kept``, ``min_depth`` or
            ``tensor_parallel`` is invalid, or a name or pattern matches nothing.

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
        """The terms of every dimension of the model, and its node groups before any policy."""
        return self._analysis.partition

    @property
    def node_groups(self) -> tuple[NodeGroup, ...]:
        """All node groups, prunable or not."""
        return self._analysis.groups

    @property
    def costs(self) -> Costs:
        """Parameters, MACs and bytes as functions of the numbers of atoms that the prunable groups keep."""
        return self._analysis.costs

    def mark_unprunable_by_param_names(self, names: Iterable[str]) -> None:
        """Keep groups whole that would zero entries of some parameters: names, or globs such as ``"layer1.*.weight"``.

        The inputs of a marked layer still shrink with the layer before it. Raises ``UnknownParameterError`` if a name
        matches nothing, and ``TooLateError`` if an optimizer was made already; nothing is marked then.
        """
        self._analysis = self._training.markable(self._analysis).without_parameters(names)

    def mark_unprunable_by_node_ids(self, node_ids: Iterable[str | int]) -> None:
        """Keep the groups whole that some nodes of the drawing of :meth:`visualize` carry: ``"node-12"``, or ``12``.

        Raises ``UnknownNodeError`` if there is no such node, and ``TooLateError`` if an optimizer was made already.
        """
        self._analysis = self._training.markable(self._analysis).without_nodes(node_ids)

    def skip_operators(self, operators: Iterable[str]) -> None:
        """Keep the groups whole that the results of some operators carry, given by names as in :meth:`coverage`, long
        or short (``"aten.conv2d.default"``, ``"conv2d"``), or globs.

        Raises ``UnknownNodeError`` if the model does not call one, ``TooLateError`` if an optimizer was made already.
        """
        self._analysis = self._training.markable(self._analysis).without_operators(operators)

    def mark_unprunable_by_knowledge(
        self, *, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor], share: float = 0.1,
        levels: Sequence[float] = LEVELS,
    ) -> Knowledge:  # fmt: skip
        """Keep the groups whole for which the loss rises most, as LoRAShear does before it prunes.

        Each group alone loses its atoms of the least norm, the loss is measured, and the atoms are restored. This needs
        one loss over all batches for each group and level, and no gradients.

        Args:
            batches, loss: Held-out batches. ``loss`` takes the model, in eval mode, and a batch.
            share: Share of the groups that stay whole, in [0, 1).
            levels: Shares of its atoms that a group loses, in (0, 1).

        Returns:
            By how much the loss rises for each group; it can be printed.

        Raises:
            OptionError, TooLateError: An argument is invalid, or parameters are sharded; an optimizer was made already.
        """
        analysis = self._training.markable(self._analysis)
        self._analysis, found = mark_by_knowledge(analysis, batches, loss, share, levels)
        return found

    def explain(self, *, search: bool = False) -> Explanation:
        """What can be removed, and why the rest stays whole; it can be printed, or converted by ``to_dict()``.

        With ``search=True``, it also shows the search for what the model's class needs: for each decision, the line of
        its code, what was observed there, what was tried, and what was chosen.
        """
        return self._analysis.explain(search=search)

    def erasable(self) -> Erasable:
        """The segments that can be removed as a whole, what each saves, and why other branches stay; can be printed."""
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
            out_dir: Folder for ``<class of the model>.dot``; with graphviz, also ``.svg``, ``.pdf`` and ``.png``.
            view, vertical: Open the SVG; draw from top to bottom instead of from left to right.
            by_node_groups: Give each node group a color; otherwise prunable calls are white.
            display_params, display_flops: Show the shapes of the parameters that each call reads; its FLOPs.

        Returns:
            The files. Without pydot (``pip install 'oto[viz]'``), a ``MissingExtraError`` is raised.
        """
        shown = {"display_params": display_params, "display_flops": display_flops, "by_node_groups": by_node_groups}
        return self._analysis.draw(out_dir, view=view, vertical=vertical, **shown)

    def shrink(
        self, optimizer: Any = None, *, like: Mapping[str, Any] | None = None, averages: Iterable[Any] = (),
        shard: Callable[[nn.Module], Any] | None = None,
    ) -> nn.Module:  # fmt: skip
        """Make the model slim during training: remove all pruned atoms.

        It can be called between any two steps, any number of times. Training continues as it would have, only cheaper,
        if the optimizer treats entries one by one and gradients are not clipped by a norm over all of them; dropout
        draws different numbers. Model and optimizer stay the same objects, so schedulers, a ``GradScaler``, accelerate
        and a trainer keep working. Objects that hold single parameters do not: wrap the model in
        ``DistributedDataParallel`` again (otherwise there is a ``StaleWrapperError``), and list parameters again.
        ``docs/after_pruning.md`` has details, also on resuming.

        Args:
            optimizer: One that this ``OTO`` made, or a wrapper with it as ``.optimizer``; by default the last one made.
            like: The ``state_dict()`` of another run's optimizer: atoms that its model no longer has are set to zero
                and removed.
            averages: Moving averages of the weights, or their wrappers (``.module`` or ``.ema``); made slim in place.
            shard: If parameters are sharded over processes (FSDP2), the function that shards a model, in place. It is
                also called with every average. Every process must then call this method (``docs/distributed.md``).

        Returns:
            The model; unchanged, with a ``NotPrunedWarning``, if there was never anything to remove.

        Raises:
            ShrinkError: The class, or its config (``layout="uniform"``), cannot express the slim model; the optimizer
                has state that cannot be sliced; or it or an average belongs to a different model. Nothing is changed.
            VerificationError: The slim model computes something else, in eval or train mode. Nothing is changed.
        """
        self._analysis, self._training = shrink(self._analysis, self._training, optimizer, like, averages, shard)
        return self.model

    def random_set_zero_groups(self, target_group_sparsity: float = 0.5, seed: int = 0) -> None:
        """Set a random choice of ZIGs to zero in place, for tests; fewer if ties of groups only permit larger steps.

        Raises ``TargetError`` if the share is not in [0, 1), or cannot be reached; ``OptionError`` if ``seed`` is not
        an int, or negative.
        """
        self._analysis.zero_random_(target_group_sparsity, seed)

    def compute_num_params(self) -> int:
        """Entries of all parameters of the full model; a tied one counts once."""
        return self._analysis.cost().params

    def compute_macs(self) -> int:
        """Multiply–adds of the full model on the example input."""
        return self._analysis.cost().macs

    def compute_flops(self) -> int:
        """FLOPs of the full model on the example input: twice the MACs."""
        return self._analysis.cost().flops

    def construct_subnet(
        self, out_dir: str | os.PathLike[str] | None = None, *, model: Any = None, emitter: Emitter = "auto",
        program: bool | None = None, save_full: bool = False, float64: bool | Literal["auto"] = "auto",
        verify: bool = True, report: bool = False, align: Align = 1,
    ) -> Subnet:  # fmt: skip
        """Build the slim model from the zeros in the parameters, prove it equal, and save it.

        The original class is used if it can express the slim model; otherwise the graph from ``torch.export``; if that
        fails too, the calls recorded on the example, which are valid for its shapes and values only. The slim model is
        compared with the zeroed full model on the example and on a random input, with a different batch size if that is
        possible, in the model's dtype and in float64; and on the example in inference mode, with torch's fast paths.
        Saved files are read back and compared. ``print(subnet)`` shows the limits of the result; if pruning has not
        finished, or nothing is zero, there is also a warning. If the model was cast or moved since ``OTO(...)``, so is
        the example. Wrappers that trainers put around a ``forward``, such as autocast, are ignored. If parameters are
        sharded over processes (FSDP2), every process must call this method (``docs/distributed.md``).

        Args:
            out_dir: Folder for the artifact; nothing is saved if it is ``None``.
            model: Another model to make slim: a copy with other weights, such as a moving average, or a wrapper of one.
                Call :meth:`oto.optim.SparseOptimizer.zero_pruned_in` with it first.
            emitter: ``"auto"``, or a single one: ``"config"`` (the class, made from an edited ``model.config``; tried
                first with ``layout="uniform"``), ``"module"`` (the class), ``"graph"`` or ``"recording"``.
            program: Also save the slim model as an exported program (``model.pt2``), which loads without the class. By
                default only if the slim model is a graph, since it could not be loaded otherwise.
            save_full, report: Also save the zeroed full weights; a ``report.html``, see :meth:`Subnet.report`.
            float64: Also compare in float64, which shows whether the slim model is equal or only similar: ``"auto"``
                (if it fits in memory), ``True`` or ``False``.
            verify: Compare the models. Without it, only whether an emitter can express the slim model is checked.
            align: Keep enough zero atoms to make sizes multiples, for zeros of an optimizer without ``align``; see
                :class:`oto.optim.options.ChoiceOptions`.

        Raises:
            VerificationError: The slim model differs, or the full one returns no finite number. Nothing is written.
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
