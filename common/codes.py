"""Binary codes outside of a training run: values in {-1, +1}, and the same as packed bits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UserError


@dataclass(frozen=True)
class Codes:
    """Codes of N items.

    Attributes:
        values: [N, K], or [N, n, K] for a method that gives an item n codes; int8 in {-1, +1}.
    """

    values: npt.NDArray[np.int8]

    def __post_init__(self) -> None:
        if self.values.ndim not in (2, 3) or self.values.dtype != np.int8:
            raise ValueError(
                f"codes are int8 of shape [N, K] or [N, n, K], not {self.values.dtype} {self.values.shape}"
            )
        if not (np.abs(self.values) == 1).all():
            raise ValueError("codes hold values other than -1 and +1")

    @property
    def bits(self) -> int:
        """Length K of a code."""
        return int(self.values.shape[-1])

    @property
    def codes_per_item(self) -> int:
        """Number n of codes of an item; 1 for most methods."""
        return int(self.values.shape[1]) if self.values.ndim == 3 else 1

    def packed(self) -> npt.NDArray[np.uint8]:
        """Bits in bytes: +1 is 1, the first bit of a code is the highest of its first byte, zeros fill the last byte.

        Returns:
            [N, ceil(K / 8)] or [N, n, ceil(K / 8)] uint8.
        """
        return np.packbits(self.values > 0, axis=-1)

    @classmethod
    def unpacked(cls, packed: npt.NDArray[np.uint8], bits: int) -> "Codes":
        """The codes whose `packed` is given: [..., ceil(K / 8)] uint8 and K.

        Raises:
            UserError: If the bytes are not those of codes of so many bits.
        """
        if packed.shape[-1] != -(-bits // 8):
            raise UserError(f"codes of {packed.shape[-1]} bytes are not codes of {bits} bits")
        return cls(np.unpackbits(packed, axis=-1, count=bits).astype(np.int8) * 2 - 1)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.values, dtype=dtype, copy=copy)

    def __len__(self) -> int:
        """Number of items N."""
        return len(self.values)

    def __getitem__(self, rows: slice | npt.NDArray[Any]) -> "Codes":
        """Some of the items."""
        return Codes(self.values[rows])

    def __iter__(self) -> Iterator[npt.NDArray[np.int8]]:
        return iter(self.values)
