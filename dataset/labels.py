"""Labels as files have them: a column for each label, or one class number an item."""

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.errors import UserError
from dataset.mat_reader import number_matrix
from dataset.pictures.reading import Pictures

log = logging.getLogger(__name__)


def read_labels(value: npt.NDArray[Any] | Pictures, count: int, place: str) -> Tensor:
    """Multi-hot labels from 1 and 0, from 1 and -1, or from one class number per item.

    Args:
        value: What a file holds: [N, C], [C, N], or of class numbers [N], [N, 1], [1, N].
        count: Number of items N.
        place: Where it stands, for messages.

    Returns:
        [N, C] bool; of class numbers, C counts those that occur.

    Raises:
        UserError: If it is nothing of the kind.
    """
    if not isinstance(value, Pictures) and value.ndim == 1:
        value = value[:, None]
    labels = number_matrix(value, count)
    if labels is None:
        raise UserError(f"{place} is not a matrix of labels [N, C]; write 1 where an item has a label, else 0")
    single = labels.shape[1] == 1
    if single and np.isin(labels, (-1, 0, 1)).all() and not (labels == 1).all():
        raise UserError(
            f"{place} has one column of {_values(labels)}: one label that some items lack, or two classes; "
            "write class numbers from 1, or one column per label"
        )
    if single and not (labels == 1).all():
        return _one_hot(labels[:, 0], place)
    absent = -1 if (labels == -1).any() else 0
    wrong = (labels != absent) & (labels != 1)
    if wrong.any():
        row, column = (int(found[0]) for found in wrong.nonzero())
        raise UserError(
            f"{place}: row {row}, column {column} is {labels[row, column]}{' beside -1' if absent else ''}; "
            "labels are 1 and 0, 1 and -1, or one class number per item: write the file again"
        )
    if absent:
        log.info("%s: labels are 1 and -1; -1 is read as no label", place)
    return torch.from_numpy(labels == 1)


def _one_hot(numbers: npt.NDArray[Any], place: str) -> Tensor:
    """Labels [N, C] bool of items that have one class each; C counts the numbers [N] that occur, in their order."""
    wrong = ~((numbers >= 0) & (numbers == np.floor(numbers)))
    if wrong.any():
        row = int(wrong.nonzero()[0][0])
        raise UserError(
            f"{place}: row {row} is {numbers[row]}, which is no class number; write whole numbers, or one column per "
            "label with 1 and 0"
        )
    classes, columns = np.unique(numbers, return_inverse=True)
    if 2 * len(classes) > len(numbers):
        raise UserError(
            f"{place} has {len(classes)} different numbers for {len(numbers)} items, which are no classes that items "
            "share; write a class number per item, or one column per label with 1 and 0"
        )
    log.info(
        "%s: one class number per item, %d different from %d to %d; each is read as a label",
        place, len(classes), classes[0], classes[-1],
    )  # fmt: skip
    return torch.from_numpy(columns.reshape(-1, 1) == np.arange(len(classes)))


def _values(labels: npt.NDArray[Any]) -> str:
    return " and ".join(f"{value:g}" for value in np.unique(labels).astype(float))
