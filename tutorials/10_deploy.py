"""Lesson 10: deploy. One slim network as ONNX, compiled by AOTInductor, and quantized, with sizes and times.

    python tutorials/10_deploy.py                             # digits, about two minutes; AOTInductor needs g++
    python tutorials/10_deploy.py --dataset cifar10 --depth 20 --width 32 --epochs 30

A slim network is an ordinary network with smaller tensors, so whatever takes the full one takes it. Every form is run
in its own runtime on all test images and must put them into the same classes as the slim network does; int8 rounds, so
it may differ, and the table says in how many.
"""

from __future__ import annotations

import logging
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from common import parser, start
from data import LOADERS, load_images
from resnet_cifar10 import ResNet, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from oto import OTO

# ---------------------------------------------------------------------------------------------- the forms
# Each takes a network and example images, writes files, and returns what runs them.

Run = Callable[[Tensor], Tensor]


def onnx(model: nn.Module, x: Tensor, path: Path) -> tuple[Run, Path]:
    """ONNX by torch's exporter, any batch size, run by onnxruntime."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (x,),
            str(path),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["x"],
            external_data=False,
            verbose=False,
        )
    return session(path), path


def session(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    held = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(held.run(None, {"x": images.numpy()})[0])


def int8(source: Path, x: Tensor, path: Path) -> tuple[Run, Path]:
    """The same file with 8-bit weights and activations, calibrated on training images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(x.split(32))

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch.numpy()}

    logging.getLogger().setLevel(logging.ERROR)
    ready = path.with_suffix(".ready.onnx")
    quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    quantize_static(
        str(ready),
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    ready.unlink()
    return session(path), path


def aoti(model: nn.Module, x: Tensor, path: Path) -> tuple[Run, Path]:
    """A shared library that needs no Python to run; compiled for this machine."""
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=4096)},))
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return torch._inductor.aoti_load_package(str(path)), path


def milliseconds(forms: Mapping[str, tuple[Run, Path]], x: Tensor, passes: int) -> dict[str, float]:
    """The fastest of some passes, in turns: what else the machine does only adds, and adds much to little."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(passes + 3):  # three to warm up
        for name, (run, _) in forms.items():
            begin = time.perf_counter()
            run(x)
            seconds[name].append(time.perf_counter() - begin)
    return {name: 1e3 * min(own[3:]) for name, own in seconds.items()}


# ---------------------------------------------------------------------------------------------- the lesson


def main() -> None:
    flags = parser(__doc__, "10_deploy")
    flags.add_argument("--dataset", choices=LOADERS, default="digits")
    flags.add_argument("--depth", type=int, default=8)
    flags.add_argument("--width", type=int, default=64)
    flags.add_argument("--epochs", type=int, default=8)
    flags.add_argument("--lr", type=float, default=0.1)
    flags.add_argument("--target-macs", type=float, default=0.3)
    flags.add_argument("--no-aoti", action="store_true", help="without AOTInductor, which compiles for a while")
    args = start(flags, {"width": 16, "epochs": 4, "no_aoti": True})
    images = load_images(args.dataset).to(args.device)

    # A network, pruned as in lesson 1. Kernels like widths that are multiples of 8 or 16.
    model = ResNet(args.depth, args.width, images.shape[0], images.classes).to(args.device)
    oto = OTO(model, images.test_x[:1])
    steps = args.epochs * (len(images.train_y) // 64)
    optimizer = oto.hesso(
        lr=args.lr,
        first_momentum=0.9,
        weight_decay=5e-4,
        target_macs=args.target_macs,
        total_steps=steps,
        group_divisible=8,
    )
    schedule = CosineAnnealingLR(optimizer, steps)
    shuffle = torch.Generator().manual_seed(args.seed)
    model.train()
    for _ in range(args.epochs):
        for x, y in images.epoch(64, shuffle):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    subnet = oto.construct_subnet(out_dir=args.out, program=True, save_full=True)
    print(subnet, "\n")

    full, slim = model.cpu().eval(), subnet.model.cpu().eval()
    test, y = images.test_x.cpu(), images.test_y.cpu()
    some = images.train_x[:256].cpu()
    args.out.mkdir(parents=True, exist_ok=True)

    def eager(m: nn.Module) -> Run:
        return torch.no_grad()(m)

    forms: dict[str, tuple[Run, Path]] = {
        "full, eager": (eager(full), args.out / "full_group_sparse.safetensors"),
        "slim, eager": (eager(slim), args.out / "model.safetensors"),
        "full, ONNX": onnx(full, test[:2], args.out / "full.onnx"),
        "slim, ONNX": onnx(slim, test[:2], args.out / "slim.onnx"),
    }
    forms["full, ONNX int8"] = int8(args.out / "full.onnx", some, args.out / "full.int8.onnx")
    forms["slim, ONNX int8"] = int8(args.out / "slim.onnx", some, args.out / "slim.int8.onnx")
    if not args.no_aoti and shutil.which("g++"):
        forms["slim, AOTInductor"] = aoti(slim, test[:2], args.out / "slim.aoti.pt2")

    batch = test[:64]
    reference = {kind: forms[f"{kind}, eager"][0](test).argmax(1) for kind in ("full", "slim")}
    took = milliseconds(forms, batch, args.passes)
    rows = [["", "accuracy", "other class", "KiB", "ms"]]
    for name, (run, path) in forms.items():
        said = run(test).argmax(1)
        other = int((said != reference[name.partition(",")[0]]).sum())
        right = f"{100 * int((said == y).sum()) / len(y):.2f} %"
        size = f"{path.stat().st_size / 1024:,.0f}"
        rows.append([name, right, f"{other} of {len(y)}", size, f"{took[name]:.2f}"])
    print(table(rows))
    print(f"ms: the fastest of {args.passes} passes on 64 images, CPU, {torch.get_num_threads()} threads, in turns\n")


if __name__ == "__main__":
    main()
