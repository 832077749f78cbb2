"""What the engines without a server share: rows in a catalog, and codes laid out for searching beside it.

The catalog is the truth. Codes laid out for searching are kept in `codes.npz` so that opening is fast; where that file
is missing, damaged, or of another generation than the catalog, it is made from the catalog again.
"""

import logging
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from runners.search.catalog import Catalog
from runners.search.engine import KINDS, Engine, Header, Kind, Rows, merged
from runners.search.settings import SearchConfig
from utils.files import atomic

logger = logging.getLogger(__name__)
CATALOG, CODES = "catalog.sqlite", "codes.npz"
Arrays = dict[str, npt.NDArray[Any]]


class Neighbours(ABC):
    """Codes of one kind, laid out for searching.

    Args:
        ids: Numbers of the rows, ascending, [N] int64.
        codes: Packed codes, [N, W] uint8.
        config: Settings.
    """

    @abstractmethod
    def __init__(self, ids: npt.NDArray[np.int64], codes: npt.NDArray[np.uint8], config: SearchConfig) -> None: ...

    @classmethod
    @abstractmethod
    def stored(cls, arrays: Mapping[str, npt.NDArray[Any]], config: SearchConfig) -> "Neighbours":
        """The same from what `arrays` gave."""

    @abstractmethod
    def arrays(self) -> Arrays:
        """All that `stored` needs."""

    @abstractmethod
    def add(self, ids: npt.NDArray[np.int64], codes: npt.NDArray[np.uint8]) -> None:
        """Adds rows; their numbers [N] are larger than all before. Codes are [N, W]."""

    @abstractmethod
    def remove(self, ids: npt.NDArray[np.int64]) -> None:
        """Removes rows [N]; numbers that are not there are passed over."""

    @abstractmethod
    def search(self, codes: npt.NDArray[np.uint8], k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Numbers and distances of the nearest rows of codes [Q, W], [Q, any] int64 each, -1 where there is none."""


class Embedded(Engine):
    """An engine that lives in the index's folder."""

    neighbours: ClassVar[type[Neighbours]]

    def __init__(self, folder: Path, header: Header, config: SearchConfig, *, writable: bool) -> None:
        self.folder = folder
        self.header = header
        self.config = config
        if not writable and not (folder / CATALOG).is_file():
            raise UserError(f"index {folder} is damaged: {CATALOG} is missing; remove the folder and index again")
        self.catalog = Catalog(folder / CATALOG, header.width, writable=writable)
        self._kinds = self._read() or self._build()

    def count(self, kinds: Sequence[Kind] = KINDS) -> int:
        """As `Engine.count`."""
        return self.catalog.count(kinds)

    def listing(self) -> Iterator[tuple[int, Kind, str, str]]:
        """As `Engine.listing`."""
        return self.catalog.listing()

    def metadata(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """As `Engine.metadata`."""
        return self.catalog.metadata(ids)

    def codes(self, ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """As `Engine.codes`."""
        return self.catalog.codes(ids)

    def add(self, rows: Rows) -> None:
        """As `Engine.add`."""
        self.catalog.add(rows)
        for kind in KINDS:
            own = np.flatnonzero(np.array([other == kind for other in rows.kinds], bool))
            self._kinds[kind].add(rows.ids[own], rows.codes[own])

    def remove(self, ids: Sequence[int]) -> None:
        """As `Engine.remove`."""
        self.catalog.remove(ids)
        for neighbours in self._kinds.values():
            neighbours.remove(np.array(ids, np.int64))

    def search(
        self, codes: npt.NDArray[np.uint8], k: int, kinds: Sequence[Kind] = KINDS
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """As `Engine.search`."""
        return merged([self._kinds[kind].search(codes, k) for kind in kinds], k)

    def save(self) -> None:
        """As `Engine.save`: one transaction of the catalog."""
        self._write(self.catalog.commit())

    def close(self) -> None:
        """As `Engine.close`."""
        self.catalog.close()

    def _build(self) -> dict[Kind, Neighbours]:
        return {kind: self.neighbours(*self.catalog.all_codes(kind), self.config) for kind in KINDS}

    def _write(self, generation: int) -> None:
        arrays = {f"{kind}.{name}": array for kind in KINDS for name, array in self._kinds[kind].arrays().items()}
        with atomic(self.folder / CODES) as temporary, open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, generation=np.array(generation), **arrays)  # zip: with checksums

    def _read(self) -> dict[Kind, Neighbours] | None:
        """What `_write` wrote of the catalog's present generation, else None."""
        path, generation = self.folder / CODES, self.catalog.generation
        if not path.is_file():
            if generation:
                logger.info("%s is missing; making it from %s", path, CATALOG)
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            if int(arrays.pop("generation")) != generation:
                return None  # a process was killed between the two files
            return {
                kind: self.neighbours.stored(
                    {name.removeprefix(f"{kind}."): value for name, value in arrays.items() if name.startswith(kind)},
                    self.config,
                )
                for kind in KINDS
            }
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            logger.warning("%s is damaged; making it from %s", path, CATALOG)
            return None
