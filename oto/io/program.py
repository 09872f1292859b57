"""Exported programs on disk, without pickle; loading one runs no code that came with the file.

Torch 2.15 writes a ``.pt2`` as an uncompressed zip with the graph as JSON (``models/model.json``), weights and
constants as raw bytes with a JSON index each, and the example inputs. Only the example inputs are always pickled;
they are dropped. Tensor subclasses and script objects among the weights can only be pickled; they are refused.

``torch.export.load`` is not safe for archives from others. It unpickles with ``weights_only=False`` whatever the index
calls pickled (``opaque_obj_*`` with plain ``pickle.loads``), example inputs that ``weights_only=True`` refused, and the
``.pt`` files of older layouts; it opens the shared libraries under ``data/aotinductor``; it passes the symbolic sizes
to ``sympy.sympify``, which evaluates them; it resolves any attribute of ``torch`` as an operator; it pastes names and
guards into code that it executes; and the description of the inputs can name modules to import. None of this can be
switched off. The hashes of the manifest do not help: whoever made the artifact made them too.

So :func:`load_program` has a list of what is allowed, and refuses everything else before torch sees a byte: known
members, raw weights, sizes and guards made of arithmetic whose results stay small, names that are identifiers,
operators that take and return tensors. The accepted content is packed again, in memory and without the records of where
nodes came from, so that torch reads what was checked and not what a different reading of the same zip might find. This
narrows what a foreign file can do; it does not make torch's loader a sandbox. With a class of your own,
``load_subnet(path, make_model)``, no program is read at all.
"""

from __future__ import annotations

import ast
import io
import json
import keyword
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
from oto.errors import ArtifactError, reraise_out_of_memory, some
from oto.io.manifest import parse

_MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json"
    r"|data/sample_inputs/model\.pt|data/(weights/(model_weights_config\.json|weight_\d+)"
    r"|constants/(model_constants_config\.json|tensor_\d+))"
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Functions of the module operator.
_ARITHMETIC = _words("""
    add sub mul truediv floordiv mod pow neg pos abs lshift rshift and_ or_ not_ eq ne lt le gt ge getitem
""")
# Functions of the module math whose time does not grow with the number.
_MATH = _words("""
    ceil floor trunc sqrt cbrt fabs fmod remainder exp exp2 expm1 log log1p log2 log10 pow sin cos tan asin acos atan
    atan2 sinh cosh tanh asinh acosh atanh erf erfc hypot copysign degrees radians isnan isinf isfinite
""")
# Operators that run a subgraph.
_HIGHER_ORDER = _words("""
    cond while_loop scan map_impl associative_scan wrap invoke_subgraph tag_activation_checkpoint
    wrap_with_set_grad_enabled wrap_with_autocast flex_attention auto_functionalized auto_functionalized_v2
""")
# Namespaces that torch registers, but not to compute with tensors: files, processes, compilers.
_NO_OPERATORS = _words("""
    profiler debugprims debug_mode_ops inductor inductor_prims export prim coor mempool streams image
    c10d c10d_functional symm_mem fsdp rpc static_runtime
""")
# Operators on dtypes, and assertions, which return nothing.
_ON_DTYPES = _words("promote_types result_type can_cast")
_ASSERTIONS = _words("""
    _assert_scalar _assert_async _assert_tensor_metadata sym_constrain_range sym_constrain_range_for_size
    _linalg_check_errors
""")
_TAKEN = _words("""
    TensorType IntType FloatType BoolType NumberType ComplexType SymIntType SymBoolType SymFloatType StringType
    DeviceObjType GeneratorType ScalarTypeType LayoutType MemoryFormatType
""")
_GIVEN = _words("TensorType IntType FloatType BoolType NumberType SymIntType SymBoolType SymFloatType")
MOST_NODES = 2**16  # of a graph; torch takes a millisecond for each
MOST_BRACKETS = 2**23  # lists and objects in the JSON of a graph
MOST_BITS = 2**16  # of a number computed from sizes
LONGEST_EXPRESSION = 2**16  # characters

# Functions that torch writes into sizes and guards: sympy's classes and its own.
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
    """Save a program without its example inputs.

    The file is made in memory, which takes as much as the weights, no more than reading it back. If torch wrote to the
    disk, it would write the end of the zip in a destructor, which kills the process if the disk is full.

    Raises:
        ArtifactError: The program cannot be serialized, or something in it could only be pickled.
        OSError: The file cannot be written.
    """
    given = program.example_inputs
    program.example_inputs = None
    packed = io.BytesIO()
    try:
        with _quietly():
            torch.export.save(program, packed)
    except Exception as failure:
        reraise_out_of_memory(failure)
        raise ArtifactError(
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
        ArtifactError: The file is not a program, or holds something that could run code when it is loaded.
    """
    members = _checked(path)
    graph = members["models/model.json"]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(f"model/{name}", content)
    members.clear()  # free the second copy of the weights
    packed.seek(0)
    try:
        with _quietly():
            return torch.export.load(packed)
    except Exception as failure:
        reraise_out_of_memory(failure)
        why = f"{type(failure).__name__}: {_line(failure)}"
        if foreign := _foreign_types(graph):  # torch reports it only in its log
            why += f"\n  likely  nothing imported so far defines {some(sorted(foreign))}: import it, then load again"
        raise _no_program(path, why) from failure


def _foreign_types(graph: bytes) -> set[str]:
    """Container types of inputs or outputs that are not from Python or torch."""
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
    """Context manager that silences logs and warnings of torch.export, which warns even about valid archives."""
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
    """What is wrong with an archive; the message begins with the part at fault."""


def _checked(path: Path) -> dict[str, bytes]:
    """The members of an archive by name, if it holds only what a plain program needs.

    Raises:
        ArtifactError: The archive holds something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive)
        for where, check in _JSON.items():
            content = parse(members[where], MOST_BRACKETS)
            check(where, content)
            members[where] = json.dumps(content).encode()  # exactly what was parsed and checked here
    except _Refusal as refusal:
        raise ArtifactError(
            f"{path}: {refusal}\n"
            "  effect  loading it could run code that came with the file, so the program is not used\n"
            "  to fix  use model.safetensors with your class: load_subnet(path, make_model)"
        ) from None
    except KeyError as failure:
        raise _no_program(path, f"{failure.args[0]} is missing") from None
    except (
        zipfile.BadZipFile,
        EOFError,
        NotImplementedError,
        RuntimeError,
        struct.error,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
    ) as failure:
        raise _no_program(path, _line(failure)) from failure
    return members


def _members(archive: zipfile.ZipFile) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    room = os.fstat(archive.fp.fileno()).st_size if archive.fp is not None else 0
    for info in archive.infolist():
        room -= info.file_size
        if room < 0:  # members overlap, or claim more bytes than there are
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
    """Check every string that torch evaluates, resolves, imports or pastes into code."""
    if isinstance(tree, dict):
        if isinstance(nodes := tree.get("nodes"), list):
            _check_nodes(where, nodes)
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
    if isinstance(tree, int) and abs(tree) > 2**64:
        raise _Refusal(f"{where}: {key} is a number of {tree.bit_length()} bits")


def _check_nodes(where: str, nodes: list[Any]) -> None:
    """Check a graph: not too many nodes, distinct names, numbers that stay small. Records of origins are removed."""
    if len(nodes) > MOST_NODES:
        raise _Refusal(f"{where}: it has {len(nodes):,} nodes, and may have {MOST_NODES:,}")
    bits: dict[str, float] = {}
    for node in nodes:
        node["metadata"] = {}
        home, _, name = node["target"].rpartition(".")
        given = [list(_numbers_in(x["arg"], bits)) for x in node["inputs"]]
        made: float = 64
        if home == "_operator" and name != "getitem" and not all(_is_single(x["arg"]) for x in node["inputs"]):
            raise _Refusal(f"{where}: {node['target']} takes a list or a text, which it would repeat")
        if given and home in ("_operator", "torch"):
            made = _grown(name, [max(x, default=1) for x in given], _literal(node["inputs"][-1:]))
        if made > MOST_BITS:
            raise _Refusal(f"{where}: {node['target']} makes a number that may have more than {MOST_BITS:,} bits")
        for output in _names_of(node["outputs"]):
            if output in bits:
                raise _Refusal(f"{where}: two nodes are called {output!r}")
            bits[output] = made


def _numbers_in(argument: Any, bits: Mapping[str, float]) -> Iterator[float]:
    """The number of bits of each number in an argument."""
    if isinstance(argument, dict):
        for name, value in argument.items():
            yield from [bits.get(value, 64)] if name == "as_name" else _numbers_in(value, bits)
    elif isinstance(argument, list):
        for item in argument:
            yield from _numbers_in(item, bits)
    elif isinstance(argument, int):
        yield argument.bit_length()


def _is_single(argument: Any) -> bool:
    """Whether an argument is one number or one tensor."""
    return not any(isinstance(value, list) or kind == "as_string" for kind, value in argument.items())


def _names_of(outputs: Any) -> Iterator[str]:
    if isinstance(outputs, dict):
        for name, value in outputs.items():
            if name in ("name", "as_name") and isinstance(value, str):
                yield value
            else:
                yield from _names_of(value)
    elif isinstance(outputs, list):
        for item in outputs:
            yield from _names_of(item)


def _literal(inputs: list[Any]) -> float | None:
    """The number of an argument that is a literal."""
    argument = inputs[0]["arg"] if inputs else None
    while isinstance(argument, dict) and len(argument) == 1:
        (argument,) = argument.values()
    return argument if isinstance(argument, int | float) else None


_SUMS, _PRODUCTS = _words("add sub sum sym_sum Add"), _words("mul Mul")
_POWERS, _SHIFTS = _words("pow Pow PowByNatural FloatPow RoundDecimal"), _words("lshift LShift")


def _grown(name: str, bits: list[float], by: float | None) -> float:
    """How many bits a result may have.

    Args:
        bits: The bits of the arguments.
        by: The last argument, if it is known.
    """
    if name in _PRODUCTS:
        return sum(bits)
    if name in _SUMS:
        return max(bits, default=0) + len(bits)
    if name in _POWERS:
        return math.inf if by is None or not abs(by) <= 64 else bits[0] * max(abs(by), 1)
    if name in _SHIFTS:
        return math.inf if by is None or not 0 <= by <= 64 else bits[0] + by
    return max(bits, default=0) + 1


def _check_name(where: str, name: str) -> None:
    if name and (not (name.isidentifier() and name.isascii()) or keyword.iskeyword(name)):
        raise _Refusal(f"{where}: {name!r} is no name")


def _check_path(where: str, path: str) -> None:
    """A path such as ``layers.0.weight``; torch puts odd ones between double quotes."""
    if re.search(r"[\"'\\{}]", path) or not path.isprintable():
        raise _Refusal(f"{where}: {path!r} is no name of a parameter")


def _check_operator(where: str, target: str) -> None:
    home, _, name = target.rpartition(".")
    if (home, name.partition("_")[0]) == ("torch", "sym") or (home == "_operator" and name in _ARITHMETIC):
        return
    if home == "math" and name in _MATH:
        return
    parts = target.split(".")
    if parts[:3] == ["torch", "ops", "higher_order"] and len(parts) == 4 and parts[3] in _HIGHER_ORDER:
        return
    if parts[:2] == ["torch", "ops"] and len(parts) == 5:
        space, operation, overload = parts[2:]
        if not space.startswith("_") and space not in _NO_OPERATORS and space.isidentifier():
            found = getattr(getattr(getattr(torch.ops, space), operation, None), overload, None)
            if isinstance(found, OpOverload) and _computes(found):
                return
            if found is None and re.fullmatch(r"\w+", space + operation + overload):
                raise _Refusal(f"{where}: the operator {target!r} is not registered; import what defines it first")
    raise _Refusal(f"{where}: {target!r} is no operator that only computes")


def _computes(op: OpOverload) -> bool:
    """Whether an operator takes tensors, or the shape of a new one, and returns tensors, or numbers read from them.

    An operator that returns nothing, or takes neither, has side effects: it sets a mode or a seed, prints, or writes.
    """
    schema: Any = op._schema
    if op.namespace == "aten" and op._opname in _ON_DTYPES | _ASSERTIONS:
        return True
    if not schema.returns:
        return False
    takes = [_kind(argument.type) for argument in schema.arguments]
    gives = [_kind(result.type) for result in schema.returns]
    if not (_TAKEN.issuperset(takes) and _GIVEN.issuperset(gives)):
        return False
    if "TensorType" in takes:
        return True
    # a new tensor is made from numbers; a string argument could be the name of a file
    return "DeviceObjType" in takes and "StringType" not in takes and set(gives) == {"TensorType"}


def _kind(type_: Any) -> str:
    """The type of an argument, or of the items if it is a list."""
    while type_.kind() in ("OptionalType", "ListType"):
        type_ = type_.getElementType()
    return str(type_.kind())


def _check_expression(where: str, text: str) -> None:
    """Check arithmetic on sizes: ``Mul(Integer(2), Symbol('s0', positive=True))``, ``L['x'].size()[0] <= 8``."""
    try:
        if len(text) > LONGEST_EXPRESSION:
            raise ValueError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text, mode="eval")
        bits = _bits(tree.body)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as failure:
        raise _Refusal(f"{where}: {_cut(text)} is no expression") from failure
    texts = _texts_in(tree)
    for node in ast.walk(tree):
        fine = isinstance(node, _GRAMMAR)
        if isinstance(node, ast.Call):
            called = node.func
            fine = isinstance(called, ast.Attribute)
            if isinstance(called, ast.Name):
                fine = called.id in _FUNCTIONS and all(_is_number(x, called.id == "Piecewise") for x in node.args)
                fine = fine and (called.id != "Float" or len(node.args) == 1)  # a second argument is a precision
        elif isinstance(node, ast.keyword):  # assumptions on a symbol; the bits of a Float
            fine = isinstance(node.value, ast.Constant) and node.value.value in (True, False, None, *range(64))
        elif isinstance(node, ast.BinOp):
            fine = _is_number(node.left) and _is_number(node.right) and not texts & {node.left, node.right}
        elif isinstance(node, ast.Attribute):
            symbolic = isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr in _SYMBOLIC
            fine = node.attr in _READ or symbolic
        elif isinstance(node, ast.Name):
            fine = not node.id.startswith("__")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            fine = node in texts
        elif isinstance(node, ast.Constant):
            fine = node.value is None or isinstance(node.value, bool | int | float)
        if not fine:
            raise _Refusal(f"{where}: {_cut(text)} is no arithmetic on sizes")
    if bits > MOST_BITS:
        raise _Refusal(f"{where}: {_cut(text)} may come to a number of more than {MOST_BITS:,} bits")


_SYMBOL, _DIGITS = re.compile(r"[a-zA-Z]\w*", re.ASCII), re.compile(r"[+-]?[0-9.]+(e[+-]?[0-9]{1,3})?", re.ASCII)
_KEY = re.compile(r"[\w.+-]*")


def _texts_in(tree: ast.AST) -> set[ast.AST]:
    """Strings in allowed places: names of symbols, digits of numbers, keys of inputs and what they are compared to."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            plain, inner = _SYMBOL if node.func.id == "Symbol" else _DIGITS, node.args
        elif isinstance(node, ast.Subscript):
            plain, inner = _KEY, [node.slice]
        elif isinstance(node, ast.Compare):
            plain, inner = _KEY, [node.left, *node.comparators]
        else:
            continue
        for x in inner:
            if isinstance(x, ast.Constant) and isinstance(x.value, str) and plain.fullmatch(x.value):
                found.add(x)
    return found


def _is_number(node: ast.expr, nested: bool = False) -> bool:
    """Whether arithmetic on a part of an expression is allowed; not on a tuple, which a product would repeat.

    Args:
        nested: Whether tuples are allowed as arguments.
    """
    if isinstance(node, ast.Tuple):
        return nested
    called = node.func if isinstance(node, ast.Call) and not node.args else node
    return not (isinstance(called, ast.Attribute) and called.attr in ("size", "stride", "shape"))


_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Pow: "pow",
    ast.LShift: "lshift",
}


def _bits(node: ast.expr) -> float:
    """How many bits the value of an expression may have; nothing is evaluated."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return 4 * len(node.value)  # digits, or the name of a symbol, which has no more than 64
        if isinstance(node.value, float):
            return max(math.frexp(node.value)[1], 1)
        return node.value.bit_length() if isinstance(node.value, int) else 1
    if isinstance(node, ast.BinOp):
        name, inner = _OPERATORS.get(type(node.op), ""), [node.left, node.right]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name, inner = node.func.id, node.args
    else:
        name, inner = "", [x for x in ast.iter_child_nodes(node) if isinstance(x, ast.expr)]
    return max(64, _grown(name, [_bits(x) for x in inner], _value(inner[-1]) if inner else None))


_NUMBERS = ("Integer", "Float", "Rational")


def _value(node: ast.expr) -> float | None:
    """The value of a literal number, or its magnitude if it is a fraction."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _value(node.operand)
        return None if inner is None else -inner
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _NUMBERS and node.args:
        return _value(node.args[0])
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return float(node.value) if re.fullmatch(r"-?[\d.]{1,20}", node.value) else None
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, int | float) else None


def _check_spec(where: str, text: str, arguments: bool = False) -> None:
    """Check how inputs or outputs are nested; enums and default dicts name modules that torch would import."""
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
    """The decoded value of a context, which is JSON inside JSON, so that escapes cannot hide what it contains."""
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


def _no_program(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"{path} is no exported program that this version reads: {why}\n"
        "  effect  it is not loaded\n"
        "  to fix  write the artifact again, or load with your class: load_subnet(path, make_model)"
    )


def _line(failure: BaseException) -> str:
    return _cut((str(failure).strip().splitlines() or [type(failure).__name__])[0])


def _cut(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
