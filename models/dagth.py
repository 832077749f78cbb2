"""DAGtH: deep adaptive gradient-triplet hashing.

Paper: C. Zhu, W. Hu, J. Hou, Q. Qin, W. Zhang, L. Huang, "Deep adaptive gradient-triplet hashing for cross-modal
retrieval", Expert Systems with Applications 2025, https://doi.org/10.1016/j.eswa.2025.128566.
Authors' code: https://github.com/QinLab-WFU/DAGtH, commit e5f2f5e, has the triplet loss and a trainer for pictures
alone; https://github.com/QinLab-WFU/DNcH, commit 64fb793, the rotation layer. No licence stated; none of it is used
here. Neither has a cross-modal model, so **how the parts are put together here is a reconstruction**: no number of the
paper can be promised.

What is published: a triplet loss whose margin is, in every batch, a part of the mean gap between negatives and
positives; a pair loss beside it, off by default; an orthogonal rotation, trained after the codes are, that pushes their
entries away from 0. What is ours: one linear tanh head per modality on CLIP's pooled feature, the loss over the four
ordered pairs of modalities, each with a margin of its own (an item's partner is a positive across modalities, the item
itself none within its own), and one rotation for both modalities, trained in the last epochs of a run with an optimizer
of its own (`rotation_epochs`, 0 by default: the least speculative reading).

Deviations from what is published:
1. A batch without a triplet costs 0 and has the margin 0; there the margin is NaN.
2. The selection `easy`, under which nothing has a gradient, is not offered.
3. A code has no zeros: the sign of an exact 0 is +1.
4. CLIP's weights are read as float32; the authors round the matrices of a float32 file to float16.

Results reproduced: loss and rotation of the authors' code (tests/golden/DAGtH-loss-*.npz).
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from common.errors import UserError
from common.losses import full_precision, masked_mean, sum_over_triplets
from common.registry import MODELS
from common.similarity import label_similarity, without_self
from common.types import Batch, DataInfo, Progress, StepOutput
from models.base import ParamGroups
from models.blocks.heads import sign_codes
from models.blocks.householder import HouseholderRotation, bit_variance
from models.blocks.pooled import TanhHashingConfig, TanhHashingModel

DistanceName = Literal["cosine", "euclidean", "squared_euclidean"]
Selection = Literal["all", "hard", "semi_hard"]


class DAGtHConfig(TanhHashingConfig):
    """`model:` section of DAGtH."""

    distance: DistanceName
    triplets: (
        Selection  # which of them cost: all within the margin, those in wrong order, or those in right order alone
    )
    k_delta: float = Field(gt=0)  # the margin is the mean gap over this
    max_margin: float = Field(ge=0)  # largest margin
    pair_term: bool  # whether dissimilar pairs that are too near cost beside the triplets
    k_an: float = Field(gt=0)  # a pair is too near from 1 + (mean similarity - 1) / k_an on
    pair_weight: float = Field(ge=0)  # lambda, of the pair term
    rotation_epochs: int = Field(
        ge=0
    )  # last epochs of the run, which train the rotation alone; 0: codes are not rotated


@MODELS.register("DAGtH")
class DAGtH(TanhHashingModel):
    """Triplets with an adaptive margin, and a rotation of the codes, on CLIP's pooled features.

    Args:
        config: `model:` section.
        data: What is known of the training data.
    """

    Config = DAGtHConfig

    def __init__(self, config: DAGtHConfig, data: DataInfo) -> None:
        super().__init__(config, data, "torch")
        self.config = config
        if config.rotation_epochs:
            self.rotation = HouseholderRotation(config.bits)

    @property
    def marks(self) -> tuple[str, ...]:
        """Says that this is a reconstruction."""
        return ("a reconstruction: the authors published the loss and the rotation, not how DAGtH puts them together",)

    @property
    def loss_reaches_all(self) -> bool:
        """Codes and rotation learn one after the other."""
        return self.config.rotation_epochs == 0

    def param_groups(self) -> ParamGroups:
        """CLIP and the heads at rates of their own; the rotation, if there is one, with an optimizer of its own."""
        groups: ParamGroups = {"main": self.backbone_and_head("rotation")}
        if self.config.rotation_epochs:
            groups["rotation"] = {"rotation": [self.rotation.weights]}
        return groups

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One step's loss over the global batch: of the codes, or in the last epochs of the rotation.

        Raises:
            UserError: If no epoch is left for the codes.
        """
        first = progress.epochs - self.config.rotation_epochs
        if first <= 0:
            raise UserError(
                f"model.rotation_epochs is {self.config.rotation_epochs}, but run.epochs {progress.epochs} leaves none "
                "for the codes; the rotation takes the last epochs of a run: raise run.epochs"
            )
        if progress.epoch < first:
            return super().training_step(batch, progress)
        with torch.no_grad():
            features = self.gathered_features(batch)
            relaxed = [
                head.fc(x).float().tanh() for head, x in zip((self.image_head, self.text_head), features, strict=True)
            ]
        with full_precision(relaxed[0].device):
            loss = bit_variance(self.rotation(F.normalize(torch.cat(relaxed), dim=-1)))
            return StepOutput(loss, {"bit_variance": loss})

    def objective(self, image: Tensor, text: Tensor, labels: Tensor) -> StepOutput:
        """The loss of relaxed codes.

        Args:
            image: Relaxed codes of the pictures, [B, K].
            text: Relaxed codes of the texts, [B, K].
            labels: Multi-hot labels, [B, C].

        Returns:
            Loss and terms: that of each ordered pair of modalities, and the mean of their margins.
        """
        similar = label_similarity(labels, labels) > 0
        others = without_self(similar)
        pairs = {
            "triplet_image": (image, image, others),
            "triplet_text": (text, text, others),
            "triplet_i2t": (image, text, similar),
            "triplet_t2i": (text, image, similar),
        }
        found = {
            name: adaptive_triplet_loss(a, b, positive, ~similar, self.config)
            for name, (a, b, positive) in pairs.items()
        }
        losses = {name: one.loss for name, one in found.items()}
        margin = torch.stack([one.margin for one in found.values()]).mean()
        return StepOutput(torch.stack(list(losses.values())).sum(), {**losses, "margin": margin})

    def binarise(self, relaxed: Tensor) -> Tensor:
        """Relaxed codes [B, K] -> codes [B, K], rotated if the rotation is trained."""
        if self.config.rotation_epochs:
            relaxed = self.rotation(F.normalize(relaxed, dim=-1))
        return sign_codes(relaxed)


@dataclass(frozen=True)
class AdaptiveTriplets:
    """What `adaptive_triplet_loss` found, all [].

    Attributes:
        loss: The loss.
        margin: epsilon, of this batch.
        threshold: beta, similarity from which a dissimilar pair is too near; 0 without the pair term.
        triplets: Triplets that count.
        pairs: Dissimilar pairs that count.
    """

    loss: Tensor
    margin: Tensor
    threshold: Tensor
    triplets: Tensor
    pairs: Tensor


def adaptive_triplet_loss(
    a: Tensor, b: Tensor, positive: Tensor, negative: Tensor, config: DAGtHConfig
) -> AdaptiveTriplets:
    """Anchors should be nearer to similar items than to dissimilar ones, by a margin that follows the batch.

    With `g = d(anchor, negative) - d(anchor, positive)` of every triplet, the margin is `mean(g) / k_delta`, within 0
    and `max_margin`, a constant; a triplet costs `max(0, margin - g)`, and the mean is over those that the selection
    keeps.

    Args:
        a: Anchors, [B, K]; the same rows as `b` within a modality.
        b: Items, [B, K].
        positive: Similar items of each anchor, [B, B] bool.
        negative: Dissimilar ones, [B, B] bool.
        config: The settings.

    Returns:
        Loss, and how it came about; without a triplet all are 0.

    Source:
        DAGtH, ESWA 2025, adaptive gradient-triplet loss, as the authors' code has it for one modality.
    """
    distances = pair_distances(a, b, config.distance)
    counts = positive.sum(1), negative.sum(1)
    total = (counts[0] * counts[1]).sum()
    gaps = counts[0] * (distances.detach() * negative).sum(1) - counts[1] * (distances.detach() * positive).sum(1)
    margin = (gaps.sum() / total.clamp(min=1) / config.k_delta).clamp(0, config.max_margin)
    cost_of = functools.partial(_cost_of_triplets, margin=margin, selection=config.triplets)
    cost, kept = sum_over_triplets(cost_of, distances, positive, negative)
    loss = cost / kept.clamp(min=1)
    threshold, pairs = torch.zeros_like(margin), torch.zeros_like(total)
    if config.pair_term:
        used = negative & (counts[0] > 0)[:, None]
        if a is b:
            used = (used | used.T).triu()  # both orders are one pair
        threshold = used.any() * (1 + (masked_mean(-distances.detach(), used) - 1) / config.k_an)
        near = used & (-distances >= threshold)
        pairs = near.sum()
        loss = loss + config.pair_weight * masked_mean((-distances - threshold).clamp(min=0), near)
    return AdaptiveTriplets(loss, margin, threshold, kept, pairs)


def _cost_of_triplets(
    distances: Tensor, positive: Tensor, negative: Tensor, margin: Tensor, selection: Selection
) -> tuple[Tensor, Tensor]:
    """Sum of the costs of the triplets of some anchors, and their number."""
    gaps = distances[:, None, :] - distances[:, :, None]  # [anchors, positives, negatives]
    kept = positive[:, :, None] & negative[:, None, :] & (gaps <= margin)
    if selection == "hard":
        kept &= gaps <= 0
    elif selection == "semi_hard":
        kept &= gaps > 0
    return ((margin - gaps).clamp(min=0) * kept).sum(), kept.sum()


def pair_distances(a: Tensor, b: Tensor, name: DistanceName) -> Tensor:
    """Distances of the directions of rows [B, K] and [D, K], [B, D]; `cosine` is the negative cosine."""
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    if name == "cosine":
        return -(a @ b.T)
    distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return distances if name == "euclidean" else distances.square()
