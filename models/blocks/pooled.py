"""Methods with one hash head per modality on CLIP's pooled features: what they share beside their loss."""

from abc import abstractmethod
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from common.errors import UserError
from common.losses import full_precision
from common.types import Batch, DataInfo, Progress, StepOutput
from models.base import ClipHashingModel, ClipModelConfig
from models.blocks.heads import TanhHead, sign_codes
from utils.distributed import gather_rows


class PooledHashingModel(ClipHashingModel):
    """A head for pictures and one for texts; the loss compares what they make of the global batch.

    A subclass builds the heads, `image_head` and `text_head`, says how their outputs are binarised, and writes the
    loss, `objective`.
    """

    fields = frozenset({"image", "text", "labels"})
    image_head: nn.Module
    text_head: nn.Module

    @abstractmethod
    def binarise(self, relaxed: Tensor) -> Tensor:
        """Outputs of a head, rows first -> codes in {-1, +1}, [B, *code_shape]."""

    def objective(self, image: Tensor, text: Tensor, labels: Tensor) -> StepOutput:
        """The loss of one batch; a method whose loss sees more than this has a `training_step` of its own.

        Args:
            image: What the head makes of the pictures, rows first, [B, ...].
            text: What the head makes of the texts, [B, ...].
            labels: Multi-hot labels, [B, C].

        Returns:
            Loss, and its terms without their weights.

        Raises:
            UserError: If the method defines neither this nor a `training_step`.
        """
        raise UserError(f"{type(self).__name__} has no training_step of its own, so it must define objective")

    def gathered_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """CLIP's pooled features of pictures and of texts, rows of the global batch, [B, E] each.

        Gathered before the heads, so that their dropout and batch statistics are those of one process.
        """
        image = gather_rows(self.backbone.image_features(batch["image"]))
        return image, gather_rows(self.backbone.text_features(batch["text"]))

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One step's loss over the global batch."""
        features = self.gathered_features(batch)
        image, text = self.image_head(features[0]), self.text_head(features[1])
        with full_precision(image.device):
            return self.objective(image, text, gather_rows(batch["labels"]))

    def encode_image(self, batch: Batch) -> Tensor:
        """Codes of pictures, [B, *code_shape]."""
        return self.binarise(self.image_head(self.backbone.image_features(batch["image"])))

    def encode_text(self, batch: Batch) -> Tensor:
        """Codes of texts, [B, *code_shape]."""
        return self.binarise(self.text_head(self.backbone.text_features(batch["text"])))


class TanhHashingConfig(ClipModelConfig):
    """The part of the `model:` section that describes tanh heads."""

    dropout: float = Field(ge=0, lt=1)  # before tanh: in training each bit is 0 with this probability


class TanhHashingModel(PooledHashingModel):
    """Relaxed codes by one linear map and tanh, for either modality; codes are their signs.

    Args:
        config: `model:` section.
        data: What is known of the training data.
        initialization: Of the heads, see `TanhHead`.
    """

    reference_names: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^(clip|backbone)\.", "backbone."),
        (r"^hash\.img_hash\.", "image_head."),
        (r"^hash\.txt_hash\.", "text_head."),
        (r"^(?:hash\.)?(image|text)_hash\.", r"\1_head."),
    )
    image_head: TanhHead
    text_head: TanhHead

    def __init__(self, config: TanhHashingConfig, data: DataInfo, initialization: Literal["torch", "fan_out"]) -> None:
        super().__init__(config, data)
        self.image_head, self.text_head = (
            TanhHead(data.clip.shape.embed_dim, config.bits, config.dropout, initialization) for _ in range(2)
        )

    def binarise(self, relaxed: Tensor) -> Tensor:
        """Relaxed codes [B, K] -> codes [B, K]."""
        return sign_codes(relaxed)
