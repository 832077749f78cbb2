"""What crosses the borders between loaders, models and runners."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor


class Batch(Mapping[str, Tensor]):
    """Rows of a data set, as named tensors whose first dimension is the row.

    The fields that data sets of this library offer (a data set from outside may add its own):

    * `index` [B] int64: the row's place in its split. Always there.
    * `image` [B, 3, R, R] float32: transformed and normalised pixels.
    * `text` [B, L] int64: token ids, zero padded; start and end are the last two of the vocabulary (OpenAI's: 49406 and
      49407).
    * `labels` [B, C] float32: multi-hot, 0 or 1.
    * `image_caption` [B, L] int64: token ids of a sentence that describes the picture.
    * `counterpart_image` [B, 3, R, R], `counterpart_caption` [B, L]: the picture that stands in for a text's missing
      partner, and that picture's caption (VTPH).
    * `bag_of_words` [B, V] float32: 1 where a vocabulary word occurs in the text.
    * `image_feature` [B, W], `text_feature` [B, V] float32: stored features, as they stand in a file.

    Args:
        fields: Named tensors, all with the same number of rows.
    """

    def __init__(self, fields: Mapping[str, Tensor]) -> None:
        self._fields = dict(fields)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._fields:
            raise KeyError(f"the batch has no field {name!r}, only {sorted(self._fields)}; a model names what it needs")
        return self._fields[name]

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    @property
    def rows(self) -> int:
        """Number of rows B."""
        return next(iter(self._fields.values())).shape[0]

    def only(self, names: frozenset[str]) -> "Batch":
        """A batch of the named fields and `index`; a name that is not there is left out."""
        return Batch({name: value for name, value in self._fields.items() if name in names or name == "index"})


@dataclass(frozen=True)
class Progress:
    """Where a run stands. Schedules over epochs are functions of this, not counters inside a module.

    Attributes:
        epoch: Epochs completed before this step, from 0.
        epochs: Epochs of the whole run.
        step: Optimizer steps taken before this one, over all epochs, from 0.
        steps_per_epoch: Steps of one epoch, the last partial batch counted.
    """

    epoch: int
    epochs: int
    step: int
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Stage:
    """A further backward pass of a training step, with updates of its own, for modules that train against others.

    Attributes:
        name: Of its loss in the log.
        optimizers: Names of the optimizers whose parameters it updates; it has a gradient for no other.
        compute: Gives its loss and terms when all before it have updated. It works on rows that the step has gathered
            and detached, so every process computes the same; it may write buffers.
    """

    name: str
    optimizers: tuple[str, ...]
    compute: Callable[[], "StepOutput"]


@dataclass(frozen=True)
class StepOutput:
    """What a training step returns.

    Attributes:
        loss: Scalar to minimise, over the global batch.
        terms: Scalars for the log, by name: `likelihood`, `contrast`, `quantization`, ... What is logged as `loss` is
            the loss itself.
        stages: What is to be done in turn once all optimizers have updated by `loss`.
    """

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class ClipShape:
    """Sizes of a CLIP with vision-transformer towers. Heads are always width / 64.

    Attributes:
        embed_dim: Width E of the joint space.
        image_size: Pixels R of the square input.
        patch_size: Pixels of a square patch.
        vision_width: Width of the image tower.
        vision_layers: Blocks of the image tower.
        text_width: Width of the text tower.
        text_layers: Blocks of the text tower.
        context_length: Rows of the text tower's position table; texts may be shorter.
        vocabulary: Rows of the token table; the largest id is the end-of-text token.
        activation: Of the MLPs; OpenAI's CLIP has `quick_gelu`, many of OpenCLIP's have `gelu`.
    """

    embed_dim: int
    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    text_width: int
    text_layers: int
    context_length: int
    vocabulary: int
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"

    @property
    def end_of_text(self) -> int:
        """Id of the end-of-text token: the largest of the vocabulary."""
        return self.vocabulary - 1

    @property
    def patches(self) -> int:
        """Number of patch tokens, the class token not counted."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class Backbone:
    """A CLIP to start from: its sizes and where its weights come from.

    Attributes:
        shape: Sizes of the towers.
        weights: State dict under OpenAI's key names, on the CPU; None where a checkpoint will supply the weights.
        source: Where the weights were read, for messages and the run's record.
    """

    shape: ClipShape
    weights: Mapping[str, Tensor] | None
    source: str


@dataclass(frozen=True)
class DataInfo:
    """What a model may know before the first batch.

    Attributes:
        num_train: Rows N of the training split.
        field_shapes: Shape of one row of every field that the model asked for, e.g. `{"labels": (24,), "text": (32,)}`.
        train_labels: Labels of the training split in the order of `index`, [N, C] float32 multi-hot; None for a model
            whose fields do not name `labels`.
        backbone: The CLIP to start from; None for a model without one.
        seed: The run's seed, for draws made once (`prepare`).
        cache_dir: Folder for results that are costly to make and depend on inputs alone (hash centres, ...).
    """

    num_train: int
    field_shapes: Mapping[str, tuple[int, ...]]
    train_labels: Tensor | None
    backbone: Backbone | None
    seed: int
    cache_dir: str

    @property
    def num_classes(self) -> int:
        """Number of classes C, for models that name `labels` among their fields."""
        if "labels" not in self.field_shapes:
            raise ValueError("labels are not among this model's fields, so it knows no classes; name them")
        return self.field_shapes["labels"][0]

    @property
    def clip(self) -> Backbone:
        """The backbone, for models that have one."""
        if self.backbone is None:
            raise ValueError("this model's settings name no backbone, so none was opened")
        return self.backbone

    @property
    def labels_of_training_set(self) -> Tensor:
        """`train_labels` [N, C], for models that name `labels` among their fields."""
        if self.train_labels is None:
            raise ValueError("labels are not among this model's fields, so they are not handed over")
        return self.train_labels
