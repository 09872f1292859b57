"""The command line: the functions of the library, with results as text or JSON.

Exit codes:

* 0: done.
* 1: refused or impossible; the message says why and what to do.
* 2: the command line is wrong: an option is invalid, or a model, an input or a checkpoint is not available.
* 3: ``oto verify`` found that an artifact is damaged, or computes something else.

A user's mistake is reported without a traceback. Results go to standard output, warnings and errors to standard error;
with ``--json`` each of them is one JSON object on a line.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from typer.core import TyperCommand

import oto
from oto._torch import tree_map_only
from oto.api import OTO
from oto.errors import (
    DamagedArtifactError,
    GivenError,
    NothingPrunableError,
    OTOError,
    VerificationError,
    first_line,
    out_of_memory,
    printable,
    reraise_out_of_memory,
    some,
)
from oto.given import HOW_TO_NAME, load_weights, named_input, named_model
from oto.groups import Cost
from oto.io.artifact import Artifact, reading
from oto.io.export import export_model
from oto.io.program import load_program
from oto.io.subnet import FULL, PROGRAM, load_subnet
from oto.renamed import former_name
from oto.report.explain import Explanation
from oto.report.table import OF_THE_CLASS, columns, cost_rows
from oto.samples import SUFFIXES, Samples
from oto.slim.edits import named_tensors
from oto.slim.graph.program import example_of, runnable
from oto.slim.latency import rounds
from oto.slim.proof.compare import Check, checked, require
from oto.slim.proof.float64 import dtype_of
from oto.slim.proof.inputs import random_like
from oto.slim.proof.reference import CheckOptions, check
from oto.slim.proof.run import run
from oto.trace.outputs import tensors_in

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # exceptions that are not caught below are bugs, and shown in full
    rich_markup_mode="markdown",
    help="Structured pruning that is proved: see what a model could lose, make it slim, check and time it.",
    epilog="Exit codes: 0 done; 1 refused, the message says why; 2 the command line is wrong; 3 verify found a fault.",
)
REFUSED, WRONG, FOUND = 1, 2, 3

Command = TypeVar("Command", bound=Callable[..., Any])


def command(f: Command) -> Command:
    """Register a function as a command: errors and warnings are printed as messages, errors also set exit codes."""

    @functools.wraps(f)
    def run(*args: Any, **options: Any) -> None:
        as_json = bool(options.get("as_json"))
        try:
            with _warnings_as_messages(as_json):
                f(*args, **options)
        except OTOError as failure:
            _message("error", failure, as_json)
            code = WRONG if isinstance(failure, GivenError) else REFUSED
            raise typer.Exit(code) from failure
        except (MemoryError, RuntimeError) as failure:
            if not out_of_memory(failure):
                raise
            _message("error", f"memory ran out: {first_line(failure)}", as_json, "MemoryError")
            raise typer.Exit(REFUSED) from failure

    app.command(cls=_Command)(run)
    return f


class _Command(TyperCommand):
    """A command that accepts former names of options, with a warning."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for former in FORMER.keys() & set(args):
            _message("warning", former_name(former, FORMER[former]), "--json" in args, "DeprecationWarning")
        return super().parse_args(ctx, [FORMER.get(word, word) for word in args])


FORMER = {"--everything": "--allow-graph"}
"""Options that were renamed (:mod:`oto.renamed`)."""


@contextmanager
def _warnings_as_messages(as_json: bool) -> Iterator[None]:
    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        # warnings of other libraries about their own code do not help the user of a command
        if category.__module__.startswith("oto.") or not issubclass(category, DeprecationWarning | FutureWarning):
            _message("warning", message, as_json, category.__name__)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show
        yield


def _message(kind: str, what: object, as_json: bool, name: str | None = None) -> None:
    if as_json:
        typer.echo(json.dumps({kind: name or type(what).__name__, "message": str(what)}), err=True)
        return
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    first, *rest = printable(str(what)).splitlines() or [type(what).__name__]
    console.print(f"{kind}: ", style="bold red" if kind == "error" else "bold yellow", end="")
    console.print("\n".join([first, *rest]), markup=False)


def _result(text: object, data: Mapping[str, Any], as_json: bool) -> None:
    typer.echo(json.dumps(data, default=str) if as_json else printable(str(text)))


# What the commands have in common ------------------------------------------------------------------------------------

Model = Annotated[str, typer.Argument(metavar="MODEL", help=HOW_TO_NAME)]
ModelOption = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help=HOW_TO_NAME)]
MaybeModel = Annotated[
    str | None, typer.Option("--model", "-m", metavar="MODEL", help=f"the full model: {HOW_TO_NAME}")
]
ArtifactFolder = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="folder that construct_subnet or slim wrote")]
MemberOption = Annotated[
    str, typer.Option("--member", help="of a family: its target, such as 0.5, or its index; 0 is the largest")
]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", "-i", metavar="SHAPE", help="1x3x224x224, 1x128:int64:30522, mask=1x128:bool; repeatable"),
]
InputFn = Annotated[str | None, typer.Option(metavar="MODULE:FUNCTION", help="a function that returns the input")]
Weights = Annotated[Path | None, typer.Option("--checkpoint", "-c", help="weights to load: safetensors or torch.save")]
Key = Annotated[str | None, typer.Option(help="where in the checkpoint the state dict is")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="use the library's pretrained weights")]
Skip = Annotated[
    list[str] | None, typer.Option("--skip", metavar="NAME", help="keep this whole: a name or glob; repeatable")
]
Only = Annotated[
    list[str] | None, typer.Option("--only", metavar="NAME", help="prune nothing else: a name or glob; repeatable")
]
Calibrate = Annotated[
    Path | None,
    typer.Option(help="samples: tensors by name (.npz, .safetensors, .pt), labels among them; or a text (.txt)"),
]
AllowGraph = Annotated[
    bool,
    typer.Option(
        "--allow-graph",
        help="also prune what the model's own class cannot express; the slim model may be a graph then",
    ),
]
Layout = Annotated[
    str | None,
    typer.Option(help="uniform: repeated blocks stay equal, stated by the config; stock: and as wide as their heads"),
]
Mode = Annotated[
    str,
    typer.Option(
        "--compress-mode",
        help="prune: channels and heads go; erase: whole segments, such as layers; both: as the checkpoint was trained",
    ),
]
Align = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MULTIPLE",
        help="multiples for sizes of weights: a number, gguf, gguf-k, marlin, cuda, or 'GLOB=NUMBER' (repeatable)",
    ),
]
MinKept = Annotated[
    str, typer.Option(help="what every group keeps at least: a number of atoms, or a share such as 0.1")
]
TargetMacs = Annotated[str | None, typer.Option(help="what remains at most: 0.5 is a share, 500000 a number")]
TargetParams = Annotated[str | None, typer.Option(help="likewise, of the parameters")]
TargetBytes = Annotated[str | None, typer.Option(help="likewise, of the memory of parameters and buffers")]
TargetLatency = Annotated[float | None, typer.Option(help="milliseconds of a forward pass, measured here")]
TargetGroups = Annotated[float | None, typer.Option(help="share of the groups to remove")]
TargetKept = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=SHARE", help="what groups keep, by name or glob: 'layer3.*=0.4'; repeatable"),
]
Scope = Annotated[str, typer.Option(help="global: one ranking; local: the same share of every group")]
Divisible = Annotated[int, typer.Option(min=1, help="atoms (channels, heads) are multiples of this")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object")]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="folder for the artifact")]
Zeroed = Annotated[
    Path | None,
    typer.Argument(help="weights with zeros, or to compress (--one-shot): safetensors, its shards, or of torch.save"),
]
Emitter = Annotated[str, typer.Option(help="auto, config, module, graph or recording")]
Program = Annotated[bool, typer.Option(help="write model.pt2, which loads without the class")]
SaveFull = Annotated[bool, typer.Option("--save-full", help="write the zeroed full weights too")]
Report = Annotated[bool, typer.Option("--report", help="write report.html into the artifact")]
SavePretrained = Annotated[
    Path | None, typer.Option(help="a new folder that from_pretrained loads; with --layout uniform")
]
OneShotOption = Annotated[
    bool, typer.Option("--one-shot", help="compress without training first; needs --calibrate and a target")
]
Loss = Annotated[
    str | None, typer.Option(metavar="MODULE:FUNCTION", help="the loss of a model and a batch of the file")
]
BatchSize = Annotated[int, typer.Option(min=1, help="samples of a batch")]
Context = Annotated[int, typer.Option(min=2, help="tokens of each piece of a text")]
Pieces = Annotated[int, typer.Option(min=2, help="pieces that are taken of a text")]
Holdout = Annotated[float, typer.Option(help="share of the batches that only checks")]
Compensate = Annotated[str, typer.Option(help="affine, ridge, bias or none")]
SaliencyOption = Annotated[
    str | None, typer.Option(help="by default gradients; obs, sensitivity, fluctuation, magnitude, ...")
]
Device = Annotated[str, typer.Option(help="where to compress: cpu, cuda, ...")]
Seconds = Annotated[float, typer.Option(min=0.0, help="minimum time to measure")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads")]


def _number(option: str, text: str | None) -> int | float | None:
    """The number in an option: ``0.5`` (a share) as a float, ``500000`` as an int.

    Raises:
        GivenError: It is not a number.
    """
    if text is None:
        return None
    try:
        return int(text.replace("_", "")) if text.replace("_", "").isdigit() else float(text)
    except ValueError:
        raise GivenError(f"{option} {text} is no number\n  to fix  0.5 is a share, 500000 a number") from None


def _align(given: list[str] | None) -> int | str | dict[str, int] | None:
    """The value of ``--align``: ``32``, ``gguf``, or any number of ``GLOB=32``.

    Raises:
        GivenError: It has none of these forms.
    """
    if not given:
        return None
    named = [one.rpartition("=") for one in given]
    if len(given) == 1 and not named[0][1]:
        return int(given[0]) if given[0].isdigit() else given[0]
    if not all(glob and number.isdigit() for glob, _, number in named):
        raise GivenError(f"--align {' --align '.join(given)}\n  to fix  one number or preset; or several GLOB=NUMBER")
    return {glob: int(number) for glob, _, number in named}


def _analyzed(
    name: str,
    inputs: list[str] | None,
    input_fn: str | None,
    skip: list[str] | None,
    allow_graph: bool,
    checkpoint: Path | None = None,
    key: str | None = None,
    pretrained: bool = False,
    min_kept: str = "1",
    layout: str | None = None,
    only: list[str] | None = None,
    mode: str = "prune",
) -> OTO:
    model = _model(name, checkpoint, key, pretrained)
    given = named_input(inputs or (), input_fn, model)
    return _analysis(model, given, skip, allow_graph, min_kept, layout, only, mode)


def _model(name: str, checkpoint: Path | None, key: str | None, pretrained: bool) -> nn.Module:
    torch.manual_seed(0)  # so that two commands use the same random weights
    model = named_model(name, pretrained)
    if checkpoint is not None:
        load_weights(model, checkpoint, key)
    return model


def _analysis(
    model: nn.Module,
    given: Any,
    skip: list[str] | None,
    allow_graph: bool,
    min_kept: str = "1",
    layout: str | None = None,
    only: list[str] | None = None,
    mode: str = "prune",
) -> OTO:
    least = _number("--min-kept", min_kept)
    assert least is not None
    options: dict[str, Any] = {
        "only": only or None,
        "min_kept": least,
        "layout": layout,
        "compress_mode": mode,
    }  # OTO refuses invalid values
    return OTO(model, given, skip_patterns=skip or (), allow_graph=allow_graph, **options)


def _shares(given: list[str] | None) -> dict[str, int | float] | None:
    """The mapping that several options ``layer3.*=0.4`` define; ``None`` if there are none.

    Raises:
        GivenError: An option has another form.
    """
    found: dict[str, int | float] = {}
    for text in given or ():
        name, _, number = text.rpartition("=")
        share = _number("--target-kept", number) if name else None
        if share is None:
            raise GivenError(
                f"--target-kept {text}\n  to fix  name what keeps how much, as in --target-kept 'layer3.*=0.4'"
            )
        found[name] = share
    return found or None


def _targets(
    macs: str | None,
    params: str | None,
    bytes: str | None,
    latency_ms: float | None,
    group_sparsity: float | None,
    kept: list[str] | None,
) -> dict[str, Any]:
    """The targets on the command line, by the library's keywords; ``None`` for those that are not given."""
    return {
        "target_macs": _number("--target-macs", macs),
        "target_params": _number("--target-params", params),
        "target_bytes": _number("--target-bytes", bytes),
        "target_latency_ms": latency_ms,
        "target_group_sparsity": group_sparsity,
        "target_kept": _shares(kept),
    }


def _target(targets: Mapping[str, Any]) -> dict[str, Any]:
    """The only target that is given.

    Raises:
        GivenError: No target, or more than one, is given.
    """
    asked = {name: value for name, value in targets.items() if value is not None}
    if len(asked) != 1:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in targets)
        raise GivenError(f"{len(asked)} targets are given\n  to fix  give one of {options}")
    return asked


# The commands --------------------------------------------------------------------------------------------------------


@command
def explain(
    model: Model,
    input: Inputs = None,
    input_fn: InputFn = None,
    skip: Skip = None,
    only: Only = None,
    allow_graph: AllowGraph = False,
    layout: Layout = None,
    as_json: Json = False,
) -> None:
    """Show what can be removed from a model, and why the rest stays whole.

    oto explain torchvision:resnet50 --input 1x3x224x224
    """
    try:
        found = _analyzed(model, input, input_fn, skip, allow_graph, layout=layout, only=only).explain()
    except NothingPrunableError as failure:
        if isinstance(failure.explanation, Explanation):
            _result(failure.explanation, failure.explanation.to_dict(), as_json)
        raise
    _result(found, found.to_dict(), as_json)


@command
def preview(
    model: Model,
    input: Inputs = None,
    input_fn: InputFn = None,
    target_macs: TargetMacs = None,
    target_params: TargetParams = None,
    target_bytes: TargetBytes = None,
    target_latency_ms: TargetLatency = None,
    target_group_sparsity: TargetGroups = None,
    target_kept: TargetKept = None,
    scope: Scope = "global",
    group_divisible: Divisible = 1,
    align: Align = None,
    min_kept: MinKept = "1",
    checkpoint: Weights = None,
    key: Key = None,
    pretrained: Pretrained = False,
    skip: Skip = None,
    only: Only = None,
    allow_graph: AllowGraph = False,
    layout: Layout = None,
    as_json: Json = False,
) -> None:
    """Show what a target would keep of each layer, before any training; chosen by the weights alone.

    oto preview torchvision:resnet50 --input 1x3x224x224 --target-macs 0.5
    """
    targets = _targets(target_macs, target_params, target_bytes, target_latency_ms, target_group_sparsity, target_kept)
    asked = _target(targets)
    analyzed = _analyzed(model, input, input_fn, skip, allow_graph, checkpoint, key, pretrained, min_kept, layout, only)
    asked |= {"scope": scope, "group_divisible": group_divisible, "align": _align(align)}
    found = analyzed.preview(**asked)
    _result(found, found.to_dict(), as_json)


@command
def visualize(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the drawing")],
    input: Inputs = None,
    input_fn: InputFn = None,
    horizontal: Annotated[bool, typer.Option("--horizontal", help="from left to right")] = False,
    params: Annotated[bool, typer.Option("--params", help="show the shape of each parameter")] = False,
    flops: Annotated[bool, typer.Option("--flops", help="show the FLOPs of each call")] = False,
    skip: Skip = None,
    allow_graph: AllowGraph = False,
    layout: Layout = None,
    as_json: Json = False,
) -> None:
    """Draw the graph: one color per node group, gray for what stays whole.

    oto visualize torchvision:resnet50 --input 1x3x224x224 --out drawing
    """
    analyzed = _analyzed(model, input, input_fn, skip, allow_graph, layout=layout)
    files = analyzed.visualize(out, vertical=not horizontal, display_params=params, display_flops=flops)
    _result("\n".join(map(str, files)), {"files": [str(file) for file in files]}, as_json)


@command
def slim(
    model: ModelOption,
    out: OutFolder,
    checkpoint: Zeroed = None,
    input: Inputs = None,
    input_fn: InputFn = None,
    key: Key = None,
    pretrained: Pretrained = False,
    skip: Skip = None,
    only: Only = None,
    allow_graph: AllowGraph = False,
    layout: Layout = None,
    compress_mode: Mode = "prune",
    align: Align = None,
    emitter: Emitter = "auto",
    program: Program = True,
    save_full: SaveFull = False,
    report: Report = False,
    save_pretrained: SavePretrained = None,
    one_shot: OneShotOption = False,
    calibrate: Calibrate = None,
    loss: Loss = None,
    batch_size: BatchSize = 32,
    context: Context = 512,
    samples: Pieces = 256,
    holdout: Holdout = 0.25,
    compensate: Compensate = "affine",
    saliency: SaliencyOption = None,
    target_macs: TargetMacs = None,
    target_params: TargetParams = None,
    target_bytes: TargetBytes = None,
    target_latency_ms: TargetLatency = None,
    target_group_sparsity: TargetGroups = None,
    target_kept: TargetKept = None,
    scope: Scope = "global",
    group_divisible: Divisible = 1,
    min_kept: MinKept = "1",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Make the slim model of a checkpoint that was trained with oto, prove it equal, and save it.

    oto slim trained.pt --model package.module:make --input 1x3x32x32 --out slim

    With --one-shot it compresses a checkpoint that was not, without training, by samples from a file:

    oto slim --one-shot --model hf:folder --calibrate text.txt --target-macs 0.8 --layout uniform --out slim
    """
    targets = _targets(target_macs, target_params, target_bytes, target_latency_ms, target_group_sparsity, target_kept)
    multiples, done = _align(align), None
    if one_shot:
        full = _model(model, checkpoint, key, pretrained)
        drawn = Samples.read(_calibrating(calibrate), full, _folder(model), context, samples)
        example = named_input(input or (), input_fn) if input or input_fn else drawn.example
        full, example, batches = _moved(device, full, example, drawn.batches(batch_size))
        analyzed = _analysis(full, example, skip, allow_graph, min_kept, layout, only, compress_mode)
        how: dict[str, Any] = {"scope": scope, "group_divisible": group_divisible, "align": multiples}
        how |= {"saliency": saliency, "compensate": None if compensate == "none" else compensate}
        done = analyzed.one_shot(batches=batches, loss=drawn.loss(loss), holdout=holdout, **_target(targets), **how)
    else:
        _refuse_without_one_shot(checkpoint, calibrate=calibrate, loss=loss, saliency=saliency, **targets)
        least = pretrained, min_kept, layout, only, compress_mode
        analyzed = _analyzed(model, input, input_fn, skip, allow_graph, checkpoint, key, *least)
    options: dict[str, Any] = {"emitter": emitter, "align": 1 if one_shot or multiples is None else multiples}
    subnet = analyzed.construct_subnet(out, program=program, save_full=save_full, report=report, **options)
    if save_pretrained is not None:
        subnet.save_pretrained(save_pretrained)
    text, data = (str(subnet), {}) if done is None else (f"{done}\n\n{subnet}", {"one_shot": done.to_dict()})
    _result(text, subnet.to_dict() | data, as_json)


def _folder(model: str) -> str | None:
    """The folder in ``hf:folder``; ``None`` for other models."""
    return model.removeprefix("hf:") if model.startswith("hf:") else None


def _calibrating(file: Path | None) -> Path:
    if file is None:
        raise GivenError(
            "--one-shot has no samples to go by\n"
            f"  to fix  --calibrate FILE: tensors ({', '.join(SUFFIXES[:-1])}) or a text (.txt)"
        )
    return file


def _refuse_without_one_shot(checkpoint: Path | None, **options: Any) -> None:
    """Raise ``GivenError`` for options of ``--one-shot`` without it, or without a checkpoint."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given:
        raise GivenError(
            f"{some(given)} {'says' if len(given) == 1 else 'say'} how to compress, and --one-shot is not given\n"
            "  effect  the zeros of the checkpoint alone say what goes, so nothing was done\n"
            "  to fix  add --one-shot; or leave it out"
        )
    if checkpoint is None:
        raise GivenError(
            "no checkpoint is given, and without zeros nothing goes\n"
            "  to fix  oto slim trained.pt ...; or compress without training: --one-shot"
        )


def _moved(device: str, model: nn.Module, *tensors: Any) -> tuple[Any, ...]:
    try:
        return model.to(device), *tree_map_only(Tensor, lambda t: t.to(device), tensors)
    except Exception as failure:  # of many kinds: no such device, one that is missing
        reraise_out_of_memory(failure)
        raise GivenError(f"the model cannot be moved to {device}: {first_line(failure)}") from failure


@command
def info(artifact: ArtifactFolder, as_json: Json = False) -> None:
    """Describe an artifact: costs, proof, files, versions. Every file is checked against its hash."""
    found = _opened(artifact)
    _result(_about(found), {"folder": str(found.folder), **found.manifest}, as_json)


def _opened(folder: Path) -> Artifact:
    """An artifact of a slim model, with every file checked."""
    found = reading(folder)
    if missing := [name for name in SAID if name not in found.manifest]:
        raise DamagedArtifactError(
            f"{found.folder}: its manifest says nothing about {', '.join(missing)}\n"
            "  effect  it is not known to hold a slim model\n  to fix  pass the folder given to construct_subnet"
        )
    return found


SAID = ("model", "emitter", "why_graph", "cost", "checks", "notes", "versions")


def _about(found: Artifact) -> str:
    manifest = found.manifest
    before, after = (Cost(**_fields(Cost, manifest["cost"][key])) for key in ("before", "after"))
    checks = [Check(**_fields(Check, c)) for c in manifest["checks"]]
    worst = {
        dtype: max(c.error for c in checks if c.dtype == dtype) for dtype in dict.fromkeys(c.dtype for c in checks)
    }
    way = (
        "the original class"
        if manifest["emitter"] in OF_THE_CLASS
        else f"a torch.fx.GraphModule ({manifest['emitter']})"
    )
    lines = [
        f"{manifest['model']['class']}, slim, as {way}",
        *([f"  because {manifest['why_graph']}"] if manifest["why_graph"] else []),
        "",
        columns(cost_rows(before, after)),
        "",
        *_family(manifest),
        *(f"verified in {dtype}: largest relative error {error:.1e}" for dtype, error in worst.items()),
        *(f"note: {note}" for note in manifest["notes"]),
        "written by " + ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
        "",
        columns([[name, f"{stamp['size']:,} bytes"] for name, stamp in manifest["files"].items()]),
    ]
    return "\n".join(lines)


def _family(manifest: Mapping[str, Any]) -> list[str]:
    """The members of a family, the largest first, as a table."""
    members = manifest.get("members", ())
    if not members:
        return []
    rows = [["member", "target", "params", "MACs", "score", ""]]
    for index, one in enumerate(members):
        cost, score = one["cost"]["after"], one.get("score")
        shown = "" if score is None else f"{score:g}"
        how = "" if one.get("trained", True) else "cut without training"
        rows.append([str(index), str(one["target"]), f"{cost['params']:,}", f"{cost['macs']:,}", shown, how])
    return [columns(rows), ""]


def _fields(kind: Any, entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a manifest that are fields of a dataclass."""
    return {field.name: entries[field.name] for field in dataclasses.fields(kind)}


@command
def verify(
    artifact: ArtifactFolder,
    model: MaybeModel = None,
    input: Inputs = None,
    input_fn: InputFn = None,
    member: MemberOption = "0",
    as_json: Json = False,
) -> None:
    """Check an artifact: its hashes, that it loads and runs; with --model, that its program computes what its class
    does, and, where full weights were saved (save_full=True), that it computes what the zeroed full model does.

    Exit code 3 if anything is wrong with it.
    """
    try:
        lines, data = _verified(artifact, model, input, input_fn, member)
    except (DamagedArtifactError, VerificationError) as failure:
        _message("error", failure, as_json)
        raise typer.Exit(FOUND) from failure
    _result("\n".join([*lines, "all is well" if data["checks"] else "the files are well"]), data, as_json)


def _verified(
    folder: Path, model: str | None, inputs: list[str] | None, input_fn: str | None, member: str
) -> tuple[list[str], dict[str, Any]]:
    found = _opened(folder)
    files = found.manifest["files"]
    lines = [f"{len(files)} files are whole ({sum(stamp['size'] for stamp in files.values()):,} bytes)"]
    full, slim, given = _loaded(found, model, inputs, input_fn, member)
    shapes = []
    for seed, example in enumerate((given, random_like(given, 0))):
        try:
            outputs = run(slim, example)
        except Exception as failure:  # of many kinds; the user may have passed the example
            reraise_out_of_memory(failure)
            raise VerificationError(
                f"the slim model fails on {'a random' if seed else 'the'} input: {first_line(failure)}\n"
                "  to fix  pass an input that the model takes: --input, --input-fn"
            ) from failure
        shapes = [list(t.shape) for t in outputs]
    kind = "the original class" if full is not None and found.manifest["emitter"] in OF_THE_CLASS else PROGRAM
    lines.append(f"{kind} loads and runs: outputs of {', '.join('×'.join(map(str, s)) or 'a number' for s in shapes)}")
    checks: list[Check] = []
    if full is not None and FULL in files:
        _load_full(full, found)
        recorded = found.manifest["emitter"] == "recording"
        checks = check(full, slim, given, CheckOptions(batch=not recorded, notes=[]))
        require(checks)
        if not checks:
            raise VerificationError(
                "the outputs are empty on this input, so nothing was compared\n"
                "  to fix  pass an input with outputs that are not empty: --input, --input-fn"
            )
        lines.append(f"computes what the zeroed full model does: {_worst(checks)}")
    if full is not None and kind != PROGRAM and PROGRAM in files:
        program = runnable(load_program(found.path(PROGRAM)))
        own, other = run(slim, given), run(program, given)
        checks.append(checked(f"{PROGRAM} against the class", dtype_of(slim), own, other, 1e-3))
        error = require(checks[-1:])
        lines.append(f"{PROGRAM} computes what the class does: largest relative error {error:.1e}")
    if checks and not any(c.what != f"{PROGRAM} against the class" for c in checks):
        lines.append(f"the full model was not compared: the folder has no {FULL}")
    if not checks:
        holds = f"the folder holds no full weights (construct_subnet(out_dir, save_full=True) writes {FULL})"
        lines.append(
            f"nothing was compared: {holds if FULL not in files else 'no model is named (--model)'}; oto info shows"
            " the proof from when it was written"
        )
    return lines, {"files": list(files), "outputs": shapes, "checks": [vars(c) for c in checks]}


def _worst(checks: Sequence[Check]) -> str:
    dtypes = dict.fromkeys(c.dtype for c in checks)
    return "; ".join(f"{max(c.error for c in checks if c.dtype == d):.1e} relative in {d}" for d in dtypes)


def _load_full(full: nn.Module, found: Artifact) -> None:
    """Load the zeroed full weights of an artifact into the full model."""
    held = named_tensors(full)
    with torch.no_grad():
        for name, tensor in found.tensors(FULL).items():
            if name not in held or held[name].shape != tensor.shape:
                raise GivenError(
                    f"{found.folder} was not made from this model: it has no {name} of shape {tuple(tensor.shape)}\n"
                    f"  to fix  name the model that was made slim, a {found.manifest['model']['class']}"
                )
            held[name].copy_(tensor)


def _loaded(
    found: Artifact, model: str | None, inputs: list[str] | None, input_fn: str | None, member: str
) -> tuple[nn.Module | None, nn.Module, Any]:
    """The full model if one is named, the slim model (of a family, a member), and an input for both."""
    full = None if model is None else named_model(model)
    if full is None and PROGRAM not in found.manifest["files"] and found.manifest["emitter"] in OF_THE_CLASS:
        raise GivenError(
            f"{found.folder} holds no {PROGRAM}: {found.manifest.get('no_program')}\n"
            "  effect  the slim model is loaded with its class\n"
            f"  to fix  --model package.module:function, which makes the full {found.manifest['model']['class']}"
        )
    slim = load_subnet(found.folder, full, member=_number("--member", member) or 0)
    if inputs or input_fn:
        return full, slim, named_input(inputs or (), input_fn)
    if PROGRAM in found.manifest["files"]:
        return full, slim, example_of(load_program(found.path(PROGRAM)))
    return full, slim, named_input((), None, full)


@command
def bench(
    artifact: ArtifactFolder,
    model: MaybeModel = None,
    input: Inputs = None,
    input_fn: InputFn = None,
    seconds: Seconds = 5.0,
    threads: Threads = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    member: MemberOption = "0",
    as_json: Json = False,
) -> None:
    """Time forward passes of a slim model; with --model in turns with those of the full one.

    oto bench slim --model package.module:make --input 64x3x32x32
    """
    if threads is not None:
        torch.set_num_threads(threads)
    full, slim, given = _loaded(_opened(artifact), model, input, input_fn, member)
    try:
        models = {name: m.to(device).eval() for name, m in (("full", full), ("slim", slim)) if m is not None}
        given = tree_map_only(Tensor, lambda t: t.to(device), given)
        taken = dict(zip(models, rounds(list(models.values()), given, seconds=seconds), strict=True))
    except Exception as failure:  # of many kinds: a missing device, an input that does not fit
        reraise_out_of_memory(failure)
        raise GivenError(f"the forward pass fails on {device}: {first_line(failure)}") from failure
    quartiles = {name: [1e3 * q for q in statistics.quantiles(own, n=4)] for name, own in taken.items()}
    rows = [["", "median ms", "quartiles", "passes"]]
    rows += [[n, f"{m:.3g}", f"{a:.3g}–{b:.3g}", str(len(taken[n]))] for n, (a, m, b) in quartiles.items()]
    shapes = ", ".join("×".join(map(str, t.shape)) for t in tensors_in(given))
    where = f"{device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, input {shapes}"
    lines = [columns(rows), where]
    data = {"ms": {n: {"q1": a, "median": m, "q3": b, "passes": len(taken[n])} for n, (a, m, b) in quartiles.items()}}
    if full is not None:
        speedup = statistics.median(a / b for a, b in zip(taken["full"], taken["slim"], strict=True))
        lines.insert(1, f"{speedup:.2f} times as fast: the median over pairs of passes that ran one after the other")
        data["speedup"] = speedup  # type: ignore[assignment]
    _result("\n".join(lines), {**data, "device": device, "threads": torch.get_num_threads()}, as_json)


@command
def export(
    artifact: ArtifactFolder,
    to: Annotated[str, typer.Option(help="onnx, pt2 (torch.export), or aoti (compiled for this machine)")] = "onnx",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="a new file; default: model.onnx, ... in the working folder")
    ] = None,
    model: MaybeModel = None,
    input: Inputs = None,
    input_fn: InputFn = None,
    member: MemberOption = "0",
    as_json: Json = False,
) -> None:
    """Export a slim model, and check what was written in its own runtime.

    oto export slim --to onnx --out model.onnx
    """
    if to not in FORMATS:
        raise GivenError(f"--to {to} is no format\n  to fix  --to {', --to '.join(FORMATS)}")
    _, slim, given = _loaded(_opened(artifact), model, input, input_fn, member)
    target = out or Path(FORMATS[to])
    checks = export_model(slim, given, to, target)
    size, error = target.stat().st_size, max(c.error for c in checks)
    data = {"file": str(target), "bytes": size, "error": error, "checks": [vars(c) for c in checks]}
    text = f"{target}: {size:,} bytes\nread back and run: {len(checks)} comparisons, largest relative error {error:.1e}"
    _result(text, data, as_json)


FORMATS = {"onnx": "model.onnx", "pt2": "model.pt2", "aoti": "model.aoti.pt2"}


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False) -> None:
    if show:
        typer.echo(f"oto {oto.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
        raise typer.Exit
