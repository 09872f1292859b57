"""The drawing: what is prunable has a color, what repeats is drawn once, and nothing is lost on the way."""

from __future__ import annotations

import re
import shlex
import shutil
import sys

import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import MissingExtraError, NoGraphvizWarning
from oto.report.draw import GRAY, repeated_blocks, to_dot

pydot = pytest.importorskip("pydot")


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def tower(depth=6):
    return nn.Sequential(nn.Linear(3, 8), nn.Sequential(*[Block() for _ in range(depth)]), nn.Linear(8, 2))


@pytest.fixture
def oto():
    return OTO(tower(), torch.randn(2, 3))


def boxes(dot):
    """All nodes, those in frames too."""
    inner = [node for frame in dot.get_subgraphs() for node in frame.get_nodes()]
    return {n.get_name().strip('"'): n for n in [*dot.get_nodes(), *inner] if n.get_name() not in ("node", "edge")}


def test_repeated_blocks_share_a_box(oto):
    assert repeated_blocks(oto.partition.graph) == {"like 1.0": ("1.0", ("1.1", "1.2", "1.3", "1.4", "1.5"))}
    dot = to_dot(oto.partition, oto.node_groups, "tower")
    found = boxes(dot)
    # input, linear, (norm, up, relu, down, add), five more, linear, output
    assert len(found) == 10
    assert "5 more like 1.0" in found["like 1.0"].get_label() and "1.1 … 5" in found["like 1.0"].get_label()
    edges = {(e.get_source().strip('"'), e.get_destination().strip('"')) for e in dot.get_edges()}
    last = next(name for name in found if ("like 1.0", name) in edges)
    assert (last, "output 0") in edges


def test_a_different_block_is_drawn():
    model = tower(4)
    model[1][2] = Block()
    model[1][2].up.bias = None
    model[1][2].norm = nn.Identity()
    found = repeated_blocks(OTO(model, torch.randn(2, 3)).partition.graph)
    assert found == {"like 1.0": ("1.0", ("1.1",))}


def test_a_color_for_each_prunable_group_and_grey_for_the_rest(oto):
    found = boxes(to_dot(oto.partition, oto.node_groups, "tower"))
    relu = next(n for n in found.values() if "relu" in n.get_label())
    up = next(n for n in found.values() if "linear   up" in n.get_label())
    down = next(n for n in found.values() if "linear   down" in n.get_label())
    assert relu.get_fillcolor() == up.get_fillcolor() != down.get_fillcolor()
    oto.skip_operators("relu")
    found = boxes(to_dot(oto.partition, oto.node_groups, "tower"))
    assert next(n for n in found.values() if "relu" in n.get_label()).get_fillcolor() == GRAY


def test_parameters_and_flops_on_demand(oto):
    plain = to_dot(oto.partition, oto.node_groups, "tower").to_string()
    assert "FLOPs" not in plain and "weight" not in re.sub('tooltip="[^"]*"|weight=1(00)?', "", plain)
    full = to_dot(oto.partition, oto.node_groups, "tower", display_params=True, display_flops=True).to_string()
    assert "weight 32×8 (256)" in full and "1.02 kFLOPs" in full  # 2 rows · 8 · 32 MACs
    assert "rankdir=LR" in to_dot(oto.partition, oto.node_groups, "tower", vertical=False).to_string()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pydot's parser is older than pyparsing
def test_files_and_what_is_said_without_graphviz(oto, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(NoGraphvizWarning, match="graphviz is not installed") as caught:
        written = oto.visualize(tmp_path / "new")
    assert [path.name for path in written] == ["Sequential.dot"] and "apt install graphviz" in str(caught[0].message)
    (parsed,) = pydot.graph_from_dot_file(str(written[0]))
    assert len(boxes(parsed)) == 10


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")
def test_a_deep_network_is_a_column(oto):
    """What lies on the longest line has one place from left to right, however many shortcuts pass it by."""
    lines = to_dot(oto.partition, oto.node_groups, "tower").create(format="plain").decode().splitlines()
    places = [float(shlex.split(line)[2]) for line in lines if line.startswith("node ")]
    assert len(places) == 10 and max(places) - min(places) < 0.01  # inches


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")
def test_pictures_with_graphviz(oto, tmp_path):
    written = oto.visualize(tmp_path)
    assert [path.suffix for path in written] == [".dot", ".svg", ".pdf", ".png"]
    assert all(path.stat().st_size > 1000 for path in written)
    assert "5 more like 1.0" in written[1].read_text()


def test_what_is_said_without_pydot(oto, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydot", None)
    with pytest.raises(MissingExtraError, match="pip install 'oto"):
        oto.visualize(tmp_path)
    assert not list(tmp_path.iterdir())


def test_segments_are_frames_in_that_of_their_block():
    oto = OTO(tower(2), torch.randn(2, 3), compress_mode="both", skip_patterns=["1.1.*"])
    dot = to_dot(oto.partition, oto.node_groups, "tower")
    (block,) = dot.get_subgraphs()
    (frame,) = block.get_subgraphs()
    assert "1.0.down may go" in frame.get_label() and frame.get("style").strip('"') == "dashed"
    assert len(frame.get_nodes()) == 4, "norm, up, relu, down: the addition is there without them, too"
    assert not to_dot(OTO(tower(2), torch.randn(2, 3)).partition, (), "plain").get_subgraphs()[0].get_subgraphs()
