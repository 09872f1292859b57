"""A proof that compares nothing is none: what is no number, what no input reaches, what rounding would hide."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from oto import OTO
from oto.errors import VerificationError
from oto.slim import prove as proof
from oto.slim.graph.replay import alike
from oto.slim.proof import reach
from oto.slim.proof.compare import checked, compared, require
from oto.slim.proof.inputs import random_like
from oto.slim.proof.reference import check
from oto.slim.pruned_shapes import read_zeros
from oto.slim.source import Source

NAN, INF = float("nan"), float("inf")
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(5))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 4)
    )


def constructed(model: nn.Module, x: object = X, **options: object):
    oto = OTO(model.eval(), x)
    oto.random_set_zero_groups(0.5)
    return oto.construct_subnet(**options)


# What is no number --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:dummy_input holds NaN")
@pytest.mark.parametrize("emitter", ["auto", "module", "graph", "recording"])
def test_an_example_of_nan_is_refused(emitter):
    said = r"(?s)gives no number on the example .*NaN or infinity in the example \(\(4, 8\)\).*effect.*to fix"
    with pytest.raises(VerificationError, match=said):
        constructed(mlp(), torch.full((4, 8), NAN), emitter=emitter)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_buffer_that_lets_nothing_through_is_named(value):
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()
            self.register_buffer("spread", torch.full((4,), value))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * self.spread

    with pytest.raises(VerificationError, match=r"NaN or infinity in buffers: spread"):
        constructed(Normed())


def test_a_running_variance_of_nan_is_refused():
    model = mlp()
    model[3].running_var[2] = NAN
    with pytest.raises(VerificationError, match=r"NaN or infinity in buffers: 3\.running_var"):
        constructed(model)


class Masked(nn.Module):
    """Some logits are never given, as those of padding in a vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.register_buffer("mask", torch.tensor([0, -INF, 0, NAN]))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.mask


def test_entries_that_are_no_numbers_by_design_are_counted(tmp_path):
    subnet = constructed(Masked(), out_dir=tmp_path / "out")
    (note,) = subnet.notes
    assert "of the outputs 8 of 16 entries are finite" in note and note in str(subnet)
    assert {(c.finite, c.entries) for c in subnet.checks} == {(8, 16), (12, 24)} and subnet.max_error < 1e-12
    assert note in (tmp_path / "out" / "oto.json").read_text()


def test_nan_equals_nan_but_shows_nothing():
    nan, one = torch.tensor([NAN, INF, -INF, 1.0]), torch.tensor([NAN, INF, -INF, 1.5])
    assert compared([nan], [nan.clone()]) == type(compared([], []))(0.0, 1, 4)
    assert compared([nan], [one]).error == 0.5
    for other in (
        [0.0, INF, -INF, 1],
        [NAN, NAN, -INF, 1],
        [NAN, -INF, -INF, 1],
        [NAN, INF, -INF, NAN],
        [NAN, 3, -INF, 1],
    ):
        assert compared([nan], [torch.tensor(other)]).error == INF
        assert compared([torch.tensor(other)], [nan]).error == INF
        with pytest.raises(VerificationError):
            require([checked("slim", torch.float32, [nan], [torch.tensor(other)])])
    assert compared([torch.arange(3)], [torch.arange(3)]).finite == 3


def overflowing() -> nn.Module:
    model = mlp().half()
    with torch.no_grad():
        model[5].weight.fill_(6e4), model[5].bias.fill_(6e4)
        model[3].weight.fill_(10), model[3].bias.fill_(10)
    return model


def test_what_overflows_is_compared_in_float64_alone():
    subnet = constructed(overflowing(), X.half())
    assert {c.dtype for c in subnet.checks} == {"float64"} and subnet.max_error < 1e-12
    assert any("float16: no entry of the outputs is finite, so nothing was compared" in note for note in subnet.notes)
    with pytest.raises(VerificationError, match="probably an overflow"):
        constructed(overflowing(), X.half(), float64=False)


def test_outputs_without_entries_are_no_proof(tmp_path):
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)[:, :0]

    subnet = constructed(Picky(), out_dir=tmp_path / "out")
    assert not subnet.checks and subnet.max_error != subnet.max_error and "not verified" in str(subnet)
    assert any("the outputs are empty, so nothing was compared" in note for note in subnet.notes)


def test_random_inputs_are_drawn_from_numbers():
    mask = torch.zeros(2, 4, 4).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -INF)
    least = torch.finfo(torch.float32).min
    given = {"x": X.clone(), "mask": mask, "least": mask.clamp_min(least), "half": mask.half().clamp_min(-65504)}
    given["x"][1, 2], given["x"][3, 0] = NAN, INF
    for drawn in (random_like(given, 0), random_like(given, 1, 6)):
        assert drawn["x"].isfinite().sum() == drawn["x"].numel() - (2 if len(drawn["x"]) == 4 else 3)
        assert drawn["x"][drawn["x"].isfinite()].abs().max() < 10
        for name in ("mask", "least", "half"):
            hidden = (given[name][0] != 0).expand_as(drawn[name])
            assert drawn[name][hidden].unique().tolist() == [given[name].min().item()]
            assert drawn[name][~hidden].abs().max() < 10 and drawn[name][~hidden].all()
    assert random_like({"mask": mask}, 0, shapes=[(1, 5, 5)])["mask"].shape == (1, 5, 5)
    assert random_like(torch.full((3,), NAN), 0).isnan().all()


@pytest.mark.parametrize(("seed", "batch"), [(0, None), (1, None), (0, 6)])
def test_a_random_input_is_another_one_where_the_example_was_drawn_with_the_same_seed(seed, batch):
    torch.manual_seed(seed)
    image = torch.randn(4, 3, 8, 8)
    torch.manual_seed(seed)
    ids = torch.randint(0, 10, (4, 64))
    drawn = random_like(image, seed, batch), random_like(ids, seed, batch)
    assert (drawn[0][:4] - image).abs().mean() > 0.9
    assert (drawn[1][:4] == ids).float().mean() < 0.3
    assert torch.equal(random_like(ids, seed, batch), drawn[1])


# What holds other tensors --------------------------------------------------------------------------------------------


def test_rows_that_no_input_looks_up_are_compared_too(monkeypatch):
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.out = nn.Embedding(50, 16), nn.Linear(16, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.words(ids))

    made = proof.Emitted.__init__

    def spoiled(self: proof.Emitted, emitter: str, model: nn.Module, *rest: object, **more: object) -> None:
        with torch.no_grad():
            model.words.weight[40] *= 1.01
        made(self, emitter, model, *rest, **more)

    monkeypatch.setattr(proof.Emitted, "__init__", spoiled)
    with pytest.raises(VerificationError, match=r"does not hold the kept entries of the zeroed model: words\.weight"):
        constructed(Words(), torch.arange(6).reshape(2, 3), emitter="graph")


# What no input reaches -----------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two parts, of which an input may use one alone."""

    def __init__(self, gate) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = gate
        self.into = nn.Linear(8, 8)
        self.one, self.two = (nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(2))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        return self.out(self.one(h) + self.gate(x) * self.two(h))


def far(x: Tensor) -> Tensor:
    return (x.amax(1, keepdim=True) > 50).to(x.dtype)


def unreached(subnet) -> list[str]:
    return [note for note in subnet.notes if "reach" in note]


@pytest.mark.parametrize("emitter", ["module", "graph", "recording"])
def test_a_part_that_no_input_reaches_is_told(emitter):
    (note,) = unreached(constructed(Branches(far), emitter=emitter))
    assert (
        "does not reach two.0.weight, two.0.bias and two.2.weight" in note or "two.0.weight, two.0.bias, two.2" in note
    )
    assert "one." not in note and "into" not in note
    reaching = X.clone()
    reaching[0, 0] = 60
    assert not unreached(constructed(Branches(far), reaching, emitter=emitter))


def test_units_that_are_dead_are_told():
    model = Branches(torch.ones_like)
    model.gate = lambda x: 1.0
    nn.init.constant_(model.two[0].bias, -1e3)
    (note,) = unreached(constructed(model))
    assert "two.0.weight" in note


def test_a_mask_that_hides_all_is_told():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.into, self.q, self.k = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.out = nn.Linear(16, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            h = self.into(x)
            q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in (self.q(h), self.k(h), h))
            y = nn.functional.scaled_dot_product_attention(q, k, v, mask)
            return self.out(y.transpose(1, 2).flatten(2))

    x, alone = torch.randn(2, 6, 5), torch.eye(6, dtype=torch.bool)
    (note,) = unreached(constructed(Attending(), (x, alone)))  # each word sees itself alone, whatever the scores are
    assert "q.weight" in note and "k.weight" in note and "into" not in note
    assert not unreached(constructed(Attending(), (x, alone | True)))


def test_steps_without_a_gradient_are_no_reason_to_say_more_than_is_known():
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = mlp(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out((self.body(x) * 50).round())

    (note,) = unreached(constructed(Rounded()))
    assert "is not known: no gradient arrives there" in note and "body.0.weight" in note


def test_a_forward_without_gradients_is_told():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    (note,) = unreached(constructed(Frozen()))
    assert "is not known" in note


def test_a_backward_pass_that_does_not_fit_is_left_out(monkeypatch):
    model = mlp().eval()
    monkeypatch.setattr(reach, "run", None)  # cannot be called
    (note,) = reach.reached_by(model, dict(model.named_parameters()), [X], 100)
    assert "is not known: MemoryError" in note
    assert not reach.reached_by(model, dict(model.named_parameters()), [X], None)


def test_a_proof_leaves_the_slim_model_as_it_was():
    model = Branches(far)
    for p in model.one.parameters():
        p.requires_grad_(False)
    subnet = constructed(model)
    assert all(p.grad is None for p in subnet.model.parameters())
    asked = {name: p.requires_grad for name, p in subnet.model.named_parameters()}
    assert asked == {name: not name.startswith("one.") for name in asked}


# What rounding would hide --------------------------------------------------------------------------------------------


def test_a_model_in_half_precision_is_proved_to_float64s_last_digits():
    full = mlp().bfloat16().eval()
    wrong = copy.deepcopy(full)
    wrong[5].weight.data[0, 0] *= 1.01
    failed = [c for c in check(full, wrong, X.bfloat16()) if not c.passed]
    assert {c.dtype for c in failed} == {"float64"}


def test_recordings_are_alike_but_for_rounding():
    def recorded(number: float, *layers: nn.Module) -> torch.fx.GraphModule:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Sequential(*layers)

            def forward(self, x: Tensor) -> Tensor:
                return torch.nn.functional.elu(x * number).to(torch.float32)

        return torch.fx.symbolic_trace(Net())

    one = recorded(0.1)
    assert alike(one, recorded(0.1 * (1 + 1e-7)), 1e-4)
    assert not alike(one, recorded(0.1 * 1.01), 1e-4)
    wide = recorded(0.1)
    next(n for n in wide.graph.nodes if n.target == "to").args = (*list(wide.graph.nodes)[2:3], torch.float64)
    assert alike(one, wide, 1e-4)


def test_numbers_in_a_recording_are_held_against_those_of_another(monkeypatch):
    class Measured(nn.Module):
        """Divides by a number that leaves torch."""

        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x / float(x.abs().mean()))

    subnet = constructed(Measured(), emitter="recording")
    assert any("numbers that were computed in float32" in note for note in subnet.notes)
    made = proof.Emitted.__init__

    def spoiled(self: proof.Emitted, emitter: str, model: nn.Module, *rest: object, **more: object) -> None:
        node = next(n for n in model.graph.nodes if any(isinstance(x, float) for x in n.args))
        node.args = tuple(x * (1 + 2e-4) if isinstance(x, float) else x for x in node.args)
        model.recompile()
        made(self, emitter, model, *rest, **more)

    monkeypatch.setattr(proof.Emitted, "__init__", spoiled)
    with pytest.raises(VerificationError, match="makes other calls than the one to be proved"):
        constructed(Measured(), emitter="recording")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_tensors_that_torch_does_not_compare_are_a_note():
    """They are not taken to be alike in silence."""

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()
            self.register_buffer("table", torch.eye(3).to_sparse_csr())

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    subnet = constructed(Sparse(), torch.randn(4, 8))
    assert any("the entries of table were not compared one by one" in note for note in subnet.notes), subnet.notes


# What is known of the full model, and said of a slim one -------------------------------------------------------------


def source_of(model: nn.Module, **options: object) -> Source:
    oto = OTO(model.eval(), X, **options)
    oto.random_set_zero_groups(0.5)
    kept = read_zeros(oto.node_groups, oto.model)
    return Source(oto.model, X, oto.partition, oto._analysis.form.own, kept)


def test_notes_are_of_the_slim_model_that_was_compared_last():
    reference = source_of(mlp()).reference
    one, other = (copy.deepcopy(reference.model) for _ in range(2))
    reference.check(one)
    reference.notes.append("of the one")
    reference.full.note("of the full one")
    reference.check(one)
    assert reference.notes == ["of the one"]
    reference.check(other)
    assert reference.notes == [] and "of the full one" in reference.full.notes


def test_what_was_computed_of_the_full_model_is_kept_at_other_counts():
    source = source_of(mlp())
    source.reference.check(copy.deepcopy(source.model))
    kept = {name: np.arange(len(atoms) + 1) for name, atoms in source.kept.items()}
    other = source.keeping(kept, None)
    assert other.kept is kept and other.own is None and other.pruned is not source.pruned
    assert other.reference is source.reference and len(other.reference.full.own) > 1

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            h = self.net[:2](x)
            return self.net[2:](h), h

    strict = source_of(Hidden(), strict_out_nodes=True)  # outputs get thinner, too, so others are compared
    kept = {name: np.arange(len(atoms) + 1) for name, atoms in strict.kept.items()}
    assert strict.keeping(kept, None).reference is not strict.reference
