"""Search of the likeliest part of the codes with FAISS, for millions of them."""

from collections.abc import Mapping
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from common.registry import INDEXES
from runners.search.embedded import Arrays, Embedded, Neighbours
from runners.search.settings import SearchConfig

_CODES_A_LIST = 39  # fewer, and FAISS's clustering warns that its centres mean nothing


class IvfNeighbours(Neighbours):
    """FAISS `IndexBinaryIVF`: codes in lists around learned centres, of which a query looks into the nearest few.

    The centres are learned from some rows, evenly chosen: all of millions would take minutes and gigabytes. They are
    learned anew when the number of rows has doubled or halved since.
    """

    def __init__(self, ids: npt.NDArray[np.int64], codes: npt.NDArray[np.uint8], config: SearchConfig) -> None:
        self.config = config
        self.ids = ids
        self.codes = codes
        self._learn()

    @classmethod
    def stored(cls, arrays: Mapping[str, npt.NDArray[Any]], config: SearchConfig) -> "IvfNeighbours":
        """As `Neighbours.stored`."""
        made = cls.__new__(cls)
        made.config = config
        made.ids, made.codes, made.learned_from = arrays["ids"], arrays["codes"], int(arrays["learned_from"])
        made._index = faiss.deserialize_index_binary(arrays["faiss"])
        return made

    def arrays(self) -> Arrays:
        """As `Neighbours.arrays`."""
        index = faiss.serialize_index_binary(self._index)
        return {"ids": self.ids, "codes": self.codes, "learned_from": np.array(self.learned_from), "faiss": index}

    def add(self, ids: npt.NDArray[np.int64], codes: npt.NDArray[np.uint8]) -> None:
        """As `Neighbours.add`: codes [N, W]."""
        self.ids, self.codes = np.concatenate([self.ids, ids]), np.concatenate([self.codes, codes])
        if self._outgrown():
            self._learn()
        elif len(ids):
            self._index.add_with_ids(np.ascontiguousarray(codes), ids)

    def remove(self, ids: npt.NDArray[np.int64]) -> None:
        """As `Neighbours.remove`."""
        gone = np.isin(self.ids, ids)
        removed = self.ids[gone]
        self.ids, self.codes = self.ids[~gone], self.codes[~gone]
        if self._outgrown():
            self._learn()
        elif len(removed):
            self._index.remove_ids(removed)

    def search(self, codes: npt.NDArray[np.uint8], k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """As `Neighbours.search`: codes [Q, W]."""
        k = min(k, len(self.ids))
        if k == 0:
            return np.empty((len(codes), 0), np.int64), np.empty((len(codes), 0), np.int64)
        self._index.nprobe = self.config.probes
        distances, ids = self._index.search(np.ascontiguousarray(codes), k)
        return ids, distances.astype(np.int64)

    def _outgrown(self) -> bool:
        """Whether the centres were learned from less than half or more than twice as many rows."""
        return not self.learned_from / 2 <= len(self.ids) <= 2 * self.learned_from

    def _learn(self) -> None:
        """Learns the centres from the present rows and deals these into the lists."""
        bits = 8 * self.codes.shape[1]
        self.learned_from = len(self.ids)
        lists = max(1, min(self.config.lists, len(self.ids) // _CODES_A_LIST))
        self._centres = faiss.IndexBinaryFlat(bits)  # FAISS keeps only a pointer to it
        self._index: Any = faiss.IndexBinaryIVF(self._centres, bits, lists)
        if len(self.ids):
            codes = np.ascontiguousarray(self.codes)
            self._index.train(np.ascontiguousarray(codes[:: max(1, len(codes) // (_CODES_A_LIST * lists))]))
            self._index.add_with_ids(codes, self.ids)


@INDEXES.register("ivf")
class Ivf(Embedded):
    """Approximate, in the index's folder, for millions of codes: `search.probes` trades speed against hits found."""

    ties_by_number = False
    neighbours = IvfNeighbours
