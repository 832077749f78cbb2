"""CLIP's byte-pair encoding: text -> token ids.

The merges table beside this file is OpenAI's, under the MIT licence (`bpe_simple_vocab_16e6.LICENSE`).
"""

import gzip
import html
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
import regex
import torch
from torch import Tensor

VOCABULARY = 49408  # CLIP's tokens
SMALLEST = 2 * 256 + 2  # every byte inside and at the end of a word, start and end of a text: no merges
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_MERGES = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
_PIECES = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
# Texts that repairing and unescaping cannot change: printable ASCII and blanks, no `&`.
_PLAIN = re.compile(r"[ \t\n!-%'-~]*")


def tokenize(texts: Sequence[str], length: int, vocabulary: int = VOCABULARY) -> Tensor:
    """Token ids of texts, as CLIP makes them.

    A row is start, word pieces, end, zeros; pieces that do not fit are cut so that the end is always there. Id 0 is
    also a genuine piece (`!` inside a run of punctuation), so `ids == 0` may mark more than the padding.

    Args:
        texts: The texts.
        length: Tokens L of a row, at least 2.
        vocabulary: Number of tokens, 514 to 49408. Fewer than CLIP's are those of the table's first merges, with
            the same ids; start and end are always the last two, so that a row's first maximum is its end.

    Returns:
        Ids, [N, L] int64.

    Raises:
        ValueError: If `length` is below 2, or there is no vocabulary of that size.

    Source:
        CLIP (Radford et al., 2021), simple tokenizer; the cut and the padding are those of DCMHT and MITH.
    """
    if length < 2:
        raise ValueError(f"length is {length}; start and end alone take 2")
    if not SMALLEST <= vocabulary <= VOCABULARY:
        raise ValueError(f"vocabulary is {vocabulary}; it has {SMALLEST} to {VOCABULARY} tokens")
    bodies = [_encode(text, length - 2, vocabulary) for text in texts]
    sizes = np.fromiter(map(len, bodies), np.int64, len(bodies))
    ids = np.zeros((len(bodies), length), np.int64)
    places = np.arange(length)
    ids[:, 0] = vocabulary - 2
    ids[(places > 0) & (places <= sizes[:, None])] = np.fromiter(chain.from_iterable(bodies), np.int64, sizes.sum())
    ids[np.arange(len(bodies)), sizes + 1] = vocabulary - 1
    return torch.from_numpy(ids)


def _encode(text: str, room: int, vocabulary: int) -> list[int]:
    """Ids of a text's first `room` pieces."""
    if _PLAIN.fullmatch(text):
        words = text.lower().split()
    else:
        import ftfy  # most texts need none of it, and loading it takes a tenth of a second

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        words = regex.sub(r"\s+", " ", text).strip().lower().split(" ")
    return list(islice(chain.from_iterable(_word_ids(word, vocabulary) for word in words), room))


@lru_cache(maxsize=2**18)
def _word_ids(word: str, vocabulary: int) -> tuple[int, ...]:
    """Ids of a lower-case run of characters without blanks; a piece never reaches over a blank."""
    numbers, _, letters = _table()
    ids: list[int] = []
    for piece in _PIECES.findall(word):
        if piece in _SPECIAL:
            ids.append(vocabulary - len(_SPECIAL) + _SPECIAL.index(piece))
        else:
            merged = _merge([letters[byte] for byte in piece.encode()], vocabulary - SMALLEST)
            ids.extend(numbers[symbol] for symbol in merged)
    return tuple(ids)


def _merge(symbols: list[str], merges: int) -> list[str]:
    """Joins neighbours, what comes first in the table first, until none of its first `merges` pairs is left."""
    _, ranks, _ = _table()
    symbols = [*symbols[:-1], symbols[-1] + "</w>"]
    while len(symbols) > 1:
        pairs = list(zip(symbols, symbols[1:], strict=False))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if ranks.get(best, merges) >= merges:
            break
        joined: list[str] = []
        place = 0
        while place < len(symbols):
            step = 2 if tuple(symbols[place : place + 2]) == best else 1
            joined.append("".join(symbols[place : place + step]))
            place += step
        symbols = joined
    return symbols


@cache
def _table() -> tuple[dict[str, int], dict[tuple[str, str], int], list[str]]:
    """Symbol -> id, pair -> rank, byte -> the printable character that stands for it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    lines = gzip.decompress(_MERGES.read_bytes()).decode().split("\n")[1 : VOCABULARY - SMALLEST + 1]  # after a header
    pairs = [(first, second) for first, second in (line.split() for line in lines)]
    alphabet = [letters[byte] for byte in (*printable, *others)]
    symbols = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in pairs)]
    return (
        {symbol: number for number, symbol in enumerate(symbols)},
        {pair: rank for rank, pair in enumerate(pairs)},
        [letters[byte] for byte in range(256)],
    )
