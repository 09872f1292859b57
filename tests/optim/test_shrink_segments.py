"""Segments leave the model while it trains: the same optimizer goes on, on the same trajectory, with fewer layers."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from oto import OTO, load_subnet
from oto.errors import NoGradientWarning, NotPrunedWarning, ShrinkError
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run
from oto.slim.widths import Widths
from tests.optim.test_segments import Net
from tests.slim.test_depth import Config
from tests.slim.test_depth import Net as Layered
from tests.slim.test_erased import Gated

SGD = {"variant": "sgd", "lr": 0.05, "first_momentum": 0.9, "weight_decay": 1e-3}
ADAMW = {"variant": "adamw", "lr": 3e-3, "weight_decay": 0.05}
START, STEPS = 2, 20
AT = (START + 6, START + 12, START + STEPS + 1)  # as a period of half-spaces ends, and after all
KINDS = {
    "hesso": {"saliency": "taylor_second_order", "pruning_periods": 4},
    "hspg": {"lmbda": 1.0},
    "dhspg": {},
    "hesso_cric": {"sampling_steps": 1, "max_cycles": 2},
}


class Way:
    """A training run that can be shrunk and resumed."""

    def __init__(self, kind="hesso", options=SGD, mode="both", make=lambda: Net(5), target=0.4, **about):
        torch.manual_seed(0)
        self.model = make().double()
        self.x = torch.randn(2, 4, dtype=torch.float64)
        about = {"min_kept": 0.7} | about  # channels alone would not do
        self.oto = OTO(self.model, self.x, compress_mode=mode, **about)
        when = {"target_macs": target, "start_pruning_step": START, "pruning_steps": STEPS}
        self.optimizer = getattr(self.oto, kind)(**when, **options, **KINDS[kind])
        self.losses = []

    def until(self, steps, at=(), **options):
        while len(self.losses) < steps:
            generator = torch.Generator().manual_seed(len(self.losses))
            x = torch.randn(64, 4, generator=generator, dtype=torch.float64)
            y = torch.randint(0, 3, (64,), generator=generator)
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())
            if len(self.losses) in at:
                self.oto.shrink(self.optimizer, **options)
        return self

    @property
    def segments(self):
        return [group.name for group in self.oto.node_groups if group.segment and group.prunable]


def owned(way):
    return [name for name, _ in way.model.named_parameters()]


@pytest.mark.filterwarnings("ignore::oto.errors.NotPrunedWarning")
@pytest.mark.parametrize("mode", ["erase", "both"])
@pytest.mark.parametrize(("kind", "options"), [*((k, SGD) for k in KINDS), ("hesso", ADAMW)])
def test_the_rest_of_the_run_is_on_the_same_trajectory(kind, options, mode):
    full, slim = Way(kind, options, mode).until(40), Way(kind, options, mode)
    slim.until(40, (*AT, 40))
    assert len(slim.segments) < 5
    assert slim.optimizer.progress.cost <= 0.4 * slim.oto._analysis.first.cost.macs
    if kind in ("hspg", "dhspg") and mode == "both":
        return  # norms of the full model's groups count what reads channels that are gone, with or without segments
    assert max(abs(a - b) for a, b in zip(full.losses, slim.losses, strict=True)) <= 1e-9
    assert slim.optimizer.progress.cost == full.optimizer.progress.cost
    one, two = full.oto.construct_subnet(), slim.oto.construct_subnet()
    assert one.cost_after == two.cost_after and one.cost_before == two.cost_before
    assert relative_error(run(one.model, slim.x), run(two.model, slim.x)) <= 1e-9
    assert sum(p.numel() for p in slim.model.parameters()) == two.cost_after.params


def test_what_is_gone_is_gone_everywhere():
    way = Way().until(AT[0])
    before, optimizer = owned(way), way.optimizer
    groups = [id(group) for group in optimizer.param_groups]
    assert way.oto.shrink(optimizer) is way.model and type(way.model) is Net
    gone = {name for name in before if name not in owned(way)}
    assert gone and {name.rsplit(".", 2)[0] for name in gone} < {f"blocks.{i}" for i in range(5)}
    assert [id(group) for group in optimizer.param_groups] == groups
    (group,) = optimizer.param_groups
    assert group["param_names"] == owned(way) and group["params"] == list(way.model.parameters())
    assert set(optimizer.state) == set(way.model.parameters()), "of nothing else, and all that it had"
    assert set(optimizer.parameters()) == set(owned(way))
    missing = {name.rsplit(".", 2)[0] for name in gone}
    assert set(way.segments) == {f"blocks.{i}" for i in range(5)} - missing
    assert "computes nothing" in str(way.model)
    assert not any(group.segment and group.name in missing for group in way.oto.node_groups)
    assert way.optimizer.num_removed == way.optimizer.num_pruned > 0
    assert str(way.oto.erasable()).startswith(f"{len(way.segments)} segments")


@pytest.mark.parametrize("options", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_a_checkpoint_from_after_it_resumes_bit_for_bit(options):
    one = Way(options=options).until(AT[0] + 2, AT)
    held = io.BytesIO()
    torch.save({"model": one.model.state_dict(), "optimizer": one.optimizer.state_dict()}, held)
    held.seek(0)
    saved = torch.load(held, weights_only=True)
    two = Way(options=options)
    two.oto.shrink(two.optimizer, like=saved["optimizer"])
    assert owned(two) == owned(one) and len(two.segments) < 5
    two.model.load_state_dict(saved["model"])
    two.optimizer.load_state_dict(saved["optimizer"])
    two.losses = list(one.losses)
    assert two.until(40, AT[1:]).losses == one.until(40, AT[1:]).losses
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_how_many_of_a_run_stay_is_counted_in_the_full_model():
    way = Way(mode="erase", target=0.65, min_depth=0.6).until(40, AT)
    assert len(way.segments) == 3
    assert {g.among for g in way.oto.node_groups if g.segment} == {(("blocks.*", 3),)}
    again = copy.deepcopy(way.oto)
    with pytest.warns(NotPrunedWarning):
        again.construct_subnet()


def test_the_report_and_the_file_are_those_of_the_first_model(tmp_path):
    way = Way().until(40, AT)
    subnet = way.oto.construct_subnet(tmp_path / "slim", report=True)
    assert subnet.emitter == "module" and subnet.cost_before == Way().oto._analysis.cost()
    assert "blocks." in (tmp_path / "slim" / "report.html").read_text()
    costs = [line["MACs"] for line in way.optimizer.history if "MACs" in line]
    assert costs == sorted(costs, reverse=True) and costs[-1] == subnet.cost_after.macs
    loaded = load_subnet(tmp_path / "slim", lambda: Net(5).double())
    assert torch.equal(loaded(way.x), subnet.model(way.x))


def test_averages_lose_the_same():
    way = Way().until(AT[0])
    average = torch.optim.swa_utils.AveragedModel(way.model)
    average.update_parameters(way.model)
    way.oto.shrink(way.optimizer, averages=[average])
    assert [name for name, _ in average.module.named_parameters()] == owned(way)
    way.until(AT[0] + 3)
    average.update_parameters(way.model)


class Ways(nn.Module):
    """Two branches into one addition, of which one stays."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.one, self.two = nn.ModuleList(nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 8)) for _ in range(2))
        self.three = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

    def forward(self, x):
        x = self.stem(x)
        x = self.one(x) + self.two(x)
        return self.head(x + self.three(x))


def test_of_two_that_meet_the_other_stays_and_pruning_goes_on():
    way = Way(make=Ways, mode="erase", target=0.7)
    names = [group.name for group in way.oto.node_groups if group.segment]
    assert sorted(names) == ["one", "three", "two"]
    atoms = way.optimizer.atoms.clone()
    atoms[names.index("one")] = 2  # at zero for good, while pruning goes on
    way.optimizer.atoms = atoms
    way.optimizer.zero_pruned_()
    way.until(3, (3,))
    assert sorted(way.segments) == ["three", "two"] and "one.0.weight" not in owned(way)
    way.until(40)
    kept = way.oto.construct_subnet().kept
    assert len(kept["two"]) == 1 and not len(kept["three"])


def test_a_segment_that_its_class_cannot_leave_out_stays_at_zero():
    torch.manual_seed(0)
    model, x = Gated().double(), torch.randn(4, 3, 6, 6).double()
    oto = OTO(model, x, compress_mode="both", allow_graph=True)
    optimizer = oto.hesso(target_macs=0.3, lr=0.05, start_pruning_step=1, pruning_steps=4, saliency="magnitude")
    last = [group.name for group in optimizer.node_groups].index("last")
    marked = optimizer.mark_redundant

    def mark(chosen, final=True):
        of = list(chosen.split(optimizer.choice.sizes))
        of[last] = torch.ones(1, dtype=torch.bool)
        marked(torch.cat(of), final)

    optimizer.mark_redundant = mark
    for step in range(8):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if step == 5:
            expected = model(x).detach()
            with pytest.warns(NotPrunedWarning, match=r"last is at zero, and stays in the Gated: a Gated cannot do w"):
                oto.shrink(optimizer)
            torch.testing.assert_close(model(x), expected)
            assert optimizer.num_removed and model.last.weight.numel() and model.into.weight.shape[0] < 8
    assert not model.last.weight.any() and "last" in optimizer.pruned_groups
    with pytest.warns(NotPrunedWarning, match="last, which is zero, cannot be left out"):
        oto.construct_subnet(emitter="module")
    assert "last" in [s.name for s in oto.partition.erased(oto.construct_subnet(emitter="graph").kept)]


def test_layers_that_a_config_states_go_at_the_end():
    torch.manual_seed(0)
    model, x = Layered(Config()), torch.randn(64, 4)
    oto = OTO(model, x[:2], compress_mode="both", layout="uniform")
    optimizer = oto.hesso(target_macs=0.2, lr=0.02, start_pruning_step=2, pruning_steps=8, saliency="magnitude")
    for step in range(14):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.randint(0, 3, (64,))).backward()
        optimizer.step()
        if step == 11:
            before = sum(p.numel() for p in model.parameters())
            with pytest.warns(NotPrunedWarning, match="config of a model in training cannot state"):
                oto.shrink(optimizer)
            assert sum(p.numel() for p in model.parameters()) < before and len(model.layers) == Config().depth
    subnet = oto.construct_subnet()
    assert subnet.emitter == "config" and subnet.model.config.depth < Config().depth
    assert subnet.cost_after.macs <= 0.2 * subnet.cost_before.macs


class Normed(nn.Module):
    """A branch with the weights of a norm that other branches have too."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm.weight, self.norm.bias = norm.weight, norm.bias

    def forward(self, x):
        return self.down(torch.relu(self.up(self.norm(x))))


class Tied(nn.Module):
    def __init__(self, pairs=2):
        super().__init__()
        norms = [nn.LayerNorm(8) for _ in range(pairs)]
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Normed(norm) for norm in norms for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.mark.parametrize("at", [(8,), (8, 25)], ids=["once", "twice"])
@pytest.mark.parametrize("gone", [(0,), (0, 1)], ids=["one", "all"])
@pytest.mark.parametrize("mode", ["erase", "both"])
def test_a_tied_parameter_is_gone_only_with_all_that_hold_it(gone, at, mode):
    def run_until(shrinking):
        way = Way(make=Tied, mode=mode, options=ADAMW, target=0.9 - 0.2 * len(gone), min_kept=0.9)
        with torch.no_grad():
            for i in gone:
                for p in way.model.blocks[i].down.parameters():
                    p.mul_(1e-3)
        names = [group.name for group in way.optimizer.node_groups]
        atoms = list(way.optimizer.atoms.split(way.optimizer.choice.sizes))
        for i in gone:
            atoms[names.index(f"blocks.{i}")] = torch.full((1,), 2, dtype=atoms[0].dtype)
        way.optimizer.atoms = torch.cat(atoms)
        way.optimizer.zero_pruned_()
        return way.until(30, shrinking)

    full, slim = run_until(()), run_until(at)
    (group,) = slim.optimizer.param_groups
    assert group["param_names"] == owned(slim) and group["params"] == list(slim.model.parameters())
    assert "blocks.0.norm.weight" not in owned(slim)
    assert ("blocks.1.norm.weight" in owned(slim)) == ("blocks.1" in slim.segments)
    assert "blocks.1" not in slim.segments or gone == (0,)
    assert max(abs(a - b) for a, b in zip(full.losses, slim.losses, strict=True)) <= 1e-9
    one, two = full.oto.construct_subnet(), slim.oto.construct_subnet()
    assert two.emitter == "module" and one.cost_after.macs == two.cost_after.macs
    assert [p.shape for p in one.model.parameters()] == [p.shape for p in two.model.parameters()]
    assert relative_error(run(one.model, slim.x), run(two.model, slim.x)) <= 1e-9


class Mixture(nn.Module):
    """Experts that are added up one after the other, each weighed by a gate; the scale would silence all of them."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.scale, self.gate = nn.Parameter(torch.ones(8)), nn.Linear(8, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12, bias=False), nn.ReLU(), nn.Linear(12, 8, bias=False)) for _ in range(4)
        )

    def forward(self, x):
        x = self.stem(x)
        h = x * self.scale
        weights = self.gate(h).softmax(-1)
        y = self.experts[0](h)
        for i in (1, 2, 3):
            y = y + weights[..., i : i + 1] * self.experts[i](h)
        return self.head(x + y)


class Side(nn.Module):
    """Two widths that are pruned apart, whether ``a``, which reads one and writes the other, is there or not."""

    def __init__(self):
        super().__init__()
        self.stem, self.pre, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        x = self.stem(x)
        h = self.pre(x).relu()
        return self.head(x + 0.5 * self.a(h) + self.b(h).tanh())


class Weighed(nn.Module):
    """As DARTS has it while it searches: operations side by side, each with a weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.ways = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Linear(8, 8, bias=False)) for _ in range(6))
        self.alphas = nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        x = self.stem(x)
        for i, alpha in enumerate(self.alphas.softmax(1)):
            x = sum(alpha[k] * self.ways[3 * i + k](x) for k in range(3)).tanh()
        return self.head(x)


class Square(nn.Module):
    """The block calls its last layer itself, and what that layer reads is as wide as what it is added to."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.mix, self.out = (nn.ModuleList(nn.Linear(8, 8) for _ in range(3)) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for mix, out in zip(self.mix, self.out, strict=True):
            x = x + out(mix(x).tanh()).sin()
        return self.head(x)


class Images(nn.Module):
    """A convolution reads the stem inside of a segment, and another one behind it."""

    def __init__(self):
        super().__init__()
        self.stem, self.last, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 3)
        self.block = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1))

    def forward(self, x):
        x = self.stem(x.view(-1, 1, 1, 4).expand(-1, -1, 6, -1).repeat(1, 1, 1, 2))
        return self.head(self.last(x + self.block(x)).mean((2, 3)))


def gone(way, *names):
    """Let segments be at zero for good, and nothing else."""
    optimizer, codes = way.optimizer, way.optimizer._codes()
    for group, own in zip(optimizer.node_groups, codes, strict=True):
        own[:] = 2 if group.name in names else 0
        group.zero_(optimizer.parameters(), torch.arange(group.size if group.name in names else 0))
    optimizer.atoms = torch.cat(codes)


def test_sums_of_what_is_left_can_go_on_losing_it():
    way = Way(make=Mixture, target=0.5)
    assert len(way.segments) == 7  # each expert, the sums of the first two and three, and all of it
    gone(way, "experts.1")
    way.oto.shrink(way.optimizer)  # all others can go on losing atoms, or it is refused
    assert len(way.segments) == 5 and not way.model.experts[1].state_dict()
    again = OTO(way.model, way.x, compress_mode="erase")
    segments = [group for group in again.node_groups if group.segment and group.prunable]
    assert not any(piece.parameter == "scale" for group in segments for piece in group.zeros)


def test_the_last_of_a_concatenation_has_to_stay_anyway():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.ways = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU()) for _ in range(3))
            self.head = nn.Linear(18, 3)

        def forward(self, x):
            return self.head(torch.cat([way(x) for way in self.ways], 1))

    way = Way(make=Beside, mode="erase", target=0.5)
    first, second, _ = way.segments
    gone(way, first, second)
    way.oto.shrink(way.optimizer)
    assert way.model.head.in_features == 6 and not way.segments


@pytest.mark.parametrize("make", [Side, Weighed, Square])
def test_widths_beside_what_is_gone_go_on_getting_smaller(make):
    runs = []
    for shrinks in (False, True):
        way = Way(make=make, target=0.3, options=ADAMW, min_kept=0)
        first = way.segments[0]
        way.until(10)
        gone(way, first)
        if shrinks:
            way.oto.shrink(way.optimizer)
            assert first not in way.segments
        way.until(START + STEPS + 1)
        if shrinks:
            way.oto.shrink(way.optimizer)
        runs.append(way.until(30))
    full, slim = runs
    assert slim.losses == pytest.approx(full.losses, rel=1e-9)
    one, two = (way.oto.construct_subnet() for way in runs)
    assert one.emitter == two.emitter == "module" and one.cost_after == two.cost_after
    assert relative_error(run(one.model, slim.x), run(two.model, slim.x)) <= 1e-9


def test_what_was_shrunk_after_pruning_resumes_though_widths_are_tied_in_it(monkeypatch):
    monkeypatch.setattr(Widths, "apart", lambda *_: None)  # as where it is not known what a module gives
    one = Way(make=Side, target=0.6).until(START + STEPS)
    gone(one, one.segments[0])
    early = Way(make=Side, target=0.6)
    gone(early, early.segments[0])
    with pytest.raises(ShrinkError, match="once pruning is over"):
        early.oto.shrink(early.optimizer)
    one.oto.shrink(one.optimizer)
    saved = {"model": one.model.state_dict(), "optimizer": one.optimizer.state_dict()}
    two = Way(make=Side, target=0.6)
    two.oto.shrink(two.optimizer, like=saved["optimizer"])
    two.model.load_state_dict(saved["model"])
    two.optimizer.load_state_dict(saved["optimizer"])
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_what_only_segments_read_that_are_gone_goes_first_and_nothing_need_be_done():
    way = Way(make=Side, target=0.3, options=ADAMW, min_kept=0).until(10)
    gone(way, *way.segments)
    way.oto.shrink(way.optimizer)
    with pytest.warns(NoGradientWarning, match=r"pre\.weight apart(.|\n)*to fix  nothing, if all that read it left"):
        way.until(30)
    subnet = way.oto.construct_subnet()
    assert subnet.model.pre.out_features < subnet.model.stem.out_features and subnet.max_error <= 1e-12


def test_what_reads_a_channel_in_a_segment_that_is_gone_does_not_count():
    way = Way(make=Images)
    gone(way, "block")
    read = []
    for _ in range(2):
        entries = zip(way.optimizer.node_groups, way.optimizer.entries(), strict=True)
        read += [own.reader_sq for group, own in entries if group.name == "stem.weight"]
        way.oto.shrink(way.optimizer)
    assert torch.equal(*read)


def test_what_counts_is_looked_up_once_for_each_choice(monkeypatch):
    way = Way(make=Images)
    assert way.optimizer.computed_groups() == list(way.optimizer.node_groups)
    gone(way, "block")  # other atoms, so it is looked up anew
    looked = way.optimizer.computed_groups()
    assert looked != list(way.optimizer.node_groups)
    monkeypatch.setattr(way.optimizer, "parameters", None)
    assert way.optimizer.computed_groups() == looked
