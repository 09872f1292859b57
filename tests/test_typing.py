"""What a type checker says of a user's own script; and that what it knows is what there is."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Unpack, get_args

import pytest
import torch

from oto import HESSO, OTO
from oto.errors import OptionError
from oto.optim import DHSPG, H2SPG, HESSOCRIC, HSPG, LHSPG
from oto.optim.options import (
    DHSPGOptions,
    H2SPGOptions,
    HESSOCRICOptions,
    HESSOOptions,
    HSPGOptions,
    LHSPGOptions,
    PreviewOptions,
    RenamedOptions,
    SparseOptions,
    keywords_of,
    names_of,
)
from oto.optim.wrapped import REFUSED, VARIANTS

SCRIPT = """
import torch
from torch import nn
from oto import HESSO, OTO, Subnet
from oto.optim import HSPG

model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
x = torch.randn(8, 20)


class Foreign(torch.optim.SGD):
    def __init__(self, params: object, lr: float, warmth: float) -> None: ...


# right
oto = OTO(model, x, skip_patterns=["2.*", nn.LSTM, model[0]], min_kept={"0.weight": 0.5}, layout="uniform")
optimizer: HESSO = oto.hesso(lr=0.1, target_macs=0.5, momentum=0.9, nesterov=True, foreach=None)
oto.hesso(variant="adamw", lr=torch.tensor(1e-3), betas=(0.9, 0.99), eps=1e-6, fused=False, target_params=50_000)
oto.hesso(lr=1, target_kept={"0.*": 0.4}, pruning_steps=0.4, start_pruning_step=100, total_steps=1_000, align="gguf")
oto.hesso(base=Foreign, base_options={"warmth": 3.0}, lr=0.1, target_bytes=0.5, saliency={"magnitude": 1.0})
oto.hesso(params=[{"params": [p], "lr": 0.1} for p in model.parameters()], target_macs=0.5)
oto.hesso_cric(lr=0.1, target_macs=0.5, sampling_steps=10, sensitivity=0.5, max_cycles=3)
print(oto.preview(target_macs=0.5, scope="local", batches=[x], loss=lambda m, b: m(b).sum()).to_dict())
subnet: Subnet = oto.construct_subnet("out", emitter="module", float64="auto", align={"0.weight": 8})
HESSO(model.named_parameters(), oto.node_groups, lr=0.1, target_group_sparsity=0.5, min_kept=2)
HSPG(model.named_parameters(), oto.node_groups, lr=0.1, target_macs=0.5, lmbda=lambda t: 1e-3, epsilon={"conv": 0.9})
oto.hspg(lr=0.1, upper_group_sparsity=0.5, lmbda=0.5, half_space_step=0.1, total_steps=1_000).ways
oto.dhspg(variant="adamw", target_macs=0.5, lmbda_amplify=2.0, partition_step=10, epsilon=0.9, betas=(0.9, 0.99))
oto.lhspg(lr=0.1, target_macs=0.5, epsilon=0.5, scope="local")
oto.shrink(optimizer).train()

# wrong
oto.hesso(lr=0.1, target_mac=0.5)
oto.hesso(lr="0.1", target_macs=0.5)
oto.hesso(lr=0.1, target_macs=0.5, scope="globally")
oto.hesso(lr=0.1, target_macs=0.5, betas=0.9)
oto.hesso(lr=0.1, target_macs=0.5, pruning_steps="all")
oto.hesso(lr=0.1, target_macs=0.5, sampling_steps=10)
oto.hesso(base=Foreign, warmth=3.0, target_macs=0.5)
oto.hesso_cric(lr=0.1, target_macs=0.5, max_cycles="many")
oto.preview(target_macs=0.5, lr=0.1)
OTO(model, x, layout="uniformly")
OTO(model, x, min_keep=2)
oto.construct_subnet("out", emitter="auto", reports=True)
oto.construct_subnet("out", emitter="onnx")
HESSO(model.named_parameters(), oto.node_groups, lr=0.1, target_macs="half")
HSPG(model.named_parameters(), oto.node_groups, lr=0.1, target_macs=0.5, lmbda="much")
oto.hspg(lr=0.1, target_macs=0.5, lmbda_amplify=2.0)
oto.dhspg(lr=0.1, target_macs=0.5, epsilon="high")
oto.lhspg(lr=0.1, target_macs=0.5, half_space_step=3)
oto.skip_operators(5)
"""


PARTS = (
    "_decomp _dynamo _export _functorch _higher_order_ops _inductor _library _logging _numpy _prims _refs _subclasses"
    " accelerator amp ao autograd backends compiler cpu cuda distributed distributions export fft func futures fx hub"
    " jit linalg masked monitor mps nested onnx package profiler quantization signal sparse special testing utils xpu"
)
APART = ["sympy", "networkx", "tqdm", "transformers", *(f"torch.{part}" for part in PARTS.split())]
"""What says nothing of ``Tensor``, ``Module`` and ``Optimizer``: to read it takes six times as long."""


def test_a_users_script_is_checked_line_by_line(tmp_path: Path) -> None:
    """Every wrong line is reported, and no other."""
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    apart = ",".join(f"{name}.*" for name in APART)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nfollow_imports = silent\nignore_missing_imports = True\n[mypy-oto.*,torch.*]\nignore_errors = True\n"
        f"[mypy-{apart}]\nfollow_imports = skip\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), "--no-error-summary", "script.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(root), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    lines = SCRIPT.splitlines()
    wrong = set(range(lines.index("# wrong") + 2, len(lines) + 1))
    reported = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    assert reported == wrong, "\n".join([done.stdout, done.stderr, *(lines[n - 1] for n in reported ^ wrong)])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (OTO.hesso, HESSOOptions),
        (OTO.hesso_cric, HESSOCRICOptions),
        (OTO.preview, PreviewOptions),
        (HESSO, HESSOOptions),
        (HESSOCRIC, HESSOCRICOptions),
        (OTO.hspg, HSPGOptions),
        (HSPG, HSPGOptions),
        (OTO.dhspg, DHSPGOptions),
        (DHSPG, DHSPGOptions),
        (OTO.h2spg, H2SPGOptions),
        (H2SPG, H2SPGOptions),
        (OTO.lhspg, LHSPGOptions),
        (LHSPG, LHSPGOptions),
    ],
)
def test_the_signature_says_what_there_is(method, options) -> None:
    (more,) = [p for p in inspect.signature(method, eval_str=True).parameters.values() if p.kind is p.VAR_KEYWORD]
    assert more.annotation == Unpack[options] and get_args(more.annotation) == (options,)
    assert names_of(options) <= keywords_of(method)


@pytest.mark.parametrize(
    ("kind", "method", "options"),
    [
        (HSPG, OTO.hspg, HSPGOptions),
        (DHSPG, OTO.dhspg, DHSPGOptions),
        (H2SPG, OTO.h2spg, H2SPGOptions),
        (LHSPG, OTO.lhspg, LHSPGOptions),
    ],
)
def test_the_help_names_what_a_paper_adds(kind, method, options) -> None:
    own = names_of(options) - names_of(SparseOptions)
    assert own and all(name in (method.__doc__ or "") and name in (kind.__doc__ or "") for name in own)


def test_the_help_names_all_options_but_those_of_torch_alone() -> None:
    torchs = {"adjust_lr_fn"} | {
        name for kind in VARIANTS.values() for name in inspect.signature(kind).parameters if name not in ("params",)
    }
    ours = names_of(HESSOOptions) - names_of(RenamedOptions) - torchs | {"lr", "weight_decay", "dampening"}
    assert len(ours) > 25
    for text in (OTO.hesso.__doc__, HESSO.__doc__):
        assert [name for name in sorted(ours) if name not in (text or "")] == []
    for name in names_of(HESSOCRICOptions) - names_of(HESSOOptions):
        assert name in (OTO.hesso_cric.__doc__ or "") and name in (HESSOCRIC.__doc__ or "")


def test_every_keyword_of_torchs_optimizers_is_an_option() -> None:
    taken = {
        name
        for variant, kind in VARIANTS.items()
        if variant not in REFUSED
        for name in inspect.signature(kind).parameters
        if name != "params"
    }
    assert taken <= names_of(SparseOptions), taken - names_of(SparseOptions)


class Foreign(torch.optim.SGD):
    def __init__(self, params, lr, warmth=1.0, foreach=None):
        super().__init__(params, lr)
        self.warmth, self.asked = warmth, foreach


@pytest.mark.parametrize("options", [{"base_options": {"warmth": 3.0, "foreach": None}}, {"warmth": 3.0}])
def test_keywords_of_a_foreign_optimizer(options) -> None:
    oto = OTO(torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), torch.randn(1, 3))
    steps = {"start_pruning_step": 1, "pruning_steps": 2}
    optimizer = oto.hesso(base=Foreign, lr=0.5, target_macs=0.5, **steps, **options)
    assert optimizer.base.asked is None and "warmth" not in optimizer.param_groups[0]
    assert type(optimizer.base) is Foreign and optimizer.base.warmth == 3.0 and optimizer.param_groups[0]["lr"] == 0.5


def test_options_for_a_base_are_looked_at_before_anything_is_made() -> None:
    oto = OTO(torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), torch.randn(1, 3))
    for options, text in (
        ({"base_options": {"warmht": 3.0}}, r"HESSO and Foreign have no option warmht\n[^$]*perhaps warmth= is meant"),
        ({"base_options": {"lr": 3.0}, "lr": 0.1}, r"lr is given twice: in base_options[^$]*leave one of them out"),
        ({"base_options": {"target_macs": 3.0}, "lr": 0.1}, "HESSO and Foreign have no option target_macs"),
    ):
        with pytest.raises(OptionError, match=text):
            oto.hesso(base=Foreign, **{"target_macs": 0.5, "start_pruning_step": 1, "pruning_steps": 2, **options})
