"""How the package hangs together. The first thing to read."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Collection
from pathlib import Path

import networkx as nx
import pytest

OTO = Path(__file__).resolve().parent.parent / "oto"
FILES = sorted(OTO.rglob("*.py"))

# Data flows one way. `optim` leaves zeros in the parameters and `slim` reads them; neither knows the other.
READS = {
    "trace": {"nn"},  # how the calls of torch functions are told apart; `nn` reads nothing
    "axes": {"trace", "nn"},  # a rule names the call of `nn` that a thinner layer needs; `nn` reads nothing
    "groups": {"trace", "axes"},
    "optim": {"groups"},
    "nn": set(),
    "slim": {"trace", "axes", "groups", "nn"},
    "io": {"slim", "nn"},
    "report": {"trace", "axes", "groups", "slim"},
}


# Inside of `slim`: what is kept, then edits as data, then ways and proofs, then what puts them together.
SLIM = {
    "copying": set(),
    "numbers": set(),
    "pruned_shapes": set(),
    "edits": {"copying", "numbers", "pruned_shapes"},
    "own_class": {"copying", "edits", "numbers", "pruned_shapes"},  # it compares calls, never numbers
    "proof": {"copying", "edits", "pruned_shapes"},
    "config": {"edits", "proof", "pruned_shapes"},  # what a field states is tried, and a trial is compared
    "graph": {"edits", "proof", "pruned_shapes"},
    "removed": {"edits", "proof"},
    "called": set(),
    "widths": {"called", "pruned_shapes"},
    "erased": {"called", "edits", "proof", "widths"},
    "asked": {"called", "edits", "erased", "own_class", "pruned_shapes", "widths"},
    "provenance": {"config", "edits"},
    "pickled": {"provenance"},
    "state": {"proof"},
    "source": {"config", "edits", "own_class", "proof", "pruned_shapes"},
    "emitters": {
        "config",
        "edits",
        "erased",
        "graph",
        "own_class",
        "proof",
        "pruned_shapes",
        "removed",
        "source",
        "widths",
    },
    "prove": {"edits", "proof", "pruned_shapes", "source"},
    "latency": {"edits", "erased", "graph", "own_class", "proof", "pruned_shapes", "removed", "widths"},
    "shrink": {"config", "edits", "emitters", "own_class", "proof", "provenance", "pruned_shapes", "source"},
    "member": {"edits", "pruned_shapes", "shrink", "source"},
    "views": {"config", "edits", "emitters", "own_class", "proof", "pruned_shapes", "source"},
    "construct": {"config", "edits", "emitters", "graph", "own_class", "proof", "prove", "provenance", "source"},
    "__init__": set(),
}

# Inside of `optim`: values and single subjects, then the choice, then what all optimizers share; a paper is a file.
OPTIM = {
    "sharded": set(),
    "entries": {"sharded"},  # the one door to tensors by group
    "followed": set(),
    "copied": {"entries"},
    "plan": {"entries"},
    "saliency": {"entries"},
    "shrink": {"entries"},
    "state": set(),
    "target": set(),
    "wrapped": set(),
    "refusals": {"saliency"},
    "sums": {"entries", "refusals", "saliency"},  # what criteria see where no process has all entries of an atom
    "schedule": {"target"},
    "select": {"target"},
    "options": {"saliency", "schedule", "wrapped"},  # each spelled once
    "criteria": {"options", "saliency"},
    "kept": {"select", "target"},
    "limits": {"options", "select", "target"},
    "steps": {"select", "target"},
    "choice": {"criteria", "kept", "limits", "options", "saliency", "select", "steps", "target"},
    "preview": {"choice", "refusals", "saliency", "sums"},
    "setup": {"choice", "options", "schedule", "target"},  # and read in one place
    "wrapper": {"refusals", "wrapped"},
    "checkpointed": {"choice", "plan", "schedule", "state", "wrapped", "wrapper"},
    "compensate": set(),
    "fold": {"compensate"},
    "compensating": {"checkpointed", "fold", "plan"},
    "choosing": {"compensating", "plan", "refusals", "saliency", "sums"},
    "base": {
        "choice", "choosing", "entries", "followed", "options", "plan", "refusals", "schedule", "shrink", "state",
        "wrapped",
    },
    "budget": {"choice", "entries", "target"},
    "nested": {"choice", "target"},
    "family": {"base", "nested", "options", "schedule", "wrapped"},
    "hesso": {"base", "options", "setup", "target", "wrapped"},
    "cric": {"entries", "hesso", "options", "plan", "saliency", "schedule", "setup", "sums", "target", "wrapped"},
    "half_space": {
        "budget", "copied", "entries", "hesso", "options", "plan", "schedule", "setup", "target", "wrapped",
    },
    "hspg": {"half_space", "options", "target", "wrapped"},
    "dhspg": {"budget", "choice", "half_space", "options", "plan", "schedule", "target", "wrapped"},
    "h2spg": {"dhspg", "options", "target", "wrapped"},
    "composed": {"entries", "saliency", "sums"},  # a weight and its adapters are one operator
    "lhspg": {"composed", "copied", "entries", "hesso", "options", "plan", "saliency", "sums", "target", "wrapped"},
    "__init__": {
        "base", "choice", "cric", "dhspg", "h2spg", "hesso", "hspg", "lhspg", "saliency", "schedule", "target",
    },
}  # fmt: skip

# and inside of the search of a class: values first, then what is known of a place, then what repairs it, then the loop
SEARCH = {
    "attributes": set(),
    "adaptation": {"attributes"},
    "blocks": set(),
    "traced": {"attributes"},
    "detours": set(),
    "rescale": {"adaptation", "attributes"},
    "overrides": {"attributes", "traced"},
    "placed": {"adaptation", "blocks", "overrides"},
    "swapped": set(),
    "result": {"adaptation", "overrides", "swapped"},
    "layers": {"placed", "result"},
    "compare": {"adaptation", "blocks", "detours"},
    "trials": {"adaptation", "blocks"},
    "workbench": {
        "adaptation", "attributes", "blocks", "compare", "layers", "overrides", "rescale", "result", "swapped",
        "traced",
    },
    "situation": {"adaptation", "attributes", "compare", "trials", "workbench"},
    "candidates": {"attributes", "blocks", "layers", "rescale", "situation"},
    "repairs": {
        "adaptation", "attributes", "blocks", "candidates", "compare", "layers", "overrides", "repairs", "rescale",
        "situation", "traced", "trials",
    },
    "search": {
        "adaptation", "attributes", "blocks", "compare", "layers", "repairs", "result", "situation", "trials",
        "workbench",
    },
    "__init__": {"layers", "result", "search"},
}  # fmt: skip


def stages_imported_by(path: Path, root: Path = OTO, stages: Collection[str] = READS.keys()) -> set[str]:
    """The stages of ``oto`` that a file imports, whether as ``oto.axes...`` or as ``..axes``."""
    package = ("oto", *path.relative_to(root).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "oto" and len(parts) > 1 and parts[1] in stages:
                found.add(parts[1])
    return found


def test_data_flows_one_way() -> None:
    for stage, allowed in READS.items():
        for path in (OTO / stage).rglob("*.py"):
            extra = stages_imported_by(path) - allowed - {stage}
            assert not extra, f"{path} reads from {extra}; {stage} may read {allowed}"


@pytest.mark.parametrize(("folder", "reads"), [("optim", OPTIM), ("slim", SLIM), ("slim/own_class", SEARCH)])
def test_a_folder_is_read_from_the_bottom_up(folder: str, reads: dict[str, set[str]]) -> None:
    package = re.escape(f"oto.{folder.replace('/', '.')}")
    arrows: dict[str, set[str]] = {}
    for path in (OTO / folder).rglob("*.py"):
        room = path.relative_to(OTO / folder).parts[0].removesuffix(".py")
        imports = re.findall(rf"^\s*from {package}\.(\w+)", path.read_text(), re.MULTILINE)
        arrows.setdefault(room, set()).update(set(imports) - {room})
    assert arrows.keys() == reads.keys()
    extra = {room: read - reads[room] for room, read in arrows.items() if read - reads[room]}
    assert not extra, f"{extra} are read in {folder}, and may not be"
    assert nx.is_directed_acyclic_graph(nx.DiGraph({room: sorted(read) for room, read in arrows.items()}))


def test_what_the_search_of_a_class_gives_slim_takes_from_its_front() -> None:
    others = [p for p in (OTO / "slim").glob("*.py") if "slim.own_class." in p.read_text()]
    assert not others, "what it gives, slim takes from slim.own_class itself"


def test_every_folder_is_a_stage() -> None:
    folders = {path.parent.relative_to(OTO).parts[0] for path in FILES if path.parent != OTO}
    assert folders == READS.keys()


TOP = {
    "adapters",
    "api",
    "analysis",
    "previewing",
    "training",
    "shrinking",
    "resharding",
    "subnet",
    "cli",
    "given",
    "integrations",
    "distill",
    "recovery",
    "knowledge",
    "pruning",
    "__main__",
    "oneshot",
    "calibration",
    "family",
    "members",
    "sandwich",
    "samples",
}  # strings the stages together, and what stands on that


def test_no_stage_knows_what_stands_on_it() -> None:
    for path in FILES:
        if path.parent != OTO:
            assert not (read := stages_imported_by(path, stages=TOP)), f"{path} reads from {read}"
    found = {path.stem: stages_imported_by(path, stages=TOP) - {path.stem} for path in FILES if path.parent == OTO}
    assert found == {
        "__init__": {"api", "subnet"},
        "__main__": {"cli"},
        "_torch": set(),
        "adapters": set(),
        "atomic": set(),
        "api": {"analysis", "knowledge", "pruning", "shrinking", "subnet", "training"},
        "pruning": {"analysis", "family", "oneshot", "previewing", "training"},
        "sandwich": {"distill"},  # how members are trained, which asks for no model
        "members": {"analysis", "subnet"},
        "family": {"analysis", "members", "previewing", "sandwich", "subnet", "training"},
        "analysis": {"adapters"},  # a model of peft is made as the one inside of it
        "clock": set(),
        "previewing": {"analysis"},
        "training": {"adapters", "analysis", "calibration", "previewing"},
        "shrinking": {"analysis", "resharding", "training"},
        "resharding": set(),
        "subnet": {"analysis"},
        "cli": {"api", "given", "samples"},
        "distill": set(),
        "errors": set(),
        "recovery": set(),
        "renamed": set(),
        "user_code": set(),
        "integrations": {"distill", "family", "recovery"},
        "given": set(),
        "knowledge": {"analysis"},  # what a group costs, and what it says to a user, meet here only
        "calibration": set(),
        "oneshot": {"analysis", "calibration", "previewing"},  # choice, compensation and report meet here only
        "progress": set(),
        "shards": set(),
        "samples": {"given"},
    }


@pytest.mark.parametrize("name", ["distill", "recovery"])
def test_what_is_of_use_without_pruning_stands_alone(name: str) -> None:
    imports = re.findall(r"^(?:from|import) (oto[\w.]*)", (OTO / f"{name}.py").read_text(), re.MULTILINE)
    assert imports == ["oto.errors"]


def test_the_front_decides_nothing() -> None:
    """A method of ``OTO`` is a docstring and a call, with what it takes and gives around it."""
    trees = [ast.parse((OTO / name).read_text()) for name in ("api.py", "pruning.py")]
    kinds = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    assert [kind.name for kind in kinds] == ["OTO", "Pruning"]
    for method in [node for kind in kinds for node in kind.body if isinstance(node, ast.FunctionDef)]:
        body = [
            node for node in method.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        ]
        assert len(body) <= 5, f"{method.name} does more than it says"
        for node in ast.walk(method):
            assert not isinstance(node, ast.If | ast.For | ast.While | ast.Try | ast.With | ast.comprehension), (
                method.name
            )


def test_the_import_reader_sees_every_spelling(tmp_path: Path) -> None:
    (tmp_path / "optim").mkdir()
    path = tmp_path / "optim" / "x.py"
    for line, stage in {
        "import oto.slim.pruned_shapes": "slim",
        "from oto.slim import numbers": "slim",
        "from oto import slim": "slim",
        "from ..slim.numbers import f": "slim",
        "from .. import slim": "slim",
        "def f():\n    from oto.trace.graph import Graph": "trace",
    }.items():
        path.write_text(line)
        assert stages_imported_by(path, tmp_path) == {stage}, line
    path.write_text("from . import schedule\nfrom .base import Sparse\nimport torch.nn\nfrom oto.errors import some")
    assert stages_imported_by(path, tmp_path) <= {"optim"}


MODELS = re.compile(r"(?<![a-z])(llama|resnet|lora|bert|gpt|vgg|swin|mistral|qwen|mobilenet)", re.IGNORECASE)


def code_of(path: Path) -> str:
    """The file without comments and docstrings."""
    source = path.read_text()
    tree = ast.parse(source)
    dropped = set()
    for node in ast.walk(tree):  # a string that stands alone: docstrings of modules, classes, functions, attributes
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            dropped.add((node.value.lineno, node.value.col_offset))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    kept = [
        t.string
        for t in tokens
        if t.type != tokenize.COMMENT and not (t.type == tokenize.STRING and t.start in dropped)
    ]
    return " ".join(kept)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(OTO)))
def test_no_model_is_named_in_code(path: Path) -> None:
    names = MODELS.findall(code_of(path))
    if path == OTO / "adapters.py":  # the names that peft gives to what its layers hold
        names = [name for name in names if name.lower() != "lora"]
    assert not names, "a rule goes by operator, never by model"


FORMER_NAMES = {
    "Departure": "Divergence",
    "Found": "Snapshot",
    "Told": "OverriddenForward",
    "Thinning": "PrunedShapes",
    "absorb": "fold",
    "as_found": "preserved",
    "enlivened": "randomized",
    "evened": "equalize_ties",
    "joined": "merge_ties",
    "lively": "randomized",
    "lined_up": "is_reproducible",
    "mend": "repair",
    "restated": "build_from_config",
    "sayings": "candidates",
    "some_": "a noun",
    "state_": "set_size",
    "tell": "override, or warn",
    "telling": "overrides",
    "thinned": "pruned",
    "thinner": "pruned, or slim_layers for oto.nn.modules",
    "thinning": "pruned_shapes",
    "told": "overrides, reasons or warned",
    "unrounded": "without_tf32",
    "way_out": "remedy",
}
"""Identifiers that earlier versions used, and the name to use instead: a noun of the field (CONTRIBUTING, "Words")."""

KEPT_NAMES = {
    "Told": {"nn/told.py"},  # pickles from before 0.2 look there
    "told": {  # the fields of `Edits` are keys of an artifact
        "slim/edits.py", "slim/construct.py", "slim/erased.py", "slim/own_class/layers.py", "slim/proof/run.py",
    },
    "joined": {"report/explain.py"},  # rows of a table that are joined
}  # fmt: skip


def identifiers(path: Path) -> set[str]:
    """The names in a file: of variables, attributes, parameters, keywords, functions, classes and imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.keyword(arg=str(name)):
                names.add(name)
            case ast.alias(name=name, asname=alias):
                names |= {name.split(".")[-1], alias or ""}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(OTO)))
def test_things_go_by_the_names_of_the_field(path: Path) -> None:
    where = path.relative_to(OTO).as_posix()
    names = {name for found in identifiers(path) for name in (found, found.lstrip("_"))}
    former = sorted(name for name in names & FORMER_NAMES.keys() if where not in KEPT_NAMES.get(name, ()))
    assert not former, "; ".join(f"{name} is now called {FORMER_NAMES[name]}" for name in former)


def test_the_names_that_are_kept_are_needed() -> None:
    for name, files in KEPT_NAMES.items():
        assert all(name in identifiers(OTO / file) for file in files), name


def test_a_module_has_one_alias() -> None:
    modules = {
        ".".join(("oto", *path.relative_to(OTO).with_suffix("").parts)).removesuffix(".__init__") for path in FILES
    }
    aliases: dict[str, set[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named = [(alias.name, alias.asname) for alias in node.names if alias.asname]
            elif isinstance(node, ast.ImportFrom):
                named = [(f"{node.module}.{alias.name}", alias.asname or alias.name) for alias in node.names]
                named = [
                    (module, name) for module, name in named if module in modules or module == "torch.nn.functional"
                ]
            else:
                continue
            for module, name in named:
                aliases.setdefault(module, set()).add(str(name))
    assert {"numpy", "oto.nn.functional"} <= aliases.keys()
    several = {module: sorted(names) for module, names in aliases.items() if len(names) > 1}
    assert not several, f"{several}: one alias for a module, everywhere"


def test_a_class_name_means_one_thing() -> None:
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(path.relative_to(OTO).as_posix())
    several = {name: files for name, files in homes.items() if len(files) > 1}
    assert not several, f"{several}: two public classes of one name"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(OTO)))
def test_no_print_and_no_pickle(path: Path) -> None:
    """The library logs; and what it saves can be opened without running code."""
    tree = ast.parse(path.read_text())
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"print", "torch.save", "pickle.dump", "pickle.dumps", "pickle.load", "pickle.loads"}


def in_a_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=OTO.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_importing_oto_imports_no_optional_package() -> None:
    heavy = {"transformers", "diffusers", "timm", "onnx", "onnxscript", "onnxruntime", "torchvision", "pydot", "rich"}
    heavy |= {"typer", "matplotlib", "torch._dynamo"}  # the last one takes a second
    code = "import sys, torch; before = set(sys.modules); import oto; print(*(set(sys.modules) - before))"
    assert heavy.isdisjoint(in_a_new_process(code).split())


def test_importing_oto_is_silent() -> None:
    assert in_a_new_process("import oto") == ""
