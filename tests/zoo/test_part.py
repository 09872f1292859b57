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


def taken(text, monkeypatch, seen, names=NAMES):
    """The models that a run would keep of all that it collected."""
    monkeypatch.setattr(part, "seen_before", lambda: seen)
    items = [SimpleNamespace(callspec=SimpleNamespace(id=n), originalname="test_half_of_all_groups_removed",
                             get_closest_marker=lambda mark: True) for n in names]  # fmt: skip
    items.append(SimpleNamespace(originalname="test_another", get_closest_marker=lambda mark: True))
    config = SimpleNamespace(
        getoption=lambda name: text, hook=SimpleNamespace(pytest_deselected=lambda items: None)
    )  # fmt: skip
    conftest.pytest_collection_modifyitems(config, items)
    assert items[-1].originalname == "test_another"
    return [item.callspec.id for item in items[:-1]]


def test_every_model_lies_in_one_part_and_parts_are_alike(monkeypatch):
    parts = [taken(f"{k}/4", monkeypatch, None) for k in range(1, 5)]
    assert Counter(name for some in parts for name in some) == Counter(NAMES)
    assert all(len(some) > 0.8 * len(NAMES) / 4 for some in parts)


def test_new_models_are_always_taken(monkeypatch):
    seen = {name.partition("-")[2] for name in NAMES} - {"resnet18", "bert"}
    for k in range(1, 5):
        assert {"models-resnet18", "models-bert"} <= set(taken(f"{k}/4", monkeypatch, seen))


def test_without_a_part_the_whole_is_taken(monkeypatch):
    assert taken(None, monkeypatch, set()) == NAMES


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
