"""Exact search in memory with FAISS: every code is looked at."""

from collections.abc import Mapping
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from common.registry import INDEXES
from runners.search.embedded import Arrays, Embedded, Neighbours
from runners.search.settings import SearchConfig


class FlatNeighbours(Neighbours):
    """FAISS `IndexBinaryFlat`; rows lie by number, and counting (no heap) keeps that order at one distance."""

    def __init__(self, ids: npt.NDArray[np.int64], codes: npt.NDArray[np.uint8], config: SearchConfig) -> None:
        self.ids = ids
        self.codes = codes
        self._index: Any = None

    @classmethod
    def stored(cls, arrays: Mapping[str, npt.NDArray[Any]], config: SearchConfig) -> "FlatNeighbours":
        """As `Neighbours.stored`."""
        return cls(arrays["ids"], arrays["codes"], config)

    def arrays(self) -> Arrays:
        """As `Neighbours.arrays`."""
        return {"ids": self.ids, "codes": self.codes}

    def add(self, ids: npt.NDArray[np.int64], codes: npt.NDArray[np.uint8]) -> None:
        """As `Neighbours.add`: codes [N, W]."""
        self.ids, self.codes = np.concatenate([self.ids, ids]), np.concatenate([self.codes, codes])
        self._index = None

    def remove(self, ids: npt.NDArray[np.int64]) -> None:
        """As `Neighbours.remove`."""
        kept = ~np.isin(self.ids, ids)
        self.ids, self.codes = self.ids[kept], self.codes[kept]
        self._index = None

    def search(self, codes: npt.NDArray[np.uint8], k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """As `Neighbours.search`: codes [Q, W]."""
        if self._index is None:
            self._index = faiss.IndexBinaryFlat(8 * self.codes.shape[1])
            self._index.use_heap = False
            self._index.add(np.ascontiguousarray(self.codes))
        k = min(k, len(self.ids))
        if k == 0:
            return np.empty((len(codes), 0), np.int64), np.empty((len(codes), 0), np.int64)
        distances, places = self._index.search(np.ascontiguousarray(codes), k)
        return self.ids[places], distances.astype(np.int64)


@INDEXES.register("flat")
class Flat(Embedded):
    """Exact, in the index's folder, for up to some ten million codes."""

    neighbours = FlatNeighbours
