"""What the class OTO says when less is pruned than a user may think; copies of it, and of the model."""

from __future__ import annotations

import copy
import gc
import pickle
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from oto import OTO, load_subnet
from oto.errors import (
    DummyInputWarning,
    ModelChangedError,
    NothingPrunableError,
    NotPrunedWarning,
    OptionError,
    TooLateError,
    TraceError,
    UnknownParameterError,
)
from tests.optim.toy import END, PERIODS, START, STEPS, assert_same, count_zeros, net, train

X = torch.randn(2, 3, 8, 8)
SCHEDULE = {
    "target_group_sparsity": 0.5,
    "start_pruning_step": START,
    "pruning_steps": STEPS,
    "pruning_periods": PERIODS,
    "lr": 0.1,
}


def trained(model: nn.Module, steps: int = END, then=lambda n: None, **options):
    oto = OTO(model, X, **options)
    optimizer = oto.hesso(**SCHEDULE)
    train(model, optimizer, range(steps), then)
    return oto, optimizer


# A slim model that is not slim ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, what, effect",
    [
        (0, "step 0 of 8: 0 of 14 groups are zero yet", "nothing was removed"),
        (3, "step 3 of 8: 0 of 14 groups are zero yet", "nothing was removed"),
        (5, "step 5 of 8: 5 of 14 groups are zero yet", "only what is zero was removed"),
    ],
)
def test_a_subnet_before_pruning_has_finished(steps, what, effect):
    oto, optimizer = trained(net(), steps)
    with pytest.warns(NotPrunedWarning, match=what) as caught:
        subnet = oto.construct_subnet()
    assert caught[0].filename == __file__  # the line of the user
    assert "to fix  construct_subnet after 8 steps" in str(caught[0].message)
    assert what in str(caught[0].message) and effect in str(caught[0].message) and len(caught) == 1
    assert f"note: {what}" in str(subnet) and subnet.notes[0].startswith(what)
    train(oto.model, optimizer, range(steps, END))
    done = oto.construct_subnet()  # warnings are errors in these tests
    assert done.notes == () and "note" not in str(done)


def test_a_model_without_zeros():
    oto = OTO(net(), X)
    with pytest.warns(NotPrunedWarning, match=r"0 of 14 groups are zero[^$]*as large as full[^$]*oto\.hesso"):
        subnet = oto.construct_subnet()
    assert subnet.cost_after == subnet.cost_before
    oto.random_set_zero_groups(0.2)
    assert oto.construct_subnet().notes == ()  # zeros from elsewhere need no optimizer


def test_a_dense_checkpoint_that_was_loaded_after_pruning():
    dense = net().state_dict()
    oto, _ = trained(net())
    oto.model.load_state_dict(dense)
    with pytest.warns(NotPrunedWarning, match=r"0 of 14 groups are zero, the optimizer has pruned 7: these are other"):
        oto.construct_subnet()


def test_an_optimizer_that_is_gone_says_nothing_and_is_not_held():
    oto, optimizer = trained(net(), 3)
    del optimizer
    gc.collect()
    with pytest.warns(NotPrunedWarning, match="^0 of 14 groups are zero\n"):
        oto.construct_subnet()


# Averages of the weights ---------------------------------------------------------------------------------------------


class OwnAverage:
    """Not a module; holds the averaged copy as ``.ema``, as trainers of detectors do."""

    def __init__(self, model):
        self.ema = copy.deepcopy(model).eval()
        for p in self.ema.parameters():
            p.requires_grad_(False)

    @torch.no_grad()
    def update(self, model):
        new = model.state_dict()
        for name, value in self.ema.state_dict().items():
            if value.is_floating_point():
                value.mul_(0.5).add_(new[name], alpha=0.5)


def of_torch(model):
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    return average, lambda: average.update_parameters(model), average.module


def of_timm(kind):
    def make(model):
        utils = pytest.importorskip("timm.utils")
        average = getattr(utils, kind)(model, decay=0.5)
        return average, lambda: average.update(model), average.module

    return make


def own(model):
    average = OwnAverage(model)
    return average, lambda: average.update(model), average.ema


AVERAGES = {"torch": of_torch, "timm v2": of_timm("ModelEmaV2"), "timm v3": of_timm("ModelEmaV3"), "own": own}


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_of_the_weights_gives_a_slim_average(tmp_path, name):
    model = net()
    average, update, inner = AVERAGES[name](model)
    oto, optimizer = trained(model, END + 2, then=lambda n: update())
    assert count_zeros(model) == 7 and count_zeros(inner) == 0  # near zero, but never there
    with pytest.warns(NotPrunedWarning, match=r"the optimizer has pruned 7[^$]*zero_pruned_in\(model\)"):
        oto.construct_subnet(model=average)

    before = copy.deepcopy(inner)
    optimizer.zero_pruned_in(average)
    assert count_zeros(inner) == 7
    for (key, was), now in zip(before.state_dict().items(), inner.state_dict().values(), strict=True):
        assert bool(((now == was) | (now == 0)).all()), key  # nothing else was written
    subnet = oto.construct_subnet(tmp_path / "slim", model=average, program=True)
    assert subnet.notes == () and oto.compressed_model_path.is_file()
    inner.eval()
    with torch.no_grad():
        torch.testing.assert_close(subnet.model(X), inner(X))
        torch.testing.assert_close(load_subnet(tmp_path / "slim")(X), inner(X))
        assert not torch.allclose(model.eval()(X), inner(X))  # it is the average, not the model
    assert subnet.model[0].out_channels < 8 and oto.model is model
    assert subnet.model[1].running_mean.equal(inner[1].running_mean[subnet.kept["0.weight"]])
    update()  # what is zero in both stays zero
    assert count_zeros(inner) == 7


def test_tensors_by_name_are_an_average_too():
    model = net()
    _, optimizer = trained(model, END)
    for prefix in ("", "module."):
        other = net()
        optimizer.zero_pruned_in({prefix + name: tensor for name, tensor in other.state_dict().items()})
        assert count_zeros(other) == 7


def test_an_average_in_another_precision():
    model = net()
    _, optimizer = trained(model, END)
    other = net(torch.float64).requires_grad_(False)
    optimizer.zero_pruned_in(other)
    assert count_zeros(other) == 7


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.down(self.up(x).relu()))


def test_tied_parameters_stay_tied_in_a_copy():
    model, x = Tied(), torch.randint(9, (2, 5))
    oto = OTO(model, x)
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet(model=copy.deepcopy(model))
    assert_same(subnet.model, oto.construct_subnet().model)
    assert subnet.model.head.weight is subnet.model.embed.weight and subnet.model.embed.weight.shape[1] < 6


@pytest.mark.parametrize(
    "other",
    [
        nn.Linear(3, 2),
        nn.Sequential(nn.Conv2d(3, 9, 3), *net()[1:]),  # another width
        SimpleNamespace(ema=nn.Linear(3, 2)),
        SimpleNamespace(shadow=[]),
    ],
    ids=["class", "width", "wrapped", "object"],
)
def test_what_is_no_copy_is_refused(other):
    oto, optimizer = trained(net())
    with pytest.raises(UnknownParameterError, match=r"has no .*0\.weight[^$]*of the shape[^$]*nothing was zeroed"):
        optimizer.zero_pruned_in(other)
    with pytest.raises(UnknownParameterError, match=r"is no copy of Sequential: no .*0\.weight[^$]*to fix"):
        oto.construct_subnet(model=other)


# Frozen parameters ---------------------------------------------------------------------------------------------------


def test_a_frozen_convolution_before_a_trainable_norm_is_left_alone():
    model = net()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model[0])
    oto, _ = trained(model)
    assert "frozen: it would zero 0.weight, 0.bias" in str(oto.explain())
    (whole,) = [w for w in oto.explain().whole if w.reason.startswith("frozen")]
    assert whole.group == "0.weight" and ("0.weight", 0) in whole.parameters
    assert_same(model[0], before)
    subnet = oto.construct_subnet()
    assert_same(subnet.model[0], before)
    assert subnet.model[3].out_channels == 3  # int(6 * .5) of the other group


def test_a_frozen_norm_keeps_its_channels():
    model = net()
    model[1].requires_grad_(False)
    assert {g.name for g in OTO(model, X).node_groups if g.prunable} == {"3.weight"}


@pytest.mark.parametrize("variant", ["sgd", "adamw"])
def test_a_frozen_layer_only_shrinks_with_what_it_reads(variant):
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    model[2].requires_grad_(False)
    before = copy.deepcopy(model[2])
    x = torch.randn(5, 3)
    oto = OTO(model, x)
    assert {g.name for g in oto.node_groups if g.prunable} == {"0.weight"}
    optimizer = oto.hesso(**SCHEDULE, variant=variant)
    for _ in range(END + 70):  # past the point where resting entries are written again
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert_same(model[2], before)  # also at what reads a pruned entry
    assert oto.construct_subnet().model[2].weight.shape == (6, 4)


def test_all_frozen():
    for model in (net(), net().to("meta"), net().eval()):
        x = X.to("meta") if next(model.parameters()).is_meta else X
        with pytest.raises(
            NothingPrunableError, match=r"frozen: it would zero[^$]*to fix  set requires_grad_\(True\)"
        ) as no:
            OTO(model.requires_grad_(False), x)
        assert "prune_frozen=True" in str(no.value) and "merge" in str(no.value)


def test_a_frozen_copy_of_a_pruned_model_gives_the_same_subnet():
    oto, _ = trained(net())
    frozen = copy.deepcopy(oto.model).eval().requires_grad_(False)
    ours, theirs = oto.construct_subnet(), OTO(frozen, X, prune_frozen=True).construct_subnet()
    assert_same(ours.model, theirs.model)
    assert not any(p.requires_grad for p in theirs.model.parameters())
    assert_same(oto.construct_subnet(model=frozen).model, ours.model)


class Adapted(nn.Module):
    """A frozen linear layer with a trained product of low rank beside it."""

    def __init__(self, inner, rank=4):
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.a = nn.Linear(inner.in_features, rank, bias=False)
        self.b = nn.Linear(rank, inner.out_features, bias=False)

    def forward(self, x):
        return self.inner(x) + self.b(self.a(x))


def adapted(rank=4):
    torch.manual_seed(0)
    return nn.Sequential(Adapted(nn.Linear(3, 8), rank), nn.ReLU(), Adapted(nn.Linear(8, 2), rank))


@pytest.mark.filterwarnings("ignore:HESSO chooses by gradients")
def test_adapters_on_a_frozen_model():
    x = torch.randn(5, 3)
    oto = OTO(adapted(), x)
    assert {g.name for g in oto.node_groups if g.prunable} == {"0.a.weight", "2.a.weight"}  # the ranks
    assert "frozen: it would zero *.inner.weight, *.inner.bias" in str(oto.explain())
    with pytest.raises(NothingPrunableError, match=r"frozen: it would zero \*\.inner\.weight[^$]*prune_frozen=True"):
        OTO(adapted(rank=1), x)  # where no rank may go, nothing may
    model = adapted()
    both = OTO(model, x, prune_frozen=True)
    (hidden,) = [g for g in both.node_groups if g.name == "0.inner.weight"]
    assert {piece.parameter for piece in hidden.zeros} == {"0.inner.weight", "0.inner.bias", "0.b.weight"}
    optimizer = both.hesso(**SCHEDULE)
    for _ in range(END):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    subnet = both.construct_subnet()
    assert subnet.cost_after.params < subnet.cost_before.params
    assert not subnet.model[0].inner.weight.requires_grad and subnet.model[0].a.weight.requires_grad


def test_codes_of_numbers_are_never_zeroed():
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.randint(-8, 8, (8, 3), dtype=torch.int8), requires_grad=False)
            self.last = nn.Linear(8, 2)

        def forward(self, x):
            return self.last(nn.functional.linear(x, self.codes.float() / 8).relu())

    for prune_frozen in (False, True):
        try:
            groups = OTO(Quantized(), torch.randn(2, 3), prune_frozen=prune_frozen).node_groups
        except NothingPrunableError:
            continue
        assert all(piece.parameter != "codes" for g in groups if g.prunable for piece in g.zeros)


def test_freezing_after_the_analysis_is_refused_where_it_matters():
    model = net()
    oto = OTO(model, X)
    model[8].requires_grad_(False)  # never zeroed: no matter
    oto.hesso(**SCHEDULE)
    model[0].requires_grad_(False)
    with pytest.raises(TooLateError, match=r"0\.weight, 0\.bias were frozen after OTO[^$]*to fix  freeze before OTO"):
        oto.hesso(**SCHEDULE)
    train(model, OTO(model, X, prune_frozen=True).hesso(**SCHEDULE), range(END))
    assert count_zeros(model) == 7
    model.requires_grad_(True)
    anything = OTO(model, X, prune_frozen=True)
    model[0].requires_grad_(False)
    anything.hesso(**SCHEDULE)


def test_names_that_changed_after_the_analysis_are_refused():
    model = net()
    oto = OTO(model, X)
    model[0].compile(backend="eager")  # which keeps names
    oto.hesso(**SCHEDULE)
    model[0] = torch.compile(model[0], backend="eager")
    for make in (lambda: oto.hesso(**SCHEDULE), lambda: oto.family(targets=[0.5], lr=0.1, total_steps=9)):
        with pytest.raises(
            ModelChangedError, match=r"no 0\.weight, 0\.bias any more[^$]*block\.compile\(\) keeps names"
        ):
            make()
    OTO(model, X).hesso(**SCHEDULE)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({2: (16, 5)}, r"2\.weight, 2\.bias of Sequential have other[^$]*2\.weight is \[5, 16\], and was \[4, 16\]"),
        ({0: (6, 24), 2: (24, 4)}, r"0\.weight, 0\.bias, 2\.weight of Sequential have other shapes"),
    ],
    ids=["head", "width"],
)
def test_shapes_that_changed_after_the_analysis_are_refused_before_training(changed, said):
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    oto = OTO(model, torch.randn(2, 6))
    for place, sizes in changed.items():
        model[place] = nn.Linear(*sizes)
    for make in (lambda: oto.hesso(**SCHEDULE), lambda: oto.family(targets=[0.5], lr=0.1, total_steps=9)):
        with pytest.raises(ModelChangedError, match=said):
            make()
    OTO(model, torch.randn(2, 6)).hesso(**SCHEDULE)


def test_unfreezing_after_the_analysis_is_reported():
    model = net()
    model[0].requires_grad_(False)
    oto = OTO(model, X)
    model.requires_grad_(True)
    with pytest.warns(NotPrunedWarning, match=r"0\.weight, 0\.bias were frozen when OTO[^$]*a new OTO") as caught:
        oto.hesso(**SCHEDULE)
    assert caught[0].filename == __file__


# Marks that come too late --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mark",
    [
        lambda oto: oto.mark_unprunable_by_param_names(["0.weight"]),
        lambda oto: oto.mark_unprunable_by_node_ids([0]),
        lambda oto: oto.skip_operators(["conv2d"]),
    ],
    ids=["parameter", "node", "operator"],
)
def test_marks_after_the_optimizer_was_made_are_refused(mark):
    oto = OTO(net(), X)
    optimizer = oto.hesso(**SCHEDULE)
    before = oto.node_groups
    with pytest.raises(TooLateError, match=r"HESSO chooses among[^$]*nothing was marked[^$]*mark first, then make"):
        mark(oto)
    assert oto.node_groups is before
    del optimizer
    gc.collect()
    mark(oto)  # the next optimizer will honour it
    assert oto.node_groups != before


# Copies --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda what: pickle.loads(pickle.dumps(what))], ids=["copy", "pickle"]
)
def test_model_analysis_and_optimizer_can_be_copied_together(copied):
    model = net()
    oto, optimizer = trained(model, START + 1, skip_patterns=["4"])
    other, other_oto, other_optimizer = copied((model, oto, optimizer))
    assert other_oto.model is other and other is not model
    assert other_oto.node_groups == oto.node_groups
    for m, o in ((model, optimizer), (other, other_optimizer)):
        train(m, o, range(START + 1, END))
    assert_same(model, other)
    ours, theirs = oto.construct_subnet(), other_oto.construct_subnet()
    assert_same(ours.model, theirs.model)
    assert other_oto.explain().share == oto.explain().share
    alone = copied(oto)
    assert_same(alone.construct_subnet().model, ours.model)
    assert alone.hesso(**SCHEDULE).num_atoms == optimizer.num_atoms


def test_an_example_may_be_what_a_tokenizer_gives(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, ids, scale=None):
            return self.down(torch.relu(self.up(ids)) if scale is None else scale * torch.relu(self.up(ids)))

    oto = OTO(Named(), UserDict(ids=torch.randn(2, 3), scale=torch.rand(2, 1)))  # no dict, and no pytree
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet(tmp_path)
    assert subnet.emitter == "module" and subnet.model.up.out_features == 4 and len(subnet.checks) >= 3


# What is told --------------------------------------------------------------------------------------------------------


def test_what_a_second_save_takes_away_is_a_note(tmp_path):
    oto = OTO(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 3))
    oto.random_set_zero_groups(0.5)
    first = oto.construct_subnet(tmp_path / "out", program=True, save_full=True)
    again = oto.construct_subnet(tmp_path / "out", program=True, save_full=True)
    assert first.notes == again.notes == ()
    last = oto.construct_subnet(tmp_path / "out", save_full=True)
    assert last.notes == ("model.pt2 of the earlier artifact, which was not asked for now, was removed",)
    assert not (tmp_path / "out" / "model.pt2").exists() and oto.full_group_sparse_model_path is not None


def test_a_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    oto = OTO(model, torch.randn(2, 3))
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet("~/out")
    assert subnet.path == tmp_path / "out" and (tmp_path / "out" / "oto.json").is_file()
    slim = load_subnet("~/out", lambda: model)
    assert torch.equal(slim(torch.ones(1, 3)), subnet.model(torch.ones(1, 3)))
    subnet.export("pt2", "~/slim.pt2")
    assert (tmp_path / "slim.pt2").is_file()


def test_an_example_with_nan_is_told_at_once():
    x = torch.randn(2, 3)
    x[0, 0] = float("nan")
    with pytest.warns(DummyInputWarning, match=r"NaN\n  effect[^$]*to fix") as caught:
        OTO(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), {"input": x})
    assert caught[0].filename == __file__
    masks = torch.full((2, 3), -torch.inf)
    OTO(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), masks)  # a mask may hold these


class Wrapper:
    def __init__(self, model):
        self.name, self.model = "yolo", model


class ModuleWrapper(nn.Module):
    """Gives objects of its own."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x):
        return [Wrapper(self.inner(x))]


def test_a_wrapper_names_what_it_holds():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(
        OptionError, match=r"the model is a Wrapper, no torch\.nn\.Module[^$]*OTO\(model\.model, \.\.\.\)"
    ):
        OTO(Wrapper(model), torch.randn(2, 3))
    with pytest.raises(OptionError, match=r"the model is a class[^$]*module itself"):
        OTO(nn.Linear, torch.randn(2, 3))
    with pytest.raises(TraceError, match=r"made of Wrapper[^$]*to fix   OTO\(model\.inner, \.\.\.\)"):
        OTO(ModuleWrapper(model), torch.randn(2, 3))


def test_what_was_found_can_be_asked_where_nothing_may_go():
    with pytest.raises(NothingPrunableError) as caught:
        OTO(nn.Linear(3, 2), torch.randn(2, 3))
    assert "it is a dimension of an output" in str(caught.value.explanation)
    assert "search: the class was asked, and can do without anything" in str(caught.value.explanation)


def test_a_search_that_settled_nothing_says_so():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    assert "search" not in str(OTO(model, torch.randn(2, 3)).explain())
    assert "search: the class was asked, and" in str(OTO(model, torch.randn(2, 3)).explain(search=True))
    graph = OTO(model, torch.randn(2, 3), allow_graph=True)
    assert "the class was not asked, since allow_graph=True" in str(graph.explain(search=True))


def test_a_subnet_in_a_console_is_one_line(tmp_path):
    oto = OTO(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 3))
    oto.random_set_zero_groups(0.5)
    said = repr(oto.construct_subnet())
    assert said.startswith("Subnet(Sequential, module: 50.0% of the MACs, 26 of 50 parameters, largest error ")
    assert "\n" not in said and len(said) < 120
    assert repr(oto.construct_subnet(tmp_path / "out")).endswith(f"saved in {tmp_path / 'out'})")
