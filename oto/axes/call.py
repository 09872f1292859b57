"""The vocabulary of rules: the elementary steps with which every operator is described.

A rule gets a :class:`Call` and the operator's arguments, with an :class:`Operand` in place of each tensor. It describes
the operator in a few steps. A step relates terms immediately, and is read again later to follow zeros through the
network (``invariance.py``) and to count costs (``groups/cost.py``). For example, a linear layer is
``call.contract("bi,oi->bo", x, weight)``. The steps are:

``map``       entry by entry, with broadcasting
``contract``  a product summed over letters (einsum)
``reduce``    a sum over dimensions
``move``      entries change places, none are mixed
``cat``       one tensor after the other

A *fact* says what every entry at a removed atom holds: a number, ``None`` for "anything", or NaN for a value that is
not finite, such as 1/0, which stays so even if it is multiplied by zero. If a tensor that is constant along a
dimension, such as a mean, is subtracted from zeros, all removed entries along it hold the same value. That value can be
computed: it is a :class:`Uniform`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, TypeAlias

import torch

from oto._torch import tree_leaves, tree_map_only
from oto.axes import terms as T
from oto.axes.terms import Reason, Term
from oto.trace.graph import Node, Value

aten = torch.ops.aten
NOT_FINITE = float("nan")
Routes: TypeAlias = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Uniform:
    """The value of every removed entry along one dimension: a call on tensors that are constant along it.

    It is valid if the tensors that it was computed from are zero at removed entries, which the proof checks.
    """

    op: Callable[..., Any]
    args: Any
    kwargs: Any

    def computed(self, call: Callable[[Callable[..., Any], Any, Any], Any], values: dict[Uniform, Any]) -> Any:
        """Compute the value.

        Args:
            call: Makes a call; its arguments refer to tensors by :class:`Value`.
            values: The values that were computed so far.
        """
        if self not in values:
            args, kwargs = tree_map_only(Uniform, lambda inner: inner.computed(call, values), (self.args, self.kwargs))
            values[self] = call(self.op, args, kwargs)
        return values[self]


Fact: TypeAlias = float | bool | complex | Uniform | None


@dataclass(slots=True, eq=False)
class Operand:
    """A tensor as a rule sees it: one term per dimension.

    Attributes:
        uniform: The value that removed entries hold along some dimensions, if it is not zero.
    """

    index: int
    terms: tuple[Term, ...]
    shape: tuple[int, ...]
    uniform: Mapping[int, Uniform] = field(default_factory=dict)

    @property
    def ndim(self) -> int:
        return len(self.shape)


@dataclass(frozen=True, slots=True)
class Size:
    """Placeholder for an integer argument that is the size of a term."""

    term: Term


@dataclass(frozen=True, eq=False)
class Rewrite:
    """How to call a node once its tensors are thinner: operator and arguments, with :class:`Size` for each size.

    Tensors are given by the :class:`Value` that they have in the node's own arguments.

    Attributes:
        watched: Terms that no argument states, but that also make the rewrite necessary once they are thinner.
        always: Whether the rewrite is necessary as soon as anything gets thinner, because the memory layout may change.
    """

    op: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    watched: tuple[Term, ...] = ()
    always: bool = False

    @cached_property
    def terms(self) -> list[Term]:
        """The terms that make the rewrite necessary once any of them is thinner."""
        sizes = [x.term for x in tree_leaves((self.args, dict(self.kwargs))) if isinstance(x, Size)]
        return [*sizes, *self.watched]


@dataclass(slots=True, eq=False)
class Step:
    """One elementary operation.

    Attributes:
        routes: For each input and each of its dimensions, the output dimensions it goes to; none if it is summed over.
        summed: For each letter that is summed over, the (input, dimension) pairs that carry it. Removing an entry is
            exact only if one of them holds zero there.
        fact: Computes what the output holds at a removed entry from what the inputs hold there.
        skip_absent: Whether inputs that do not carry the axis are not passed to ``fact``; otherwise they are passed as
            ``None`` (anything).
        volume: For a contraction, the terms whose sizes multiply to its MACs.
        uniform: For some output dimensions, the value of a removed entry, and what each input has to hold for that:
            ``None`` for an input that is constant along the dimension.
        rest: An input dimension that is summed over, and the value of its removed entries, which the thinner call adds.
    """

    node: int
    inputs: tuple[int, ...]
    output: int
    routes: Routes
    fact: Callable[..., Fact]
    summed: tuple[tuple[tuple[int, int], ...], ...] = ()
    skip_absent: bool = False
    volume: tuple[Term, ...] | None = None
    uniform: Mapping[int, tuple[Uniform, tuple[Fact, ...]]] = field(default_factory=dict)
    rest: tuple[int, Uniform] | None = None


@dataclass(eq=False)
class Tape:
    """All steps of a graph, and the terms of every tensor in them."""

    steps: list[Step] = field(default_factory=list)
    tensors: list[tuple[Term, ...]] = field(default_factory=list)
    rewrites: dict[int, Rewrite] = field(default_factory=dict)
    counted: dict[int, str] = field(default_factory=dict)

    def tensor(self, terms: Sequence[Term]) -> Operand:
        dims = tuple(terms)
        self.tensors.append(dims)
        return Operand(len(self.tensors) - 1, dims, tuple(T.size_of(t) for t in dims))

    def silence(self, first: int) -> None:
        """Make all steps from ``first`` on require no zeros, because no call reads their results; costs still count."""
        self.steps[first:] = [
            replace(step, inputs=(), routes=(), fact=anything, summed=(), uniform={}, rest=None)
            for step in self.steps[first:]
        ]


# --- facts ------------------------------------------------------------------------------------------------------------


def same(*facts: Fact) -> Fact:
    """The value that all inputs agree on."""
    first = facts[0] if facts else None
    return first if all(fact is not None and fact == first for fact in facts) else None


def zero(*facts: Fact) -> Fact:
    """Zero if all inputs are zero; valid for anything that is linear in its inputs."""
    return 0.0 if facts and all(fact is not None and fact == 0 for fact in facts) else None


def product(*facts: Fact) -> Fact:
    """Zero if one factor is zero."""
    return 0.0 if any(fact is not None and fact == 0 for fact in facts) else None


def anything(*facts: Fact) -> Fact:
    return None


_evaluated: dict[Any, Fact] = {}


def evaluated(op: Callable[..., Any], args: Any, kwargs: Any, dtypes: Sequence[torch.dtype]) -> Callable[..., Fact]:
    """The fact of a pointwise operator: it is run on the facts of its operands, in their own dtypes."""

    @cache
    def shown() -> str:
        return repr(tree_map_only(Operand, lambda x: x.ndim, (args, dict(kwargs))))

    def fact(*facts: Fact) -> Fact:
        if any(f is None or isinstance(f, Uniform) for f in facts):
            return None
        key = (op, facts, tuple(map(type, facts)), tuple(dtypes), shown())
        if key not in _evaluated:
            given = iter(zip(facts, dtypes, strict=True))

            def fill(x: Operand) -> torch.Tensor:
                f, dtype = next(given)
                return torch.full([1] * x.ndim, f, dtype=dtype)  # type: ignore[arg-type]

            try:
                filled = tree_map_only(Operand, fill, args), tree_map_only(Operand, fill, dict(kwargs))
                number = op(*filled[0], **filled[1]).item()
                _evaluated[key] = number if number - number == 0 else NOT_FINITE
            except Exception:  # the operator is not defined for these values, so nothing is known
                _evaluated[key] = None
        return _evaluated[key]

    return fact


def _pure(op: Any) -> Any:
    """The variant of an operator that writes to no argument; ``None`` if no variant has the same arguments."""
    if not op._schema.is_mutable:
        return op
    twin = getattr(getattr(aten, op.overloadpacket.__name__.removesuffix("_"), None), op._overloadname, None)
    takes = [None if o is None else [(a.name, str(a.type)) for a in o._schema.arguments] for o in (op, twin)]
    return twin if takes[0] == takes[1] else None


def _equal_runs(left: Sequence[int], right: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, int]]]:
    """The shortest runs of dimensions of two shapes with equal products: the dimensions of the left run, and the begin
    and end of the right run.

    >>> list(_equal_runs((2, 12), (2, 3, 4)))
    [((0,), (0, 1)), ((1,), (1, 3))]
    """
    i = j = 0
    while i < len(left) or j < len(right):
        first, start = i, j
        a = b = 1
        while True:
            if a == b and (i > first or j > start) and a > 1:
                break
            if a <= b and i < len(left):
                a *= left[i]
                i += 1
            elif j < len(right):
                b *= right[j]
                j += 1
            elif i < len(left):
                a *= left[i]
                i += 1
            else:
                break
        yield tuple(range(first, i)), (start, j)


class Call:
    """One node of the graph, as its rule sees it.

    Attributes:
        shapes: Shape of each output, ``None`` where it is no tensor.
        dead: Whether no call reads its results, so that only sizes have to be valid.
        steps: The index of its first step on the tape.
    """

    def __init__(self, node: Node, tape: Tape, operands: Mapping[Value, Operand], dead: bool = False) -> None:
        self.node = node
        self.dead = dead
        self.steps = len(tape.steps)
        self.tape = tape
        self.operands = operands
        self.shapes = [None if v is None else v.shape for v in node.outputs]

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtype of each tensor among the arguments."""
        return [value.dtype for value in self.node.inputs()]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the only output."""
        assert self.shapes[0] is not None
        return self.shapes[0]

    def constant(self, value: Any) -> Fact:
        """A number converted to the dtype of the output: 0.5 is 0 in an integer dtype."""
        (output,) = (value for value in self.node.outputs if value is not None)
        return torch.tensor(value, dtype=output.dtype).item() if isinstance(value, int | float | complex) else None

    # --- terms --------------------------------------------------------------------------------------------------------

    def why(self, text: str) -> Reason:
        return Reason(text, self.node.index)

    def unify(self, a: Term, b: Term) -> None:
        if a != b:
            T.unify(a, b, self.why("two sizes that do not divide each other meet"))

    def split(self, term: Term, sizes: Sequence[int]) -> list[Term]:
        return T.split(term, sizes, self.why("a reshape cuts through it"))

    def cut(self, term: Term, sizes: Sequence[int]) -> list[Term]:
        return T.cut(term, sizes, self.why("a slice cuts through it"))

    def fix(self, x: Operand, dims: Sequence[int] | None, text: str) -> None:
        """Keep every entry of some dimensions (of all, if ``None``), unless no call reads the results."""
        for dim in () if self.dead else range(x.ndim) if dims is None else dims:
            T.fix(x.terms[dim], self.why(text))

    def fixed(self, n: int, text: str) -> Term:
        return T.axis(n, self.why(text))

    # --- steps --------------------------------------------------------------------------------------------------------

    def step(
        self,
        inputs: Sequence[Operand],
        terms: Sequence[Term],
        routes: Routes,
        fact: Callable[..., Fact],
        summed: Sequence[Sequence[tuple[int, int]]] = (),
        skip_absent: bool = False,
        volume: tuple[Term, ...] | None = None,
        uniform: Mapping[int, tuple[Uniform, tuple[Fact, ...]]] | None = None,
        rest: tuple[int, Uniform] | None = None,
    ) -> Operand:
        out = self.tape.tensor(terms)
        out.uniform = {dim: held for dim, (held, _) in (uniform or {}).items()}
        self.tape.steps.append(
            Step(
                self.node.index,
                tuple(x.index for x in inputs),
                out.index,
                routes,
                fact,
                tuple(map(tuple, summed)),
                skip_absent,
                volume,
                uniform or {},
                rest,
            )
        )
        return out

    def map(self, fact: Callable[..., Fact], *xs: Operand, itself: bool = False) -> Operand:
        """Entry by entry, with broadcasting.

        Args:
            itself: Whether this step is all that the node computes, and ``xs`` are all of its tensors in order.
        """
        ndim = max(x.ndim for x in xs)
        terms: list[Term] = [T.ONE] * ndim
        sizes = [1] * ndim
        for x in xs:
            offset = ndim - x.ndim
            for dim, n in enumerate(x.shape, offset):
                if n == 1:
                    continue
                if sizes[dim] == 1:
                    terms[dim], sizes[dim] = x.terms[dim - offset], n
                else:
                    self.unify(terms[dim], x.terms[dim - offset])
        routes = tuple(tuple((dim,) for dim in range(ndim - x.ndim, ndim)) for x in xs)
        return self.step(xs, terms, routes, fact, uniform=self._uniform(terms, xs) if itself else None)

    def _uniform(self, terms: Sequence[Term], xs: Sequence[Operand]) -> dict[int, tuple[Uniform, tuple[Fact, ...]]]:
        """The values of removed entries along dimensions that one of the tensors does not have."""
        node, one_dtype = self.node, len(set(self.dtypes)) == 1
        uniform: dict[int, tuple[Uniform, tuple[Fact, ...]]] = {}
        for dim, term in enumerate(terms):
            own = [(x, dim - len(terms) + x.ndim) for x in xs]
            held = [None if d < 0 or x.shape[d] == 1 else x.uniform.get(d, 0) for x, d in own]
            if all(h == 0 for h in held) or not T.free(T.resolve(term)):
                continue
            op = _pure(node.op)
            if op is None or (0 in held and not (op.overloadpacket in (aten.add, aten.sub) and one_dtype)):
                continue  # 0·x and 0/x are plain numbers; a zero among the arguments must not change the dtype
            given = iter(held)

            def fill(value: Value, given: Iterator[Fact] = given) -> Any:
                inner = next(given)
                return value if inner is None else inner

            args, kwargs = tree_map_only(Value, fill, (node.args, dict(node.kwargs)))
            uniform[dim] = Uniform(op, args, kwargs), tuple(held)
        return uniform

    def contract(
        self,
        spec: str,
        *xs: Operand,
        new: Mapping[str, Term] | None = None,
        uncounted: str = "",
        fact: Callable[..., Fact] = product,
    ) -> Operand:
        """A product summed over every letter that is missing on the right, as in einsum.

        Args:
            new: Terms of letters that appear only on the right.
            uncounted: Letters that do not multiply the cost.
        """
        left, right = spec.split("->")
        specs = left.split(",")
        known: dict[str, Term] = dict(new or {})
        carriers: dict[str, list[tuple[int, int]]] = {}
        for i, (letters, x) in enumerate(zip(specs, xs, strict=True)):
            assert len(letters) == x.ndim, (spec, [x.shape for x in xs])
            for dim, letter in enumerate(letters):
                carriers.setdefault(letter, []).append((i, dim))
                if x.shape[dim] != 1:
                    if letter in known and known[letter] != T.ONE:
                        self.unify(known[letter], x.terms[dim])
                    else:
                        known[letter] = x.terms[dim]
                else:
                    known.setdefault(letter, T.ONE)
        routes = tuple(tuple((right.index(c),) if c in right else () for c in letters) for letters in specs)
        return self.step(
            xs,
            [known[letter] for letter in right],
            routes,
            fact,
            summed=[places for letter, places in carriers.items() if letter not in right],
            volume=tuple(term for letter, term in known.items() if letter not in uncounted) if len(xs) > 1 else None,
        )

    def reduce(
        self,
        x: Operand,
        dims: Sequence[int],
        keepdim: bool = False,
        fact: Callable[..., Fact] = zero,
        rest: tuple[int, Uniform] | None = None,
    ) -> Operand:
        """A sum over dimensions.

        Args:
            rest: A dimension, and the value of removed entries along it, which the thinner call adds.
        """
        gone = {dim % x.ndim for dim in dims} if x.ndim else set()
        places = [dim for dim in range(x.ndim) if keepdim or dim not in gone]
        terms = [T.ONE if dim in gone else x.terms[dim] for dim in places]
        routes = tuple(() if dim in gone else (places.index(dim),) for dim in range(x.ndim))
        return self.step([x], terms, (routes,), fact, summed=[[(0, dim)] for dim in sorted(gone)], rest=rest)

    def rest(self, x: Operand, dims: Sequence[int]) -> tuple[int, Uniform] | None:
        """The only prunable dimension among ``dims`` with the value of its removed entries, if that is known and
        nonzero; otherwise ``None``."""
        free = [d for d in dims if T.free(T.resolve(x.terms[d]))]
        return (free[0], x.uniform[free[0]]) if len(free) == 1 and free[0] in x.uniform else None

    def move(
        self, x: Operand, terms: Sequence[Term], sources: Sequence[Sequence[int]], fact: Callable[..., Fact] = same
    ) -> Operand:
        """Entries change places: output dimension ``d`` is made of the input dimensions ``sources[d]``."""
        routes = tuple(tuple(d for d, origins in enumerate(sources) if dim in origins) for dim in range(x.ndim))
        return self.step([x], terms, (routes,), fact)

    def identity(self, x: Operand) -> Operand:
        return self.move(x, x.terms, [(dim,) for dim in range(x.ndim)])

    def permute(self, x: Operand, order: Sequence[int]) -> Operand:
        order = [dim % x.ndim for dim in order]
        return self.move(x, [x.terms[dim] for dim in order], [(dim,) for dim in order])

    def cat(self, xs: Sequence[Operand], dim: int) -> Operand:
        """One tensor after the other along ``dim``."""
        ndim = xs[0].ndim
        dim %= ndim
        for x in xs[1:]:
            for d in range(ndim):
                if d != dim:
                    self.unify(xs[0].terms[d], x.terms[d])
        terms = list(xs[0].terms)
        terms[dim] = T.concat([x.terms[dim] for x in xs])
        routes = tuple(tuple((d,) for d in range(ndim)) for _ in xs)
        return self.step(xs, terms, routes, same, skip_absent=True)

    def view(self, x: Operand, shape: Sequence[int]) -> Operand:
        """The same entries in row-major order under another shape."""
        if 0 in x.shape:
            self.fix(x, None, "it is reshaped while empty")
            return self.fresh(shape, "it is empty")
        terms: list[Term] = [T.ONE] * len(shape)
        sources: list[tuple[int, ...]] = [()] * len(shape)
        for run, (start, end) in _equal_runs(x.shape, shape):
            whole = tuple(f for d in run for f in x.terms[d])
            if end > start:
                terms[start:end] = self.split(whole, shape[start:end])
                sources[start:end] = [run] * (end - start)
        return self.move(x, terms, sources)

    def fresh(self, shape: Sequence[int], text: str | None, fact: Fact = None) -> Operand:
        """A tensor that depends on no other; it may get thinner unless ``text`` gives a reason against that."""
        why = self.why(text) if text else None
        return self.step([], [T.axis(n, why) for n in shape], (), lambda: fact)

    def opaque(self, text: str, *also: Any) -> list[Operand | None]:
        """Keep every dimension that the call touches whole; used for operators without a rule."""
        for leaf in tree_leaves((self.node.args, dict(self.node.kwargs))):
            if isinstance(leaf, Value):
                for term in self.operands[leaf].terms:  # also for a dead call: it may not run at other sizes
                    T.fix(term, self.why(text))
        return [None if shape is None else self.fresh(shape, text) for shape in self.shapes]

    # --- sizes --------------------------------------------------------------------------------------------------------

    def resize(self, **sizes: Any) -> None:
        """Name the arguments that state sizes; each is a :class:`Size`, or a list that contains some."""
        schema = self.node.op._schema.arguments  # type: ignore[attr-defined]
        positions = {argument.name: i for i, argument in enumerate(schema)}
        earlier = self.tape.rewrites.get(self.node.index)  # earlier calls may have named other arguments
        known = earlier if earlier is not None and earlier.op is self.node.op else self.node
        args, kwargs = list(known.args), dict(known.kwargs)
        for name, value in sizes.items():
            if positions[name] < len(args):
                args[positions[name]] = value
            elif name in kwargs:
                kwargs[name] = value
        self.rewrite(self.node.op, *args, **kwargs)

    def rewrite(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Define how to call the node once its tensors are thinner."""
        self.tape.rewrites[self.node.index] = Rewrite(op, args, kwargs)

    def relaid(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Define how to call the node once anything is thinner: its own tensor may have another memory layout."""
        self.tape.rewrites[self.node.index] = Rewrite(op, args, kwargs, always=True)

    def watch(self, *terms: Term) -> None:
        """Rewrite the node also when one of these terms gets thinner."""
        stated = self.tape.rewrites[self.node.index]
        self.tape.rewrites[self.node.index] = replace(stated, watched=terms)

    def counted(self, text: str) -> None:
        """Record that the operator depends on a count of entries, so that thinner tensors need the rewritten call."""
        if self.dead:
            return
        self.tape.counted[self.node.index] = text
