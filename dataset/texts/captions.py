"""Captions of all items as token ids, computed once, when first asked for."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dataset.texts.tokenizer import tokenize
from utils.progress import progress

_PART = 50_000  # texts turned into ids at a time


class Captions:
    """Token ids of the captions of every item.

    Args:
        texts: Captions of every item; an item without any has one empty caption.
        length: Tokens L of a row.
        vocabulary: Number of different tokens, as of `tokenize`.
    """

    def __init__(self, texts: Sequence[Sequence[str]], length: int, vocabulary: int) -> None:
        self.texts = [captions or ("",) for captions in texts]
        self.length = length
        self.vocabulary = vocabulary

    @cached_property
    def first(self) -> Tensor:
        """Row of `tokens` at which the captions of each item begin, and the end, [N + 1] int64."""
        counts = np.fromiter(map(len, self.texts), np.int64, len(self.texts))
        return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))

    @cached_property
    def tokens(self) -> Tensor:
        """Ids of all captions of all items, item after item, [captions, L] int32."""
        flat = [caption for captions in self.texts for caption in captions]
        tokens = torch.empty(len(flat), self.length, dtype=torch.int32)
        with progress(total=len(flat), desc="tokens", unit="text", leave=False) as bar:
            for start in range(0, len(flat), _PART):
                part = flat[start : start + _PART]
                tokens[start : start + len(part)] = tokenize(part, self.length, self.vocabulary)
                bar.update(len(part))
        return tokens

    def rows(self, items: Tensor, draws: Tensor) -> Tensor:
        """One caption of each item.

        Args:
            items: Item numbers, [B] int64.
            draws: Which caption: numbers in [0, 1), [B]; 0 is the first.

        Returns:
            Token ids, [B, L] int64.
        """
        return self.tokens[self.first[items] + self._choice(items, draws)].long()

    def chosen(self, items: Tensor, draws: Tensor) -> list[str]:
        """The texts of which `rows` gives the ids, for item numbers [B] and draws [B]."""
        choices = self._choice(items, draws).tolist()
        return [self.texts[item][choice] for item, choice in zip(items.tolist(), choices, strict=True)]

    def _choice(self, items: Tensor, draws: Tensor) -> Tensor:
        """Which caption of each item the draws choose, [B] int64."""
        return ((self.first[items + 1] - self.first[items]) * draws).long()
