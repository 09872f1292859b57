"""Save a slim model and load it again: what the manifest says about it, and how it is rebuilt."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oto._torch import tree_leaves, tree_map_only, unwrapped
from oto.errors import (
    ArtifactError,
    ClassChangedError,
    DamagedArtifactError,
    EmitterError,
    VerificationError,
    first_line,
    require_flags,
    reraise_out_of_memory,
    some,
)
from oto.io.artifact import Artifact, Draft, reading, writing
from oto.io.members import MEMBERS, index_of, manifest_of_member, tensors_of_member
from oto.io.numbers import numbers_of, warn_of_other_numbers
from oto.io.program import load_program, save_program
from oto.progress import stage
from oto.slim.construct import Made
from oto.slim.copying import copied
from oto.slim.edits import Edits, attribute, owner_of, tensors_of
from oto.slim.graph.program import export_program, other_examples, runnable
from oto.slim.proof.compare import Check, checked, require
from oto.slim.proof.float64 import dtype_of
from oto.slim.proof.reference import CheckOptions, Reference
from oto.slim.proof.run import run
from oto.slim.provenance import Round, after_rounds, copy_with, descend, held, is_part, lacks_values, origin_of
from oto.slim.pruned_shapes import laid_out_like
from oto.slim.source import Source

WEIGHTS, PROGRAM, FULL = "model.safetensors", "model.pt2", "full_group_sparse.safetensors"


def describe(model: nn.Module, names: Collection[str]) -> dict[str, Any]:
    """What must not change in a model for its slim form to fit: classes, their code, full shapes.

    Args:
        names: The names of the tensors whose shapes matter.
    """
    kinds: dict[str, str] = {path: _name(type(module)) for path, module in model.named_modules(remove_duplicate=False)}
    own = {type(module) for module in model.modules() if not type(module).__module__.startswith("torch.")}
    return {
        "class": _name(type(model)),
        "modules": kinds,
        "code": {_name(kind): digest for kind in own if (digest := _code(kind))},
        "full_shapes": {name: list(attribute(model, name).shape) for name in names},
        "numbers": {path: held for path, module in model.named_modules() if (held := numbers_of(module))},
    }


def _name(kind: type[Any]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _code(kind: type[Any]) -> str | None:
    """A digest of a class's code that ignores comments and formatting."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # the class was defined in a prompt, or built at run time
        return None
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


NOT_ASKED = "it was not asked for (construct_subnet(out_dir, program=True) writes one)"


def files(emitter: str, allow_graph: bool, program: bool | None, save_full: bool) -> list[str]:
    """The files that :func:`save` will write, as far as known in advance."""
    graph = emitter in ("graph", "recording") or (emitter == "auto" and allow_graph)
    wanted = graph if program is None else program
    return [WEIGHTS, *([PROGRAM] if wanted else []), *([FULL] if save_full else [])]


def save(
    out_dir: Path,
    source: Source,
    made: Made,
    cost: Mapping[str, Any],
    save_full: bool = False,
    program: bool | None = None,
) -> list[Check]:
    """Write the artifact; what is read back from it is proved before it is put in place. Its tensors are on the CPU.

    Args:
        cost: Costs of the full and of the slim model, for the manifest.
        save_full: Also write the zeroed full weights.
        program: Whether to write the exported program, too; ``None``: only if nothing else in the folder can be loaded.

    Returns:
        The comparisons that were made.

    Raises:
        ArtifactError: The artifact cannot be written.
        EmitterError: The program was requested and cannot be written.
        VerificationError: What was read back differs. Nothing is put in place.
    """
    graph = source.partition.found.graph
    with writing(out_dir) as draft:
        stage("writing the weights")
        left_out = draft.tensors(WEIGHTS, made.tensors, graph.unread)
        if save_full:
            draft.tensors(FULL, tensors_of(source.model, source.partition), graph.unread)
        checks = _read_back(draft, source, made) if made.edits is not None and source.verify else []
        no_program: str | None = NOT_ASKED
        if program or (program is None and made.edits is None):
            no_program, proof = _write_program(draft, source, made, left_out)
            checks += proof
            if no_program is not None and program:
                raise EmitterError(
                    f"{PROGRAM} was asked for, and cannot be written: {no_program}\n"
                    "  effect  nothing was saved\n  to fix  leave program=True out, and load with the class:"
                    " load_subnet(path, make_model)"
                )
        if no_program is not None and made.edits is None:
            made.notes.append(f"no {PROGRAM} in the folder, so nothing in it can be loaded: {no_program}")
        stage("sealing the folder")
        said = {"checks": [vars(c) for c in (*made.checks, *checks)], "no_program": no_program, "left_out": left_out}
        draft.commit({**_manifest(source, made), **said, "cost": cost})
    return checks


def _before(source: Source, made: Made) -> tuple[nn.Module, tuple[Round, ...]]:
    """The model before it was first made slim, and the earlier rounds, if there were any."""
    if made.edits is None:
        return source.model, ()
    origin = origin_of(made.model)
    assert origin is not None
    return origin.first, origin.rounds[:-1]


def _read_back(draft: Draft, source: Source, made: Made) -> list[Check]:
    """Check that the saved weights fit into the class and compute the same; their bits were compared before.

    Raises:
        VerificationError: They do not.
    """
    assert made.edits is not None
    first, earlier = _before(source, made)
    device = next(source.model.parameters()).device
    tensors = {name: t.to(device) for name, t in draft.written(WEIGHTS).items()}
    edits = json.loads(json.dumps(plain_edits(made.edits)))
    loaded = rebuild(after_rounds(first, earlier) if earlier else source.model, tensors, edits)
    checks = source.reference.check(loaded, CheckOptions("reloaded", random=False, exact=False))
    require(checks)
    return checks


def _manifest(source: Source, made: Made) -> dict[str, Any]:
    """What the manifest says about a slim model, without its files and its proof."""
    first, earlier = _before(source, made)
    state = state_names(source)
    names = [] if made.edits is None else [name for name in made.tensors if name not in state]
    return {
        "model": describe(first, names),
        "earlier": [done.plain() for done in earlier],
        "edits": plain_edits(made.edits or Edits()),
        "kept": {name: atoms.tolist() for name, atoms in source.kept.items()},
        "notes": made.notes,
        "emitter": made.emitter,
        "why_graph": made.why,
    }


def state_names(source: Source) -> set[str]:
    """Names of tensors that a forward may replace or create: they may have any shape."""
    graph, found = source.partition.found.graph, set[str]()
    for leaf in graph.leaves:
        for name in leaf.names if leaf.kind != "parameter" else ():
            owner, last = owner_of(source.model, name)
            kept = last in owner._buffers and last not in owner._non_persistent_buffers_set
            if not kept or attribute(source.model, name).shape != leaf.value.shape:
                found.add(name)
    return found | graph.replaced


def _write_program(
    draft: Draft, source: Source, made: Made, left_out: Collection[str]
) -> tuple[str | None, list[Check]]:
    """Write the program of a slim model, on the CPU; returns why there is none, and its proof."""
    slim, full = made.model, source
    if next(source.model.parameters()).device.type != "cpu":
        # the slim model was proved equal to the full one on its device; here the program is compared with it
        given = tree_map_only(Tensor, Tensor.cpu, source.dummy_input)
        slim = copied(slim, {}).cpu()
        full = replace(source, model=slim, dummy_input=given)
    # The numbers in a recording were read in the model's dtype, so in float64 it is compared with itself. The same
    # holds for a class with counts folded into its weights, which are rounded to the dtype of the file.
    rounded = made.emitter in ("recording", "config") or (source.own is not None and bool(source.own.scales))
    itself = rounded or full.model is slim
    against = Reference(slim, full.dummy_input, None, source.float64) if itself else full.reference

    def prove(read: nn.Module) -> list[Check]:
        return against.check(read, CheckOptions("reloaded program", batch=True, notes=[])) if source.verify else []

    return write_program(draft, slim, full.dummy_input, prove, left_out if made.edits is not None else ())


def write_program(
    draft: Draft,
    slim: nn.Module,
    dummy_input: Any,
    prove: Callable[[nn.Module], list[Check]],
    left_out: Collection[str] = (),
) -> tuple[str | None, list[Check]]:
    """Put the exported slim model into the draft, read it back and prove it.

    Args:
        left_out: Tensors that no call reads and no file can hold.

    Returns:
        The reason if there is no program (it cannot be exported or proved), and the proof if there is one.
    """
    path = draft.file(PROGRAM)
    stage("exporting the program")
    try:
        with _emptied(slim, left_out):
            program = export_program(slim, dummy_input)
            save_program(program, path)
        read = read_program(path)
        checks = prove(read)
        if checks:
            others = other_examples(slim, program, dummy_input)[:1]  # a smaller one
            checks = [*checks, *(check for given in others for check in _on_other_sizes(slim, read, given))]
        require(checks)
        return None, checks
    except OSError:
        raise
    except VerificationError as failure:
        why = f"as it was read back, it does not compute what the model does ({str(failure).splitlines()[1].strip()})"
    except (EmitterError, ArtifactError) as failure:
        why = str(failure).splitlines()[0]
    except Exception as failure:  # anything that a call may raise
        reraise_out_of_memory(failure)
        why = f"as it was read back, it fails: {first_line(failure)}"
    path.unlink(missing_ok=True)
    return why, []


def _on_other_sizes(slim: nn.Module, read: nn.Module, given: Any) -> Iterator[Check]:
    """Compare a program with its model on an input whose free sizes differ from the example's."""
    try:
        expected = run(slim, given)
    except Exception as failure:  # sizes may have to match values
        reraise_out_of_memory(failure)
        return
    what = f"reloaded program on {', '.join(str(tuple(t.shape)) for t in tree_leaves(given) if isinstance(t, Tensor))}"
    yield checked(what, dtype_of(slim), expected, run(read, given))


@contextmanager
def _emptied(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Context manager in which some tensors are empty."""
    held = [(*owner_of(model, name), getattr(*owner_of(model, name))) for name in names]
    try:
        for module, name, tensor in held:
            empty = torch.empty(0, dtype=tensor.dtype)
            setattr(module, name, nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty)
        yield
    finally:
        for module, name, tensor in held:
            setattr(module, name, tensor)


def read_program(path: Path) -> nn.Module:
    """A saved program as a plain module."""
    return runnable(load_program(path))


def rebuild(model: nn.Module, tensors: Mapping[str, Tensor], edits: Mapping[str, Any]) -> nn.Module:
    """The slim form of ``model``, which may be on ``meta``."""
    laid: dict[int, Tensor] = {}  # tied names share one tensor
    for name, tensor in tensors.items():  # a file holds no memory layout
        old = held(model, name)
        laid.setdefault(id(tensor), tensor if old is None else laid_out_like(old, tensor))
    slim = copy_with(model, {name: laid[id(tensor)] for name, tensor in tensors.items()}, Edits(**edits))
    left = [n for n, t in [*slim.named_parameters(), *slim.named_buffers()] if t.is_meta]
    if left:
        raise ClassChangedError(
            f"the artifact has no values for {some(left)}\n"
            "  effect  the slim model would be incomplete, so it is not loaded\n"
            "  to fix  pass the class that the artifact was made from, in the same version"
        )
    return slim


def plain_edits(edits: Edits) -> dict[str, Any]:
    """The edits as plain data for JSON."""
    return edits.plain()


def load_subnet(
    path: str | os.PathLike[str], model: nn.Module | Callable[[], nn.Module] | None = None, strict: bool = True,
    *, member: float | Mapping[str, Any] = 0,
) -> nn.Module:  # fmt: skip
    """Load a slim model that ``OTO.construct_subnet`` saved.

    Nothing is unpickled. Every file is checked against its hash first. A model that was made slim several times still
    loads from the first class, and the loaded model may be made slim again.

    Args:
        path: The folder, or a file in it.
        model: The full-size model, or a function that makes it; its weights are not used, and a function is called on
            the ``meta`` device. A wrapper of ``torch.compile`` or ``(Distributed)DataParallel`` is removed: put it
            around the slim model. Without it the exported program is loaded, which does not need the class; if the slim
            model is of its class, ``construct_subnet`` writes a program only with ``program=True``.
        strict: Refuse a class whose code differs from that of the saved model.
        member: For a family (:meth:`oto.OTO.family`), which member to load: the target as it was given, such as
            ``0.5``, or an index, where 0 is the largest.

    Returns:
        The slim model in eval mode, on the CPU: of the original class if the artifact was emitted that way, otherwise a
        ``torch.fx.GraphModule``.

    Raises:
        ArtifactError: The artifact is missing, damaged, of an unknown version, or cannot be loaded this way.
        ClassChangedError: ``model`` is not what the artifact was made from.
    """
    require_flags(strict=strict)
    artifact = reading(path)
    manifest = artifact.manifest
    if not {"emitter", "model", "edits", "kept"} <= manifest.keys():
        raise DamagedArtifactError(
            f"{artifact.folder}: its manifest does not say what model it is of\n"
            "  effect  the artifact is not loaded\n  to fix  pass the folder given to construct_subnet"
        )
    index = index_of(manifest, member, artifact.folder)
    manifest = manifest_of_member(manifest, index)
    if model is None or manifest["emitter"] not in ("module", "config"):
        return _load_program(artifact)
    # what is not in the file stays as the constructor made it
    tensors = artifact.tensors(WEIGHTS) if index == 0 else _tensors_of_member(artifact, index)
    make = (lambda factory, _: factory()) if manifest.get("left_out") else _on_meta
    # what torch.compile was called on is compiled no more: the slim model has other shapes
    given = _plain(model) if isinstance(model, nn.Module) or not callable(model) else make(_maker(model), tensors)
    if not isinstance(given, nn.Module):
        raise ClassChangedError(
            f"what is given as the model is, or makes, a {type(given).__name__}, no torch.nn.Module\n"
            "  effect  the slim weights cannot be put into it\n"
            "  to fix  pass the model, or a function that returns it: load_subnet(path, make_model)"
        )
    try:
        _require_same(manifest["model"], given, strict)
        _require_thinner(given, tensors, manifest["model"]["full_shapes"])
        earlier = [Round.read(done) for done in manifest.get("earlier", ())]
        slim = rebuild(after_rounds(given, earlier), tensors, manifest["edits"]).eval()
        kept = {name: np.array(atoms, dtype=np.int64) for name, atoms in manifest["kept"].items()}
        descend(slim, given, *earlier, Round.of(Edits(**manifest["edits"]), tensors, kept))
    except (
        *(AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError),
        EmitterError,
    ) as failure:
        reraise_out_of_memory(failure)
        raise DamagedArtifactError(
            f"{artifact.folder}: its edits cannot be applied to {type(given).__name__}: {first_line(failure)}\n"
            "  effect  the artifact is not loaded\n"
            "  to fix  write it again, with the version of oto that reads it"
        ) from failure
    return slim


def _tensors_of_member(artifact: Artifact, index: int) -> dict[str, Tensor]:
    """The tensors of a member of a family."""
    full, held = artifact.tensors(WEIGHTS), artifact.tensors(MEMBERS)
    try:
        return tensors_of_member(full, held, artifact.manifest["entries"], index)
    except (KeyError, IndexError, RuntimeError, TypeError) as failure:
        raise DamagedArtifactError(
            f"{artifact.path(MEMBERS)}: what it says of member {index} does not fit the full weights ({failure})\n"
            "  effect  the artifact is not loaded\n  to fix  copy it again, or write it again"
        ) from failure


def _plain(given: Any) -> Any:
    return unwrapped(given) if isinstance(given, nn.Module) else given


def _maker(factory: Callable[[], Any]) -> Callable[[], Any]:
    """The same, without the wrapper of ``torch.compile`` or ``DataParallel`` that it may put around the model."""
    return lambda: _plain(factory())


def _on_meta(factory: Callable[[], nn.Module], names: Collection[str]) -> nn.Module:
    """A full-size model without values, except for tensors that the artifact does not hold.

    Args:
        names: The names of the tensors in the artifact.
    """
    try:
        with torch.device("meta"):
            model = factory()
    except Exception:  # a constructor that computes with its weights needs real tensors
        return factory()
    return factory() if isinstance(model, nn.Module) and lacks_values(model, names) else model


def _load_program(artifact: Artifact) -> nn.Module:
    reason = artifact.manifest.get("no_program")
    if reason and artifact.manifest["emitter"] in ("module", "config"):
        raise ArtifactError(
            f"{artifact.folder} holds no {PROGRAM}: {reason}\n"
            "  effect  the slim model cannot be loaded without its class\n"
            "  to fix  pass the model, or a function that makes it: load_subnet(path, make_model)"
        )
    if reason:
        raise ArtifactError(
            f"{artifact.folder} holds no {PROGRAM}: {reason}\n"
            "  effect  the slim model is not of its class, so nothing in the folder can be loaded\n"
            "  to fix  prune only what the class can express, and save that: OTO(...) without allow_graph=True"
        )
    return read_program(artifact.path(PROGRAM))


def _require_thinner(given: nn.Module, tensors: Mapping[str, Tensor], full: Mapping[str, Sequence[int]]) -> None:
    """Refuse weights that cannot be a pruned form of the full weights."""
    for name, tensor in tensors.items():
        if name not in full and isinstance(held(given, name), nn.Parameter):  # others may be state that changes
            raise ValueError(f"it does not say which shape {name} had")
        if name in full and not is_part(tensor.shape, full[name]):
            raise ValueError(f"{name} is {list(tensor.shape)}, and the full one {full[name]}")


def _require_same(saved: Mapping[str, Any], given: nn.Module, strict: bool) -> None:
    def fail(what: str) -> None:
        raise ClassChangedError(
            f"the model does not fit the artifact: {what}\n"
            "  effect  the slim weights cannot be put into it\n"
            "  to fix  pass the class and arguments that the artifact was made from; or load without a class, if"
            f" a {PROGRAM} was saved: load_subnet(path)"
        )

    if (name := _name(type(given))) != saved["class"]:
        fail(f"it was made from {saved['class']}, this is {name}")
    kinds = {path: _name(type(m)) for path, m in given.named_modules(remove_duplicate=False)}
    changed = [p or "(top)" for p in {*kinds, *saved["modules"]} if kinds.get(p) != saved["modules"].get(p)]
    if changed:
        fail(f"modules differ: {some(sorted(changed))}")
    for name, shape in saved["full_shapes"].items():
        tensor = held(given, name)
        if tensor is None:
            fail(f"it has no {name}")
        elif list(tensor.shape) != shape:
            fail(f"{name} is {list(tensor.shape)}, and was {shape}")
    warn_of_other_numbers(saved.get("numbers", {}), given)
    if strict:
        now = describe(given, {})["code"]
        edited = [k for k, digest in saved["code"].items() if k in now and now[k] != digest]
        if edited:
            fail(f"the code of {some(sorted(edited))} changed since (strict=False accepts it)")
