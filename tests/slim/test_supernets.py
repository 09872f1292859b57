"""The super-networks of the paper (OTOv3, §4), reduced: stacked U-nets, a SuperResNet and cells as DARTS has them."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oto import OTO
from oto.groups.segments import with_segments


def conv(into, out, kernel=3, **how):
    """A convolution with its norm, and the ReLU before them, as in a cell."""
    how = {"padding": how.pop("padding", kernel // 2), **how}
    return nn.Sequential(nn.ReLU(), nn.Conv2d(into, out, kernel, bias=False, **how), nn.BatchNorm2d(out))


class Summed(nn.Module):
    """Parallel branches, added; with a skip beside them all may go."""

    def __init__(self, width, kernels, skip=True):
        super().__init__()
        self.ways, self.skip = nn.ModuleList(conv(width, width, k) for k in kernels), skip

    def forward(self, x):
        made = sum(way(x) for way in self.ways)
        return made + x if self.skip else made


class Unet(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.down, self.inner = Summed(width, (1, 3)), Summed(width, (3, 5))
        self.low, self.join = nn.Conv2d(width, width, 3, stride=2, padding=1), conv(2 * width, width, 1)

    def forward(self, x):
        high = self.down(x)
        low = F.interpolate(self.inner(self.low(high)), scale_factor=2.0)
        return self.join(torch.cat([high, low], 1)) + x


class StackedUnets(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.stem, self.nets = nn.Conv2d(3, width, 3, padding=1), nn.Sequential(*(Unet(width) for _ in range(2)))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.nets(self.stem(x)).mean((2, 3)))


class SuperResNet(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.stages = nn.ModuleList(nn.Sequential(*(Summed(width, (1, 3, 5)) for _ in range(2))) for _ in range(2))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = F.avg_pool2d(stage(x), 2)
        return self.head(x.mean((2, 3)))


class Mixed(nn.Module):
    """The candidates of an edge of DARTS: convolutions, a pool and a skip."""

    def __init__(self, width):
        super().__init__()
        self.separable = nn.Sequential(conv(width, width, groups=width), conv(width, width, 1))
        self.dilated = conv(width, width, dilation=2, padding=2)

    def forward(self, x):
        return self.separable(x) + self.dilated(x) + F.max_pool2d(x, 3, 1, 1) + x


class Darts(nn.Module):
    """Cells of three nodes, each the sum of what comes from all before it; a cell gives its nodes, side by side."""

    def __init__(self, width=4, cells=2):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.into = nn.ModuleList(conv(width if i == 0 else 3 * width, width, 1) for i in range(cells))
        self.edges = nn.ModuleList(nn.ModuleList(Mixed(width) for _ in range(6)) for _ in range(cells))
        self.head = nn.Linear(3 * width, 4)

    def forward(self, x):
        x = self.stem(x)
        for into, edges in zip(self.into, self.edges, strict=True):
            nodes, queue = [into(x)], iter(edges)
            for _ in range(3):
                nodes.append(sum(next(queue)(node) for node in nodes))
            x = torch.cat(nodes[1:], 1)
        return self.head(x.mean((2, 3)))


NETS = {"unets": StackedUnets, "resnet": SuperResNet, "darts": Darts}


def made(name):
    torch.manual_seed(0)
    model = NETS[name]().double().eval()
    for p in model.parameters():
        if p.ndim < 2:
            nn.init.uniform_(p, 0.3, 1)
    return model, torch.randn(2, 3, 8, 8, dtype=torch.float64)


def segments(oto):
    return [group for group in oto.node_groups if group.segment and group.prunable]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("graph", [False, pytest.param(True, marks=pytest.mark.zoo)], ids=["class", "graph"])
@pytest.mark.parametrize("name", NETS)
def test_any_part_of_a_super_network_may_go(name, graph):
    model, x = made(name)
    oto = OTO(model, x, compress_mode="both", allow_graph=graph)
    found = segments(oto)
    assert len(found) >= {"unets": 8, "resnet": 12, "darts": 24}[name]
    oto.random_set_zero_groups(0.4, seed=1)
    parameters = dict(model.named_parameters())
    for share in (1 / 3, 1.0):
        for group in random.Random(0).sample(found, int(len(found) * share)):
            group.zero_(parameters, torch.tensor([0]))
        subnet = oto.construct_subnet(emitter="graph" if graph else "module")
        assert subnet.max_error <= 1e-9 and (graph or type(subnet.model) is type(model))
        assert len(oto.partition.erased(subnet.kept)) >= int(len(found) * share / 2)


@pytest.mark.parametrize("name", ["unets", pytest.param("darts", marks=pytest.mark.zoo)])
def test_the_search_leaves_a_valid_network(name):
    model, x = made(name)
    oto = OTO(model, x, compress_mode="erase")
    number = len(segments(oto)) // 2
    optimizer = oto.h2spg(target_segments=number, lr=1e-3, start_pruning_step=1, pruning_steps=4)
    for _ in range(6):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    subnet = oto.construct_subnet()
    gone = oto.partition.erased(subnet.kept)
    outermost = [one for one in gone if not any(set(one.body) < set(other.body) for other in gone)]
    assert len(outermost) <= number <= len(gone), "what lies in a segment that goes, goes with it"
    assert subnet.max_error <= 1e-9
    assert (subnet.model(x) - subnet.model(2 * x)).abs().max() > 1e-6, "the output still depends on the input"


class Behind(nn.Module):
    """A layer with a number behind it that nothing trains away."""

    def __init__(self, layer, number):
        super().__init__()
        self.layer = layer
        self.register_buffer("number", torch.tensor(number, dtype=torch.float64))

    def forward(self, x):
        return self.layer(x) + self.number


@pytest.mark.parametrize("name", NETS)
def test_what_has_a_bias_behind_it_is_no_segment(name):
    """A number is put behind single branches, which no zero in them takes away."""
    model, x = made(name)
    oto = OTO(model, x, allow_graph=True)
    before = [segment.name for segment in with_segments(oto.partition)[0].segments]
    modules = dict(model.named_modules())
    ending = [path for path in before if type(modules.get(path, nn.ModuleList())) is not nn.ModuleList]
    for path in random.Random(0).sample(ending, 2):
        parent, _, last = path.rpartition(".")
        owner, layer = model.get_submodule(parent), model.get_submodule(path)
        setattr(owner, last, Behind(layer, 0.5))
        other = with_segments(OTO(model, x, allow_graph=True).partition)[0].segments
        assert not [s.name for s in other if s.name == path or s.name == f"{path}.layer"]
        setattr(owner, last, layer)
