"""Recurrent layers. A hidden unit may be removed if all of its gates are zero, since its state then stays zero.

All layers and directions share one state tensor, so unit ``j`` is removed from all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from oto.axes.call import Call, Fact, Operand, same, zero
from oto.axes.registry import rule

aten = torch.ops.aten
PACKED = "sequences of different lengths are packed into it"
Cell = Callable[[Call, Operand, list[Operand]], list[Operand]]


def _decays(call: Call, gates: Operand, states: list[Operand]) -> Operand:
    """A new state, which is zero if the gates and the old state are zero."""
    through = ((0,), (1,), (), (2,))
    routes = (through, *(((1,), (2,)) if s.ndim == 2 else ((0,), (1,), (2,)) for s in states))
    for state in states:
        call.unify(gates.terms[3], state.terms[-1])
    return call.step([gates, *states], [gates.terms[0], gates.terms[1], gates.terms[3]], routes, zero)


def _lstm_cell(call: Call, gates: Operand, states: list[Operand]) -> list[Operand]:
    """c' = f·c + i·g, h' = o·tanh(c'): a state of zero stays zero if g is, whatever the output gate is."""
    c = _decays(call, gates, states[1:])
    return [call.map(zero, c), c]


def _gru_cell(call: Call, gates: Operand, states: list[Operand]) -> list[Operand]:
    """h' = (1 - z)·n + z·h."""
    return [_decays(call, gates, states)]


def _rnn_cell(call: Call, gates: Operand, states: list[Operand]) -> list[Operand]:
    """h' = tanh or relu of the only gate, which includes the term of h."""
    return [_decays(call, gates, [])]


def _direction(
    call: Call, x: Operand, states: list[Operand], params: list[Operand], gates: int, cell: Cell, has_biases: bool
) -> tuple[Operand, list[Operand]]:
    """One layer in one direction: x (T, N, I), states (N, H) -> (T, N, H) and the last states (N, H)."""
    w_ih, w_hh, *rest = params
    biases, w_hr = (rest[:2], rest[2:]) if has_biases else ([], rest)
    width = w_ih.shape[0] // gates

    def by_gate(p: Operand) -> Operand:
        p = call.view(p, (gates, width, *p.shape[1:]))
        call.fix(p, [0], "it runs through the gates of a recurrent layer")
        return p

    w_ih, w_hh = by_gate(w_ih), by_gate(w_hh)
    own = call.contract("tni,gji->tngj", x, w_ih)
    for bias in biases:
        own = call.map(zero, own, by_gate(bias))
    seen = [states]
    # two steps are enough: a state that is zero after both stays zero
    for i in range(2):
        h = seen[-1][0]
        into = call.contract("nh,gjh->ngj" if h.ndim == 2 else "tnh,gjh->tngj", h, w_hh)
        if i == 0:
            call.tape.steps[-1].volume = None  # the MACs of the second step stand for all time steps
        new = cell(call, call.map(zero, own, into), seen[-1])
        if w_hr:
            new[0] = call.contract("tnj,pj->tnp", new[0], w_hr[0])
            if i == 0:
                call.tape.steps[-1].volume = None
        for a, b in zip(new, states, strict=True):
            call.unify(a.terms[-1], b.terms[-1])
        seen.append(new)
    after = [call.map(_agreed, a, b) for a, b in zip(seen[1], seen[2], strict=True)]
    return after[0], [call.move(s, s.terms[1:], [(1,), (2,)]) for s in after]


def _agreed(*facts: Fact) -> Fact:
    return zero(*facts)


def _recurrent(
    call: Call,
    x: Operand,
    states: Sequence[Operand],
    params: Sequence[Operand],
    gates: int,
    cell: Cell,
    has_biases: bool,
    layers: int,
    directions: int,
) -> tuple[Operand, list[Operand]]:
    """x (T, N, I), states (layers · directions, N, H) -> (T, N, directions · H) and the last states."""
    call.fix(x, [0], "a recurrent layer runs along it")
    for state in states:
        call.fix(state, [0], "it runs through the layers of a recurrent network")
        call.unify(state.terms[1], x.terms[1])
    if len(states) == 2 and states[0].shape[2] != states[1].shape[2]:
        for state in states:  # the operator detects a projection by two different sizes, so these must not change
            call.fix(state, [2], "a projected state must differ in width from the hidden one")
    each = len(params) // (layers * directions)
    last: list[list[Operand]] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            own = [call.move(s, s.terms[1:], [(1,), (2,)]) for s in states]
            y, after = _direction(call, x, own, list(params[i * each : (i + 1) * each]), gates, cell, has_biases)
            outputs.append(y)
            last.append([call.view(s, (1, *s.shape)) for s in after])
        x = call.cat(outputs, 2)
    return x, [call.cat(list(of), 0) for of in zip(*last, strict=True)]


_KINDS: dict[str, tuple[int, Cell]] = {
    "lstm": (4, _lstm_cell),
    "gru": (3, _gru_cell),
    "rnn_tanh": (1, _rnn_cell),
    "rnn_relu": (1, _rnn_cell),
}


@rule(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
def recurrent(
    call: Call,
    x: Operand,
    hx: Operand | list[Operand],
    params: list[Operand],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> list[Operand | None]:
    """x (T, N, I), or (N, T, I) if ``batch_first``; each weight (gates · H, I or H)."""
    if train and dropout > 0:
        return call.opaque("random numbers are drawn entry by entry")
    gates, cell = _KINDS[str(call.node.op).split(".")[1]]
    states = [hx] if isinstance(hx, Operand) else list(hx)
    turned = call.permute(x, [1, 0, 2]) if batch_first else x
    y, last = _recurrent(call, turned, states, params, gates, cell, has_biases, num_layers, 1 + bidirectional)
    return [call.permute(y, [1, 0, 2]) if batch_first else y, *last]


@rule(aten.lstm.data, aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data)
def packed(
    call: Call,
    x: Operand,
    batch_sizes: Operand,
    hx: Operand | list[Operand],
    params: list[Operand],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> list[Operand | None]:
    """x (S, I), the packed steps of sequences of different lengths; states as in :func:`recurrent`."""
    if train and dropout > 0:
        return call.opaque("random numbers are drawn entry by entry")
    gates, cell = _KINDS[str(call.node.op).split(".")[1]]
    call.fix(batch_sizes, None, PACKED)
    states = [hx] if isinstance(hx, Operand) else list(hx)
    for state in states:
        call.fix(state, [1], PACKED)
    one = [call.move(s, [s.terms[0], (), s.terms[2]], [(0,), (), (2,)]) for s in states]  # as for a single sequence
    steps = call.view(x, (x.shape[0], 1, x.shape[1]))
    y, last = _recurrent(call, steps, one, params, gates, cell, has_biases, num_layers, 1 + bidirectional)
    return [
        call.move(y, [y.terms[0], y.terms[2]], [(0,), (2,)]),
        *(
            call.move(s, [s.terms[0], of.terms[1], s.terms[2]], [(0,), (), (2,)])
            for s, of in zip(last, states, strict=True)
        ),
    ]


@rule(aten._pack_padded_sequence)
def pack(call: Call, x: Operand, lengths: Operand, batch_first: bool) -> list[Operand]:
    """x (T, N, *) or (N, T, *) -> (S, *), and the batch size at each step."""
    call.fix(x, [0, 1], PACKED)
    call.fix(lengths, None, PACKED)
    steps, sizes = call.shapes
    assert steps is not None and sizes is not None
    terms = [call.fixed(steps[0], PACKED), *x.terms[2:]]
    return [call.move(x, terms, [(), *((d,) for d in range(2, x.ndim))]), call.fresh(sizes, PACKED)]


@rule(aten._pad_packed_sequence)
def pad(
    call: Call, x: Operand, batch_sizes: Operand, batch_first: bool, padding_value: float, total_length: int
) -> list[Operand]:
    """x (S, *) -> (T, N, *) or (N, T, *), and the lengths of the sequences."""
    call.fix(x, [0], PACKED)
    call.fix(batch_sizes, None, PACKED)
    padded, lengths = call.shapes
    assert padded is not None and lengths is not None
    terms = [*(call.fixed(n, PACKED) for n in padded[:2]), *x.terms[1:]]
    sources = [(), (), *((d,) for d in range(1, x.ndim))]
    return [call.move(x, terms, sources, lambda f: same(f, float(padding_value))), call.fresh(lengths, PACKED)]
