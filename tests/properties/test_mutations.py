"""The property test notices: each thing a rule says is left out or turned around, and the test must fail.

What is left out counts only where it was said of something: forgetting to keep a dimension that is kept anyway is no
mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from oto.axes import terms as T
from oto.axes.call import Call
from oto.axes.registry import FIXED, RULES, find
from tests.properties.commute import check, trace
from tests.properties.samples import Sample, samples

fix, unify, fixed, step, fresh, rewrite, watch = (
    Call.fix,
    Call.unify,
    Call.fixed,
    Call.step,
    Call.fresh,
    Call.rewrite,
    Call.watch,
)


def _free(*terms: T.Term) -> bool:
    return any(T.free(T.resolve(term)) for term in terms)


Mutation = Callable[[pytest.MonkeyPatch, list[str]], None]


def forget_to_fix(patch: pytest.MonkeyPatch, said: list[str]) -> None:
    def mutant(self: Call, x: Any, dims: Any, text: str) -> None:
        if _free(*(x.terms[d] for d in (range(x.ndim) if dims is None else dims))):
            said.append(text)

    patch.setattr(Call, "fix", mutant)


def forget_to_unify(patch: pytest.MonkeyPatch, said: list[str]) -> None:
    def mutant(self: Call, a: T.Term, b: T.Term) -> None:
        if T.resolve(a) != T.resolve(b) and _free(a, b):
            said.append("unify")

    patch.setattr(Call, "unify", mutant)


def free_what_is_new(patch: pytest.MonkeyPatch, said: list[str]) -> None:
    def mutant(self: Call, n: int, text: str) -> T.Term:
        said.extend([text] if n > 1 else [])
        return T.axis(n)

    patch.setattr(Call, "fixed", mutant)


def _steps(change: Callable[[dict[str, Any]], bool]) -> Mutation:
    def mutate(patch: pytest.MonkeyPatch, said: list[str]) -> None:
        def mutant(self: Call, inputs: Any, terms: Any, routes: Any, fact: Any, **named: Any) -> Any:
            given = {"inputs": inputs, "terms": terms, "routes": routes, "fact": fact, **named}
            if change(given) and _free(*terms, *(t for x in inputs for t in x.terms)):
                said.append("step")
            return step(self, **given)

        patch.setattr(Call, "step", mutant)

    return mutate


def _claim(given: dict[str, Any]) -> bool:
    given["fact"] = lambda *facts: 0.0
    return True


def _sum_blindly(given: dict[str, Any]) -> bool:
    summed = given.get("summed")
    given["summed"] = ()
    return bool(summed) and _free(*(given["inputs"][i].terms[d] for letter in summed for i, d in letter))


def forget_sizes(patch: pytest.MonkeyPatch, said: list[str]) -> None:
    def mutant(self: Call, op: Any, *args: Any, **kwargs: Any) -> None:
        rewrite(self, op, *args, **kwargs)
        said.extend(["rewrite"] if _free(*self.tape.rewrites.pop(self.node.index).terms) else [])

    patch.setattr(Call, "rewrite", mutant)
    patch.setattr(Call, "watch", lambda self, *terms: None)


def forget_to_watch(patch: pytest.MonkeyPatch, said: list[str]) -> None:
    def mutant(self: Call, *terms: T.Term) -> None:
        said.extend(["watch"] if _free(*terms) else [])

    patch.setattr(Call, "watch", mutant)


MUTATIONS: dict[str, Mutation] = {
    "fixes nothing": forget_to_fix,
    "unifies nothing": forget_to_unify,
    "frees what is new": free_what_is_new,
    "claims zero everywhere": _steps(_claim),
    "sums blindly": _steps(_sum_blindly),
    "names no sizes": forget_sizes,
    "watches nothing": forget_to_watch,
}

# What no call can show, each with the reason.
SILENT: dict[tuple[str, str], str] = {
    ("claims zero everywhere", "linear.dot"): "its result has no dimension",
    ("claims zero everywhere", "creation.zeros"): "it is zero everywhere",
    ("claims zero everywhere", "creation.zeros_like"): "it is zero everywhere",
    # what it fixes would stay whole by what its entries hold; the reason is for users
    ("fixes nothing", "loss.binary_cross_entropy"): "it only says why",
    ("fixes nothing", "loss.binary_cross_entropy_with_logits"): "it only says why",
    ("fixes nothing", "loss.soft_margin_loss"): "it only says why",
}


def name(rule: Any) -> str:
    return f"{rule.__module__.rpartition('.')[2]}.{rule.__name__}"


def by_rule() -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in samples():
        # a kernel that is given nonsense may end the process
        if sample.device == "cpu" and sample.values and "flash" not in str(sample.op):
            found.setdefault(name(find(sample.op)), []).append(sample)
    return found


def noticed(mutate: Mutation, sample: Sample) -> tuple[bool, bool]:
    """Whether the mutation left something out, and whether the property test fails."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch, said)
        try:
            traced = trace(sample.op, *sample.make())
            if said:
                check(traced)
        except Exception:
            return True, True
    return bool(said), False


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_rule_is_noticed(mutation: str) -> None:
    silent = set()
    for rule, group in by_rule().items():
        said = False
        for sample in group:
            left_out, seen = noticed(MUTATIONS[mutation], sample)
            if seen:
                break
            said |= left_out
        else:
            if said:
                silent.add(rule)
    assert silent == {rule for found, rule in SILENT if found == mutation}


def test_every_rule_is_broken_somehow() -> None:
    """A claim of zero everywhere is wrong for each operator that has any free dimension."""
    rules = {name(RULES[op]) for op in RULES if op not in FIXED}
    assert rules - by_rule().keys() <= {
        "index.written",
        "conv.cudnn_convolution",
        "creation.empty",
        "creation.empty_like",
        "attention.fused_attention",
    }
