"""Whoever can write a folder can seal any manifest: loading one runs nothing, and changes nothing of the process."""

from __future__ import annotations

import ast
import collections
import enum
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oto import OTO, load_subnet
from oto.errors import DamagedArtifactError, printable
from oto.io import manifest as listed
from oto.io import program

from ..slim import toy
from .forging import Kind, accepted, edit_graph, forged, node, nodes, sealed

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
CANARY = "it_ran"


class Mode(enum.Enum):
    ONE = 1


class Shape:
    def __init__(self) -> None:
        self.heads = 2


def decorated(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def forward(self: nn.Module, *args: Any) -> Any:
        return method(self, *args)

    return forward


class Own(nn.Module):
    """Whose slim form needs every kind of edit; and that holds what belongs to the process: an enum, a function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.qkv = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 24)
        self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
        self.shape, self.mode, self.act, self.table = Shape(), Mode.ONE, F.gelu, {"k": [1, 2]}

    @decorated
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.stem(x))
        q, k, v = self.qkv(h).view(*h.shape[:2], 3, self.shape.heads, -1).permute(2, 0, 3, 1, 4)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2))
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-3)
        return self.head(h)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).relu())


def _own(out: Path) -> Kind:
    model, given = Own(), torch.randn(2, 5, 3)
    oto = OTO(model, given)
    oto.random_set_zero_groups(0.5)
    oto.construct_subnet(out)
    return Kind(out, model, given, (Mode, Own, Shape, F, sys.modules[__name__]))


def _rounds(out: Path) -> Kind:
    model = given = Plain()
    for share in (0.3, 0.3):
        oto = OTO(given, X, allow_graph=True)
        oto.random_set_zero_groups(share)
        given = oto.construct_subnet(out, emitter="module").model
    return Kind(out, model, X, (Plain,))


def _config(out: Path) -> Kind:
    model = toy.Net(toy.config())
    given = torch.tensor([[0, 1, 2]])
    oto = OTO(model, given, layout="uniform")
    oto.random_set_zero_groups(0.5)
    oto.construct_subnet(out)
    return Kind(out, model, given, (toy, toy.Config, toy.Net))


def _program(emitter: str) -> Callable[[Path], Kind]:
    def make(out: Path) -> Kind:
        oto = OTO(Plain(), X, allow_graph=True)
        oto.random_set_zero_groups(0.5)
        oto.construct_subnet(out, emitter=emitter, program=True)
        return Kind(out, None, X)

    return make


def _llama(out: Path) -> Kind:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    given = torch.randint(0, 50, (1, 6))
    oto = OTO(model, given, layout="uniform")
    oto.random_set_zero_groups(0.5)
    oto.construct_subnet(out)
    return Kind(out, model, given, tuple(sys.modules[kind.__module__] for kind in type(config).__mro__[:-1]))


def _timm(out: Path) -> Kind:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1).eval()
    given = torch.randn(1, 3, 32, 32)
    oto = OTO(model, given, layout="uniform")
    oto.random_set_zero_groups(0.3)
    oto.construct_subnet(out)
    return Kind(out, model, given, (timm.layers.format, timm.layers.format.Format))


MAKERS: dict[str, Callable[[Path], Kind]] = {
    "own": _own,
    "rounds": _rounds,
    "config": _config,
    "graph": _program("graph"),
    "recording": _program("recording"),
}
OTHERS = {"transformers": _llama, "timm": _timm}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Kind]]:
    folder = tmp_path_factory.mktemp("forged")

    @functools.cache
    def kind(name: str) -> Kind:
        torch.manual_seed(0)
        made = {**MAKERS, **OTHERS}[name](folder / name)
        assert accepted(made), f"the honest {name} is refused"  # and what is imported late, is there now
        return made

    yield kind
    shutil.rmtree(folder)


def test_the_artifacts_have_every_kind_of_edit(kinds: Any) -> None:
    """Else what is forged of them says little."""
    made = [json.loads((kinds(name).folder / "oto.json").read_text()) for name in MAKERS]
    assert [m["emitter"] for m in made] == ["module", "module", "config", "graph", "recording"]
    found = {name for m in made for name, edits in m["edits"].items() if edits}
    assert found == {"attributes", "swaps", "stated", "told", "config"} and made[1]["earlier"]


def fuzz(kinds: Callable[[str], Kind], names: list[str], folder: Path, seeds: range) -> collections.Counter[Any]:
    counts: collections.Counter[Any] = collections.Counter()
    for seed in seeds:
        name = names[seed % len(names)]
        forgery, how = forged(kinds(name), folder / "out", seed)
        try:
            counts[name, how, accepted(forgery)] += 1
        except Exception as failure:
            raise AssertionError(f"seed {seed}: {name}, {how}") from failure
    return counts


def of(counts: collections.Counter[Any], fine: bool) -> int:
    return sum(n for (_, _, loaded), n in counts.items() if loaded is fine)


def test_fifty_forged_artifacts_change_nothing(kinds: Any, tmp_path: Path) -> None:
    counts = fuzz(kinds, list(MAKERS), tmp_path, range(50))
    assert of(counts, True) >= 5 and of(counts, False) >= 5, counts


@pytest.mark.zoo
def test_a_thousand_forged_artifacts_change_nothing(kinds: Any, tmp_path: Path) -> None:
    counts = fuzz(kinds, [*MAKERS, *OTHERS], tmp_path, range(1000, 2000))
    assert of(counts, True) >= 100 and of(counts, False) >= 100, counts


# --- case by case -----------------------------------------------------------------------------------------------------

Change = Callable[[Path, dict[str, Any]], Any]


def stated(path: str, key: Any, value: Any) -> Change:
    return lambda at, m: m["edits"]["stated"].update({path: [[key, value]]})


def attributes(path: str, **values: Any) -> Change:
    return lambda at, m: m["edits"]["attributes"].setdefault(path, {}).update(values)


def swap(kind: str, **arguments: Any) -> Change:
    return lambda at, m: m["edits"]["swaps"].update({"norm": {"class": kind, "arguments": arguments}})


def heads(**arguments: Any) -> Change:
    plain = {"embed_dim": 4, "kdim": 4, "vdim": 4, "out_dim": 4, "scale": 1, "heads": [0], "full_heads": 1}
    return swap("MultiheadAttention", **{**plain, **arguments})


def edits(**values: Any) -> Change:
    return lambda at, m: m["edits"].update(values)


def says(**values: Any) -> Change:
    return lambda at, m: m.update(values)


def told(*hows: Any, site: str = "forward: x", name: str = "linear") -> Change:
    return edits(told={"": {site: {name: list(hows)}}})


def endless() -> Any:
    rest: Any = 1
    for _ in range(400):
        rest = {"op": ["add", "Tensor"], "args": [rest]}
    return rest


ROUND = {"edits": {}, "shapes": {}, "kept": {}}
STATED = {
    "a decorated forward": stated("", ["forward", "__wrapped__"], 3),
    "an enum": stated("", ["mode", "_value_"], 99),
    "a function": stated("", ["act", "__doc__"], 3),
    "a class": stated("stem", ["__class__"], 3),
    "a method of a class": stated("stem", ["__class__", "forward"], 3),
    "a dictionary": stated("stem", ["__dict__", "in_features"], 3),
    "globals": stated("stem", ["__init__", "__globals__"], 3),
    "forward": stated("stem", ["forward"], 3),
    "a weight": stated("stem", ["weight"], 3),
    "modules": stated("", ["_modules", "stem"], 3),
    "hooks": stated("", ["_forward_hooks", "x"], 3),
    "a flag": stated("", ["training"], 3),
    "what is not there": stated("", ["shape", "brand_new"], 3),
    "a place that is none": stated("", ["table", "k", -1], 3),
    "a text": stated("", ["shape", "heads"], "x"),
    "a fraction": stated("", ["shape", "heads"], 0.5),
    "too much": stated("", ["shape", "heads"], 2**40),
    "nothing": stated("", [], 3),
    "of no module": stated("mode", ["_value_"], 3),
}
ATTRIBUTES = {
    "forward": attributes("stem", forward=3),
    "a class": attributes("stem", __class__=3),
    "a dictionary": attributes("stem", __dict__={"x": 1}),
    "hooks": attributes("stem", _forward_hooks={"x": "y"}),
    "the origin": attributes("", _oto_origin=3),
    "train": attributes("", train=3),
    "what is not there": attributes("stem", brand_new={"x": [1]}),
    "a weight": attributes("stem", weight=[1]),
    "of another class": attributes("stem", num_features=3),
    "of the model's own class": attributes("", in_features=3),
    "too much": attributes("stem", out_features=10**6),
    "less than nothing": attributes("stem", out_features=-1),
    "a text": attributes("stem", out_features="4"),
    "of no module": attributes("stem.weight", x=1),
}
SWAPS = {
    "heads of text": heads(num_heads=2 * 10**9, head_dim="xxxx", v_head_dim="x"),
    "heads of lists": heads(num_heads=10**9, head_dim=[0], v_head_dim=[0]),
    "heads that are not there": heads(num_heads=3, head_dim=1, v_head_dim=1, heads=[0, 1, 7], full_heads=4),
    "heads in the place of a norm": heads(num_heads=1, head_dim=4, v_head_dim=4),
    "groups of text": swap("GroupNorm", num_groups=4 * 10**9, width="xx", full=3),
    "groups of less than nothing": swap("GroupNorm", num_groups=-4, width=-1, full=3),
    "a norm of nothing": swap("LayerNorm", normalized_shape=[3], full=[0]),
    "a norm of more than there was": swap("LayerNorm", normalized_shape=[3], full=[2]),
    "a norm of another width": swap("LayerNorm", normalized_shape=[5], full=[8]),
    "a norm of another kind": swap("RMSNorm", normalized_shape=[3], full=[8]),
    "an eps that is none": swap("LayerNorm", normalized_shape=[3], full=[8], eps=float("nan")),
    "an argument that is none": swap("LayerNorm", normalized_shape=[3], full=[8], device="meta"),
    "no arguments": swap("LayerNorm"),
    "another class": swap("functional"),
}
OTHER_EDITS = {
    "dropped: the model": edits(dropped={"": "none"}),
    "dropped: what is no module": edits(dropped={"forward": "none"}),
    "dropped: for something else": edits(dropped={"norm": "os.system"}),
    "told: of terabytes": told({"numbers": [[0, 1]], "of": 10**12}),
    "told: a text": told({"numbers": [[0, "x"]], "of": 1}),
    "told: another operator": told({"rest": {"op": ["fill_", "Scalar"], "args": []}}),
    "told: another overload": told({"rest": {"op": ["add", "__class__"], "args": [1]}}),
    "told: without end": told({"rest": endless()}),
    "told: another function": told({"counted": "os.system"}),
    "told: another key": told({"call": "os.system"}),
    "told: of no module": edits(told={"mode": {}}),
    "untrained: a number": edits(untrained=3),
    "config: without a config": edits(config={"x": 1}),
    "another edit": edits(code="import os"),
}
MANIFESTS = {
    "kept: terabytes": says(kept={"stem.weight": [10**18]}),
    "kept: less than nothing": says(kept={"stem.weight": [-1, -1]}),
    "kept: too large": says(kept={"stem.weight": [10**30]}),
    "kept: lists": says(kept={"stem.weight": [[[[1]]]]}),
    "earlier: too many rounds": says(earlier=[ROUND] * 1000),
    "earlier: text": says(earlier=[{**ROUND, "shapes": {"stem.weight": "xx"}}]),
    "earlier: other edits": says(earlier=[{**ROUND, "edits": {"attributes": {"stem": {"forward": 3}}}}]),
    "earlier: what is no tensor": says(earlier=[{**ROUND, "shapes": {"training": [1]}}]),
    "earlier: terabytes": says(earlier=[{**ROUND, "shapes": {"stem.weight": [10**6, 10**6]}}]),
    "tensors: of no file": lambda at, m: m["tensors"].update(x={"ties": {}, "complex": []}),
    "tensors: shared with nothing": lambda at, m: m["tensors"]["model.safetensors"].update(ties={"stem.weight": "zz"}),
    "tensors: shared with larger ones": lambda at, m: m["tensors"]["model.safetensors"].update(
        ties={"head.bias": "out.bias"}
    ),
    "tensors: not complex": lambda at, m: m["tensors"]["model.safetensors"].update(complex=["stem.weight"]),
    "shapes: of what is no tensor": lambda at, m: m["model"]["full_shapes"].update({"training": []}),
    "files: outside": lambda at, m: m["files"].update({"../x": {"size": 1, "sha256": "0" * 64}}),
    "files: absolute": lambda at, m: m["files"].update({"/etc/passwd": {"size": 1, "sha256": "0" * 64}}),
    "files: as on Windows": lambda at, m: m["files"].update({"..\\x": {"size": 1, "sha256": "0" * 64}}),
    "files: a size that is a text": lambda at, m: m["files"].update({"x": {"size": "x", "sha256": "0" * 64}}),
    "checks: NaN": lambda at, m: m["checks"][0].update(error=float("nan")),
    "notes: a number": says(notes=3),
    "a number of a thousand digits": says(notes=[10**1000]),
    "emitter: a list": says(emitter=[1]),
}
CASES = {
    f"{group}: {name}": change
    for group, cases in {
        "stated": STATED,
        "attributes": ATTRIBUTES,
        "swaps": SWAPS,
        "edits": OTHER_EDITS,
        "manifest": MANIFESTS,
    }.items()
    for name, change in cases.items()
}


@pytest.mark.parametrize("change", CASES.values(), ids=CASES)
def test_what_no_writer_writes_is_refused(kinds: Any, tmp_path: Path, change: Change) -> None:
    own: Kind = kinds("own")
    assert not accepted(Kind(sealed(own.folder, tmp_path / "out", change), own.model, own.given, own.watched))


LOADED = {
    "other weights": lambda at, m: m["tensors"]["model.safetensors"].update(ties={"stem.weight": "head.weight"}),
    "a module dropped": edits(dropped={"norm": "none"}),
    "another width": attributes("stem", out_features=2),
    "another number": stated("", ["shape", "heads"], 7),
    "other notes": says(notes=["\x1b[2J"], why_graph="x"),
    "what no version knows": says(future=[1, {"x": None}]),
}


@pytest.mark.parametrize("change", LOADED.values(), ids=LOADED)
def test_what_only_makes_the_model_wrong_is_loaded(kinds: Any, tmp_path: Path, change: Change) -> None:
    """As SECURITY.md says. The model may fail, or compute something else; nothing else happens."""
    own: Kind = kinds("own")
    folder = sealed(own.folder, tmp_path / "out", change)
    assert accepted(Kind(folder, own.model, own.given, own.watched))


PATHS = {
    "__class__.model_type": 3,
    "__class__.to_dict": 3,
    "__class__": 3,
    "__init__.__globals__.os": 3,
    "to_dict": 3,
    "to_dict.__globals__.EVIL": 3,
    "to_dict.__globals__.__builtins__.EVIL": 3,
    "to_dict.__globals__.copy": 3,
    "to_dict.__func__.__globals__.copy": 3,
    "to_dict.__globals__.copy.copyreg.sys.path.0": 3,
    "__dict__.inner": 3,
    "_private": 3,
    "inner": 17,
    "words": "x",
    "width": 2.5,
    "step": True,
    "depth": 10**7,
    "inner.real": 3,
    "brand.new": 1,
    "": 1,
    ".": 1,
    "inner ": 3,
}


@pytest.mark.parametrize("path", PATHS)
def test_a_config_has_fields_and_nothing_else(kinds: Any, tmp_path: Path, path: str) -> None:
    kind: Kind = kinds("config")
    out = sealed(kind.folder, tmp_path / "out", lambda at, m: m["edits"]["config"].update({path: PATHS[path]}))
    assert not accepted(Kind(out, kind.model, kind.given, kind.watched))


THEIRS = {
    "__class__.model_type": "EVIL",
    "__class__.to_dict": "EVIL",
    "to_dict.__globals__.EVIL": 3,
    "to_dict.__globals__.__builtins__.EVIL": 3,
    "to_dict.__globals__.os.linesep": "EVIL",
    "to_dict.__globals__.os.environ._data": {},
    "_attn_implementation": "evil/kernel",
    "attn_implementation": "evil/kernel",
    "_attn_implementation_internal": "evil/kernel",
    "_experts_implementation": "evil/kernel",
    "auto_map": {"x": "y"},
    "quantization_config": {"quant_method": "bitsandbytes"},
    "_name_or_path": "evil/x",
    "hidden_act": "relu",
    "rope_parameters": {"rope_type": "evil", "rope_theta": 1.0},
    "num_hidden_layers": 10**7,
    "max_position_embeddings": 10**10,
    "num_labels": 10**9,
    "bos_token_id": -1,
    "use_cache": 1,
}


@pytest.mark.zoo
@pytest.mark.parametrize("path", [*THEIRS, "to_dict.__globals__.os.sys.path.0"])
def test_a_config_of_transformers_is_no_way_into_the_process(kinds: Any, tmp_path: Path, path: str) -> None:
    kind: Kind = kinds("transformers")

    def change(at: Path, manifest: dict[str, Any]) -> None:
        manifest["edits"]["config"][path] = THEIRS.get(path, str(at))
        (at / "redis.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / CANARY)!r}).touch()")
        manifest["files"]["redis.py"] = {"size": 0, "sha256": ""}

    out = sealed(kind.folder, tmp_path / "out", change)
    assert not accepted(Kind(out, kind.model, kind.given, kind.watched))
    assert not accepted(Kind(out, kind.model, kind.given, kind.watched)) and not (tmp_path / CANARY).exists()


@pytest.mark.zoo
def test_an_enum_of_timm_is_not_written_to(kinds: Any, tmp_path: Path) -> None:
    kind: Kind = kinds("timm")
    for emitter in ("module", "config"):

        def change(at: Path, m: dict[str, Any], emitter: str = emitter) -> None:
            m["edits"]["stated"]["patch_embed"] = [[["output_fmt", "_value_"], 3]]
            m.update(emitter=emitter)
            if emitter == "module":
                m["edits"]["config"] = {}

        accepted(Kind(sealed(kind.folder, tmp_path / "out", change), kind.model, kind.given, kind.watched))


ON_THE_WAY_IN = {
    "io/manifest.py",
    "io/program.py",
    "slim/config/recipe.py",
    "slim/config/solve.py",
    "slim/copying.py",
    "slim/graph/module.py",
    "slim/graph/program.py",
    "slim/numbers.py",
    "slim/provenance.py",
    "nn/overridden.py",
    "nn/overrides.py",
    "nn/calls.py",
    "nn/untrained.py",
}


PARTLY = {
    "io/artifact.py": {"reading", "_require_whole", "_start", "_read_tensors"},
    "io/subnet.py": {"load_subnet", "rebuild", "_require_same", "_require_thinner"},
    "slim/edits.py": {"slim_copy", "edited", "attribute", "module_at", "_swapped", "_set_sizes"},
}


def test_nothing_on_the_way_in_stands_on_an_assertion() -> None:
    """``python -O`` leaves them out."""
    home = Path(listed.__file__).parents[1]
    for name in ON_THE_WAY_IN:
        tree = ast.parse((home / name).read_text())
        assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)], name
    for name, functions in PARTLY.items():
        tree = ast.parse((home / name).read_text())
        found = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for function in functions:
            assert not [node for node in ast.walk(found[function]) if isinstance(node, ast.Assert)], function


# --- programs ---------------------------------------------------------------------------------------------------------


def call(target: str, *given: Any) -> Callable[[Any], Any]:
    return lambda graph: nodes(graph).insert(1, node(target, list(given)))


def sizes(expression: str) -> Callable[[Any], Any]:
    def change(graph: Any) -> None:
        for meta in graph["graph_module"]["graph"]["tensor_values"].values():
            for size in meta["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = expression

    return change


def guard(text: str) -> Callable[[Any], Any]:
    return lambda graph: graph.update(guards_code=[text])


def doubled(graph: Any) -> None:
    """Numbers that square themselves: as many digits as memory has, in a few nodes."""
    out = {"as_sym_int": {"as_name": "n0"}}
    made = [{**node("_operator.mul", [{"as_int": 9}, {"as_int": 9}]), "outputs": [out]}]
    for i in range(40):
        out, before = {"as_sym_int": {"as_name": f"n{i + 1}"}}, out
        made.append({**node("_operator.mul", [before, before]), "outputs": [out], "name": f"n{i + 1}"})
    nodes(graph)[1:1] = made


TENSOR = {"as_tensor": {"name": "linear"}}
PROGRAMS = {
    "a file is written": call("torch.ops.aten.save.default", TENSOR, {"as_string": CANARY}),
    "a file is read": call("torch.ops.aten.from_file.default", {"as_string": CANARY}),
    "a seed": call("torch.ops.aten.manual_seed.default", {"as_int": 7}),
    "a seed of chance": call("torch.ops.aten.seed.default"),
    "grad mode": call("torch.ops.aten.set_grad_enabled.default", {"as_bool": True}),
    "a warning": call("torch.ops.aten.warn.default", {"as_string": "\x1b[2J"}, {"as_int": 2}),
    "a print": call("torch.ops.aten._print.default", {"as_string": "x"}),
    "a text": call("torch.ops.aten.chr.default", {"as_int": 7}),
    "a factorial": call("math.factorial", {"as_int": 10**8}),
    "a factorial of aten": call("torch.ops.aten.factorial.int", {"as_int": 10**8}),
    "a power": call("_operator.pow", {"as_int": 9}, {"as_int": 10**9}),
    "a shift": call("_operator.lshift", {"as_int": 1}, {"as_int": 10**13}),
    "numbers that square themselves": doubled,
    "a list that is repeated": call("_operator.mul", {"as_ints": [1, 2]}, {"as_int": 10**10}),
    "a huge number": call("_operator.add", {"as_int": 10**300}, {"as_int": 1}),
    "os.system": call("os.system", {"as_string": f"touch {CANARY}"}),
    "torch.load": call("torch.load", {"as_string": CANARY}),
    "size: powers": sizes("9**9**9**9"),
    "size: a shift": sizes("1<<(10**13)"),
    "size: powers of sympy": sizes("Pow(9,Pow(9,Pow(9,9)))"),
    "size: a power of a size": sizes("2**s0"),
    "size: a symbol that is none": sizes("Symbol('__import__')"),
    "size: digits": sizes(f"Integer('{'9' * 60_000}')"),
    "size: powers by keyword": sizes("Pow(b=9, e=Pow(b=9, e=Pow(b=9, e=9)))"),
    "size: a precision": sizes("Float('1', 1000000000)"),
    "size: a precision by keyword": sizes("Float('1', precision=1000000000)"),
    "size: an exponent": sizes("ceiling(Float('1e999999999'))"),
    "size: places after the point": sizes("RoundDecimal(Integer(1), -1000000000)"),
    "size: digits that are repeated": sizes("Integer('9' * 1000000000)"),
    "size: a long text": sizes("+".join(["1"] * 100_000)),
    "size: an attribute": sizes("Integer('x.__class__')"),
    "size: an index that is called": sizes("max[0](1)"),
    "guard: powers": guard("9**9**9**9 == 0"),
    "guard: a tuple that is repeated": guard("(1, 2) * 10000000000 == 0"),
    "guard: a shape that is repeated": guard("L['x'].size() * 10000000000 == 0"),
    "guard: a function": guard("(lambda: 1)()"),
    "guard: an attribute": guard("L['x'].__class__"),
    "guard: another alphabet": guard("ｅｖａｌ('1')"),
    "a name that is a keyword": lambda graph: nodes(graph)[0].update(name="import"),
    "nodes of one name": lambda graph: nodes(graph).extend([nodes(graph)[0]] * 2),
    "too many nodes": lambda graph: nodes(graph).extend(node("os.system", []) for _ in range(300)),
}


@pytest.mark.parametrize("change", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_that_does_more_than_compute(
    kinds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, capfd: Any
) -> None:
    kind: Kind = kinds("graph")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("torch was asked to load it"))
    monkeypatch.setattr(program, "MOST_NODES", 200)
    folder = sealed(kind.folder, tmp_path / "out", lambda at, m: edit_graph(at, change))
    assert not accepted(Kind(folder, None, X)) and not (tmp_path / CANARY).exists()
    assert capfd.readouterr() == ("", "")


def test_what_a_program_says_of_its_making_is_not_read(kinds: Any, tmp_path: Path) -> None:
    kind: Kind = kinds("graph")

    def change(graph: Any) -> None:
        for one in nodes(graph):
            one["metadata"] = {
                "stack_trace": '"""\nimport os',
                "nn_module_stack": "a,b,os.system;c",
                "source_fn_stack": "x,os.system",
                "custom": '{"a": 1}',
            }

    folder = sealed(kind.folder, tmp_path / "out", lambda at, m: edit_graph(at, change))
    assert accepted(Kind(folder, None, X))
    assert torch.equal(load_subnet(folder)(X), load_subnet(kind.folder)(X))


# --- files ------------------------------------------------------------------------------------------------------------


def beside(name: str, size: int, make: Callable[[Path], Any]) -> Change:
    """A file more, as the manifest says of that size."""

    def change(at: Path, manifest: dict[str, Any]) -> None:
        manifest["files"][name] = {"size": size, "sha256": "0" * 64}
        make(at / name)

    return change


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 200 << 30)


FILES = {
    "a pipe": beside("z", 0, os.mkfifo),
    "a pipe with a size": beside("z", 5, os.mkfifo),
    "a device": beside("z", 5, lambda path: path.symlink_to("/dev/zero")),
    "what never ends": beside("z", 0, lambda path: path.symlink_to("/proc/kmsg")),
    "a folder": beside("z", 5, os.mkdir),
    "200 GB that are not there": beside("z", 5, sparse),
    "a link to nothing": beside("z", 5, lambda path: path.symlink_to("nowhere")),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes in folders")
@pytest.mark.parametrize("change", FILES.values(), ids=FILES)
def test_what_is_no_file_is_not_opened(kinds: Any, tmp_path: Path, change: Change) -> None:
    own: Kind = kinds("own")
    folder = sealed(own.folder, tmp_path / "out", change, stamp=False)
    with pytest.raises(DamagedArtifactError, match=r"no plain file|bytes, and had|content changed"):
        load_subnet(folder, own.model)


def test_a_link_to_a_file_is_read(kinds: Any, tmp_path: Path) -> None:
    """The cache of the Hugging Face Hub is made of them."""
    own: Kind = kinds("own")
    folder = sealed(own.folder, tmp_path / "out", lambda at, m: None)
    for name in ("oto.json", "model.safetensors"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    assert isinstance(load_subnet(folder, own.model), Own)


@pytest.mark.parametrize("make", [os.mkfifo, lambda p: p.symlink_to("/proc/kmsg"), os.mkdir, sparse])
def test_a_manifest_that_is_no_file(kinds: Any, tmp_path: Path, make: Any) -> None:
    own: Kind = kinds("own")
    folder = sealed(own.folder, tmp_path / "out", lambda at, m: None)
    (folder / "oto.json").unlink()
    make(folder / "oto.json")
    assert not accepted(Kind(folder, own.model, own.given, own.watched))


TEXTS = {
    "a key twice": lambda text: text.replace('"format": 1', '"format": 2, "format": 1'),
    "deep": lambda text: "[" * 10**6 + "]" * 10**6,
    "deep in a value": lambda text: '{"format": 1, "x": ' + "[" * 900 + "]" * 900 + "}",
    "many": lambda text: '{"format": 1, "x": [' + "{}," * 3_000_000 + "{}]}",
    "digits": lambda text: '{"format": ' + "9" * 10_000 + "}",
    "another mark": lambda text: "\ufeff" + text,
    "null": lambda text: "null",
}


@pytest.mark.parametrize("change", TEXTS.values(), ids=TEXTS)
def test_json_that_is_made_to_be_hard_to_read(kinds: Any, tmp_path: Path, change: Callable[[str], str]) -> None:
    own: Kind = kinds("own")
    folder = sealed(own.folder, tmp_path / "out", lambda at, m: None)
    (folder / "oto.json").write_text(change((folder / "oto.json").read_text()), encoding="utf-8")
    with pytest.raises(DamagedArtifactError):
        load_subnet(folder, own.model)


# --- what is said of it -----------------------------------------------------------------------------------------------

TERMINAL = "\x1b]0;owned\x07\x1b[2J\u202e\ud800\x9b31m"


def test_a_text_obeys_no_terminal() -> None:
    assert printable(TERMINAL).isprintable() and printable("a\nb×") == "a\nb×"
    assert str(DamagedArtifactError(f"{TERMINAL}\n  to fix  {TERMINAL}")).replace("\n", "").isprintable()


@pytest.mark.parametrize("place", ["class", "file", "swap", "path", "untrained"])
def test_no_error_brings_a_text_of_the_file_to_the_terminal(kinds: Any, tmp_path: Path, place: str) -> None:
    own: Kind = kinds("own")

    def change(at: Path, m: dict[str, Any]) -> None:
        if place == "class":
            m["model"]["class"] = TERMINAL
        elif place == "file":
            m["files"][TERMINAL.replace("\ud800", "")] = {"size": 1, "sha256": "0" * 64}
        elif place == "swap":
            m["edits"]["swaps"]["norm"]["class"] = TERMINAL
        elif place == "path":
            m["edits"]["attributes"][TERMINAL] = {"in_features": 3}
        else:
            m["edits"]["untrained"] = TERMINAL

    from oto.errors import OTOError

    folder = sealed(own.folder, tmp_path / "out", change, stamp=False)
    with pytest.raises(OTOError) as said:
        load_subnet(folder, own.model).train()
    assert str(said.value).replace("\n", "").isprintable()


SAID: dict[str, Change] = {
    "no cost": lambda at, m: m.pop("cost"),
    "cost is a list": says(cost=[1]),
    "cost of texts": lambda at, m: m["cost"].update(before={"params": "x", "macs": "y", "bytes": "z"}),
    "checks of junk": says(checks=[{"x": 1}]),
    "no checks": says(checks=None),
    "an error that is a text": lambda at, m: m["checks"][0].update(error="x"),
    "no notes": lambda at, m: m.pop("notes"),
    "notes are a number": says(notes=3),
    "versions are a list": says(versions=[1]),
    "no model": says(model=None),
    "a size that is a text": lambda at, m: m["files"].update({"x": {"size": "x", "sha256": "0" * 64}}),
    "emitter is a list": says(emitter=[1]),
    "a reason that is none": says(why_graph={"a": 1}),
    "no emitter": lambda at, m: m.pop("emitter"),
    "an expression of terabytes": lambda at, m: edit_graph(at, guard("1<<(10**13)")),
}


@pytest.mark.parametrize("command", ["info", "verify", "bench"])
@pytest.mark.parametrize("change", SAID.values(), ids=SAID)
def test_the_command_line_ends_in_a_message(kinds: Any, tmp_path: Path, change: Change, command: str) -> None:
    folder = sealed(kinds("graph").folder, tmp_path / "out", change)
    done = commanded(command, str(folder), *(["--seconds", "0"] if command == "bench" else []))
    assert isinstance(done.exception, SystemExit | None), done.exception
    assert done.exit_code in ((0, 1) if command == "info" else (1, 3))


def test_memory_that_there_is_not_is_a_message(kinds: Any) -> None:
    done = commanded("verify", str(kinds("graph").folder), "--input", "1000000x1000000x3")
    assert done.exit_code == 1 and "memory ran out" in done.output


def test_what_the_command_line_prints_obeys_no_terminal(kinds: Any, tmp_path: Path) -> None:
    change = says(notes=[TERMINAL], why_graph=TERMINAL, versions={TERMINAL: TERMINAL})
    folder = sealed(kinds("graph").folder, tmp_path / "out", change)
    done = commanded("info", str(folder))
    assert done.exit_code == 0 and "owned" in done.output and done.output.replace("\n", "").isprintable()
    assert json.loads(commanded("info", str(folder), "--json").output)["notes"] == [TERMINAL]


def commanded(*words: str) -> Any:
    testing = pytest.importorskip("typer.testing")
    from oto.cli import app

    return testing.CliRunner().invoke(app, list(words), prog_name="oto")


def test_the_list_of_what_may_be_said_is_that_of_the_schema() -> None:
    """What docs/oto.schema.json describes is what is looked at."""
    schema = json.loads((Path(__file__).resolve().parents[2] / "docs" / "oto.schema.json").read_text())
    for name in schema["properties"].keys() - {"format", "digest"}:
        with pytest.raises(listed.Refusal, match=name):
            listed.require({"files": {}, "tensors": {}, name: object()})
    for name in schema["$defs"]["edits"]["properties"]:
        with pytest.raises(listed.Refusal, match=name):
            listed.require({"files": {}, "tensors": {}, "edits": {name: object()}})
