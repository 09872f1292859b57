"""A student learns what a teacher says: the formulas, in float64, and every loop that it trains in."""

from __future__ import annotations

import copy
import math
import os

import pytest
import torch
from torch import nn

from oto import OTO
from oto.distill import (
    Distillation,
    SoftTargets,
    attention_divergence,
    cosine_distance,
    divergence,
    divergence_from_top,
    soft_targets,
)
from oto.errors import OptionError
from oto.integrations import distill
from tests.optim.test_distributed import GLOO, begin, in_processes

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def doubles():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def net(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 4))


def task(y: torch.Tensor):
    return lambda output: nn.functional.cross_entropy(output, y)


# Formulas -------------------------------------------------------------------------------------------------------------


def by_hand(student, teacher, temperature):
    """``T² Σ p log(p / q)``, entry by entry."""
    total = 0.0
    p, q = ([math.exp(v / temperature) for v in x.tolist()] for x in (teacher, student))
    for a, b in zip(p, q, strict=True):
        total += a / sum(p) * math.log(a / sum(p) / (b / sum(q)))
    return temperature**2 * total


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logits_are_compared_by_the_formula(temperature):
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    expected = torch.tensor([by_hand(s, t, temperature) for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(divergence(student, teacher, temperature), expected, **CLOSE)


def test_a_class_that_both_rule_out_counts_nothing():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    ruled = [torch.cat([x, torch.full((5, 1), -torch.inf)], -1).requires_grad_() for x in (student, teacher)]
    found = divergence(*ruled)
    torch.testing.assert_close(found, divergence(student, teacher), **CLOSE)
    found.sum().backward()
    assert ruled[0].grad.isfinite().all()


def test_gradients_are_of_one_size_at_every_temperature():
    """At high ones they are those of the squared difference of centered logits (Hinton et al., equation 4)."""
    student, teacher = torch.randn(6, requires_grad=True), torch.randn(6)
    (found,) = torch.autograd.grad(divergence(student, teacher, 1e5), student)
    expected = (student - student.mean() - teacher + teacher.mean()) / 6
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=0)  # the next term is of order 1 / T


@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_likeliest_classes_and_the_rest_as_one(k):
    student, teacher, T = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7), 2.0
    p, q = (teacher / T).softmax(-1), (student / T).softmax(-1)
    order = p.argsort(-1, descending=True)
    p, q = p.gather(-1, order), q.gather(-1, order)
    p, q = (torch.cat([x[:, :k], x[:, k:].sum(-1, keepdim=True)], -1)[:, : min(k + 1, 7)] for x in (p, q))
    expected = T**2 * (p * (p / q).log()).sum(-1)
    targets = soft_targets(teacher, k, T)
    found = divergence_from_top(student, targets, T)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(
        *(torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (found, expected)), **CLOSE
    )
    whole = divergence(student, teacher, T)
    assert (found <= whole + 1e-12).all() and ((found == whole).all() or k < 7 or torch.allclose(found, whole))


def test_stored_in_half_precision_nothing_is_undefined():
    """What was rounded may sum to more than 1: here it does, by 2e-4."""
    targets = soft_targets(torch.tensor([[0.56, 0.44, 1e-9, 1e-9]]).log(), 2)
    targets = targets._replace(log_probs=targets.log_probs.half())
    assert targets.log_probs.double().exp().sum() > 1
    student = torch.tensor([[20.0, 1.0, 0.0, 0.0]], requires_grad=True)
    found = divergence_from_top(student, targets)
    found.sum().backward()
    assert found.isfinite().all() and student.grad.isfinite().all()


def test_directions_of_hidden_states():
    a, b = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    expected = 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    torch.testing.assert_close(cosine_distance(a, b, 1), expected, **CLOSE)


def test_attention_head_by_head_or_on_average():
    a, b = (torch.randn(2, 6, 4, 4).tril().masked_fill(~torch.ones(4, 4).tril().bool(), -torch.inf) for _ in "ab")
    q, p = a.softmax(-1), b.softmax(-1)
    one = (p * (p / q).log()).nan_to_num(0).sum(-1)
    torch.testing.assert_close(attention_divergence(q, p), one.mean(1), **CLOSE)
    fewer = q[:, :2]
    p, q = p.mean(1), fewer.mean(1)
    torch.testing.assert_close(
        attention_divergence(fewer, b.softmax(-1)), (p * (p / q).log()).nan_to_num(0).sum(-1), **CLOSE
    )


# The loss -------------------------------------------------------------------------------------------------------------


def test_the_parts_and_their_weights():
    teacher, student = net(), net()
    x, y = torch.randn(6, 3), torch.randint(4, (6,))
    told = Distillation(teacher, weight=0.9, temperature=4.0, logits=2.0, hidden=["1"], hidden_weight=3.0)
    found = told(student, x, task(y))
    kl = divergence(student(x), teacher(x), 4.0).mean()
    cosine = cosine_distance(student[:2](x), teacher[:2](x)).mean()
    torch.testing.assert_close(found, 0.1 * task(y)(student(x)) + 0.9 * (2 * kl + 3 * cosine), **CLOSE)
    torch.testing.assert_close(told.parts, {"logits": kl, "hidden": cosine, "task": task(y)(student(x))}, **CLOSE)
    assert not any(part.requires_grad for part in told.parts.values())


def test_the_teacher_is_a_copy_that_stays_what_it_was():
    model, x = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)), torch.randn(6, 3)
    before = copy.deepcopy(model).eval()(x)
    told = Distillation.of(model, weight=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        told(model, x).backward()
        optimizer.step()
    assert torch.equal(told.teacher(x), before), "neither trained, nor its statistics, nor its dropout"
    assert not list(told.parameters()) and not told.state_dict() and not told.train().teacher.training
    assert all(p.grad is None and not p.requires_grad for p in told.teacher.parameters())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in told.teacher.parameters()}


def test_tied_parameters_stay_tied_and_every_option_of_the_copy_holds():
    model = net()
    model[2].weight = nn.Parameter(torch.randn(4, 8))
    model.again = nn.Linear(8, 4)
    model.again.weight = model[2].weight
    model.register_buffer("count", torch.ones(2, dtype=torch.int64))
    teacher = Distillation.of(model, dtype=torch.bfloat16, device="cpu", offload=True).teacher
    assert teacher.again.weight is teacher[2].weight
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16} and teacher.count.dtype == torch.int64


@pytest.mark.parametrize("offload", [False, True])
def test_a_teacher_in_half_precision_and_one_that_is_lent_its_parameters(offload):
    model, x = net(), torch.randn(6, 3)
    told = Distillation.of(model, dtype=torch.bfloat16, weight=1.0, hidden=["1"], offload=offload)
    student = net()
    loss = told(student, x)
    whole = Distillation.of(model, weight=1.0, hidden=["1"])(student, x)
    torch.testing.assert_close(loss, whole, rtol=0.05, atol=0.02)  # bfloat16 has 8 bits
    loss.backward()
    assert student[0].weight.grad.dtype == torch.float64


def test_targets_instead_of_a_teacher_through_a_loader():
    teacher, student = net(), net()
    x, y = torch.randn(6, 3), torch.randint(4, (6,))
    stored = [(a, b, soft_targets(teacher(a), 4, 2.0)) for a, b in zip(x, y, strict=True)]
    told = Distillation(None, temperature=2.0)
    for a, b, targets in torch.utils.data.DataLoader(stored, batch_size=3):
        assert isinstance(targets, SoftTargets) and targets.log_probs.shape == (3, 4)
        expected = Distillation(teacher, temperature=2.0)(student, a, task(b))
        torch.testing.assert_close(told(student, a, task(b), targets=targets), expected, **CLOSE)
    with pytest.raises(OptionError, match="made at another temperature than 3"):
        Distillation(None, temperature=3.0)(student, a, task(b), targets=targets)


class Tagger(nn.Module):
    """A class for each token, or with ``whole`` one for all; as models of transformers are called."""

    def __init__(self, whole=False):
        super().__init__()
        self.body, self.head, self.whole = nn.Linear(3, 8), nn.Linear(8, 4), whole

    def forward(self, x, attention_mask=None, labels=None):
        logits = self.head(self.body(x)[:, 0] if self.whole else self.body(x))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        return {"loss": loss, "logits": logits}


def test_padding_counts_nothing():
    teacher, student, x = Tagger(), Tagger(), torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    found = Distillation(teacher, weight=1.0, hidden=["body"])(student, {"x": x, "attention_mask": mask})
    kl = divergence(student(x)["logits"], teacher(x)["logits"])[mask.bool()].mean()
    cosine = cosine_distance(student.body(x), teacher.body(x))[mask.bool()].mean()
    torch.testing.assert_close(found, kl + cosine, **CLOSE)
    for model in (teacher, student):
        model.whole = True
    found = Distillation(teacher, weight=1.0, logits=1e-9, hidden=["body"])(student, {"x": x, "attention_mask": mask})
    distances = cosine_distance(student.body(x), teacher.body(x))
    torch.testing.assert_close(found, (distances[0].mean() + distances[1, :2].mean()) / 2, rtol=0, atol=1e-7)


def test_batches_of_different_lengths_accumulate_to_the_whole():
    """With the count of all positions the gradient of the parts is that of all of it at once, to the last bits."""
    teacher, student, x = Tagger(), Tagger(), torch.randn(4, 5, 3)
    mask = torch.arange(5) < torch.tensor([5, 1, 2, 4])[:, None]
    told = Distillation(teacher, weight=1.0, hidden=["body"])
    told(student, {"x": x, "attention_mask": mask}).backward()
    whole = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        told(student, {"x": x[rows], "attention_mask": mask[rows]}, count=mask.sum()).backward()
    torch.testing.assert_close([p.grad for p in student.parameters()], whole, **CLOSE)


def test_widths_that_differ_need_a_projection_which_is_trained():
    model, x = net(), torch.randn(6, 3)
    oto = OTO(model, x)
    told = Distillation.of(model, weight=1.0, hidden=["1"], projections={"1": nn.Linear(4, 8)})
    bare = Distillation(told.teacher, hidden=["1"])
    oto.random_set_zero_groups(0.5)
    slim = oto.construct_subnet().model
    assert slim[0].out_features == 4
    with pytest.raises(
        OptionError, match=r"'1' have shape \(6, 4\) in the student, and \(6, 8\).*\n.*\n.*projections="
    ):
        bare(slim, x, task(torch.zeros(6).long()))
    told(slim, x).backward()
    assert [tuple(p.shape) for p in told.parameters()] == [(8, 4), (8,)]
    assert all(p.grad.abs().sum() > 0 for p in [*told.parameters(), slim[0].weight])


def test_classes_of_images_are_their_channels():
    teacher, student, x = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 3), torch.randn(2, 3, 6, 6)
    found = Distillation(teacher, weight=1.0, dim=1)(student, x)
    expected = divergence(*(m(x).permute(0, 2, 3, 1) for m in (student, teacher))).mean()
    torch.testing.assert_close(found, expected, **CLOSE)


def test_wrappers_are_looked_through_and_repeated_forwards_are_not_heard():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(checkpoint(self.body, x, use_reentrant=False))

    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args):
            return self.module(*args)

    student, x = Checkpointed(), torch.randn(6, 3)
    told = Distillation.of(student, weight=1.0, hidden=["body"])
    nn.init.normal_(student.head.weight)
    loss = told(Wrapped(student), x)
    loss.backward()
    torch.testing.assert_close(loss, told(student, x), **CLOSE)
    assert not student.body._forward_hooks and not told.teacher.body._forward_hooks
    with pytest.raises(OptionError, match="the student is its own teacher"):
        told(Wrapped(told.teacher), x)


def test_a_compiled_student_has_logits_but_no_hidden_states():
    teacher, student, x = net(), net(), torch.randn(6, 3)
    compiled = torch.compile(student, backend="eager")
    told = Distillation(teacher, weight=1.0)
    torch.testing.assert_close(told(compiled, x), told(student, x), **CLOSE)
    with pytest.raises(OptionError, match=r"'1' ran 0 times in the student.*\n.*\n.*give the model itself"):
        Distillation(teacher, weight=1.0, hidden=["1"])(compiled, x)


def test_a_model_that_is_pruned_with_its_former_self_as_teacher():
    """The zeros stay exact, and the slim model is the zeroed one."""
    model, x, y = net(16), torch.randn(32, 3), torch.randint(4, (32,))
    oto = OTO(model, x[:1])
    told = Distillation.of(model)
    optimizer = oto.hesso(lr=0.1, target_macs=0.5, total_steps=20)
    for _ in range(20):
        optimizer.zero_grad()
        told(model, x, task(y)).backward()
        optimizer.step()
    assert optimizer.progress.over and oto.construct_subnet().model[0].out_features <= 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_loss_is_in_float32(dtype):
    model, student, x = net().float(), net().float(), torch.randn(6, 3).float()
    told = Distillation.of(model, weight=1.0, hidden=["1"])
    with torch.autocast("cpu", dtype):
        loss = told(student, x)
    assert loss.dtype == torch.float32
    loss.backward()
    torch.testing.assert_close(loss, told(student, x), rtol=0.05, atol=0.02)  # bfloat16 has 8 bits


# What is told ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 1.5}, "weight is 1.5"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"logits": 0.0}, "nothing is compared"),
        ({"projections": {"1": nn.Identity()}}, "projections= has 1, which hidden= does not name"),
        ({"teacher": None, "hidden": ["1"]}, "targets= are for logits alone"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Distillation(**({"teacher": net()} | options))


class Said(nn.Module):
    def forward(self, x):
        return {"said": x}


def test_what_is_not_there_is_told():
    model, x, y = net(), torch.randn(6, 3), torch.randint(4, (6,))
    told = Distillation.of(model)
    for call, message in {
        lambda: told(net(), x): "has no loss.*\n.*\n.*lambda output",
        lambda: Distillation(model)(model, x, task(y)): "the student is its own teacher",
        lambda: Distillation(None)(model, x, task(y)): "there is no teacher",
        lambda: Distillation.of(model, hidden=["9"])(model, x, task(y)): "no module is called '9'",
        lambda: Distillation.of(model, hidden={"1": "2"})(net(), x, task(y)): "outputs of '1' have shape",
        lambda: Distillation.of(model, attention=1.0)(net(), x, task(y)): "0 layers of attention",
        lambda: Distillation.of(model, hidden=["1"])(net(), x, task(y), targets=soft_targets(x, 2)): "logits alone",
        lambda: Distillation(None)(net(), x, task(y), targets=soft_targets(x[:3], 2)): "the logits have shape",
        lambda: Distillation(nn.Linear(3, 5))(net(), x, task(y)): r"the logits have shape \(6, 4\) in the student",
        lambda: told(Said(), x, task(y)): "in a dict it is not known what the logits are",
    }.items():
        with pytest.raises(OptionError, match=message):
            call()
    with pytest.raises(OptionError, match="a SGD is no Trainer of transformers"):
        distill(torch.optim.SGD(model.parameters()), told)


# Loops of others ------------------------------------------------------------------------------------------------------


def trainer_of(model, tmp_path, data, **more):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.1, "optim": "sgd"}
    keys = ("compute_loss_func",)
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        **(settings | {k: v for k, v in more.items() if k not in keys}),
    )
    return transformers.Trainer(model, args, train_dataset=data, **{k: v for k, v in more.items() if k in keys})


def test_a_model_of_transformers_with_its_attention_and_its_own_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.BertForTokenClassification(config)
    student = transformers.BertForTokenClassification(config)
    told = Distillation.of(model, weight=0.5, attention=2.0, hidden=["bert.encoder.layer.0", "bert.encoder.layer.1"])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {
        "input_ids": torch.randint(20, (2, 5)),
        "attention_mask": mask,
        "labels": torch.randint(2, (2, 5)),
        "output_attentions": True,
    }
    loss = told(student, batch)
    own, its = (m.eval()(**batch, output_hidden_states=True) for m in (student, model))
    kl = divergence(own.logits, its.logits)[mask.bool()].mean()
    pairs = list(zip(own.hidden_states, its.hidden_states, strict=True))[1:]
    layers = [cosine_distance(a, b)[mask.bool()].mean() for a, b in pairs]
    pairs = zip(own.attentions, its.attentions, strict=True)
    heads = [attention_divergence(a, b)[mask.bool()].mean() for a, b in pairs]
    expected = 0.5 * own.loss + 0.5 * (kl + sum(layers) / 2 + 2 * sum(heads) / 2)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)  # its softmax is in float32


class Unlabeled(Tagger):
    def forward(self, x):
        return super().forward(x)


class Counting(Tagger):
    """Divides its loss by what the whole step has, as models of transformers do."""

    def forward(self, x, labels=None, num_items_in_batch=None, **more):
        said = super().forward(x, labels=labels)
        if num_items_in_batch is not None:
            said["loss"] = said["loss"] * labels.numel() / num_items_in_batch
        return said


@pytest.mark.parametrize("how", ["plain", "loss function", "counting model"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_trainer_takes_the_steps_of_a_plain_loop(tmp_path, how, accumulated):
    kind = {"plain": Tagger, "loss function": Unlabeled, "counting model": Counting}[how]
    teacher, student = kind(), kind()
    data = [{"x": torch.randn(5, 3), "labels": torch.randint(4, (5,))} for _ in range(8)]

    def own(outputs, labels, num_items_in_batch=None):
        losses = nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), reduction="sum")
        return losses / num_items_in_batch

    more = {"compute_loss_func": own} if how == "loss function" else {}
    trained = copy.deepcopy(student)
    trainer = trainer_of(trained, tmp_path, data, gradient_accumulation_steps=accumulated, **more)
    distill(trainer, Distillation(teacher, weight=0.7, hidden=["body"]))
    drawn = []
    trainer.data_collator = lambda rows, collate=trainer.data_collator: drawn.append(collate(rows)) or drawn[-1]
    trainer.train()

    told = Distillation(teacher, weight=0.7, hidden=["body"])
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        for batch in drawn[step * accumulated : (step + 1) * accumulated]:
            y = batch["labels"].flatten()
            loss = told(student, {"x": batch["x"]}, lambda o, y=y: task(y)(o["logits"].flatten(0, 1)))
            (loss / accumulated).backward()
        optimizer.step()
    for a, b in zip(trained.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_the_trainer_finds_targets_in_its_batches(tmp_path):
    teacher, student = Tagger(), Tagger()
    data = [{"x": torch.randn(5, 3), "labels": torch.randint(4, (5,))} for _ in range(4)]
    stored = [{**row, **soft_targets(teacher(row["x"])["logits"], 4)._asdict()} for row in data]
    trained = []
    for rows, told in ((data, Distillation(teacher)), (stored, Distillation(None))):
        trainer = trainer_of(copy.deepcopy(student), tmp_path, rows)
        distill(trainer, told)
        trainer.train()
        assert trainer.evaluate(rows)["eval_loss"] > 0
        trained.append([*trainer.model.parameters()])
    torch.testing.assert_close(*trained, **CLOSE)
    trainer = trainer_of(student, tmp_path, data)
    distill(trainer, Distillation(None))
    with pytest.raises(OptionError, match="there is no teacher"):
        trainer.train()


def test_the_trainer_evaluates_as_before(tmp_path):
    model = Tagger()
    data = [{"x": torch.randn(5, 3), "labels": torch.randint(4, (5,))} for _ in range(4)]
    trainer = trainer_of(model, tmp_path, data)
    before = trainer.evaluate(data)["eval_loss"]
    distill(trainer, Distillation(Tagger(), weight=1.0))
    assert trainer.evaluate(data)["eval_loss"] == before


@pytest.mark.filterwarnings("ignore")  # of lightning
def test_lightning_needs_the_call_alone(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()
            self.told = Distillation.of(self.net)

        def training_step(self, batch, i):
            return self.told(self.net, batch[0], task(batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    module = Task()
    student, told = copy.deepcopy(module.net), Distillation.of(module.net)
    data = [(torch.randn(6, 3), torch.randint(4, (6,))) for _ in range(3)]
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for x, y in data:
        optimizer.zero_grad()
        told(student, x, task(y)).backward()
        optimizer.step()
    for a, b in zip(module.net.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    assert not [key for key in module.state_dict() if "teacher" in key]


def of_two(rank: int, folder: str) -> None:
    """One of the processes. None goes while the other is in a call of gloo, or runs destructors of what is left."""
    store = begin(rank, folder)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    teacher, student, project = net(), net(5), nn.Linear(5, 8)
    x = torch.randn(8, 3)
    told = Distillation(teacher, weight=1.0, hidden=["1"], projections={"1": project})
    wrapped = nn.parallel.DistributedDataParallel(student)
    for part in (x[:4], x[4:]):  # two batches are accumulated
        (told(wrapped, part[rank * 2 : rank * 2 + 2]) / 2).backward()
    torch.save([p.grad for p in [*student.parameters(), *project.parameters()]], f"{folder}/{rank}.pt")
    store.set(f"done{rank}", "")
    store.wait(["done0", "done1"])
    os._exit(0)


@GLOO
@pytest.mark.filterwarnings("default:a process was killed")
def test_two_processes_and_accumulation_have_the_gradient_of_one(tmp_path_factory):
    folder = in_processes(of_two, tmp_path_factory)
    torch.manual_seed(0)
    teacher, student, project = net(), net(5), nn.Linear(5, 8)
    Distillation(teacher, weight=1.0, hidden=["1"], projections={"1": project})(student, torch.randn(8, 3)).backward()
    expected = [p.grad for p in [*student.parameters(), *project.parameters()]]
    for rank in range(2):
        torch.testing.assert_close(torch.load(folder / f"{rank}.pt"), expected, **CLOSE)


class Elsewhere(torch.Tensor):
    """As a tensor on a device that has to be waited for."""

    is_cpu = False


def test_a_device_is_asked_once_whether_targets_are_of_that_temperature():
    logits = torch.randn(4, 3)
    right, wrong = (soft_targets(logits, 3, temperature) for temperature in (2.0, 1.0))
    there = wrong._replace(temperature=wrong.temperature.as_subclass(Elsewhere))
    told = Distillation(None, weight=1.0, temperature=2.0)
    with pytest.raises(OptionError, match="made at another temperature"):
        told(nn.Identity(), logits, targets=there)  # the first batch
    told(nn.Identity(), logits, targets=right)
    told(nn.Identity(), logits, targets=there)  # is not waited for any more
    with pytest.raises(OptionError, match="made at another temperature"):
        told(nn.Identity(), logits, targets=wrong)
