"""What is printed, and what a notebook shows."""

from __future__ import annotations

from html.parser import HTMLParser

import torch
from torch import nn

from oto import OTO
from oto.report.table import html


class Cells(HTMLParser):
    """The rows of all tables of a fragment, which must close what it opens."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag != "br":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def test_what_print_says_of_an_oto_and_its_groups():
    oto = OTO(net(), torch.randn(2, 3), min_kept=2)
    # 3*8 + 8 + 8*8 + 8 + 8*2 + 2 = 122; MACs of two rows: 2 * (24 + 64 + 16) = 208
    assert repr(oto) == (
        "OTO(Sequential): 2 of 4 node groups prunable, 16 zero-invariant groups; 122 parameters, 208 MACs"
    )
    first = next(group for group in oto.node_groups if group.name == "0.weight")
    assert str(first) == (
        "0.weight: 8 atoms, prunable, at least 2 kept\n  zeroed  0.weight[0], 0.bias[0]\n  leaves  2.weight[1]"
    )
    last = next(group for group in oto.node_groups if group.name == "4.weight")
    assert str(last) == (
        "4.weight: 2 atoms, whole because it is a dimension of an output\n  of      4.weight[0], 4.bias[0]"
    )


def test_a_notebook_shows_what_print_says():
    oto = OTO(net(), torch.randn(2, 3))
    preview = oto.preview(target_macs=0.5)
    for row in Cells(preview._repr_html_()).rows:
        assert all(cell in str(preview) for cell in row)
    assert preview.target in preview._repr_html_() and len(Cells(preview._repr_html_()).rows) == 6
    explained = oto.explain()
    rows = Cells(explained._repr_html_()).rows
    assert rows[0][2] == "stays whole because" and len(rows) == 3
    assert all(part in str(explained) for row in rows for cell in row for part in cell.split("/")[:1])
    oto.random_set_zero_groups(0.25)
    subnet = oto.construct_subnet()
    shown = subnet._repr_html_()
    assert [row[0] for row in Cells(shown).rows] == ["", "parameters", "MACs", "bytes"]
    assert "verified: " in shown and "emitted as the original class" in shown


def test_a_notebook_is_not_given_markup_of_others():
    shown = html([["a"], ["<script>alert(1)</script>"]], above="<b>", below="x\ny")
    assert "<script>" not in shown and "<b>" not in shown and "x<br>y" in shown


def test_a_model_that_is_all_prunable_has_no_table_of_the_rest():
    import dataclasses

    explained = dataclasses.replace(OTO(net(), torch.randn(2, 3)).explain(), whole=())
    assert "<table>" not in explained._repr_html_() and str(explained).count("\n") == 1
