"""Slim forms of stock layers, with the same interface, parameter names and state dict keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oto.errors import ScriptError
from oto.nn import functional as full_count
from oto.nn.calls import is_scripting


class LayerNorm(nn.Module):
    """``nn.LayerNorm`` that still counts removed entries, which were zero.

    Args:
        normalized_shape: The kept entries.
        full: The full count.
    """

    def __init__(
        self,
        normalized_shape: Sequence[int],
        full: Sequence[int],
        eps: float = 1e-5,
        weight: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.normalized_shape = tuple(normalized_shape)
        self.full = tuple(full)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(self.normalized_shape)) if weight else None
        self.bias = nn.Parameter(torch.zeros(self.normalized_shape)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            y = full_count.plain_normalized(input, [-1], self.normalized_shape[0] / self.full[0], self.eps)
            if self.weight is not None:
                y = y * self.weight
            return y if self.bias is None else y + self.bias
        return full_count.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, full=self.full)

    def _oto_analyzed(self, input: Tensor) -> Tensor:
        """Recorded by ``OTO`` in place of ``forward``: a plain norm, so that the kept entries can be pruned again."""
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, full={self.full}, eps={self.eps}"


class RMSNorm(nn.Module):
    """``nn.RMSNorm`` that still counts removed entries, which were zero."""

    def __init__(
        self, normalized_shape: Sequence[int], full: Sequence[int], eps: float | None = None, weight: bool = True
    ) -> None:
        super().__init__()
        self.normalized_shape = tuple(normalized_shape)
        self.full = tuple(full)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(self.normalized_shape)) if weight else None

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            dims = [-1 - i for i in range(len(self.full))]
            ratio = 1.0
            for full, left in zip(self.full, self.normalized_shape):  # noqa: B905 - TorchScript knows no `strict`
                ratio *= full / left
            y = full_count.plain_rms(input, dims, ratio, self.eps)
            return y if self.weight is None else y * self.weight
        return full_count.rms_norm(input, self.normalized_shape, self.weight, self.eps, full=self.full)

    def _oto_analyzed(self, input: Tensor) -> Tensor:
        """As in :class:`LayerNorm`."""
        return F.rms_norm(input, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, full={self.full}, eps={self.eps}"


class GroupNorm(nn.Module):
    """``nn.GroupNorm`` with ``width`` of the ``full`` channels of each group kept."""

    def __init__(self, num_groups: int, width: int, full: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.num_channels = num_groups * width
        self.width = width
        self.full = full
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(self.num_channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(self.num_channels)) if affine else None

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            grouped = input.reshape(input.shape[0], self.num_groups, self.width, -1)
            y = full_count.plain_normalized(grouped, [2, 3], self.width / self.full, self.eps).flatten(1, 2)
            y = y.reshape(input.shape)
            if self.weight is not None and self.bias is not None:
                column = [-1] + [1] * (input.dim() - 2)
                y = y * self.weight.reshape(column) + self.bias.reshape(column)
            return y
        return full_count.group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps, full=self.full, width=self.width
        )

    def _oto_analyzed(self, input: Tensor) -> Tensor:
        """As in :class:`LayerNorm`."""
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, width={self.width}, full={self.full}, eps={self.eps}"


class MultiheadAttention(nn.Module):
    """``nn.MultiheadAttention`` with independent heads, head widths and outer widths.

    Args:
        embed_dim, kdim, vdim: Widths of the incoming query, key and value.
        out_dim: Width of the result.
        num_heads, head_dim, v_head_dim: Kept heads and their widths, for query and key, and for value.
        scale: Factor of the scores: that of the full head, no matter how thin the head is now.
        heads: Which of the ``full_heads`` are kept, to select from a mask per head.
        packed: One ``in_proj_weight`` for all three, or one weight each.

    Averaged attention weights are averages over the kept heads.
    """

    def __init__(
        self,
        embed_dim: int,
        kdim: int,
        vdim: int,
        out_dim: int,
        num_heads: int,
        head_dim: int,
        v_head_dim: int,
        scale: float,
        heads: Sequence[int],
        full_heads: int,
        packed: bool = True,
        bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = embed_dim, kdim, vdim
        self.num_heads, self.head_dim, self.v_head_dim = num_heads, head_dim, v_head_dim
        self.scale = scale
        self.heads, self.full_heads = tuple(heads), full_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self._qkv_same_embed_dim = False  # keeps nn.TransformerEncoderLayer from using its fused kernel
        rows = [num_heads * head_dim, num_heads * head_dim, num_heads * v_head_dim]
        self.rows = rows
        if packed:
            self.in_proj_weight: nn.Parameter | None = nn.Parameter(torch.empty(sum(rows), embed_dim))
            self.q_proj_weight = self.k_proj_weight = self.v_proj_weight = None
        else:
            self.in_proj_weight = None
            self.q_proj_weight = nn.Parameter(torch.empty(rows[0], embed_dim))
            self.k_proj_weight = nn.Parameter(torch.empty(rows[1], kdim))
            self.v_proj_weight = nn.Parameter(torch.empty(rows[2], vdim))
        self.in_proj_bias = nn.Parameter(torch.empty(sum(rows))) if bias else None
        self.out_proj = nn.Linear(rows[2], out_dim, out_bias)
        self.bias_k = self.bias_v = None
        self.add_zero_attn = False

    def __prepare_scriptable__(self) -> MultiheadAttention:
        """Refuse ``torch.jit.script``, which calls this first."""
        raise ScriptError("an attention whose heads are stated one by one")

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.split(self.rows)
        else:
            assert self.q_proj_weight is not None and self.k_proj_weight is not None and self.v_proj_weight is not None
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases: Sequence[Tensor | None] = (
            [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.split(self.rows)
        )
        widths = (self.head_dim, self.head_dim, self.v_head_dim)
        return [
            F.linear(x, w, b).unflatten(-1, (self.num_heads, d)).transpose(1, 2)
            for x, w, b, d in zip((query, key, value), weights, biases, widths, strict=True)
        ]

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, like: Tensor) -> Tensor | None:
        def additive(mask: Tensor) -> Tensor:
            if mask.dtype == torch.bool:
                return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
            return mask

        mask = None
        if attn_mask is not None:
            mask = additive(attn_mask)
            if mask.ndim == 3:  # one mask per head: select those of the kept heads
                mask = mask.unflatten(0, (-1, self.full_heads))
                mask = mask[:, list(self.heads)]
        if key_padding_mask is not None:
            padding = additive(key_padding_mask)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``."""
        batched = query.ndim == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._project(query, key, value)
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def extra_repr(self) -> str:
        return f"heads={self.num_heads} of {self.full_heads}, head_dim={self.head_dim}, v_head_dim={self.v_head_dim}"


class TransformerEncoder(nn.TransformerEncoder):
    """``nn.TransformerEncoder`` for layers that do not support nested tensors, such as thinner ones.

    In inference, the stock encoder packs padded sequences into a nested tensor, and its output for padding is zero
    (before its last norm). This one packs nothing, and its output is the same.

    Attributes:
        clears_padding: Whether the stock encoder would pack if possible.
    """

    clears_padding: bool

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As ``nn.TransformerEncoder``."""
        y: Tensor = super().forward(src, mask, src_key_padding_mask, is_causal)
        if src_key_padding_mask is None or mask is not None or not self._would_pack(src):
            return y
        padding = src_key_padding_mask != 0
        if self.mask_check and bool((padding[:, :-1] & ~padding[:, 1:]).any()):  # padding is not only at the end
            return y
        given = y.new_zeros(y.shape[-1])
        return torch.where(padding[..., None], given if self.norm is None else self.norm(given), y)

    def _would_pack(self, src: Tensor) -> bool:
        first = self.layers[0]
        return (
            self.clears_padding
            and torch.backends.mha.get_fastpath_enabled()
            and not (first.training or src.is_nested or torch.is_autocast_enabled() or torch.compiler.is_compiling())
            and src.dim() == 3
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in (src, *first.parameters())))
        )


def leave_nested_tensors(model: nn.Module) -> None:
    """Replace encoders that contain a thinner layer by encoders without nested tensors, in place."""
    own = (LayerNorm, RMSNorm, GroupNorm, MultiheadAttention)
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoder) or isinstance(module, TransformerEncoder):
            continue
        if any(isinstance(inner, own) for inner in module.layers.modules()):
            if type(module) is nn.TransformerEncoder:
                module.__class__ = TransformerEncoder
                vars(module)["clears_padding"] = module.use_nested_tensor
            module.use_nested_tensor = False


SWAPS: dict[str, type[nn.Module]] = {c.__name__: c for c in (LayerNorm, RMSNorm, GroupNorm, MultiheadAttention)}
