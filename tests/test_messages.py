"""What a user reads when something is wrong: where, what, consequence, remedy. One test per error."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from oto import OTO, load_subnet, register_rule
from oto.errors import (
    ArtifactError,
    ArtifactVersionError,
    ClassChangedError,
    DamagedArtifactError,
    DummyInputError,
    DuplicateRuleError,
    EmitterError,
    GraphInputError,
    GraphModeError,
    NonFiniteParameterError,
    NothingPrunableError,
    NotPrunedWarning,
    ShrinkError,
    TargetError,
    TraceError,
    TrainModeError,
    UnknownOpWarning,
    UnknownParameterError,
    UnseenPathError,
    VerificationError,
)

X = torch.randn(2, 3)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


def message(error, match):
    return pytest.raises(error, match=match)


def test_a_dummy_input_of_the_wrong_type():
    with message(DummyInputError, "dummy_input is a int") as caught:
        OTO(mlp(), 3)
    assert "to fix" in str(caught.value) and "torch.randn" in str(caught.value)


def test_a_forward_that_fails_on_the_dummy_input():
    with message(TraceError, "Sequential.forward failed on the dummy input") as caught:
        OTO(mlp(), torch.randn(2, 4))
    assert "(2, 4)" in str(caught.value) and "to fix" in str(caught.value)


def test_a_parameter_name_that_does_not_exist_suggests_the_nearest():
    oto = OTO(mlp(), X)
    with message(UnknownParameterError, "no parameter is called, or matches, '0.wieght'") as caught:
        oto.mark_unprunable_by_param_names(["0.bias", "0.wieght"])
    assert "0.weight" in str(caught.value)
    assert any(group.prunable for group in oto.node_groups)  # nothing was marked
    oto.mark_unprunable_by_param_names(["0.*"])
    assert not any(group.prunable for group in oto.node_groups)


def test_nothing_prunable_says_why():
    with message(NothingPrunableError, "no node group of this model can lose an entry") as caught:
        OTO(nn.Linear(3, 2), X)
    assert "dimension of an output" in str(caught.value)


def test_a_target_that_cannot_be_reached_says_what_can():
    oto = OTO(mlp(), X, min_kept=4)
    schedule = {"lr": 0.1, "start_pruning_step": 1, "pruning_steps": 4, "pruning_periods": 2}
    with message(TargetError, r"0\.5"):
        oto.hesso(target_group_sparsity=0.75, **schedule)
    with message(TargetError, "in \\[0, 1\\)"):
        oto.hesso(target_group_sparsity=1.5, **schedule)
    with message(TargetError, "pruning_periods <= 2"):
        oto.hesso(lr=0.1, target_group_sparsity=0.5, start_pruning_step=1, pruning_steps=2, pruning_periods=5)
    with message(TargetError, r"ask for a share in \[0, 0\.5000\]"):
        oto.random_set_zero_groups(0.75)


def test_nan_in_a_parameter():
    model = mlp()
    oto = OTO(model, X)
    model[2].weight.data[0, 0] = float("nan")
    with message(NonFiniteParameterError, r"2\.weight"):
        oto.construct_subnet()
    with message(NonFiniteParameterError, r"2\.weight"):
        oto.hesso(lr=0.1, target_group_sparsity=0.5, start_pruning_step=1, pruning_steps=4, pruning_periods=2)


def test_an_out_dir_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with message(ArtifactError, "is a file"):
        OTO(mlp(), X).construct_subnet(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_slim_model_that_differs_is_not_handed_out(tmp_path, monkeypatch):
    from oto.axes import invariance

    monkeypatch.setattr(invariance, "_is_zero", lambda fact: True)  # believe that everything is zero
    model = nn.Sequential(nn.Linear(3, 8), nn.Sigmoid(), nn.Linear(8, 2))
    oto = OTO(model, X)
    oto.random_set_zero_groups(0.5)
    with message(VerificationError, "does not compute what the zeroed model computes") as caught:
        oto.construct_subnet(tmp_path / "out")
    assert "relative error" in str(caught.value) and "nothing was written" in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_graph_given_what_it_was_not_made_for():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = mlp()

        def forward(self, x, mask=None):
            y = self.layers(x.view(-1, 3) if x.shape[1] == 3 else x[:, :3])
            return y if mask is None else y * mask

    oto = OTO(Either(), X, allow_graph=True)
    oto.random_set_zero_groups(0.5)
    slim = oto.construct_subnet(emitter="graph").model
    with message(GraphInputError, "mask was passed, and the graph was made without it") as caught:
        slim(X, mask=torch.ones(2, 1))
    assert "nothing was computed" in str(caught.value) and "to fix     leave mask out" in str(caught.value)
    with message(GraphInputError, r"does not hold for these sizes: it was made where x.size\(\)\[1\] == 3") as caught:
        slim(torch.randn(2, 4))
    assert "x (2, 4)" in str(caught.value) and "to fix" in str(caught.value)


def test_a_graph_put_into_train_mode():
    oto = OTO(mlp(), X, allow_graph=True)
    oto.random_set_zero_groups(0.5)
    with message(GraphModeError, "a graph of the eval forward: it has no dropout") as caught:
        oto.construct_subnet(emitter="graph").model.train()
    assert "stays in eval mode" in str(caught.value) and "model.train_as_eval()" in str(caught.value)


def test_a_slim_model_put_into_train_mode_that_nobody_could_follow():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = mlp(), nn.Linear(8, 5)

        def forward(self, x, target=None):
            if self.training:
                return nn.functional.cross_entropy(self.head(self.body[1](self.body[0](x))), target)
            return self.body(x)

    oto = OTO(Head(), X)
    oto.random_set_zero_groups(0.5)
    with message(TrainModeError, "slim Head does not go into train mode: parts that only training") as caught:
        oto.construct_subnet().model.train()
    assert "drop_unreached=True" in str(caught.value) and "del model.train" in str(caught.value)


def test_a_call_that_is_told_sizes_on_another_path():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x, n=8):
            return self.b(self.a(x).relu().view(-1, n))

    oto = OTO(Sized(), X)
    oto.random_set_zero_groups(0.5)
    slim = oto.construct_subnet().model
    with message(UnseenPathError, r"view states \[2\] in the places \[1\], and not \[8\]") as caught:
        slim(X, n=2)
    assert "a different path" in str(caught.value) and "to fix" in str(caught.value)


def test_a_class_that_cannot_be_thinned():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.a(x).reshape(-1, 8))

    oto = OTO(Sized(), X, allow_graph=True)
    oto.random_set_zero_groups(0.5)
    with message(EmitterError, "Sized cannot be thinned as its own class"):
        oto.construct_subnet(emitter="module")
    with message(EmitterError, "emitter='onnx' is unknown"):
        oto.construct_subnet(emitter="onnx")


@pytest.fixture
def saved(tmp_path):
    oto = OTO(mlp(), X)
    oto.random_set_zero_groups(0.5)
    return oto.construct_subnet(tmp_path / "out").path


def test_a_damaged_artifact(saved):
    weights = saved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with message(DamagedArtifactError, "its content changed"):
        load_subnet(saved, mlp)


def test_an_artifact_of_an_unknown_version(saved):
    manifest = json.loads((saved / "oto.json").read_text())
    (saved / "oto.json").write_text(json.dumps({**manifest, "format": 7}))
    with message(ArtifactVersionError, "format 7"):
        load_subnet(saved)


def test_a_class_that_changed_since(saved):
    with message(ClassChangedError, r"0\.weight is \[9, 3\], and was \[8, 3\]"):
        load_subnet(saved, lambda: nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 2)))
    with message(ClassChangedError, "modules differ: 1"):
        load_subnet(saved, lambda: nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2)))
    with message(ClassChangedError, "this is torch.nn.modules.linear.Linear"):
        load_subnet(saved, nn.Linear(3, 2))


def test_the_code_of_a_class_that_changed_since(tmp_path, monkeypatch):
    from oto.io import subnet

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    oto = OTO(Net(), X)
    oto.random_set_zero_groups(0.5)
    path = oto.construct_subnet(tmp_path / "out").path
    monkeypatch.setattr(subnet, "_code", lambda kind: "other")
    with message(ClassChangedError, "the code of .*Net changed since"):
        load_subnet(path, Net)
    assert load_subnet(path, Net, strict=False).a.out_features == 4


def test_a_folder_that_is_no_artifact(tmp_path):
    with message(ArtifactError, r"holds no oto\.json"):
        load_subnet(tmp_path)


def test_an_operator_nobody_described():
    @torch.library.custom_op("oto_tests::twist", mutates_args=())
    def twist(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.numpy(force=True)[..., ::-1].copy())

    @twist.register_fake
    def _(x):
        return torch.empty_like(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.c(torch.relu(self.b(twist(self.a(x)))))

    with pytest.warns(UnknownOpWarning, match=r"no rule for oto_tests\.twist") as caught:
        oto = OTO(Net(), X)
    assert "stay whole" in str(caught[0].message) and "test_messages.py" in str(caught[0].message)
    assert [g.name for g in oto.node_groups if g.prunable] == ["b.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownOpWarning)
        oto.random_set_zero_groups(0.5)
        assert oto.construct_subnet().max_error < 1e-10


def test_masks_that_leave_the_bias():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    rows = torch.tensor([0, 1] * 4)
    prune.custom_from_mask(model[0], "weight", rows[:, None].expand(8, 3))
    with pytest.warns(NotPrunedWarning, match=r"masks counts as zero \(0\.weight_orig\), .* each bias with its row"):
        OTO(model, X).construct_subnet()


def test_an_operator_with_two_rules():
    with message(DuplicateRuleError, "has a rule already"):
        register_rule(torch.ops.aten.relu)(lambda call, x: x)


def test_an_operator_of_ones_own_may_be_called_like_torchs():
    @torch.library.custom_op("oto_tests::add", mutates_args=())
    def add(x: torch.Tensor) -> torch.Tensor:
        return x + 0

    register_rule(torch.ops.oto_tests.add)(lambda call, x: call.identity(x))


def test_what_can_be_done_about_it_comes_first():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.a, self.b = nn.Conv2d(3, 64, 9), nn.Linear(3, 8), nn.Linear(8, 2)
            self.spare = nn.Linear(2, 2)

        def forward(self, x):
            return self.b(torch.relu(self.a(x.mean((2, 3))))), self.image(x)

    oto = OTO(Net(), torch.randn(1, 3, 9, 9))
    oto.mark_unprunable_by_param_names(["a.weight"])
    reasons = [line for line in str(oto.explain()).splitlines()[3:] if "it " in line]
    order = ["was marked", "never uses", "of an output", "kernel"]
    places = [next(i for i, line in enumerate(reasons) if text in line) for text in order]
    assert places == sorted(places), "\n".join(reasons)

    with message(NothingPrunableError, "no node group") as caught:
        OTO(Net(), torch.randn(1, 3, 9, 9), skip_patterns=["a"])
    lines = str(caught.value).splitlines()
    assert "skip_patterns names it" in lines[1] and "take back what was asked" in str(caught.value)
    assert "kernel" not in lines[2]


def test_what_torch_export_says_is_cut():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            h = torch.relu(self.a(x))
            if h.sum() > 0:  # the line that is named
                h = h + 1
            return self.b(h.view(-1, 8))

    oto = OTO(Loop(), X)
    oto.random_set_zero_groups(0.5)
    with message(EmitterError, "torch.export cannot follow Loop") as caught:
        oto.construct_subnet(emitter="graph")
    text = str(caught.value)
    assert f"at      {__file__}:" in text and "depends on values" in text and "to fix" in text
    assert len(text) < 900 and "u0" not in text


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_scripted_module_is_named():
    with message(TraceError, r"^1 is TorchScript \(RecursiveScriptModule\)"):
        OTO(nn.Sequential(nn.Linear(4, 8), torch.jit.script(nn.Linear(8, 2))), X)


def test_a_lazy_module_that_never_ran():
    with message(TraceError, r"have no shape yet: 0\.weight, 0\.bias") as caught:
        OTO(nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 2)), X)
    assert "to fix" in str(caught.value) and "effect" in str(caught.value)


def test_a_model_that_cannot_get_smaller_in_training():
    oto = OTO(mlp(), X)
    with message(ShrinkError, "no optimizer that knows what is pruned: Adam is not one") as caught:
        oto.shrink(torch.optim.Adam(oto.model.parameters()))
    assert "nothing was changed" in str(caught.value) and "oto.hesso" in str(caught.value)
