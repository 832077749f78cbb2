"""MITH: multi-granularity interactive transformer hashing.

Paper: Y. Liu, Q. Wu, Z. Zhang, J. Zhang, G. Lu, "Multi-Granularity Interactive Transformer Hashing for Cross-modal
Retrieval", ACM MM 2023, https://doi.org/10.1145/3581783.3612411.
Authors' code: https://github.com/DarrenZZhang/MM23-MITH, commit 4583a7c, no licence stated; none of it is used here.

Every modality is hashed twice from one CLIP pass: globally from the pooled feature, and locally from its tokens pooled
into K concept vectors. The code is the sign of the sum. The head and its loss terms stand in
`models/blocks/concept_head.py`.

Deviations from the authors' code:
1. The banks are part of the checkpoint and drawn from the run's seed, so that a resumed run is exact.
2. A code has no zeros: the sign of an exact 0 is +1.
3. CLIP's weights are read as float32; the authors round the matrices of a float32 file to float16.

Results reproduced: the golden cases of the authors' and of the unified peer's code (tests/golden/MITH-*.npz).
"""

from pydantic import Field
from torch import Tensor

from common.losses import diagonal_contrast, full_precision
from common.registry import MODELS
from common.types import Batch, DataInfo, Progress, StepOutput
from models.base import ClipHashingModel
from models.blocks.concept_head import CONCEPT_HEAD_NAMES, ConceptBanks, ConceptCodes, ConceptHead, ConceptHeadConfig
from utils.distributed import gather_rows


class MITHConfig(ConceptHeadConfig):
    """`model:` section of MITH."""

    temperature: float = Field(gt=0)  # tau of both contrastive terms
    local_likelihood_weight: float = Field(ge=0)  # local hashes within a modality
    global_likelihood_weight: float = Field(ge=0)  # beta: global hashes across modalities
    quantization_weight: float = Field(ge=0)  # gamma
    contrast_weight: float = Field(ge=0)  # delta
    token_contrast_share: float = Field(ge=0)  # alpha: token alignment relative to instance alignment
    distillation_weight: float = Field(ge=0)  # mu


@MODELS.register("MITH")
class MITH(ClipHashingModel):
    """Global and local concept hashing on CLIP.

    Args:
        config: `model:` section.
        data: What is known of the training data.
    """

    Config = MITHConfig
    fields = frozenset({"image", "text", "labels"})
    reference_names = ((r"^(clip|backbone)\.", "backbone."), *CONCEPT_HEAD_NAMES)
    reference_lacks = (r"banks\..*",)

    def __init__(self, config: MITHConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.config = config
        self.head = ConceptHead(data.clip.shape.embed_dim, config)
        self.banks = ConceptBanks(data.num_train, data.num_classes, config)

    def prepare(self, data: DataInfo) -> None:
        """Loads CLIP's weights and fills the banks."""
        super().prepare(data)
        self.banks.prepare(data)

    def hash_image(self, image: Tensor) -> ConceptCodes:
        """Hashes of pictures [B, 3, R, R]; the class token is the pooled feature, the patches are the tokens."""
        tokens = self.backbone.image_tokens(image)
        return self.head.hash_image(tokens[:, 0], tokens[:, 1:])

    def hash_text(self, ids: Tensor) -> ConceptCodes:
        """Hashes of texts [B, L]; padding and end-of-text have no vote, start-of-text has one."""
        padding = ids == 0
        pooled, tokens = self.backbone.text_tokens(ids, padding)
        return self.head.hash_text(pooled, tokens, padding | (ids == self.backbone.shape.end_of_text))

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One step's loss over the global batch; writes the banks."""
        c = self.config
        image, text = self.hash_image(batch["image"]), self.hash_text(batch["text"])
        aligned_image, aligned_text = self.head.align(image.concepts, text.concepts)
        with full_precision(aligned_image.device):
            concept_logits = aligned_image @ aligned_text.transpose(1, 2) / c.temperature  # [b, K, K]
            token_contrast = gather_rows(diagonal_contrast(concept_logits)).mean()
            image, text = image.gathered(), text.gathered()
            contrast = diagonal_contrast(image.feature @ text.feature.T / c.temperature)
            terms = self.banks.terms(gather_rows(batch["index"]), gather_rows(batch["labels"]), image, text)
        loss = (
            c.local_likelihood_weight * (terms["local_likelihood_image"] + terms["local_likelihood_text"])
            + c.global_likelihood_weight * (terms["global_likelihood_image"] + terms["global_likelihood_text"])
            + c.quantization_weight * (terms["quantization_image"] + terms["quantization_text"])
            + c.contrast_weight * (contrast + c.token_contrast_share * token_contrast)
            + c.distillation_weight * terms["distillation"]
        )
        return StepOutput(loss, {**terms, "contrast": contrast, "token_contrast": token_contrast})

    def encode_image(self, batch: Batch) -> Tensor:
        """Codes of pictures, [B, K]."""
        return self.hash_image(batch["image"]).codes

    def encode_text(self, batch: Batch) -> Tensor:
        """Codes of texts, [B, K]."""
        return self.hash_text(batch["text"]).codes
