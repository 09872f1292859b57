"""Pages that are made from the code: error messages, the command line, the tutorials, a drawing and a report."""

from __future__ import annotations

import inspect
import logging
import shutil
import textwrap
import warnings
from pathlib import Path

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
    "ArtefactError": 'load_subnet("nowhere")',
    "DamagedArtefactError": """
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
    """The lessons, each with its code."""
    intro = """
        # Tutorials

        Each runs on two CPU cores in at most five minutes; `tutorials/README.md` has the commands of the full
        experiments.
    """
    lines = [inspect.cleandoc(intro), ""]
    for path in sorted((ROOT / "tutorials").glob("[0-9]*.py")):
        first = path.read_text().split('"""')[1].partition("\n")[0]
        lines += [
            f"## {first.rstrip('.')}\n",
            f"```{{literalinclude}} ../../tutorials/{path.name}\n:language: python\n```\n",
        ]
    return "\n".join(lines)


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
    """A drawing and a report of a small network, by the library itself."""
    torch.manual_seed(0)
    analysed = OTO(Small(), torch.randn(1, 3, 16, 16))
    analysed.random_set_zero_groups(0.4)
    subnet = analysed.construct_subnet()
    subnet.report(made / "extra" / "report.html", title="A small residual network")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oto.errors.NoGraphvizWarning)
        analysed.visualize(made / "drawing")
    (made / "figure.inc").write_text(
        "```{image} _made/drawing/Small.svg\n:alt: a small residual network, one colour for each node group\n```\n"
        if (made / "drawing" / "Small.svg").is_file()
        else "(Graphviz was not installed where this was built, so the drawing is missing.)\n"
    )
