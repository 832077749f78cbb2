"""The contract of an index engine: rows of codes, added, removed, searched, made durable.

An engine knows rows: a number, a packed code, the kind of what was encoded (picture or text) and what the user wants to
see of it. What an item is, which files are new and how hits are shown stands in `runners/search/index.py`.

Letters: Q queries, N rows, k hits, W bytes of a packed code.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt

from runners.search.settings import SearchConfig

Kind = Literal["image", "text"]
KINDS: tuple[Kind, ...] = ("image", "text")


@dataclass(frozen=True)
class Rows:
    """Rows to be added.

    Attributes:
        ids: Their numbers, [N] int64, all different, none in use.
        codes: Packed codes, [N, W] uint8.
        kinds: Of each row: an encoded picture or an encoded text.
        keys: Of each row: what it was made from, such as a path; equal keys of one kind are the same thing.
        stamps: Of each row: the state of what it was made from; another stamp means that it has changed.
        metadata: Of each row: JSON values to be shown with a hit.
    """

    ids: npt.NDArray[np.int64]
    codes: npt.NDArray[np.uint8]
    kinds: Sequence[Kind]
    keys: Sequence[str]
    stamps: Sequence[str]
    metadata: Sequence[dict[str, Any]]

    def __len__(self) -> int:
        """Number of rows N."""
        return len(self.ids)


@dataclass(frozen=True)
class Header:
    """What an index holds codes of; fixed when it is made.

    Attributes:
        engine: Registered name of the engine.
        bits: Length K of a code.
        codes_per_item: Codes of an item, n.
        fingerprint: Of the model whose codes these are.
        model: What the user calls that model: method, bits and checkpoint.
        format: Of the folder's files.
    """

    engine: str
    bits: int
    codes_per_item: int
    fingerprint: str
    model: str
    format: Literal["cross-modal-hashing-index/1"] = "cross-modal-hashing-index/1"

    @property
    def width(self) -> int:
        """Bytes W of a packed code."""
        return -(-self.bits // 8)


class Engine(ABC):
    """Keeps rows of codes and finds the nearest by Hamming distance.

    Changes are seen by the next search and are durable after `save`; a process killed before leaves the state of the
    last `save`, unless an engine's own documentation says what it leaves.

    Args:
        folder: The index's folder, which exists; an engine on a server keeps nothing there.
        header: What the index holds.
        config: Settings of the engine, from `configs/search.yaml` or the command line.
        writable: Whether `add`, `remove` and `save` will be called.

    Raises:
        UserError: If a package is missing, files are damaged, or a server cannot be reached.
    """

    ties_by_number: ClassVar[bool] = True  # of the rows at the last distance that fits, whether the first are kept

    @abstractmethod
    def __init__(self, folder: Path, header: Header, config: SearchConfig, *, writable: bool) -> None: ...

    @abstractmethod
    def count(self, kinds: Sequence[Kind] = KINDS) -> int:
        """Number of rows of some kinds."""

    @abstractmethod
    def listing(self) -> Iterator[tuple[int, Kind, str, str]]:
        """Number, kind, key and stamp of every row, in the order of numbers."""

    @abstractmethod
    def metadata(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """What was stored with some rows, in the order asked for.

        Raises:
            KeyError: If there is no such row.
        """

    @abstractmethod
    def codes(self, ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Packed codes of some rows in the order asked for, [N, W] uint8.

        Raises:
            KeyError: If there is no such row.
        """

    @abstractmethod
    def add(self, rows: Rows) -> None:
        """Adds rows."""

    @abstractmethod
    def remove(self, ids: Sequence[int]) -> None:
        """Removes rows; numbers that are not there are passed over."""

    @abstractmethod
    def search(
        self, codes: npt.NDArray[np.uint8], k: int, kinds: Sequence[Kind] = KINDS
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The nearest rows of some kinds.

        Args:
            codes: Packed codes of the queries, [Q, W] uint8.
            k: Hits wanted of each query, at least 1; it may exceed the number of rows.
            kinds: At least one.

        Returns:
            Numbers and Hamming distances of the hits, [Q, k] int64 each, by distance, then number. Where there are
            fewer than k rows the rest is -1.
        """

    @abstractmethod
    def save(self) -> None:
        """Makes all changes durable, together."""

    def close(self) -> None:  # noqa: B027 - some engines hold nothing open
        """Gives back what the engine holds open; unsaved changes are dropped."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def merged(
    parts: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]], k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The k best of several results of the same queries.

    Args:
        parts: Numbers and distances, [Q, any] int64 each, -1 where there is no hit.
        k: Hits kept.

    Returns:
        Numbers and distances, [Q, k] int64, by distance, then number; -1 where there are fewer.
    """
    ids = np.concatenate([part[0] for part in parts], axis=1)
    distances = np.concatenate([part[1] for part in parts], axis=1)
    far = np.where(ids < 0, np.iinfo(np.int64).max, distances)
    order = np.lexsort((ids, far), axis=1)[:, :k]
    ids, distances = np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)
    distances = np.where(ids < 0, -1, distances)  # FAISS has 2^31 - 1 there
    short = k - ids.shape[1]
    if short > 0:
        pad = ((0, 0), (0, short))
        ids, distances = np.pad(ids, pad, constant_values=-1), np.pad(distances, pad, constant_values=-1)
    return ids, distances
