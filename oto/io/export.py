"""Write a slim model for other runtimes: ONNX, ``torch.export``, and AOTInductor.

Each file is written to a scratch folder, read back by its own runtime, compared with the model on the example and on
two other sizes, and only then renamed to its place (:mod:`oto.atomic`). An existing file is never replaced. Sizes that
the model itself does not accept are not compared, as they may have to match values: indices of nodes, for example.
"""

from __future__ import annotations

import filecmp
import importlib
import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oto._torch import compile_package, load_package, tree_leaves
from oto.atomic import concerns, locked, rewording_os_errors, scratch, sync
from oto.errors import (
    ArtifactError,
    EmitterError,
    MissingExtraError,
    OTOError,
    SetupWarning,
    first_line,
    reraise_out_of_memory,
    users_level,
)
from oto.io.artifact import check_out_dir
from oto.io.program import load_program, save_program
from oto.slim.graph.program import export_program, other_examples, output_names, runnable
from oto.slim.proof.compare import Check, checked, require, tolerance
from oto.slim.proof.run import run

log = logging.getLogger(__name__)

Runtime = Callable[[Any], Sequence[Tensor]]
_ONE_FILE = 2**31 - 2**20  # bytes; the limit of protobuf


def export_model(model: nn.Module, dummy_input: Any, how: str, path: str | os.PathLike[str]) -> list[Check]:
    """Write a model for another runtime and prove the file; sizes that the model leaves free are dynamic.

    Args:
        dummy_input: An example input, as for ``OTO``.
        how: ``"onnx"``, ``"pt2"`` (``torch.export.save``) or ``"aoti"`` (compiled for this machine's kind of device).
        path: The file; its folder is created.

    Returns:
        The comparisons that were made. If no other size than that of the example could be compared, though some are
        free, a ``SetupWarning`` says so.

    Raises:
        EmitterError: The runtime cannot express the model, or there is no compiler.
        VerificationError: The file, read back, computes something else. Nothing was written.
        ArtifactError: The file exists already, or cannot be written.
        MissingExtraError: ONNX is requested but not installed.
    """
    if not isinstance(how, str) or how not in _WAYS:
        raise EmitterError(f"how={how!r} is unknown\n  to fix  use {', '.join(map(repr, _WAYS))}")
    place = Path(path)
    check_out_dir(place.parent)
    if place.exists() or place.is_symlink():
        raise _is_there(place)
    if how == "aoti" and place.suffix != ".pt2":
        raise EmitterError(f"{place.name} is no name for a compiled package\n  to fix  use a name that ends in .pt2")
    _WAYS[how].ready()
    program = export_program(model, dummy_input)
    examples = _with_outputs(model, dummy_input, other_examples(model, program, dummy_input))
    with rewording_os_errors(place.parent, f"{place.name} was not written"), scratch(place.parent) as folder:
        draft = folder / place.name
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations in these packages
                runtime = _WAYS[how].write(program, draft)
                checks = [_compared(given, expected, runtime, how) for given, expected in examples]
        except (OTOError, OSError):
            raise
        except Exception as failure:
            reraise_out_of_memory(failure)
            if (refused := _refused(failure, place.parent)) is not None:
                raise refused from failure
            raise EmitterError(
                f"{type(model).__name__} cannot be written as {how}: {_why(failure)}\n"
                "  effect  nothing was written\n  to fix  see the traceback above; another format may work"
            ) from failure
        require(checks)
        _put(draft, place)
    return checks


def _refused(failure: BaseException | None, place: Path) -> OSError | None:
    """The file system error below ``place`` that caused a failure, if there was one."""
    while failure is not None and not (isinstance(failure, OSError) and concerns(failure, place)):
        failure = failure.__cause__ or failure.__context__
    return failure


def _why(failure: BaseException) -> str:
    """The first cause of a failure, and the error one level above it, which in torch.onnx names the call."""
    causes = [failure]
    while (cause := causes[-1].__cause__) is not None and cause not in causes:
        causes.append(cause)
    return first_line(causes[-1]) + (f"\n  at      {first_line(causes[1], 200)}" if len(causes) > 2 else "")


def _with_outputs(model: nn.Module, dummy_input: Any, others: Sequence[Any]) -> list[tuple[Any, list[Tensor]]]:
    """The example, and the inputs of other sizes that the model accepts, each with the outputs of the model."""
    made, refused = [(dummy_input, run(model, dummy_input))], []
    for given in others:
        try:
            made.append((given, run(model, given)))
        except Exception as failure:
            reraise_out_of_memory(failure)
            refused.append(f"{_shapes(given)} ({first_line(failure, 80)})")
            log.info("%s does not take %s", type(model).__name__, refused[-1])
    if refused and len(made) == 1:
        warnings.warn(
            f"{type(model).__name__} takes no other sizes that were tried: {', '.join(refused)}\n"
            "  effect  the file is compared on the example only; that its free sizes work was not shown",
            SetupWarning,
            stacklevel=users_level(),
        )
    return made


def _put(draft: Path, place: Path) -> None:
    """Move a file and the files written beside it to their place; the file itself comes last."""
    files = sorted(draft.parent.iterdir(), key=lambda file: file == draft)
    for file in files:
        sync(file)
    with locked(place.parent):
        for file in files:
            there = place.parent / file.name  # one left by an export that was killed here is identical
            if os.path.lexists(there) and not (file != draft and there.is_file() and filecmp.cmp(file, there, False)):
                raise _is_there(there)
        for file in files:
            os.replace(file, place.parent / file.name)
        sync(place.parent)


def _is_there(place: Path) -> ArtifactError:
    return ArtifactError(
        f"{place} is there already\n  effect  nothing was exported; the file is as it was\n"
        "  to fix  choose another name, or remove it"
    )


def _shapes(given: Any) -> str:
    return ", ".join(str(tuple(t.shape)) for t in _tensors(given))


def _compared(given: Any, expected: Sequence[Tensor], runtime: Runtime, how: str) -> Check:
    narrowest = [t.dtype for t in expected if t.is_floating_point()] or [torch.float32]
    allowed = max(map(tolerance, narrowest))
    return checked(f"{how} on {_shapes(given)}", narrowest[0], expected, runtime(given), max(allowed, 1e-8))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _called(module: Callable[..., Any]) -> Runtime:
    def call(given: Any) -> list[Tensor]:
        with torch.no_grad():
            if isinstance(given, dict):
                return _tensors(module(**given))
            return _tensors(module(*(given if isinstance(given, tuple | list) else (given,))))

    return call


class _Pt2:
    @staticmethod
    def ready() -> None:
        pass

    @staticmethod
    def write(program: torch.export.ExportedProgram, path: Path) -> Runtime:
        save_program(program, path)
        return _called(runnable(load_program(path)))


class _Onnx:
    @staticmethod
    def ready() -> None:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            try:
                importlib.import_module(package)
            except ImportError as failure:
                raise MissingExtraError(
                    f"{package} is not installed, which writing and checking ONNX needs\n"
                    "  effect  nothing was written\n  to fix  pip install 'oto[onnx]'"
                ) from failure

    @staticmethod
    def write(program: torch.export.ExportedProgram, path: Path) -> Runtime:
        import onnx
        import onnxruntime

        size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
        made: Any = torch.onnx.export(program, dynamo=True, verbose=False)
        _name_outputs(made.model.graph, program)
        made.save(path, external_data=size > _ONE_FILE)
        onnx.checker.check_model(path, full_check=True)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]

        def call(given: Any) -> list[Tensor]:
            fed = {name: t.cpu().numpy() for name, t in zip(names, _tensors(given), strict=True)}
            return [torch.from_numpy(y) for y in session.run(None, fed)]

        return call


def _name_outputs(graph: Any, program: torch.export.ExportedProgram) -> None:
    """Name the outputs of an ONNX graph after the model's own output: keys, fields and indices.

    An output keeps its name if it is also an input, occurs twice, or if the new name is already taken.

    Args:
        graph: The graph, an ``onnx_ir`` object.
    """
    names = output_names(program)
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    taken |= {value.name for node in graph for value in node.outputs}
    if len(names) == len(graph.outputs):
        for value, name in zip(graph.outputs, names, strict=True):
            if name not in taken and value.producer() is not None:
                value.name = name
                taken.add(name)


class _Aoti:
    @staticmethod
    def ready() -> None:
        compiler = os.environ.get("CXX") or "g++"
        if shutil.which(compiler.split()[0]) is None and shutil.which("clang++") is None:
            raise EmitterError(
                f"there is no C++ compiler here: {compiler} is not found\n"
                "  effect  nothing was compiled or written\n"
                "  to fix  install one (g++ or clang++), or name it in CXX"
            )

    @staticmethod
    def write(program: torch.export.ExportedProgram, path: Path) -> Runtime:
        packed = io.BytesIO()  # in memory, as in save_program
        compile_package(program, packed)
        path.write_bytes(packed.getbuffer())
        return _called(load_package(str(path)))


_WAYS: dict[str, Any] = {"onnx": _Onnx, "pt2": _Pt2, "aoti": _Aoti}
