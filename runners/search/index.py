"""An index: codes of pictures and texts in a folder, searched by code.

    hits = Index.open("photos-index").search(codes, k=10)

The folder holds `index.json`, which says what the codes are of, `search.yaml`, the settings, and what the engine keeps
there. `index.json` appears last, when the first rows are safe, so a folder with it is a whole index.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import yaml
from pydantic import TypeAdapter

from common.codes import Codes
from common.config import load_section
from common.errors import UserError
from common.registry import INDEXES
from runners.search.engine import KINDS, Engine, Header, Kind, Rows, merged
from runners.search.settings import SearchConfig
from utils.files import FolderLock, make_folder, write_json, write_text

HEADER, SETTINGS = "index.json", "search.yaml"
_HEADER = TypeAdapter(Header)


@dataclass(frozen=True)
class Hit:
    """One item found.

    Attributes:
        id: Its number in the index.
        kind: Whether its picture or its text was found.
        distance: Hamming distance to the query, in bits.
        metadata: What was stored with it: `path` or `text`, and whatever else the input brought.
    """

    id: int
    kind: Kind
    distance: int
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One item to be indexed.

    Attributes:
        kind: What was encoded.
        key: What it was made from; one item for each key of a kind.
        stamp: State of what it was made from.
        metadata: JSON values to be shown with a hit.
    """

    kind: Kind
    key: str
    stamp: str
    metadata: dict[str, Any]


class Index:
    """Codes of items, with what they were made from.

    An item of a method with several codes an item takes as many rows of the engine; its distance is that of the nearest
    pair of codes.

    Args:
        folder: The index's folder.
        header: What it holds.
        config: Settings.
        writable: Whether it will be changed; a second writer is refused.
    """

    def __init__(self, folder: Path, header: Header, config: SearchConfig, *, writable: bool = False) -> None:
        self.folder = folder
        self.header = header
        self.config = config
        self._lock = None
        engine = INDEXES.get(header.engine)  # before anything is made
        if writable:
            make_folder(folder, "--save-dir")
            self._lock = FolderLock(folder)
            if not self._lock.acquire(wait=False):
                raise UserError(f"another process is changing the index {folder}; wait for it to end")
        self.engine: Engine = engine(folder, header, config, writable=writable)

    @classmethod
    def open(cls, folder: str | Path, *, writable: bool = False, overrides: Sequence[str] = ()) -> Self:
        """Opens an index.

        Args:
            folder: Its folder.
            writable: Whether it will be changed.
            overrides: Entries `search.key=value`, beside the settings that the index was made with.

        Raises:
            UserError: If there is none, it is damaged, or its server cannot be reached.
        """
        folder = Path(folder)
        header = read_header(folder)
        if not (folder / SETTINGS).is_file():
            raise UserError(f"index {folder} is damaged: {SETTINGS} is missing; remove the folder and index again")
        config = load_section(folder / SETTINGS, "search", SearchConfig, list(overrides))
        if config.engine != header.engine:
            raise UserError(
                f"search.engine={config.engine}: the index {folder} was made with {header.engine}; make a new one in "
                "another folder"
            )
        return cls(folder, header, config, writable=writable)

    @property
    def _per_item(self) -> int:
        return self.header.codes_per_item

    def __len__(self) -> int:
        """Number of items."""
        return self.count()

    def count(self, kinds: Sequence[Kind] = KINDS) -> int:
        """Number of items of some kinds."""
        return self.engine.count(kinds) // self._per_item

    def listing(self) -> Iterator[tuple[int, Kind, str, str]]:
        """Number, kind, key and stamp of every item, by number."""
        for row, kind, key, stamp in self.engine.listing():
            if row % self._per_item == 0:
                yield row // self._per_item, kind, key, stamp

    def codes(self, ids: Sequence[int]) -> Codes:
        """Codes of some items.

        Raises:
            KeyError: If there is no such item.
        """
        rows = [item * self._per_item + part for item in ids for part in range(self._per_item)]
        packed = self.engine.codes(rows)
        if self._per_item > 1:
            packed = packed.reshape(len(ids), self._per_item, -1)
        return Codes.unpacked(packed, self.header.bits)

    def hit(self, item: int, distance: int = 0) -> Hit:
        """An item as a hit.

        Raises:
            KeyError: If there is no such item.
        """
        stored = self.engine.metadata([item * self._per_item])[0]
        return Hit(item, stored["kind"], distance, {key: value for key, value in stored.items() if key != "kind"})

    def add(self, ids: Sequence[int], codes: Codes, entries: Sequence[Entry]) -> None:
        """Adds items.

        Args:
            ids: Their numbers, none in use.
            codes: Their codes.
            entries: What they are.

        Raises:
            UserError: If the codes are not of the index's length.
        """
        self._require_fitting(codes)
        per_item = self._per_item
        packed = codes.packed().reshape(len(entries) * per_item, self.header.width)
        rows = [entry for entry in entries for _ in range(per_item)]
        self.engine.add(
            Rows(
                ids=(np.array(ids, np.int64)[:, None] * per_item + np.arange(per_item)).reshape(-1),
                codes=packed,
                kinds=[row.kind for row in rows],
                keys=[row.key for row in rows],
                stamps=[row.stamp for row in rows],
                metadata=[{"kind": row.kind, **row.metadata} for row in rows],
            )
        )

    def remove(self, ids: Sequence[int]) -> None:
        """Removes items; numbers that are not there are passed over."""
        self.engine.remove([item * self._per_item + part for item in ids for part in range(self._per_item)])

    def save(self) -> None:
        """Makes all changes durable, together."""
        self.engine.save()
        if not (self.folder / HEADER).exists():
            write_text(self.folder / SETTINGS, yaml.safe_dump({"search": self.config.model_dump()}, sort_keys=False))
            write_json(self.folder / HEADER, asdict(self.header))

    def nearest(
        self, codes: Codes, k: int, kinds: Sequence[Kind] = KINDS
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Numbers and distances of the nearest items.

        Args:
            codes: Codes of Q queries.
            k: Hits wanted, at least 1.
            kinds: What is searched.

        Returns:
            [Q, k] int64 each, by distance, then number; -1 where there are fewer items.

        Raises:
            UserError: If the codes are not of the index's length.
        """
        self._require_fitting(codes)
        per_item = self._per_item
        if per_item == 1:
            return self.engine.search(codes.packed(), k, kinds)
        # Rows before an item's best one belong to items that are at least as near: k n rows hold k items.
        queries = codes.packed().reshape(len(codes) * per_item, -1)
        rows, distances = self.engine.search(queries, k * per_item, kinds)
        shape = (len(codes), per_item * k * per_item)
        items = np.where(rows < 0, -1, rows // per_item).reshape(shape)
        return merged([_first_of_each(items, distances.reshape(shape))], k)

    def search(self, codes: Codes, k: int | None = None, kinds: Sequence[Kind] = KINDS) -> list[list[Hit]]:
        """The nearest items of every query, nearest first.

        Args:
            codes: Codes of Q queries, from the same model.
            k: Hits wanted; by default `search.k` of the index.
            kinds: What is searched.

        Returns:
            At most k hits for each query.

        Raises:
            UserError: If the codes are not of the index's length.
        """
        ids, distances = self.nearest(codes, self.config.k if k is None else k, kinds)
        return [
            [self.hit(item, distance) for item, distance in zip(row, far, strict=True) if item >= 0]
            for row, far in zip(ids.tolist(), distances.tolist(), strict=True)
        ]

    def close(self) -> None:
        """Closes the index; what was not saved is dropped."""
        self.engine.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _require_fitting(self, codes: Codes) -> None:
        header = self.header
        if (codes.bits, codes.codes_per_item) != (header.bits, header.codes_per_item):
            raise UserError(
                f"index {self.folder} holds {header.codes_per_item} x {header.bits} bits an item, these codes have "
                f"{codes.codes_per_item} x {codes.bits}; use the model that the index was made with ({header.model})"
            )


def read_header(folder: Path) -> Header:
    """What an index holds.

    Raises:
        UserError: If there is no index, or its `index.json` is damaged.
    """
    path = folder / HEADER
    if not path.is_file():
        raise UserError(f"{folder} holds no index ({HEADER} is missing); make one with --index CHECKPOINT --input ...")
    try:
        return _HEADER.validate_json(path.read_bytes())
    except (OSError, ValueError):
        raise UserError(
            f"{path} is damaged, or of another version of this library; remove the folder and index again"
        ) from None


def _first_of_each(
    items: npt.NDArray[np.int64], distances: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Leaves of every item in a row the nearest occurrence; -1 at the others. [Q, any] int64 each."""
    order = np.lexsort((distances, items), axis=1)
    sorted_items = np.take_along_axis(items, order, 1)
    again = np.zeros_like(items, dtype=bool)
    np.put_along_axis(again, order[:, 1:], sorted_items[:, 1:] == sorted_items[:, :-1], 1)
    return np.where(again, -1, items), np.where(again, -1, distances)
