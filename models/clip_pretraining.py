"""CLIP itself, trained from scratch: a small backbone for data that no public CLIP fits, and a baseline in the tables.

Paper: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
https://arxiv.org/abs/2103.00020. Authors' code: https://github.com/openai/CLIP (MIT), inference only.

Deviations:
1. Sizes, batch and schedule are those of a small data set; the towers, their initialisation and the loss are CLIP's.
2. Codes, which CLIP has none of, are the signs of the embedding: one bit a dimension, nothing trained for it.

Results reproduced: none, the paper's are of 400 million pairs; the towers equal the authors' (tests/golden/clip-*.npz).
"""

import dataclasses
import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import normalize

from common.errors import UserError
from common.losses import diagonal_contrast, full_precision
from common.registry import MODELS
from common.types import Batch, ClipShape, DataInfo, Progress, StepOutput
from models.base import HashingModel, ModelConfig, ParamGroups
from models.blocks.heads import sign_codes
from models.clip.towers import CLIP
from utils.distributed import gather_rows

Width = Annotated[int, Field(gt=0, le=65536, multiple_of=64)]
Count = Annotated[int, Field(gt=0, le=1_000_000)]


@MODELS.register("CLIP")
class ContrastivePretraining(HashingModel):
    """Both towers from random weights, by symmetric InfoNCE over the pairs of the global batch."""

    class Config(ModelConfig):
        """`model:` section: every field of `ClipShape`; `bits` equals `embed_dim`."""

        embed_dim: Count  # E, joint space
        image_size: Count  # R, pixels; equals dataset.image_size
        patch_size: Count  # pixels; divides image_size
        vision_width: Width  # heads are 64 wide
        vision_layers: Count
        text_width: Width
        text_layers: Count
        context_length: Count  # tokens; at least dataset.text_length
        vocabulary: Count  # rows of the token table; equals dataset.tokens; CLIP's: 49408
        activation: Literal["quick_gelu", "gelu"]  # of the MLPs; paper: quick_gelu
        temperature: float = Field(gt=0)  # at the start; it is learned. Paper: 0.07
        max_logit_scale: float = Field(ge=1)  # bound of the learned 1 / temperature. Paper: 100

        @model_validator(mode="after")
        def _sizes_fit(self) -> Self:
            if self.bits != self.embed_dim:
                raise ValueError(f"a bit is the sign of one dimension, so bits must equal embed_dim {self.embed_dim}")
            if self.image_size % self.patch_size:
                raise ValueError(f"patch_size must divide image_size {self.image_size}")
            return self

        @property
        def shape(self) -> ClipShape:
            """Sizes of the towers."""
            return ClipShape(**{size.name: getattr(self, size.name) for size in dataclasses.fields(ClipShape)})

    fields = frozenset({"image", "text"})

    def __init__(self, config: Config, data: DataInfo) -> None:
        super().__init__(config, data)
        self.backbone = CLIP(config.shape)
        nn.init.constant_(self.backbone.logit_scale, math.log(1 / config.temperature))
        self.max_log_scale = math.log(config.max_logit_scale)

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        """Symmetric InfoNCE: of all texts of the global batch, a picture should choose its own, and the reverse."""
        image = gather_rows(self.backbone.image_features(batch["image"]))  # [B, E]
        text = gather_rows(self.backbone.text_features(batch["text"]))  # [B, E]
        with full_precision(image.device):
            scale = self.backbone.logit_scale.clamp(max=self.max_log_scale).exp()
            loss = diagonal_contrast(scale * normalize(image) @ normalize(text).T)
        return StepOutput(loss, {"contrast": loss, "logit_scale": scale})

    def encode_image(self, batch: Batch) -> Tensor:
        """Signs of the picture's embedding, [B, K]."""
        return sign_codes(self.backbone.image_features(batch["image"]))

    def encode_text(self, batch: Batch) -> Tensor:
        """Signs of the text's embedding, [B, K]."""
        return sign_codes(self.backbone.text_features(batch["text"]))

    def param_groups(self) -> ParamGroups:
        """One optimizer, one group."""
        return {"main": {"backbone": list(self.backbone.parameters())}}


def export_clip(model: HashingModel) -> dict[str, Tensor]:
    """Weights of a model's CLIP under OpenAI's key names, float32 on the CPU, independent of the model.

    Args:
        model: A trained model with a `backbone`.

    Raises:
        UserError: If the model has no CLIP.
    """
    backbone = dict(model.named_children()).get("backbone")
    if not isinstance(backbone, CLIP):
        raise UserError(f"{type(model).__name__} trains no CLIP; name the config of a model that does (configs/CLIP)")
    return {name: value.detach().float().cpu().clone() for name, value in backbone.state_dict().items()}
