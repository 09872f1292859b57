"""HESSO: what it does to the model, and that it is the wrapped optimizer in every other respect."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oto.errors import (
    NoGradientError,
    NoGradientWarning,
    NonFiniteParameterError,
    NothingPrunableError,
    OTOError,
    TargetError,
    UnknownParameterError,
)
from oto.groups.node_group import NodeGroup, Slice
from oto.optim import HESSO
from tests.optim.toy import (
    PERIODS,
    START,
    STEPS,
    QuietGroup,
    assert_same,
    backward,
    count_zeros,
    groups,
    hesso,
    net,
    train,
    zero_atoms,
)

END = START + STEPS

WRAPPED = {
    "sgd": ({"variant": "sgd"}, lambda p, **kw: torch.optim.SGD(p, lr=0.1, **kw)),
    "momentum": (
        {"variant": "sgd", "first_momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-2},
        lambda p, **kw: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=1e-2, **kw),
    ),
    "nesterov": (
        {"variant": "sgd", "first_momentum": 0.9, "nesterov": True},
        lambda p, **kw: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, **kw),
    ),
    "adam": (
        {"variant": "adam", "first_momentum": 0.8, "second_momentum": 0.99, "weight_decay": 1e-2},
        lambda p, **kw: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.99), weight_decay=1e-2, **kw),
    ),
    "adamw": ({"variant": "adamw", "amsgrad": True}, lambda p, **kw: torch.optim.AdamW(p, lr=0.1, amsgrad=True, **kw)),
    "class": ({"base": torch.optim.RMSprop}, lambda p, **kw: torch.optim.RMSprop(p, lr=0.1)),
    "function": (
        {"base": functools.partial(torch.optim.Adagrad, lr_decay=0.1)},
        lambda p, **kw: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.1),
    ),
}
MODES = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
CASES = [(n, m) for n in WRAPPED for m in MODES if n not in ("class", "function") or m == "loop"]


# The wrapped optimizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, mode", CASES)
def test_without_pruning_every_step_is_the_wrapped_one(name, mode):
    options, make = WRAPPED[name]
    switches = {} if name in ("class", "function") else MODES[mode]
    ours, theirs = net(), net()
    optimizer = hesso(ours, target_group_sparsity=0.0, **options, **switches)
    reference = make(theirs.parameters(), **switches)
    train(ours, optimizer, range(10))
    train(theirs, reference, range(10))
    assert_same(ours, theirs)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert optimizer.state[p].keys() == reference.state[q].keys()
        for key, value in reference.state[q].items():
            torch.testing.assert_close(optimizer.state[p][key], value, rtol=0, atol=0)


def test_before_pruning_every_step_is_the_wrapped_one():
    ours, theirs = net(), net()
    train(ours, hesso(ours, start_pruning_step=5), range(5))
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), range(5))
    assert_same(ours, theirs)


def test_an_optimizer_can_be_wrapped_as_it_is():
    ours, theirs = net(), net()
    optimizer = hesso(ours, base=torch.optim.SGD(ours.parameters(), lr=0.2, momentum=0.9), lr=None)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in ours.named_parameters()]
    train(ours, optimizer, range(START))
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.2, momentum=0.9), range(START))
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"variant": "sgd", "second_momentum": 0.9}, "no second_momentum"),
        ({"variant": "adam", "dampening": 0.1}, "no dampening"),
        ({"base": torch.optim.SGD, "first_momentum": 0.9}, "use the keywords of that optimizer"),
        ({"variant": "lion"}, "variant is 'lion'"),
    ],
)
def test_keywords_that_the_wrapped_optimizer_does_not_have_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        hesso(net(), **options)
    model = net()
    with pytest.raises(TypeError, match="cannot be set any more"):
        hesso(model, base=torch.optim.SGD(model.parameters()), lr=0.1)


def test_parameter_groups_keep_their_settings():
    def split(model):  # as the Hugging Face Trainer does
        decayed = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
        plain = [(n, p) for n, p in model.named_parameters() if p.dim() == 1]
        return [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": 0.01}]

    ours, theirs = net(), net()
    optimizer = hesso(ours, params=split(ours), variant="adamw", target_group_sparsity=0.5, start_pruning_step=4)
    reference = torch.optim.AdamW(split(theirs), lr=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    train(ours, optimizer, range(4))
    train(theirs, reference, range(4))
    assert_same(ours, theirs)
    train(ours, optimizer, range(4, 12))
    assert count_zeros(ours) == 7


def test_names_can_be_given_next_to_plain_parameter_groups():
    model = net()
    plain = [{"params": [p], "lr": 0.1 / (i + 1)} for i, p in enumerate(model.parameters())]
    optimizer = hesso(model, params=plain, names=model.named_parameters())
    assert [group["param_names"][0] for group in optimizer.param_groups] == [n for n, _ in model.named_parameters()]
    with pytest.raises(UnknownParameterError, match=r"names=model\.named_parameters"):
        hesso(model, params=model.parameters())


SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: n / 10),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=12),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_learning_rate_schedulers_reach_the_wrapped_optimizer(scheduler, name):
    options, make = WRAPPED[name]
    ours, theirs = net(), net()
    optimizer, reference = hesso(ours, target_group_sparsity=0.0, **options), make(theirs.parameters())
    schedules = [SCHEDULERS[scheduler](o) for o in (optimizer, reference)]
    for n in range(8):
        for model, o, schedule in zip((ours, theirs), (optimizer, reference), schedules, strict=True):
            backward(model, n)
            o.step()
            schedule.step(*[1.0] if scheduler == "ReduceLROnPlateau" else [])
        if n == 4:  # schedulers must still reach it after a reload
            optimizer.load_state_dict(optimizer.state_dict())
    assert_same(ours, theirs)


def test_maximize_is_honoured():
    down, up = net(), net()
    lower, raise_ = hesso(down), hesso(up, maximize=True)
    for n in range(END + 2):
        backward(down, n)
        lower.step()
        backward(up, n)
        for p in up.parameters():
            p.grad.neg_()
        raise_.step()
    assert_same(down, up)


def test_two_modes_are_passed_on():
    class TwoModes(torch.optim.SGD):
        mode = "train"

        def train(self):
            self.mode = "train"

        def eval(self):
            self.mode = "eval"

    optimizer = hesso(net(), base=TwoModes)
    optimizer.eval()
    assert optimizer.base.mode == "eval"
    optimizer.train()
    assert optimizer.base.mode == "train"
    hesso(net()).train()  # nothing to pass on


# Pruning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, mode", CASES)
def test_the_asked_number_of_groups_is_at_zero_at_the_end_of_each_period_and_stays(name, mode):
    options, _ = WRAPPED[name]
    switches = {} if name in ("class", "function") else MODES[mode]
    model = net()
    optimizer = hesso(model, target_group_sparsity=0.5, **options, **switches)
    counts = []
    train(model, optimizer, range(END + 4), then=lambda n: counts.append(count_zeros(model)))
    # 14 groups, 7 to go, three periods of two steps from step 2 on: at least 7 / 3, then 14 / 3, then 7
    assert counts == [0, 0, 0, 3, 3, 5, 5, 7, 7, 7, 7, 7]
    assert optimizer.num_pruned == 7
    assert optimizer.sparsity == 0.5
    for group, own in zip(optimizer.node_groups, zero_atoms(model), strict=True):
        assert not own.all()
        assert optimizer.pruned_groups.get(group.name, torch.tensor([])).tolist() == own.nonzero()[:, 0].tolist()


def test_what_is_pruned_is_not_chosen_again():
    def any_order(entries):
        return torch.rand(len(entries.weights[0]))

    model = net()
    optimizer = hesso(model, saliency=any_order, pruning_steps=7, pruning_periods=7)
    counts = []
    train(model, optimizer, range(START + 8), then=lambda n: counts.append(count_zeros(model)))
    assert counts == [0, 0, 1, 2, 3, 4, 5, 6, 7, 7]


def test_a_redundant_group_shrinks_linearly_and_the_others_are_left_alone():
    model = net()
    optimizer = hesso(model, lr=0.0, start_pruning_step=1, pruning_steps=4, pruning_periods=1)
    before = model[0].weight.detach().clone()
    for n in range(5):
        backward(model, n)
        optimizer.step()
        left = [1.0, 0.75, 0.5, 0.25, 0.0][n]
        rows = (optimizer.redundant_groups or optimizer.pruned_groups).get("0.weight", torch.tensor([], dtype=int))
        expected = before.clone()
        expected[rows] *= left
        torch.testing.assert_close(model[0].weight.detach(), expected)  # float32, four products
    assert optimizer.num_pruned == 7


def test_the_least_salient_groups_go():
    model = net()
    with torch.no_grad():
        for bn in (model[1], model[4]):
            bn.bias.zero_()
        model[0].bias.zero_()
        model[0].weight.fill_(1.0)
        model[3].weight.fill_(1.0)
        model[1].weight.copy_(torch.arange(8) + 10.0)
        model[4].weight.copy_(torch.arange(6) + 100.0)
    optimizer = hesso(
        model,
        saliency="magnitude",
        normalize="none",
        pruning_periods=1,
        start_pruning_step=0,
        target_group_sparsity=0.36,
    )
    backward(model, 0)
    optimizer.step()
    # ||x||^2: 27 + (10 + c)^2 in the first group, 72 + (100 + c)^2 in the second; int(14 * 0.36) = 5
    assert {k: v.tolist() for k, v in optimizer.redundant_groups.items()} == {"0.weight": [0, 1, 2, 3, 4]}


def test_pruning_is_exact_for_the_model():
    model = net().double()
    optimizer = hesso(model)
    train(model, optimizer, range(END))
    model.eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    hidden = model[:3](x)
    assert (hidden[:, zero_atoms(model)[0]] == 0).all()


def test_no_node_group_falls_below_its_minimum():
    model = net()
    node_groups = groups(min_kept=3)
    train(model, hesso(model, node_groups, target_group_sparsity=8 / 14), range(END))
    # 5 of 8 and 3 of 6 may go: all of the 8 that were asked for
    assert [int(own.sum()) for own in zero_atoms(model)] == [5, 3]
    with pytest.raises(TargetError, match=r"asks for 9 of 14 groups, but only 8 may go[^$]*ask for 0\.5714 or less"):
        hesso(net(), node_groups, target_group_sparsity=9 / 14)


def test_kept_counts_are_divisible_and_nothing_is_given_up():
    model = net()
    train(model, hesso(model, group_divisible=4, target_group_sparsity=0.43), range(END))
    # units: 4 and 4 (kept, at least one unit) of 8; 2 and 4 (kept) of 6; int(14 * 0.43) = 6 = 4 + 2
    assert [int(own.sum()) for own in zero_atoms(model)] == [4, 2]


def test_moments_of_pruned_entries_are_zero():
    for name in ("momentum", "adamw"):
        model = net()
        optimizer = hesso(model, **WRAPPED[name][0])
        train(model, optimizer, range(END + 2))
        saved = optimizer.state_dict()["state"]
        names = optimizer.param_groups[0]["param_names"]
        for group, own in zip(optimizer.node_groups, zero_atoms(model), strict=True):
            for piece in group.zeros:
                for key, moment in saved[names.index(piece.parameter)].items():
                    if key in ("momentum_buffer", "exp_avg"):  # the others divide, they move nothing
                        assert (piece.of(moment)[own] == 0).all()
                        assert (piece.of(moment)[~own] != 0).any()


def test_infinite_gradients_do_not_wake_the_pruned():
    model = net()
    optimizer = hesso(model)
    train(model, optimizer, range(END))
    backward(model, END)
    model[0].weight.grad.fill_(torch.inf)
    model[1].bias.grad.fill_(torch.nan)
    optimizer.step()
    assert count_zeros(model) == 7


@pytest.mark.parametrize("to_none", [True, False])
def test_nothing_is_chosen_where_no_step_had_a_gradient(to_none):
    model = net()
    backward(model, 0)
    optimizer = hesso(model)
    model.zero_grad(set_to_none=to_none)
    for _ in range(START):
        optimizer.step()
    with pytest.raises(NoGradientError, match=r"zero or missing\n.*nothing was chosen\n.*loss\.backward\(\) before"):
        optimizer.step()
    assert optimizer.clock == START and not optimizer.atoms.any()
    train(model, optimizer, range(START, END))  # it goes on where it was
    assert count_zeros(model) == 7


def test_weights_alone_are_chosen_by_without_gradients_with_a_warning():
    model = net()
    optimizer = hesso(model, saliency="magnitude", pruning_periods=1)
    for n in range(END):
        if n == START:
            with pytest.warns(NoGradientWarning, match="chosen by weights that no step trains") as caught:
                optimizer.step()
            assert caught[0].filename == __file__
        else:
            optimizer.step()
    assert count_zeros(model) == 7


def test_a_single_step_without_gradients_is_no_fault():
    """Averages over the steps before say enough, as where a batch had no labels."""
    for zero in (lambda model: model.zero_grad(), lambda model: model.zero_grad(set_to_none=False)):
        model = net()
        optimizer = hesso(model)
        train(model, optimizer, range(START))
        backward(model, START)
        zero(model)
        optimizer.step()
        train(model, optimizer, range(START + 1, END))
        assert count_zeros(model) == 7


def test_node_groups_that_no_gradient_reaches_are_named():
    model = net()
    model[3].requires_grad_(False), model[4].requires_grad_(False)  # all that zeroes the second node group
    optimizer = hesso(model)
    train(model, optimizer, range(START))
    backward(model, START)
    with pytest.warns(NoGradientWarning, match=r"tells the atoms of 3\.weight apart\n.*in the order of their indices"):
        optimizer.step()


def test_frozen_parameters_are_pruned_too():
    model = net()
    model[0].requires_grad_(False)
    train(model, hesso(model), range(END))
    assert count_zeros(model) == 7


def test_accumulated_micro_batches_are_one_step():
    model = net()
    optimizer = hesso(model)
    for n in range(END):
        optimizer.zero_grad()
        for part in range(3):
            torch.nn.functional.mse_loss(model(torch.randn(4, 3, 8, 8)), torch.zeros(4, 4) + part + n).backward()
        optimizer.step()
    assert optimizer.clock == END
    assert count_zeros(model) == 7


def test_a_closure_is_run_once_with_gradients_and_its_loss_is_returned():
    ours, theirs = net(), net()
    optimizer, plain = hesso(ours), hesso(theirs)
    for n in range(END):

        def closure(n=n):
            assert torch.is_grad_enabled()
            return backward(ours, n)

        expected = backward(theirs, n)
        plain.step()
        assert optimizer.step(closure).item() == expected.item()
    assert_same(ours, theirs)


def test_hooks_and_schedulers_see_an_optimizer():
    model, seen = net(), []
    optimizer = hesso(model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    train(model, optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "saved", "loading", "loaded"]


def test_a_step_that_the_scaler_skips_does_not_count():
    model = net()
    optimizer, scaler = hesso(model), torch.amp.GradScaler("cpu")
    steps = 0
    while optimizer.clock < END:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.randint(4, (4,)))
        scaler.scale(loss).backward()
        if steps % 3 == 1:
            model[0].weight.grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        steps += 1
    assert steps == END + END // 2 - (END % 2 == 0 and steps % 3 == 1)
    assert count_zeros(model) == 7


def test_progress_can_be_read_at_any_time():
    model = net()
    optimizer = hesso(model)
    assert (optimizer.sparsity, optimizer.num_pruned, optimizer.num_atoms) == (0.0, 0, 14)
    assert str(optimizer.choice.target) == "target_group_sparsity=0.5: at most 7 of 14 groups"
    train(model, optimizer, range(START + 1))
    assert sum(map(len, optimizer.redundant_groups.values())) == 3
    assert optimizer.pruned_groups == {}


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, mode", [("sgd", "loop"), ("momentum", "foreach"), ("adamw", "fused"), ("adam", "loop")])
def test_resuming_gives_the_same_trajectory(name, mode, dtype):
    options = WRAPPED[name][0] | MODES[mode]
    through, model = net(dtype), net(dtype)
    train(through, hesso(through, **options), range(END + 3))

    optimizer, last = hesso(model, **options), 0
    for stop in (0, 1, START + 1, START + 2, START + 3, END, END + 1):
        train(model, optimizer, range(last, stop))
        last, checkpoint = stop, io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)

        checkpoint.seek(0)
        saved = torch.load(checkpoint, weights_only=True)
        resumed = net(dtype)
        for p in resumed.parameters():
            torch.nn.init.ones_(p)
        again = hesso(resumed, **options)
        resumed.load_state_dict(saved["model"])
        again.load_state_dict(saved["optimizer"])
        assert again.num_pruned == optimizer.num_pruned, stop
        train(resumed, again, range(stop, END + 3))
        assert_same(resumed, through)
        assert count_zeros(resumed) == 7, stop
        assert again.atoms.dtype == torch.uint8
    train(model, optimizer, range(last, END + 3))
    assert_same(model, through)  # that it was saved changed nothing


@pytest.mark.parametrize("stop", [0, START + 1, END])
def test_loading_what_was_just_saved_changes_nothing(stop):
    ours, theirs = net(), net()
    optimizer, plain = hesso(ours, first_momentum=0.9), hesso(theirs, first_momentum=0.9)
    train(ours, optimizer, range(stop))
    train(theirs, plain, range(stop))
    for _ in range(2):  # as accelerator.prepare does
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.base.param_groups is optimizer.param_groups
    assert optimizer.base.state is optimizer.state
    train(ours, optimizer, range(stop, END + 2))
    train(theirs, plain, range(stop, END + 2))
    assert_same(ours, theirs)


def test_a_saved_state_does_not_change_as_training_goes_on():
    model = net()
    optimizer = hesso(model)
    train(model, optimizer, range(START + 1))
    saved = optimizer.state_dict()["param_groups"][0]
    step, atoms = saved["oto_step"], saved["oto_atoms"].clone()
    train(model, optimizer, range(START + 1, END))
    assert saved["oto_step"] == step
    assert saved["oto_atoms"].equal(atoms)


def test_a_checkpoint_of_the_wrapped_optimizer_starts_pruning_afresh():
    model = net()
    dense = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    train(model, dense, range(3))
    optimizer = hesso(model, first_momentum=0.9)
    optimizer.load_state_dict(dense.state_dict())
    assert optimizer.clock == 0
    assert optimizer.param_groups[0]["lr"] == 0.3
    train(model, optimizer, range(END))
    assert count_zeros(model) == 7


def test_a_checkpoint_of_other_groups_is_refused():
    other = hesso(net(), groups()[:1], target_group_sparsity=0.5).state_dict()
    with pytest.raises(OTOError, match="for 8 prunable atoms, this optimizer has 14"):
        hesso(net()).load_state_dict(other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_trains_the_same(copied):
    model = net()
    optimizer = hesso(model, variant="adamw")
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)  # replaces `step` on the instance
    train(model, optimizer, range(START + 1))
    other, other_optimizer = copied((model, optimizer))
    train(model, optimizer, range(START + 1, END))
    train(other, other_optimizer, range(START + 1, END))
    assert_same(model, other)
    assert count_zeros(other) == 7


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_torch_distributed_checkpoints(name, flat):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flat, strict=False)
    through, model = net(), net()
    reference, optimizer = hesso(through, **WRAPPED[name][0]), hesso(model, **WRAPPED[name][0])
    for both in ((through, reference), (model, optimizer)):
        get_optimizer_state_dict(*both, options=options)  # takes a step with zero gradients and no rate
    assert optimizer.clock == 0  # moments are zero now, not absent: that much happens to any torch optimizer
    assert_same(model, net())
    train(through, reference, range(END))
    train(model, optimizer, range(START + 1))
    model.zero_grad()
    weights = copy.deepcopy(model.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    for key, value in weights.items():
        assert value.equal(model.state_dict()[key])

    resumed = net()
    resumed.load_state_dict(weights)
    again = hesso(resumed, **WRAPPED[name][0])
    set_optimizer_state_dict(resumed, again, saved, options=options)
    assert again.clock == START + 1
    train(resumed, again, range(START + 1, END))
    assert_same(resumed, through)


def test_a_learning_rate_of_zero_alone_is_an_ordinary_step():
    model = net()
    optimizer = hesso(model, lr=0.0)  # the first step of a warm-up
    train(model, optimizer, range(3))
    assert optimizer.clock == 3


def test_state_that_is_put_in_from_outside_reaches_the_wrapped_optimizer():
    ours, theirs = net(), net()
    optimizer, plain = hesso(ours, first_momentum=0.9), hesso(theirs, first_momentum=0.9)
    train(ours, optimizer, range(3))
    train(theirs, plain, range(3))
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.state = copy.copy(optimizer.state)
    optimizer.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = 0.3
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        optimizer.state[p] = {}
        plain.state[q] = {}
    train(ours, optimizer, range(3, END))
    train(theirs, plain, range(3, END))
    assert_same(ours, theirs)


# Parameters come and go ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
def test_parameters_can_be_added_later(named):
    model, extra = net(), torch.nn.Linear(3, 3)
    optimizer = hesso(model, first_momentum=0.9)
    train(model, optimizer, range(START + 1))
    optimizer.add_param_group({"params": extra.named_parameters() if named else extra.parameters(), "lr": 0.5})
    assert optimizer.param_groups[1]["lr"] == 0.5
    before = extra.weight.detach().clone()
    extra(torch.ones(2, 3)).sum().backward()
    train(model, optimizer, range(START + 1, END))
    assert not extra.weight.equal(before)
    assert count_zeros(model) == 7
    optimizer.load_state_dict(optimizer.state_dict())


def test_parameters_can_be_replaced_in_place():
    ours, theirs = net(), net()
    optimizer, plain = hesso(ours), hesso(theirs)
    train(ours, optimizer, range(START + 1))
    train(theirs, plain, range(START + 1))
    new = {name: torch.nn.Parameter(p.detach().clone()) for name, p in ours.named_parameters()}
    for name, p in new.items():  # as accelerate does for FSDP2
        ours.get_submodule(name.rpartition(".")[0]).register_parameter(name.rpartition(".")[2], p)
    optimizer.param_groups[0]["params"][:] = new.values()
    train(ours, optimizer, range(START + 1, END + 2))
    train(theirs, plain, range(START + 1, END + 2))
    assert_same(ours, theirs)


def test_storage_can_be_replaced():
    ours, theirs = net(), net()
    optimizer, plain = hesso(ours), hesso(theirs)
    train(ours, optimizer, range(END))
    train(theirs, plain, range(END))
    for p in ours.parameters():
        p.data = p.data.clone()  # as model.to() does
    train(ours, optimizer, range(END, END + 2))
    train(theirs, plain, range(END, END + 2))
    assert_same(ours, theirs)


def test_nothing_but_param_groups_holds_a_parameter():
    model = net()
    optimizer = hesso(model)
    train(model, optimizer, range(END))
    own = {key: value for key, value in vars(optimizer).items() if key not in ("param_groups", "state", "base")}
    held = [t for t in tensors_in(own) if isinstance(t, torch.nn.Parameter) or isinstance(t._base, torch.nn.Parameter)]
    assert held == []


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from tensors_in(vars(value))


# What is refused -----------------------------------------------------------------------------------------------------


def test_an_unsound_parameter_is_found_at_once():
    model = net()
    model[3].weight.data[2, 1, 0, 0] = torch.nan
    with pytest.raises(NonFiniteParameterError, match=r"in 3\.weight\n"):
        hesso(model)


def test_an_unsound_number_is_found_when_a_period_begins():
    model = net()
    optimizer = hesso(model)
    train(model, optimizer, range(START))
    backward(model, START)
    model[3].weight.grad[0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteParameterError, match=r"gradients of 3\.weight, at step 2\n"):
        optimizer.step()
    assert all(value.equal(model.state_dict()[key]) for key, value in before.items())
    backward(model, START)
    with pytest.raises(NonFiniteParameterError, match="in a saliency, at step 0"):
        hesso(model, saliency=lambda entries: entries.weight_sq / 0, start_pruning_step=0).step()


@pytest.mark.parametrize("start", [0, 5])
def test_sparse_gradients_are_refused(start):
    table = torch.nn.Embedding(5, 3, sparse=True)
    width = Slice("weight", 1, ())
    columns = [NodeGroup("weight", 3, slices=(width,), zeros=(width,))]
    options = {"start_pruning_step": start, "pruning_periods": 1}
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(OTOError, match="gradient of weight is sparse"):
        hesso(table, columns, **options).step()
    hesso(table, columns, target_group_sparsity=0.0, **options).step()  # what the wrapped optimizer can do, it may


def test_a_group_without_its_parameter_is_refused():
    model = net()
    with pytest.raises(UnknownParameterError, match=r"node group 3\.weight needs 3\.weight"):
        hesso(model, params=[(n, p) for n, p in model.named_parameters() if n != "3.weight"])


@pytest.mark.parametrize("target", [-0.1, 1.0, 1.5])
def test_a_target_outside_of_the_range_is_refused(target):
    with pytest.raises(TargetError, match=r"in \[0, 1\)"):
        hesso(net(), target_group_sparsity=target)


def test_a_schedule_without_steps_is_refused():
    with pytest.raises(TargetError, match="pruning_steps=2 cannot be cut"):
        hesso(net(), pruning_steps=2, pruning_periods=PERIODS)


def test_a_target_without_groups_is_refused():
    with pytest.raises(NothingPrunableError, match="no node group may lose an atom"):
        hesso(net(), groups()[2:])
    hesso(net(), groups()[2:], target_group_sparsity=0.0)


# Quiet groups --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
def test_quiet_groups_rest_at_zero_on_the_same_trajectory(name):
    # a score of gradients: that of weights looks at the columns that read pruned atoms, which only rest if quiet
    options = WRAPPED[name][0] | {"weight_decay": 0.01, "saliency": "taylor_second_order"}
    loud, quiet = net(), net()
    train(loud, hesso(loud, **options), range(END + 4))
    optimizer = hesso(quiet, groups(QuietGroup), **options)
    train(quiet, optimizer, range(END))
    optimizer._plan().zero_pruned_ = lambda step: None  # from here on nothing is written
    assert len(optimizer._plan().resting) == 4  # 0.weight, 3.weight twice, 8.weight
    train(quiet, optimizer, range(END, END + 4))
    assert [own.tolist() for own in zero_atoms(quiet)] == [own.tolist() for own in zero_atoms(loud)]
    # the columns that read pruned atoms are zero as well, which changes no output
    assert (quiet[3].weight[:, zero_atoms(quiet)[0]] == 0).all()
    assert (quiet[8].weight[:, zero_atoms(quiet)[1]] == 0).all()
    quiet.eval(), loud.eval()
    x = torch.randn(4, 3, 8, 8)
    # 1e-5: float32 sums over 72 entries; a zero is added in another place
    torch.testing.assert_close(quiet(x), loud(x), rtol=1e-5, atol=1e-5)


def test_groups_that_turn_out_to_be_loud_are_zeroed_in_the_same_step():
    model = net()
    optimizer = hesso(model, groups(QuietGroup))
    train(model, optimizer, range(END + 1))
    for n in range(END + 1, END + 4):
        backward(model, n)
        for p in model.parameters():
            p.grad.add_(torch.randn_like(p.grad))  # differentially private training does this
        optimizer.step()
        assert count_zeros(model) == 7
    assert optimizer._plan().resting == []


def test_an_optimizer_that_mixes_entries_is_never_quiet():
    class Mixing(torch.optim.SGD):
        pass

    model = net()
    optimizer = hesso(model, groups(QuietGroup), base=Mixing)
    train(model, optimizer, range(END))
    assert optimizer._plan().resting == []


def test_resting_entries_are_written_again_after_loading():
    model = net()
    optimizer = hesso(model, groups(QuietGroup))
    train(model, optimizer, range(END))
    optimizer.load_state_dict(optimizer.state_dict())
    model[0].weight.data.fill_(1.0)
    train(model, optimizer, range(END, END + 1))
    assert count_zeros(model) == 7


# Devices -------------------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Writes down which operators ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


WAITS = {f"aten::{op}" for op in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_to_copy", "is_nonzero")}


def test_a_step_does_not_wait_for_the_device():
    model = net()
    optimizer = hesso(model, first_momentum=0.9, start_pruning_step=3, pruning_steps=12, pruning_periods=3)
    waited = {}
    for n in range(20):
        backward(model, n)
        with Calls() as calls:
            optimizer.step()
        assert "aten::_foreach_add_" in calls.names or "aten::add_" in calls.names
        waited[n] = calls.names & WAITS
    boundaries = {n for n in waited if optimizer.schedule.starts_period(n) or optimizer.schedule.ends_period(n)}
    assert {n for n, ops in waited.items() if ops} <= boundaries
    assert waited[3]  # that the test sees anything: a period begins by reading its choice


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: CPU tensors never synchronize")
@pytest.mark.parametrize("name, mode", [c for c in CASES if c[0] in ("momentum", "adamw")])
def test_a_cuda_step_does_not_synchronize(name, mode):
    model = net().cuda()
    optimizer = hesso(model, start_pruning_step=3, **WRAPPED[name][0], **MODES[mode])
    for n in range(END + 5):
        backward(model, n)
        torch.cuda.set_sync_debug_mode("default" if optimizer.schedule.starts_period(n) else "error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert count_zeros(model) == 7


def test_the_constructor_takes_what_the_documentation_says():
    assert isinstance(hesso(net()), HESSO)
