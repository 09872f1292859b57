"""Rivals of `one_shot.py`: each the formula of its paper, in place of ours, with the parts of the library around it.

What a method has of its own is a score of every atom at what reads it (:data:`oto.oneshot.SCORES`), or of its weights
and gradients, how scores are compared between layers, and what takes over. All get the same calibration data, and batch
norms estimated anew, which papers on language models have no need of.

===========  =========================================================================================================
random       no criterion; nothing takes over
magnitude    the L2 norm of what writes an atom, relative to the mean of its layer; nothing takes over
taylor       LLM-Pruner (arXiv 2305.11627), first order, a structure as one vector: ``|<x, g>|`` of the loss of all
             calibration data; of a structure only what writes the atom. Nothing takes over
wanda-sp     Wanda (arXiv 2306.11695) summed over the column that reads an entry, as FLAP's authors have it for
             structures: ``Σ_i |W_ij| ||X_j||₂``. Every layer loses the same share, and nothing takes over
flap         arXiv 2312.11983: ``Var(X_j) ||W_:j||²``, standardized over a layer, one ranking of all; the mean of what
             goes into the bias (equation 6)
obs          ZipLM (arXiv 2302.04089, equation 2), as OSSCAR (2403.12983) and SlimGPT (2412.18110): atom after atom by
             ``tr(W_a [H⁻¹]_aa⁻¹ W_aᵀ)``, every layer the same share, and the others take over without a constant
obs-global   the same, with one ranking of all layers by what the first atoms cost, as none of them does
===========  =========================================================================================================

SliceGPT (arXiv 2401.15024) rotates the residual stream and adds matrices to every skip: there is no atom to be chosen,
and no class that the slim model would be of. It is not among them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oto import oneshot

Line = dict[str, Any]


def random(entries: Any) -> Tensor:
    return torch.rand(len(entries.weights[0]))


def wanda(entries: Any) -> Tensor:
    raise AssertionError("it is measured at readers")


def flap(entries: Any) -> Tensor:
    raise AssertionError("it is measured at readers")


def wanda_score(reader: Any, moments: Any, parameter: Tensor, blocks: Tensor, ridge: float) -> Tensor:
    """``Σ_i |W_ij| ||X_j||₂``, summed over the entries j of an atom."""
    weight = reader.layout.rows(reader.weight(parameter)).to(moments.second)  # (batch, rows, n)
    norm = moments.second.diagonal(dim1=-2, dim2=-1).sqrt()  # (batch, n)
    of_entry = (weight.abs().sum(1) * norm).sum(0)
    return of_entry[blocks.to(of_entry.device)].sum(-1).double().cpu()


def flap_score(reader: Any, moments: Any, parameter: Tensor, blocks: Tensor, ridge: float) -> Tensor:
    """``Var(X_j) ||W_:j||²``, meaned over the entries of an atom, standardized over the layer."""
    weight = reader.layout.rows(reader.weight(parameter)).to(moments.second)
    count = moments.count
    variance = moments.variance * (count / max(count - 1, 1))
    of_entry = (variance * weight.square().sum(1)).sum(0)
    score = of_entry[blocks.to(of_entry.device)].mean(-1).double().cpu()
    return (score - score.mean()) / score.std(correction=0).clamp_min(torch.finfo(score.dtype).tiny)


def join() -> None:
    """Let `one_shot` know the scores that are measured at readers."""
    oneshot.MEASURED |= {"wanda": wanda, "flap": flap}
    oneshot.SCORES |= {wanda: wanda_score, flap: flap_score}


ALONE = {"compensate": None, "holdout": 0}
ONE_RANKING = {"normalize": "none", "by_cost": 0.0}
METHODS: dict[str, Line] = {
    "random": {"saliency": random} | ALONE,
    "magnitude": {"saliency": "magnitude"} | ALONE,
    "taylor": {"saliency": "taylor_first_order"} | ALONE,
    "wanda-sp": {"saliency": "wanda", "scope": "local"} | ALONE,
    "flap": {"saliency": "flap", "compensate": "bias", "holdout": 0} | ONE_RANKING,
    "obs": {"saliency": "obs", "scope": "local", "compensate": "ridge", "holdout": 0},
    "obs-global": {"saliency": "obs", "compensate": "ridge", "holdout": 0},
    "oto, gradients": {},
    "oto, gradients, no fold": {"compensate": None},
    "oto, obs": {"saliency": "obs"},
    "oto, obs, no fold": {"saliency": "obs", "compensate": None},
    "oto, sensitivity": {"saliency": "sensitivity"},
}
AT_ONCE = {"taylor"}
"""Methods whose score is of the loss of all calibration data together, not averaged over batches."""
