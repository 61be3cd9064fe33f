"""A decoder-only transformer over tokens: GPT-2's blocks, with rotary positions and no biases.

No layer looks across samples, nor from a position to a later one. Padding at the end of a sequence
therefore changes none of the outputs before it, and no attention mask is needed: a loss that leaves
padded labels out is all it takes.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp.errors import BadInputError

INIT_STD = 0.02
ROTARY_BASE = 10_000.0
MOST_LAYERS = 4096

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of every position's angles, (length, head size / 2) each."""


class GPT(nn.Module):
    """Embedding, `layers` pre-norm blocks of causal attention and MLP, a norm, a linear head.

    Weights start as GPT-2's (Radford et al. 2019): normal with standard deviation 0.02, divided by
    √(2 · layers) where a layer's output is added to the residual stream. Positions enter through
    rotary embedding alone (Su et al. 2021, arXiv 2104.09864), so that no length is the longest.
    There are layers · (12 · width² + 4 · width) + 2 · width parameters and one embedding of
    vocab_size · width, or two without `tie_weights`.

    Args:
        layers: number of blocks.
        heads: attention heads of each block.
        width: features of the residual stream, a multiple of 2 · heads; the MLP is 4 times as wide.
        dropout: probability of dropping an embedding's, an attention's or a residual's element,
            0 ≤ dropout < 1; no seed pairs it across N.
        tie_weights: use the embedding as the head.
        vocab_size: number of tokens.

    Maps (batch, length) to (batch, length, vocab_size). Raises `BadInputError` on unusable values.
    """

    def __init__(
        self,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        dropout: float = 0.0,
        tie_weights: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("layers", layers), ("heads", heads), ("width", width)):
            if value < 1:
                raise BadInputError(f"model.{name}={value} must be at least 1")
        if layers > MOST_LAYERS:
            raise BadInputError(f"model.layers={layers} must be at most {MOST_LAYERS:,}")
        if width % (2 * heads):
            fitting = max(1, round(width / (2 * heads))) * 2 * heads
            raise BadInputError(
                f"model.width={width} cannot be split among model.heads={heads} heads of an even size: "
                f"the nearest width is {fitting}"
            )
        if not 0 <= dropout < 1:
            raise BadInputError(f"model.dropout={dropout} must be at least 0 and below 1")
        if vocab_size is None:
            raise BadInputError(
                "model.vocab_size is not known, since the data set has no attribute `classes`: "
                "give the number of tokens, for example model.vocab_size=256"
            )
        if vocab_size < 1:
            raise BadInputError(f"model.vocab_size={vocab_size} must be at least 1")
        self.head_size = width // heads
        self.embedding = nn.Embedding(vocab_size, width)
        self.dropout = _dropout(dropout)
        self.blocks = nn.ModuleList(Block(heads, width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        if tie_weights:
            self.head.weight = self.embedding.weight
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                to_stream = name.endswith(".output.weight")
                nn.init.normal_(weight, std=INIT_STD / (math.sqrt(2 * layers) if to_stream else 1.0))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits, (batch, length, vocab_size), of token indices (batch, length), int64."""
        hidden = self.dropout(self.embedding(input_ids))
        rotation = rotary_tables(input_ids.shape[1], self.head_size, self.embedding.weight)
        for block in self.blocks:
            hidden = block(hidden, rotation)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), of x (batch, length, width)."""

    def __init__(self, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(heads, width, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                input=nn.Linear(width, 4 * width, bias=False),
                activation=nn.GELU(),
                output=nn.Linear(4 * width, width, bias=False),
            )
        )
        self.dropout = _dropout(dropout)

    def forward(self, hidden: Tensor, rotation: Rotation) -> Tensor:
        """Return (batch, length, width) of the same, and of the positions' rotation."""
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), rotation))
        added: Tensor = self.dropout(self.mlp(self.mlp_norm(hidden)))
        return hidden + added


class CausalSelfAttention(nn.Module):
    """Multi-head attention from every position to itself and those before it."""

    def __init__(self, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor, rotation: Rotation) -> Tensor:
        """Return (batch, length, width) of the same, and of the positions' rotation."""
        projected = self.queries_keys_values(hidden).unflatten(-1, (3, self.heads, -1))
        # Three of (batch, heads, length, head size).
        queries, keys, values = projected.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(
            rotate(queries, rotation),
            rotate(keys, rotation),
            values,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
        )
        output: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return output


def rotary_tables(length: int, head_size: int, weight: Tensor) -> Rotation:
    """Return cosines and sines for positions 0..length-1, on the weight's device.

    Pair i of a head turns by position · 10000^(-2i / head_size) radians. The tables are float64 for
    float64 weights and float32 for all others: bfloat16 cannot tell position 256 from 257. They are
    made anew in every pass, since a buffer would be rounded when the model is cast.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    pairs = torch.arange(0, head_size, 2, device=weight.device, dtype=dtype)
    positions = torch.arange(length, device=weight.device, dtype=dtype)
    angles = positions.unsqueeze(1) * ROTARY_BASE ** (-pairs / head_size)
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair (i, i + head size / 2) of heads (..., length, head size); the dtype stays."""
    cosine, sine = rotation
    one, other = heads.chunk(2, dim=-1)
    turned = torch.cat((one * cosine - other * sine, other * cosine + one * sine), dim=-1)
    return turned.to(heads.dtype)


def _dropout(probability: float) -> nn.Module:
    return nn.Dropout(probability) if probability > 0 else nn.Identity()
