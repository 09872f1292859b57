"""The report is one file that tells the truth, needs no network, and can be read by everybody."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import ArtifactError, MissingExtraError
from oto.io.artifact import adding, reading
from oto.report import charts
from oto.report import html as report_html

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

HISTORY = [{"step": i, "loss": 2.0 / (i + 1), "MACs": 50_000 - 100 * i, "note": "text"} for i in range(0, 50, 5)]


class Net(nn.Module):
    """Four equal blocks, and layers of their own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12)) for _ in range(4))
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Page(HTMLParser):
    """What a page is made of."""

    VOID = ("meta", "br", "wbr", "link", "img", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.errors = [], [], {}, []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def all(self, *tags):
        return [attributes for tag, attributes in self.tags if tag in tags]


@pytest.fixture(scope="module")
def subnet(tmp_path_factory):
    torch.manual_seed(0)
    oto = OTO(Net(), torch.randn(2, 6))
    oto.random_set_zero_groups(0.4)
    return oto.construct_subnet(tmp_path_factory.mktemp("report") / "slim", report=True)


@pytest.fixture(scope="module")
def written(subnet):
    """A report with everything in it."""
    made = replace(subnet, origin=replace(subnet.origin, periods=[(10, 20), (20, 30)], target="target_macs=0.6"))
    return made.report(
        subnet.path.parent / "all.html",
        full=Net(),
        dummy_input=torch.randn(2, 6),
        history=HISTORY,
        title="A <net> & co",
    ).read_text()


def test_it_says_what_the_subnet_says(subnet, written):
    page = Page(written)
    cells = [text.strip() for text in page.text["td"]]
    before, after = subnet.cost_before, subnet.cost_after
    for cost in (before.macs, after.macs, before.params, after.params, before.bytes, after.bytes):
        assert f"{cost:,}" in cells
    (verdict,) = [t for t in page.text["p"] if "of the MACs" in t]
    assert (
        f"{after.macs / before.macs:.1%} of the MACs" in verdict and "float64" in verdict and "times as fast" in verdict
    )
    assert str(subnet.path) in "".join(page.text["code"])
    assert "asked for: target_macs=0.6" in written
    for name, atoms in subnet.kept.items():  # every width is in the table
        row = re.search(rf'<td class="name">{re.escape(name)}</td><td>(\d+)</td><td>(\d+)</td>', written)
        assert row and int(row[2]) == len(atoms)
    for check in subnet.checks:
        assert check.what in written
    assert "A &lt;net&gt; &amp; co" in written and "<net>" not in written


def test_repeated_blocks_share_a_chart(subnet, written):
    page = Page(written)
    titles = "".join(page.text["h3"])
    assert "blocks.*.*.weight" in titles and "blocks.1" not in titles
    kept = [len(subnet.kept[f"blocks.{i}.0.weight"]) for i in range(4)]
    (says,) = [a["aria-label"] for a in page.all("svg") if a["aria-label"].startswith("blocks.*.*.weight")]
    assert says.endswith(f"In order: {', '.join(map(str, kept))}")


@pytest.mark.parametrize(("own_scale", "room"), [(False, 54), (True, 38)])
def test_a_long_name_leaves_room_for_its_figures(own_scale, room):
    name = "model.encoder.layer.*.attention.self.intermediate.dense"
    for says in ("176.95 M to 106.17 M", "9 of 9"):
        svg = charts.shares("c", [(name, 2.0, 1.0, says)], "a bar", own_scale=own_scale)
        short = re.search(r">(…?[\w.*]+dense)</text>", svg)[1]
        assert room - 1 <= len(short) + len(says) <= room or short == name


def test_the_verdict_says_what_was_compared(subnet):
    same = replace(subnet, checks=[replace(check, error=0.0) for check in subnet.checks])
    assert report_html._verdict(same, None).endswith("equal to the pruned full model in every bit in float64")
    near = replace(subnet, checks=[replace(check, error=2e-15) for check in subnet.checks])
    assert report_html._verdict(near, None).endswith("equal to the pruned full model to 2e-15 in float64")


def charted(subnet, monkeypatch):
    """The rows of the chart of MACs that the report on a subnet draws."""
    drawn = {}
    with monkeypatch.context() as patch:
        patch.setattr(charts, "shares", lambda name, rows, *_, **__: drawn.update({name: rows}))
        report_html._macs(subnet.origin, subnet)
    return drawn["macs"]


def test_macs_of_the_chart_are_those_of_the_table(subnet, monkeypatch):
    rows = charted(subnet, monkeypatch)
    assert sum(before for _, before, _, _ in rows) == subnet.cost_before.macs
    assert sum(after for _, _, after, _ in rows) == subnet.cost_after.macs


def test_after_shrinking_the_full_model_is_the_one_from_before(monkeypatch, tmp_path):
    oto = OTO(Net(), torch.randn(2, 6))
    optimizer = oto.hesso(lr=1e-3, target_macs=0.6, start_pruning_step=1, pruning_steps=6, pruning_periods=3)
    for step in range(8):
        optimizer.zero_grad()
        oto.model(torch.randn(2, 6)).square().sum().backward()
        optimizer.step()
        if step in (2, 4):
            oto.shrink()
    subnet = oto.construct_subnet()
    rows = charted(subnet, monkeypatch)
    full, slim = (sum(row[i] for row in rows) for i in (1, 2))
    assert full == subnet.cost_before.macs == OTO(Net(), torch.randn(2, 6)).preview(target_macs=1.0).before.macs
    assert slim == subnet.cost_after.macs <= 0.6 * full
    page = subnet.report(tmp_path / "report.html").read_text()
    assert "4 layers of 16; " in page, "the widths, too"


def test_sections_without_facts_are_left_out(subnet, monkeypatch):
    everything = {"latency", "training"}
    plain = (subnet.path / "report.html").read_text()
    headings = {a["id"] for a in Page(plain).all("h2")}
    assert headings == {"costs", "widths", "macs", "groups", "proof", "load"} and not headings & everything
    monkeypatch.setattr(shutil, "which", lambda name: None)
    page = subnet.report(subnet.path.parent / "plain.html").read_text()
    assert "graphviz was not installed" in page and not Page(page).all("polygon")
    Page(page)


def test_the_optimizer_s_own_history_is_taken(tmp_path):
    oto = OTO(Net(), torch.randn(2, 6))
    optimizer = oto.hesso(lr=0.1, target_macs=0.7, start_pruning_step=1, pruning_steps=4, pruning_periods=2)
    for _ in range(6):
        optimizer.zero_grad()
        loss = oto.model(torch.randn(2, 6)).square().sum()
        loss.backward()
        optimizer.record(loss=loss)
        optimizer.step()
    assert [r["step"] for r in optimizer.history] == list(range(6)) and all("loss" in r for r in optimizer.history)
    costs = [r["MACs"] for r in optimizer.history if "MACs" in r]
    assert costs[0] == oto.preview(target_macs=1.0).before.macs and costs == sorted(costs, reverse=True)
    subnet = oto.construct_subnet()
    assert subnet.origin.periods == [(1, 3), (3, 5)]
    page = subnet.report(tmp_path / "r.html").read_text()
    assert (
        "MACs from" in page
        and "loss from" in page
        and "groups go to zero from step 1 to 4" in page
        and "target_macs=0.7" in page
    )
    assert "it was not saved" in page


def test_no_address_of_others(written):
    assert not re.findall(r"https?://|//[a-z]|@import|<script|<link|<img|<iframe", written)
    for tag in ("href", "src"):
        for _, attributes in Page(written).tags:
            assert attributes.get(tag, "#").startswith("#")


def test_it_can_be_read_by_everybody(written):
    page = Page(written)
    assert page.all("html")[0]["lang"] == "en" and page.text["title"][0].strip()
    assert [a["content"] for a in page.all("meta") if a.get("name") == "viewport"] == [
        "width=device-width, initial-scale=1"
    ]
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels)), levels
    for svg in page.all("svg"):
        assert svg["role"] == "img" and len(svg["aria-label"]) > 10
    for header in page.all("th"):
        assert header["scope"] in ("row", "col")
    assert len(page.all("caption")) == len(page.all("table"))
    for a in page.all("div"):  # what scrolls can be reached with the keyboard, and has a name
        if {"scroll", "drawing"} & {*(a.get("class") or "").split()}:
            assert a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"]
    assert {"main", "header", "footer"} <= {tag for tag, _ in page.tags}


def test_ids_are_unique_and_references_lead_somewhere(written):
    ids = [a["id"] for _, a in Page(written).tags if "id" in a]
    assert len(ids) == len({*ids})
    wanted = {*re.findall(r"url\(#([^)]+)\)", written), *re.findall(r'href="#([^"]+)"', written)}
    wanted |= {name for _, a in Page(written).tags for name in (a.get("aria-labelledby") or "").split()}
    assert wanted and wanted <= {*ids}


def colors(css):
    """The variables of a light and a dark page."""
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    return [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in (light, dark)]


def contrast(a, b):
    """As WCAG 2.2 defines it, from 1 to 21."""

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_enough_in_light_and_dark():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    css = (Path(report_html.__file__).parent / report_html.TEMPLATE).read_text()
    for palette in colors(css):
        for ground in ("page", "card"):
            for letters in ("ink", "muted", "accent", "good", "warn"):
                assert contrast(palette[letters], palette[ground]) >= 4.5, (letters, ground)
        assert contrast(palette["accent"], palette["soft"]) >= 3  # what is left, in what was
        assert contrast(palette["accent"], palette["band"]) >= 3
        assert contrast(palette["muted"], palette["card"]) >= 3  # the line around what was


def test_no_color_is_outside_the_palette(written):
    """Or a chart would vanish in the dark. The drawing has a ground of its own."""
    for svg in re.findall(r"<figure.*?</figure>", written, re.DOTALL):
        assert not re.findall(r"(?:fill|stroke): (?!none|var\()[^;\"]+", svg)
    assert {*charts._VARIABLES.values()} <= {f"--{name}" for name in colors(written)[0]}


def test_the_report_is_a_file_of_the_artifact(subnet, tmp_path):
    folder = shutil.copytree(subnet.path, tmp_path / "slim")
    assert "report.html" in reading(folder).manifest["files"]
    (folder / "report.html").write_text("something else")
    with pytest.raises(ArtifactError, match=r"report\.html"):
        reading(folder)


def test_adding_a_file_to_an_artifact(subnet, tmp_path):
    folder = shutil.copytree(subnet.path, tmp_path / "slim")
    with adding(folder, "notes.txt") as file:
        file.write_text("one")
        assert "notes.txt" not in reading(folder).manifest["files"]
    assert reading(folder).path("notes.txt").read_text() == "one"
    with adding(folder, "notes.txt") as file:
        file.write_text("two")
    assert reading(folder).path("notes.txt").read_text() == "two"
    (folder / "mine.txt").write_text("of the user")
    with pytest.raises(ArtifactError, match=r"holds mine\.txt"), adding(folder, "mine.txt") as file:
        file.write_text("three")
    assert (folder / "mine.txt").read_text() == "of the user"
    with pytest.raises(ZeroDivisionError), adding(folder, "notes.txt") as file:
        file.write_text("four")
        1 / 0  # noqa: B018
    assert reading(folder).path("notes.txt").read_text() == "two"
    assert {p.name for p in folder.iterdir()} == {*reading(folder).manifest["files"], "oto.json", "mine.txt"}


def test_without_its_packages_it_says_what_to_install(subnet, tmp_path, monkeypatch):
    import sys

    for package in ("matplotlib.figure", "jinja2"):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, package, None)
            with pytest.raises(MissingExtraError, match=r"pip install 'oto\[report\]'"):
                subnet.report(tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser(written, tmp_path, width):
    """Nothing is complained about, nothing is wider than the window, and every chart takes up room."""
    measure = """<script>
    addEventListener("load", () => {
      const page = document.querySelector("iframe").contentDocument;
      const charts = [...page.querySelectorAll("figure svg")].map(e => e.getBoundingClientRect());
      document.body.dataset.found = JSON.stringify({
        width: page.documentElement.scrollWidth, charts: charts.map(r => [r.width, r.height]),
        small: [...page.querySelectorAll("figure svg text")].map(e => e.getBoundingClientRect().height),
        bare: page.querySelectorAll("h2").length });
    });</script>"""
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<body><iframe style="width:{width}px;height:900px" srcdoc="{html.escape(written)}"></iframe>{measure}'
    )
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--dump-dom",
            f"--user-data-dir={tmp_path / 'profile'}",
            outer.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', done.stdout)[1]))
    assert found["bare"] == 8 and len(found["charts"]) >= 5
    assert found["width"] <= width
    assert all(w > 200 and h > 40 for w, h in found["charts"]), found["charts"]
    assert min(found["small"]) >= 9, "letters that nobody can read"
