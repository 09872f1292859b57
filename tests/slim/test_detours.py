"""Two ways of a class that branches on sizes: each call of them is made once, whatever is compared."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from oto.slim.own_class.detours import Detour
from oto.slim.pruned_shapes import PrunedShapes
from oto.trace.record import record


class Step(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.scale, self.run = nn.Parameter(torch.ones(1)), forward

    def forward(self, x):
        return self.run(x) * self.scale


class Made(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


def ways(one, other):
    """The calls of two functions of one tensor, that stands for itself; and what each gives after every call."""
    graphs = [record(Step(run), torch.randn(2, 3)) for run in (one, other)]
    stands = {graphs[0].inputs[0]: graphs[1].inputs[0]}
    results = [[node.outputs[0] for node in graph.nodes[:-1]] for graph in graphs]
    return Detour(graphs[0].nodes, graphs[1].nodes, stands, {}, PrunedShapes(None, {}), {}), *results


def test_calls_are_made_once_and_compared_as_often_as_is_asked():
    detour, a, b = ways(lambda x: (x.sin() + 1).cos() - 1, lambda x: (1 + x.sin()).cos() + (-1))
    with Made() as made:
        assert detour.agrees(1, 1, [(a[0], b[0])]) and detour.agrees(2, 2, [(a[1], b[1])])
        assert detour.agrees(4, 4, [(a[3], b[3])]) and not detour.agrees(4, 4, [(a[3], b[2])])
    # of each side, for each kind of numbers
    assert made.ops.count(torch.ops.aten.sin.default) == made.ops.count(torch.ops.aten.cos.default) == 4


def test_ways_of_other_lengths_agree_where_they_meet():
    detour, a, b = ways(lambda x: x.neg(), lambda x: (x * 2).sub(x * 3))
    assert not detour.agrees(1, 1, [(a[0], b[0])]) and not detour.agrees(1, 2, [(a[0], b[1])])
    assert detour.agrees(1, 3, [(a[0], b[2])])


def test_what_one_way_writes_in_place_the_other_does_not_see():
    detour, a, b = ways(lambda x: x.exp_(), lambda x: x.exp())
    assert detour.agrees(1, 1, [(a[0], b[0])])


def test_a_tensor_that_stands_for_none_yet_is_asked_for_again():
    detour, a, b = ways(lambda x: x.neg(), lambda x: x * -1)
    pair = dict(detour.stands)
    detour.stands.clear()
    assert not detour.agrees(1, 1, [(a[0], b[0])])
    detour.stands.update(pair)
    assert detour.agrees(1, 1, [(a[0], b[0])])


def test_a_mask_of_the_lowest_number_hides_no_difference():
    lowest = torch.finfo(torch.float64).min
    detour, a, b = ways(
        lambda x: (x / 3.0).masked_fill(x > 0, lowest),
        lambda x: (x / 4.0).masked_fill(x > 0, lowest),
    )
    assert not detour.agrees(3, 3, [(a[2], b[2])])
    detour, a, b = ways(
        lambda x: (x / 4.0).masked_fill(x > 0, lowest),
        lambda x: (x * 0.25).masked_fill(x > 0, lowest),
    )
    assert detour.agrees(3, 3, [(a[2], b[2])])


MASK = torch.ones(3, 3, dtype=torch.float64).tril()


def masked(scale):
    """Attention of a row to itself under a mask that is multiplied and added, whose scores are divided first."""
    return lambda q, mask: ((q.mT @ q / scale) * mask + -1e4 * (1 - mask)).softmax(-1)


def masked_ways(one, other):
    graphs = [record(Masked(run), (torch.randn(2, 3), MASK)) for run in (one, other)]
    stands = dict(zip(graphs[0].inputs, graphs[1].inputs, strict=True))
    detour = Detour(graphs[0].nodes, graphs[1].nodes, stands, {}, PrunedShapes(None, {}), {})
    return detour, *([node.outputs[0] for node in graph.nodes[:-1]] for graph in graphs)


class Masked(Step):
    def forward(self, x, mask):
        return self.run(x, mask) * self.scale


def test_a_mask_that_is_added_hides_no_scale():
    """Drawn at random, the mask alone would decide every softmax."""
    detour, a, b = masked_ways(masked(3.0), masked(4.0))
    assert not detour.agrees(len(a), len(b), [(a[-1], b[-1])])
    detour, a, b = masked_ways(masked(4.0), lambda q, mask: masked(1.0)(q * 0.5, mask))
    assert detour.agrees(len(a), len(b), [(a[-1], b[-1])])


def test_zeros_and_ones_alone_hide_no_difference_either():
    detour, a, b = ways(lambda x: x.square(), lambda x: x.abs())
    assert not detour.agrees(1, 1, [(a[0], b[0])])
