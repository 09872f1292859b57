"""What people met who used the library for the first time: each is told early, and what to do."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import oto.cli
from oto import OTO, load_subnet
from oto.distill import Distillation, soft_targets
from oto.errors import (
    ArtifactError,
    ClassChangedError,
    DummyInputError,
    ModelChangedError,
    NoGradientWarning,
    NothingPrunableError,
    NotPrunedWarning,
    OptionError,
    OTOError,
    TargetError,
    VerificationError,
)
from oto.integrations import early_stopping, log_progress

X = torch.randn(2, 8)


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [[nn.Linear(a, b), nn.ReLU()] for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*[layer for pair in layers for layer in pair][:-1])


# Quantized weights ----------------------------------------------------------------------------------------------------


class Codes(nn.Parameter):
    """As bitsandbytes has it: integers under a class of its own."""


class Dispatching(Tensor):
    """As torchao has it: a tensor that does in its own way what is asked of it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class OfItsOwn(nn.Parameter):
    """A parameter of a user's class, which is an ordinary one."""


def test_quantized_weights_are_refused_at_once() -> None:
    model = mlp(8, 16, 3)
    model[0].weight = Codes(torch.ones(16, 8, dtype=torch.int8), requires_grad=False)
    refusal = r"0\.weight is of the class Codes: quantized[^$]*effect[^$]*to fix[^$]*dequantize\(\)[^$]*slim model"
    with pytest.raises(OptionError, match=refusal):
        OTO(model, X)
    with pytest.raises(OptionError, match=refusal):
        OTO(model, X, prune_frozen=True)
    model = mlp(8, 16, 3)
    model[0].weight = nn.Parameter(model[0].weight.data.as_subclass(Dispatching))
    with pytest.raises(OptionError, match=r"0\.weight is of the class Dispatching: quantized"):
        OTO(model, X)


def test_weights_of_torchao_are_refused_at_once() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = mlp(64, 128, 3)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(OptionError, match=r"0\.weight, 2\.weight are of the class \w+: quantized"):
        OTO(model, torch.randn(2, 64))


def test_a_parameter_of_a_class_of_ones_own_is_no_code() -> None:
    model = mlp(8, 16, 3)
    model[0].weight = OfItsOwn(model[0].weight.data)
    assert OTO(model, X).node_groups[0].prunable


# Adapters -------------------------------------------------------------------------------------------------------------


def adapted() -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(mlp(8, 16, 3), peft.LoraConfig(r=2, target_modules=["0"]))


def test_frozen_weights_are_not_chosen_by_the_gradients_of_their_adapters_unsaid() -> None:
    model = OTO(adapted(), X, prune_frozen=True)
    options: dict[str, Any] = {"lr": 0.1, "target_params": 0.7, "total_steps": 20}
    with pytest.warns(NoGradientWarning, match=r"HESSO chooses by gradients[^$]*base_layer\.weight[^$]*oto\.lhspg\("):
        model.hesso(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoGradientWarning)
        model.hesso(**options, saliency="magnitude")
        model.hesso(**options | {"target_params": 1.0})
        model.lhspg(**options)


def test_the_model_inside_of_a_peft_model_is_refused_before_training() -> None:
    model = adapted()
    options: dict[str, Any] = {"lr": 0.1, "target_params": 0.7, "total_steps": 20}
    inner = OTO(model.get_base_model(), X, prune_frozen=True)
    with pytest.raises(OptionError, match=r"this Sequential has adapters of peft in 0, but is no PeftModel[^$]*to fix"):
        inner.lhspg(**options)
    around = OTO(nn.Sequential(model), X, prune_frozen=True)  # a module of the user's with the PeftModel in it
    assert around.lhspg(**options).composed.adapters


# Targets --------------------------------------------------------------------------------------------------------------


def test_a_target_says_who_holds_what_cannot_go() -> None:
    held = r"asked   40 atoms of 1 node groups stay whole, since {}: 0\.weight, 0\.bias[^$]*to fix  take back"
    skipped = OTO(mlp(8, 40, 10, 2), X, skip_patterns=["0"])
    with pytest.raises(TargetError, match=held.format("skip_patterns names it")):
        skipped.preview(target_params=0.1)
    marked = OTO(mlp(8, 40, 10, 2), X)
    marked.mark_unprunable_by_param_names(["0.weight"])
    with pytest.raises(TargetError, match=held.format("it was marked unprunable")):
        marked.hesso(lr=0.1, total_steps=20, target_params=0.1)
    only = OTO(mlp(8, 40, 30, 10, 2), X, only=["2"])
    with pytest.raises(
        TargetError, match=r"asked   50 atoms of 2 [^$]*only does not name them: 0\.weight[^$]*take back"
    ):
        only.preview(target_params=0.1)
    with pytest.raises(TargetError) as nobody:
        OTO(mlp(8, 40, 10, 2), X).preview(target_params=0.001)
    assert "asked" not in str(nobody.value)


@pytest.mark.parametrize(
    "asked, meant",
    [
        ("target_flops", r"target_macs= is meant: two FLOPs"),
        ("FLOPs", r"target_macs= is meant"),
        ("sparsity", r"target_group_sparsity= is meant"),
        ("target_latency", r"target_latency_ms= is meant"),
        ("target_prams", r"perhaps target_params= is meant"),
        ("workers", r"leave it out"),
    ],
)
def test_options_of_other_libraries_lead_to_ours(asked: str, meant: str) -> None:
    model = OTO(mlp(8, 16, 3), X)
    with pytest.raises(OptionError, match=f"no option {asked}[^$]*to fix  {meant}"):
        model.preview(**{asked: 0.5})
    with pytest.raises(OptionError, match=f"no option {asked}[^$]*to fix  {meant}"):
        model.hesso(**{asked: 0.5}, lr=0.1)


# What explain shows ---------------------------------------------------------------------------------------------------


def test_a_flat_sequential_is_named_by_its_numbers() -> None:
    model = mlp(8, 16, 16, 3)
    for i in (0, 2):
        model[i].requires_grad_(False)
    with pytest.raises(NothingPrunableError) as nothing:
        OTO(model, X)
    said = str(nothing.value)
    assert "it would zero 0.weight, 0.bias" in said and "it would zero 2.weight, 2.bias" in said and "*" not in said
    rows = str(OTO(mlp(8, 16, 16, 3), X).explain())
    assert "4.weight, 4.bias" in rows and "*" not in rows


def test_repeated_blocks_still_have_stars() -> None:
    model = nn.Sequential()
    model.blocks = nn.Sequential(*mlp(8, 8, 8, 8))
    model.blocks.requires_grad_(False)
    with pytest.raises(NothingPrunableError, match=r"it would zero blocks\.\*\.weight, blocks\.\*\.bias: [^$]*more|: "):
        OTO(model, X)


def test_no_line_is_shown_where_no_code_of_the_model_is_called() -> None:
    whole = OTO(mlp(8, 16, 3), X).explain().whole
    assert whole and all(w.operator and w.source is None for w in whole)

    class Mine(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    whole = OTO(Mine(*mlp(8, 16, 3)), X).explain().whole
    assert whole and all(w.source is not None and w.source.startswith(__file__) for w in whole)


# The command line -----------------------------------------------------------------------------------------------------


def test_the_former_name_of_an_option_is_warned_of() -> None:
    words = ["explain", f"{__name__}:small", "--input", "2x8"]
    run = functools.partial(CliRunner().invoke, oto.cli.app, prog_name="oto")
    former, now = run([*words, "--everything"]), run([*words, "--allow-graph"])
    assert former.exit_code == now.exit_code == 0 and former.stdout == now.stdout
    assert "warning: --everything is called --allow-graph now" in former.stderr and not now.stderr
    assert __file__ not in now.stdout and "typer" not in now.stdout and "click" not in now.stdout
    assert re.search(r'{"warning": "DeprecationWarning".*--allow-graph', run([*words, "--everything", "--json"]).stderr)
    assert "--everything" not in run(["explain", "--help"]).stdout


def small() -> nn.Module:
    return mlp(8, 16, 3)


# Early stopping -------------------------------------------------------------------------------------------------------


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(8, 16, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = self.net(x)
        return (y,) if labels is None else ((y - labels).square().mean(), y)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [5, 8])
def test_a_trainer_that_ends_before_pruning_does_is_told_at_the_start(tmp_path: Path, steps: int) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = Regression()
    schedule = {"start_pruning_step": 2, "pruning_steps": 6, "pruning_periods": 2}
    optimizer = OTO(model, {"x": X}).hesso(lr=0.01, target_macs=0.5, **schedule)
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "remove_unused_columns": False}
    measured = {"eval_strategy": "steps", "metric_for_best_model": "loss", "greater_is_better": False}
    data = [{"x": torch.randn(8), "labels": torch.randn(3)} for _ in range(2 * steps)]
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(tmp_path), max_steps=steps, save_strategy="no", **quiet, **measured),
        train_dataset=data,
        eval_dataset=data[:2],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)),
    )
    early_stopping(trainer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(w.message) for w in caught if w.category is NotPrunedWarning]
    if steps == 8:
        assert not told
    else:
        (text,) = told
        assert (
            text.startswith("training ends after step 5, and pruning after step 8") and "to fix  train longer" in text
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("epochs", [1, 2])
def test_lightning_is_told_as_well(tmp_path: Path, epochs: int) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(8, 16, 3)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.net(batch[0]).square().sum()

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("loss", self.net(batch[0]).sum())

        def configure_optimizers(self) -> Any:
            schedule = {"start_pruning_step": 2, "pruning_steps": 6, "pruning_periods": 2}
            return OTO(self.net, X).hesso(lr=0.01, target_macs=0.5, **schedule)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False, **quiet
    )
    early_stopping(trainer, patience=9, monitor="loss")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 8)), batch_size=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Lit(), loader, loader)
    told = [str(w.message) for w in caught if w.category is NotPrunedWarning]
    assert len(told) == (epochs == 1) and all("training ends after step 4, and pruning after step 8" in t for t in told)


# Names of outputs -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Found:
    logits: Tensor
    x: Tensor  # is called like the input
    boxes: list[Tensor]


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.boxes = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Found:
        h = self.body(x).relu()
        return Found(self.head(h), self.head(h + 1), [self.boxes(h), h.sum(1)])


class Pair(Detector):
    def forward(self, x: Tensor) -> Any:
        h = self.body(x).relu()
        return self.head(h), self.boxes(h)


def test_outputs_keep_their_names_in_other_runtimes(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    for model, names in (
        (Detector(), ["logits", None, "boxes.0", "boxes.1"]),
        (Pair(), ["output_0", "output_1"]),
    ):
        analyzed = OTO(model, X)
        analyzed.random_set_zero_groups()
        file = tmp_path / f"{type(model).__name__}.onnx"
        analyzed.construct_subnet().export("onnx", file)
        session = onnxruntime.InferenceSession(file)
        written = [output.name for output in session.get_outputs()]
        assert len(written) == len(names) and all(a == b for a, b in zip(written, names, strict=True) if b)
        assert len({*written, *(given.name for given in session.get_inputs())}) == len(names) + 1


def test_a_program_gives_what_the_model_gives_by_name(tmp_path: Path) -> None:
    analyzed = OTO(Detector(), X)
    analyzed.random_set_zero_groups()
    subnet = analyzed.construct_subnet(tmp_path / "slim", program=True)
    expected, found = subnet.model(X), load_subnet(tmp_path / "slim")(X)
    torch.testing.assert_close(found, vars(expected))


# The middle of training -----------------------------------------------------------------------------------------------


def test_after_shrinking_costs_are_related_to_the_first_model(tmp_path: Path) -> None:
    model = mlp(8, 16, 3)
    analyzed = OTO(model, X)
    full = analyzed.compute_num_params()
    schedule = {"start_pruning_step": 0, "pruning_steps": 4, "pruning_periods": 2}
    optimizer = analyzed.hesso(lr=0.01, target_params=0.5, **schedule)
    for step in range(4):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
        if step in (1, 3):
            analyzed.shrink(optimizer)
    subnet = analyzed.construct_subnet(tmp_path / "slim")
    assert subnet.cost_before.params == full and subnet.cost_after.params == analyzed.compute_num_params() <= 0.5 * full
    assert "100.0 %" not in str(subnet) and '"before"' in (tmp_path / "slim" / "oto.json").read_text()


def test_the_plan_says_what_walks_are() -> None:
    options: dict[str, Any] = {"lr": 0.1, "target_params": 0.5, "total_steps": 1000}
    optimizer = OTO(mlp(8, 16, 3), X).hesso_cric(**options)
    lines = optimizer.plan().splitlines()
    assert lines[1:4] == [
        "steps 0–9      ordinary steps",
        "steps 10–13    probes: how much the loss depends on each layer; nothing is trained",
        "steps 14–213   at most 10 walks of 20 steps: groups go to zero to be scored, and are put back; nothing is"
        " trained",
    ]
    assert (
        lines[4].startswith("steps 214–613  5 periods") and "latest" in lines[-2] and lines[-1].startswith("learning")
    )


# Of the wrong type ----------------------------------------------------------------------------------------------------

WRONG = {
    "a teacher that is none": lambda: Distillation.of(None),
    "targets of no class": lambda: soft_targets(X, k=0),
    "a trainer that is none": lambda: log_progress(None),
    "a batch, no forward": lambda: OTO(mlp(8, 16, 3), X).family(targets=[0.6], lr=1, total_steps=9).step(X, X),
    "a single step": lambda: OTO(mlp(8, 16, 3), X).hesso(lr=0.1, target_macs=0.5, total_steps=1),
    "skip_patterns=None": lambda: OTO(mlp(8, 16, 3), X, skip_patterns=None),
    "only=3.5": lambda: OTO(mlp(8, 16, 3), X, only=3.5),
    "allow_graph='no'": lambda: OTO(mlp(8, 16, 3), X, allow_graph="no"),
    "tensor_parallel='4'": lambda: OTO(mlp(8, 16, 3), X, tensor_parallel="4"),
    "a name that is a number": lambda: OTO(mlp(8, 16, 3), X).mark_unprunable_by_param_names([0]),
    "no names": lambda: OTO(mlp(8, 16, 3), X).mark_unprunable_by_param_names(None),
    "a node that is none": lambda: OTO(mlp(8, 16, 3), X).mark_unprunable_by_node_ids([None]),
    "an operator that is a number": lambda: OTO(mlp(8, 16, 3), X).skip_operators([0]),
    "a share that is a text": lambda: OTO(mlp(8, 16, 3), X).random_set_zero_groups("a"),
    "a share below zero": lambda: OTO(mlp(8, 16, 3), X).random_set_zero_groups(-0.1),
    "a share that is NaN": lambda: OTO(mlp(8, 16, 3), X).random_set_zero_groups(float("nan")),
    "out_dir=3": lambda: OTO(mlp(8, 16, 3), X).construct_subnet(3),
    "verify='no'": lambda: OTO(mlp(8, 16, 3), X).construct_subnet(verify="no"),
    "program='yes'": lambda: OTO(mlp(8, 16, 3), X).construct_subnet(program="yes"),
    "a group without params": lambda: OTO(mlp(8, 16, 3), X).hesso(target_macs=0.5, total_steps=9, params=[{"lr": 1}]),
    "a path that is none": lambda: load_subnet(None, nn.Identity),
    "batches that are 3": lambda: OTO(mlp(8, 16, 3), X).preview(target_macs=0.5, batches=3),
    "no batches": lambda: OTO(mlp(8, 16, 3), X).one_shot(target_macs=0.5, batches=None, loss=None),
    "parameters that are 3": lambda: OTO(mlp(8, 16, 3), X).hesso(lr=1, target_macs=0.5, total_steps=9, params=3),
    "a base that is none": lambda: OTO(mlp(8, 16, 3), X).hesso(target_macs=0.5, total_steps=9, base=3),
    "steps that are a text": lambda: OTO(mlp(8, 16, 3), X).hesso(lr=1, target_macs=0.5, total_steps="9"),
    "periods that are a list": lambda: OTO(mlp(8, 16, 3), X).hesso(
        lr=1, target_macs=0.5, total_steps=9, pruning_periods=[2]
    ),
    "export to none": lambda: zeroed().construct_subnet().export("onnx", None),
    "export to nothing": lambda: zeroed().construct_subnet().export("pt2", ""),
    "export in no way": lambda: zeroed().construct_subnet().export(["onnx"], "slim.onnx"),
    "a report for none": lambda: zeroed().construct_subnet().report(None),
    "a folder for none": lambda: zeroed().construct_subnet().save_pretrained(None),
    "a drawing for 3": lambda: zeroed().visualize(3),
    "a drawing in a file": lambda: zeroed().visualize(__file__),
    "vertical='no'": lambda: zeroed().visualize("drawn", vertical="no"),
    "strict='no'": lambda: load_subnet("nowhere", mlp(8, 16, 3), strict="no"),
    "a seed below zero": lambda: OTO(mlp(8, 16, 3), X).random_set_zero_groups(0.5, seed=-1),
}
SAYS = {
    "a teacher that is none": r"the teacher is a NoneType[^$]*nothing to copy",
    "targets of no class": r"k is 0; it is the number of classes",
    "a trainer that is none": r"a NoneType is no Trainer of transformers[^$]*progress_dict",
    "a batch, no forward": r"forward and loss are functions[^$]*lambda net: net\(x\)",
    "a single step": r"ask for pruning_steps >= 1, or more total_steps",
    "skip_patterns=None": r"None names nothing[^$]*a list of names",
    "only=3.5": r"3\.5 names nothing",
    "allow_graph='no'": r"allow_graph is 'no'; it is True or False",
    "tensor_parallel='4'": r"tensor_parallel is '4'; it is the number of devices",
    "a name that is a number": r"0 is no name[^$]*nothing was marked",
    "no names": r"None names nothing",
    "a node that is none": r"None is no name",
    "an operator that is a number": r"0 is no name",
    "a share that is a text": r"target_group_sparsity is 'a'; it is the share of groups that goes",
    "a share below zero": r"target_group_sparsity is -0\.1; it is the share of groups that goes",
    "a share that is NaN": r"target_group_sparsity is nan",
    "out_dir=3": r"out_dir is 3, of the class int[^$]*nothing was computed",
    "verify='no'": r"verify is 'no'; it is True or False",
    "program='yes'": r"program is 'yes'; it is True or False",
    "a group without params": r"parameter group 0 has no 'params': lr",
    "a path that is none": r"None is no folder[^$]*nothing is loaded",
    "batches that are 3": r"batches is of the class int[^$]*nothing was made or changed[^$]*to fix",
    "no batches": r"batches is of the class NoneType[^$]*to fix",
    "parameters that are 3": r"params is of the class int[^$]*to fix[^$]*model\.parameters",
    "a base that is none": r"base is 3, no optimizer[^$]*nothing was made[^$]*to fix",
    "steps that are a text": r"total_steps is '9', which is no number[^$]*to fix",
    "periods that are a list": r"pruning_periods is \[2\], which is no number[^$]*to fix",
    "export to none": r"path is None, of the class NoneType[^$]*nothing was exported[^$]*to fix",
    "export to nothing": r"path is empty[^$]*nothing was exported[^$]*to fix",
    "export in no way": r"how=\['onnx'\] is unknown[^$]*to fix",
    "a report for none": r"path is None, of the class NoneType[^$]*nothing was written[^$]*to fix",
    "a folder for none": r"out_dir is None, of the class NoneType[^$]*nothing was written[^$]*to fix",
    "a drawing for 3": r"out_dir is 3, of the class int[^$]*nothing was drawn[^$]*to fix",
    "a drawing in a file": r"cannot be written[^$]*nothing was drawn[^$]*to fix",
    "vertical='no'": r"vertical is 'no'; it is True or False",
    "strict='no'": r"strict is 'no'; it is True or False",
    "a seed below zero": r"seed is -1; it is an int, at least 0",
}


def zeroed() -> OTO:
    oto = OTO(mlp(8, 16, 3), X)
    oto.random_set_zero_groups(0.5)
    return oto


@pytest.mark.parametrize("what", WRONG)
def test_what_is_of_the_wrong_type_is_refused_with_a_remedy(what: str) -> None:
    with pytest.raises(OTOError, match=SAYS[what]):
        WRONG[what]()


@pytest.mark.parametrize("made", [None, 3])
def test_a_function_that_makes_no_model_is_told(tmp_path: Path, made: Any) -> None:
    oto = OTO(mlp(8, 16, 3), X)
    oto.random_set_zero_groups(0.5)
    oto.construct_subnet(tmp_path)
    with pytest.raises(ClassChangedError, match=rf"is, or makes, a {type(made).__name__}, no torch[^$]*make_model"):
        load_subnet(tmp_path, lambda: made)


def relu_of(act: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    mean = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(nn.Conv2d(3, 16, 3), act, nn.Conv2d(16, 8, 3), mean, nn.Flatten(), nn.Linear(8, 2))


def with_stride(model: nn.Sequential) -> None:
    model[2].stride = (2, 2)


def with_sigmoid(model: nn.Sequential) -> None:
    model[1] = nn.Sigmoid()


CHANGES = {with_stride: r"2\.stride is \(2, 2\), and was \(1, 1\)", with_sigmoid: r"1 is a Sigmoid, and was a ReLU"}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_changed_by_hand_is_refused_before_training(change: Any) -> None:
    model = relu_of(nn.ReLU())
    oto = OTO(model, torch.randn(2, 3, 8, 8))
    model[1].inplace, model[1].calls = True, 3  # neither says anything of the analysis
    oto.hesso(lr=0.1, target_macs=0.5, total_steps=9)
    change(model)
    with pytest.raises(ModelChangedError, match=f"{CHANGES[change]}[^$]*nothing was made[^$]*to fix"):
        oto.hesso(lr=0.1, target_macs=0.5, total_steps=9)


class Scheduled(nn.Module):
    """Trains as others do: a rate that rises, a loss that is exchanged, a constant that is no number."""

    __constants__: ClassVar = ["fill", "drop_prob", "seen"]

    def __init__(self) -> None:
        super().__init__()
        self.net, self.loss = relu_of(nn.LeakyReLU(0.1)), nn.CrossEntropyLoss()
        self.skip, self.drop = nn.Dropout(0.1), nn.Identity()
        self.fill, self.drop_prob, self.seen = float("nan"), 0.0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        y: Tensor = self.drop(self.skip(self.net(x)))
        return y


def test_what_training_changes_is_no_change_of_the_model() -> None:
    model = Scheduled()
    oto = OTO(model, torch.randn(2, 3, 8, 8))
    model.train()
    model(torch.randn(2, 3, 8, 8))
    model.drop_prob, model.skip.p, model.drop, model.skip = 0.2, 0.3, nn.Dropout(0.2), nn.Identity()
    model.loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    model.net[1].negative_slope, model.net[2].stride, model.net[3].output_size = 0.2, [1, 1], (1, 1)
    oto.hesso(lr=0.1, target_macs=0.5, total_steps=9)
    oto.random_set_zero_groups(0.5)
    assert not any("changed since" in note for note in oto.construct_subnet().notes)


def test_a_model_that_is_changed_by_hand_later_is_told() -> None:
    model = relu_of(nn.ReLU())
    oto = OTO(model, torch.randn(2, 3, 8, 8))
    oto.random_set_zero_groups(0.5)
    assert not oto.construct_subnet().notes
    with_stride(model)
    assert any(re.search(f"{CHANGES[with_stride]}", note) for note in oto.construct_subnet().notes)
    with_sigmoid(model)
    with pytest.raises(VerificationError, match=f"nothing was written[^$]*{CHANGES[with_sigmoid]}[^$]*change it back"):
        oto.construct_subnet()


def test_a_compiled_model_loads_as_what_was_compiled(tmp_path: Path) -> None:
    zeroed().construct_subnet(tmp_path)
    for given in (lambda: torch.compile(mlp(8, 16, 3)), torch.compile(mlp(8, 16, 3)), nn.DataParallel(mlp(8, 16, 3))):
        slim = load_subnet(tmp_path, given)
        assert type(slim) is nn.Sequential and slim[0].weight.shape == (8, 8)


def test_an_example_without_entries_is_refused() -> None:
    with pytest.raises(DummyInputError, match=r"dummy_input is empty: \(0, 8\)[^$]*effect[^$]*to fix[^$]*batch of one"):
        OTO(mlp(8, 16, 3), X[:0])
    model = Joined()
    OTO(model, (X, X[:0]))  # a cache that is empty yet


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(8, 16, 3)

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        return self.net(torch.cat([cache, x]))


def test_a_report_where_a_folder_is_says_so(tmp_path: Path) -> None:
    oto = OTO(mlp(8, 16, 3), X)
    oto.random_set_zero_groups(0.5)
    with pytest.raises(ArtifactError, match=r"is a folder[^$]*nothing was written[^$]*name a file in it"):
        oto.construct_subnet().report(tmp_path)
    assert not list(tmp_path.iterdir())
