"""What a checkpoint says of itself, so that its model is built and used where its data are gone."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from torch import Tensor

from common.checkpoint import Checkpoint
from common.config import Config
from common.errors import UserError
from common.schemas import Section
from common.types import ClipShape
from dataset.base import PairedDataset
from dataset.columns import WordColumn
from dataset.texts.tokenizer import SMALLEST, VOCABULARY
from models.base import ClipModelConfig, HashingModel, ModelConfig
from models.clip.formats import shape_of
from models.clip.towers import CLIP

KEY = "encoding"  # of a checkpoint's `meta`
PICTURES = frozenset({"image", "counterpart_image"})  # batch fields
TEXTS = frozenset({"text", "image_caption", "counterpart_caption"})
_TOWERS = "backbone."  # before the names of a CLIP's weights
_MOST_ROWS = 10**10
_WIDEST = 10**8  # of a row
_LARGEST = 10_000  # pixels of a picture's side


class Encoding(Section):
    """All that encoding needs beside the weights and the `model:` section.

    Attributes:
        num_train: Rows N of the training split: some methods keep something of each.
        field_shapes: Shape of one row of every batch field that the model reads, labels included.
        clip: Sizes of its CLIP; None for a model without one.
        view: What a picture is turned into, a name of `View`.
        tokens: `dataset.tokens`.
        vocabulary: Words of `bag_of_words` in the order of its columns; None where the model reads none, or the data
            set brought word vectors.
        precision: `run.precision`.
        batch_size: `evaluate.batch_size`.
        marks: Remarks that results of this model carry.
    """

    num_train: int = Field(ge=0, le=_MOST_ROWS)
    field_shapes: dict[str, Annotated[tuple[Annotated[int, Field(gt=0, le=_WIDEST)], ...], Field(min_length=1)]]
    clip: ClipShape | None
    view: Literal["SQUASHED"]
    tokens: int = Field(default=VOCABULARY, ge=SMALLEST, le=VOCABULARY)  # earlier versions do not say: they had CLIP's
    vocabulary: list[str] | None
    precision: Literal["float32", "bf16"]
    batch_size: int = Field(gt=0)
    marks: list[str]

    def require_whole(self, config: ModelConfig, method: type[HashingModel], place: str) -> None:
        """Refuses what no model of a method can be built with or fed by.

        Args:
            config: The `model:` section.
            method: The class that it is of.
            place: The checkpoint, for the message.

        Raises:
            UserError: With the first field, or the CLIP.
        """
        needed = config.reads(method.fields | method.image_fields | method.text_fields) - method.optional_fields
        lacking = sorted(needed - self.field_shapes.keys())
        if lacking:
            raise UserError(f"{place} is damaged ({KEY}.field_shapes lacks {', '.join(lacking)}); use another")
        if self.clip is None and isinstance(config, ClipModelConfig) and config.opens_backbone:
            raise UserError(f"{place} is damaged ({KEY} does not say the sizes of its CLIP); use another")
        for field, shape in self.field_shapes.items():
            side = shape[-1] if self.clip is None else self.clip.image_size
            if field in PICTURES and (shape != (3, side, side) or side > _LARGEST):
                raise UserError(f"{place} is damaged ({KEY}: {field} of the shape {list(shape)}); use another")
            longest = _LARGEST if self.clip is None else self.clip.context_length
            if field in TEXTS and (len(shape) != 1 or not 2 <= shape[0] <= longest):
                raise UserError(f"{place} is damaged ({KEY}: {field} of {shape[0]} tokens); use another")


def describe(config: Config, model: HashingModel, dataset: PairedDataset) -> dict[str, Any]:
    """The JSON values of a checkpoint's `encoding`.

    Args:
        config: The run's configuration.
        model: Its model.
        dataset: The data that it is trained on.
    """
    fields = model.fields | model.image_fields | model.text_fields
    words = dataset.columns["train"]["bag_of_words"] if "bag_of_words" in fields else None
    towers = dict(model.named_children()).get("backbone")
    described = Encoding(
        num_train=len(dataset.splits.train),
        field_shapes={name: shape for name, shape in dataset.offers("train").items() if name in fields},
        clip=towers.shape if isinstance(towers, CLIP) else None,
        view="SQUASHED",
        tokens=dataset.config.tokens,
        vocabulary=words.words.vocabulary if isinstance(words, WordColumn) else None,
        precision=config.run.precision,
        batch_size=config.evaluate.batch_size,
        marks=[*model.marks, *dataset.marks(model.image_fields | model.text_fields)],
    )
    values: dict[str, Any] = described.model_dump(mode="json")
    return values


def encoding_of(checkpoint: Checkpoint) -> Encoding:
    """What a checkpoint says of itself.

    Raises:
        UserError: If it does not: another program or an earlier version wrote it, or it is damaged.
    """
    if not checkpoint.is_ours:
        raise UserError(
            f"checkpoint {checkpoint.path} was written by another program and does not say how it encodes; evaluate it "
            "with --config-file and --evaluate, or train the method here"
        )
    if KEY not in checkpoint.meta:
        raise UserError(
            f"checkpoint {checkpoint.path} was written by an earlier version and lacks {KEY!r}: sizes of the training "
            "data, of pictures and texts; --evaluate still reads it, other uses need one that was trained since"
        )
    try:
        encoding = Encoding.model_validate_json(json.dumps(checkpoint.meta[KEY]))  # JSON has lists for tuples
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (KEY, *first["loc"])))
        raise UserError(f"checkpoint {checkpoint.path} is damaged ({where}: {first['msg']}); use another") from None
    towers = {name.removeprefix(_TOWERS): value for name, value in checkpoint.model.items() if name.startswith(_TOWERS)}
    if encoding.clip is None:
        return encoding
    if replace(encoding.clip, activation="quick_gelu") != shape_in(checkpoint, towers):
        raise UserError(
            f"checkpoint {checkpoint.path} is damaged (its CLIP has other sizes than {KEY} says); use another"
        )
    return encoding


def shape_in(checkpoint: Checkpoint, towers: Mapping[str, Tensor]) -> ClipShape:
    """`shape_of` the CLIP of a checkpoint.

    Raises:
        UserError: As `shape_of`, with the file.
    """
    try:
        return shape_of(towers)
    except UserError as error:
        raise UserError(f"checkpoint {checkpoint.path}: {error}") from None
