"""What a slim model costs to make: runs of the full one, memory, files; and what is said when the proof falls short."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
import re
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from oto import OTO, load_subnet, progress
from oto.errors import ArtifactError, EmitterError, OptionError, UnknownParameterError, VerificationError
from oto.slim.own_class import search
from oto.slim.proof import compare as verify
from oto.slim.proof import float64 as wide
from oto.slim.proof import full, inputs, reference
from oto.slim.proof.compare import relative_error
from oto.slim.proof.float64 import in_double
from oto.slim.proof.reference import Reference
from oto.slim.proof.run import run

X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A full model that writes down its runs: dtype of the input, and size of the batch."""

    runs: list[tuple[torch.dtype, int]] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = nn.Linear(5, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.up.weight.shape[0] == 16 and not x.is_meta:
            Net.runs.append((x.dtype, len(x)))
        return self.down(torch.relu(self.norm(self.up(x))))


def zeroed(model: nn.Module | None = None, x: Tensor = X, **options: object) -> OTO:
    oto = OTO(Net() if model is None else model, x, **options)
    oto.random_set_zero_groups(0.5)
    return oto


def files(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Runs and memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [False, True])
def test_the_full_model_runs_once_for_each_input_and_dtype(tmp_path, program):
    oto = zeroed()
    Net.runs.clear()
    subnet = oto.construct_subnet(tmp_path / "out", program=program)
    f32, f64 = torch.float32, torch.float64
    in_train_mode = (f32, 2)
    assert sorted(Net.runs, key=repr) == [(f32, 2), in_train_mode, (f32, 4), (f64, 2), (f64, 2)]
    said = [c.what for c in subnet.checks]
    assert len([what for what in said if what.startswith("reloaded program")]) == 5 * program
    assert "reloaded on the example" in said and subnet.max_error < 1e-12


def test_float64_takes_no_copy(monkeypatch):
    monkeypatch.setattr(full, "in_double", None)  # cannot be called
    subnet = zeroed().construct_subnet()
    assert {c.dtype for c in subnet.checks} == {"float32", "float64"} and subnet.max_error < 1e-12


class Products(nn.Module):
    """A weight in each place where one may stand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain, self.bare = nn.Linear(5, 48), nn.Linear(48, 40, bias=False)
        self.conv1d = nn.Parameter(torch.randn(40, 24))  # as GPT-2 has its weights
        self.bias, self.last = nn.Parameter(torch.randn(24)), nn.Parameter(torch.randn(24, 30))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, self.bare(torch.relu(self.plain(x))), self.conv1d)
        return torch.mm(y, self.last) @ self.last.t()


def test_a_large_weight_is_never_whole_in_float64(monkeypatch):
    model = Products()
    wanted = run(in_double(model), X.double())
    wider = wide.widened
    largest = []

    def watched(x: object) -> object:
        largest.append(x.numel() if isinstance(x, Tensor) else 0)
        return wider(x)

    monkeypatch.setattr(wide, "widened", watched)
    monkeypatch.setattr(wide, "_BLOCK", 100)
    assert relative_error(wanted, run(model, X.double(), wide=True)) < 1e-14
    assert 80 <= max(largest) <= 2 * 48  # activations, and no weight


def test_rounding_that_moves_the_full_model_as_far_is_no_mistake(monkeypatch):
    """A deep network in few digits is as far from itself in float64 as a slim one from it; so much is allowed."""
    monkeypatch.setitem(verify.TOLERANCE, torch.float32, 1e-9)

    def deep() -> nn.Module:
        torch.manual_seed(0)
        layers = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.ReLU())]
        return nn.Sequential(nn.Linear(5, 64), *layers)

    subnet = zeroed(deep()).construct_subnet()
    own = [c for c in subnet.checks if c.dtype == "float32" and c.error > 1e-9]
    assert own and all(1e-8 < c.tolerance < 1e-5 for c in own)
    assert {c.tolerance for c in subnet.checks if c.dtype == "float64"} == {1e-10}
    with pytest.raises(VerificationError, match="tolerance 1e-09"):
        zeroed(deep()).construct_subnet(float64=False)


def test_what_weights_take_in_is_all_that_is_in_float64(monkeypatch):
    class RMS(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.weight, self.down = nn.Linear(5, 16), nn.Parameter(torch.rand(16)), nn.Linear(16, 3)
            self.eps = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            return self.down(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight)

    seen: list[dict[str, torch.dtype]] = []
    compared = Reference._run64

    def watched(self: Reference, slim: nn.Module, given: object) -> list[Tensor]:
        seen.append({name: p.dtype for name, p in slim.named_parameters()})
        return compared(self, slim, given)

    monkeypatch.setattr(Reference, "_run64", watched)
    subnet = zeroed(RMS()).construct_subnet()
    assert subnet.emitter == "module" and subnet.max_error < 1e-14 and len(subnet.model.weight) < 16
    assert {name for name, dtype in seen[0].items() if dtype == torch.float64} == {"weight"}


def test_a_model_that_compares_dtypes_itself_is_copied_in_float64():
    class Picky(Net):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != self.up.weight.dtype:
                raise TypeError("another dtype")
            return super().forward(x)

    subnet = zeroed(Picky()).construct_subnet()
    assert {c.dtype for c in subnet.checks} == {"float32", "float64"} and subnet.max_error < 1e-12


def test_what_a_forward_writes_to_a_buffer_is_not_rounded():
    class Cached(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(4, 16))

        def forward(self, x: Tensor) -> Tensor:
            self.cache[: len(x)] = self.up(x)
            return self.down(torch.relu(self.cache[: len(x)]))

    model = Cached()
    wide = Reference(model, X)
    wide.check(copy.deepcopy(model))
    assert relative_error(run(in_double(model), X.double()), wide.full.wide[wide.example]) < 1e-15
    assert model.cache.dtype == torch.float32 and not model.cache.any()


def test_what_a_forward_writes_to_a_parameter_is_compared_in_copies():
    class Written(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.up.bias.data.add_(1 / 3).sub_(1 / 3)
            return super().forward(x * self.up.bias.mean())

    model = Written()
    for p in model.parameters():
        p.requires_grad_(False)
    slim = in_double(model)  # as a slim model might be that rounds less
    assert all(c.passed for c in Reference(model, X).check(slim.float()))


def test_a_copy_in_float64_is_the_module_in_float64():
    model = nn.Sequential(nn.Linear(5, 4), nn.LSTM(4, 3), nn.Identity())
    model[2].weight = model[0].weight  # tied
    model.register_buffer("halves", torch.ones(2).half())
    wide = in_double(model)
    assert {p.dtype for p in (*wide.parameters(), *wide.buffers())} == {torch.float64}
    assert wide[2].weight is wide[0].weight and model[0].weight.dtype == torch.float32
    assert wide[1](torch.ones(2, 4).double())[0].dtype == torch.float64


# What the proof may leave out, and how it is told --------------------------------------------------------------------


def test_float64_where_it_fits(monkeypatch):
    for module in (full, reference):
        monkeypatch.setattr(module, "available", lambda model: 100)
    subnet = zeroed().construct_subnet()
    note, reach = subnet.notes
    assert "MemoryError" in reach  # a backward pass does not fit either
    assert "compared in float32 only" in note and "100" not in str({c.dtype for c in subnet.checks})
    assert {c.dtype for c in subnet.checks} == {"float32"} and f"note: {note}" in str(subnet)
    assert {c.dtype for c in zeroed().construct_subnet(float64=True).checks} == {"float32", "float64"}


def test_float64_can_be_left_out_or_insisted_on():
    subnet = zeroed().construct_subnet(float64=False)
    assert {c.dtype for c in subnet.checks} == {"float32"} and "float64=False" in str(subnet)

    class Narrow(Net):
        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.float32
            return super().forward(x)

    oto = zeroed(Narrow())
    subnet = oto.construct_subnet()
    assert any("does not run in it (AssertionError" in note for note in subnet.notes)
    with pytest.raises(VerificationError, match=r"Narrow does not run in float64[^$]*to fix"):
        oto.construct_subnet(float64=True)
    with pytest.raises(OptionError, match="float64 is 'maybe'"):
        oto.construct_subnet(float64="maybe")


def test_without_a_proof_the_table_says_so(tmp_path):
    oto = zeroed()
    Net.runs.clear()
    subnet = oto.construct_subnet(tmp_path / "out", verify=False)
    assert not Net.runs and not subnet.checks and math.isnan(subnet.max_error) and "not verified" in str(subnet)
    assert relative_error(run(oto.model, X), run(load_subnet(subnet.path, Net), X)) < 1e-5


def test_without_a_proof_a_class_that_cannot_do_it_is_still_found_out():
    class Sized(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x)).view(-1, 16))

    subnet = zeroed(Sized(), allow_graph=True).construct_subnet(verify=False)
    assert subnet.emitter == "graph" and not subnet.checks


class Headed(Net):
    """A head that starts at zero, as some transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.down.weight)
        nn.init.ones_(self.down.bias)


@pytest.mark.parametrize("emitter", ["module", "graph", "recording"])
def test_an_output_that_is_constant_is_told_and_compared_once_more(emitter):
    oto = zeroed(Headed())
    before = copy.deepcopy(oto.model.state_dict())
    subnet = oto.construct_subnet(emitter=emitter)
    (note,) = [note for note in subnet.notes if "is the same for every input" in note]
    assert "output 0" in note and note in str(subnet)
    assert [c for c in subnet.checks if "other numbers" in c.what and c.dtype == "float64"] and subnet.max_error < 1e-12
    assert all(torch.equal(before[name], tensor) for name, tensor in oto.model.state_dict().items())
    assert not subnet.model.get_parameter("down.weight").any()


def test_a_mistake_behind_a_constant_output_is_found(monkeypatch):
    from oto.slim import emitters

    pruned = emitters.pruned_tensors

    def shuffled(*given: object) -> dict[str, Tensor]:
        return {name: t.flip(0) if name == "up.weight" else t for name, t in pruned(*given).items()}

    monkeypatch.setattr(emitters, "pruned_tensors", shuffled)
    with pytest.raises(EmitterError, match="cannot be thinned as its own class: VerificationError"):
        zeroed(Headed()).construct_subnet(emitter="module")


def test_an_output_that_is_constant_by_design_is_no_news():
    class Two(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), torch.arange(3.0)

    subnet = zeroed(Two()).construct_subnet()
    assert not subnet.notes and not [c for c in subnet.checks if "other numbers" in c.what]


# Files ---------------------------------------------------------------------------------------------------------------


def test_nothing_is_written_that_was_not_asked_for(tmp_path):
    oto = zeroed()
    assert files(oto.construct_subnet(tmp_path / "out").path) == {"model.safetensors", "oto.json"}
    assert oto.full_group_sparse_model_path is None
    with pytest.raises(ArtifactError, match=r"holds no model\.pt2: it was not asked for .*program=True[^$]*make_model"):
        load_subnet(tmp_path / "out")
    subnet = oto.construct_subnet(tmp_path / "out", program=True, save_full=True)
    assert files(subnet.path) == {"model.safetensors", "oto.json", "model.pt2", "full_group_sparse.safetensors"}
    assert oto.full_group_sparse_model_path.exists()
    assert relative_error(run(oto.model, X), run(load_subnet(tmp_path / "out"), X)) < 1e-5
    assert files(oto.construct_subnet(tmp_path / "out").path) == {"model.safetensors", "oto.json"}


def test_a_graph_is_saved_as_a_program(tmp_path):
    oto = zeroed()
    assert "model.pt2" in files(oto.construct_subnet(tmp_path / "a", emitter="graph").path)
    assert "model.pt2" not in files(oto.construct_subnet(tmp_path / "b", emitter="graph", program=False).path)


def test_a_program_that_was_asked_for_and_cannot_be_written(tmp_path, monkeypatch):
    from oto.io import subnet

    monkeypatch.setattr(subnet, "read_program", lambda path: nn.Linear(5, 3))
    with pytest.raises(EmitterError, match=r"model\.pt2 was asked for, and cannot be written: [^$]*relative error"):
        zeroed().construct_subnet(tmp_path / "out", program=True)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "oto.json", "full_group_sparse.safetensors", "model.pt2"])
def test_a_file_of_the_users_is_never_replaced(tmp_path, monkeypatch, name):
    oto = zeroed()
    (tmp_path / name).write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr("oto.subnet.read_zeros", None)  # before any work
        with pytest.raises(ArtifactError, match=rf"holds {name}, which no artifact has written[^$]*to fix"):
            oto.construct_subnet(tmp_path, program=True, save_full=True)
    assert files(tmp_path) == {name} and (tmp_path / name).read_text() == "mine"


# Models that trainers have had in their hands ------------------------------------------------------------------------


class Unpicklable:
    """As a trainer leaves it: it casts what a forward gives, and refuses to be copied."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self.forward = forward
        functools.update_wrapper(self, forward)

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.forward(*args, **kwargs).float()

    def __getstate__(self) -> None:
        raise pickle.PicklingError("cannot be copied")


def wrapped_as_trainers_do(model: nn.Module) -> object:
    outer = Unpicklable(type(model).forward)

    @functools.wraps(outer)
    def forward(*args: object, **kwargs: object) -> Tensor:
        return outer(*args, **kwargs)

    return types.MethodType(forward, model)


WRAPPERS = {
    "autocast": wrapped_as_trainers_do,
    "compiled": lambda model: torch.compile(model.forward, backend="eager"),
    "hooked": lambda model: functools.update_wrapper(functools.partial(type(model).forward, model), model.forward),
}


@pytest.mark.parametrize(
    ("emitter", "before", "wrapper"),
    [
        *[("module", before, wrapper) for before in (True, False) for wrapper in WRAPPERS],
        ("graph", True, "autocast"),  # each once where it costs more
        ("graph", False, "compiled"),
        ("graph", False, "hooked"),
    ],
)
def test_what_is_wrapped_around_a_forward_is_seen_through(tmp_path, emitter, before, wrapper):
    model, wrap = Net(), WRAPPERS[wrapper]
    if before:
        model.forward = wrap(model)
    oto = zeroed(model)
    if not before:
        model.forward = wrap(model)
    patched = vars(model)["forward"]
    subnet = oto.construct_subnet(tmp_path / "out", emitter=emitter)
    assert subnet.max_error < 1e-12 and vars(model)["forward"] is patched
    if emitter == "module":
        assert type(subnet.model) is Net and "forward" not in vars(subnet.model)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    assert relative_error(run(plain, X), run(subnet.model, X)) < 1e-5


def test_a_real_trainer_leaves_its_autocast(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, accelerator = Net(), accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    oto = OTO(model, X)
    prepared = accelerator.prepare(model)
    assert "forward" in vars(prepared)
    oto.random_set_zero_groups(0.5)
    assert oto.construct_subnet(tmp_path / "out").max_error < 1e-12


def test_a_compiled_module_is_compared_as_it_is():
    model = Net()
    oto = zeroed(model)
    model.compile(backend=lambda graph, given: 1 / 0)
    subnet = oto.construct_subnet()
    assert subnet.max_error < 1e-12 and vars(model)["_compiled_call_impl"] is not None


def test_a_forward_that_was_put_into_the_model_leads_to_the_copy():
    model = Net()
    inner = model.forward
    model.forward = lambda x: inner(x) * 2
    subnet = zeroed(model, allow_graph=True).construct_subnet(emitter="module")
    assert relative_error(run(model, X), run(subnet.model, X)) < 1e-5


HELD = {}


def test_a_forward_that_holds_on_to_the_full_model_is_named():
    model = Net()
    HELD["forward"] = model.forward
    model.forward = lambda x: HELD["forward"](x) * 2
    oto = zeroed(model, allow_graph=True)
    with pytest.raises(EmitterError, match=r"a forward that was put into the model .* runs up itself"):
        oto.construct_subnet(emitter="module")


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_a_model_that_was_cast_since(cast):
    oto = zeroed()
    getattr(oto.model, cast)()
    subnet = oto.construct_subnet()
    dtype = next(oto.model.parameters()).dtype
    assert subnet.model.up.weight.dtype == dtype and oto.dummy_input.dtype == torch.float32
    assert {c.dtype for c in subnet.checks} == {str(dtype).removeprefix("torch."), "float64"}
    assert subnet.max_error < 1e-12


def test_a_model_whose_parameters_are_others_now():
    oto = zeroed()
    oto.model.up = nn.Linear(5, 8)  # as a trainer does that keeps a piece of it
    with pytest.raises(UnknownParameterError, match=r"Net has changed since OTO\(\.\.\.\) was made: no .*up\.weight"):
        oto.construct_subnet()


# What is shown meanwhile ---------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("patience", "shown"), [(0.0, True), (60.0, False)])
def test_long_work_shows_its_stages_on_a_terminal(monkeypatch, patience, shown):
    terminal, seen = Terminal(), []
    monkeypatch.setattr(progress, "PATIENCE", patience)
    monkeypatch.delenv("OTO_DISABLE_TQDM", raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)

    class Slow(Net):
        def forward(self, x: Tensor) -> Tensor:
            running = progress._running.get()
            if running is not None:
                seen.append(running.text)
                if shown:
                    running.over.wait(0.7)
            return super().forward(x)

    zeroed(Slow()).construct_subnet(float64=False, verify=False, emitter="graph")
    assert {text.partition(":")[0] for text in seen} >= {"OTO(Slow)", "construct_subnet"}
    assert all(": " in text for text in seen if text.startswith("construct_subnet"))
    assert ("construct_subnet: exporting" in terminal.getvalue()) == shown


def test_the_search_of_a_class_says_how_far_it_is(monkeypatch):
    class Viewed(Net):
        width = 16

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.norm(self.up(x))).view(-1, self.width))

    seen: list[str] = []
    monkeypatch.setattr(search, "stage", seen.append)
    OTO(Viewed(), X)
    assert seen and all(re.fullmatch(r"asking its class, call \d+ of \d+", text) for text in seen)


def test_no_bar_where_nobody_looks(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    zeroed().construct_subnet()
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("OTO_DISABLE_TQDM", "1")
    with progress.stages("x"):
        assert progress._running.get() is None
    assert sys.stderr.getvalue() == "" and capsys.readouterr().err == ""


def test_an_example_follows_the_model_and_nothing_else():
    meta, cpu = torch.device("meta"), torch.device("cpu")  # the only two places that every machine has
    x, lengths = torch.randn(2, 3), torch.tensor([3, 1])
    given, then = {"x": x, "lengths": lengths, "half": x.half()}, {"w": torch.float32}
    followed = inputs.follow_model(given, then, cpu, {"w": torch.zeros(1).bfloat16()})
    assert [t.dtype for t in followed.values()] == [torch.bfloat16, torch.int64, torch.float16]
    there = {"w": torch.zeros(1, device=meta)}
    assert {t.device for t in inputs.follow_model(given, then, cpu, there).values()} == {cpu}  # it has no values there
    mixed = {"w": torch.float32, "v": torch.float32}
    parts = {"w": torch.zeros(1).half(), "v": torch.zeros(1)}
    assert inputs.follow_model(given, mixed, cpu, parts)["x"].dtype == torch.float32
