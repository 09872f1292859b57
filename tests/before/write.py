"""Writes what lies beside it: a slim model of each emitter, and states of optimizers, as this commit writes them.

    python -m tests.before.write

They are kept so that later ones read them; run it again only when a new form is to be kept too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from oto import OTO
from tests.before.models import ARTIFACTS, MODELS, OPTIMIZERS, STEPS, STOP, train, training

HERE = Path(__file__).resolve().parent


def artifact(folder: str, name: str, emitter: str) -> None:
    model, x = MODELS[name]()
    layout = {"layout": "uniform"} if emitter == "config" else {}
    oto = OTO(model, x, **layout)
    oto.random_set_zero_groups(0.5, seed=0)
    shutil.rmtree(HERE / folder, ignore_errors=True)
    subnet = oto.construct_subnet(HERE / folder, emitter=emitter)
    with torch.no_grad():
        save_file({"x": x, "y": subnet.model(x)}, HERE / f"{folder}.safetensors")


def state(kind: str) -> None:
    model, optimizer = training(kind)
    train(model, optimizer, 0, STOP)
    held = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(held, HERE / f"{kind}.pt")
    train(model, optimizer, STOP, STEPS)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, HERE / f"{kind}.safetensors")


if __name__ == "__main__":
    for folder, (name, emitter) in ARTIFACTS.items():
        artifact(folder, name, emitter)
    for kind in OPTIMIZERS:
        state(kind)
