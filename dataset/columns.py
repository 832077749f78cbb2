"""Fields of a split: what a batch takes from a data set, row by row."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from common.errors import UserError
from dataset.texts.captions import Captions
from dataset.texts.word_vectors import WordVectors


class Column(ABC):
    """One field of one split."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""

    @property
    def constant(self) -> bool:
        """Whether a row has only one value; augmentation of pictures is not the column's."""
        return True


@dataclass(frozen=True)
class PictureColumn(Column):
    """Pictures; loaders read and transform them.

    Attributes:
        numbers: Numbers of the pictures, row by row, [n] int64.
        picture_shape: Shape after the transform, (3, R, R).
    """

    numbers: Tensor
    picture_shape: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """(3, R, R)."""
        return self.picture_shape


class RowColumn(Column, ABC):
    """A field whose rows lie in memory."""

    @abstractmethod
    def rows(self, rows: Tensor, draws: Tensor) -> Tensor:
        """Some rows of the field.

        Args:
            rows: Places in the split, [B] int64.
            draws: A number in [0, 1) for every row, for fields that choose among several values, [B].

        Returns:
            The rows, [B, ...].
        """


@dataclass(frozen=True)
class MatrixColumn(RowColumn):
    """Rows of a matrix, of zeros and ones for labels and most word vectors.

    Attributes:
        matrix: One row per item, [N, C] bool or float32.
        items: Item numbers of the split, [n] int64.
    """

    matrix: Tensor
    items: Tensor

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or (len(self.items) and int(self.items.max()) >= len(self.matrix)):
            raise UserError(
                f"a field of a data set has the shape {list(self.matrix.shape)}; "
                "it is a matrix with a row for every item"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """(C,)."""
        return (self.matrix.shape[1],)

    def rows(self, rows: Tensor, draws: Tensor) -> Tensor:
        """The matrix at `rows` [B]: [B, C] float32. `draws` [B] is not needed."""
        return self.matrix[self.items[rows]].float()


@dataclass(frozen=True)
class CaptionColumn(RowColumn):
    """One caption of every item.

    Attributes:
        captions: Captions of all items.
        items: Item numbers of the split, [n] int64.
    """

    captions: Captions
    items: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(L,)."""
        return (self.captions.length,)

    @property
    def constant(self) -> bool:
        """Whether every item has one caption, so that nothing is chosen."""
        return all(len(self.captions.texts[item]) == 1 for item in self.items.tolist())

    def rows(self, rows: Tensor, draws: Tensor) -> Tensor:
        """Token ids of the captions that `draws` [B] chooses at `rows` [B]: [B, L] int64."""
        return self.captions.rows(self.items[rows], draws)


@dataclass(frozen=True)
class WordColumn(RowColumn):
    """Word vectors of the items' texts.

    Attributes:
        words: Word vectors of all items.
        items: Item numbers of the split, [n] int64.
    """

    words: WordVectors
    items: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(V,)."""
        return (self.words.size,)

    def rows(self, rows: Tensor, draws: Tensor) -> Tensor:
        """1 where a word is present in the texts at `rows` [B], else 0: [B, V] float32. `draws` [B] is not needed."""
        return self.words.rows(self.items[rows])
