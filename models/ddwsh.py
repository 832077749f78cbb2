"""DDWSH: distance-weighted sampling with learned class boundaries.

Paper: QinLab (Weifang University), "DDWSH", IEEE Transactions on Multimedia 2026,
https://ieeexplore.ieee.org/document/11353914.
Authors' code: https://github.com/QinLab-WFU/DDWSH, commit 91c2982, no licence stated; it does not run as published;
none of it is used here.

One linear tanh head per modality on CLIP's pooled feature. One triplet is drawn for every anchor: a positive uniformly,
a negative with a weight that depends on its distance, after Wu et al., "Sampling Matters in Deep Embedding Learning",
ICCV 2017. A margin loss holds positives within, and negatives beyond, a boundary that is the mean of learned boundaries
of the anchor's classes.

`model.sampling`: `distance_weighted` weighs negatives by their distance to the anchor. The release hands the matrix of
distances to code that expects codes, and so weighs by the distance between rows of that matrix (`reference_rows`): in
practice it takes the negative whose row distance is the smallest above 2. Which of the two the paper's numbers were
made with cannot be told.

Deviations from the authors' code:
1. Negatives are weighted by distance, see above.
2. Draws come from torch's generator, which the run seeds for every step, not from NumPy's.
3. A batch without a usable anchor costs 0; the release fails.
4. The boundaries are part of the model and of its checkpoint; the release never saves them. They have an optimizer of
   their own, so that their decay is a value of its own: 0.2, as in the release.
5. Distances are taken from differences, not from matrix products, so that equal codes have distance 0.
6. A code has no zeros: the sign of an exact 0 is +1.
7. CLIP's weights are read as float32; the authors round the matrices of a float32 file to float16.
As in the release, an item's own pair is never a positive, and texts are never anchors of pictures: `own_pair` and
`symmetric` change that. `upper_cutoff` is declared there and not used.

Results reproduced: the golden case of the authors' code (tests/golden/DDWSH-*.npz), with its drawing probabilities.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from common.registry import MODELS
from common.similarity import label_similarity, without_self
from common.types import DataInfo, StepOutput
from models.base import ParamGroups
from models.blocks.pooled import TanhHashingConfig, TanhHashingModel
from models.blocks.proxies import require_classes

LEAST_CAP = 1e-8  # least value of 1 - g^2 / 4, which is 0 for opposite codes; a constant of the authors' code
EXACT = "donot_use_mm_for_euclid_dist"  # a matrix product would move small distances


class DDWSHConfig(TanhHashingConfig):
    """`model:` section of DDWSH."""

    margin: float = Field(ge=0)  # kept on either side of the boundary, of Euclidean distances in [0, 2]
    boundary_start: float = Field(ge=0, le=2)  # beta of every class before training
    sampling: Literal["distance_weighted", "reference_rows"]  # of negatives: intended | release, see the header
    lower_cutoff: float = Field(gt=0, le=2)  # nearer negatives weigh as much as one at this distance
    upper_cutoff: Annotated[float, Field(gt=0)] | None  # farther ones are not drawn unless all are; null: no limit
    own_pair: bool  # whether an item's own text may be its picture's positive
    symmetric: bool  # whether texts are anchors of pictures, too


@MODELS.register("DDWSH")
class DDWSH(TanhHashingModel):
    """Triplets by distance-weighted sampling, held apart by learned class boundaries, on CLIP's pooled features.

    Args:
        config: `model:` section.
        data: What is known of the training data.
    """

    Config = DDWSHConfig
    reference_names = (*TanhHashingModel.reference_names, (r"^criterion\.beta$", "boundaries"))
    reference_lacks = ("boundaries",)  # codes do not depend on them

    def __init__(self, config: DDWSHConfig, data: DataInfo) -> None:
        super().__init__(config, data, "fan_out")
        self.config = config
        self.boundaries = nn.Parameter(torch.full((data.num_classes,), config.boundary_start))

    def objective(self, image: Tensor, text: Tensor, labels: Tensor) -> StepOutput:
        """The loss of relaxed codes, [B, K], as `PooledHashingModel.objective`.

        Draws the triplets of this step, within pictures, within texts, then across.

        Raises:
            UserError: If the labels are of other classes than the boundaries.
        """
        c = self.config
        require_classes(labels, len(self.boundaries))
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        similar = label_similarity(labels, labels) > 0
        others = without_self(similar)
        across = similar if c.own_pair else others
        own = (labels > 0).to(self.boundaries)
        boundary = own @ self.boundaries / own.sum(1).clamp(min=1)  # mean over an anchor's classes, [B]

        def drawn_loss(anchors: Tensor, candidates: Tensor, positive: Tensor) -> Tensor:
            distances = torch.cdist(anchors, candidates, compute_mode=EXACT)  # its gradient is 0 at distance 0
            triplets = self.draw_triplets(distances.detach(), positive, ~similar)
            return boundary_loss(distances, triplets, boundary, c.margin)

        terms = {
            "boundary_image": drawn_loss(image, image, others),
            "boundary_text": drawn_loss(text, text, others),
            "boundary_i2t": drawn_loss(image, text, across),
        }
        loss = terms["boundary_image"] + terms["boundary_text"] + terms["boundary_i2t"]
        if c.symmetric:
            terms["boundary_t2i"] = drawn_loss(text, image, across)
            loss = loss + terms["boundary_t2i"]
        return StepOutput(loss, terms)

    def draw_triplets(self, distances: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """One triplet for every anchor that has a positive and a negative; from torch's global generator, on the CPU.

        Args:
            distances: Of anchors to candidates, [B, B]; constants.
            positive: Which candidates are positives of an anchor, [B, B] bool; each is as likely as the others.
            negative: Which are negatives, [B, B] bool.

        Returns:
            Places of anchor, positive and negative in the batch, [A, 3] int64.
        """
        probabilities = self.negative_probabilities(distances, negative).cpu()
        anchors = torch.where((positive.any(1) & negative.any(1)).cpu())[0]
        if not len(anchors):
            return torch.empty(0, 3, dtype=torch.int64, device=distances.device)
        drawn = [torch.multinomial(weights[anchors], 1) for weights in (positive.cpu().double(), probabilities)]
        return torch.cat((anchors[:, None], *drawn), dim=1).to(distances.device)

    def negative_probabilities(self, distances: Tensor, negative: Tensor) -> Tensor:
        """How likely every negative is drawn: the more, the fewer points of a sphere lie at its distance.

        With g the distance, held above the lower cutoff, on the unit sphere of n dimensions, the weight's logarithm is
        `(2 - n) log g - (n - 3) / 2 log(1 - g^2 / 4)`.

        Args:
            distances: Of anchors to candidates, unit vectors, [B, B]; constants.
            negative: Which candidates are negatives of an anchor, [B, B] bool.

        Returns:
            [B, B] float64; the rows sum to 1, those of anchors without a negative to 0.

        Source:
            Wu et al., ICCV 2017, Eq. (3)-(4); with `reference_rows` as the authors of DDWSH apply it.
        """
        c = self.config
        lengths, dimensions = distances.double(), self.bits
        if c.sampling == "reference_rows":
            lengths, dimensions = torch.cdist(lengths, lengths, compute_mode=EXACT), len(lengths)
        lengths = lengths.clamp(min=c.lower_cutoff)
        cap = (1 - lengths.square() / 4).clamp(min=LEAST_CAP)
        log_weights = (2 - dimensions) * lengths.log() - (dimensions - 3) / 2 * cap.log()
        if c.upper_cutoff is not None:
            reachable = negative & (lengths < c.upper_cutoff)
            negative = torch.where(reachable.any(1, keepdim=True), reachable, negative)
        return log_weights.masked_fill(~negative, -torch.inf).softmax(1).where(negative, 0)

    def param_groups(self) -> ParamGroups:
        """CLIP and the heads at rates of their own; the boundaries with an optimizer of their own."""
        return {"main": self.backbone_and_head("boundaries"), "boundaries": {"boundaries": [self.boundaries]}}


def boundary_loss(distances: Tensor, triplets: Tensor, boundary: Tensor, margin: float) -> Tensor:
    """Positives should lie a margin within the anchor's boundary, negatives a margin beyond it.

    Args:
        distances: Of anchors to candidates, [B, B].
        triplets: Places of anchor, positive and negative, [A, 3] int64.
        boundary: beta of every anchor, [B].
        margin: Of either.

    Returns:
        Scalar: the sum of both hinges over the number of triplets in which either is above 0; 0 if there are none.

    Source:
        DDWSH, TMM 2026, margin loss; Wu et al., ICCV 2017, Eq. (5).
    """
    anchor, positive, negative = triplets.unbind(1)
    pull = (distances[anchor, positive] - boundary[anchor] + margin).clamp(min=0)
    push = (boundary[anchor] - distances[anchor, negative] + margin).clamp(min=0)
    return (pull + push).sum() / ((pull > 0) | (push > 0)).sum().clamp(min=1)
