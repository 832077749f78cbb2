"""Methods on features that stay the same: pooled ones of a frozen CLIP, or stored ones that a data set offers."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from common.types import Batch, DataInfo
from models.base import ClipModelConfig, HashingModel
from models.blocks.memory import FeatureCache
from models.clip.towers import CLIP
from utils.distributed import gather_rows

STORED = {"image": "image_feature", "text": "text_feature"}  # batch field -> what stands in for it


class FrozenFeaturesConfig(ClipModelConfig):
    """`model:` section of a method on frozen features."""

    # clip: pooled features of `backbone`, which is frozen; features: `image_feature` and `text_feature` of the data
    # set, of any width, and no backbone is opened
    input: Literal["clip", "features"]
    cache_features: bool  # keep CLIP's features of the training split in memory: 8 N E bytes

    @property
    def opens_backbone(self) -> bool:
        """As `ClipModelConfig.opens_backbone`."""
        return self.input == "clip"

    def reads(self, fields: frozenset[str]) -> frozenset[str]:
        """As `ModelConfig.reads`."""
        return fields if self.input == "clip" else frozenset(STORED.get(field, field) for field in fields)


class FrozenFeaturesModel(HashingModel):
    """Reads one feature vector of every picture and of every text; none of what makes them is trained.

    Args:
        config: `model:` section.
        data: What is known of the training data.
    """

    fields = frozenset({"image", "text"})
    reference_lacks: ClassVar[tuple[str, ...]] = (r"backbone\..*",)

    def __init__(self, config: FrozenFeaturesConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.cache_features = config.cache_features
        self.backbone: CLIP | None = None
        if config.opens_backbone:
            self.backbone = CLIP(data.clip.shape).requires_grad_(False)
            self.image_width = self.text_width = data.clip.shape.embed_dim
        else:
            self.image_width, self.text_width = (data.field_shapes[field][0] for field in STORED.values())
        self.features = FeatureCache(data.num_train)

    def prepare(self, data: DataInfo) -> None:
        """Copies the pretrained weights into the backbone."""
        if self.backbone is not None and data.clip.weights is not None:
            self.backbone.load_state_dict(dict(data.clip.weights))

    @property
    def rememberable_fields(self) -> frozenset[str]:
        """Pictures and token ids, of which training needs only CLIP's features."""
        return self.fields if self.backbone is not None and self.cache_features else frozenset()

    def remember(self, batch: Batch) -> None:
        """Keeps CLIP's features of rows of the training split, those of all processes on each."""
        index = gather_rows(batch["index"])
        for field, features_of in (("image", self.image_features), ("text", self.text_features)):
            if field in batch:
                self.features.write(field, index, gather_rows(features_of(batch)))

    @torch.no_grad()
    def image_features(self, batch: Batch) -> Tensor:
        """Features of the batch's pictures, computed or stored, [B, E] float32."""
        if self.backbone is None:
            return batch["image_feature"]
        return self.backbone.image_features(batch["image"]).float()

    @torch.no_grad()
    def text_features(self, batch: Batch) -> Tensor:
        """Features of the batch's texts, computed or stored, [B, E] float32."""
        if self.backbone is None:
            return batch["text_feature"]
        return self.backbone.text_features(batch["text"]).float()

    def training_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features of rows of the training split, remembered where they can be; pictures' and texts', [B, E] each."""
        index, kept = batch["index"], self.features
        image = kept.read("image", index) if "image" in kept else self.image_features(batch)
        text = kept.read("text", index) if "text" in kept else self.text_features(batch)
        return image, text
