"""Half of all ZIGs removed at random, in float64: the slim model computes what the zeroed one does.

Each result is written to ``out/zoo`` (or to ``OTO_ZOO_RESULTS``); ``make support-matrix`` makes the documentation's
table of them.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from . import part
from .matrix import ZOOS, examine, examine_segments, zoo
from .packages_zoo import NEEDS
from .table import DOCUMENT, SEGMENTS

# quick ones of every kind, by zoo: seconds each; whole architectures are marked "zoo"
EVERY_RUN = {
    "models": ["resnet18", "shufflenet_v2_x1_0", "bert", "llama", "t5"],
    "torchvision": ["squeezenet1_1"],
    "timm": ["nf_resnet26"],
    "transformers": ["mixtral", "mamba", "bloom", "gpt_neox"],
    "diffusers": [],
    "handmade": [
        "lstm",
        "lstm_projected",
        "gru_both_ways",
        "gan_generator",
        "carn",
        "experts_by_mask",
        "experts_by_index",
        "selective_scan",
        "linear_attention",
    ],
    "packages": [],  # they are installed for `make zoo`
    "papers": ["nano_gpt", "fourier_operator", "message_passing", "vq_vae", "dlrm", "perceiver"],
}
RESULTS = Path(os.environ.get("OTO_ZOO_RESULTS") or Path(__file__).resolve().parents[2] / "out" / "zoo")

CASES = [
    pytest.param(kind, name, id=f"{kind}-{name}", marks=[] if name in EVERY_RUN[kind] else pytest.mark.zoo)
    for kind in ZOOS
    for name in zoo(kind)
]


def written(kind, result):
    """Leave a result for the table, with the commit that it is of."""
    commit = part.commit()
    result.class_commit = commit if result.choices else ""  # which are left in the zoo's long run
    result.graph_commit = commit if result.graph is not None or result.graph_reason else ""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{kind}-{result.name}.json"
    there = json.loads(path.read_text()) if path.exists() else {}
    segments = {name: there[name] for name in SEGMENTS if name in there} if there.get("segments_commit") else {}
    path.write_text(json.dumps(asdict(result) | segments, indent=1))


def written_segments(kind, result):
    """Leave what came of segments for the table, beside what is there of the same model."""
    path = RESULTS / f"{kind}-{result.name}.json"
    new = {name: getattr(result, name) for name in SEGMENTS} | {"segments_commit": part.commit()}
    if result.failure is not None:
        new |= {"segments_error": None, "segments_reason": result.failure}
    there = json.loads(path.read_text()) if path.exists() else {"name": result.name}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(there | new, indent=1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "name"), [("models", "bert"), ("papers", "nano_gpt")])
def test_a_third_of_all_segments_erased(kind, name):
    """Of the others ``python -m tests.zoo.matrix --segments --record`` tells, which takes a zoo, or models of one."""
    result = examine_segments(name, zoo(kind)[name])
    written_segments(kind, result)
    assert result.erases, f"{result.failure or result._erased()}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_half_of_all_groups_removed(kind, name, request):
    if kind == "packages":
        pytest.importorskip(NEEDS[name], exc_type=ImportError)
    quick, whole = name in EVERY_RUN[kind], request.config.getoption("--zoo-part") is None
    graph = quick or part.has_graph(f"{kind}-{name}", whole)
    emitters = ("module", "graph") if graph else ("module",)
    result = examine(name, zoo(kind)[name], kind=kind, counts=not quick, emitters=emitters)
    written(kind, result)
    assert result.failure is None, result.failure
    assert not result.changed, result.changed
    assert not result.costly, "operators without a rule keep axes of parameters"
    assert result.exact, str(result)
    assert not result.lost, "its class was promised, and not had: " + "; ".join(result.lost)
    assert not result.states, result.states
    if result.axes:
        # a model whose output hardly depends on its input would hide a mistake; nan: it takes no other input
        assert not result.sensitivity < result.SENSITIVE


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in EVERY_RUN.items() for name in names])
def test_other_counts_of_those_of_every_run(kind, name):
    result = examine(name, zoo(kind)[name], kind=kind, emitters=("module",))
    path = RESULTS / f"{kind}-{name}.json"
    if path.exists():
        new = {key: getattr(result, key) for key in ("choices", "in_class", "lost", "choice_error", "states")}
        new["class_commit"] = part.commit()
        path.write_text(json.dumps(json.loads(path.read_text()) | new, indent=1))
    assert result.failure is None and not result.states, str(result)
    assert not result.lost, str(result)
    # what does not run in float64 is compared in float32, sums of some hundred terms
    assert result.choice_error <= (1e-5 if result.replay is not None else result.TOLERANCE), str(result)


def test_the_zoos_are_as_large_as_promised():
    assert len(zoo("torchvision")) >= 100 and len(zoo("timm")) >= 150 and len(zoo("transformers")) >= 60


def test_every_torchvision_model_is_there():
    import torchvision

    missing = [
        m for m in torchvision.models.list_models() if not any(m == n or n.startswith(m) for n in zoo("torchvision"))
    ]
    assert not missing


def test_every_family_of_timm_is_there():
    import timm

    families = {timm.models.model_entrypoint(name).__module__ for name in zoo("timm")}
    everywhere = {timm.models.model_entrypoint(name).__module__ for name in timm.list_models()}
    assert families == everywhere


def test_the_support_matrix_names_every_model():
    written = DOCUMENT.read_text()
    missing = [name for kind in ZOOS for name in zoo(kind) if f"| {name} |" not in written]
    assert not missing, "run `make test zoo support-matrix`"
