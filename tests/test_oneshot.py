"""A smaller model without training."""

from __future__ import annotations

import copy
import json
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import oto.calibration
import oto.oneshot
from oto import OTO
from oto.errors import NoGradientError, NonFiniteParameterError, OptionError, TargetError
from oto.groups import cost
from oto.shards import gathered_tensor
from tests.optim.test_distributed import GLOO, begin


class Cnn(nn.Module):
    """Residual blocks with norms that count."""

    def __init__(self, blocks=2):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(12, 24, 3, padding=1, bias=False),
                nn.BatchNorm2d(24),
                nn.ReLU(),
                nn.Conv2d(24, 12, 1, bias=False),
                nn.BatchNorm2d(12),
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


class Encoder(nn.Module):
    """Patches, attention, and a head, as in a ViT."""

    def __init__(self, dim=16):
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 4, stride=4)
        layer = nn.TransformerEncoderLayer(dim, 4, 48, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(dim, 5)

    def forward(self, x):
        return self.head(self.layers(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def of_classes(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def of_tokens(model, batch):
    return model(input_ids=batch, labels=batch).loss


def learned(model, batches, loss, steps=40):
    """A little, so that there is something to lose."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, batches[step % len(batches)]).backward()
        optimizer.step()
    return model.eval()


def images(n=8, size=16):
    centers = torch.randn(5, 3, 8, 8)
    labels = [torch.randint(5, (size,)) for _ in range(n)]
    return [(centers[y] + 0.5 * torch.randn(size, 3, 8, 8), y) for y in labels]


def tokens(n=8):
    return [(torch.randint(50, (6, 1)) + torch.arange(12) * torch.randint(1, 4, (6, 1))) % 50 for _ in range(n)]


def made(kind):
    if kind == "llama":
        batches = tokens()
        return learned(llama(), batches, of_tokens), {"input_ids": batches[0][:1]}, batches, of_tokens
    batches = images()
    return learned(Cnn() if kind == "cnn" else Encoder(), batches, of_classes), batches[0][0][:1], batches, of_classes


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


@pytest.mark.parametrize("kind", ["cnn", "encoder", "llama"])
def test_it_meets_its_target_and_the_slim_model_is_of_its_class(kind):
    model, example, batches, loss = made(kind)
    oto = OTO(model, example)
    done = oto.one_shot(target_macs=0.7, batches=batches, loss=loss)
    assert done.before == cost(oto.partition) and done.after == cost(oto.partition, done.kept)
    assert done.after.macs <= 0.7 * done.before.macs
    with torch.no_grad():
        seen = sum(float(loss(model, batch)) for batch in batches[-2:]) / 2
    assert done.loss is not None and done.loss[1] == pytest.approx(seen, rel=1e-4)
    subnet = oto.construct_subnet()
    assert type(subnet.model) is type(model) and subnet.cost_after == done.after
    assert {n: len(k) for n, k in subnet.kept.items() if n in done.kept} == done.kept
    assert json.loads(json.dumps(done.to_dict()))["kept"] == done.kept
    assert "held-out loss" in str(done) and "<table>" in done._repr_html_()


@pytest.mark.parametrize(
    ("kind", "layers"), [("cnn", "blocks.*.0.weight"), ("encoder", "*linear1.weight"), ("llama", "*gate_proj.weight")]
)
def test_what_stays_takes_over(kind, layers):
    model, example, batches, loss = made(kind)
    other = copy.deepcopy(model)
    asked = {"target_kept": {layers: 0.5}, "batches": batches, "loss": loss, "saliency": "magnitude"}
    folded, zeroed = (
        OTO(m, example).one_shot(**asked, compensate=how) for m, how in ((model, "affine"), (other, None))
    )
    assert folded.kept == zeroed.kept
    assert folded.loss[0] == zeroed.loss[0] and folded.loss[1] < zeroed.loss[1]
    assert any(p.kept == "folded" and p.folded < p.zeroed for p in folded.portions)


@pytest.mark.parametrize("saliency", ["obs", "fluctuation", "sensitivity", "magnitude", None])
@pytest.mark.parametrize("target", [{"target_macs": 0.6}, {"target_params": 0.7}, {"target_kept": {"*conv*": 0.5}}])
def test_every_way_to_choose_and_every_unit(saliency, target):
    model, example, batches, loss = made("cnn")
    if "target_kept" in target:
        target = {"target_kept": {"blocks.*.0.weight": 0.5}}
    done = OTO(model, example).one_shot(**target, batches=batches, loss=loss, saliency=saliency, portions=2)
    if "target_kept" in target:
        assert [n for g, n in done.kept.items() if g.startswith("blocks")] == [12, 12]
    else:
        unit = next(iter(target)).removeprefix("target_")
        assert getattr(done.after, unit) <= target[f"target_{unit}"] * getattr(done.before, unit)
    assert (saliency or "gradients") in done.how or saliency == "magnitude"


def test_uniform_blocks_stay_uniform():
    model, example, batches, loss = made("llama")
    oto = OTO(model, example, layout="uniform")
    oto.one_shot(target_macs=0.8, batches=batches, loss=loss, saliency="obs")
    subnet = oto.construct_subnet()
    assert subnet.emitter == "config" and subnet.config["intermediate_size"] < 64


@pytest.mark.parametrize("saliency", ["obs", "fluctuation"])
def test_what_looks_at_readers_does_not_compare_channels_with_segments(saliency):
    torch.manual_seed(0)
    batches = images()
    model = Cnn(3)
    before = state(model)
    oto = OTO(model, batches[0][0][:1], compress_mode="both")
    with pytest.raises(OptionError, match=f"saliency='{saliency}'.*cannot be compared(.|\n)*saliency='sensitivity'"):
        oto.one_shot(target_macs=0.5, batches=batches, loss=of_classes, saliency=saliency)
    assert same(state(model), before)


IN_ONE_BUDGET = [("erase", s) for s in ("obs", "fluctuation", "sensitivity", "magnitude", None)]
IN_ONE_BUDGET += [("both", s) for s in ("sensitivity", "magnitude", None)]


@pytest.mark.parametrize(("mode", "saliency"), IN_ONE_BUDGET)
def test_segments_and_channels_in_one_budget(mode, saliency):
    torch.manual_seed(0)
    batches = images()
    model = learned(Cnn(4), batches, of_classes).double()
    batches = [(x.double(), y) for x, y in batches]
    oto = OTO(model, batches[0][0][:1], compress_mode=mode, min_kept=0.7)
    share = 0.6 if mode == "erase" else 0.35  # which channels alone do not meet
    done = oto.one_shot(target_macs=share, batches=batches, loss=of_classes, saliency=saliency, portions=3)
    assert done.after.macs <= share * done.before.macs
    gone = [name for name, kept in done.kept.items() if not kept]
    assert gone and set(gone) < {f"blocks.{i}" for i in range(4)}, "one of the run stays"
    first, *rest = done.portions
    assert first.segments and sorted(first.groups) == sorted(gone) and first.size == 4 and not first.readers
    assert (mode == "both" or not rest) and not any(portion.segments for portion in rest)
    inside = {f"{name}.0.weight" for name in gone}
    assert not any(inside & set(portion.groups) for portion in rest), "what is not computed needs no fit"
    assert [p.before for p in rest] == [p.after for p in done.portions[:-1]] and done.portions[-1].after == done.loss[1]
    assert f"{len(gone)} of 4 segments" in str(done) and "taken over by nothing" in str(done)
    subnet = oto.construct_subnet()
    assert type(subnet.model) is Cnn and subnet.cost_after == done.after and subnet.max_error <= 1e-12
    with torch.no_grad():
        seen = sum(float(of_classes(subnet.model, batch)) for batch in batches[-2:]) / 2
        for x, _ in batches:
            torch.testing.assert_close(subnet.model(x), model(x), rtol=0, atol=1e-11)
    assert seen == pytest.approx(done.loss[1], rel=1e-9)


@pytest.mark.parametrize("saliency", ["obs", "sensitivity"])
def test_a_segment_that_does_nothing_goes_first(saliency):
    torch.manual_seed(0)
    batches = images()
    model = learned(Cnn(4), batches, of_classes)
    nn.init.constant_(model.blocks[2][4].weight, 1e-6)
    nn.init.constant_(model.blocks[2][4].bias, 1e-6)
    oto = OTO(model, batches[0][0][:1], compress_mode="erase")
    done = oto.one_shot(target_macs=0.85, batches=batches, loss=of_classes, saliency=saliency)
    assert done.portions[0].groups == ("blocks.2",)


def test_readers_in_segments_that_are_gone_are_not_fitted():
    """The stem's channels are read by every block: by those that are gone, too, and what these get counts no more."""
    torch.manual_seed(0)
    batches = images()
    oto = OTO(learned(Cnn(4), batches, of_classes), batches[0][0][:1], compress_mode="both")
    done = oto.one_shot(target_macs=0.35, batches=batches, loss=of_classes, saliency="magnitude", portions=1)
    gone = sum(not kept for kept in done.kept.values())
    both = done.portions[1]
    assert gone and {"stem.weight"} < set(both.groups)
    assert both.readers == 2 * (4 - gone) + 1, "two convolutions of each block that stays, and the head"


def test_what_lies_in_a_segment_that_is_gone_is_not_fitted(monkeypatch):
    torch.manual_seed(0)
    batches = images()
    oto = OTO(learned(Cnn(3), batches, of_classes), batches[0][0][:1], compress_mode="both")
    chosen = {"blocks.1": [0], "blocks.1.0.weight": range(12), "blocks.2.0.weight": range(9)}

    def choose(self):
        return {group.name: np.array(chosen.get(group.name, ()), dtype=np.int64) for group in self.choice.groups}

    monkeypatch.setattr(sys.modules["oto.oneshot"].Compression, "_choose", choose)
    done = oto.one_shot(target_macs=0.6, batches=batches, loss=of_classes)
    assert [portion.groups for portion in done.portions] == [("blocks.1",), ("blocks.2.0.weight",)]
    assert oto.construct_subnet().cost_after == done.after


def test_whole_layers_without_training():
    model, example, batches, loss = made("llama")
    oto = OTO(model, example, compress_mode="both", layout="uniform")
    done = oto.one_shot(target_macs=0.5, batches=batches, loss=loss)
    subnet = oto.construct_subnet()
    assert subnet.emitter == "config" and subnet.cost_after == done.after
    assert done.after.macs <= 0.5 * done.before.macs


@pytest.mark.parametrize("after", [9, 14])
def test_segments_come_back_if_anything_is_raised(after):
    torch.manual_seed(0)
    batches = images()
    model, calls, zeroed = learned(Cnn(4), batches, of_classes), [], []
    before = state(model)

    def fails(m, batch):
        calls.append(batch)
        zeroed.append(any(not block[4].weight.any() for block in m.blocks))
        if len(calls) > after:
            raise RuntimeError("no more")
        return of_classes(m, batch)

    oto = OTO(model, batches[0][0][:1], compress_mode="both")
    with pytest.raises(RuntimeError, match="no more"):
        oto.one_shot(target_macs=0.2, batches=batches, loss=fails)
    assert any(zeroed) and same(state(model), before)


def test_gradients_mode_and_numbers_drawn_are_left_as_they_were():
    model, example, batches, loss = made("encoder")
    oto = OTO(model, example)
    model.train()
    loss(model, batches[0]).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    drawn = torch.get_rng_state()
    oto.one_shot(target_macs=0.8, batches=batches[:4], loss=loss)
    assert model.training and all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("after", [3, 12, 40])
def test_all_is_undone_if_anything_is_raised(after):
    model, example, batches, loss = made("cnn")
    before, calls = state(model), []

    def fails(m, batch):
        calls.append(batch)
        if len(calls) > after:
            raise RuntimeError("no more")
        return loss(m, batch)

    with pytest.raises(RuntimeError, match="no more"):
        OTO(model, example).one_shot(target_macs=0.6, batches=batches, loss=fails)
    assert same(state(model), before)
    assert not any(hasattr(p, "grad") and p.grad is not None and not p.requires_grad for p in model.parameters())


def test_a_fold_that_does_not_help_is_undone(monkeypatch):
    """Calibrated on inputs of another kind, the fit is worse than none."""
    model, example, batches, loss = made("encoder")
    wrong = [(torch.full_like(x, 3.0), y) for x, y in batches[:6]]
    asked = {"target_macs": 0.7, "batches": wrong + batches[6:], "loss": loss, "saliency": "magnitude", "ridge": 0.0}
    other, third = copy.deepcopy(model), copy.deepcopy(model)
    checked = OTO(model, example).one_shot(**asked)
    zeroed = OTO(other, example).one_shot(**asked, compensate=None)
    for module in (oto.oneshot, oto.calibration):
        monkeypatch.setattr(module, "worse", lambda loss, than: False)
    unchecked = OTO(third, example).one_shot(**asked)
    undone = [p for p in checked.portions if p.kept == "zeroed" and p.readers]
    assert undone and all(p.folded >= p.zeroed for p in undone)
    assert checked.loss[1] <= zeroed.loss[1] < unchecked.loss[1]


def test_without_a_holdout_nothing_is_checked():
    model, example, batches, loss = made("cnn")
    done = OTO(model, example).one_shot(target_macs=0.7, batches=batches, loss=loss, holdout=0)
    assert done.loss is None and all(p.kept == "folded" and p.folded is None for p in done.portions)
    json.dumps(done.to_dict())
    str(done)


def test_statistics_come_from_the_pruned_prefix(monkeypatch):
    model, example, batches, loss = made("cnn")
    seen, real = [], oto.calibration.listening

    def listens(readers, tensors):
        rows = [t.flatten(1).detach() for t in tensors.values() if t.ndim > 1]
        seen.append(sum(int((own == 0).all(1).sum()) for own in rows))
        return real(readers, tensors)

    monkeypatch.setattr(oto.calibration, "listening", listens)
    done = OTO(model, example).one_shot(target_macs=0.7, batches=batches, loss=loss, saliency="magnitude")
    assert len(seen) == len(done.portions) > 1
    assert seen[0] == 0 and seen == sorted(seen) and seen[-1] > 0
    assert [p.groups[0] for p in done.portions] == ["stem.weight", "blocks.0.0.weight", "blocks.1.0.weight"]


def test_refusals_change_nothing():
    model, example, batches, loss = made("cnn")
    made_of, before = OTO(model, example), state(model)
    good = {"target_macs": 0.7, "batches": batches, "loss": loss}
    for wrong, match in [
        ({"loss": None}, "needs a loss"),
        ({"batches": []}, "0 batches"),
        ({"batches": batches[:1]}, "at least two batches"),
        ({"holdout": 1.0}, "share of the batches"),
        ({"compensate": "mean"}, "compensate is 'mean'"),
        ({"ridge": -1.0}, "ridge is"),
        ({"portions": 0}, "portions is"),
        (
            {"saliency": "size"},
            "no saliency of one_shot is called 'size'[^$]*one of obs, fluctuation, sensitivity, hesso",
        ),
        ({"lr": 0.1}, "lr"),
    ]:
        with pytest.raises(OptionError, match=match):
            made_of.one_shot(**good | wrong)
    for wrong in ({"target_params": 0.5}, {"target_macs": None}, {"target_macs": 1e-9}):
        with pytest.raises(TargetError):
            made_of.one_shot(**good | wrong)
    assert same(state(model), before)


def test_looking_what_it_would_cost_changes_nothing(monkeypatch):
    model, example, batches, loss = made("cnn")
    before = state(model)

    def seen(self, *_):
        assert same(state(model), before)
        raise RuntimeError("seen")

    monkeypatch.setattr(oto.oneshot.Compression, "_portion", seen)
    with pytest.raises(RuntimeError, match="seen"):
        OTO(model, example).one_shot(target_macs=0.7, batches=batches, loss=loss, saliency="sensitivity")


@pytest.mark.parametrize("saliency", ["obs", "fluctuation"])
def test_a_choice_by_what_is_read_needs_something_to_be_read(saliency):
    model, example, batches, loss = made("cnn")

    def cast(m, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):  # copies of the weights are multiplied
            return loss(m, batch)

    before = state(model)
    with pytest.raises(OptionError, match="no autocast"):
        OTO(model, example).one_shot(target_macs=0.7, batches=batches, loss=cast, saliency=saliency)
    assert same(state(model), before)
    done = OTO(model, example).one_shot(target_macs=0.7, batches=batches, loss=cast, saliency="magnitude")
    assert "no batch reached blocks.0.3.weight" in str(done)


def test_a_loss_without_a_gradient_is_refused_and_no_grad_around_it_does_not_matter():
    model, example, batches, loss = made("cnn")
    before = state(model)
    with pytest.raises(NoGradientError, match=r"has no gradient.*\n  effect  nothing was chosen\n  to fix  no detach"):
        OTO(model, example).one_shot(target_macs=0.7, batches=batches, loss=lambda m, b: loss(m, b).detach())
    assert same(state(model), before)
    with torch.no_grad():
        done = OTO(model, example).one_shot(target_macs=0.7, batches=batches, loss=loss)
    assert done.after.macs <= 0.7 * done.before.macs


@pytest.mark.parametrize("saliency", ["obs", "fluctuation"])
def test_where_no_weight_can_tell_the_reason_is_that_and_not_the_batches(saliency):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.ReLU())
    model = nn.Sequential(*model, nn.Conv2d(8, 2, 1))
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(
        OptionError, match=r"no group has such weights: 0.weight, 2.weight reads it in one with 0.weight/1"
    ):
        OTO(model, x).one_shot(
            target_macs=0.7, batches=[x, x], loss=lambda m, b: m(b).square().mean(), saliency=saliency
        )


def test_half_precision_is_fitted_in_float64():
    model, example, batches, loss = made("cnn")
    half = [(x.bfloat16(), y) for x, y in batches]
    of = OTO(model.bfloat16(), example.bfloat16())
    done = of.one_shot(target_macs=0.7, batches=half, loss=loss, saliency="obs")
    assert any(p.kept == "folded" for p in done.portions) and done.loss[1] < 1


@pytest.mark.parametrize(
    "target",
    [{"target_bytes": 0.7}, {"target_group_sparsity": 0.3}, {"target_latency_ms": 1000.0}, {"target_macs": 1.0}],
)
def test_every_other_target(target):
    model, example, batches, loss = made("cnn")
    done = OTO(model, example).one_shot(**target, batches=batches, loss=loss, saliency="magnitude", portions=2)
    if "target_bytes" in target:
        assert done.after.bytes <= 0.7 * done.before.bytes
    elif "target_group_sparsity" in target:
        assert sum(done.kept.values()) <= 0.7 * 60 + 1  # of 12 + 2 × 24 channels
    else:
        assert done.after == done.before and not done.portions


def test_what_lies_on_several_ranks_is_refused(monkeypatch):
    model, example, batches, loss = made("cnn")
    of, before = OTO(model, example), state(model)
    asked = {"target_macs": 0.7, "batches": batches, "loss": loss}
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(OptionError, match="there are several processes"):
            of.one_shot(**asked)
        with pytest.raises(OptionError, match="compensate='affine' runs in one process"):
            of.hesso(lr=0.1, target_macs=0.5, total_steps=10, compensate="affine", batches=[example])
    assert same(state(model), before)


@GLOO
def test_sharded_parameters_are_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    begin(0, str(tmp_path), ranks=1)
    try:
        model, example, batches, loss = made("cnn")
        of = OTO(model, example)
        fully_shard(model.stem, mesh=init_device_mesh("cpu", (1,)))
        before = {name: gathered_tensor(p).clone() for name, p in model.named_parameters()}
        with pytest.raises(OptionError, match=r"^one_shot runs in one process.*stem\.bias of the Cnn are spread"):
            of.one_shot(target_macs=0.7, batches=batches, loss=loss)
        assert all(torch.equal(gathered_tensor(p), before[name]) for name, p in model.named_parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_each_portion_is_shown_while_it_runs(caplog):
    model, example, batches, loss = made("cnn")
    with caplog.at_level("DEBUG", logger="oto.progress"):
        OTO(model, example).one_shot(target_macs=0.7, batches=batches, loss=loss, saliency="magnitude", portions=2)
    said = [record.message for record in caplog.records if record.name == "oto.progress"]
    assert said.index("choosing") < said.index("portion 1 of 2") < said.index("portion 2 of 2")


def test_only_what_may_go_gets_a_gradient():
    model, example, batches, loss = made("encoder")
    model.zero_grad()
    model.head.bias.requires_grad_(requires_grad=False)
    seen = []

    def watched(m, batch):
        seen.append({name for name, p in m.named_parameters() if p.requires_grad})
        return loss(m, batch)

    OTO(model, example, only=["*linear1*"]).one_shot(target_macs=0.9, batches=batches, loss=watched)
    written = {n for n, _ in model.named_parameters() if "linear1" in n}
    assert seen[0] == written
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]


def test_what_is_copied_is_what_is_written_to(monkeypatch):
    """What a fold writes to, and of others the atoms that go; gradients of the choice have gone by then."""
    model, example, batches, loss = made("encoder")
    model.zero_grad()
    seen, real = [], oto.oneshot.undone

    @contextmanager
    def copies():
        assert all(p.grad is None for p in model.parameters())
        with real() as undo:
            yield undo
            seen.append(undo)

    monkeypatch.setattr(oto.oneshot, "undone", copies)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    done = OTO(model, example, only=["*linear1*"]).one_shot(target_macs=0.9, batches=batches, loss=loss)
    ((undo,), now) = seen, dict(model.named_parameters())
    folded = {name: p for name, p in now.items() if "linear2" in name}
    assert set(undo.whole) == set(folded)
    gone = sum(portion.atoms for portion in done.portions)
    assert gone and undo.nbytes == sum(p.nbytes for p in folded.values()) + 4 * gone * (16 + 1)
    undo.put_back()
    assert all(p.equal(before[name]) for name, p in now.items())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("weight", "NaN or infinity in the parameters or gradients"),
        ("batch", "NaN or infinity"),
        ("held", "the loss of the held-out batches is nan"),
        ("float", "loss\\(model, batch\\) gives a float"),
        ("vector", r"gives a tensor of the shape \[4\]"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_and_nothing_changes(spoil, said):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    batches = [torch.randn(4, 6) for _ in range(8)]
    if spoil == "weight":
        model[0].weight.data[0, 0] = float("nan")
    if spoil in ("batch", "held"):
        batches[0 if spoil == "batch" else -1][0, 0] = float("nan")
    losses = {
        "float": lambda m, b: m(b).square().mean().item(),
        "vector": lambda m, b: m(b).square().mean(1),
    }
    oto = OTO(model, batches[1][:1])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((NonFiniteParameterError, OptionError), match=said):
        oto.one_shot(target_macs=0.5, batches=batches, loss=losses.get(spoil, lambda m, b: m(b).square().mean()))
    assert all(torch.equal(now.nan_to_num(), before[name].nan_to_num()) for name, now in model.state_dict().items())
    if spoil != "held":
        with pytest.raises((NonFiniteParameterError, OptionError), match=said):
            oto.preview(target_macs=0.5, batches=batches, loss=losses.get(spoil, lambda m, b: m(b).square().mean()))
