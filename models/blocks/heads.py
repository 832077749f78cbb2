"""Hash heads, and the ways to binarise, that two or more methods use."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

_watchers: list[list[Tensor]] = []


@contextmanager
def watch_relaxed() -> Iterator[list[Tensor]]:
    """Within the block, the relaxed codes of which codes are made by sign go into the list that it yields.

    Each is [B, K] (or [B, n, K]), in the order of the calls; those of softmax pairs are p(+1) - p(-1), in [-1, 1].
    """
    seen: list[Tensor] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.pop()


def sign_codes(relaxed: Tensor) -> Tensor:
    """Binarises by sign; 0 counts as positive, so that a code has no third value.

    Args:
        relaxed: Real values, [B, K].

    Returns:
        Codes in {-1, +1}, [B, K] float32.
    """
    for seen in _watchers:
        seen.append(relaxed)
    return (relaxed >= 0).float() * 2 - 1


def pair_softmax(logits: Tensor) -> Tensor:
    """Softmax over consecutive pairs.

    Args:
        logits: Entries 2k and 2k+1 belong to bit k, [B, 2K].

    Returns:
        Probabilities of -1 and +1 for every bit, [B, 2K] float32 (float64 for float64).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    pairs = rearrange(logits, "B (K two) -> B K two", two=2).softmax(-1)
    return rearrange(pairs, "B K two -> B (K two)")


def pair_codes(pairs: Tensor) -> Tensor:
    """Binarises softmax pairs: +1 where the second of the pair is larger; a tie gives -1.

    Args:
        pairs: Two values per bit, [B, 2K].

    Returns:
        Codes in {-1, +1}, [B, K] float32.
    """
    minus, plus = rearrange(pairs, "B (K two) -> two B K", two=2)
    for seen in _watchers:
        seen.append(plus - minus)
    return (plus > minus).float() * 2 - 1


def init_fan_out(linear: nn.Linear) -> nn.Linear:
    """Draws weights uniformly from +-sqrt(6 / outputs) and sets the bias to 0; returns the same module."""
    bound = math.sqrt(6 / linear.out_features)
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)
    return linear


class TanhHead(nn.Module):
    """One linear map, dropout before the activation, tanh.

    Args:
        width: Width E of the features.
        bits: K.
        dropout: Probability in [0, 1).
        initialization: Of the map, `torch` (torch's default) or `fan_out` (`init_fan_out`).
    """

    def __init__(self, width: int, bits: int, dropout: float, initialization: Literal["torch", "fan_out"]) -> None:
        super().__init__()
        self.fc = nn.Linear(width, bits)
        if initialization == "fan_out":
            init_fan_out(self.fc)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, E] -> relaxed codes [B, K] float32 in (-1, 1)."""
        relaxed: Tensor = self.dropout(self.fc(features)).float().tanh()
        return relaxed


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that takes a batch of one row, which has no variance, by its running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x` [B, E] over the batch; returns [B, E]."""
        if self.training and x.shape[0] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


class AttentionPairHead(nn.Module):
    """Self-attention over a sequence of one token, normalisation, one linear map, ReLU, softmax over pairs.

    With one token the attention weight is 1, so only values are computed; query and key rows of the in-projection are
    kept as parameters (zero gradient) because weight decay and per-tensor clipping act on the whole tensor.

    Args:
        width: Width E of the features.
        bits: K.
        norm: `BatchNorm(E)` or `LayerNorm(E)`. Batch statistics are those of the rows given: give the global batch.

    Source:
        DCMHT as its author re-implemented it, and TwDH (TMM 2024), whose head is the same.
    """

    def __init__(self, width: int, bits: int, norm: nn.Module) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 1)  # heads make no difference to a single token
        self.norm = norm
        self.fc = init_fan_out(nn.Linear(width, 2 * bits))

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, E] -> softmax pairs [B, 2K] float32; a pair whose logits are both cut by ReLU is a tie."""
        width = features.shape[-1]
        weight, bias = self.attention.in_proj_weight[2 * width :], self.attention.in_proj_bias[2 * width :]
        mixed = self.attention.out_proj(F.linear(features, weight, bias))
        return pair_softmax(F.relu(self.fc(self.norm(mixed))))


PAIR_HEAD_NAMES = (  # reference name -> ours, for `reference_names` of methods with an AttentionPairHead
    (r"^hash\.img_hash\.", "image_head."),
    (r"^hash\.txt_hash\.", "text_head."),
    (r"^((?:image|text)_head)\.atten\.", r"\1.attention."),
    (r"^((?:image|text)_head)\.fc2\.", r"\1.fc."),
)
