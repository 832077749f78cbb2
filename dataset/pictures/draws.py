"""Random numbers as a function of (seed, epoch, row): no generator, so no state to save.

Order, augmentation and the choice among captions come from here; they are therefore the same for any number of
processes and loader workers, and after any interruption.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class Purpose(IntEnum):
    """What numbers are drawn for; different purposes get independent numbers."""

    ORDER = 1
    AUGMENT = 2
    TRAIN_CAPTION = 3
    EVALUATE_CAPTION = 4


def uniform(seed: int, epoch: int, purpose: Purpose, rows: npt.NDArray[np.int64], count: int) -> Floats:
    """`count` numbers in [0, 1) for every row, each row's independent of the other rows.

    Args:
        seed: The run's seed, in [0, 2^64).
        epoch: Epoch, from 0.
        purpose: What for.
        rows: Places in the split, [B].
        count: Numbers per row.

    Returns:
        The numbers, [B, count].

    Source:
        SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), started from a hash of the arguments.
    """
    key = np.zeros(1, np.uint64)
    for part in (seed, epoch, int(purpose)):
        key = _mix(key + _GAMMA ^ np.array([part], np.uint64))
    keys = _mix(key + _GAMMA ^ rows.astype(np.uint64))
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GAMMA  # wraps, as the generator's counter does
    return (_mix(keys[:, None] + steps) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, rows: int) -> npt.NDArray[np.int64]:
    """The order in which an epoch visits the rows of a split, [rows]."""
    return np.argsort(uniform(seed, epoch, Purpose.ORDER, np.arange(rows), 1)[:, 0], kind="stable").astype(np.int64)


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
