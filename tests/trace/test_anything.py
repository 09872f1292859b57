"""What users wrap, hook, compile and compute by hand: the same groups, and an exact slim model or a reason."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from oto import OTO
from oto.errors import EmitterError, TraceError
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def mlp(width=8, out=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, out))


class Around(nn.Module):
    """Two linear layers, or three, and ``between`` called on what the first gives."""

    def __init__(self, between, middle=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(4, 8), middle or nn.Identity(), nn.Linear(8, 3)
        self.between = between

    def forward(self, x):
        return self.last(torch.relu(self.middle(self.between(self.first(x)))))


def prunable(oto):
    return {group.name: group.size for group in oto.node_groups if group.prunable}


def slim_is_exact(model, given, emitters=("module", "graph")):
    """Half of everything goes, in float64; the groups that there were."""
    model, given = model.double(), given.double() if isinstance(given, torch.Tensor) else given
    oto = OTO(model, given, allow_graph="module" not in emitters)
    oto.random_set_zero_groups(0.5)
    for emitter in emitters:
        subnet = oto.construct_subnet(emitter=emitter)
        assert subnet.cost_after.params < subnet.cost_before.params
        assert relative_error(run(oto.model, given), run(subnet.model, given)) < 1e-12
    return prunable(oto)


class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (ctx.saved_tensors[0] > 0)


def compiled_by_decorator():
    return torch.compile(lambda x: torch.relu(x) * 2, backend="eager")


@pytest.mark.filterwarnings("ignore")  # of reentrant checkpoints, without a gradient
@pytest.mark.parametrize(
    "between",
    [
        Clamp.apply,
        compiled_by_decorator(),
        lambda x: checkpoint(torch.relu, x, use_reentrant=True),
        lambda x: checkpoint(torch.relu, x, use_reentrant=False),
        lambda x: torch.utils.checkpoint.checkpoint_sequential(nn.Sequential(nn.ReLU(), nn.ReLU()), 2, x),
    ],
    ids=["autograd.Function", "compiled", "reentrant", "checkpoint", "sequential"],
)
def test_functions_that_are_seen_through(between):
    assert slim_is_exact(Around(between), X) == {"first.weight": 8}


def test_vmap_is_seen_through():
    assert slim_is_exact(Around(torch.vmap(lambda row: torch.relu(row) * 2)), X, ["module"]) == {"first.weight": 8}


def with_data_parallel(model):
    return nn.DataParallel(model)


def with_ddp(model):
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


def with_compile(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


@pytest.mark.filterwarnings("ignore")  # of gloo, about the host's name
@pytest.mark.parametrize("wrap", [with_data_parallel, with_ddp, with_compile, compiled_in_place])
def test_wrappers_are_taken_off(wrap, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")  # no network is needed
    model = mlp().double()
    try:
        wrapped = wrap(model)
        assert slim_is_exact(wrapped, X) == {"0.weight": 8}
        assert OTO(wrapped, X.double()).model is model
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_a_compiled_submodule():
    inner = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend="eager")
    groups = slim_is_exact(Around(torch.relu, inner), X)
    assert groups == {"first.weight": 8, "middle._orig_mod.0.weight": 8}


def hooked(model):
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[2].register_forward_pre_hook(lambda module, args: (torch.tanh(args[0]),))
    return model


class Absolute(nn.Module):
    def forward(self, weight):
        return weight.abs()


def parametrized(model):
    parametrize.register_parametrization(model[0], "weight", Absolute())
    return model


def normalized(model):
    """Rows of length one, whatever is in them: a row of zeros would be 0/0, so it is the reader that goes to zero."""
    parametrizations.weight_norm(model[0])
    return model


def normalized_by_hook(model):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[0])
    return model


def spectral(model):
    parametrizations.spectral_norm(model[0])
    return model


def spectral_by_hook(model):
    nn.utils.spectral_norm(model[0])
    return model


def masked(model):
    torch.manual_seed(0)
    return prune.random_unstructured(model[0], "weight", 0.3) and model


@pytest.mark.parametrize(
    "change", [hooked, parametrized, normalized, normalized_by_hook, spectral, spectral_by_hook, masked]
)
def test_hooks_and_parametrizations(change):
    groups = slim_is_exact(change(mlp()), X)
    assert list(groups.values()) == [8]


def test_an_orthogonal_layer_stays_whole_and_its_readers_do_not():
    middle = parametrizations.orthogonal(nn.Linear(8, 8))
    oto = OTO(Around(torch.relu, middle).double(), X.double())
    whole = {g.name for g in oto.node_groups if not g.prunable}
    assert "middle.parametrizations.weight.original" in whole and prunable(oto) == {"last.weight": 8}


def branch(x):
    return torch.cond(x.sum() > 0, lambda t: t * 2, lambda t: t + 1, (x,))


def test_cond_is_left_whole():
    assert slim_is_exact(Around(branch, nn.Linear(8, 8)), X) == {"middle.weight": 8}
    oto = OTO(Around(branch, nn.Linear(8, 8)), X)
    blamed = [w for w in oto.explain().whole if w.operator == "cond"]
    assert len(blamed) == 2 and {w.reason for w in blamed} == {"a value decides which branch runs"}
    assert all(w.source.startswith(__file__) for w in blamed)
    assert oto.coverage()["fixed"] == {"cond": 1} and not oto.coverage()["unknown"]


def test_layers_inside_of_cond_are_left_whole():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(4, 8), Around(torch.relu, nn.Linear(8, 8))

        def forward(self, x):
            return self.c(torch.cond(x.sum() > 0, self.a, self.b, (x,))[:, :4])

    assert slim_is_exact(Model(), X) == {"c.first.weight": 8, "c.middle.weight": 8}


def while_loop(x):
    from torch._higher_order_ops.while_loop import while_loop

    _, y = while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 2), (torch.zeros((), dtype=torch.long), x))
    return y


def scan(x):
    from torch._higher_order_ops.scan import scan

    return scan(lambda carry, y: (carry + y, carry * y), torch.zeros_like(x[0]), x, dim=0)[1]


def map_impl(x):
    from torch._higher_order_ops.map import map

    return map(torch.relu, x)


@pytest.mark.parametrize("loop", [while_loop, scan, map_impl])
def test_a_loop_over_tensors_is_left_whole(loop):
    oto = OTO(Around(loop, nn.Linear(8, 8)), X)
    assert prunable(oto) == {"middle.weight": 8} and oto.coverage()["fixed"] == {loop.__name__: 1}


def test_a_number_read_from_the_data_decides_how_often():
    class Model(Around):
        def forward(self, x):
            h = torch.relu(self.first(x))
            for _ in range(int(2 + 0 * x.abs().max().item())):
                h = torch.relu(self.middle(h))
            return self.last(h)

    oto = OTO(Model(None, nn.Linear(8, 8)).double(), X.double())
    assert "the graph follows the path that this example took" in str(oto.explain())
    oto.random_set_zero_groups(0.5)
    assert oto.construct_subnet(emitter="module").max_error < 1e-12


def test_what_comes_back_from_numpy_is_left_whole():
    def through_numpy(x):
        return torch.from_numpy(np.cumsum(x.detach().numpy()[..., ::-1], -1) + 1)

    assert slim_is_exact(Around(through_numpy, nn.Linear(8, 8)), X, ["module"]) == {"middle.weight": 8}
    oto = OTO(Around(through_numpy, nn.Linear(8, 8)), X)
    assert "its values were made outside torch" in str(oto.explain())


def test_sequences_of_different_lengths():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.lstm = nn.Embedding(20, 8), nn.LSTM(8, 12, batch_first=True, bidirectional=True)
            self.head = nn.Linear(24, 3)

        def forward(self, ids, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(self.embed(ids), lengths, batch_first=True, enforce_sorted=False)
            steps, (last, _) = self.lstm(packed)
            padded, _ = nn.utils.rnn.pad_packed_sequence(steps, batch_first=True)
            return self.head(padded), self.head(torch.cat([last[0], last[1]], -1))

    given = torch.randint(0, 20, (3, 6)), torch.tensor([6, 3, 4])
    assert sorted(slim_is_exact(Packed(), given, ["module"]).values()) == [8, 12]


def test_gradients_taken_inside_of_forward():
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                energy = self.b(torch.tanh(self.a(x))).sum()
                (force,) = torch.autograd.grad(energy, x, create_graph=True)
            return energy, force

    model = Energy()
    assert slim_is_exact(model, X, ["module"]) == {"a.weight": 8}
    assert model.a.weight.requires_grad and model.a.weight.grad is None


def test_autocast_inside_of_forward_is_not_dropped_in_silence():
    class Cast(Around):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    oto = OTO(Cast(torch.relu), X)
    oto.random_set_zero_groups(0.5)
    assert oto.construct_subnet().emitter == "module"
    with pytest.raises(EmitterError, match=r"turns torch\.autocast on"):
        oto.construct_subnet(emitter="graph")


def test_nested_containers_optional_inputs_and_none():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleDict({"first": nn.ModuleList([nn.Linear(4, 8)])})
            self.weights = nn.ParameterList([torch.randn(8, 8), torch.randn(8, 3)])
            self.biases = nn.ParameterDict({"b": torch.randn(8)})

        def forward(self, batch, *, mask=None, options=None):
            h = torch.relu(self.layers["first"][0](batch["images"][0][1]))
            if mask is not None:
                h = h * mask
            y = torch.relu(h @ self.weights[0] + self.biases["b"]) @ self.weights[1]
            return {"logits": [y, None], "loss": None, "about": (3, "text")}

    given = {"batch": {"images": [(None, X.double())]}, "mask": torch.ones(2, 1).double(), "options": None}
    assert sorted(slim_is_exact(Model(), given).values()) == [8, 8]


def test_random_numbers_keep_what_they_touch():
    class Variational(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encode, self.mean, self.spread = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(8, 6)
            self.decode = mlp()

        def forward(self, x):
            h = torch.relu(self.encode(x))
            z = self.mean(h) + torch.exp(self.spread(h)) * torch.randn(len(x), 6, dtype=x.dtype)
            return self.decode(z[:, :4])

    assert slim_is_exact(Variational(), X) == {"encode.weight": 8, "decode.0.weight": 8}
    oto = OTO(Around(lambda x: F.dropout(x, 0.5, True), nn.Linear(8, 8)), X)
    assert prunable(oto) == {"middle.weight": 8}


def test_tensors_held_in_plain_containers():
    class Model(Around):
        def __init__(self):
            super().__init__(torch.relu)
            self.scale, self.table = {"k": torch.full((8,), 2.0).double()}, torch.ones(8).double()

        def forward(self, x):
            return self.last(torch.relu(self.first(x) * self.scale["k"] * self.table))

    assert slim_is_exact(Model(), X, ["graph"]) == {"first.weight": 8}
    oto = OTO(Model().double(), X.double(), allow_graph=True)
    oto.random_set_zero_groups(0.5)
    assert oto.construct_subnet().emitter == "graph"  # the class cannot be thinned where a dict holds a tensor


def test_functional_call_inside_of_forward():
    class Model(Around):
        def forward(self, x):
            doubled = {name: p * 2 for name, p in self.middle.named_parameters()}
            h = torch.relu(self.first(x))
            return self.last(torch.relu(torch.func.functional_call(self.middle, doubled, (h,))))

    groups = slim_is_exact(Model(torch.relu, nn.Linear(8, 8)), X)
    assert groups == {"first.weight": 8, "middle.weight": 8}


def test_inputs_that_are_written_to():
    class Model(Around):
        def forward(self, x):
            x.add_(1)
            return super().forward(x)

    given = X.clone()
    assert slim_is_exact(Model(torch.relu), given) == {"first.weight": 8}
    assert torch.equal(given, X)


@pytest.mark.parametrize("make", [torch.fx.symbolic_trace, lambda m: torch.export.export(m, (X,)).module()])
def test_graph_modules_are_models(make):
    assert prunable(OTO(make(mlp()), X)) == {"0.weight": 8}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    oto = OTO(mlp().to(dtype), X.to(dtype))
    oto.random_set_zero_groups(0.5)
    assert oto.construct_subnet().model[0].weight.dtype == dtype and prunable(oto) == {"0.weight": 8}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_groups_and_the_slim_model_are_the_same():
    on_cpu, on_cuda = (OTO(mlp().double().to(device), X.double().to(device)) for device in ("cpu", "cuda"))
    assert on_cpu.node_groups == on_cuda.node_groups
    for oto in (on_cpu, on_cuda):
        oto.random_set_zero_groups(0.5)
    slim = [oto.construct_subnet().model.state_dict() for oto in (on_cpu, on_cuda)]
    assert all(torch.equal(t, slim[1][name].cpu()) and slim[1][name].is_cuda for name, t in slim[0].items())


def test_on_meta_there_are_groups_and_no_subnet():
    oto = OTO(mlp().to("meta"), X)
    assert prunable(oto) == {"0.weight": 8} and oto.compute_num_params() == 67
    with pytest.raises(EmitterError, match="meta device"):
        oto.construct_subnet()


@pytest.mark.filterwarnings("ignore")
def test_torchscript_says_what_to_give_instead():
    with pytest.raises(TraceError, match="Python module that it was made from"):
        OTO(torch.jit.trace(mlp(), X), X)
