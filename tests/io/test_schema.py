"""docs/oto.schema.json says what a manifest is; the writer and the schema cannot part without failing here."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from oto import OTO
from oto.family import Family
from oto.groups import Cost
from oto.slim.edits import Edits
from oto.slim.proof.compare import Check
from oto.slim.provenance import Round
from tests.io.nets import Net

jsonschema = pytest.importorskip("jsonschema")

SCHEMA = json.loads((Path(__file__).resolve().parents[2] / "docs" / "oto.schema.json").read_text())


@pytest.fixture(scope="module", params=["module", "graph", "recording", "family"])
def manifest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("out") / request.param
    if request.param == "family":
        trained().construct(out)
    else:
        oto = OTO(Net(), torch.randn(2, 3), allow_graph=True)
        oto.random_set_zero_groups(0.5)
        oto.construct_subnet(out, emitter=request.param, program=True, save_full=True)
    return json.loads((out / "oto.json").read_text())


def trained() -> Family:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 4))
    targets: list[Any] = [0.75, {"target_params": 0.5}]
    schedule = {"total_steps": 4, "freeze_step": 1, "average_steps": 1}
    family: Family = OTO(net, torch.randn(2, 6)).family(targets=targets, lr=0.1, **schedule)
    for _ in range(2):
        family.step(lambda net: net(torch.randn(4, 6)), lambda output: output.square().mean())
    return family


OF_A_FAMILY = {"members", "levels", "entries"}


def validate(manifest: Any) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_a_manifest_is_valid_and_has_every_entry(manifest: Any) -> None:
    validate(manifest)
    assert set(manifest) == set(SCHEMA["properties"]) - (set() if "members" in manifest else OF_A_FAMILY)


def objects(schema: Any) -> Any:
    """Every object of the schema whose entries are listed."""
    if isinstance(schema, dict):
        if "properties" in schema and "type" in schema:
            yield schema
        for part in schema.values():
            yield from objects(part)


def test_what_is_listed_is_required_and_nothing_else_is_allowed() -> None:
    found = list(objects(SCHEMA))
    assert len(found) >= 8
    for schema in found:
        optional = OF_A_FAMILY if schema is SCHEMA else {"erased", "layers"}  # an earlier version reads edits without
        assert (
            set(schema["required"]) == set(schema["properties"]) - optional and schema["additionalProperties"] is False
        )


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        (SCHEMA["$defs"]["edits"], Edits),
        (SCHEMA["properties"]["earlier"]["items"], Round),
        (SCHEMA["properties"]["checks"]["items"], Check),
        (SCHEMA["$defs"]["cost"], Cost),
    ],
    ids=["edits", "earlier", "checks", "cost"],
)
def test_the_schema_lists_what_is_written(place: Any, kind: Any) -> None:
    assert set(place["properties"]) == {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("name", sorted(SCHEMA["properties"]))
def test_another_or_a_missing_entry_is_not_valid(manifest: Any, name: str) -> None:
    if name in OF_A_FAMILY and "members" not in manifest:
        manifest = {**manifest, **dict.fromkeys(OF_A_FAMILY)}
    for change in ({name: object()}, {f"{name}s": 1}):
        with pytest.raises(jsonschema.ValidationError):
            validate({**manifest, **change})
    with pytest.raises(jsonschema.ValidationError):
        validate({key: value for key, value in manifest.items() if key != name})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m["files"].update({"../secret": m["files"]["model.safetensors"]}),
        lambda m: m["files"]["model.safetensors"].update(size=-1),
        lambda m: m["files"]["model.safetensors"].update(sha256="0"),
        lambda m: m["edits"].update(code="import os"),
        lambda m: m["checks"][0].update(error="small"),
        lambda m: m["cost"]["after"].update(params=1.5),
        lambda m: m["kept"].update(x=[1, 1]),
        lambda m: m.update(levels={"0": [-1]}, entries={}, members=m.get("members", [])),
        lambda m: (m.pop("members", None), m.update(levels={})),  # of a family, without its members
        lambda m: m.update(members=[], levels={}, entries={}),
    ],
)
def test_what_no_writer_writes_is_not_valid(manifest: Any, spoil: Any) -> None:
    spoiled = copy.deepcopy(manifest)
    spoil(spoiled)
    with pytest.raises(jsonschema.ValidationError):
        validate(spoiled)
