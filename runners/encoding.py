"""What a checkpoint says of itself, so that its model is built and used where its data are gone."""

import json
from typing import Any, Literal

from pydantic import Field, ValidationError

from common.checkpoint import Checkpoint
from common.config import Config
from common.errors import UserError
from common.schemas import Section
from common.types import ClipShape
from dataset.base import PairedDataset
from dataset.columns import WordColumn
from dataset.texts.tokenizer import SMALLEST, VOCABULARY
from models.base import HashingModel
from models.clip.towers import CLIP

KEY = "encoding"  # of a checkpoint's `meta`


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

    num_train: int = Field(ge=0)
    field_shapes: dict[str, tuple[int, ...]]
    clip: ClipShape | None
    view: Literal["SQUASHED"]
    tokens: int = Field(default=VOCABULARY, ge=SMALLEST, le=VOCABULARY)  # earlier versions do not say: they had CLIP's
    vocabulary: list[str] | None
    precision: Literal["float32", "bf16"]
    batch_size: int = Field(gt=0)
    marks: list[str]


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
        return Encoding.model_validate_json(json.dumps(checkpoint.meta[KEY]))  # JSON has lists for tuples
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (KEY, *first["loc"])))
        raise UserError(f"checkpoint {checkpoint.path} is damaged ({where}: {first['msg']}); use another") from None
