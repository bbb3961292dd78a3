"""Attention, and the pre-norm block of a transformer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Block", "attend"]


def attend(qkv: Tensor, head_width: int, causal: bool = False) -> Tensor:
    """Scaled dot-product attention, with softmax, of heads side by side.

    Args:
        qkv: Queries, keys and values, ``[B, T, 3 * width]``.
        head_width: Of a head; ``width`` is a multiple of it.
        causal: Whether a token sees only itself and those before it.

    Returns:
        The heads' outputs, ``[B, T, width]``.
    """
    examples, tokens, _ = qkv.shape
    heads = qkv.view(examples, tokens, 3, -1, head_width)
    q, k, v = heads.permute(2, 0, 3, 1, 4)  # each [B, H, T, E]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Attention and an MLP four times as wide with GELU, each added to what it was given.

    Args:
        width: Of a token.
        head_width: Of an attention head.
        causal: See `attend`.
    """

    def __init__(self, width: int, head_width: int = 16, causal: bool = True) -> None:
        super().__init__()
        self.head_width, self.causal = head_width, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``[B, T, width]``, as the input."""
        x = x + self.mix(attend(self.qkv(self.norm1(x)), self.head_width, self.causal))
        added: Tensor = x + self.mlp(self.norm2(x))
        return added
