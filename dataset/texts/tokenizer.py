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

import ftfy
import numpy as np
import regex
import torch
from torch import Tensor

START_OF_TEXT = 49406
END_OF_TEXT = 49407  # the largest id, so that a row's first maximum is its end
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_MERGES = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
_MERGE_COUNT = 49152 - 256 - 2  # the table lists more; CLIP's vocabulary ends here
_PIECES = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
# Texts that repairing and unescaping cannot change: printable ASCII and blanks, no `&`.
_PLAIN = re.compile(r"[ \t\n!-%'-~]*")


def tokenize(texts: Sequence[str], length: int) -> Tensor:
    """Token ids of texts, as CLIP makes them.

    A row is start, word pieces, end, zeros; pieces that do not fit are cut so that the end is always there. Id 0 is
    also a genuine piece (`!` inside a run of punctuation), so `ids == 0` may mark more than the padding.

    Args:
        texts: The texts.
        length: Tokens L of a row, at least 2.

    Returns:
        Ids, [N, L] int64.

    Raises:
        ValueError: If `length` is below 2.

    Source:
        CLIP (Radford et al., 2021), simple tokenizer; the cut and the padding are those of DCMHT and MITH.
    """
    if length < 2:
        raise ValueError(f"length is {length}; start and end alone take 2")
    bodies = [_encode(text, length - 2) for text in texts]
    sizes = np.fromiter(map(len, bodies), np.int64, len(bodies))
    ids = np.zeros((len(bodies), length), np.int64)
    places = np.arange(length)
    ids[:, 0] = START_OF_TEXT
    ids[(places > 0) & (places <= sizes[:, None])] = np.fromiter(chain.from_iterable(bodies), np.int64, sizes.sum())
    ids[np.arange(len(bodies)), sizes + 1] = END_OF_TEXT
    return torch.from_numpy(ids)


def _encode(text: str, room: int) -> list[int]:
    """Ids of a text's first `room` pieces."""
    if _PLAIN.fullmatch(text):
        words = text.lower().split()
    else:
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        words = regex.sub(r"\s+", " ", text).strip().lower().split(" ")
    return list(islice(chain.from_iterable(map(_word_ids, words)), room))


@lru_cache(maxsize=2**18)
def _word_ids(word: str) -> tuple[int, ...]:
    """Ids of a lower-case run of characters without blanks; a piece never reaches over a blank."""
    vocabulary, _, letters = _table()
    ids: list[int] = []
    for piece in _PIECES.findall(word):
        if piece in _SPECIAL:
            ids.append(vocabulary[piece])
        else:
            ids.extend(vocabulary[symbol] for symbol in _merge([letters[byte] for byte in piece.encode()]))
    return tuple(ids)


def _merge(symbols: list[str]) -> list[str]:
    """Joins neighbours, the pair that comes first in the table first, until no pair of the table is left."""
    _, ranks, _ = _table()
    symbols = [*symbols[:-1], symbols[-1] + "</w>"]
    while len(symbols) > 1:
        pairs = list(zip(symbols, symbols[1:], strict=False))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
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
    lines = gzip.decompress(_MERGES.read_bytes()).decode().split("\n")[1 : _MERGE_COUNT + 1]  # after a header line
    pairs = [(first, second) for first, second in (line.split() for line in lines)]
    alphabet = [letters[byte] for byte in (*printable, *others)]
    symbols = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in pairs)]
    symbols += _SPECIAL
    return (
        {symbol: number for number, symbol in enumerate(symbols)},
        {pair: rank for rank, pair in enumerate(pairs)},
        [letters[byte] for byte in range(256)],
    )
