"""Lesson 2: an encoder of the BERT type that answers questions, with the official metric of SQuAD v1.1.

    python tutorials/02_bert_squad.py                         # MiniLM-L6 on XQuAD-en, about five minutes
    python tutorials/02_bert_squad.py --encoder bert-base-uncased --train-file train-v1.1.json \
        --dev-file dev-v1.1.json --empty-windows --epochs 10 --lr 3e-5 --batch-size 32 --max-length 384 --stride 128 \
        --device cuda

The training code is the usual one for SQuAD: windows over long paragraphs, the logits of the start and of the end,
AdamW without decay of biases and norms, a linear learning rate. XQuAD-en is 1,190 questions of the SQuAD v1.1 dev set;
some of four fifths of its paragraphs are trained on here, and some of the rest are asked. That is a hundredth of SQuAD:
see the figures as a check that it learns and that slim equals zeroed, not as a result.
"""

from __future__ import annotations

import copy
import json
import re
import string
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import compare, parser, start
from data import from_tar, minilm
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
from transformers.utils import logging as hf_logging

from oto import OTO

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()

# ---------------------------------------------------------------------------------------------- 1. questions


def questions(squad: dict[str, Any]) -> list[dict[str, Any]]:
    """A file in the format of SQuAD v1.1, question by question."""
    return [
        {"context": p["context"], "question": q["question"], "answers": q["answers"], "paragraph": (i, j)}
        for i, article in enumerate(squad["data"])
        for j, p in enumerate(article["paragraphs"])
        for q in p["qas"]
    ]


def load(args: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Questions to train on, and questions to ask."""
    if args.train_file:
        return tuple(questions(json.loads(Path(f).read_text())) for f in (args.train_file, args.dev_file))  # type: ignore[return-value]
    asked = questions(json.loads(from_tar("text.tar.xz", "xquad.en.json")))
    held_out = {p for i, p in enumerate(dict.fromkeys(q["paragraph"] for q in asked)) if i % 5 == 0}
    train = [q for q in asked if q["paragraph"] not in held_out]
    test = [q for q in asked if q["paragraph"] in held_out]
    return train[: args.questions], test[: args.test_questions]


def windows(tokenizer: Any, asked: list[dict[str, Any]], args: Any) -> dict[str, Any]:
    """Paragraphs cut into overlapping windows of tokens, and in which of them the answer lies where."""
    cut = tokenizer(
        [q["question"].strip() for q in asked],
        [q["context"] for q in asked],
        truncation="only_second",
        max_length=args.max_length,
        stride=args.stride,
        padding="max_length",
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    starts, ends = [], []
    for window, source in enumerate(cut["overflow_to_sample_mapping"].tolist()):
        answer = asked[source]["answers"][0]
        first, last = answer["answer_start"], answer["answer_start"] + len(answer["text"])
        inside = [
            i
            for i, (part, (a, b)) in enumerate(
                zip(cut.sequence_ids(window), cut["offset_mapping"][window].tolist(), strict=True)
            )
            if part == 1 and a < last and b > first
        ]
        whole = inside and cut["offset_mapping"][window][inside[0]][0] <= first
        starts.append(inside[0] if whole else 0)  # token 0 stands for: not in this window
        ends.append(inside[-1] if whole else 0)
    inputs = {name: cut[name] for name in tokenizer.model_input_names}
    labels = {"start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)}
    return {"inputs": inputs, "labels": labels, "cut": cut}


# ---------------------------------------------------------------------------------------------- 2. the metric


def normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: as the official script does."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def score(said: str, answers: list[str]) -> tuple[float, float]:
    """Exact match and F1 over words, of the answer that fits best."""

    def f1(a: str, b: str) -> float:
        a_words, b_words = normalize(a).split(), normalize(b).split()
        common = sum((Counter(a_words) & Counter(b_words)).values())
        return 2 * common / (len(a_words) + len(b_words)) if common else 0.0

    return max(float(normalize(said) == normalize(a)) for a in answers), max(f1(said, a) for a in answers)


@torch.no_grad()
def evaluate(model: nn.Module, asked: list[dict[str, Any]], cut: dict[str, Any], args: Any) -> list[str]:
    """Exact match and F1 in per cent, of the likeliest span of at most 30 tokens in any window; and the mean loss."""
    model.to(args.device).eval()
    losses = []
    best = [(-torch.inf, "")] * len(asked)
    rows = torch.arange(len(cut["inputs"]["input_ids"]))
    for index in rows.split(32):
        said = model(**{name: t[index].to(args.device) for name, t in (cut["inputs"] | cut["labels"]).items()})
        losses.append(float(said.loss) * len(index))
        for window, begin, end in zip(index.tolist(), said.start_logits.cpu(), said.end_logits.cpu(), strict=True):
            source = int(cut["cut"]["overflow_to_sample_mapping"][window])
            inside = torch.tensor([part == 1 for part in cut["cut"].sequence_ids(window)])
            valid = (inside[:, None] & inside[None, :]).triu().tril(29)
            spans = (begin[:, None] + end[None, :]).masked_fill(~valid, -torch.inf)
            value, where = spans.flatten().max(0)
            if value > best[source][0]:
                a, b = divmod(int(where), spans.shape[1])
                offsets = cut["cut"]["offset_mapping"][window]
                best[source] = (float(value), asked[source]["context"][int(offsets[a][0]) : int(offsets[b][1])])
    scores = [score(said, [a["text"] for a in q["answers"]]) for q, (_, said) in zip(asked, best, strict=True)]
    exact, f1 = (f"{100 * sum(values) / len(scores):.2f}" for values in zip(*scores, strict=True))
    return [exact, f1, f"{sum(losses) / len(rows):.4f}"]


# ---------------------------------------------------------------------------------------------- 3. the lesson


def main() -> None:
    flags = parser(__doc__, "02_bert_squad")
    flags.add_argument("--encoder", help="a folder or a name on the Hub; by default MiniLM-L6 out of a Python package")
    flags.add_argument("--train-file", help="train-v1.1.json; by default XQuAD-en, see above")
    flags.add_argument("--dev-file", help="dev-v1.1.json")
    flags.add_argument("--questions", type=int, default=700, help="of XQuAD-en's 950, train on so many")
    flags.add_argument(
        "--empty-windows", action="store_true", help="train on windows without the answer, as SQuAD does"
    )
    flags.add_argument("--layers", type=int, help="the encoder's first so many; by default all")
    flags.add_argument("--test-questions", type=int, default=80)
    flags.add_argument("--max-length", type=int, default=128, help="tokens of a window")
    flags.add_argument("--stride", type=int, default=32, help="tokens that neighboring windows share")
    flags.add_argument("--epochs", type=int, default=2)
    flags.add_argument("--batch-size", type=int, default=8)
    flags.add_argument("--lr", type=float, default=2e-4)
    flags.add_argument("--target-macs", type=float, default=0.75)
    smoke = {
        "questions": 48,
        "test_questions": 4,
        "max_length": 64,
        "stride": 16,
        "batch_size": 4,
        "epochs": 1,
        "layers": 2,
    }
    args = start(flags, smoke)

    folder = args.encoder or minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    layers = {"num_hidden_layers": args.layers} if args.layers else {}
    model = AutoModelForQuestionAnswering.from_pretrained(folder, **layers).to(args.device)
    untrained = copy.deepcopy(model)
    train, test = load(args)
    seen, asked = windows(tokenizer, train, args), windows(tokenizer, test, args)
    batches = seen["inputs"] | seen["labels"]
    if not args.empty_windows:  # half of all where windows are short
        batches = {name: t[seen["labels"]["end_positions"] > 0] for name, t in batches.items()}
    rows = len(batches["input_ids"])
    print(f"{len(train):,} questions to train on in {rows:,} windows, {len(test):,} to ask")
    before = evaluate(model, test, asked, args)

    # The example input of a Hugging Face model is a dict, as its tokenizer gives it.
    example = {name: t[:2].to(args.device) for name, t in seen["inputs"].items()}
    oto = OTO(model, example)

    # Weight decay in groups, as everybody does it. The groups need no names.
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    size = args.batch_size
    steps = args.epochs * (rows // size)
    optimizer = oto.hesso(
        params=[{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}],
        variant="adamw",
        lr=args.lr,
        target_macs=args.target_macs,
        total_steps=steps,
    )
    print(optimizer.plan(), "\n")
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / (0.1 * steps + 1), (steps - step) / (0.9 * steps)))

    generator = torch.Generator().manual_seed(args.seed)
    model.train()
    with tqdm(total=steps, unit="step", disable=None) as bar:
        for _ in range(args.epochs):
            for index in torch.randperm(rows, generator=generator).split(size):
                if len(index) < size:
                    continue
                batch = {name: t[index].to(args.device) for name, t in batches.items()}
                loss = model(**batch).loss
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
            tqdm.write(f"loss {loss.item():.3f}; {optimizer.progress}")

    subnet = oto.construct_subnet(out_dir=args.out)
    rows_of = {
        "before": (untrained, subnet.cost_before, before),
        "zeroed": (model, subnet.cost_before, evaluate(model, test, asked, args)),
        "slim": (subnet.model, subnet.cost_after, evaluate(subnet.model, test, asked, args)),
    }
    batch = {name: t[:8] for name, t in asked["inputs"].items()}
    compare(rows_of, ["exact match", "F1", "loss"], lambda m: m(**batch), f"8 × {args.max_length} tokens", args.passes)
    print(subnet)


if __name__ == "__main__":
    main()
