"""A run of one part of the zoo leaves nothing out for ever, and nothing new."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest

from tests import conftest

from . import part, table
from .matrix import ZOOS, zoo

NAMES = [f"{kind}-{name}" for kind in ZOOS for name in zoo(kind)]


OTHERS = [f"tests/io/test_long.py::test_{i}" for i in range(40)]


def items_of(names: list[str]) -> list[SimpleNamespace]:
    models = [
        SimpleNamespace(callspec=SimpleNamespace(id=n), originalname="test_half_of_all_groups_removed", nodeid=n)
        for n in names
    ]
    return models + [SimpleNamespace(originalname="test_another", nodeid=n) for n in OTHERS]


def taken(text, monkeypatch, seen, names=NAMES):
    """The long tests that a run would keep of all that it collected: the models, and the others."""
    monkeypatch.setattr(part, "seen_before", lambda: seen)
    items = items_of(names)
    for item in items:
        item.get_closest_marker = lambda mark: True
    quick = SimpleNamespace(originalname="test_quick", nodeid="quick", get_closest_marker=lambda mark: None)
    items.append(quick)
    hook = SimpleNamespace(pytest_deselected=lambda items: None)
    conftest.pytest_collection_modifyitems(SimpleNamespace(getoption=lambda name: text, hook=hook), items)
    assert items.pop() is quick
    models = [item.callspec.id for item in items if hasattr(item, "callspec")]
    return models, [item.nodeid for item in items if not hasattr(item, "callspec")]


def test_every_model_lies_in_one_part_and_parts_are_alike(monkeypatch):
    parts = [taken(f"{k}/4", monkeypatch, None)[0] for k in range(1, 5)]
    assert Counter(name for some in parts for name in some) == Counter(NAMES)
    assert all(len(some) > 0.8 * len(NAMES) / 4 for some in parts)


def test_new_models_are_always_taken(monkeypatch):
    seen = {name.partition("-")[2] for name in NAMES} - {"resnet18", "bert"}
    for k in range(1, 5):
        assert {"models-resnet18", "models-bert"} <= set(taken(f"{k}/4", monkeypatch, seen)[0])


def test_every_model_is_a_graph_in_one_of_some_runs_of_the_whole(monkeypatch):
    made = []
    for commit in range(part.GRAPHS):
        monkeypatch.setattr(part, "_git", lambda *words, commit=commit: f"{commit:08x}fff")
        made += [name for name in NAMES if part.has_graph(name, whole=True)]
        assert all(part.has_graph(name, whole=False) for name in NAMES)
    assert Counter(made) == Counter(NAMES)


def test_without_a_part_the_whole_is_taken(monkeypatch):
    assert taken(None, monkeypatch, set()) == (NAMES, OTHERS)


@pytest.mark.parametrize("of", [2, 4, 48])
def test_every_other_long_test_lies_in_some_part_and_in_one_of_four_at_most(of, monkeypatch):
    parts = [taken(f"{k}/{of}", monkeypatch, None)[1] for k in range(1, of + 1)]
    assert Counter(name for some in parts for name in some) == dict.fromkeys(OTHERS, max(of // part.OTHERS, 1))
    assert all(0 < len(some) < len(OTHERS) for some in parts)


def test_the_commit_chooses(monkeypatch):
    monkeypatch.setattr(part, "_git", lambda *words: "0000000b" + "0" * 32)
    assert part.parse("auto/4") == (11 % 4 + 1, 4)
    monkeypatch.setattr(part, "_git", lambda *words: "")
    assert part.parse("auto/4") == (1, 4)


@pytest.mark.parametrize("wrong", ["5/4", "0/4", "x", "1", "1/0", "auto"])
def test_what_is_no_part(wrong):
    with pytest.raises(ValueError, match="such as 3/4"):
        part.parse(wrong)


def test_the_support_matrix_has_the_last_result_of_every_model(monkeypatch, tmp_path):
    from . import test_exact

    monkeypatch.setattr(test_exact, "RESULTS", tmp_path)
    record = tmp_path / "record.jsonl"
    lines = table.RECORD.read_text().splitlines(keepends=True)
    record.write_text("".join(lines[3:]))
    monkeypatch.setattr(table, "RECORD", record)
    with pytest.raises(SystemExit, match="3 models were never tried"):
        table.document()
    record.write_text("".join(lines))
    kind, name = json.loads(lines[0])["kind"], json.loads(lines[0])["name"]
    (tmp_path / f"{kind}-{name}.json").write_text(json.dumps({"name": name, "share": 0.125, "axes": 1, "asked": 1.0}))
    table.document()
    assert json.loads(record.read_text().splitlines()[0])["share"] == 0.125  # what is new takes the place of what was
