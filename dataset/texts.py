"""Texts of all items: token ids and word vectors, each computed once, when first asked for."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from dataset.tokenizer import tokenize
from utils.progress import progress

log = logging.getLogger(__name__)
_PART = 50_000  # texts turned into ids at a time
_WORD = re.compile(r"\w\w+")


class Captions:
    """Token ids of the captions of every item.

    Args:
        texts: Captions of every item; an item without any has one empty caption.
        length: Tokens L of a row.
    """

    def __init__(self, texts: Sequence[Sequence[str]], length: int) -> None:
        self.texts = [captions or ("",) for captions in texts]
        self.length = length

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
                tokens[start : start + len(part)] = tokenize(part, self.length)
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


class WordVectors:
    """Presence of the most frequent words in the texts of every item.

    Args:
        texts: Captions of every item; all captions of an item make up its text.
        size: Words V of the vocabulary.

    Source:
        Bag-of-words texts of CFRH and JDSH. Their data sets bring such vectors; this rule makes them from captions.
    """

    def __init__(self, texts: Sequence[Sequence[str]], size: int) -> None:
        self.texts = texts
        self.size = size

    @cached_property
    def vocabulary(self) -> list[str]:
        """The V most frequent words of all texts, most frequent first, ties in alphabetical order.

        Raises:
            UserError: If the texts have fewer words.
        """
        counts = Counter(word for captions in self.texts for caption in captions for word in _words(caption))
        if len(counts) < self.size:
            raise UserError(
                f"dataset.vocabulary is {self.size}, but the captions have {len(counts)} different words; "
                f"set it to {len(counts)} or less"
            )
        return sorted(counts, key=lambda word: (-counts[word], word))[: self.size]

    @cached_property
    def _present(self) -> tuple[Tensor, Tensor]:
        """Vocabulary words of all items, item after item, and where each item begins: a compressed sparse matrix."""
        number = {word: place for place, word in enumerate(self.vocabulary)}
        log.info("building word vectors of %d items over %d words", len(self.texts), self.size)
        items = [
            sorted({number[word] for caption in captions for word in _words(caption) if word in number})
            for captions in self.texts
        ]
        counts = np.fromiter(map(len, items), np.int64, len(items))
        words = np.fromiter((word for item in items for word in item), np.int64, counts.sum())
        return torch.from_numpy(words), torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))

    def rows(self, items: Tensor) -> Tensor:
        """Word vectors of some items.

        Args:
            items: Item numbers, [B] int64.

        Returns:
            1 where a word is present, else 0: [B, V] float32.
        """
        words, first = self._present
        counts = first[items + 1] - first[items]
        row = torch.repeat_interleave(torch.arange(len(items)), counts)
        before = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        place = torch.repeat_interleave(first[items], counts) + torch.arange(len(row)) - before
        vectors = torch.zeros(len(items), self.size)
        vectors[row, words[place]] = 1.0
        return vectors


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
