"""Pages that are made from the code: error messages, the command line, the tutorials, a drawing and a report."""

from __future__ import annotations

import copy
import inspect
import logging
import re
import shutil
import textwrap
import warnings
from itertools import pairwise
from pathlib import Path

import record
import torch
from torch import nn

import oto
from oto import OTO, errors

ROOT = Path(__file__).resolve().parent.parent

# What brings a message about, with the least code: the error, and a body that is run in a folder of its own.
MESSAGES = {
    "DummyInputError": 'OTO(mlp(), "an example")',
    "TraceError": "OTO(mlp(), torch.randn(2, 5))",
    "NothingPrunableError": "OTO(nn.Linear(3, 2), torch.randn(2, 3))",
    "UnknownParameterError": 'OTO(mlp(), x).mark_unprunable_by_param_names(["0.wieght"])',
    "UnknownNodeError": 'OTO(mlp(), x).skip_operators(["conv2d"])',
    "TargetError": "OTO(mlp(), x).hesso(lr=0.1, target_macs=0.01, total_steps=100)",
    "OptionError": 'OTO(mlp(), x).hesso(variant="sgd", target_macs=0.5, total_steps=100)',
    "TooLateError": """
        oto = OTO(mlp(), x)
        optimizer = oto.hesso(lr=0.1, target_macs=0.5, total_steps=100)
        oto.skip_operators(["linear"])
    """,
    "SetupError": """
        model = mlp()
        first = OTO(model, x).hesso(lr=0.1, target_macs=0.5, start_pruning_step=0, pruning_steps=5)
        model(x).sum().backward()
        first.step()
        OTO(model, x).hesso(lr=0.1, target_macs=0.6, start_pruning_step=0, pruning_steps=5).load_state_dict(
            first.state_dict()
        )
    """,
    "NonFiniteParameterError": """
        model = mlp()
        model[0].weight.data[0, 0] = float("nan")
        OTO(model, x).hesso(lr=0.1, target_macs=0.5, total_steps=100)
    """,
    "ArtifactError": 'load_subnet("nowhere")',
    "DamagedArtifactError": """
        oto = OTO(mlp(), x)
        oto.random_set_zero_groups(0.5)
        oto.construct_subnet("damaged")
        Path("damaged/model.safetensors").write_bytes(b"")
        load_subnet("damaged", mlp)
    """,
    "ClassChangedError": """
        oto = OTO(mlp(), x)
        oto.random_set_zero_groups(0.5)
        oto.construct_subnet("slim")
        load_subnet("slim", lambda: nn.Linear(3, 2))
    """,
    "GivenError": 'given.named_model("package.module")',
    "NotPrunedWarning": "OTO(mlp(), x).construct_subnet()",
}


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


def everything(made: Path) -> None:
    """Write all pages into a folder."""
    logging.getLogger("oto").setLevel(logging.ERROR)
    shutil.rmtree(made, ignore_errors=True)
    (made / "extra").mkdir(parents=True)
    (made / "errors.md").write_text(errors_page(made / "work"))
    (made / "cli.md").write_text(cli_page())
    (made / "tutorials.md").write_text(tutorials_page())
    (made / "tutorials").mkdir()
    for script in record.LESSONS:
        (made / "tutorials" / f"{script.stem}.md").write_text(tutorial_page(script))
    shutil.rmtree(made / "work", ignore_errors=True)
    pictures(made)


def said(name: str, body: str, work: Path) -> str:
    """The message that some code brings about."""
    from contextlib import chdir

    from oto import given, load_subnet

    work.mkdir(parents=True, exist_ok=True)
    names = {"OTO": OTO, "mlp": mlp, "nn": nn, "torch": torch, "x": torch.randn(2, 3), "Path": Path}
    names |= {"load_subnet": load_subnet, "given": given}
    kind = getattr(errors, name)
    with chdir(work), warnings.catch_warnings():
        warnings.simplefilter("error" if issubclass(kind, Warning) else "ignore")
        try:
            exec(body, names)  # the code above, and nothing else
        except kind as failure:
            return str(failure)
    raise AssertionError(f"no {name} was raised by {body}")


def errors_page(work: Path) -> str:
    """Every error and warning class of the library; a real message of most."""
    intro = """
        # Messages

        A message says where, what, what came of it, and what to do. All errors are in `oto.errors` and derive from
        `OTOError`, so one `except` catches what you can put right; anything else is a mistake of ours, please report
        it. The messages below were produced when this page was built.
    """
    lines = [inspect.cleandoc(intro), ""]
    for name, kind in vars(errors).items():
        if not inspect.isclass(kind) or kind.__module__ != errors.__name__ or kind is errors.OTOError:
            continue
        bases = " · ".join(f"`{base.__name__}`" for base in kind.__bases__)
        lines += [f"## {name}\n", f"{inspect.getdoc(kind)} A kind of {bases}.\n"]
        if name in MESSAGES:
            body = textwrap.dedent(MESSAGES[name]).strip()
            message = said(name, body, work).replace(str(work), "…").replace(str(ROOT), "…")
            lines += [f"```py\n{body}\n```\n", f"```text\n{message}\n```\n"]
    return "\n".join(lines)


def cli_page() -> str:
    """What `oto --help` and the help of every command say."""
    from typer.main import get_command

    from oto.cli import __doc__ as codes
    from oto.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    lines = ["# Command line\n", "```\npip install 'oto[cli]'\noto --install-completion\n```\n"]
    lines += [(codes or "").partition("Exit codes:")[2].join(["Exit codes:", ""]), ""]
    for name, command in commands.items():
        lines += [f"## oto {name}\n", f"{inspect.cleandoc(command.help or '')}\n".replace("\n\noto ", "\n\n    oto ")]
        lines += ["| option | |", "|---|---|"]
        for option in command.params:
            names = " ".join(option.opts) if option.param_type_name == "option" else (option.metavar or option.name)
            shown = (getattr(option, "help", "") or "").replace("|", "\\|")
            if names != "--help":
                lines.append(f"| `{names}` | {shown} |")
        lines.append("")
    return "\n".join(lines)


def tutorials_page() -> str:
    """The lessons, each with its table of before and after."""
    intro = """
        # Tutorials

        Scripts that read like lessons. Each runs on two CPU cores in at most five minutes, with real data that is
        at hand; `tutorials/README.md` has the commands of the full experiments, and what the papers report. What is
        shown here was printed by the scripts (`make tutorials` runs them); the page of a lesson says when, where, and
        whether the script was changed since.
    """
    lines = [inspect.cleandoc(intro), ""]
    for script in record.LESSONS:
        lines += [f"## [{title(script)}](tutorials/{script.stem}.md)\n", f"{about(script)}\n"]
        lines += ["```{code-block} none\n" + table + "\n```\n" for table in tables(recording(script)[1])]
    pages = "\n".join(f"tutorials/{script.stem}" for script in record.LESSONS)
    return "\n".join([*lines, f"```{{toctree}}\n:hidden:\n\n{pages}\n```\n"])


def about(script: Path) -> str:
    """The first line of its docstring, without the number of the lesson."""
    line = script.read_text().split('"""')[1].partition("\n")[0].partition(": ")[2]
    return line[:1].upper() + line[1:]


def title(script: Path) -> str:
    """Its number, and what it is about in few words.

    >>> title(ROOT / "tutorials" / "01_resnet_cifar10.py")
    'Lesson 1: a ResNet on CIFAR-10'
    """
    return re.match(r'"""([^,.]*)', script.read_text())[1]  # type: ignore[index]


def recording(script: Path) -> tuple[str, str]:
    """How a tutorial was run, and what it printed."""
    head, _, text = (record.RECORDINGS / f"{script.stem}.txt").read_text().partition("\n")
    return head, text.strip("\n")


def tables(text: str) -> list[str]:
    """The tables of before and after: from the line that names the columns to the next that is empty or says more."""
    return re.findall(r"^ +.*\bms\b.*\n(?:(?!ms:).+\n)+", text, re.MULTILINE)


def tutorial_page(script: Path) -> str:
    """A lesson: what it is about, its code section by section, and what it printed."""
    source = script.read_text().splitlines()
    start = source.index('"""', 1) + 1
    head, text = recording(script)
    command, _, how = head.removeprefix("$ ").partition("  # ")
    where, _, digest = how.rpartition(", script ")
    lines = [f"# {title(script)}\n", about(script), *source[1 : start - 1], ""]
    rulers = [i for i, line in enumerate(source) if re.match(r"# -{20,} ", line)]
    for begin, end in pairwise([start, *rulers, len(source)]):
        heading = source[begin].lstrip("# -") if begin in rulers else "What it needs" if rulers else "The script"
        heading = re.sub(r"^(\d+\. )?(.)", lambda found: (found[1] or "") + found[2].upper(), heading)
        lines += [f"## {heading}\n", "```{code-block} python"]
        lines += ["\n".join(source[begin + (begin in rulers) : end]).strip("\n"), "```\n"]
    lines += ["## What it prints\n", f"`{command}`: {where}.", ""]
    if digest != record.digest(script):
        lines += ["The script has been changed since then.\n"]
    return "\n".join([*lines, f"```{{code-block}} none\n{text}\n```\n"])


class Small(nn.Module):
    """A network for the pictures: a stem, two residual blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1)) for _ in range(2)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def pictures(made: Path) -> None:
    """A drawing and a report of a small network that was trained for a moment, by the library itself."""
    torch.manual_seed(0)
    model = Small()
    full = copy.deepcopy(model)
    images = torch.randn(256, 3, 16, 16)
    labels = images.mean((2, 3)).argmax(1)
    analyzed = OTO(model, images[:1])
    optimizer = analyzed.hesso(lr=0.05, first_momentum=0.9, target_macs=0.5, total_steps=150)
    for _ in range(150):
        batch = torch.randint(256, (32,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.record(loss=loss)
        optimizer.step()
    subnet = analyzed.construct_subnet()
    page = made / "extra" / "report.html"
    subnet.report(page, title="A small residual network", full=full, dummy_input=images[:8])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oto.errors.NoGraphvizWarning)
        analyzed.visualize(made / "drawing")
    (made / "figure.inc").write_text(
        "```{image} _made/drawing/Small.svg\n:alt: a small residual network, one color for each node group\n```\n"
        if (made / "drawing" / "Small.svg").is_file()
        else "(Graphviz was not installed where this was built, so the drawing is missing.)\n"
    )
