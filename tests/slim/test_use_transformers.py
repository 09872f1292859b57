"""What users of transformers do with a slim model: its trainer, a pipeline, adapters, eight bits."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oto import OTO, load_subnet
from oto.errors import ShrinkError
from tests.zoo import transformers_zoo as zoo
from tests.zoo.models import TINY, lively, tokens

transformers = pytest.importorskip("transformers")

WORDS = [f"w{i}" for i in range(95)]


def made(model: str, config: str, **options: Any) -> tuple[nn.Module, OTO]:
    transformers.logging.set_verbosity_error()
    full, given = zoo.from_config(model, config, lambda: {"input_ids": tokens()}, **options)()
    return full, OTO(lively(full, given), given)


class Sentences(torch.utils.data.Dataset):
    """Of rows of tokens that are not equally long, whether most are small."""

    def __len__(self) -> int:
        return 128

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(5, 100, (6 + index % 5,), generator=torch.Generator().manual_seed(index))
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": int((ids < 52).sum() * 2 > len(ids)),
        }


def collated(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    padded = {
        name: nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True)
        for name in ("input_ids", "attention_mask")
    }
    return padded | {"labels": torch.tensor([row["labels"] for row in rows])}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


PIPELINE = """
import sys, json, warnings
sys.modules["oto"] = None  # an import of it fails
warnings.simplefilter("ignore")
import torch, transformers
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
classify = transformers.pipeline("text-classification", model=sys.argv[1], top_k=None)
print(json.dumps({
    "class": type(classify.model).__name__, "parameters": classify.model.num_parameters(),
    "scores": [sorted([d["label"], d["score"]] for d in one) for one in classify(json.loads(sys.argv[2]))],
}))
"""


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_from_the_trainer_to_a_pipeline(tmp_path: Path):
    pytest.importorskip("accelerate")
    transformers.logging.set_verbosity_error()
    config = transformers.BertConfig(**TINY, max_position_embeddings=32, hidden_dropout_prob=0.0)
    model = transformers.BertForSequenceClassification(config)
    oto = OTO(model, {"input_ids": tokens()}, layout="uniform")
    optimizer = oto.hesso(variant="adamw", lr=2e-3, target_group_sparsity=0.4, total_steps=24)
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path / "runs",
        bf16=True,
        use_cpu=True,
        per_device_train_batch_size=16,
        num_train_epochs=3,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    options = {"eval_dataset": Sentences(), "data_collator": collated, "compute_metrics": accuracy}
    trainer = transformers.Trainer(model, arguments, train_dataset=Sentences(), optimizers=(optimizer, None), **options)
    trainer.train()
    wanted = trainer.evaluate()

    subnet = oto.construct_subnet()
    assert type(subnet.model) is type(model) and "forward" not in vars(subnet.model)
    assert subnet.cost_after.params < 0.85 * subnet.cost_before.params
    arguments.bf16 = False
    found = transformers.Trainer(subnet.model, arguments, **options).evaluate()
    assert abs(found["eval_loss"] - wanted["eval_loss"]) < 0.02  # bfloat16 against float32
    assert abs(found["eval_accuracy"] - wanted["eval_accuracy"]) < 0.04
    assert subnet.model(tokens(), labels=torch.tensor([0, 1])).loss > 0

    words = tokenizer()
    files = subnet.save_pretrained(tmp_path / "slim", tokenizer=words)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in files}
    texts = ["w3 w4 w90", "w80 w70 w60 w50 w9"]
    done = subprocess.run(
        [sys.executable, "-c", PIPELINE, tmp_path / "slim", json.dumps(texts)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["class"] == "BertForSequenceClassification"
    assert told["parameters"] == sum(p.numel() for p in subnet.model.parameters())
    for text, scores in zip(texts, told["scores"], strict=True):
        given = words(text, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():  # the trainer's autocast is around the forward still
            chances = type(model).forward(subnet.model, **given).logits[0].softmax(-1)
        assert torch.allclose(torch.tensor([score for _, score in scores]), chances, atol=1e-5)


TASKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", TINY, {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}),
    "llama": (
        "LlamaForCausalLM",
        zoo.GQA,
        {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]},
    ),
}


@pytest.fixture(scope="module", params=TASKS)
def slim(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, options, lora = TASKS[request.param]
    full, oto = made(model, model.partition("For")[0] + "Config", **options)
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet()
    assert subnet.emitter == "module" and type(subnet.model) is type(full)
    return subnet.model, lora


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_adapters_train_and_are_merged(slim):
    peft = pytest.importorskip("peft")
    base, options = slim
    x, y = tokens(5, 3), torch.tensor([0, 1, 0])
    wanted = base(x).logits.detach()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, **options))
    assert torch.allclose(adapted(x).logits, wanted, atol=1e-6)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad and "lora" in name}
    assert len(trained) == 2 * 2 * len(options["target_modules"])
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.3)
    losses = []
    for _ in range(4):
        loss = adapted(x, labels=y if options["task_type"] == "SEQ_CLS" else x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    adapted.eval()
    apart = adapted(x).logits.detach()
    merged = adapted.merge_and_unload()
    assert type(merged) is type(base) and merged.state_dict().keys() == before.keys()
    assert torch.allclose(merged(x).logits, apart, atol=1e-4)
    assert not torch.allclose(apart, wanted, atol=1e-2)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_eight_bits(slim):
    quantization = pytest.importorskip("torchao.quantization")
    base, _ = slim
    x = tokens(5, 3)
    wanted = base(x).logits.detach()
    quantized = copy.deepcopy(base)
    quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig())
    layers = [m for m in quantized.modules() if isinstance(m, nn.Linear)]
    assert len(layers) > 10 and all(m.weight.dtype == torch.int8 or "Int8" in type(m.weight).__name__ for m in layers)
    error = float((quantized(x).logits - wanted).abs().max() / wanted.abs().max())
    assert 0 < error < 0.05


def shrinking(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_hidden_layers=2,
        vocab_size=50,
        head_dim=4,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    x = {"input_ids": torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))}
    oto = OTO(model, x, layout="uniform", **options)
    optimizer = oto.hesso(
        lr=0.01, target_group_sparsity=0.55, scope="local", start_pruning_step=1, pruning_steps=4, pruning_periods=2
    )

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model.train()(**x).logits.square().mean().backward()
            optimizer.step()

    return oto, model, x, optimizer, train


def test_a_model_that_shrank_in_training_is_stated_by_its_config(tmp_path):
    oto, model, x, optimizer, train = shrinking(skip_patterns=["model.embed_tokens.weight"])
    first = copy.deepcopy(model)
    for number in (1, 2):
        train(4)
        oto.shrink(optimizer)
        config = model.config
        assert config.intermediate_size == model.model.layers[0].mlp.up_proj.out_features < 48
        assert {c.config.intermediate_size for c in model.modules() if hasattr(c, "config")} == {
            config.intermediate_size
        }
        model.save_pretrained(tmp_path / f"folder {number}")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"folder {number}")
        assert torch.equal(again.eval()(**x).logits, model.eval()(**x).logits)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.out_features == 4 * config.num_attention_heads < 32
    assert attention.k_proj.out_features == 4 * config.num_key_value_heads <= 16
    assert first.config.intermediate_size == 48
    for second in (oto, OTO(model, x, layout="uniform")):  # nothing more, and half of what is left
        if second is not oto:
            second.random_set_zero_groups(0.5)
        subnet = second.construct_subnet(tmp_path / "out")
        assert subnet.emitter == "config" and not subnet.notes
        loaded = load_subnet(tmp_path / "out", first)
        assert torch.equal(loaded(**x).logits, subnet.model(**x).logits)
    assert subnet.config["intermediate_size"] < config.intermediate_size


def test_what_no_config_could_state_does_not_shrink():
    oto, model, x, optimizer, train = shrinking()
    train(4)
    before = model.eval()(**x).logits
    with pytest.raises(ShrinkError, match=r"no config can state a LlamaForCausalLM(.*\n)*.*skip_patterns"):
        oto.shrink(optimizer)
    assert torch.equal(model.eval()(**x).logits, before) and model.config.intermediate_size == 48


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (8, 1)])
def test_query_heads_of_a_kv_head_are_stated_by_what_only_another_path_reads(heads, kv_heads):
    """Llama leaves grouped queries to the kernel; once keys and values differ in width, its class repeats them."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=8,
        num_attention_heads=heads, num_key_value_heads=kv_heads,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    oto = OTO(model, {"input_ids": torch.randint(64, (2, 9))})
    queries = [group for group in oto.node_groups if group.name.endswith("o_proj.weight")]
    assert [group.size for group in queries] == [heads // kv_heads] * 2
    assert all(group.prunable for group in queries)
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet()
    assert subnet.emitter == "module"
    assert any(len(subnet.kept[group.name]) < group.size for group in queries)
