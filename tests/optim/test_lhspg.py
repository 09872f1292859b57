"""LHSPG: the box step by step, what criteria see of a weight with its adapter, and slim adapters of peft at the end."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from oto import OTO
from oto.adapters import slim_adapters
from oto.errors import OptionError
from oto.groups.adapters import Adapter, adapters
from oto.optim import CRITERIA
from oto.optim.saliency import raw_scores
from tests.optim.test_series import BASES
from tests.optim.toy import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft
START, STEPS, PERIODS = 2, 15, 3
END = START + STEPS
SCALE = 0.5
WHEN = {"start_pruning_step": START, "pruning_steps": STEPS, "pruning_periods": PERIODS}


class Low(nn.Module):
    """A frozen layer with an adapter beside it, by nobody's class."""

    def __init__(self, width: int, out: int, rank: int = 2) -> None:
        super().__init__()
        self.base, self.down = nn.Linear(width, out), nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, out, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + SCALE * self.up(self.down(F.dropout(x, 0.0, self.training)))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Low(8, 12), nn.GELU(), Low(12, 10), nn.GELU(), nn.Linear(10, 3)).double()


def batch(n: int):
    source = torch.Generator().manual_seed(n)
    x = torch.randn(16, 8, generator=source, dtype=torch.float64)
    return x, torch.randint(3, (16,), generator=source)


def backward(model: nn.Module, n: int):
    x, y = batch(n)
    model.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def train(model, optimizer, steps, then=lambda n: None) -> None:
    for n in steps:
        backward(model, n)
        optimizer.step()
        then(n)


def prepared(model: nn.Module, **options):
    oto = OTO(model, torch.zeros(1, 8, dtype=torch.float64), prune_frozen=True)
    options = {"lr": 0.3, "target_group_sparsity": 0.5} | WHEN | options
    return oto, oto.lhspg(**options)


# The box -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 0.6])
def test_step_by_step(epsilon: float) -> None:
    """Against the box of the module, written a group at a time; which groups are redundant is asked."""
    model, plain = net(), net()
    _, optimizer = prepared(model, epsilon=epsilon)
    p = dict(plain.named_parameters())
    projected, zero = 0, {0: set(), 2: set()}
    for t in range(END + 2):
        backward(model, t)
        optimizer.step()
        backward(plain, t)
        if optimizer.schedule.starts_period(t):
            chosen = optimizer.redundant_groups
            going = {i: chosen.get(f"{i}.base.weight", torch.zeros(0)).tolist() for i in zero}
        with torch.no_grad():
            in_period = optimizer.schedule.period(t)
            left = optimizer.schedule.bounds(in_period)[1] - t if in_period is not None else 0  # T - t

            def merge(i, g):
                p[f"{i}.base.weight"][g] += SCALE * p[f"{i}.up.weight"][g] @ p[f"{i}.down.weight"]
                p[f"{i}.up.weight"][g] = 0

            before = {}
            for i in zero if left else ():
                for g in going[i]:
                    if optimizer.schedule.starts_period(t):
                        merge(i, g)
                    before[i, g] = torch.cat([p[f"{i}.base.weight"][g], p[f"{i}.base.bias"][g : g + 1]])
            for own in p.values():
                if own.grad is not None:
                    own -= 0.3 * own.grad
            for (i, g), x in before.items():
                merge(i, g)
                new = torch.cat([p[f"{i}.base.weight"][g], p[f"{i}.base.bias"][g : g + 1]])
                if x.norm() > 0:
                    new = new - (x.norm() / left) * x / x.norm()
                if torch.dot(new, x) <= epsilon * x.norm() ** 2:
                    projected += left > 1 and x.norm() > 0
                    new = torch.zeros_like(new)
                p[f"{i}.base.weight"][g], p[f"{i}.base.bias"][g] = new[:-1], new[-1]
                zero[i] |= {g} if left == 1 else set()
            for i, gone in zero.items():
                for g in gone:
                    for name in ("base.weight", "base.bias", "up.weight"):
                        p[f"{i}.{name}"][g] = 0
                    for reader in {0: ("2.base.weight", "2.down.weight"), 2: ("4.weight",)}[i]:
                        p[reader][:, g] = 0  # GELU(0) = 0, so nothing is read there: the group is quiet
        for name, own in model.named_parameters():
            torch.testing.assert_close(own, p[name], rtol=0, atol=1e-11, msg=f"{name} after step {t}")
    assert optimizer.num_pruned == sum(map(len, zero.values())) == 11
    assert (projected > 0) == (epsilon > 0)


def test_rows_that_stay_keep_their_base_to_the_last_bit_and_learn_through_the_adapter() -> None:
    model, before = net(), net()
    oto, optimizer = prepared(model, variant="adamw", lr=0.02)
    with torch.no_grad():
        for part in (0, 2):
            model[part].up.weight.zero_()
    train(model, optimizer, range(END + 3))
    for part in (0, 2):
        weight, up = model[part].base.weight, model[part].up.weight
        gone = (weight == 0).all(1)
        assert 0 < gone.sum() < len(gone) and (up[gone] == 0).all() and (model[part].base.bias[gone] == 0).all()
        read = (weight != 0).any(0)  # columns of atoms that are gone read nothing
        assert weight[~gone][:, read].equal(before[part].base.weight[~gone][:, read]) and up[~gone].any(1).all()
    subnet = oto.construct_subnet()
    x = batch(99)[0]
    torch.testing.assert_close(subnet.model(x), model.eval()(x), rtol=0, atol=1e-12)
    assert subnet.model[0].up.weight.shape == (int((model[0].base.weight != 0).any(1).sum()), 2), "ranks stay whole"


def test_merging_what_is_redundant_changes_no_output() -> None:
    model = net()
    _, optimizer = prepared(model)
    train(model, optimizer, range(START))
    backward(model, START)
    optimizer.choose_redundant(1.0)
    x = batch(5)[0]
    expected, up = model(x), model[0].up.weight.clone()
    optimizer.absorb_()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-13)
    assert not model[0].up.weight.equal(up)


@pytest.mark.parametrize("base", [base for base in BASES if base != "muon"])  # which takes no biases
def test_with_nothing_to_remove_every_step_is_the_wrapped_one(base: str) -> None:
    ours, theirs = net(), net()
    _, optimizer = prepared(ours, base=BASES[base], lr=0.01, target_group_sparsity=0.0)
    train(ours, optimizer, range(END))
    train(theirs, BASES[base](theirs.parameters(), lr=0.01), range(END))
    assert_same(ours, theirs)


@pytest.mark.parametrize("base", [base for base in BASES if base != "muon"])
def test_over_any_optimizer_the_target_is_met_and_adapters_learn(base: str) -> None:
    model = net()
    up = model[0].up.weight.clone()
    _, optimizer = prepared(model, base=BASES[base], lr=0.01)
    train(model, optimizer, range(END + 2))
    assert optimizer.num_pruned == 11 and not model[0].up.weight.equal(up)


@pytest.mark.parametrize("saliency", [None, "taylor_first_order"])
def test_a_resumed_run_is_the_same_to_the_last_bit(saliency: str | None) -> None:
    through, states = net(), {}
    options = {"variant": "adamw", "lr": 0.02, "saliency": saliency}
    _, reference = prepared(through, **options)

    def save(n):
        if n + 1 in (START - 1, START + 3, START + 5, END - 1, END + 1):
            states[n + 1] = buffer = io.BytesIO()
            torch.save({"model": through.state_dict(), "optimizer": reference.state_dict()}, buffer)

    train(through, reference, range(END + 3), then=save)
    assert reference.num_pruned == 11
    for stop, buffer in states.items():
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        model = net()
        _, optimizer = prepared(model, **options)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        train(model, optimizer, range(stop, END + 3))
        assert_same(model, through)
        assert optimizer.history == reference.history


def test_shrinking_while_it_trains_stays_on_the_trajectory() -> None:
    full, slim = net(), net()
    runs = [prepared(model, variant="adamw", lr=0.02) for model in (full, slim)]
    for n in range(END + 3):
        losses = []
        for model, (_, optimizer) in zip((full, slim), runs, strict=True):
            losses.append(backward(model, n).item())
            optimizer.step()
        assert losses[1] == pytest.approx(losses[0], rel=1e-9)  # float64, sums in another order
        if n in (START + 6, START + 10):
            runs[1][0].shrink(runs[1][1])
    assert runs[0][0].construct_subnet().cost_after == runs[1][0].construct_subnet().cost_after


class Around(nn.Module):
    """Branches of frozen layers with adapters, which may go as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(8, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(nn.Sequential(Low(6, 10), nn.GELU(), Low(10, 6)) for _ in range(4))

    def forward(self, x):
        x = self.into(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.mark.parametrize("mode", ["erase", "both"])
def test_segments_leave_before_the_choices_are_over(mode) -> None:
    runs = []
    for at in ((), (START + 6, START + 11)):
        torch.manual_seed(0)
        model, losses = Around().double(), []
        oto = OTO(model, torch.zeros(1, 8, dtype=torch.float64), compress_mode=mode, prune_frozen=True)
        options = {"target_macs": 0.5, "variant": "adamw", "lr": 0.02}
        optimizer = oto.lhspg(**options, **WHEN)
        for n in range(END + 3):
            losses.append(backward(model, n).item())
            optimizer.step()
            if n in at:
                oto.shrink(optimizer)
                assert mode == "both" or len(list(model.parameters())) < len(list(Around().parameters()))
        subnet = oto.construct_subnet()
        x = batch(0)[0]
        torch.testing.assert_close(subnet.model(x), model(x))
        runs.append((losses, subnet))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-9)
    assert runs[1][1].emitter == "module" and runs[1][1].cost_after == runs[0][1].cost_after


# What criteria see ---------------------------------------------------------------------------------------------------


def test_criteria_see_the_weight_with_its_adapter() -> None:
    model = net()
    _, optimizer = prepared(model)
    backward(model, 0)
    low, first = model[0], optimizer.node_groups[0]
    assert [group.name for group in optimizer.node_groups] == ["0.base.weight", "2.base.weight"]
    up, down = low.up.weight, low.down.weight
    rows = torch.cat([low.base.weight + SCALE * up @ down, low.base.bias[:, None]], 1)
    slope = up.grad @ down + up @ down.grad  # along which a step moves the product
    entries = optimizer.entries()
    found = {name: raw_scores(entries, CRITERIA[name], torch.device("cpu"))[: first.size] for name in CRITERIA}
    torch.testing.assert_close(found["magnitude"], rows.norm(dim=1), rtol=1e-12, atol=0)
    torch.testing.assert_close(found["avg_magnitude"], rows.norm(dim=1) / 9, rtol=1e-12, atol=0)
    torch.testing.assert_close(found["taylor_first_order"], (rows[:, :8] * slope).sum(1).abs(), rtol=1e-12, atol=0)


def test_the_default_goes_by_magnitude_and_is_not_fooled_by_either_part() -> None:
    model = net()
    with torch.no_grad():  # rows that are great in both parts, and next to nothing together
        for g in (1, 4):
            model[0].base.weight[g] = -SCALE * 99.9 * model[0].up.weight[g] @ model[0].down.weight
            model[0].base.bias[g] = 0
            model[0].up.weight[g] *= 100
        model[2].base.weight[:, 7] = model[2].down.weight[:, 7] = 0  # the loss has no slope there, but it is not small
        model[0].up.weight[7] = 0
    _, optimizer = prepared(model, target_group_sparsity=2.5 / 22, start_pruning_step=0, pruning_periods=1)
    train(model, optimizer, range(1))
    assert {name: own.tolist() for name, own in optimizer.redundant_groups.items()} == {"0.base.weight": [1, 4]}


# What is an adapter --------------------------------------------------------------------------------------------------


def found_in(model: nn.Module, x) -> list[Adapter]:
    return list(adapters(OTO(model, x, prune_frozen=True)._analysis.graph))


def test_adapters_are_found_by_their_calls() -> None:
    x = torch.zeros(1, 8, dtype=torch.float64)
    assert found_in(net(), x) == [
        Adapter(f"{i}.base.weight", f"{i}.down.weight", f"{i}.up.weight", SCALE, turned=False) for i in (0, 2)
    ]
    trained, frozen, shared = net(), net(), net()
    trained[0].base.requires_grad_(True)
    frozen[0].up.requires_grad_(False)
    shared[2].down.weight = nn.Parameter(torch.randn(2, 12).double())
    for model in (trained, frozen):
        assert [a.weight for a in found_in(model, x)] == ["2.base.weight"]

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.low, self.out = Low(8, 8).double(), nn.Linear(8, 2).double()

        def forward(self, x):
            return self.out(torch.relu(self.low(torch.relu(self.low(x)))))

    assert found_in(Twice(), x) == [], "what is read twice may not be merged into"


def test_it_says_what_it_needs() -> None:
    x = torch.zeros(1, 8, dtype=torch.float64)
    options = {"lr": 0.1, "target_params": 0.6, "total_steps": 20}
    with pytest.raises(OptionError, match=r"leaves those as they are[^$]*prune_frozen=True\)\.lhspg"):
        OTO(net(), x).lhspg(**options)
    plain = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    with pytest.raises(OptionError, match=r"has no adapter[^$]*use_dora=False[^$]*dequantize"):
        OTO(plain, x, prune_frozen=True).lhspg(**options)
    for epsilon in (-0.1, 1.0):
        with pytest.raises(OptionError, match="epsilon is"):
            prepared(net(), epsilon=epsilon)
    with pytest.raises(OptionError, match="have no option adapters"):
        OTO(net(), x, prune_frozen=True).lhspg(adapters=(), **options)


def test_the_groups_that_matter_most_stay_whole_and_measuring_leaves_the_model_as_it_was() -> None:
    model = net()
    with torch.no_grad():
        model[4].weight *= 30  # what is before it matters, however small its own weights are
    oto = OTO(model, torch.zeros(1, 8, dtype=torch.float64), prune_frozen=True)
    before = copy.deepcopy(model).train()
    model.train()
    batches = [batch(n) for n in range(3)]

    def loss(m, pair):
        assert not m.training
        return F.cross_entropy(m(pair[0]), pair[1])

    found = oto.mark_unprunable_by_knowledge(batches=batches, loss=loss, share=0.5)
    assert_same(model, before)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert [m.groups for m in found.found] == [("2.base.weight",), ("0.base.weight",)], "ranks are not measured"
    assert [m.whole for m in found.found] == [True, False] and found.found[0].rise > found.found[1].rise
    entries = dict(before.named_parameters())  # by hand: a quarter and half of the ten rows with the least norm
    rows = entries["2.base.weight"] + SCALE * entries["2.up.weight"] @ entries["2.down.weight"]
    order = torch.cat([rows, entries["2.base.bias"][:, None]], 1).norm(dim=1).argsort()
    rises = []
    for many in (2, 5):
        thin = copy.deepcopy(before).eval()
        with torch.no_grad():
            for own in (thin[2].base.weight, thin[2].base.bias, thin[2].up.weight):
                own[order[:many]] = 0
            rises.append(sum(float(loss(thin, b) - loss(before.eval(), b)) for b in batches) / 3)
    assert found.found[0].rise == pytest.approx(sum(rises) / 2, rel=1e-9)
    assert "whole" in str(found) and "2.base.weight" in str(found)
    assert [g.name for g in oto.lhspg(lr=0.1, target_params=0.9, total_steps=20).node_groups] == ["0.base.weight"]
    for options in ({"share": 1.0}, {"levels": ()}, {"batches": []}):
        with pytest.raises(OptionError, match="nothing was measured"):
            OTO(net(), torch.zeros(1, 8).double()).mark_unprunable_by_knowledge(
                **{"batches": batches, "loss": loss} | options
            )


# With peft -----------------------------------------------------------------------------------------------------------

peft = pytest.importorskip("peft")


class Mixed(nn.Module):
    """An embedding, a linear layer and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(30, 16), nn.Linear(16, 12)
        self.conv, self.head = nn.Conv1d(12, 10, 3, padding=1), nn.Linear(10, 3)

    def forward(self, input_ids, labels=None):
        x = torch.relu(self.inner(self.embed(input_ids)))
        logits = self.head(torch.relu(self.conv(x.transpose(1, 2))).mean(2))
        return logits if labels is None else (F.cross_entropy(logits, labels), logits)


def mixed(**options):
    return peft.get_peft_model(Mixed(), peft.LoraConfig(r=2, target_modules=["embed", "inner", "conv"], **options))


def small(kind: str, config: str, **more):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return getattr(transformers, kind)(getattr(transformers, config)(**sizes, num_attention_heads=4, **more))


def llama(**options):
    model = small("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2)
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options))


def bert(**options):
    model = small("BertForSequenceClassification", "BertConfig", num_labels=3)
    config = peft.LoraConfig(r=4, target_modules=["query", "value", "dense"], task_type="SEQ_CLS", **options)
    return peft.get_peft_model(model, config)


class Residual(nn.Module):
    """Branches whose last layer is a frozen one with an adapter."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 12), nn.Linear(12, 3)
        self.blocks = nn.ModuleList(nn.Sequential(Low(12, 16), nn.GELU(), Low(16, 12)) for _ in range(blocks))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def residual() -> Residual:
    torch.manual_seed(0)
    return Residual().double()


def test_a_segment_is_a_group_of_the_box() -> None:
    """As step by step above, with all of a branch's last weight and its adapter as the one group."""
    model, plain = residual(), residual()
    oto = OTO(model, torch.zeros(1, 8, dtype=torch.float64), prune_frozen=True, compress_mode="erase")
    optimizer = oto.lhspg(lr=0.3, target_macs=0.8, start_pruning_step=2, pruning_steps=5, pruning_periods=1)
    assert [g.name for g in oto.node_groups if g.segment and g.prunable] == ["blocks.0", "blocks.1", "blocks.2"]
    halves = {g.name for g in oto.node_groups if g.segment and "with the other half" in (g.reason or "")}
    assert halves == {f"blocks.{i}.{j}.{half}" for i in range(3) for j in (0, 2) for half in ("base", "up")}
    p = dict(plain.named_parameters())
    going: list[str] = []

    def operator(name: str) -> torch.Tensor:
        own = {key: p[f"{name}.2.{key}"] for key in ("base.weight", "base.bias", "up.weight", "down.weight")}
        own["base.weight"] += SCALE * own["up.weight"] @ own["down.weight"]
        own["up.weight"].zero_()
        return torch.cat([own["base.weight"].flatten(), own["base.bias"]])

    for t in range(9):
        backward(model, t)
        optimizer.step()
        backward(plain, t)
        with torch.no_grad():
            left = 7 - t if 2 <= t < 7 else 0  # T - t
            going = list(optimizer.redundant_groups) if t == 2 else going
            before = [operator(name) for name in going] if left else []
            for own in p.values():
                if own.grad is not None:
                    own -= 0.3 * own.grad
            for name, x in zip(going, before, strict=False):
                new = operator(name) - x / left
                new = torch.zeros_like(new) if new @ x <= 0 else new
                p[f"{name}.2.base.weight"][:], p[f"{name}.2.base.bias"][:] = new[:-12].view(12, 16), new[-12:]
            for name in going if t >= 6 else ():
                for key in ("base.weight", "base.bias", "up.weight"):
                    p[f"{name}.2.{key}"].zero_()
        for name, own in model.named_parameters():
            torch.testing.assert_close(own, p[name], rtol=0, atol=1e-12)
    assert len(going) == 1
    subnet = oto.construct_subnet()
    assert [s.name for s in oto.partition.erased(subnet.kept)] == going and subnet.max_error <= 1e-12


def test_segments_and_rows_in_one_budget() -> None:
    model = residual()
    oto = OTO(model, torch.zeros(1, 8, dtype=torch.float64), prune_frozen=True, compress_mode="both")
    optimizer = oto.lhspg(lr=0.1, target_macs=0.4, **WHEN)
    train(model, optimizer, range(END + 2))
    assert {name for name in optimizer.pruned_groups if name.count(".") == 1} & {f"blocks.{i}" for i in range(3)}
    subnet = oto.construct_subnet()
    assert subnet.cost_after.macs <= 0.4 * subnet.cost_before.macs and subnet.max_error <= 1e-12
    assert "computes nothing" in str(subnet.model)


MODELS = {
    "conv": functools.partial(mixed, modules_to_save=["head"], lora_dropout=0.1),
    "llama": llama,
    "bert": functools.partial(bert, use_rslora=True),  # its classifier is trained whole
}


def logits_of(model: nn.Module, ids):
    with torch.no_grad():
        out = model.eval()(input_ids=ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def slimmed(model, ids, layout=None, steps=10):
    oto = OTO(model, {"input_ids": ids}, prune_frozen=True, layout=layout)
    optimizer = oto.lhspg(
        variant="adamw", lr=5e-3, target_params=0.65, start_pruning_step=1, pruning_steps=6, pruning_periods=2
    )
    labels = ids if "Llama" in type(model.get_base_model()).__name__ else ids[:, 0] % 3
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(input_ids=ids, labels=labels)
        (out[0] if isinstance(out, tuple) else out.loss).backward()
        optimizer.step()
    cost = optimizer.progress.cost
    assert cost <= optimizer.choice.target.goal
    subnet = oto.construct_subnet()
    torch.testing.assert_close(logits_of(subnet.model, ids), logits_of(model, ids), rtol=0, atol=1e-5)
    assert subnet.cost_after.params == cost < subnet.cost_before.params
    return subnet.model


@pytest.mark.parametrize("name", MODELS)
def test_slim_adapters_are_adapters_of_the_slim_base(name: str, tmp_path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    ids = torch.randint(30, (4, 6))
    slim = slimmed(model, ids)
    expected = logits_of(slim, ids)
    adapted = slim_adapters(slim)
    assert type(adapted) is type(model) and type(adapted.get_base_model()) is type(model.get_base_model())
    torch.testing.assert_close(logits_of(adapted, ids), expected, rtol=0, atol=1e-6)
    assert any(p.requires_grad for p in adapted.parameters())
    adapted.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    base = copy.deepcopy(adapted).unload()
    assert not any("base_layer" in key for key in base.state_dict())
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits_of(again, ids), expected, rtol=0, atol=1e-6)
    merged = copy.deepcopy(adapted).merge_and_unload()
    torch.testing.assert_close(logits_of(merged, ids), expected, rtol=0, atol=1e-5)


def test_with_a_layout_base_and_adapters_load_without_oto(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, ids = llama(), torch.randint(30, (4, 6))
    slim = slimmed(model, ids, layout="uniform")
    adapted = slim_adapters(slim)
    adapted.save_pretrained(tmp_path / "adapters")
    adapted.unload().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert base.config.intermediate_size < 48
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapters")
    torch.testing.assert_close(logits_of(again, ids), logits_of(slim, ids), rtol=0, atol=1e-6)
    other = slim_adapters(slim, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    torch.testing.assert_close(logits_of(other, ids), logits_of(slim, ids), rtol=0, atol=1e-6)
    with pytest.raises(OptionError, match=r"layers of other sizes than the slim model: \S+q_proj"):
        slim_adapters(slim, small("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2))


def test_ranks_that_went_are_stated_each(tmp_path) -> None:
    """HESSO takes ranks like all else; what is left of them loads."""
    torch.manual_seed(0)
    model, ids = mixed(init_lora_weights=False), torch.randint(30, (4, 6))
    oto = OTO(model, {"input_ids": ids}, prune_frozen=True)
    with torch.no_grad():
        model.base_model.model.inner.lora_A["default"].weight[0] = 0
    slim = oto.construct_subnet().model
    adapted = slim_adapters(slim)
    assert adapted.peft_config["default"].rank_pattern["inner"] == 1
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(adapted).unload(), tmp_path)
    for other in (adapted, again):
        torch.testing.assert_close(logits_of(other, ids), logits_of(model, ids), rtol=0, atol=1e-6)


def test_several_adapters_at_once_are_one_operator() -> None:
    torch.manual_seed(0)
    model, ids = mixed(init_lora_weights=False), torch.randint(30, (4, 6))
    other = peft.LoraConfig(r=3, target_modules=["inner"], init_lora_weights=False)
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    oto = OTO(model, {"input_ids": ids}, prune_frozen=True)
    assert [a.weight.split(".")[2] for a in adapters(oto._analysis.graph)].count("inner") == 2
    optimizer = oto.lhspg(lr=0.01, target_group_sparsity=0.5, start_pruning_step=0, pruning_steps=4, pruning_periods=1)
    F.cross_entropy(model.eval()(ids), ids[:, 0] % 3).backward()
    optimizer.choose_redundant(1.0)
    expected = logits_of(model, ids)
    optimizer.absorb_()
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=0, atol=1e-6)
    inner = model.base_model.model.inner
    gone = optimizer.redundant_groups["base_model.model.inner.base_layer.weight"]
    assert all((inner.lora_B[name].weight[gone] == 0).all() for name in ("default", "other"))
    with pytest.raises(OptionError, match=r"2 adapters: default, other[^$]*delete_adapter"):
        slim_adapters(model)


@pytest.mark.filterwarnings("ignore:TorchaoLora:UserWarning")  # that it cannot be merged
def test_what_cannot_be_done_is_refused_with_what_to_do() -> None:
    options = {"lr": 0.1, "target_params": 0.6, "total_steps": 20}
    ids = torch.randint(30, (4, 6))
    with pytest.raises(OptionError, match="use_dora=False"):
        OTO(mixed(use_dora=True), {"input_ids": ids}, prune_frozen=True, allow_graph=True).lhspg(**options)
    merged = mixed()
    merged.merge_adapter()
    with pytest.raises(OptionError, match="not merged"):
        OTO(merged, {"input_ids": ids}, prune_frozen=True).lhspg(**options)
    quantization = pytest.importorskip("torchao.quantization")
    base = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 3))
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig(), lambda m, name: name == "0")
    quantized = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(OptionError, match=r"0\.base_layer\.weight is of the class \w+[^$]*dequantize the base"):
        OTO(quantized, torch.randn(2, 64), prune_frozen=True).lhspg(**options)
    with pytest.raises(OptionError, match=r"Mixed has no adapters of peft[^$]*subnet\.model"):
        slim_adapters(Mixed())
    scaled = peft.get_peft_model(Mixed(), peft.IA3Config(target_modules=["inner"], feedforward_modules=[]))
    with pytest.raises(OptionError, match=r"of the kind IA3[^$]*merge_and_unload"):
        slim_adapters(scaled)
