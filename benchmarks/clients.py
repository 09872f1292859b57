"""What other programs make of slim models: each takes the full model and slim ones of the same class.

    OMP_NUM_THREADS=1 python benchmarks/clients.py                       # every client that is installed
    python benchmarks/clients.py --clients openvino gguf --architectures llama --again
    python benchmarks/clients.py --clients gguf --llama-cpp ~/llama.cpp   # its converter, from a clone or a release
    python benchmarks/clients.py --table                                 # docs/benchmarks/clients.md from what is there

Nothing is installed: a client that cannot be imported is skipped, and the line says so. A line that is there is not
measured again, unless it was skipped; so clients that ask for other versions of transformers are measured from another
environment, into the same `docs/benchmarks/clients.jsonl`. Every architecture has a process of its own; a client that
ends it is passed over.

Models are small and their weights random; nothing is downloaded. A slim one is what `oto.hesso(target_params=.6)`
arrives at in one step without gradients, by the magnitude of the weights. *takes it* says that the client reads the
model without `oto`; *differs by* is the largest difference of what it gives from what the same model gives in PyTorch,
relative to the largest entry: of quantized models that is what quantization costs, for full and slim alike. MB are
those of what the client holds or writes. The milliseconds are of one forward pass, in turns, on one thread, the median
of fifteen.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from rivals import append, machine, read
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "benchmarks" / "clients.jsonl"
TARGET = 0.6
VOCABULARY = 512
ROUNDS = 15

Line = dict[str, Any]


class Skipped(Exception):
    """Why a row cannot be measured here."""


# ------------------------------------------------------------------------------------------------ models


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=256,
    )
    return BertModel(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        image_size=64,
        patch_size=8,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def resnet() -> nn.Module:
    from timm import create_model

    return create_model("resnet18", num_classes=10)


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (1, 64))}


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, 64, 64)}


@dataclass(frozen=True)
class Architecture:
    """How a model is made, what it is given, and in which layouts it is made slim."""

    build: Callable[[], nn.Module]
    example: Callable[[], dict[str, Tensor]]
    layout: str | None = "uniform"

    @property
    def given_by_name(self) -> bool:
        return self.layout is not None


ARCHITECTURES = {
    "llama": Architecture(llama, tokens),
    "bert": Architecture(bert, tokens),
    "vit": Architecture(vit, image),
    "resnet": Architecture(resnet, image, layout=None),
}

FORMS: dict[str, tuple[Line, Line]] = {
    "slim": ({}, {}),
    "slim, stock": ({"layout": "stock"}, {}),
    "slim, divisible by 32": ({}, {"group_divisible": 32}),
    "slim, aligned": ({"layout": "stock"}, {"align": "gguf"}),
    "slim, aligned to 128": ({"layout": "stock"}, {"align": 128}),
}
"""How slim models are made: further arguments of `OTO`, and of the optimizer."""

FOR_KERNELS = ("slim", "slim, divisible by 32", "slim, aligned")
FOR_BLOCKS = (*FOR_KERNELS, "slim, aligned to 128")
FOR_SHAPES = ("slim", "slim, stock")
PLAIN = ("slim",)


@dataclass
class Subject:
    """A model that is handed to a client."""

    model: nn.Module
    example: dict[str, Tensor]
    by_name: bool
    save: Callable[[Path], Any]
    export: Callable[[Path], Any]
    config: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> Tensor:
        return self.run(self.model)

    def run(self, model: Callable[..., Any]) -> Tensor:
        with torch.no_grad():
            return first(model(**self.example) if self.by_name else model(*self.example.values()))


def first(outputs: Any) -> Tensor:
    """The logits, or the last hidden state."""
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs[0] if not isinstance(outputs, Mapping) else next(iter(outputs.values()))
    return torch.as_tensor(found)


def full(name: str) -> Subject:
    """The full model, the same one each time."""
    from oto.io.export import export_model

    how = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = how.build().eval()
    with torch.no_grad():  # biases and norms of a new model are alike
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.05)
    example = how.example()
    given = example if how.given_by_name else next(iter(example.values()))
    save = getattr(model, "save_pretrained", lambda folder: None)
    return Subject(model, example, how.given_by_name, save, partial(export_model, model, given, "onnx"))


@cache
def slim(name: str, form: str) -> Subject:
    """A slim model, made once: clients leave it as it is.

    Raises:
        Skipped: This version of `oto` has no such option, or the target cannot be met so.
    """
    from oto import OTO
    from oto.errors import OTOError
    from oto.groups.layout import LAYOUTS
    from oto.optim import HESSO

    how, (layout, options) = ARCHITECTURES[name], FORMS[form]
    layout = {"layout": how.layout} | (layout if how.layout else {})
    if layout["layout"] not in LAYOUTS or options.keys() - inspect.signature(HESSO).parameters.keys():
        raise Skipped(f"this version of oto does not know {layout | options}")
    whole = full(name)
    given = whole.example if whole.by_name else next(iter(whole.example.values()))
    try:
        oto = OTO(whole.model, given, **layout)
        optimizer = oto.hesso(
            lr=1.0,
            target_params=TARGET,
            saliency="magnitude",
            start_pruning_step=0,
            pruning_steps=1,
            pruning_periods=1,
            **options,
        )
        optimizer.step()  # without gradients nothing moves; what was chosen goes to zero
        subnet = oto.construct_subnet()
    except OTOError as failure:
        raise Skipped(f"{type(failure).__name__}: {str(failure).splitlines()[0]}") from failure
    return Subject(
        subnet.model,
        whole.example,
        whole.by_name,
        subnet.save_pretrained,
        partial(subnet.export, "onnx"),
        subnet.config,
    )


# ------------------------------------------------------------------------------------------------ clients


@dataclass
class Taken:
    """What a client made of a model.

    Attributes:
        call: A forward pass on the example, in the client.
        bytes: What it holds, or has written.
    """

    call: Callable[[], Tensor]
    bytes: int


@dataclass(frozen=True)
class Client:
    """Another program.

    Attributes:
        take: Hands it a model; raises what it raises.
        packages: What has to be importable.
        architectures: Those that it knows.
        forms: Slim models that say something about it.
    """

    take: Callable[[Subject, Path, argparse.Namespace], Taken]
    packages: Sequence[str]
    architectures: Sequence[str]
    forms: Sequence[str] = PLAIN


def weight(folder: Path, *patterns: str) -> int:
    return sum(path.stat().st_size for pattern in patterns for path in folder.glob(pattern))


def held(model: nn.Module) -> int:
    """Bytes of parameters and buffers, as they are in memory: those inside of quantized tensors too."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return sum(_bytes(t) for t in tensors)


def _bytes(t: Tensor) -> int:
    if hasattr(t, "__tensor_flatten__"):
        return sum(_bytes(getattr(t, name)) for name in t.__tensor_flatten__()[0])
    return t.nbytes


def folder_of(subject: Subject, folder: Path, *tokenizers: str) -> Path:
    """The folder that `save_pretrained` writes, in safetensors."""
    subject.save(folder)
    for name in tokenizers:
        tokenizer(folder, name)
    return folder


def tokenizer(folder: Path, kind: str) -> None:
    """A tokenizer of as many pieces as the models have, made of this repository's documents."""
    if kind == "sentencepiece":
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            input=str(ROOT / "README.md"),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=VOCABULARY,
            minloglevel=2,
            hard_vocab_limit=True,
        )
        return
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


def transformers(subject: Subject, folder: Path, args: argparse.Namespace) -> Taken:
    kind: Any = type(subject.model)
    model = kind.from_pretrained(folder_of(subject, folder / "model")).eval()
    return Taken(lambda: subject.run(model), weight(folder / "model", "*.safetensors"))


def timm(subject: Subject, folder: Path, args: argparse.Namespace) -> Taken:
    """Its class with the keywords that state the sizes, where they can; else a pickle of the module."""
    from timm import create_model

    try:
        model = create_model("resnet18", num_classes=10, **subject.config)
        model.load_state_dict(subject.model.state_dict())
    except (TypeError, RuntimeError):
        torch.save(subject.model, folder / "model.pt")
        model = torch.load(folder / "model.pt", weights_only=False)
    torch.save(model.state_dict(), folder / "weights.pt")
    return Taken(lambda: subject.run(model.eval()), weight(folder, "weights.pt"))


def onnxruntime(subject: Subject, folder: Path, args: argparse.Namespace) -> Taken:
    import onnxruntime as ort

    subject.export(folder / "model.onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    given = dict(zip(names, (x.numpy() for x in subject.example.values()), strict=True))
    return Taken(lambda: torch.from_numpy(session.run(None, given)[0]), weight(folder, "model.onnx*"))


def onnxruntime_genai(subject: Subject, folder: Path, args: argparse.Namespace) -> Taken:
    """The program that its own builder makes of the folder; what it gives are the logits of the last token."""
    import onnxruntime_genai as og

    source, builder = folder_of(subject, folder / "hf", "words"), "onnxruntime_genai.models.builder"
    command = [sys.executable, "-m", builder, "-i", str(source), "-o", str(folder / "genai"), "-p", "fp32", "-e", "cpu"]
    done = subprocess.run([*command, "-c", str(folder / "cache")], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    model = og.Model(str(folder / "genai"))

    def call() -> Tensor:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=128)
        generator = og.Generator(model, parameters)
        generator.append_tokens(subject.example["input_ids"].int().numpy())
        return torch.from_numpy(generator.get_logits()).reshape(1, -1, VOCABULARY)[:, -1:]

    return Taken(call, weight(folder / "genai", "*.onnx*"))


def openvino(subject: Subject, folder: Path, args: argparse.Namespace) -> Taken:
    """What it makes of the module itself; where that has operators that it does not know, of the ONNX file."""
    import openvino as ov

    example = subject.example if subject.by_name else next(iter(subject.example.values()))
    try:
        program = ov.convert_model(subject.model, example_input=example)
    except ov.frontend.OpConversionFailure:
        subject.export(folder / "model.onnx")
        program = ov.convert_model(folder / "model.onnx")
    ov.save_model(program, folder / "model.xml", compress_to_fp16=False)
    compiled = ov.compile_model(program, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    given = [x.numpy() for x in subject.example.values()]
    return Taken(lambda: torch.from_numpy(compiled(given)[0]), weight(folder, "model.xml", "model.bin"))


def ctranslate2(subject: Subject, folder: Path, args: argparse.Namespace) -> Taken:
    import ctranslate2 as ct
    import numpy as np

    source = folder_of(subject, folder / "hf", "words")
    ct.converters.TransformersConverter(str(source)).convert(str(folder / "ct2"))
    ids = subject.example["input_ids"]
    given = ct.StorageView.from_array(ids.int().numpy())
    lengths = ct.StorageView.from_array(np.array([ids.shape[1]], dtype=np.int32))
    if (subject.model.config.model_type) == "llama":
        generator = ct.Generator(str(folder / "ct2"), intra_threads=1)
        return Taken(lambda: _view(generator.forward_batch(given, lengths)), weight(folder / "ct2", "model.bin"))
    encoder = ct.Encoder(str(folder / "ct2"), intra_threads=1)
    return Taken(
        lambda: _view(encoder.forward_batch(given, lengths).last_hidden_state), weight(folder / "ct2", "model.bin")
    )


def _view(storage: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(storage))


def optimum_onnx(subject: Subject, folder: Path, args: argparse.Namespace) -> Taken:
    from optimum import onnxruntime as ort

    source = folder_of(subject, folder / "hf", *([] if "pixel_values" in subject.example else ["words"]))
    kinds = {
        "LlamaForCausalLM": "ORTModelForCausalLM",
        "BertModel": "ORTModelForFeatureExtraction",
        "ViTForImageClassification": "ORTModelForImageClassification",
    }
    kind, more = getattr(ort, kinds[type(subject.model).__name__]), dict[str, Any]()
    if type(subject.model).__name__ == "LlamaForCausalLM":
        more = {"use_io_binding": False}
    model = kind.from_pretrained(source, export=True, **more)
    model.save_pretrained(folder / "onnx")
    given = dict(subject.example)
    if "input_ids" in given:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    if type(subject.model).__name__ == "BertModel":
        given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    if type(subject.model).__name__ == "LlamaForCausalLM":
        given["position_ids"] = torch.arange(given["input_ids"].shape[1])[None]
    return Taken(lambda: first(model(**given)), weight(folder / "onnx", "*.onnx*"))


def peft(subject: Subject, folder: Path, args: argparse.Namespace) -> Taken:
    """Adapters on all linear layers (on convolutions), trained for a step, saved, read, and merged."""
    from peft import LoraConfig, PeftModel, get_peft_model

    linear = [n for n, m in subject.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and "head" not in n]
    config = LoraConfig(r=4, target_modules=linear)
    adapted: Any = get_peft_model(copy.deepcopy(subject.model), config)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.1)
    given = subject.example
    outputs = adapted(**given) if subject.by_name else adapted(*given.values())
    first(outputs).square().mean().backward()
    optimizer.step()
    expected = subject.run(adapted.eval())
    adapted.save_pretrained(folder / "adapter")
    again: Any = PeftModel.from_pretrained(copy.deepcopy(subject.model), folder / "adapter")
    merged = again.merge_and_unload().eval()
    subject.model = adapted  # the one that the merged one is to agree with
    assert torch.equal(subject(), expected)
    return Taken(lambda: subject.run(merged), weight(folder / "adapter", "*.safetensors"))


def torchao(subject: Subject, folder: Path, args: argparse.Namespace, how: str = "int8") -> Taken:
    """Int8 weights; int4 weights in groups of 32 with int8 activations (8da4w); or nf4."""
    from torchao import quantization as q

    model = copy.deepcopy(subject.model)
    if how == "int8":
        q.quantize_(model, q.Int8WeightOnlyConfig())
    elif how == "nf4":
        q.quantize_(model, import_module("torchao.prototype._nf4tensor_api").NF4WeightOnlyConfig())
    else:
        config: Any = q.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=import_module("torchao.quantization.granularity").PerGroup(32)
        )
        q.quantize_(model, config)
    return Taken(lambda: subject.run(model), held(model))


def bitsandbytes(subject: Subject, folder: Path, args: argparse.Namespace, how: str = "int8") -> Taken:
    from transformers import BitsAndBytesConfig

    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if how == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    )
    kind: Any = type(subject.model)
    source = folder_of(subject, folder / "hf")
    model = kind.from_pretrained(source, quantization_config=config, device_map="cpu").eval()
    return Taken(lambda: subject.run(model).float(), held(model))


def gguf(subject: Subject, folder: Path, args: argparse.Namespace, how: str = "f32") -> Taken:
    """What the converter of llama.cpp writes, read by transformers (which knows neither `oto` nor llama.cpp)."""
    if args.llama_cpp is None:
        raise Skipped("no converter: --llama-cpp names a clone of llama.cpp")
    source = folder_of(subject, folder / "hf", "sentencepiece")
    script = args.llama_cpp / "convert_hf_to_gguf.py"
    command = [sys.executable, str(script), str(source), "--outfile", str(folder / "model.gguf"), "--outtype", how]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    try:
        import llama_cpp
    except ImportError:
        kind: Any = type(subject.model)
        model = kind.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()
        return Taken(lambda: subject.run(model), weight(folder, "model.gguf"))
    ids = subject.example["input_ids"][0].tolist()
    program = llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=128, n_threads=1, logits_all=True, verbose=False)

    def call() -> Tensor:
        program.reset()
        program.eval(ids)
        return torch.from_numpy(program.scores[: len(ids)].copy())[None]

    return Taken(call, weight(folder, "model.gguf"))


def vllm(subject: Subject, folder: Path, args: argparse.Namespace) -> Taken:
    raise Skipped(
        "wants a GPU: `vllm serve FOLDER --dtype bfloat16`, with the folder of `subnet.save_pretrained` of a model made"
        ' with layout="stock"'
    )


OF_TRANSFORMERS = ("llama", "bert", "vit")
CLIENTS = {
    "transformers": Client(transformers, ["transformers"], OF_TRANSFORMERS, FOR_SHAPES),
    "timm": Client(timm, ["timm"], ["resnet"]),
    "onnxruntime": Client(onnxruntime, ["onnxruntime", "onnxscript"], [*OF_TRANSFORMERS, "resnet"]),
    "onnxruntime-genai": Client(onnxruntime_genai, ["onnxruntime_genai", "onnxscript"], ["llama"], FOR_SHAPES),
    "openvino": Client(openvino, ["openvino"], [*OF_TRANSFORMERS, "resnet"]),
    "ctranslate2": Client(ctranslate2, ["ctranslate2"], ["llama", "bert"], FOR_SHAPES),
    "optimum-onnx": Client(optimum_onnx, ["optimum.onnxruntime"], OF_TRANSFORMERS, FOR_SHAPES),
    "peft": Client(peft, ["peft"], [*OF_TRANSFORMERS, "resnet"]),
    "torchao int8": Client(torchao, ["torchao"], [*OF_TRANSFORMERS, "resnet"]),
    "torchao 8da4w": Client(partial(torchao, how="8da4w"), ["torchao"], OF_TRANSFORMERS, FOR_KERNELS),
    "torchao nf4": Client(partial(torchao, how="nf4"), ["torchao"], OF_TRANSFORMERS, FOR_BLOCKS),
    "bitsandbytes int8": Client(bitsandbytes, ["bitsandbytes", "accelerate"], OF_TRANSFORMERS),
    "bitsandbytes nf4": Client(
        partial(bitsandbytes, how="nf4"), ["bitsandbytes", "accelerate"], OF_TRANSFORMERS, FOR_KERNELS
    ),
    "gguf F32": Client(gguf, ["gguf", "sentencepiece"], ["llama"]),
    "gguf Q8_0": Client(partial(gguf, how="q8_0"), ["gguf", "sentencepiece"], ["llama"], FOR_KERNELS),
    "vllm": Client(vllm, [], ["llama"], FOR_SHAPES),
}


# ------------------------------------------------------------------------------------------------ rows


def missing(client: Client) -> str | None:
    """Why a client cannot be measured here."""
    for package in client.packages:
        try:
            import_module(package)
        except Exception as failure:
            return f"{package} cannot be imported: {type(failure).__name__}"
    return None


def versions(client: Client) -> Line:
    found = {}
    for package in ("torch", "transformers", *client.packages):
        name = package.partition(".")[0].replace("_", "-")
        try:
            found[name] = version("optimum-onnx" if name == "optimum" else name)
        except PackageNotFoundError:
            continue
    return found


def measure(name: str, architecture: str, args: argparse.Namespace) -> Iterator[Line]:
    """The lines of a client and an architecture: of the full model, and of slim ones."""
    client = CLIENTS[name]
    made: dict[str, tuple[Line, Callable[[], Tensor] | None]] = {}
    with tempfile.TemporaryDirectory() as place:
        for i, form in enumerate(("full", *client.forms)):
            line: Line = {"client": name, "architecture": architecture, "model": form}
            made[form] = line, None
            if why := missing(client):
                line["skipped"] = why
                continue
            (folder := Path(place) / str(i)).mkdir()
            try:
                subject = full(architecture) if form == "full" else copy.copy(slim(architecture, form))
                line["params"] = sum(p.numel() for p in subject.model.parameters())
                taken = client.take(subject, folder, args)
                given, expected = taken.call(), subject()
                given, expected = given.float(), expected.float()
                expected = expected[:, -given.shape[1] :] if given.ndim == 3 else expected
                line["differs"] = float((given - expected).abs().max() / expected.abs().max())
                line["bytes"] = taken.bytes
                made[form] = line, taken.call
            except Skipped as why_not:
                line["skipped"] = str(why_not)
            except Exception as failure:
                traceback.print_exc()
                lines = [text for text in str(failure).splitlines() if text.strip()]
                line["refused"] = f"{type(failure).__name__}: {lines[0] if lines else ''}"[:200]
        timed([(line, call) for line, call in made.values() if call is not None])
    yield from (line for line, _ in made.values())


def timed(calls: Sequence[tuple[Line, Callable[[], Tensor]]]) -> None:
    """Write the median of the milliseconds of calls that take turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS + 2):
        for (_, call), own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            own.append(1e3 * (time.perf_counter() - start))
    for (line, _), own in zip(calls, times, strict=True):
        line["ms"] = statistics.median(own[2:])


# ------------------------------------------------------------------------------------------------ the page


def table(lines: Sequence[Line]) -> str:
    """The page: a row for each client, architecture and model."""
    last = {(line["client"], line["architecture"], line["model"]): line for line in lines}
    order = [(c, a, m) for c in CLIENTS for a in CLIENTS[c].architectures for m in ("full", *CLIENTS[c].forms)]
    rows, before = [], ("", "")
    for key in order:
        line = last.get(key)
        if line is None:
            continue
        of = next((last[key[0], key[1], "full"] for _ in [0] if (key[0], key[1], "full") in last), {})
        names = ["", ""] if key[:2] == before else [key[0], key[1]]
        before = key[:2]
        rows.append(f"| {' | '.join([*names, key[2], *cells(line, of)])} |")
    where = sorted({f"{line['machine']}, {versions_of(line)}" for line in last.values()})
    return "\n".join(
        [
            "# Clients: full against slim\n",
            "Generated by `python benchmarks/clients.py --table` from `clients.jsonl`; its docstring says how models",
            "are made and compared. Weights are random, slim models were asked for 60 % of the parameters. *Slim* is",
            'made with `layout="uniform"` (the ResNet without), *stock* with `layout="stock"`, *divisible by 32* with',
            '`group_divisible=32` beside the former, *aligned* with `align="gguf"` and *aligned to 128* with',
            "`align=128` beside the latter.\n",
            "| client | architecture | model | parameters | takes it | differs by | MB | ms |",
            "|---|---|---|--:|---|--:|--:|--:|",
            *rows,
            "\nMeasured on:\n",
            *(f"* {one}" for one in where),
            "",
        ]
    )


def versions_of(line: Line) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(line["versions"].items()))


def cells(line: Line, of: Line) -> list[str]:
    """A line of results; sizes and times with what they are of those of the full model."""

    def share(key: str, shown: str) -> str:
        return shown if line is of or not of.get(key) else f"{shown} ({line[key] / of[key]:.2f})"

    params = share("params", f"{line['params']:,}") if "params" in line else "–"
    if "skipped" in line or "refused" in line:
        why = f"not measured: {line['skipped']}" if "skipped" in line else f"**no**: {line['refused']}"
        return [params, why.replace("|", "/"), "–", "–", "–"]
    return [
        params,
        "yes",
        f"{line['differs']:.0e}",
        share("bytes", f"{line['bytes'] / 1e6:.2f}"),
        share("ms", f"{line['ms']:.2f}"),
    ]


def left(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Clients and architectures that are to be measured."""
    done: dict[tuple[str, str], bool] = {}
    for line in read(args.results):
        done[line["client"], line["architecture"]] = "skipped" not in line
    wanted = [(c, a) for c in args.clients for a in CLIENTS[c].architectures if a in args.architectures]
    return [pair for pair in wanted if args.again or not done.get(pair)]


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--clients", nargs="+", default=list(CLIENTS), choices=list(CLIENTS))
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--llama-cpp", type=Path, help="a clone of llama.cpp, for its converter")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="measure what has been measured")
    parser.add_argument("--table", action="store_true", help="write the page, measure nothing")
    parser.add_argument("--rows", action="store_true", help="measure here, and print the lines")
    return parser.parse_args(argv)


def print_rows(args: argparse.Namespace) -> None:
    """Print the lines of all clients and architectures that are asked for."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for architecture in args.architectures:
        for client in args.clients:
            if architecture in CLIENTS[client].architectures:
                for line in measure(client, architecture, args):
                    more = {"versions": versions(CLIENTS[client]), "machine": machine()}
                    print("\n" + json.dumps(line | more), flush=True)


def rows(architecture: str, clients: Sequence[str], args: argparse.Namespace) -> Iterator[Line]:
    """The lines of some clients and an architecture, as another process comes to them; fewer where it crashes."""
    more = [] if args.llama_cpp is None else ["--llama-cpp", str(args.llama_cpp)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    command = [sys.executable, __file__, "--rows", "--architectures", architecture, "--clients", *clients, *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        for text in process.stdout:
            if text.startswith('{"client"'):
                yield json.loads(text)
    if process.returncode:
        print(f"{architecture}: ended with {process.returncode}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    if args.rows:
        print_rows(args)
        return
    pairs = left(args) if not args.table else []
    for architecture in args.architectures:
        wanted = [client for client, a in pairs if a == architecture]
        while wanted:
            reached = 0
            for line in rows(architecture, wanted, args):
                append(args.results, line)
                print(line["client"], architecture, line["model"], *cells(line, line), flush=True)
                reached = wanted.index(line["client"]) + 1
            wanted = wanted[reached + 1 :]  # the next one has ended it, unless there is none
    args.results.with_suffix(".md").write_text(table(read(args.results)))
    print(f"wrote {args.results.with_suffix('.md')}")


if __name__ == "__main__":
    main()
