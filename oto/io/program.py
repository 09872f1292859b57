"""Exported programs on disk: no pickle in them, and on the way in nothing that torch would run unasked.

What torch 2.15 puts into a ``.pt2``: a zip, uncompressed, with the graph as JSON (``models/model.json``), weights and
constants as raw bytes with a JSON index each, and the example inputs. Only the example inputs are pickled by rule;
they are dropped. Tensor subclasses and script objects among the weights can only be pickled; they are refused.

What ``torch.export.load`` does with an archive that somebody else made is another matter. It unpickles with
``weights_only=False`` whatever the index calls pickled (``opaque_obj_*`` with plain ``pickle.loads``), example inputs
that ``weights_only=True`` refused, and the ``.pt`` files of older layouts; it opens the shared libraries under
``data/aotinductor``; it hands the symbolic sizes to ``sympy.sympify``, which evaluates them; it resolves any attribute
of ``torch`` as an operator; it pastes names and guards into code that it executes; and the description of the inputs
can name modules to import. There is no switch for any of it. The hashes of the manifest do not help: whoever made the
artefact made them too.

So :func:`load_program` lists what may be there, and refuses the rest before torch sees a byte: known members, raw
weights, sizes and guards made of arithmetic, names that are names, operators that compute. What passed is packed anew,
in memory, so that torch reads what was checked and not what another reading of the same zip might find. This narrows
what a foreign file can do; it does not make torch's loader a sandbox. With a class of your own,
``load_subnet(path, make_model)``, no program is read at all.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import math
import os
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from oto._torch import OpOverload
from oto.errors import ArtefactError, out_of_memory, some

_MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json"
    r"|data/sample_inputs/model\.pt|data/(weights/(model_weights_config\.json|weight_\d+)"
    r"|constants/(model_constants_config\.json|tensor_\d+))"
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Of the module operator; all of math and torch.sym_* besides.
_ARITHMETIC = _words("""
    add sub mul truediv floordiv mod pow neg pos abs lshift rshift and_ or_ not_ eq ne lt le gt ge getitem
""")
# Operators that run a part of the same graph.
_HIGHER_ORDER = _words("""
    cond while_loop scan map_impl associative_scan wrap invoke_subgraph tag_activation_checkpoint
    wrap_with_set_grad_enabled wrap_with_autocast flex_attention auto_functionalized auto_functionalized_v2
""")
# Registered by torch itself, and meant for something else than computing with tensors: files, processes, compilers.
_NO_OPERATORS = _words("""
    profiler debugprims debug_mode_ops inductor inductor_prims export prim coor mempool streams image
    c10d c10d_functional symm_mem fsdp rpc static_runtime
""")
_NO_FILES = {"aten.from_file"}

# What torch writes into sizes and guards: sympy's classes and its own.
_FUNCTIONS = _words("""
    Symbol Integer Float Rational Add Mul Pow Mod Max Min Abs And Or Not Eq Ne Lt Le Gt Ge Piecewise floor ceiling
    Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan
    FloorDiv ModularIndexing Where PythonMod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural FloatPow
    FloatTrueDiv IntTrueDiv IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat
    Identity max min abs int float bool
""")
_READ = _words("size stride storage_offset shape ndim dim inf isnan pi e floor ceil trunc sqrt")  # of a tensor, of math
_SYMBOLIC = _words("sym_max sym_min sym_float sym_int sym_not sym_ite sym_sum")  # of torch
_GRAMMAR = (
    *(ast.Expression, ast.Load, ast.Constant, ast.Name, ast.Call, ast.keyword, ast.Attribute, ast.Subscript, ast.Tuple),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)


def save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Save a program; its example inputs are not kept.

    The file is made in memory, where it takes as much as the weights, and no more than it takes to read it back. torch
    writes the end of a zip in a destructor, and where the disk is full by then, that ends the process.

    Raises:
        ArtefactError: It cannot be written down, or something in it could only be pickled.
        OSError: The file cannot be written.
    """
    given = program.example_inputs
    program.example_inputs = None
    packed = io.BytesIO()
    try:
        with _quietly():
            torch.export.save(program, packed)
    except Exception as failure:
        if out_of_memory(failure):
            raise
        raise ArtefactError(
            f"torch.export cannot save the program: {type(failure).__name__}: {_line(failure)}\n"
            "  effect  there is no model.pt2\n  to fix  load with your class: load_subnet(path, make_model)"
        ) from failure
    finally:
        program.example_inputs = given
    path.write_bytes(packed.getbuffer())
    packed.close()
    _checked(path)


def load_program(path: Path) -> torch.export.ExportedProgram:
    """Load a program.

    Raises:
        ArtefactError: The file is no program, or holds something that could run code while it is loaded.
    """
    members = _checked(path)
    graph = members["models/model.json"]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(f"model/{name}", content)
    members.clear()  # one copy of the weights is enough
    packed.seek(0)
    try:
        with _quietly():
            return torch.export.load(packed)
    except Exception as failure:
        if out_of_memory(failure):
            raise
        why = f"{type(failure).__name__}: {_line(failure)}"
        if foreign := _foreign_types(graph):  # torch only says so in its log
            why += f"\n  likely  nothing imported so far defines {some(sorted(foreign))}: import it, then load again"
        raise _no_program(path, why) from failure


def _foreign_types(graph: bytes) -> set[str]:
    """Types that inputs or outputs are nested in, besides those of Python and torch."""
    found: set[str] = set()

    def visit(spec: Mapping[str, Any]) -> None:
        if spec["type"] and not spec["type"].startswith(("builtins.", "collections.", "torch.")):
            found.add(spec["type"])
        for child in spec["children_spec"]:
            visit(child)

    with suppress(KeyError, TypeError, AttributeError, IndexError, ValueError):  # only to explain a failure
        for entry in json.loads(graph)["graph_module"]["module_call_graph"]:
            for which in ("in_spec", "out_spec"):
                if text := (entry.get("signature") or {}).get(which):
                    visit(json.loads(text)[1])
    return found


@contextmanager
def _quietly() -> Iterator[None]:
    """torch.export logs and warns about perfectly good archives."""
    levels = {name: logging.getLogger(name).level for name in ("torch.export", "torch._export")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


class _Refusal(Exception):
    """What is wrong with an archive; the part of it at fault comes first."""


def _checked(path: Path) -> dict[str, bytes]:
    """The members of an archive by name, if there is nothing but what a plain program needs.

    Raises:
        ArtefactError: There is.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive)
        for where, check in _JSON.items():
            content = json.loads(members[where])
            check(where, content)
            members[where] = json.dumps(content).encode()  # as it was understood here
    except _Refusal as refusal:
        raise ArtefactError(
            f"{path}: {refusal}\n"
            "  effect  loading it could run code that came with the file, so the program is not used\n"
            "  to fix  use model.safetensors with your class: load_subnet(path, make_model)"
        ) from None
    except KeyError as failure:
        raise _no_program(path, f"{failure.args[0]} is missing") from None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, struct.error, ValueError, TypeError,
            AttributeError, IndexError) as failure:  # fmt: skip
        raise _no_program(path, _line(failure)) from failure
    return members


def _members(archive: zipfile.ZipFile) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    room = os.fstat(archive.fp.fileno()).st_size if archive.fp is not None else 0
    for info in archive.infolist():
        room -= info.file_size
        if room < 0:  # members that share their bytes, or claim what is not there
            raise _Refusal(f"{info.filename} and those before it hold more than the file")
        name = info.filename.partition("/")[2]
        if not _MEMBERS.fullmatch(name):
            raise _Refusal(f"{info.filename!r} is no part of a plain program; it may be pickled or machine code")
        if name in found:
            raise _Refusal(f"{info.filename} is there twice")
        if info.compress_type != zipfile.ZIP_STORED:
            raise _Refusal(f"{info.filename} is compressed, which torch does not do")
        if name == "data/sample_inputs/model.pt" and info.file_size:
            raise _Refusal(f"{info.filename} is pickled")
        found[name] = archive.read(info)
    return found


def _check_index(where: str, index: Mapping[str, Any]) -> None:
    for name, entry in index["config"].items():
        _check_path(where, name)
        if entry["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
            raise _Refusal(f"{where}: {name} is pickled")


def _check_json(where: str, tree: Any, key: str = "") -> None:
    """Look at every string that torch evaluates, resolves, imports or pastes into code."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name in ("as_custom_obj", "custom_obj"):
                raise _Refusal(f"{where}: it holds a custom object, which is pickled")
            if key in ("as_string_to_argument", "range_constraints"):
                _check_name(where, name)
            _check_json(where, value, name)
        return
    if isinstance(tree, list):
        for value in tree:
            _check_json(where, value, key)
        return
    if isinstance(tree, str) and key in _TEXT:
        _TEXT[key](where, tree)


def _check_name(where: str, name: str) -> None:
    if name and not (name.isidentifier() and name.isascii()):
        raise _Refusal(f"{where}: {name!r} is no name")


def _check_path(where: str, path: str) -> None:
    """A path such as ``layers.0.weight``; torch puts odd ones between double quotes."""
    if re.search(r"[\"'\\{}]", path) or not path.isprintable():
        raise _Refusal(f"{where}: {path!r} is no name of a parameter")


def _check_operator(where: str, target: str) -> None:
    home, _, name = target.rpartition(".")
    if (home, name.partition("_")[0]) == ("torch", "sym") or (home == "_operator" and name in _ARITHMETIC):
        return
    if home == "math" and not name.startswith("_") and hasattr(math, name):
        return
    parts = target.split(".")
    if parts[:3] == ["torch", "ops", "higher_order"] and len(parts) == 4 and parts[3] in _HIGHER_ORDER:
        return
    if parts[:2] == ["torch", "ops"] and len(parts) == 5:
        space, operation, overload = parts[2:]
        if not space.startswith("_") and space not in _NO_OPERATORS and f"{space}.{operation}" not in _NO_FILES:
            found = getattr(getattr(getattr(torch.ops, space), operation, None), overload, None)
            if isinstance(found, OpOverload):
                return
            if found is None and re.fullmatch(r"\w+", space + operation + overload):
                raise _Refusal(f"{where}: nobody registered the operator {target!r}; import what defines it first")
    raise _Refusal(f"{where}: {target!r} is no operator that only computes")


def _check_expression(where: str, text: str) -> None:
    """Arithmetic on sizes: ``Mul(Integer(2), Symbol('s0', positive=True))``, ``L['x'].size()[0] <= 8``."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as failure:
        raise _Refusal(f"{where}: {_cut(text)} is no expression") from failure
    for node in ast.walk(tree):
        fine = isinstance(node, _GRAMMAR)
        if isinstance(node, ast.Call):
            called = node.func
            fine = (isinstance(called, ast.Name) and called.id in _FUNCTIONS) or isinstance(called, ast.Attribute)
        elif isinstance(node, ast.Attribute):
            symbolic = isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr in _SYMBOLIC
            fine = node.attr in _READ or symbolic
        elif isinstance(node, ast.Name):
            fine = not node.id.startswith("__")
        elif isinstance(node, ast.Constant):
            plain = node.value is None or isinstance(node.value, bool | int | float)
            fine = plain or (isinstance(node.value, str) and bool(re.fullmatch(r"[\w.+-]*", node.value)))
        if not fine:
            raise _Refusal(f"{where}: {_cut(text)} is no arithmetic on sizes")


def _check_spec(where: str, text: str, arguments: bool = False) -> None:
    """How inputs or outputs are nested. Enums and default dicts name modules that torch would import."""
    if not text:
        return

    def check(spec: Mapping[str, Any]) -> None:
        if spec["type"] is not None and "defaultdict" in spec["type"]:
            raise _Refusal(f"{where}: it holds a defaultdict, which names a module to import")
        if spec["context"] is not None and "__enum__" in json.dumps(_unfolded(spec["context"])):
            raise _Refusal(f"{where}: it holds an enum, which names a module to import")
        for child in spec["children_spec"]:
            check(child)

    outer = json.loads(text)[1]
    check(outer)
    if arguments:  # the names of keyword arguments become parameters of a function
        for child in outer["children_spec"]:
            for name in _names_in(child["context"]):
                _check_name(where, name)


def _unfolded(context: Any) -> Any:
    """A context is JSON inside JSON; escapes must not hide what it says."""
    try:
        return json.loads(context) if isinstance(context, str) else context
    except ValueError:
        return context


def _names_in(context: Any) -> list[str]:
    names = _unfolded(context)
    return [n for n in names if isinstance(n, str)] if isinstance(names, list) else []


_JSON: dict[str, Callable[[str, Any], None]] = {
    "data/weights/model_weights_config.json": _check_index,
    "data/constants/model_constants_config.json": _check_index,
    "models/model.json": _check_json,
}
_TEXT: dict[str, Callable[[str, str], None]] = {
    "name": _check_name,
    "as_name": _check_name,
    "user_input_name": _check_name,
    "forward_arg_names": _check_name,
    "field_names": _check_name,
    "parameter_name": _check_path,
    "buffer_name": _check_path,
    "buffer_to_mutate": _check_path,
    "parameter_to_mutate": _check_path,
    "tensor_constant_name": _check_path,
    "fqn": _check_path,
    "target": _check_operator,
    "as_operator": _check_operator,
    "expr_str": _check_expression,
    "guards_code": _check_expression,
    "in_spec": lambda where, text: _check_spec(where, text, arguments=True),
    "out_spec": _check_spec,
}


def _no_program(path: Path, why: str) -> ArtefactError:
    return ArtefactError(
        f"{path} is no exported program that this version reads: {why}\n"
        "  effect  it is not loaded\n"
        "  to fix  write the artefact again, or load with your class: load_subnet(path, make_model)"
    )


def _line(failure: BaseException) -> str:
    return _cut((str(failure).strip().splitlines() or [type(failure).__name__])[0])


def _cut(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
