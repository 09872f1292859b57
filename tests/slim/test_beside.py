"""The slim model without branches of concatenations and stacks computes what the zeroed one does, and is saved."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import oto as library
from oto import OTO
from oto.nn import ErasedForward
from oto.slim.latency import built


class Conv(nn.Module):
    def __init__(self, into, out, kernel=1, **how):
        super().__init__()
        padding = tuple(k // 2 for k in kernel) if isinstance(kernel, tuple) else kernel // 2
        self.conv = nn.Conv2d(into, out, kernel, padding=padding, bias=False, **how)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class Inception(nn.Module):
    def __init__(self, into):
        super().__init__()
        self.one, self.two, self.pool = Conv(into, 4), nn.Sequential(Conv(into, 3), Conv(3, 4, 3)), Conv(into, 4)
        self.three, self.wide = Conv(into, 4), nn.ModuleList([Conv(4, 2, (1, 3)), Conv(4, 3)])

    def forward(self, x):
        three = self.three(x)
        three = torch.cat([own(three) for own in self.wide], 1)
        return torch.cat([self.one(x), self.two(x), three, self.pool(F.avg_pool2d(x, 3, 1, 1))], 1)


class Reduction(nn.Module):
    """As between the stages of Inception: two that halve the resolution, beside a pool."""

    def __init__(self, into):
        super().__init__()
        self.one = Conv(into, 4, 3, stride=2)
        self.two = nn.Sequential(Conv(into, 3), Conv(3, 4, 3, stride=2))

    def forward(self, x):
        return torch.cat([self.one(x), self.two(x), F.max_pool2d(x, 3, 2, 1)], 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.first, self.shorter, self.second = Conv(3, 6, 3), Inception(6), Reduction(17), Inception(25)
        self.head = nn.Linear(17, 4)

    def forward(self, x):
        return self.head(self.second(self.shorter(self.first(self.stem(x)))).mean((2, 3)))


class Unet(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.down = nn.MaxPool2d(2), nn.ModuleList(Conv(i, o, 3) for i, o in ((3, 4), (4, 6), (6, 8)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, 2) for i, o in ((8, 6), (6, 4)))
        self.join = nn.ModuleList(Conv(i, o, 3) for i, o in ((12, 6), (8, 4)))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        skips = []
        for down in self.down:
            x = down(self.pool(x) if skips else x)
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
            x = join(torch.cat([skip, up(x)], 1))
        return self.head(x)


class Cell(nn.Module):
    """As DARTS has them: states that are sums of what earlier ones give, and a cell gives its states, side by side."""

    def __init__(self, before, width):
        super().__init__()
        self.into = Conv(before, width)
        self.ways = nn.ModuleList(Conv(width, width, k) for k in (1, 3, 1, 3, 3, 5))

    def forward(self, x):
        states, ways = [self.into(x)], iter(self.ways)
        for _ in range(3):
            states.append(sum(next(ways)(state) for state in states))
        return torch.cat(states[1:], 1)


class Darts(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.Sequential(Cell(3, 4), Cell(12, 4)), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.cells(x).mean((2, 3)))


class Dense(nn.Module):
    """As in DenseNet: each layer reads all before it, side by side, through a norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * i) for i in range(4))
        self.layers = nn.ModuleList(nn.Conv2d(4 + 3 * i, 3, 3, padding=1) for i in range(3))
        self.head = nn.Linear(13, 4)

    def forward(self, x):
        found = [self.stem(x)]
        for norm, layer in zip(self.norms, self.layers, strict=False):
            found.append(layer(F.relu(norm(torch.cat(found, 1)))))
        return self.head(F.relu(self.norms[-1](torch.cat(found, 1))).mean((2, 3)))


class Stacked(nn.Module):
    """Branches that are weighed against each other, which no addition shows."""

    def __init__(self):
        super().__init__()
        self.stem, self.ways = Conv(3, 6, 3), nn.ModuleList(Conv(6, 5, k) for k in (1, 3, 5))
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = self.stem(x)
        x = torch.stack([way(x) for way in self.ways], 1)
        return self.head(torch.cat([x.amax(1), (x.softmax(1) * x).sum(1)], 1).mean((2, 3)))


class Trained(Net):
    """With a head that only training uses, so that batch norms are seen to count their batches."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Linear(17, 4)

    def forward(self, x):
        x = self.first(self.stem(x))
        y = self.head(self.second(self.shorter(x)).mean((2, 3)))
        return (y, self.aux(x.mean((2, 3)))) if self.training else y


def torchvision(name):
    import torchvision.models

    return getattr(torchvision.models, name)(num_classes=5, aux_logits=False, init_weights=False)


NETS = {"inception": (Net, 10), "unet": (Unet, 2), "darts": (Darts, 12), "dense": (Dense, 3), "stacked": (Stacked, 3)}
LARGE = {"googlenet": (lambda: torchvision("googlenet"), 36), "inception_v3": (lambda: torchvision("inception_v3"), 46)}


def made(name):
    torch.manual_seed(0)
    make, _ = (NETS | LARGE)[name]
    model = make().double().eval()
    for t in (*model.parameters(), *model.buffers()):  # layers that begin at zero or one would make branches alike
        if t.ndim < 2 and t.is_floating_point():
            nn.init.uniform_(t, 0.3, 1)
    size = 75 if name in LARGE else 8
    return model, torch.randn(2, 3, size, size, dtype=torch.float64)


def segments(oto):
    return [group for group in oto.node_groups if group.segment and group.prunable]


def erase(oto, share, seed=0):
    oto.random_set_zero_groups(0.4, seed=seed)
    parameters = dict(oto.model.named_parameters())
    for group in random.Random(seed).sample(segments(oto), int(len(segments(oto)) * share)):
        group.zero_(parameters, torch.tensor([0]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("graph", [False, True], ids=["class", "graph"])
@pytest.mark.parametrize("name", [*NETS, *(pytest.param(name, marks=pytest.mark.zoo) for name in LARGE)])
def test_any_branch_may_go(name, graph):
    model, x = made(name)
    oto = OTO(model, x, compress_mode="both", allow_graph=graph)
    assert len(segments(oto)) >= (NETS | LARGE)[name][1]
    for share in (1 / 3, 1.0):
        erase(oto, share)
        subnet = oto.construct_subnet(emitter="graph" if graph else "module")
        assert subnet.max_error <= 1e-9 and (graph or type(subnet.model) is type(model))
        assert oto.partition.erased(subnet.kept)
        assert sum(p.numel() for p in subnet.model.parameters()) == subnet.cost_after.params


def without(model, oto, *names):
    parameters = dict(model.named_parameters())
    for group in segments(oto):
        if group.name in names:
            group.zero_(parameters, torch.tensor([0]))
    return oto.construct_subnet()


def test_what_is_gone_computes_nothing_and_gives_no_channel():
    model, x = made("inception")
    oto = OTO(model, x, compress_mode="both")
    slim = without(model, oto, "first.two", "shorter.two", "second.wide.0").model
    assert isinstance(slim.first.two.forward, ErasedForward) and not list(slim.first.two.parameters())
    seen = {}
    for path in ("first.two", "shorter.two", "second.wide.0", "first", "shorter", "second"):
        slim.get_submodule(path).register_forward_hook(lambda m, args, y, path=path: seen.update({path: y.shape}))
    slim(x)
    assert [seen[path][1] for path in ("first", "shorter", "second")] == [13, 17, 15]
    assert seen["first.two"] == (2, 0, 8, 8) and seen["second.wide.0"] == (2, 0, 4, 4)
    assert seen["shorter.two"] == (0,), "what halves the resolution does not know it any more"


def test_batch_norms_that_count_their_batches_are_no_reason_to_stay():
    torch.manual_seed(0)
    model, x = Trained().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    oto = OTO(model, x, compress_mode="both")
    plain, _ = made("inception")
    assert segments(oto) and len(segments(oto)) == len(segments(OTO(plain, x, compress_mode="both")))
    subnet = without(model, oto, "first.two", "second.pool")
    assert subnet.max_error <= 1e-9 and "slim in train mode" in [check.what for check in subnet.checks]
    assert not [name for name, _ in subnet.model.named_buffers() if name.startswith(("first.two", "second.pool"))]
    y, aux = subnet.model.train()(x)
    (y.sum() + aux.sum()).backward()
    assert all(p.grad is not None for p in subnet.model.parameters())


class Counted(Dense):
    runs = 0

    def forward(self, x):
        Counted.runs += 1
        return super().forward(x)


def test_all_segments_are_asked_for_in_one_run():
    model, x = Counted().eval(), torch.randn(2, 3, 8, 8)
    runs = []
    for mode in ("prune", "both"):
        Counted.runs = 0
        oto = OTO(model, x, compress_mode=mode)
        runs.append(Counted.runs)
    assert len(segments(oto)) == 3 and runs[1] - runs[0] == 1
    assert oto._analysis.form.own.copy is None, "what it was asked on is not kept"


class Peeking(Net):
    """Looks at the weight of a single branch, which alone has to stay for that."""

    runs = 0

    def forward(self, x):
        Peeking.runs += 1
        assert self.first.one.conv.weight.ndim == 4
        return super().forward(x)


def test_a_branch_that_fails_among_many_is_the_only_one_that_stays():
    (plain, x), model = made("inception"), Peeking().double().eval()
    runs = []
    for mode in ("prune", "both"):
        Peeking.runs = 0
        oto = OTO(model, x, compress_mode=mode)
        runs.append(Peeking.runs)
    whole = {group.name for group in segments(OTO(plain, x, compress_mode="both"))}
    reasons = {group.name: group.reason for group in oto.node_groups if group.segment and not group.prunable}
    assert whole - {group.name for group in segments(oto)} == {"first.one"} == reasons.keys(), reasons
    assert "its class cannot leave it out: without it a Peeking fails" in reasons["first.one"]
    assert runs[1] - runs[0] < len(whole)


def test_it_is_saved_loaded_exported_and_trained(tmp_path):
    model, x = made("inception")
    oto = OTO(model.float(), x.float(), compress_mode="both")
    erase(oto, 0.4)
    subnet, x = oto.construct_subnet(tmp_path / "out"), x.float()
    again = library.load_subnet(tmp_path / "out", Net)
    assert torch.equal(again(x), subnet.model(x))
    exported = torch.export.export(subnet.model, (x,)).module()
    assert torch.allclose(exported(x), subnet.model(x), atol=1e-6)
    subnet.model.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in subnet.model.parameters())


def test_a_second_round():
    model, x = made("inception")
    one = without(model, OTO(model, x, compress_mode="both"), "first.one", "second.two", "shorter.one")
    oto = OTO(one.model, x, compress_mode="both")
    assert not {"first.one", "second.two", "shorter.one"} & {group.name for group in oto.node_groups}
    two = without(one.model, oto, "first.two", "second.one", "second.three")
    assert two.max_error <= 1e-9 and type(two.model) is Net and len(oto.partition.erased(two.kept)) >= 2
    assert sum(p.numel() for p in two.model.parameters()) == two.cost_after.params


def test_one_stays_of_what_is_laid_beside_each_other():
    model, x = made("inception")
    oto = OTO(model, x, compress_mode="both")
    names = [group.name for group in segments(oto) if group.name.startswith("first")]
    subnet = without(model, oto, *names)
    assert any("the network would come apart" in note for note in subnet.notes)
    assert subnet.cost_after.params > 0


def test_a_class_that_pools_what_is_gone_does_not():
    class Around(Net):
        def forward(self, x):
            x = self.stem(x)
            x = torch.cat([F.max_pool2d(self.first.one(x), 2), self.shorter.one(x.repeat(1, 3, 1, 1)[:, :17])], 1)
            return x.sum((1, 2, 3))

    torch.manual_seed(0)
    model, x = Around().double().eval(), torch.randn(2, 3, 8, 8).double()
    oto = OTO(model, x, compress_mode="both")
    assert {group.name for group in segments(oto)} == {"first", "shorter"}
    subnet = without(model, oto, "first")
    assert subnet.emitter == "module" and subnet.max_error <= 1e-9
    assert isinstance(subnet.model.first.one.forward, ErasedForward)


def data():
    torch.manual_seed(0)
    x = torch.randn(32, 3, 8, 8, dtype=torch.float64)
    return x, x.mean((2, 3)).argmax(1)


def trained(optimizer, model, steps=16, shrink=None):
    x, y = data()
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if shrink is not None and step == 12:
            shrink.shrink(optimizer)
    return losses


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["erase", "both"])
@pytest.mark.parametrize("method", ["hesso", "dhspg", "h2spg"])
def test_every_optimizer_meets_its_target_with_branches(method, mode):
    model, _ = made("inception")
    oto = OTO(model, data()[0][:2], compress_mode=mode)
    optimizer = getattr(oto, method)(variant="adam", lr=1e-2, target_macs=0.5, total_steps=16)
    trained(optimizer, model)
    subnet = oto.construct_subnet()
    assert subnet.max_error <= 1e-9 and type(subnet.model) is Net
    assert subnet.cost_after.macs <= 0.5 * subnet.cost_before.macs
    assert oto.partition.erased(subnet.kept) or mode == "both"


@pytest.mark.filterwarnings("ignore")
def test_the_search_removes_as_many_as_are_asked_for():
    model, _ = made("darts")
    oto = OTO(model, data()[0][:2], compress_mode="erase")
    optimizer = oto.h2spg(variant="adam", lr=1e-2, target_segments=5, total_steps=16)
    trained(optimizer, model)
    subnet = oto.construct_subnet()
    assert subnet.max_error <= 1e-9 and len(oto.partition.erased(subnet.kept)) >= 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["inception", "dense", "darts"])
def test_shrinking_is_the_run_without_it(name):
    losses, kinds = [], []
    for shrinks in (False, True):
        model, _ = made(name)
        oto = OTO(model, data()[0][:2], compress_mode="both")
        options = {"start_pruning_step": 2, "pruning_steps": 8, "total_steps": 20}
        optimizer = oto.hesso(variant="adam", lr=1e-2, target_macs=0.4, **options)
        losses.append(trained(optimizer, model, 20, oto if shrinks else None))
        kinds.append(sum(p.numel() for p in model.parameters()))
    assert kinds[1] < kinds[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def test_what_is_timed_is_of_the_class():
    model, x = made("inception")
    oto = OTO(model, x, compress_mode="both")
    kept = {group.name: torch.arange(group.size).numpy() for group in oto.node_groups if group.prunable}
    kept["first.two"] = kept["first.two"][:0]
    assert type(built(copy.deepcopy(model), oto.partition, kept, x)) is Net


@pytest.mark.parametrize("share", [0.45, 0.35, 0.3])
def test_the_cheaper_branch_stays_where_the_better_one_misses_the_target(share):
    """Of each concatenation one stays; which one is left to importance only if the target can be met so."""
    model, x = made("inception")
    choice = OTO(model, x, compress_mode="erase").hesso(lr=1e-2, target_macs=share, total_steps=16).choice
    saves = torch.from_numpy(choice.target.measure.marginal(choice.full, np.ones_like(choice.full)))
    gone = choice.select(saves**3, torch.ones(len(saves), dtype=torch.bool))  # the dearest are the best
    counts = np.array([n for own in (~gone).split(choice.sizes) for n in [int(own.sum())]])
    assert choice.target.measure(counts) <= choice.target.goal
