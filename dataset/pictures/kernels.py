"""Compiled resizing: a box of a stored picture straight to the model's pixels, without an image object on the way.

Weights are those of Pillow's resizing: a filter as wide as the step between results, but no narrower than that of a
pixel. Sums are in float32 and rounded once. Pillow rounds, and cuts off at 0 and 255, after rows and again after
columns: results differ by one grey level of 255, and beside bicubic's overshoot at hard edges by a few.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from utils.compiled import compiled

Bytes = npt.NDArray[np.uint8]


@compiled
def resize_box(
    pixels: Bytes, box: npt.NDArray[np.float64], bounds: npt.NDArray[np.int64], cubic: bool, mirrored: bool, out: Bytes
) -> None:
    """Resizes a box of a picture.

    Args:
        pixels: Grey levels, [h, w, 3].
        box: Left, top, right, bottom in pixels, fractions allowed, [4].
        bounds: Pixels beyond these do not count: left, top, right, bottom, the last two exclusive, [4].
        cubic: Bicubic filter (a = -1/2); otherwise bilinear.
        mirrored: Whether the result is mirrored.
        out: Result, written in place, [3, R, S]: R rows, S columns.
    """
    rows, columns = out.shape[1], out.shape[2]
    first_row, row_counts, row_weights = _weights(box[1], box[3], bounds[1], bounds[3], rows, cubic)
    first_column, column_counts, column_weights = _weights(box[0], box[2], bounds[0], bounds[2], columns, cubic)
    left, right = first_column[0], first_column[columns - 1] + column_counts[columns - 1]
    flat = pixels.reshape(pixels.shape[0], 3 * pixels.shape[1])
    line = np.empty(3 * (right - left), np.float32)
    for row in range(rows):
        line[:] = 0
        for tap in range(row_counts[row]):
            weight = row_weights[row, tap]
            source = flat[first_row[row] + tap, 3 * left : 3 * right]
            for place in range(len(line)):
                line[place] += weight * np.float32(source[place])
        for column in range(columns):
            place = 3 * (first_column[column] - left)
            red = green = blue = np.float32(0.5)  # whole numbers are cut off below, which then rounds
            for tap in range(column_counts[column]):
                weight = column_weights[column, tap]
                red += weight * line[place]
                green += weight * line[place + 1]
                blue += weight * line[place + 2]
                place += 3
            target = columns - 1 - column if mirrored else column
            out[0, row, target] = np.uint8(min(max(red, np.float32(0)), np.float32(255)))
            out[1, row, target] = np.uint8(min(max(green, np.float32(0)), np.float32(255)))
            out[2, row, target] = np.uint8(min(max(blue, np.float32(0)), np.float32(255)))


@compiled
def _weights(start: float, end: float, low: int, high: int, size: int, cubic: bool) -> Any:
    """First pixel [size], number of pixels [size], and weights [size, taps] of every result on an interval."""
    step = (end - start) / size
    width = max(step, 1.0)
    reach = width * (2.0 if cubic else 1.0)
    first = np.empty(size, np.int64)
    counts = np.empty(size, np.int64)
    weights = np.zeros((size, int(math.ceil(2 * reach)) + 1), np.float32)
    for place in range(size):
        centre = start + (place + 0.5) * step
        first[place] = max(int(math.floor(centre - reach + 0.5)), low)
        counts[place] = min(int(math.floor(centre + reach + 0.5)), high) - first[place]
        total = 0.0
        for tap in range(counts[place]):
            far = abs(first[place] + tap + 0.5 - centre) / width
            if not cubic:
                weight = max(1.0 - far, 0.0)
            elif far < 1:
                weight = (1.5 * far - 2.5) * far * far + 1
            elif far < 2:
                weight = ((-0.5 * far + 2.5) * far - 4) * far + 2
            else:
                weight = 0.0
            weights[place, tap] = weight
            total += weight
        weights[place] /= total
    return first, counts, weights
