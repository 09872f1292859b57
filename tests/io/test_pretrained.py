"""Folders that plain `from_pretrained` loads, in a process that has no `oto`."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from oto import OTO, load_subnet
from oto.errors import ArtifactError, EmitterError, UnstatedWarning
from tests.zoo import transformers_zoo as zoo
from tests.zoo.models import TINY, image, lively, tokens

transformers = pytest.importorskip("transformers")

WIDE = TINY | {"intermediate_size": 256}

# what it is made from, and the class that a user would load it with
MODELS: dict[str, tuple[zoo.Factory, str]] = {
    "bert": (zoo.from_config("BertModel", "BertConfig", tokens, **WIDE), "AutoModel"),
    "roberta": (
        zoo.from_config("RobertaForSequenceClassification", "RobertaConfig", tokens, **WIDE),
        "AutoModelForSequenceClassification",
    ),
    "distilbert": (
        zoo.from_config(
            "DistilBertModel", "DistilBertConfig", tokens, vocab_size=100, dim=64, n_heads=4, n_layers=2, hidden_dim=256
        ),
        "AutoModel",
    ),
    "gpt2": (
        zoo.from_config(
            "GPT2LMHeadModel",
            "GPT2Config",
            tokens,
            n_embd=64,
            n_head=4,
            n_layer=2,
            vocab_size=100,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
        ),
        "AutoModelForCausalLM",
    ),
    "opt": (zoo.DECODERS["opt"], "AutoModelForCausalLM"),
    "llama": (
        zoo.from_config("LlamaForCausalLM", "LlamaConfig", tokens, **TINY, num_key_value_heads=2),
        "AutoModelForCausalLM",
    ),
    "mistral": (zoo.DECODERS["mistral"], "AutoModelForCausalLM"),
    "qwen2": (zoo.DECODERS["qwen2"], "AutoModelForCausalLM"),
    "qwen3": (zoo.DECODERS["qwen3"], "AutoModelForCausalLM"),
    "phi3": (zoo.DECODERS["phi3"], "AutoModelForCausalLM"),
    "gemma2": (zoo.DECODERS["gemma2"], "AutoModelForCausalLM"),
    "mixtral": (zoo.DECODERS["mixtral"], "AutoModelForCausalLM"),
    "t5": (
        zoo.from_config("T5ForConditionalGeneration", "T5Config", zoo.pair, **zoo.T5, decoder_start_token_id=0),
        "AutoModelForSeq2SeqLM",
    ),
    "bart": (zoo.SEQ2SEQ["bart"], "AutoModelForSeq2SeqLM"),
    "vit": (
        zoo.from_config("ViTForImageClassification", "ViTConfig", lambda: image(32), **zoo.VIT),
        "AutoModelForImageClassification",
    ),
    "whisper": (zoo.AUDIO["whisper"], "AutoModelForSpeechSeq2Seq"),
    "clip": (zoo.MULTIMODAL["clip"], "AutoModel"),
}

# a class whose residual stream an RMS norm divides by its width can lose some of that, others cannot
THINNER_STREAM = {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "mixtral"}
WIDTH_OF_STREAM = ("hidden_size", "d_model", "n_embd", "dim")

LOAD = """
import sys, json, torch, warnings
sys.modules["oto"] = None  # an import of it fails
warnings.simplefilter("ignore")
import transformers
torch.set_num_threads(1)
told = {}
for name, (folder, auto, given, answer) in json.loads(sys.argv[1]).items():
    model = getattr(transformers, auto).from_pretrained(folder).eval()
    given = torch.load(given)
    with torch.no_grad():
        out = model(**given) if isinstance(given, dict) else model(given)
    found, wanted = out[answer], torch.load(folder + ".wanted")
    told[name] = {
        "class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters()),
        "error": float((found - wanted).abs().max() / wanted.abs().max()), "most": model.generation_config.max_length
        if getattr(model, "generation_config", None) else None,
    }
print(json.dumps(told))
"""


@dataclass
class Made:
    """What became of one model."""

    full: nn.Module
    subnet: Any
    folder: Path
    loaded: dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    root = tmp_path_factory.mktemp("pretrained")
    transformers.logging.disable_progress_bar()
    found, asked = {}, {}
    for name, (factory, auto) in MODELS.items():
        torch.manual_seed(0)
        model, given = factory()
        lively(model, given)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.max_length = 77
        oto = OTO(model, given, layout="uniform")
        oto.random_set_zero_groups(0.5)
        subnet = oto.construct_subnet()
        subnet.save_pretrained(root / name)
        with torch.no_grad():
            out = model(**given) if isinstance(given, dict) else model(given)
        answer = next(k for k in ("logits", "logits_per_image", "last_hidden_state") if k in out)
        torch.save(out[answer], root / f"{name}.wanted")
        torch.save(given, root / f"{name}.given")
        asked[name] = str(root / name), auto, str(root / f"{name}.given"), answer
        found[name] = Made(model, subnet, root / name, {})
    done = subprocess.run([sys.executable, "-c", LOAD, json.dumps(asked)], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    for name, told in json.loads(done.stdout).items():
        found[name].loaded = told
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_process_without_oto_loads_it_and_computes_the_same(made, name):
    it = made[name]
    assert it.subnet.emitter == "config" and type(it.subnet.model) is type(it.full)
    assert it.loaded["class"] == type(it.full).__name__
    assert it.loaded["error"] < 1e-5  # float32: logits of a tiny network, sums of at most 256 terms
    assert it.loaded["parameters"] < 0.85 * sum(p.numel() for p in it.full.parameters())
    assert it.subnet.max_error < 1e-10
    # the generation config came along
    assert it.loaded["most"] == (None if getattr(it.full, "generation_config", None) is None else 77)


@pytest.mark.parametrize("name", MODELS)
def test_what_the_stream_loses(made, name):
    before, after = made[name].full.config, made[name].subnet.model.config
    field = next((f for f in WIDTH_OF_STREAM if hasattr(before, f)), None)
    assert (field is not None and getattr(after, field) < getattr(before, field)) == (name in THINNER_STREAM)


def test_generate_gives_the_same_tokens(made):
    for name in ("gpt2", "llama", "gemma2", "qwen3", "t5", "bart"):
        full, slim = made[name].full, made[name].subnet.model
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "max_length": None}
        assert torch.equal(full.generate(tokens(), **options), slim.generate(tokens(), **options)), name


# How it fails, and what comes along -----------------------------------------------------------------------------------


def llama(**options: Any) -> nn.Module:
    model, given = zoo.from_config(
        "LlamaForCausalLM", "LlamaConfig", tokens, **TINY, num_key_value_heads=2, **options
    )()
    return lively(model, given)


@pytest.fixture
def subnet() -> Any:
    oto = OTO(llama(), tokens(), layout="uniform")
    oto.random_set_zero_groups(0.5)
    return oto.construct_subnet()


def test_what_no_config_states_is_named(tmp_path):
    oto = OTO(llama(), tokens(), skip_patterns=["model.layers.0"])  # only one of two layers
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet()
    with pytest.raises(EmitterError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight: \[\d+, 64\]") as caught:
        subnet.save_pretrained(tmp_path / "x")
    assert "its config makes it [64, 64]" in str(caught.value) and 'layout="uniform"' in str(caught.value)
    assert not (tmp_path / "x").exists()


# What the model itself writes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """A slim model whose blocks differ, so that no config states it, and its artifact."""
    torch.manual_seed(0)
    oto = OTO(llama(), tokens())
    oto.random_set_zero_groups(0.5)
    return oto, oto.construct_subnet(tmp_path_factory.mktemp("free"))


def again_slim(oto, subnet):
    second = OTO(subnet.model, tokens())
    second.random_set_zero_groups(0.2, seed=1)
    return second.construct_subnet().model


OF = {
    "itself": lambda oto, subnet: subnet.model,
    "a part": lambda oto, subnet: subnet.model.model,
    "a copy": lambda oto, subnet: copy.deepcopy(subnet.model),
    "a pickle": lambda oto, subnet: pickle.loads(pickle.dumps(subnet.model)),
    "loaded": lambda oto, subnet: load_subnet(subnet.path, oto.model),
    "a second round": again_slim,
}


@pytest.mark.parametrize("name", OF)
def test_the_model_itself_writes_no_folder_that_its_class_cannot_read(free, tmp_path, name):
    model = OF[name](*free)
    with pytest.raises(
        EmitterError, match=r"states its sizes: [^$]*its config makes it[^$]*from_pretrained would refuse"
    ):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(EmitterError, match="states its sizes"):
        model.save_pretrained(str(tmp_path / "x"))
    with pytest.warns(UnstatedWarning, match=r"checkpoint-7 can be resumed from") as caught:
        model.save_pretrained(tmp_path / "checkpoint-7")
    assert caught[0].filename == __file__
    model = copy.deepcopy(model)
    del model.save_pretrained  # as the documentation says
    model.save_pretrained(tmp_path / "x")


def test_a_model_that_shrank_in_training(tmp_path):
    """A Trainer's checkpoints are written and resumed from; what it saves in the end is refused."""
    pytest.importorskip("accelerate")
    model = llama()
    oto = OTO(model, {"input_ids": tokens()})
    optimizer = oto.hesso(
        lr=0.01, target_macs=0.7, start_pruning_step=0, pruning_steps=2, pruning_periods=1, average_steps=1
    )

    class Shrink(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            if state.global_step == 2:
                oto.shrink(optimizer)

    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        save_steps=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=2,
    )
    words = tokens()[0]
    data = [{"input_ids": words, "labels": words}] * 8
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = transformers.Trainer(
        model, settings, train_dataset=data, optimizers=(optimizer, schedule), callbacks=[Shrink()]
    )
    with pytest.warns(UnstatedWarning, match=r"checkpoint-4 can be resumed from"):
        trainer.train()
    assert optimizer.num_removed and (tmp_path / "checkpoint-4" / "model.safetensors").exists()
    with pytest.raises(EmitterError, match="states its sizes"):
        trainer.save_model(str(tmp_path / "final"))
    copied = copy.deepcopy(model)
    del model.save_pretrained
    with pytest.raises(EmitterError, match="states its sizes"):
        copied.save_pretrained(tmp_path / "final")


def test_a_class_that_a_hub_reads_by_its_keywords(tmp_path):
    hub = pytest.importorskip("huggingface_hub")

    class Net(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self, width=8):
            super().__init__()
            self.into, self.out = nn.Linear(3, width), nn.Linear(width, 2)

        def forward(self, x):
            return self.out(self.into(x).relu())

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole, self.pruned = Net(), Net()

        def forward(self, x):
            return self.whole(x) + self.pruned(x)

    oto = OTO(Two(), torch.randn(1, 3), skip_patterns=["whole.*"])
    oto.random_set_zero_groups(0.3)
    subnet = oto.construct_subnet()
    with pytest.raises(EmitterError, match=r"Net has sizes that nothing it is made from states"):
        subnet.model.pruned.save_pretrained(tmp_path / "x")
    subnet.model.whole.save_pretrained(tmp_path / "whole")  # what kept its sizes writes as ever
    oto.model.pruned.save_pretrained(tmp_path / "full")
    assert Net.from_pretrained(tmp_path / "full").into.weight.equal(oto.model.pruned.into.weight)
    gone = subnet.model.pruned.save_pretrained
    del subnet
    with pytest.raises(EmitterError, match="the slim Net is not there any more"):
        gone(tmp_path / "x")


@pytest.mark.filterwarnings("ignore::oto.errors.UnstatedWarning")
def test_a_class_that_writes_no_folder(tmp_path):
    oto = OTO(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(1, 3), layout="uniform")
    oto.random_set_zero_groups(0.5)
    with pytest.raises(EmitterError, match="Sequential has no config"):
        oto.construct_subnet().save_pretrained(tmp_path / "x")


def test_nothing_is_overwritten(subnet, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds mine\.txt"):
        subnet.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_tokenizers_come_along(subnet, tmp_path):
    class Words:
        def save_pretrained(self, folder):
            (Path(folder) / "words.txt").write_text("a b")

    files = subnet.save_pretrained(tmp_path / "given", tokenizer=Words())
    assert "words.txt" in {p.name for p in files}
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "merges.txt", "config.json", "model.safetensors.index.json", "pytorch_model.bin"):
        (source / name).write_text("source")
    subnet.model.config._name_or_path = str(source)
    files = subnet.save_pretrained(tmp_path / "found")
    assert {p.name for p in files} >= {"tokenizer.json", "merges.txt", "config.json", "model.safetensors"}
    assert not {"model.safetensors.index.json", "pytorch_model.bin"} & {p.name for p in files}
    assert (tmp_path / "found" / "config.json").read_text() != "source"


def test_what_reads_otherwise_is_refused(subnet, tmp_path, monkeypatch):
    kind = type(subnet.model)
    read = kind.from_pretrained

    def otherwise(folder, **options):
        model = read(folder, **options)
        with torch.no_grad():
            model.model.norm.weight[0] += 1
        return model

    monkeypatch.setattr(kind, "from_pretrained", otherwise)
    with pytest.raises(ArtifactError, match=r"reads otherwise: model\.norm\.weight"):
        subnet.save_pretrained(tmp_path / "x")


def test_the_artifact_of_a_stock_class_loads_too(tmp_path):
    oto = OTO(llama(), tokens(), layout="uniform")
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet(tmp_path / "out", program=True)
    again = load_subnet(tmp_path / "out", lambda: transformers.LlamaForCausalLM(oto.model.config))
    assert type(again) is type(oto.model) and again.config.hidden_size == subnet.model.config.hidden_size < 64
    x = tokens()
    assert torch.equal(again(x).logits, subnet.model(x).logits)
    assert torch.allclose(load_subnet(tmp_path / "out")(x)["logits"], subnet.model(x).logits, atol=1e-5)


def test_half_precision(tmp_path):
    oto = OTO(llama().bfloat16(), tokens(), layout="uniform")
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet()
    assert subnet.emitter == "config" and {p.dtype for p in subnet.model.parameters()} == {torch.bfloat16}
    subnet.save_pretrained(tmp_path / "x")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert again.dtype == torch.bfloat16


LOAD_TIMM = """
import sys, torch
sys.modules["oto"] = None  # an import of it fails
import timm
folder = sys.argv[1]
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
x, wanted = torch.load(folder + "/answer")
with torch.no_grad():
    print(float((model(x) - wanted).abs().max() / wanted.abs().max()), sum(p.numel() for p in model.parameters()))
"""


def test_a_model_of_timm_is_made_again_by_its_keywords(tmp_path):
    timm = pytest.importorskip("timm")
    name, options = "vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "num_classes": 5}
    x = torch.randn(2, 3, 32, 32)
    model = lively(timm.create_model(name, **options), x)
    oto = OTO(model, x, layout="uniform")
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet()
    assert subnet.emitter == "config" and subnet.config == {"mlp_ratio": 2.0}
    again = timm.create_model(name, **options, **subnet.config).eval()
    again.load_state_dict(subnet.model.state_dict())
    assert torch.equal(again(x), subnet.model(x))
    timm.models._hub.save_for_hf(subnet.model, tmp_path)
    torch.save((x, model(x).detach()), tmp_path / "answer")
    done = subprocess.run([sys.executable, "-c", LOAD_TIMM, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    error, parameters = map(float, done.stdout.split())
    assert error < 1e-5 and parameters < 0.75 * sum(p.numel() for p in model.parameters())


# What a reader needs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_a_stock_folder_is_read_by_who_divides_the_width_by_the_heads(family, tmp_path):
    heads = TINY | {"num_attention_heads": 8, "num_key_value_heads": 4}
    model, given = zoo.from_config(f"{family}ForCausalLM", f"{family}Config", tokens, **heads)()
    subnets = {}
    for layout in ("uniform", "stock"):
        oto = OTO(lively(copy.deepcopy(model), given), given, layout=layout)
        stream = {"model.embed_tokens.weight": 48}
        kept = oto.preview(target_params=0.35).kept if layout == "stock" else stream
        with torch.no_grad():
            for group in oto.node_groups:
                for piece in group.zeros if group.prunable else ():
                    piece.of(oto.model.get_parameter(piece.parameter))[kept.get(group.name, group.size) :] = 0
        subnets[layout] = oto.construct_subnet()
        subnets[layout].save_pretrained(tmp_path / layout)
    stock, uniform = (json.loads((tmp_path / layout / "config.json").read_text()) for layout in ("stock", "uniform"))
    assert stock["hidden_size"] == stock["num_attention_heads"] * 8 < 64
    assert uniform["hidden_size"] == 48 and uniform["num_attention_heads"] == 8
    note = "readers have to take head_dim = 8 from its config"
    assert note in str(subnets["uniform"]) and note in (tmp_path / "uniform" / "README.md").read_text()
    card = (tmp_path / "stock" / "README.md").read_text()
    assert note not in str(subnets["stock"]) and note not in card
    assert card.startswith("---\nlibrary_name: transformers") and f"transformers {transformers.__version__}" in card
    assert "| parameters |" in card and "verified" in card
    slim = subnets["stock"].model
    plain = {key: value for key, value in stock.items() if key != "head_dim"}  # as a reader that divides has it
    again = type(slim)(type(slim.config).from_dict(plain)).eval()
    again.load_state_dict(slim.state_dict())
    torch.testing.assert_close(again(given).logits, slim(given).logits)


def test_experts_are_as_their_kernel_takes_them_in_any_dtype():
    model, given = zoo.DECODERS["mixtral"]()
    oto = OTO(lively(model, given).float(), given, layout="uniform")
    experts = [g for g in oto.node_groups if g.prunable and any("experts" in piece.parameter for piece in g.slices)]
    assert experts and all(g.divisor % 8 == 0 for g in experts)
    oto.random_set_zero_groups(0.4)
    slim = oto.construct_subnet().model.bfloat16()
    assert slim(given).logits.isfinite().all()
