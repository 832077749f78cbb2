"""DDBH: deep discriminative boundary hashing.

Paper: Q. Qin, Y. Huo, W. Zhang, L. Huang, J. Nie, "Deep Discriminative Boundary Hashing for Cross-modal Retrieval",
IEEE TCSVT 2025, https://doi.org/10.1109/TCSVT.2025.3570128.
Authors' code: https://github.com/QinLab-WFU/DDBH, commit 56b6bd6, and the collection
https://github.com/QinLab-WFU/CLIP-based-Cross-Modal-Hashing, commit 8040b44, which starts its heads in another way
(`initialization: fan_out`); no licence stated, neither runs as published; none of it is used here.

One linear tanh head per modality on CLIP's pooled feature. Every anchor has two boundaries on the inner product, one
for its similar items and one for the others, made from the batch: where a set's mean lies, moved by how far the other
set's extremes reach into it. A logistic loss pushes pairs to their side; those on the wrong side of the boundary are
pushed with twice the slope.

Deviations from the authors' code:
1. A pair exactly on its boundary counts as an easy one; the release leaves it out of the mean, which is then NaN where
   all pairs of an anchor lie there.
2. The logistic loss does not overflow.
3. A batch without an anchor that has both similar and dissimilar items costs 0 and keeps the graph.
4. A code has no zeros: the sign of an exact 0 is +1.
5. CLIP's weights are read as float32; the authors round the matrices of a float32 file to float16.

Results reproduced: the golden case of the collection's code (tests/golden/DDBH-*.npz), whose loss is the authors'.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from common.losses import masked_mean
from common.registry import MODELS
from common.similarity import label_similarity
from common.types import DataInfo, StepOutput
from models.blocks.pooled import TanhHashingConfig, TanhHashingModel

MEAN_CAP = 1 / 4  # U / K: the means of inner products are held in [0, U]; constants of the authors' code, as the next
EASY_SLOPE = 6 * math.log(99)  # kappa K: an easy pair K / 6 from its boundary has probability 0.99, a hard one K / 12


class DDBHConfig(TanhHashingConfig):
    """`model:` section of DDBH."""

    initialization: Literal["torch", "fan_out"]  # of the heads: authors' | the collection's
    percentile: float = Field(ge=0, lt=1)  # share of a set that is not among its extremes
    quantization_weight: float = Field(ge=0)


@MODELS.register("DDBH")
class DDBH(TanhHashingModel):
    """Hashing with boundaries that adapt to every anchor, on CLIP's pooled features.

    Args:
        config: `model:` section.
        data: What is known of the training data.
    """

    Config = DDBHConfig

    def __init__(self, config: DDBHConfig, data: DataInfo) -> None:
        super().__init__(config, data, config.initialization)
        self.config = config

    def objective(self, image: Tensor, text: Tensor, labels: Tensor) -> StepOutput:
        """The loss of relaxed codes, [B, K], as `PooledHashingModel.objective`."""
        similar = label_similarity(labels, labels) > 0
        boundary_image = boundary_loss(image, image, similar, self.config.percentile)
        boundary_text = boundary_loss(text, text, similar, self.config.percentile)
        boundary_cross = boundary_loss(image, text, similar, self.config.percentile)
        quantization_image = neighbour_quantization(image, similar)
        quantization_text = neighbour_quantization(text, similar)
        boundary, quantization = boundary_image + boundary_text + boundary_cross, quantization_image + quantization_text
        loss = boundary + self.config.quantization_weight * quantization
        terms = {
            "boundary_image": boundary_image,
            "boundary_text": boundary_text,
            "boundary_cross": boundary_cross,
            "quantization_image": quantization_image,
            "quantization_text": quantization_text,
        }
        return StepOutput(loss, terms)


def boundary_loss(anchors: Tensor, candidates: Tensor, similar: Tensor, percentile: float) -> Tensor:
    """Pushes the inner products of similar pairs above a boundary and those of others below one, anchor by anchor.

    With G the inner products and k the slope of a pair, an anchor costs the mean over its similar items of
    `log(1 + e^(-k (G - b+)))` plus the mean over the others of `log(1 + e^(k (G - b-)))`.

    Args:
        anchors: Relaxed codes, [B, K].
        candidates: Relaxed codes, [B, K].
        similar: True where two items share a label, [B, B] bool.
        percentile: See `boundaries`.

    Returns:
        Scalar: mean over the anchors that have both similar and dissimilar items; 0 if there are none.

    Source:
        DDBH, TCSVT 2025, boundary loss. Differs from the authors' code: see Deviations 1 to 3.
    """
    products, slope = anchors @ candidates.T, EASY_SLOPE / anchors.shape[1]
    above, below = boundaries(products.detach(), similar, percentile, MEAN_CAP * anchors.shape[1])
    excess, lack = products - below[:, None], above[:, None] - products  # how far a pair is on the wrong side
    push, pull = (-F.logsigmoid(-slope * torch.where(far > 0, 2 * far, far)) for far in (excess, lack))
    counts = similar.any(1) & (~similar).any(1)
    return masked_mean(masked_mean(pull, similar, 1) + masked_mean(push, ~similar, 1), counts)


def boundaries(products: Tensor, similar: Tensor, percentile: float, cap: float) -> tuple[Tensor, Tensor]:
    """The boundaries of every anchor, above which similar items and below which dissimilar ones should lie.

    With m the mean over a set held in [0, U], h- the mean of the highest products of dissimilar items and h+ that of
    the lowest of similar ones: `b+ = m+ - (1 - m+ / U) |m+ - h-|` and `b- = m- - (m- / U) |m- - h+|`.

    Args:
        products: Inner products, anchors as rows, [B, B]; constants.
        similar: True where two items share a label, [B, B] bool.
        percentile: Of a set of n, `n - floor(percentile n)` are its highest or lowest.
        cap: U.

    Returns:
        b+ and b-, [B] each; without meaning for an anchor that lacks similar or dissimilar items.

    Source:
        DDBH, TCSVT 2025, adaptive boundaries.
    """
    near = masked_mean(products, similar, 1).clamp(0, cap)
    far = masked_mean(products, ~similar, 1).clamp(0, cap)
    highest = mean_of_highest(products, ~similar, percentile)
    lowest = -mean_of_highest(-products, similar, percentile)
    return near - (1 - near / cap) * (near - highest).abs(), far - far / cap * (far - lowest).abs()


def mean_of_highest(values: Tensor, mask: Tensor, percentile: float) -> Tensor:
    """Mean of each row's highest values among those that count: `n - floor(percentile n)` of n.

    Args:
        values: [B, D].
        mask: Which values count, [B, D] bool.
        percentile: In [0, 1).

    Returns:
        [B]; 0 for a row in which none counts.
    """
    counts = mask.sum(1, keepdim=True).double()
    taken = torch.arange(values.shape[1], device=values.device) < counts - (percentile * counts).floor()
    falling = values.masked_fill(~mask, -torch.inf).sort(1, descending=True).values
    return masked_mean(falling.masked_fill(~taken, 0), taken, 1)


def neighbour_quantization(relaxed: Tensor, similar: Tensor) -> Tensor:
    """How far relaxed codes are from their signs, each item weighted by its number of similar items in the batch.

    Args:
        relaxed: Relaxed codes, [B, K].
        similar: True where two items share a label, [B, B] bool.

    Returns:
        Scalar: the sum over pairs of similar items of `|h - sign h|^2`, divided by B K.

    Source:
        DDBH, TCSVT 2025, quantisation.
    """
    errors = (relaxed - relaxed.sign()).square().sum(1)
    return (similar.sum(0) * errors).sum() / relaxed.numel()
