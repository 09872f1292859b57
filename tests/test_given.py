"""Checkpoints as they lie about: wrapped, nested, tied, and some that are none."""

from __future__ import annotations

import json
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from oto import given
from oto.errors import GivenError
from oto.given import load_weights, named_input, state_dict_of


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 1}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_state_dicts_are_found_where_trainers_put_them(tmp_path, wrap, prefix):
    trained = mlp(1)
    torch.save(wrap({prefix + name: t for name, t in trained.state_dict().items()}), tmp_path / "x.pt")
    model = mlp()
    load_weights(model, tmp_path / "x.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))


def test_safetensors_and_a_key(tmp_path):
    safetensors.torch.save_file(mlp(1).state_dict(), tmp_path / "x.safetensors")
    assert torch.equal(state_dict_of(tmp_path / "x.safetensors")["0.weight"], mlp(1)[0].weight)
    torch.save({"model": mlp(1).state_dict(), "ema": mlp(2).state_dict()}, tmp_path / "x.pt")
    assert torch.equal(state_dict_of(tmp_path / "x.pt", "ema")["0.weight"], mlp(2)[0].weight)
    with pytest.raises(GivenError, match="has nothing that is called emma"):
        state_dict_of(tmp_path / "x.pt", "emma")


def test_tied_weights_may_be_saved_once(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    safetensors.torch.save_file({"0.weight": torch.eye(4)}, tmp_path / "x.safetensors")
    load_weights(model, tmp_path / "x.safetensors")
    assert torch.equal(model[1].weight, torch.eye(4))


def test_large_tensors_stay_in_the_memory_of_the_file(tmp_path, monkeypatch):
    """Nothing is there twice, ties stay ties, and what is written to the model is not in the file."""
    monkeypatch.setattr(given, "LARGE", 8)

    class Tied(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            if tied:
                self.b.weight = self.a.weight

    state = {"a.weight": torch.eye(4), "b.weight": torch.eye(4)}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    shared = torch.eye(4)
    torch.save({"a.weight": shared, "b.weight": shared}, tmp_path / "x.pt")
    for tied in (True, False):
        for file in ("x.safetensors", "x.pt"):
            model = Tied(tied).requires_grad_(False)
            was = model.a.weight
            before = was.data_ptr()
            load_weights(model, tmp_path / file)
            assert model.a.weight is was and was.data_ptr() != before, "the parameter, in other memory"
            model.a.weight.zero_()
            assert torch.equal(model.b.weight, torch.zeros(4, 4) if tied else torch.eye(4))
            assert torch.equal(state_dict_of(tmp_path / file)["a.weight"], torch.eye(4))
    model = Tied(False).to(torch.float64)
    load_weights(model, tmp_path / "x.safetensors")
    assert model.a.weight.dtype == torch.float64 and torch.equal(model.a.weight, torch.eye(4).double())


def test_shards_of_one_model_are_found_by_their_index(tmp_path):
    trained = mlp(1)
    parts = {"model-1.safetensors": ["0.weight", "0.bias"], "model-2.safetensors": ["2.weight", "2.bias"]}
    for file, names in parts.items():
        safetensors.torch.save_file({name: trained.state_dict()[name] for name in names}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, names in parts.items() for name in names}}))
    load_weights(model := mlp(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(GivenError, match=r"lacks model-2\.safetensors"):
        load_weights(mlp(), tmp_path)
    index.write_text(json.dumps({"weight_map": {"0.weight": "../x.safetensors"}}))
    with pytest.raises(GivenError, match=r"lacks \.\./x\.safetensors"):
        load_weights(mlp(), tmp_path)
    index.write_text("[]")
    with pytest.raises(GivenError, match="lists no shards"):
        load_weights(mlp(), tmp_path)


def test_what_does_not_fit_is_told(tmp_path):
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "x.pt")
    with pytest.raises(GivenError, match=r"lacks 0\.weight.* and has weight, bias"):
        load_weights(mlp(), tmp_path / "x.pt")
    torch.save({**mlp().state_dict(), "0.weight": torch.ones(9, 3)}, tmp_path / "x.pt")
    with pytest.raises(GivenError, match=r"size mismatch for 0\.weight"):
        load_weights(mlp(), tmp_path / "x.pt")


def test_the_folder_of_a_checkpoint_holds_its_weights(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    with pytest.raises(GivenError, match="a folder without weights"):
        state_dict_of(folder)
    torch.save({"lr": torch.ones(1)}, folder / "optimizer.pt")
    safetensors.torch.save_file(mlp(1).state_dict(), folder / "model.safetensors")
    assert torch.equal(state_dict_of(folder)["0.weight"], mlp(1)[0].weight)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert torch.equal(state_dict_of("~/checkpoint-500")["0.weight"], mlp(1)[0].weight)
    (folder / "model.safetensors").unlink()
    torch.save(mlp(2).state_dict(), folder / "last.pt")
    with pytest.raises(GivenError, match=r"several files that may hold weights: last\.pt, optimizer\.pt"):
        state_dict_of(folder)


class Thing:
    pass


def test_advice_to_run_what_is_in_a_file_is_not_passed_on(tmp_path):
    torch.save({"model": Thing()}, tmp_path / "x.pt")
    with pytest.raises(GivenError) as caught:
        state_dict_of(tmp_path / "x.pt")
    said = str(caught.value)
    assert "it holds" in said and "Thing, which could run code" in said and "torch.save(model.state_dict()" in said
    assert "weights_only" not in said and "arbitrary" not in said


class Evil:
    def __reduce__(self):
        return (open, ("made_by_a_checkpoint", "w"))


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("evil.pt", "wb") as file:
        pickle.dump({"state_dict": Evil()}, file)
    torch.save({"state_dict": Evil()}, "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(GivenError, match="cannot be read as plain tensors"):
            state_dict_of(name)
    assert not (tmp_path / "made_by_a_checkpoint").exists()
    torch.save([1, 2], "list.pt")
    with pytest.raises(GivenError, match="holds no state dict but list"):
        state_dict_of("list.pt")
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(GivenError, match="no whole safetensors file"):
        state_dict_of("x.safetensors")


def test_inputs():
    assert named_input(["2x3"]).shape == (2, 3)
    a, b = named_input(["2x3:float64", "5:int64:7"])
    assert a.dtype == torch.float64 and b.shape == (5,) and int(b.max()) < 7 and b.dtype == torch.int64
    named = named_input(["ids=1x4:int32", "mask=1×4:bool"])
    assert named["ids"].dtype == torch.int32 and named["mask"].all() and named.keys() == {"ids", "mask"}
    assert torch.equal(named_input(["2x3"]), named_input(["2x3"]))  # the same on every call
