"""Matrix products, written as in einsum: a letter names a dimension, and is summed over if it is missing on the right.

Example: ``mm`` is ``call.contract("mk,kn->mn", a, b)``.
"""

from __future__ import annotations

from functools import cache
from string import ascii_uppercase
from typing import Any

import torch

from oto.axes.call import Call, Operand, zero
from oto.axes.registry import fixed, rule

aten = torch.ops.aten


def letters(n: int) -> str:
    """Upper-case letters for ``n`` leading dimensions; the rules use lower-case letters for the others."""
    return ascii_uppercase[:n]


@rule(aten.linear)
def linear(call: Call, x: Operand, weight: Operand, bias: Operand | None = None) -> Operand:
    """x (*, I), weight (O, I), bias (O,) -> (*, O)."""
    lead = letters(x.ndim - 1)
    out = "o" if weight.ndim == 2 else ""
    y = call.contract(f"{lead}i,{out}i->{lead}{out}", x, weight)
    return y if bias is None else call.map(zero, y, bias)


@rule(aten.mm)
def mm(call: Call, a: Operand, b: Operand, dtype: object = None) -> Operand:
    """(M, K), (K, N) -> (M, N)."""
    return call.contract("mk,kn->mn", a, b)


@rule(aten.bmm)
def bmm(call: Call, a: Operand, b: Operand, dtype: object = None) -> Operand:
    """(B, M, K), (B, K, N) -> (B, M, N)."""
    return call.contract("bmk,bkn->bmn", a, b)


@rule(aten.mv)
def mv(call: Call, a: Operand, b: Operand) -> Operand:
    """(M, K), (K,) -> (M,)."""
    return call.contract("mk,k->m", a, b)


@rule(aten.dot, aten.vdot)
def dot(call: Call, a: Operand, b: Operand) -> Operand:
    """(K,), (K,) -> ()."""
    return call.contract("k,k->", a, b)


@rule(aten.outer, aten.ger)
def outer(call: Call, a: Operand, b: Operand) -> Operand:
    """(M,), (N,) -> (M, N)."""
    return call.contract("m,n->mn", a, b)


def _plus(call: Call, bias: Operand, product: Operand, beta: float) -> Operand:
    if beta == 0:  # the shapes must fit, but the values of the bias are ignored
        return call.map(lambda fact, _: fact, product, bias)
    return call.map(zero, product, bias)


@rule(aten.addmm)
def addmm(
    call: Call, bias: Operand, a: Operand, b: Operand, dtype: object = None, *, beta: float = 1, alpha: float = 1
) -> Operand:
    """beta * bias + alpha * (M, K) @ (K, N)."""
    return _plus(call, bias, mm(call, a, b), beta)


@rule(aten.addmv)
def addmv(call: Call, bias: Operand, a: Operand, b: Operand, *, beta: float = 1, alpha: float = 1) -> Operand:
    """beta * bias + alpha * (M, K) @ (K,)."""
    return _plus(call, bias, mv(call, a, b), beta)


@rule(aten.baddbmm)
def baddbmm(
    call: Call, bias: Operand, a: Operand, b: Operand, dtype: object = None, *, beta: float = 1, alpha: float = 1
) -> Operand:
    """beta * bias + alpha * (B, M, K) @ (B, K, N)."""
    return _plus(call, bias, bmm(call, a, b), beta)


@rule(aten.matmul)
def matmul(call: Call, a: Operand, b: Operand) -> Operand:
    """(*, M, K), (*, K, N) -> (*, M, N) with broadcast leading dimensions; a vector has no M or N."""
    lead = max(a.ndim, b.ndim, 2) - 2
    names = letters(lead)
    left = names[lead - max(a.ndim - 2, 0) :] + ("m" if a.ndim > 1 else "") + "k"
    right = names[lead - max(b.ndim - 2, 0) :] + "k" + ("n" if b.ndim > 1 else "")
    out = names + ("m" if a.ndim > 1 else "") + ("n" if b.ndim > 1 else "")
    return call.contract(f"{left},{right}->{out}", a, b)


@rule(aten.einsum)
def einsum(call: Call, equation: str, xs: list[Operand], *, path: Any = None) -> Operand:
    """Any number of operands; ``...`` is any number of leading dimensions."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    specs = left.split(",")
    used = set(equation)
    spare = [
        c for c in map(chr, range(0x391, 0x3E9)) if c not in used
    ]  # letters that the equation does not use, for the dimensions of the dots
    dots = max((x.ndim - len(s.replace("...", "")) for s, x in zip(specs, xs, strict=True) if "..." in s), default=0)
    if not arrow:
        names = sorted({c for s in specs for c in s.replace("...", "")})
        right = "..." * ("..." in left) + "".join(c for c in names if left.count(c) == 1)

    def spell(spec: str, n: int) -> str:
        return spec.replace("...", "".join(spare[dots - n : dots]))

    full = [spell(s, x.ndim - len(s.replace("...", ""))) for s, x in zip(specs, xs, strict=True)]
    return call.contract(f"{','.join(full)}->{spell(right, dots)}", *xs)


@rule(aten.linalg_multi_dot, aten.chain_matmul)
def multi_dot(call: Call, xs: list[Operand]) -> Operand:
    """A chain of matrices, (A, B), (B, C), …, multiplied in the cheapest order; it may begin and end with a vector."""
    sizes = [1 if xs[0].ndim == 1 else xs[0].shape[0], *(x.shape[0] for x in xs[1:])]
    sizes.append(1 if xs[-1].ndim == 1 else xs[-1].shape[1])

    @cache
    def cheapest(i: int, j: int) -> tuple[int, int]:
        """The cost of multiplying matrices ``i`` to ``j``, and the last matrix of the left factor."""
        if i == j:
            return 0, i
        ways = (
            (cheapest(i, k)[0] + cheapest(k + 1, j)[0] + sizes[i] * sizes[k + 1] * sizes[j + 1], k) for k in range(i, j)
        )
        return min(ways)

    def product(i: int, j: int) -> Operand:
        if i == j:
            return xs[i]
        k = cheapest(i, j)[1]
        return matmul(call, product(i, k), product(k + 1, j))

    return product(0, len(xs) - 1)


fixed(
    aten.linalg_matrix_exp,
    aten.linalg_inv_ex,
    aten.linalg_qr,
    aten._linalg_svd,
    aten._linalg_eigh,
    aten.linalg_eig,
    aten.linalg_householder_product,
    aten._linalg_solve_ex,
    aten._linalg_det,
    aten._linalg_slogdet,
    aten.linalg_lu_factor_ex,
    aten.linalg_cholesky_ex,
    aten.linalg_lstsq,
    aten.linalg_pinv.atol_rtol_tensor,
    why="it works on a matrix as a whole",
)
