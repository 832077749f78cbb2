"""The contract every method keeps.

Letters for shapes, the same everywhere: B rows of the global batch, N rows of a split, Q queries, D database items,
C classes, K bits, n codes an item, L tokens, E embedding width.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from common.errors import UserError
from common.places import Mark
from common.schemas import Section
from common.types import Batch, DataInfo, Progress, StepOutput
from models.clip.towers import CLIP


class ModelConfig(Section):
    """The part of the YAML's `model:` section that every method has."""

    name: str  # registered name of the method
    bits: int = Field(gt=0, le=65536)  # K, length of a code

    def reads(self, fields: frozenset[str]) -> frozenset[str]:
        """The batch fields that a model with these settings reads where its class names `fields`."""
        return fields


class ClipModelConfig(ModelConfig):
    """`model:` section of a method on CLIP; the run opens the backbone that it names."""

    # ViT-B/32 | ViT-B/16 | ViT-L/14, a weight file, or the config of a run that trains one
    backbone: Annotated[str, Mark.READ]

    @property
    def opens_backbone(self) -> bool:
        """Whether these settings have a use for the backbone."""
        return True


ParamGroups = dict[str, dict[str, list[nn.Parameter]]]


class HashingModel(nn.Module, ABC):
    """A cross-modal hashing method: batch -> loss, and image or text -> code.

    All state is parameters or persistent buffers, so that `.to(device)` moves it, the checkpoint holds it and a
    resumed run is exact. The loss is that of the global batch: rows are gathered from all processes
    (`utils.distributed`), then everything is computed as if on one device. Random draws use torch's global generator,
    which the runner seeds alike on every process before every step; a layer before the gathering draws for the rows of
    all processes (`models.blocks.dropout`), so that their generators stay alike. A CLIP that the settings name is the
    attribute `backbone`, where checkpoints look for it.
    """

    Config: ClassVar[type[ModelConfig]]
    # Named by the class; those of a model are what its settings make of them, see ModelConfig.reads.
    fields: frozenset[str]  # batch fields of training_step; what is not named is not handed over
    image_fields: frozenset[str] = frozenset({"image"})  # batch fields of encode_image
    text_fields: frozenset[str] = frozenset({"text"})  # batch fields of encode_text
    optional_fields: ClassVar[frozenset[str]] = frozenset()  # of the above: those that a split may lack
    reference_names: ClassVar[tuple[tuple[str, str], ...]] = ()  # (pattern, replacement), see import_reference
    reference_lacks: ClassVar[tuple[str, ...]] = ()  # patterns of state for may_be_absent

    def __init__(self, config: ModelConfig, data: DataInfo) -> None:
        """Builds modules, and buffers of final shape. Opens no file and moves nothing."""
        super().__init__()
        self.bits = config.bits
        self.fields = config.reads(self.fields)
        self.image_fields, self.text_fields = config.reads(self.image_fields), config.reads(self.text_fields)

    def prepare(self, data: DataInfo) -> None:  # noqa: B027 - most methods have nothing to prepare
        """Fills parameters and buffers once per run, before the first step; not called when resuming."""

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """`training_step`, under the name that DistributedDataParallel wraps."""
        return self.training_step(batch, progress)

    @property
    def rememberable_fields(self) -> frozenset[str]:
        """Fields of `fields` of which `remember` can keep all that training steps need."""
        return frozenset()

    def remember(self, batch: Batch) -> None:
        """Keeps what training steps need of the batch's fields, for these rows of the training split.

        Called over the whole split before training, and again when a run goes on, with those of `rememberable_fields`
        that are the same in every epoch; the batches of training steps then lack them. Batches are those of the first
        epoch wherever the run stands, so what is kept is the same to the last bit. It is no part of the checkpoint.

        Raises:
            UserError: If the method names such fields and does not define this.
        """
        raise UserError(f"{type(self).__name__} names rememberable_fields, so it must define remember")

    @abstractmethod
    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        """Loss of the global batch; writes memory banks. `batch` holds this process's rows and the model's `fields`."""

    @abstractmethod
    def encode_image(self, batch: Batch) -> Tensor:
        """Codes in {-1, +1} of the batch's `image_fields`, [B, *code_shape] float32. Changes no state."""

    @abstractmethod
    def encode_text(self, batch: Batch) -> Tensor:
        """Codes in {-1, +1} of the batch's `text_fields`, [B, *code_shape] float32. Changes no state."""

    @abstractmethod
    def param_groups(self) -> ParamGroups:
        """`{optimizer: {group: parameters}}`; the names equal those of the YAML's `optim:` section."""

    @property
    def loss_reaches_all(self) -> bool:
        """Whether the loss of every step has a gradient for every trainable parameter.

        Several processes then share gradients as they come, without looking for those that will not.
        """
        return True

    @property
    def code_lengths(self) -> tuple[int, ...]:
        """Lengths of the codes that stand side by side in what the encoders return; the first is the headline."""
        return (self.bits,)

    @property
    def codes_per_item(self) -> int:
        """Number n of codes of an item; the distance of two items is that of their nearest pair of codes."""
        return 1

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of what the encoders return of an item: (sum(code_lengths),), or (n, sum(code_lengths)) for n > 1."""
        width = sum(self.code_lengths)
        return (width,) if self.codes_per_item == 1 else (self.codes_per_item, width)

    @property
    def marks(self) -> tuple[str, ...]:
        """Remarks that results must carry, such as 'database texts are encoded with their picture'."""
        return ()

    @classmethod
    def may_be_absent(cls, name: str) -> bool:
        """Whether a reference checkpoint may lack this entry of the state: training needs it, codes do not."""
        return any(re.fullmatch(pattern, name) for pattern in cls.reference_lacks)

    @classmethod
    def import_reference(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Renames the entries of a state dict that the authors' code (or the unified peer) wrote to ours.

        Works on any part of one, so gradients can be renamed too. Each name is rewritten by every pair of
        `reference_names` whose pattern it matches, in order; an empty result drops the entry. Several names may stand
        for one of ours, such as a module that was saved twice.

        Args:
            state: Tensors under the reference's key names, any shapes.

        Returns:
            The same tensors under this model's key names.

        Raises:
            UserError: If names that stand for one of ours hold different tensors.
        """
        renamed: dict[str, Tensor] = {}
        for name, value in state.items():
            new = name
            for pattern, replacement in cls.reference_names:
                new = re.sub(pattern, replacement, new)
            if new in renamed and not torch.equal(renamed[new], value):
                raise UserError(
                    f"the checkpoint holds two different tensors for {new}, the second as {name}, but {cls.__name__} "
                    "has one; it is damaged, or of another method"
                )
            if new:
                renamed[new] = value
        return renamed


class ClipHashingModel(HashingModel):
    """A method whose features come from CLIP: holds `backbone` and loads its weights in `prepare`."""

    def __init__(self, config: ClipModelConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.backbone = CLIP(data.clip.shape)
        self.backbone.logit_scale.requires_grad_(False)  # hashing losses never use it; it would have no gradient

    def prepare(self, data: DataInfo) -> None:
        """Copies the pretrained weights into the backbone."""
        if data.clip.weights is not None:
            self.backbone.load_state_dict(dict(data.clip.weights))

    def param_groups(self) -> ParamGroups:
        """One optimizer, CLIP and everything else at rates of their own."""
        return {"main": self.backbone_and_head()}

    def backbone_and_head(self, *apart: str) -> dict[str, list[nn.Parameter]]:
        """Trained parameters of CLIP, `backbone`, and of all other modules, `head`, but those named as `apart`."""
        groups: dict[str, list[nn.Parameter]] = {"backbone": [], "head": []}
        for name, parameter in self.named_parameters():
            module = name.partition(".")[0]
            if parameter.requires_grad and module not in apart:
                groups["backbone" if module == "backbone" else "head"].append(parameter)
        return groups
