"""Texts of all items as word vectors, computed once, when first asked for."""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError

log = logging.getLogger(__name__)
_WORD = re.compile(r"\w\w+")


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
        items = [_places(captions, number) for captions in self.texts]
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
    # A letter and an accent of its own would part the word
    return _WORD.findall(unicodedata.normalize("NFC", text.lower()))


def word_vector(text: str, number: Mapping[str, int]) -> Tensor:
    """Presence of vocabulary words in a text.

    Args:
        text: The text.
        number: Word -> its place in the vocabulary.

    Returns:
        1 where a word is present, else 0: [V] float32.
    """
    vector = torch.zeros(len(number))
    vector[_places([text], number)] = 1.0
    return vector


def _places(captions: Sequence[str], number: Mapping[str, int]) -> list[int]:
    """Places of the vocabulary words that occur, ascending."""
    return sorted({number[word] for caption in captions for word in _words(caption) if word in number})
