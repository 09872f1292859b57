"""A program is saved without pickle; and a file that somebody made to run code is refused before torch reads it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from oto.errors import ArtifactError
from oto.io.program import load_program, save_program


class Net(nn.Module):
    """Parameters, a buffer, a constant, a size that is free, and sizes computed from it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(2, 3)
        self.b.weight = nn.Parameter(self.a.weight.detach().mT)
        self.register_buffer("shift", torch.ones(2))
        self.scale = torch.tensor([1.0, 2.0])

    def forward(self, x, extra):
        y = (self.a(x) + self.shift) * self.scale.sum() + x.shape[0]
        return {"y": y, "both": (self.b(y), extra["k"].repeat(x.shape[0] // 2 + 1, 1))}


X = (torch.arange(12.0).reshape(4, 3), {"k": torch.ones(2, 2)})


@pytest.fixture(scope="module")
def program():
    shapes = ({0: torch.export.Dim.AUTO}, {"k": {}})
    return torch.export.export(Net().eval(), X, dynamic_shapes=shapes, strict=False)


@pytest.fixture(scope="module")
def saved(program, tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    save_program(program, path)
    return path


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}


def pack(path, content, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(f"model/{name}", data)
    return path


def test_a_program_comes_back(program, saved):
    again = load_program(saved).module()
    assert program.example_inputs is not None  # left as it was
    x = (torch.arange(21.0).reshape(7, 3), X[1])
    for before, after in zip(*(torch.utils._pytree.tree_leaves(m(*x)) for m in (program.module(), again)), strict=True):
        assert torch.equal(before, after)


def test_what_is_in_the_archive(saved):
    """On torch 2.15; another layout shows here first."""
    content = members(saved)
    names = {name for name in content if not name.startswith(".data/")}
    assert names == {
        *("archive_format", "archive_version", "byteorder", "models/model.json", "data/sample_inputs/model.pt"),
        *("data/weights/model_weights_config.json", "data/constants/model_constants_config.json"),
        *(f"data/weights/weight_{i}" for i in range(4)),  # the memory that two parameters share is there once
        "data/constants/tensor_0",
    }
    assert content["data/sample_inputs/model.pt"] == b""
    assert not any(data.startswith((b"PK", b"\x80")) for data in content.values())


class _Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
GRAPH, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"


def edit(content, name, change):
    tree = json.loads(content[name])
    change(tree)
    content[name] = json.dumps(tree).encode()


def pickled_samples(protocol):
    def attack(content, payload, code):
        content[SAMPLES] = pickle.dumps(payload, protocol)

    return attack


def opaque_object(content, payload, code):
    data = pickle.dumps(payload, 0)
    content["data/constants/opaque_obj_0"] = data + b"\0" * (-len(data) % 4)  # said to be floats
    edit(content, CONSTANTS, lambda t: t["config"]["scale"].update(path_name="opaque_obj_0"))


def pickle_named_as_a_constant(content, payload, code):
    content["data/constants/tensor_0"] = pickle.dumps(payload, 0)
    edit(content, CONSTANTS, lambda t: t["config"]["scale"].update(use_pickle=True))


def pickle_named_as_a_weight(content, payload, code):
    content["data/weights/weight_0"] = pickle.dumps(payload, 0)
    edit(content, WEIGHTS, lambda t: t["config"]["a.weight"].update(use_pickle=1))


def older_layout_of_weights(content, payload, code):
    content["data/weights/model.pt"] = pickle.dumps(payload, 0)


def second_program(content, payload, code):
    content["models/weight_0.json"] = content[GRAPH]
    content["data/weights/weight_0.pt"] = pickle.dumps(payload, 0)
    content["data/constants/weight_0_constants_config.json"] = content[CONSTANTS]
    content["data/sample_inputs/weight_0.pt"] = b""


def size_that_is_code(content, payload, code):
    text = content[GRAPH].decode()
    symbol = text[text.index("Symbol(") :].partition(")")[0] + ")"
    content[GRAPH] = text.replace(symbol, code).encode()


def size_of_a_tensor_called_metadata(content, payload, code):
    def change(tree):
        values = tree["graph_module"]["graph"]["tensor_values"]
        values["metadata"] = {**values["x"], "sizes": [{"as_expr": {"expr_str": code, "hint": None}}]}

    edit(content, GRAPH, change)


def guard_that_is_code(content, payload, code):
    edit(content, GRAPH, lambda t: t["guards_code"].append(f"{code} is None"))


def guard_that_ends_its_message(content, payload, code):
    """torch puts the guard, as text, between double quotes."""
    edit(content, GRAPH, lambda t: t["guards_code"].append("L['x'] == '\", breakpoint(), \"'"))


def pickle_in_another_place(content, payload, code):
    edit(content, CONSTANTS, lambda t: t["config"]["scale"].update(path_name="opaque_obj_0"))


def input_with_a_default(content, payload, code):
    name = json.dumps(f"x={code}")
    content[GRAPH] = content[GRAPH].replace(b'"x"', name.encode())


def argument_with_a_default(content, payload, code):
    def change(tree):
        tree["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [f"x={code}", "extra"]

    edit(content, GRAPH, change)


def keyword_that_is_code(content, payload, code):
    def change(tree):
        signature = tree["graph_module"]["module_call_graph"][0]["signature"]
        version, spec = json.loads(signature["in_spec"])
        spec["children_spec"][1]["context"] = json.dumps([f"x={code}"])
        signature["in_spec"] = json.dumps([version, spec])

    edit(content, GRAPH, change)


def parameter_that_ends_its_quotes(content, payload, code):
    content[GRAPH] = content[GRAPH].replace(b'"a.weight"', json.dumps(f'a", {code}, "').encode())


def any_function_as_operator(content, payload, code):
    edit(content, GRAPH, lambda t: t["graph_module"]["graph"]["nodes"][0].update(target="torch.os.mkdir"))


def operator_that_writes_files(content, payload, code):
    target = "torch.ops.aten.from_file.default"
    edit(content, GRAPH, lambda t: t["graph_module"]["graph"]["nodes"][0].update(target=target))


def enum_of_a_module(content, payload, code):
    def change(tree):
        signature = tree["graph_module"]["module_call_graph"][0]["signature"]
        version, spec = json.loads(signature["out_spec"])
        # escaped twice, so that no search through the text finds it
        spec["context"] = '[{"\\u005f_enum__": true, "fqn": "antigravity:X", "name": "x"}, "both"]'
        signature["out_spec"] = json.dumps([version, spec])

    edit(content, GRAPH, change)


def default_dict_of_a_module(content, payload, code):
    def change(tree):
        signature = tree["graph_module"]["module_call_graph"][0]["signature"]
        version, spec = json.loads(signature["out_spec"])
        spec.update(type="collections.defaultdict", context="{}")
        signature["out_spec"] = json.dumps([version, spec])

    edit(content, GRAPH, change)


def custom_object(content, payload, code):
    argument = {"name": "x", "arg": {"as_custom_obj": {"name": "x", "class_fqn": "y"}}, "kind": 1}
    edit(content, GRAPH, lambda t: t["graph_module"]["graph"]["nodes"][0]["inputs"].append(argument))


def shared_library(content, payload, code):
    content["data/aotinductor/model/x.wrapper.so"] = b"\x7fELF"


def layout_of_old(content, payload, code):
    content.clear()
    content["version"] = b"8.14"
    for name in ("state_dict", "constants", "example_inputs"):
        content[f"serialized_{name}.pt"] = pickle.dumps(payload, 0)


ATTACKS = [
    pickle_in_another_place,
    *(opaque_object, pickle_named_as_a_constant, pickle_named_as_a_weight, older_layout_of_weights, second_program),
    *(size_that_is_code, size_of_a_tensor_called_metadata, guard_that_is_code, guard_that_ends_its_message),
    *(input_with_a_default, argument_with_a_default, keyword_that_is_code, parameter_that_ends_its_quotes),
    *(any_function_as_operator, operator_that_writes_files, enum_of_a_module, default_dict_of_a_module),
    *(custom_object, shared_library, layout_of_old),
]


@pytest.mark.parametrize(
    "attack",
    [*ATTACKS, *(pytest.param(pickled_samples(n), id=f"pickled_samples_{n}") for n in range(6))],
    ids=lambda attack: getattr(attack, "__name__", None),
)
def test_a_hostile_program_is_refused_unread(saved, tmp_path, monkeypatch, attack):
    mark = tmp_path / "it_ran"
    content, before = members(saved), members(saved)
    attack(content, _Payload(mark), f"__import__('os').mkdir('{mark}')")
    assert content != before
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("torch was asked to load it"))
    with pytest.raises(ArtifactError, match="could run code"):
        load_program(pack(tmp_path / "evil.pt2", content))
    assert not mark.exists()


@pytest.mark.parametrize(
    "attack", [pickled_samples(0), opaque_object, size_that_is_code], ids=["samples", "opaque", "size"]
)
def test_torch_itself_would_run_it(saved, tmp_path, attack):
    """Why all this is needed; if torch learns better, this file may shrink."""
    mark = tmp_path / "it_ran"
    content = members(saved)
    attack(content, _Payload(mark), f"__import__('os').mkdir('{mark}')")
    with contextlib.suppress(Exception):
        torch.export.load(pack(tmp_path / "evil.pt2", content))
    assert mark.exists()


def test_a_name_twice_and_compression_are_refused(saved, tmp_path):
    with pytest.raises(ArtifactError, match="compressed"):
        load_program(pack(tmp_path / "a.pt2", members(saved), zipfile.ZIP_DEFLATED))
    path = pack(tmp_path / "b.pt2", members(saved))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"model/{GRAPH}", b"{}")
    with pytest.raises(ArtifactError, match="twice"):
        load_program(path)


def test_torch_reads_what_was_checked(saved, tmp_path, monkeypatch):
    """Not the file, which may change or be understood in two ways."""
    seen = []
    monkeypatch.setattr(torch.export, "load", seen.append)
    load_program(saved)
    (given,) = seen
    assert not isinstance(given, str | os.PathLike)
    checked, graph = members(given), json.loads(members(saved)[GRAPH])
    for node in graph["graph_module"]["graph"]["nodes"]:
        node["metadata"] = {}  # stack traces and the names of classes: nothing that computes
    assert json.loads(checked.pop(GRAPH)) == graph
    assert checked == {name: data for name, data in members(saved).items() if name != GRAPH}


def test_a_program_that_can_only_be_pickled_is_not_saved(tmp_path):
    program = torch.export.export(nn.Linear(3, 2), (torch.ones(4, 3),), strict=False)
    save_program(program, tmp_path / "model.pt2")
    torch.export.save(program, tmp_path / "plain.pt2")  # with its example inputs
    with pytest.raises(ArtifactError, match=r"sample_inputs/model\.pt is pickled"):
        load_program(tmp_path / "plain.pt2")


def test_what_torch_cannot_save(program, tmp_path, monkeypatch):
    def save(*_):
        raise ValueError("an object of a kind")

    monkeypatch.setattr(torch.export, "save", save)
    with pytest.raises(ArtifactError, match="cannot save the program: ValueError: an object of a kind"):
        save_program(program, tmp_path / "model.pt2")
    assert program.example_inputs is not None


def test_a_type_that_is_not_known_here(saved, tmp_path):
    """torch only logs the reason, and says to read the log."""
    content = members(saved)

    def change(tree):
        signature = tree["graph_module"]["module_call_graph"][0]["signature"]
        version, spec = json.loads(signature["out_spec"])
        signature["out_spec"] = json.dumps([version, {**spec, "type": "their_package.Output"}])

    edit(content, GRAPH, change)
    with pytest.raises(ArtifactError, match=r"nothing imported so far defines their_package\.Output"):
        load_program(pack(tmp_path / "model.pt2", content))


def test_an_operator_that_is_not_known_here(saved, tmp_path):
    content = members(saved)
    target = "torch.ops.their_package.twist.default"
    edit(content, GRAPH, lambda t: t["graph_module"]["graph"]["nodes"][0].update(target=target))
    with pytest.raises(ArtifactError, match=r"twist.default.* is not registered"):
        load_program(pack(tmp_path / "model.pt2", content))


@pytest.mark.parametrize("missing", [GRAPH, WEIGHTS, CONSTANTS, "data/weights/weight_0", "archive_version"])
def test_a_part_that_is_missing(saved, tmp_path, missing):
    content = members(saved)
    del content[missing]
    with pytest.raises(ArtifactError, match="no exported program that this version reads"):
        load_program(pack(tmp_path / "model.pt2", content))


@pytest.mark.parametrize("text", [b"{}", b"[]", b"3", b'{"graph_module": null}', b"{", b"[" * 100_000, b"\xff"])
@pytest.mark.parametrize("name", [GRAPH, WEIGHTS, CONSTANTS])
def test_json_that_says_nothing(saved, tmp_path, name, text):
    with pytest.raises(ArtifactError, match="no exported program"):
        load_program(pack(tmp_path / "model.pt2", members(saved) | {name: text}))


def test_no_zip(tmp_path):
    (tmp_path / "other.pt2").write_bytes(b"no zip")
    with pytest.raises(ArtifactError, match="no exported program"):
        load_program(tmp_path / "other.pt2")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_archive_never_ends_in_another_error(saved, tmp_path, data):
    content = bytearray(saved.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        del content[at:]
    path = tmp_path / "damaged.pt2"
    path.write_bytes(bytes(content))
    with contextlib.suppress(ArtifactError):
        load_program(path)


def test_saving_and_loading_are_silent(program, tmp_path, capfd, recwarn):
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    log = logging.getLogger("torch.export")
    level = log.level
    log.addHandler(handler)
    try:
        save_program(program, tmp_path / "a.pt2")
        load_program(tmp_path / "a.pt2")
        content = members(tmp_path / "a.pt2")
        del content["data/weights/weight_0"]
        with pytest.raises(ArtifactError):
            load_program(pack(tmp_path / "b.pt2", content))
    finally:
        log.removeHandler(handler)
    assert capfd.readouterr() == ("", "") and not recwarn.list and not said and log.level == level


def test_a_convolution_of_any_size_is_read_again(tmp_path):
    """Its guards take the largest of sizes, in torch's own words; other words of torch are refused."""
    from oto.io.program import _check_expression, _Refusal

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 2)

        def forward(self, x):
            return self.fc(self.conv(x).flatten(1))

    dims = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(Net(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=(dims,))
    save_program(program, tmp_path / "model.pt2")
    assert load_program(tmp_path / "model.pt2").module()(torch.randn(5, 3, 8, 8)).shape == (5, 2)
    _check_expression("here", "torch.sym_max(1, (-2) + L['x'].size()[2]) != 1")
    for text in (
        "torch.load('x')",
        "torch.ops",
        "x.sym_max(1)",
        "torch.sym_max.__globals__",
        "os.sym_max(1)",
        "torch.sym_load(1)",
    ):
        with pytest.raises(_Refusal):
            _check_expression("here", text)
