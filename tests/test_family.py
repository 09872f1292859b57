"""Families: several sizes of one network out of one run."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from oto import OTO, load_subnet
from oto.errors import (
    ArtifactError,
    CopiedWarning,
    DamagedArtifactError,
    OptionError,
    SetupError,
    TargetError,
)
from oto.family import Family
from oto.io.members import index_of
from oto.members import found_in
from oto.sandwich import Sandwich
from oto.slim.member import masked
from tests.families import FREEZE, STEPS, Net, Plain, batch, family_of, train, trained
from tests.io.forging import sealed

pytestmark = pytest.mark.filterwarnings("ignore::oto.errors.CollapseWarning")
WIDE = torch.float64


@pytest.fixture(scope="module")
def family() -> Family:
    return trained()


def masked_full(family: Family, index: int) -> nn.Module:
    """The full network with everything at zero that a member does not keep."""
    analysis, member = family._maker.analysis, family.members[index]
    return masked(family.model, analysis.partition, analysis.groups, member.kept, member.part).eval()


def images(n: int = 5) -> Tensor:
    return torch.randn(n, 3, 8, 8, dtype=WIDE, generator=torch.Generator().manual_seed(99))


# What members are ----------------------------------------------------------------------------------------------------


def test_members_are_nested_and_meet_their_targets(family: Family) -> None:
    full, *others = family.members
    assert [member.target for member in family.members] == [1.0, 0.75, 0.5]
    before = full
    for member in others:
        assert member.cost.macs <= member.target * full.cost.macs < before.cost.macs
        for name, atoms in member.kept.items():
            assert np.isin(atoms, before.kept[name]).all()
        before = member


def test_a_member_computes_what_the_masked_full_network_does(family: Family) -> None:
    x = images()
    for index, member in enumerate(family.members):
        found = family.run(index, lambda net: net(x))
        assert torch.allclose(found, masked_full(family, index)(x), rtol=1e-12, atol=1e-13)
        assert torch.equal(found, family.run(member.target, lambda net: net(x)))
    assert not torch.allclose(family.run(0, lambda net: net(x)), family.run(2, lambda net: net(x)), atol=1e-3)


def test_gradients_of_a_member_are_those_of_the_masked_full_network_and_reach_nothing_else(family: Family) -> None:
    x, index = images(), 2
    member, zeroed = family.members[index], masked_full(family, index)
    assert member.part is not None
    parameters = dict(family.model.named_parameters())
    family.model.zero_grad()
    member.part.run(parameters, lambda net: net.eval()(x).square().sum().backward())
    zeroed(x).square().sum().backward()
    expected = dict(zeroed.named_parameters())
    analysis = family._maker.analysis
    gone = torch.zeros(0)
    for name, p in parameters.items():
        there = torch.zeros_like(p)
        entries = member.part.entries[name]
        own = [torch.arange(size) for size in p.shape]
        for dim, kept in entries:
            own[dim] = kept
        there[torch.meshgrid(*own, indexing="ij")] = 1
        assert p.grad is not None and expected[name].grad is not None
        assert torch.allclose(p.grad, expected[name].grad * there, rtol=1e-10, atol=1e-12), name
        gone = torch.cat([gone, p.grad[there == 0].abs().flatten()])
    assert len(gone) > 100 and not gone.any()
    assert analysis.model is family.model
    family.model.zero_grad()


def test_a_member_has_statistics_of_its_own(family: Family) -> None:
    member = family.members[2]
    assert member.part is not None
    own, kept = member.part.buffers["norm2.running_mean"], torch.from_numpy(member.kept["conv2.weight"])
    assert own.shape == kept.shape and not torch.equal(own, family.model.norm2.running_mean[kept])
    assert int(member.part.buffers["norm1.num_batches_tracked"]) == STEPS  # the full network's, then its own
    assert not [p for p in member.part.net.parameters() if not p.is_meta], "a member holds no weights"


def test_no_member_before_the_ranking_is_frozen() -> None:
    family = family_of(Net(), torch.randn(2, 3, 8, 8))
    train(family, range(FREEZE))
    with pytest.raises(OptionError, match=f"settled at step {FREEZE}, and {FREEZE} steps were taken"):
        family.construct()
    train(family, range(FREEZE, FREEZE + 1))
    assert len(family.members) == 3


# Training ------------------------------------------------------------------------------------------------------------


def test_until_the_ranking_is_frozen_every_step_is_that_of_the_wrapped_optimizer() -> None:
    torch.manual_seed(0)
    model, other = Net(), Net()
    other.load_state_dict(model.state_dict())
    family = family_of(model, torch.randn(2, 3, 8, 8))
    sgd = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    other.train()
    for step in range(FREEZE + 1):
        train(family, range(step, step + 1))
        x, y = batch(step)
        sgd.zero_grad()
        F.cross_entropy(other(x), y).backward()
        sgd.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_step_sums_the_gradients_of_the_sandwich() -> None:
    """The gradient of one step, put together by hand from masked networks."""
    torch.manual_seed(0)
    family = family_of(Plain().double(), torch.randn(2, 6, dtype=WIDE), ramp_steps=4, temperature=2.0)
    train(family, range(FREEZE + 2), shape=(8, 6), dtype=WIDE)
    x, y = batch(50, (8, 6), WIDE)
    weight = family._sandwich.weight(family.optimizer.clock)
    assert weight == 0.5
    expected = {name: torch.zeros_like(p) for name, p in family.model.named_parameters()}

    def add(net: nn.Module, loss: Tensor, keep: dict[str, Tensor] | None) -> None:
        grads = torch.autograd.grad(loss, list(net.parameters()))
        for (name, _), grad in zip(net.named_parameters(), grads, strict=True):
            expected[name] += grad if keep is None else grad * keep[name]

    teacher = family.model(x).detach()
    add(family.model, F.cross_entropy(family.model(x), y), None)
    for index in (1, 2):
        net, part = masked_full(family, index), family.members[index].part
        assert part is not None
        keep = {}
        for name, p in net.named_parameters():
            keep[name] = torch.zeros_like(p)
            own = [torch.arange(size) for size in p.shape]
            for dim, kept in part.entries[name]:
                own[dim] = kept
            keep[name][torch.meshgrid(*own, indexing="ij")] = 1
        soft, said = (teacher / 2).softmax(1), (net(x) / 2).log_softmax(1)
        add(net, weight * 4 * (soft * (soft.log() - said)).sum(1).mean(), keep)
    value = family.backward(lambda net: net(x), lambda output: F.cross_entropy(output, y))
    assert value == F.cross_entropy(teacher, y)
    for name, p in family.model.named_parameters():
        assert p.grad is not None and torch.allclose(p.grad, expected[name], rtol=1e-10, atol=1e-14), name


def test_micro_batches_add_up() -> None:
    torch.manual_seed(0)
    whole = family_of(Plain().double(), torch.randn(2, 6, dtype=WIDE))
    parts = family_of(copy.deepcopy(whole.model), torch.randn(2, 6, dtype=WIDE))
    for step in range(STEPS):
        x, y = batch(step, (8, 6), WIDE)
        whole.step(lambda net, x=x: net(x), lambda output, y=y: F.cross_entropy(output, y))
        for i in range(2):
            a, b = x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4]
            # what members learn of a micro-batch is a mean over it, so it is halved like the loss
            parts.backward(lambda net, a=a: net(a), lambda output, b=b: F.cross_entropy(output, b) / 2, weight=0.5)
        parts.update()
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-11)


def test_a_scaler_scales_every_loss() -> None:
    torch.manual_seed(0)
    plain = family_of(Net(), torch.randn(2, 3, 8, 8))
    scaled = family_of(copy.deepcopy(plain.model), torch.randn(2, 3, 8, 8))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    train(plain)
    scaled.model.train()
    for step in range(STEPS):
        x, y = batch(step)
        scaled.step(lambda net, x=x: net(x), lambda output, y=y: F.cross_entropy(output, y), scaler)
    for p, q in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)


def test_autocast_in_the_forward_and_recomputed_activations() -> None:
    """bfloat16, and a backward that runs parts of the forward again."""

    class Recomputed(Plain):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)
            return out

    def forward(net: nn.Module, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    torch.manual_seed(0)
    family = family_of(Recomputed(), torch.randn(2, 6))
    before = {name: p.detach().clone() for name, p in family.model.named_parameters()}
    for step in range(STEPS):
        x, y = batch(step, (8, 6))
        family.step(lambda net, x=x: forward(net, x), lambda output, y=y: F.cross_entropy(output.float(), y))
    assert all(p.isfinite().all() and not torch.equal(p, before[n]) for n, p in family.model.named_parameters())


@pytest.mark.parametrize("way", [False, lambda mine, theirs: (mine - theirs).square().mean()])
def test_members_may_learn_otherwise(way: Any) -> None:
    torch.manual_seed(0)
    family = family_of(Plain(), torch.randn(2, 6), distillation=way)
    train(family, shape=(8, 6))
    assert len(family.members) == 3


def test_positions_that_do_not_count_teach_nothing() -> None:
    sandwich = Sandwich(freeze=0, ramp=1)
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    found = sandwich.loss(student, sandwich.taught(teacher), lambda _: torch.tensor(0.0), mask)
    other = student.clone()
    other[~mask] = 7.0
    assert found > 0 and torch.allclose(found, sandwich.loss(other, teacher, lambda _: torch.tensor(0.0), mask))
    by_dim = Sandwich(0, 1, class_dim=1).loss(student.movedim(-1, 1), teacher.movedim(-1, 1), lambda _: found, mask)
    assert torch.allclose(found, by_dim)


def test_what_is_drawn_depends_on_the_step_alone() -> None:
    three = Sandwich(0, 1, networks=3)
    drawn = [three.drawn(step, 4) for step in range(60)]
    assert drawn == [three.drawn(step, 4) for step in range(60)]
    assert all(len(own) == 2 and own[-1] == 3 for own in drawn) and {own[0] for own in drawn} == {0, 1, 2}
    assert all(Sandwich(0, 1, networks=9).drawn(step, 3) == [0, 1, 2] for step in range(5))


def test_members_follow_the_modes_of_the_full_network() -> None:
    torch.manual_seed(0)
    family = family_of(Net(), torch.randn(2, 3, 8, 8))
    train(family)
    part = family.members[1].part
    assert part is not None
    before = {name: part.buffers[f"{name}.running_mean"].clone() for name in ("norm2", "norm3")}
    family.model.train()
    family.model.norm2.eval()
    x, y = batch(0)
    family.step(lambda net: net(x), lambda output: F.cross_entropy(output, y))
    assert torch.equal(part.buffers["norm2.running_mean"], before["norm2"])
    assert not torch.equal(part.buffers["norm3.running_mean"], before["norm3"])


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [2, FREEZE + 1, FREEZE + 3])
def test_a_run_that_is_resumed_is_the_run_that_was_not_interrupted(at: int) -> None:
    torch.manual_seed(0)
    start = Net(0.3).state_dict()

    def begin() -> Family:
        model = Net(0.3)
        model.load_state_dict(start)
        return family_of(model, torch.ones(2, 3, 8, 8), targets=[0.8, 0.6, 0.4], networks_per_step=3)

    torch.manual_seed(1)
    whole = begin()
    train(whole)
    torch.manual_seed(1)
    first, file = begin(), io.BytesIO()
    train(first, range(at))
    torch.save([first.model.state_dict(), first.optimizer.state_dict(), torch.get_rng_state()], file)
    file.seek(0)
    second = begin()
    model, optimizer, random = torch.load(file, weights_only=True)
    second.model.load_state_dict(model)
    second.optimizer.load_state_dict(optimizer)
    torch.set_rng_state(random)
    train(second, range(at, STEPS))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    for a, b in zip(whole.members[1:], second.members[1:], strict=True):
        assert a.part is not None and b.part is not None
        assert all(torch.equal(own, b.part.buffers[name]) for name, own in a.part.buffers.items())


@pytest.mark.parametrize(
    ("option", "said"),
    [({"targets": [0.8, 0.5]}, r"targets: .*0\.75"), ({"class_dim": 1}, "class_dim: None .* 1 here")],
)
def test_a_checkpoint_of_other_options_is_refused(option: dict[str, Any], said: str) -> None:
    family = family_of(Plain(), torch.randn(2, 6))
    train(family, shape=(8, 6))
    other = family_of(Plain(), torch.randn(2, 6), **option)
    with pytest.raises(SetupError, match=said):
        other.optimizer.load_state_dict(family.optimizer.state_dict())


def test_a_scheduler_takes_the_optimizer() -> None:
    family = family_of(Plain(), torch.randn(2, 6))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(family.optimizer, STEPS)
    for step in range(STEPS):
        train(family, range(step, step + 1), shape=(8, 6))
        schedule.step()
    assert family.optimizer.param_groups[0]["lr"] < 1e-6
    assert "members" in family.plan() and "target_macs=0.75" in repr(family)


# Slim models ---------------------------------------------------------------------------------------------------------


def test_one_artifact_holds_the_shared_weights_once_and_loads_any_member(family: Family, tmp_path: Path) -> None:
    subnets = family.construct(tmp_path / "family")
    assert [subnet.cost_after.macs for subnet in subnets] == [member.cost.macs for member in family.members]
    x = images()
    for index, (subnet, target) in enumerate(zip(subnets, [1.0, 0.75, 0.5], strict=True)):
        assert type(subnet.model) is Net and subnet.max_error < 1e-13 and subnet.path == tmp_path / "family"
        for asked in (index, target):
            slim = load_subnet(tmp_path / "family", Net, member=asked)
            assert type(slim) is Net and not slim.training
            assert torch.allclose(slim(x), family.run(index, lambda net: net(x)), rtol=1e-12, atol=1e-13)
            assert sum(p.numel() for p in slim.parameters()) == subnet.cost_after.params
    largest = load_subnet(tmp_path / "family", Net)
    assert torch.equal(largest.fc.weight, family.model.fc.weight)
    weights = sum(t.nbytes for t in family.model.state_dict().values())
    assert (tmp_path / "family" / "model.safetensors").stat().st_size < weights + 4096
    members = (tmp_path / "family" / "members.safetensors").stat().st_size
    assert members < weights / 4, "levels and statistics, no weights"


def test_a_loaded_member_is_made_slim_again(family: Family, tmp_path: Path) -> None:
    family.construct(tmp_path)
    slim = load_subnet(tmp_path, Net, member=0.75)
    oto = OTO(slim, images(2))
    oto.random_set_zero_groups(0.3)
    again = oto.construct_subnet(tmp_path / "again")
    loaded = load_subnet(tmp_path / "again", Net)
    assert torch.allclose(loaded(images()), again.model(images()), rtol=1e-12, atol=1e-13)


def test_a_member_that_is_not_there(family: Family, tmp_path: Path) -> None:
    family.construct(tmp_path / "family")
    with pytest.raises(ArtifactError, match=r"no member 0.6: it has 1.0, 0.75, 0.5\n.*\n  to fix  one of these"):
        load_subnet(tmp_path / "family", Net, member=0.6)
    with pytest.raises(ArtifactError, match="no member 3"):
        load_subnet(tmp_path / "family", Net, member=3)
    with pytest.raises(OptionError, match=r"no member 0.6\n  to fix  one of 1.0, 0.75, 0.5, or an index"):
        family.module(0.6)
    oto = OTO(Net(), torch.randn(2, 3, 8, 8))
    oto.random_set_zero_groups(0.3)
    oto.construct_subnet(tmp_path / "one")
    with pytest.raises(ArtifactError, match="of no family"):
        load_subnet(tmp_path / "one", Net, member=0.5)


def test_levels_that_do_not_fit_are_refused(family: Family, tmp_path: Path) -> None:
    from oto.io.artifact import reading, writing
    from oto.io.members import MEMBERS

    family.construct(tmp_path / "family")
    artifact = reading(tmp_path / "family")
    with writing(tmp_path / "forged") as draft:
        draft.tensors("model.safetensors", artifact.tensors("model.safetensors"))
        held = artifact.tensors(MEMBERS)
        draft.tensors(MEMBERS, {**held, "entries/0": held["entries/0"][:-1]})
        left_out = ("format", "versions", "tensors", "files", "digest")
        draft.commit({k: v for k, v in artifact.manifest.items() if k not in left_out})
    with pytest.raises(DamagedArtifactError, match="does not fit the full weights"):
        load_subnet(tmp_path / "forged", Net, member=1)


@pytest.mark.parametrize(
    ("key", "value"),
    [("earlier", [{"edits": {"swaps": {"fc": {"class": "object", "arguments": {}}}}, "shapes": {}, "kept": {}}]),
     ("model", {"class": 5}), ("left_out", 7), ("levels", 7)],
)  # fmt: skip
def test_what_a_manifest_says_of_a_member_is_a_closed_list(
    key: str, value: Any, family: Family, tmp_path: Path
) -> None:
    """Entries that the manifest is checked for are not taken from a member, where nobody checks them."""
    family.construct(tmp_path / "family")

    def change(_: Path, manifest: dict[str, Any]) -> None:
        manifest["members"][1][key] = value

    sealed(tmp_path / "family", tmp_path / "forged", change)
    slim = load_subnet(tmp_path / "forged", Net, member=1)
    assert torch.equal(slim(images()), load_subnet(tmp_path / "family", Net, member=1)(images()))


@pytest.mark.parametrize("key", ["target", "edits", "levels", "entries"])
def test_a_family_without_what_says_which_member_is_which_is_damaged(key: str, family: Family, tmp_path: Path) -> None:
    family.construct(tmp_path / "family")

    def change(_: Path, manifest: dict[str, Any]) -> None:
        (manifest if key in manifest and key != "edits" else manifest["members"][1]).pop(key)

    sealed(tmp_path / "family", tmp_path / "forged", change)
    with pytest.raises(DamagedArtifactError, match=f"no {key}"):
        load_subnet(tmp_path / "forged", Net, member=1)


def test_a_target_that_is_a_number_of_macs_names_its_member() -> None:
    targets = [1.0, 40_000, {"target_params": 30}]
    members = [SimpleNamespace(target=target) for target in targets]
    manifest = {"members": [{"target": target} for target in targets]}
    for index, target in enumerate(targets):
        assert found_in(members, target) == found_in(members, index) == index  # type: ignore[arg-type]
        assert index_of(manifest, target, "") == index_of(manifest, index, "") == index
    for wrong in (True, 40_001, -4, None):
        with pytest.raises(OptionError, match="no member"):
            found_in(members, wrong)  # type: ignore[arg-type]
        with pytest.raises(ArtifactError, match="no member"):
            index_of(manifest, wrong, "")


def test_a_member_is_a_view_of_one_sorted_copy_of_the_weights(family: Family) -> None:
    x = images()
    modules = [family.module(i) for i in range(3)]
    places = [{p.untyped_storage().data_ptr() for p in net.parameters()} for net in modules]
    assert places[0] == places[1] == places[2], "one memory"
    assert places[0].isdisjoint({p.untyped_storage().data_ptr() for p in family.model.parameters()})
    for i, net in enumerate(modules):
        assert type(net) is Net and net.conv2.weight.shape[0] == len(family.members[i].kept["conv2.weight"])
        assert torch.allclose(net(x), family.run(i, lambda own: own(x)), rtol=1e-12, atol=1e-13)


class Heads(nn.Module):
    """The inner width of heads is no dimension of its own in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(6, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.value(x).view(len(x), 3, 8)
        return self.out(F.gelu(y - 0 * y.sum(1, keepdim=True)).flatten(1))


def test_what_no_view_can_express_is_a_copy_that_says_so() -> None:
    torch.manual_seed(0)
    widths = {"target_kept": {"value.weight/1": 0.5}}  # four of the eight entries of each head
    family = family_of(Heads().double(), torch.randn(2, 6, dtype=WIDE), targets=[widths])
    train(family, shape=(8, 6), dtype=WIDE)
    x = torch.randn(4, 6, dtype=WIDE)
    with pytest.warns(
        CopiedWarning, match=r"value.weight, value.bias, out.weight are no view.*\n  effect  copies take"
    ):
        net = family.module(1)
    assert torch.allclose(net(x), family.run(1, lambda own: own(x)), rtol=1e-12, atol=1e-13)
    full = family.module(0)
    assert net.out.bias.data_ptr() == full.out.bias.data_ptr() and net.value.out_features == 12


class Ways(nn.Module):
    """Branches side by side, and residual ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.ways = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)) for _ in range(3))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(18, 24), nn.ReLU(), nn.Linear(24, 18)) for _ in range(3))
        self.fc = nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([way(x) for way in self.ways], 1).relu().mean((2, 3))
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x)


@pytest.mark.filterwarnings("ignore::oto.errors.CopiedWarning")  # the width of a concatenation
def test_a_member_without_whole_segments_is_a_view_too() -> None:
    torch.manual_seed(0)
    oto = OTO(Ways().double(), images(), compress_mode="erase")
    when = {"total_steps": STEPS, "freeze_step": FREEZE, "average_steps": 2}
    family = oto.family(targets=[0.7, 0.4], lr=0.05, **when)  # type: ignore[arg-type]
    train(family, dtype=WIDE)
    for i in (1, 2):
        gone = [name for name, kept in family.members[i].kept.items() if not len(kept)]
        net = family.module(i)
        assert gone and sum(p.numel() for p in net.parameters()) == family.members[i].cost.params
        for seed in range(3):
            x = torch.randn(5, 3, 8, 8, dtype=WIDE, generator=torch.Generator().manual_seed(seed))
            net.eval()
            assert torch.allclose(net(x), family.run(i, lambda own: own(x)), rtol=1e-10, atol=1e-12)  # noqa: B023
        shared = {p.untyped_storage().data_ptr() for p in family.module(0).parameters()}
        assert shared & {p.untyped_storage().data_ptr() for p in net.parameters()}


class Places(nn.Module):
    """Every hidden unit has a weight by its place, which no parameter holds: sorted, it computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


def test_where_places_mean_something_a_member_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    import oto.members

    torch.manual_seed(0)
    family = family_of(Places().double(), torch.randn(2, 6, dtype=WIDE), targets=[0.5])
    train(family, shape=(8, 6), dtype=WIDE)
    theirs = oto.members.sorted_copy

    def wrong(*args: Any) -> nn.Module:  # as if the order of the units had a meaning
        made = theirs(*args)
        made.down.weight.data = made.down.weight.data.flip(1)
        return made

    monkeypatch.setattr(oto.members, "sorted_copy", wrong)
    x = torch.randn(4, 6, dtype=WIDE)
    with pytest.warns(CopiedWarning, match="member 0.5 is a copy: its network computes something else when its atoms"):
        net = family.module(0.5)
    assert torch.allclose(net(x), family.run(0.5, lambda own: own(x)), rtol=1e-12, atol=1e-13)


# Cutting more --------------------------------------------------------------------------------------------------------


def test_a_further_member_is_cut_between_two(tmp_path: Path) -> None:
    family = trained()
    x = images(16)
    made = family.cut(0.6, evaluate=lambda net: float(net(x).square().mean()), batches=[x], forward=lambda n, b: n(b))
    assert "cut without training" in str(made) and made.score is not None and made.score > 0 and not made.notes
    assert [member.target for member in family.members] == [1.0, 0.75, 0.6, 0.5]
    for name, atoms in made.kept.items():
        assert np.isin(atoms, family.members[1].kept[name]).all()
        assert np.isin(family.members[3].kept[name], atoms).all()
    assert made.part is not None
    h = masked_full(family, 2)
    with torch.no_grad():
        h.train()
        for module in h.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        h(x)
    kept = torch.from_numpy(made.kept["conv2.weight"])
    assert torch.allclose(made.part.buffers["norm2.running_mean"], h.norm2.running_mean[kept], rtol=1e-9, atol=1e-12)
    subnets = family.construct(tmp_path)
    assert len(subnets) == 4
    loaded = load_subnet(tmp_path, Net, member=0.6)
    assert torch.allclose(loaded(x), family.run(0.6, lambda net: net(x)), rtol=1e-12, atol=1e-13)


def test_a_member_that_is_cut_without_batches_says_so() -> None:
    family = trained()
    made = family.cut(0.6)
    assert "statistics of the next larger member" in str(made)
    outer = family.members[1]
    assert made.part is not None and outer.part is not None
    place = torch.from_numpy(np.searchsorted(outer.kept["conv2.weight"], made.kept["conv2.weight"]))
    assert torch.equal(made.part.buffers["norm2.running_mean"], outer.part.buffers["norm2.running_mean"][place])
    with pytest.raises(OptionError, match=r"has a member 0\.75"):
        family.cut(0.75)


def test_members_are_evaluated(family: Family) -> None:
    x = images()
    family.model.train()
    found = family.evaluate(lambda net: float(net(x).sum()) if not net.training else float("nan"))
    assert [one.score for one in found] == [float(family.run(i, lambda net: net(x)).sum()) for i in range(3)]
    assert family.model.training and "score" in str(found[1])


def test_a_report_has_the_curve(family: Family, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scored = family.evaluate(lambda net: float(net.conv2.weight.shape[0]))
    page = family.report(tmp_path / "family.html", scored, title="Net & <co>").read_text()
    assert "A family of Net &amp; &lt;co>" in page and 'aria-label="1.0: 287,360 MACs, score 16; 0.75: ' in page
    assert all(f"<td>{member.cost.macs:,}</td>" in page for member in family.members)
    assert "<svg" not in family.report(tmp_path / "plain.html").read_text(), "without scores there is no curve"


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"targets": 0.5}, OptionError, "targets is 0.5; it lists the sizes"),
        ({"targets": []}, TargetError, "a family has no targets"),
        ({"targets": [0.5, 0.75]}, TargetError, "do not fall"),
        ({"targets": [1.0, 0.5]}, TargetError, "the full network is a member"),
        ({"targets": [{"target_mac": 0.5}]}, OptionError, "no option 'target_mac'|no option target_mac"),
        ({"networks_per_step": 1}, OptionError, "networks_per_step is 1"),
        ({"temperature": 0}, OptionError, "temperature is 0"),
        ({"freeze_steps": 3}, OptionError, "freeze_step"),
        ({"total_steps": None, "freeze_step": 0.4}, TargetError, "total_steps"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        family_of(Plain(), torch.randn(2, 6), **options)


def test_other_units_and_mixed_ones() -> None:
    torch.manual_seed(0)
    family = family_of(Plain(), torch.randn(2, 6), targets=[{"target_params": 0.8}, 0.5])
    train(family, shape=(8, 6))
    assert [member.target for member in family.members] == [1.0, {"target_params": 0.8}, 0.5]
    full = family.members[0].cost
    assert family.members[1].cost.params <= 0.8 * full.params
    assert family.run({"target_params": 0.8}, lambda net: net.body[0].out_features) <= 20


def test_a_graph_is_no_member() -> None:
    with pytest.raises(OptionError, match="members are of the model's own class"):
        OTO(Plain(), torch.randn(2, 6), allow_graph=True).family(targets=[0.5], lr=0.1, total_steps=9)


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo")
def test_sharded_parameters_are_refused(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        oto = OTO(model := Plain(), torch.randn(2, 6))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(OptionError, match=r"spread over processes.*\n.*\n  to fix  train the family with whole"):
            oto.family(targets=[0.5], lr=0.1, total_steps=9)
    finally:
        dist.destroy_process_group()


def test_every_number_of_steps_has_a_step_at_which_the_ranking_freezes():
    oto = OTO(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(1, 8))
    for total in (1, 2, 5, 30, 70, 110, 1550, 3750, *range(3, 60, 7)):
        family = oto.family(targets=[0.5], variant="sgd", lr=0.1, total_steps=total)
        assert 0 <= family.optimizer.schedule.start < total


@pytest.mark.parametrize("options", [{"distillation": "x"}, {"seed": "a"}])
def test_options_that_mean_nothing_are_refused_at_once(options):
    oto = OTO(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(1, 8))
    with pytest.raises(OptionError, match=next(iter(options))):
        oto.family(targets=[0.5], variant="sgd", lr=0.1, total_steps=10, **options)


def test_a_batch_that_failed_counts_once_when_it_is_tried_again():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    family = OTO(model, torch.randn(1, 8)).family(targets=[0.5], variant="sgd", lr=0.1, total_steps=10, freeze_step=2)
    x = torch.randn(4, 8)
    for _ in range(4):
        family.step(lambda net: net(x), lambda out: out.square().mean())

    def fails(net):
        if net is not model:
            raise RuntimeError("out of luck")
        return net(x)

    with pytest.raises(RuntimeError, match="out of luck"):
        family.step(fails, lambda out: out.square().mean())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
