"""DCMHT: differentiable cross-modal hashing via multimodal transformers.

Paper: J. Tu, X. Liu, Z. Lin, R. Hong, M. Wang, "Differentiable Cross-modal Hashing via Multimodal Transformers",
ACM MM 2022, https://doi.org/10.1145/3503161.3548187.
Authors' code: https://github.com/kalenforn/DCHMT (the name swaps two letters), commit 79bd5e6, no licence stated; and
the author's later library https://github.com/kalenforn/clip-based-cross-modal-hash, commit 6d64ae2, here "the
re-implementation": another head, ReLU before the softmax, a quantisation term. None of it is used here.

Every bit is a two-way softmax on CLIP's pooled feature; a pairwise contrastive loss on the concatenated pairs pulls
items that share a label together and pushes the others a margin apart, within and across modalities.

`model.head`: `select` is the authors' model, the one of the paper; `linear` their ablation (tanh); `unified` the
re-implementation's.

Deviations from the authors' code:
1. `linear` is binarised by sign at test time; the release forgets to.
2. Distances are taken from differences, not from matrix products, so that an item's distance to itself is 0.
3. A last batch of one row trains with `unified` too: its image head then normalises by running statistics.
4. CLIP's weights are read as float32; the authors round the matrices of a float32 file to float16.

Results reproduced: the golden cases of the authors' code and of the re-implementation (tests/golden/DCMHT-*.npz).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from common.losses import pair_quantization
from common.registry import MODELS
from common.similarity import cosine_similarity, label_similarity
from common.types import DataInfo, StepOutput
from models.base import ClipModelConfig
from models.blocks.heads import (
    PAIR_HEAD_NAMES,
    AttentionPairHead,
    BatchNorm,
    TanhHead,
    init_fan_out,
    pair_codes,
    pair_softmax,
    sign_codes,
)
from models.blocks.pooled import PooledHashingModel

HIDDEN_WIDTH = 128  # of the select head, for every code length


class DCMHTConfig(ClipModelConfig):
    """`model:` section of DCMHT."""

    head: Literal["select", "linear", "unified"]  # authors' | authors' ablation | re-implementation's
    dropout: float = Field(ge=0, lt=1)  # before tanh; only the linear head has it
    # clipped_cosine: the re-implementation's cosine option
    similarity: Literal["euclidean", "cosine", "clipped_cosine"]
    loss_type: Literal["l1", "l2"]  # power of distances; clipped_cosine is a cross entropy and ignores it
    margin: float = Field(gt=0)  # vartheta, Eq. (10): fraction of bits in which dissimilar items should differ
    cosine_threshold: float = Field(ge=0)  # slack (cosine), or distance kept from 0 and 1 (clipped_cosine)
    quantization_weight: float = Field(ge=0)  # authors: none with select, 1 with linear; re-implementation: 0.001

    @field_validator("cosine_threshold")
    @classmethod
    def _clipping_leaves_an_interval(cls, threshold: float, info: ValidationInfo) -> float:
        if info.data.get("similarity") == "clipped_cosine" and not 0 < threshold < 0.5:
            raise ValueError("must be between 0 and 0.5 with model.similarity clipped_cosine")
        return threshold


class SelectHead(nn.Module):
    """The selecting mechanism: one hidden layer, then a two-way softmax per bit.

    The K pair maps keep tensors of their own, since BertAdam clips gradients per tensor.

    Args:
        width: Width E of the features.
        bits: K.
    """

    def __init__(self, width: int, bits: int) -> None:
        super().__init__()
        self.fc = init_fan_out(nn.Linear(width, HIDDEN_WIDTH))
        maps = [init_fan_out(nn.Linear(HIDDEN_WIDTH, 2)) for _ in range(bits)]
        self.bit_weights = nn.ParameterList(pair.weight for pair in maps)
        self.bit_biases = nn.ParameterList(pair.bias for pair in maps)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, E] -> softmax pairs [B, 2K] float32."""
        weights, biases = torch.cat(list(self.bit_weights)), torch.cat(list(self.bit_biases))  # [2K, 128], [2K]
        return pair_softmax(F.linear(F.relu(self.fc(features)), weights, biases))


@MODELS.register("DCMHT")
class DCMHT(PooledHashingModel):
    """Two-way softmax hashing on CLIP's pooled features.

    Args:
        config: `model:` section.
        data: What is known of the training data.
    """

    Config = DCMHTConfig
    reference_names = (
        (r"^(clip|backbone)\.", "backbone."),
        *PAIR_HEAD_NAMES,
        (r"^(image|text)_hash\.", r"\1_head."),
        (r"^(\w+_head)\.hash_list\.(\d+)\.weight$", r"\1.bit_weights.\2"),
        (r"^(\w+_head)\.hash_list\.(\d+)\.bias$", r"\1.bit_biases.\2"),
    )

    def __init__(self, config: DCMHTConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.config = config
        width = data.clip.shape.embed_dim
        self.image_head = _build_head(config, width, BatchNorm(width))
        self.text_head = _build_head(config, width, nn.LayerNorm(width))

    def objective(self, image: Tensor, text: Tensor, labels: Tensor) -> StepOutput:
        """The loss of relaxed codes.

        Args:
            image: Relaxed codes of the pictures, [B, 2K] (`linear`: [B, K]).
            text: Relaxed codes of the texts, of the same shape.
            labels: Multi-hot labels, [B, C].

        Returns:
            Loss, and its terms without their weights.
        """
        c = self.config
        terms: dict[str, Tensor] = {}
        similar = label_similarity(labels, labels)
        for name, a, b in (("cross", image, text), ("image", image, image), ("text", text, text)):
            terms[f"{name}_positive"], terms[f"{name}_negative"] = self.pair_loss(a, b, similar)
        loss = sum(terms.values(), start=image.new_zeros(()))
        quantization = tanh_quantization if c.head == "linear" else pair_quantization
        terms["quantization_image"], terms["quantization_text"] = quantization(image), quantization(text)
        loss = loss + c.quantization_weight * (terms["quantization_image"] + terms["quantization_text"]) / 2
        return StepOutput(loss, terms)

    def pair_loss(self, a: Tensor, b: Tensor, similar: Tensor) -> tuple[Tensor, Tensor]:
        """Contrastive loss of all pairs of rows, by the configured similarity.

        Args:
            a: Relaxed codes, [B, 2K] (`linear`: [B, K]).
            b: Relaxed codes, of the same shape.
            similar: 1 where a pair shares a label, else 0, [B, B].

        Returns:
            What similar pairs cost and what dissimilar pairs cost; each is a mean over all B^2 pairs.
        """
        c = self.config
        power = 1 if c.loss_type == "l1" else 2
        if c.similarity == "euclidean":
            return euclidean_contrast(a, b, similar, (2 * self.bits * c.margin) ** 0.5, power)
        if c.similarity == "cosine":
            return cosine_contrast(a, b, similar, c.cosine_threshold, power)
        both = clipped_cosine_entropy(a, b, similar, c.cosine_threshold)
        return both, both  # the re-implementation counts it as either part

    def binarise(self, relaxed: Tensor) -> Tensor:
        """Relaxed codes, [B, 2K] (`linear`: [B, K]) -> codes [B, K]."""
        return sign_codes(relaxed) if self.config.head == "linear" else pair_codes(relaxed)


def _build_head(config: DCMHTConfig, width: int, norm: nn.Module) -> nn.Module:
    """The head of one modality; `norm` [E] is that of the re-implementation's head."""
    if config.head == "select":
        return SelectHead(width, config.bits)
    if config.head == "unified":
        return AttentionPairHead(width, config.bits, norm)
    return TanhHead(width, config.bits, config.dropout, "fan_out")


def euclidean_contrast(a: Tensor, b: Tensor, similar: Tensor, margin: float, power: int) -> tuple[Tensor, Tensor]:
    """Pulls similar rows together and pushes dissimilar rows at least a margin apart.

    Args:
        a: Rows, [B, W].
        b: Rows, [B, W].
        similar: 1 for similar pairs, else 0, [B, B].
        margin: Distance that dissimilar pairs should have.
        power: 1 or 2.

    Returns:
        Means over all B^2 pairs of `similar d^power` and `(1 - similar) max(0, margin - d)^power`.

    Source:
        DCMHT, ACM MM 2022, Eq. (9)-(10). Differs from the authors' code: see Deviation 2.
    """
    distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # [B, B], gradient 0 at distance 0
    push = (margin - distances).clamp(min=0)
    return (similar * distances**power).mean(), ((1 - similar) * push**power).mean()


def cosine_contrast(a: Tensor, b: Tensor, similar: Tensor, threshold: float, power: int) -> tuple[Tensor, Tensor]:
    """The same by cosine distance `d = 1 - cos`: similar pairs within `threshold`, dissimilar pairs at a right angle.

    Args:
        a: Rows, [B, W].
        b: Rows, [B, W].
        similar: 1 for similar pairs, else 0, [B, B].
        threshold: Distance of similar pairs that costs nothing.
        power: 1 or 2.

    Returns:
        Means over all B^2 pairs of `max(0, similar d - threshold)^power` and `((1 - similar) (1 - min(d, 1)))^power`.

    Source:
        The authors' code, option `similarity_function=cosine`.
    """
    distances = 1 - cosine_similarity(a, b)
    pull = (similar * distances - threshold).clamp(min=0) ** power
    push = ((1 - similar) * (1 - distances.clamp(max=1))) ** power
    return pull.mean(), push.mean()


def clipped_cosine_entropy(a: Tensor, b: Tensor, similar: Tensor, threshold: float) -> Tensor:
    """Cross entropy between label similarity and the cosine, clipped to [threshold, 1 - threshold].

    Args:
        a: Rows, [B, W].
        b: Rows, [B, W].
        similar: 1 for similar pairs, else 0, [B, B].
        threshold: Distance kept from 0 and 1.

    Returns:
        Scalar, mean over all B^2 pairs.

    Source:
        The re-implementation, option `similarity_function: cosine`.
    """
    cosines = cosine_similarity(a, b).clamp(threshold, 1 - threshold)
    return -(similar * cosines.log() + (1 - similar) * (1 - cosines).log()).mean()


def tanh_quantization(relaxed: Tensor) -> Tensor:
    """How far tanh codes are from their signs: half the mean over rows of the Euclidean distance (not squared).

    Args:
        relaxed: Codes, [B, K] in (-1, 1).

    Returns:
        Scalar.

    Source:
        The authors' code, `hash_layer=linear`.
    """
    return (torch.sign(relaxed) - relaxed).norm(dim=-1).mean() / 2
