"""Every kind of slim model, made wrong in ten ways between making and proving it: none is handed out.

python -m tests.slim.test_sabotage          # the table: what noticed it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from oto import OTO
from oto.errors import OTOError, VerificationError
from oto.nn import OverriddenForward
from oto.nn.overrides import FullCount
from oto.slim import construct
from oto.slim import prove as proof
from tests.slim import test_layout

aten = torch.ops.aten


def net(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


class Plain(nn.Module):
    """Convolutions and batch norms: sizes of stock layers are all that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net(
            nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.last = nn.Linear(16, 3)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.running_var, 0.5, 2), nn.init.normal_(m.running_mean), nn.init.normal_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x).mean((2, 3)))


class Swapped(nn.Module):
    """Norms and attention whose slim forms are modules of ``oto.nn``."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm = nn.Linear(5, 16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.act, self.down = nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        h = self.norm(x)
        x = x + self.attention(h, h, h)[0]
        return self.last(x + self.down(self.act(self.up(x))))


class Told_(nn.Module):
    """Sizes in the code, and a norm that divides by the count of what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 3)
        self.eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        var, mean = torch.var_mean(h, dim=-1, keepdim=True, unbiased=False)
        return self.down(self.act((h - mean) * torch.rsqrt(var + self.eps)).view(-1, 16))


class Absorbed(nn.Module):
    """An RMS norm by hand, whose count goes into its weight; and heads."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.weight, self.eps = nn.Linear(5, 16), nn.Parameter(torch.rand(16) + 0.5), 1e-3
        self.heads, self.each = 4, 4
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.act = nn.GELU()
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        h = self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        q, k, v = (p(h).unflatten(-1, (self.heads, self.each)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
        return self.last(self.act(x + self.out(y.transpose(1, 2).flatten(2))))


IMAGES, TOKENS = (
    torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    torch.ones(2, 6, 5).cumsum(1).sin(),
)
KINDS: dict[str, tuple[Callable[[], nn.Module], Any, str, dict[str, Any]]] = {
    "conv and norm": (Plain, IMAGES, "module", {}),
    "modules of oto.nn": (Swapped, TOKENS, "module", {}),
    "told calls": (Told_, TOKENS[:, 0], "module", {}),
    "absorbed counts": (Absorbed, TOKENS, "module", {}),
    "config": (test_layout.model, test_layout.IDS, "config", {"layout": "uniform"}),
    "graph, conv": (Plain, IMAGES, "graph", {}),
    "graph, attention": (Swapped, TOKENS, "graph", {}),
    "recording, conv": (Plain, IMAGES, "recording", {}),
    "recording, attention": (Swapped, TOKENS, "recording", {}),
}
EMITS = {"module": "emit_class", "config": "emit_config", "graph": "emit_exported", "recording": "emit_recorded"}


# The ways: each changes a slim model in place, and says whether there was something to change ------------------------


def changed(model: nn.Module, wanted: Callable[[str, Tensor], bool], change: Callable[[Tensor], object]) -> bool:
    held = [*model.named_parameters(), *model.named_buffers()]
    tensor = next((t for name, t in held if wanted(name, t)), None)
    if tensor is None:
        return False
    with torch.no_grad():
        change(tensor)
    return True


def is_weight(name: str, t: Tensor) -> bool:
    return t.ndim > 1


def off_by_a_percent(t: Tensor) -> None:
    flat = t.view(-1)
    flat[flat.abs().argmax()] *= 1.01


def swap(t: Tensor) -> None:
    t[[0, 1]] = t[[1, 0]]


def nodes(model: nn.Module) -> list[fx.Node]:
    return [n for n in model.graph.nodes if n.op == "call_function"] if isinstance(model, fx.GraphModule) else []


def another_eps(model: nn.Module) -> bool:
    for module in model.modules():
        if isinstance(vars(module).get("eps"), float):
            module.eps *= 1.01
            return True
    for node in nodes(model):
        if node.target is aten.batch_norm.default:
            node.args = tuple(x * 1.01 if isinstance(x, float) and x < 1e-3 else x for x in node.args)
            model.recompile()
            return True
    return False


def other_heads(model: nn.Module) -> bool:
    for module in model.modules():
        for heads, *widths in (("num_heads", "head_dim", "v_head_dim"), ("heads", "each")):
            if isinstance(vars(module).get(heads), int) and vars(module)[heads] > 1:
                one = vars(module)[heads]
                vars(module)[heads] = 1
                for width in widths:
                    vars(module)[width] *= one
                return True
    views = [n for n in nodes(model) if n.target is aten.reshape.default and len(n.args[1]) == 3]
    views = [n for n in views if isinstance(n.args[1][-1], int)][:3]  # (length, batch * heads, width)
    for node in views:
        length, _, width = node.args[1]
        node.args = (node.args[0], [length, -1, width * 3])  # of the three heads that are left
    model.recompile() if views else None
    return len(views) == 3


def dropped_call(model: nn.Module) -> bool:
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.GELU | nn.ReLU):
                setattr(parent, name, nn.Identity())
                return True
    for node in nodes(model):
        if node.target in (aten.relu.default, aten.relu_.default, aten.gelu.default):
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
            model.recompile()
            return True
    if type(model) is test_layout.Model:
        model.encoder[0].second = nn.Identity()
        return True
    return False


def call_override(model: nn.Module) -> bool:
    for module in model.modules():
        told = vars(module).get("forward")
        if isinstance(told, OverriddenForward):
            for hows in (hows for named in told.overrides.values() for hows in named.values()):
                for i, how in enumerate(hows):
                    if isinstance(how, FullCount):
                        full = [how.keywords["full"][0] + 1]
                        hows[i] = replace(how, keywords={**how.keywords, "full": full})
                        return True
        if hasattr(module, "full"):
            module.full = (module.full[0] + 1,)
            return True
    for node in nodes(model):
        if node.target is aten.mul.Tensor and isinstance(node.args[1], float):
            node.args = (node.args[0], node.args[1] * 1.01)
        elif node.target is aten.mean.dim:
            node.target = aten.amax.default
        else:
            continue
        model.recompile()
        return True
    return False


def to_bfloat16(t: Tensor) -> None:
    t.data = t.data.bfloat16()


WAYS: dict[str, Callable[[nn.Module], bool]] = {
    "a weight off by 1 %": lambda m: changed(m, is_weight, off_by_a_percent),
    "two channels swapped": lambda m: changed(m, is_weight, swap),
    "a bias": lambda m: changed(m, lambda name, t: name.endswith("bias"), off_by_a_percent),
    "an eps": another_eps,
    "a running variance": lambda m: changed(m, lambda name, t: name.endswith("running_var"), off_by_a_percent),
    "a head count": other_heads,
    "a dropped call": dropped_call,
    "a call override": call_override,
    "a dtype": lambda m: changed(m, is_weight, to_bfloat16),
    "a NaN": lambda m: changed(m, is_weight, lambda t: t.view(-1)[0].fill_(float("nan"))),
}
HAS_NONE = {  # why there is nothing to change
    "a running variance": {
        "modules of oto.nn",
        "told calls",
        "absorbed counts",
        "config",
        "graph, attention",
        "recording, attention",
    },
    "a head count": {"conv and norm", "told calls", "graph, conv", "recording, conv"},
    "a call override": {"conv and norm", "absorbed counts", "config"},
}


Analyzed = dict[str, OTO]
"""One for each kind; not a global, which would be looked through for what the code of the models keeps."""


@pytest.fixture(scope="module")
def analyzed() -> Analyzed:
    return {}


QUICK = {  # the rest of these, which take an export or a solver each, are for the zoo
    "config": {"a weight off by 1 %", "an eps", "a head count"},
    "graph, conv": {"an eps", "a running variance", "a dropped call"},
    "graph, attention": {"a weight off by 1 %", "a head count", "a call override"},
}


def handed_out(kind: str, way: Callable[[nn.Module], bool], analyzed: Analyzed, patch: pytest.MonkeyPatch) -> bool:
    """Make a slim model, spoil it, and try to get it; tells whether there was something to spoil.

    Raises:
        OTOError: It is not handed out.
    """
    make, given, emitter, options = KINDS[kind]
    if kind not in analyzed:
        torch.manual_seed(0)
        analyzed[kind] = OTO(make().eval(), given, **options)
        analyzed[kind].random_set_zero_groups(0.4)
    emit = getattr(construct, EMITS[emitter])
    spoiled = []

    def emit_spoiled(*args: Any) -> construct.Emitted:
        emitted = emit(*args)
        spoiled.append(way(emitted.model))
        return emitted

    patch.setattr(construct, EMITS[emitter], emit_spoiled)
    analyzed[kind].construct_subnet(emitter=emitter)
    return any(spoiled)


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        pytest.param(kind, way, marks=[] if way in QUICK.get(kind, WAYS) else pytest.mark.zoo)
        for kind in KINDS
        for way in WAYS
    ],
)
def test_what_was_made_wrong_is_not_handed_out(kind, way, analyzed, monkeypatch):
    if kind in HAS_NONE.get(way, ()):
        assert not handed_out(kind, WAYS[way], analyzed, monkeypatch)
        return
    with pytest.raises(OTOError) as caught:
        handed_out(kind, WAYS[way], analyzed, monkeypatch)
    assert noticed(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_not_made_wrong_is(kind, analyzed, monkeypatch):
    assert handed_out(kind, lambda model: True, analyzed, monkeypatch)


def noticed(failure: BaseException) -> str:
    """What noticed it."""
    chain: list[BaseException] = []
    following: BaseException | None = failure
    while following is not None:
        chain.append(following)
        following = following.__cause__ or following.__context__
    wrong = next((one for one in chain if isinstance(one, VerificationError)), None)
    if wrong is None:
        return f"does not run ({type(chain[-1]).__name__})"
    if "does not hold" in str(wrong):
        return "tensors"
    return ", ".join(d for d in ("float32", "float64") if d in str(wrong)) or str(wrong).splitlines()[0]


def table() -> str:
    """For each kind and way, what noticed it; and in brackets what else would have, without the look at tensors."""
    made: Analyzed = {}
    lines = ["| | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for way, spoil in WAYS.items():
        cells = []
        for kind in KINDS:
            found = []
            for looked in (True, False):
                with pytest.MonkeyPatch.context() as patch:
                    if not looked:
                        patch.setattr(proof, "require_held", lambda *given: None)
                    try:
                        found.append("NOT CAUGHT" if handed_out(kind, spoil, made, patch) else "–")
                    except OTOError as failure:
                        found.append(noticed(failure))
            cells.append(found[0] if found[0] == found[1] else f"{found[0]} ({found[1]})")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
