"""DNcH: deep neighbor-coherence hashing.

Paper: C. Zhu, Q. Qin, W. Zhang, L. Huang, "Deep neighbor-coherence hashing with discriminative sample mining for
supervised cross-modal retrieval", Expert Systems with Applications 2025, https://doi.org/10.1016/j.eswa.2025.127365.
Authors' code: https://github.com/QinLab-WFU/DNcH, the loss of commit 0104f86 and the trainer of commit a5ba9f3, which
imports a module that was not published and that no loss needs; no licence stated; none of it is used here.

One linear tanh head per modality on CLIP's pooled feature, and one prototype per class, which a small network makes
from the class's one-hot vector. A supervised contrastive loss compares every item with the items of its batch and with
the prototypes; every pair is weighted by how hard it is, and pairs that mining finds too easy have the weight of a
right angle. A cross entropy over the cosines with the prototypes is added.

Deviations from the authors' code:
1. The prototype network is part of the model and of its checkpoint; the release never saves it.
2. An item without labels is no anchor and adds nothing to the cross entropy; in the release it makes the loss NaN, as
   does an item with all labels.
3. A code has no zeros: the sign of an exact 0 is +1.
4. CLIP's weights are read as float32; the authors round the matrices of a float32 file to float16.
Mining compares with bounds that count pairs of the other kind as 0, as in the release; `strict_mining: true` takes the
bounds over pairs of their own kind alone, which the text of the paper suggests.

Results reproduced: the golden case of the authors' code (tests/golden/DNcH-*.npz).
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from common.losses import masked_mean, soft_cross_entropy
from common.registry import MODELS
from common.similarity import cosine_similarity, label_similarity
from common.types import DataInfo, StepOutput
from models.blocks.pooled import TanhHashingConfig, TanhHashingModel
from models.blocks.proxies import require_classes


class DNcHConfig(TanhHashingConfig):
    """`model:` section of DNcH."""

    prototype_hidden: int = Field(gt=0)  # hidden width of the network that makes the prototypes
    temperature: float = Field(ge=0.05)  # tau; far below, exponentials leave the range of float32
    margin: float = Field(ge=0)  # m, by which a pair that mining passes over is easier than the hardest
    strict_mining: bool  # bounds over pairs of one kind alone, see the file's header
    delta: float = Field(ge=0)  # how much the weights depend on the cosines; 0: not at all
    classification_weight: float = Field(ge=0)  # of the cross entropies


class PrototypeNetwork(nn.Module):
    """Makes a prototype for every class from its one-hot vector: two linear maps, ReLU between them, tanh.

    Args:
        num_classes: C.
        hidden: Width between the maps.
        bits: K.
    """

    def __init__(self, num_classes: int, hidden: int, bits: int) -> None:
        super().__init__()
        self.first = nn.Linear(num_classes, hidden)
        self.last = nn.Linear(hidden, bits)

    def forward(self) -> Tensor:
        """The prototypes, [C, K] in (-1, 1)."""
        hidden = self.first.weight.T + self.first.bias  # [C, hidden]: a one-hot vector picks a column
        prototypes: Tensor = self.last(hidden.relu())
        return prototypes.tanh()


@MODELS.register("DNcH")
class DNcH(TanhHashingModel):
    """Contrast with items and with class prototypes, weighted by hardness, on CLIP's pooled features.

    Args:
        config: `model:` section.
        data: What is known of the training data.
    """

    Config = DNcHConfig
    reference_names = (
        *TanhHashingModel.reference_names,
        (r"^cls2emb\.(cls2emb\.)?0\.", "prototypes.first."),
        (r"^cls2emb\.(cls2emb\.)?2\.", "prototypes.last."),
    )
    reference_lacks = (r"prototypes\..*",)  # codes do not depend on them

    def __init__(self, config: DNcHConfig, data: DataInfo) -> None:
        super().__init__(config, data, "fan_out")
        self.config = config
        self.prototypes = PrototypeNetwork(data.num_classes, config.prototype_hidden, config.bits)

    def objective(self, image: Tensor, text: Tensor, labels: Tensor) -> StepOutput:
        """The loss of relaxed codes, [B, K], as `PooledHashingModel.objective`.

        Raises:
            UserError: If the labels are of other classes than the prototypes.
        """
        prototypes = self.prototypes()
        require_classes(labels, len(prototypes))
        to_image, to_text = cosine_similarity(image, prototypes), cosine_similarity(text, prototypes)  # [B, C]
        contrast_image = self.contrast(cosine_similarity(image, image), to_image, labels)
        contrast_text = self.contrast(cosine_similarity(text, text), to_text, labels)
        contrast_i2t = self.contrast(cosine_similarity(image, text), to_image, labels)
        contrast_t2i = self.contrast(cosine_similarity(text, image), to_text, labels)
        classification_image = soft_cross_entropy(to_image, labels)
        classification_text = soft_cross_entropy(to_text, labels)
        loss = (
            contrast_image
            + contrast_text
            + contrast_i2t
            + contrast_t2i
            + self.config.classification_weight * (classification_image + classification_text)
        )
        terms = {
            "contrast_image": contrast_image,
            "contrast_text": contrast_text,
            "contrast_i2t": contrast_i2t,
            "contrast_t2i": contrast_t2i,
            "classification_image": classification_image,
            "classification_text": classification_text,
        }
        return StepOutput(loss, terms)

    def contrast(self, to_items: Tensor, to_prototypes: Tensor, labels: Tensor) -> Tensor:
        """An anchor should be nearer to similar items and to the prototypes of its labels than to the others.

        With P and N the sums of `e^(cos / tau) w` over similar and dissimilar items and, as much in all, over the
        prototypes of the anchor's labels and the others, an anchor costs `-log(P / (P + N))`.

        Args:
            to_items: Cosines of anchors with candidates, [B, B].
            to_prototypes: Cosines of anchors with prototypes, [B, C].
            labels: Multi-hot labels of anchors and candidates, [B, C].

        Returns:
            Scalar: mean over the anchors that have a label; 0 if there are none.

        Source:
            DNcH, ESWA 2025, neighbor-coherence loss.
        """
        c = self.config
        similar, own = label_similarity(labels, labels) > 0, labels > 0
        mined = pass_over_easy_pairs(to_items.detach(), similar, c.margin, c.strict_mining)
        item_attraction, item_repulsion = weighted_sums(to_items, mined, similar, c.temperature, c.delta)
        prototype_attraction, prototype_repulsion = weighted_sums(
            to_prototypes, to_prototypes.detach(), own, c.temperature, c.delta
        )
        attraction = item_attraction + balance(similar, own).to(to_items) * prototype_attraction
        repulsion = item_repulsion + balance(~similar, ~own).to(to_items) * prototype_repulsion
        counts = own.any(1)
        return masked_mean((repulsion / attraction.where(counts, 1)).log1p(), counts)


def pass_over_easy_pairs(cosines: Tensor, similar: Tensor, margin: float, strict: bool) -> Tensor:
    """Sets pairs that are too easy to 0, a right angle, for the weights that depend on them.

    A dissimilar pair is too easy if, the margin added, it is no nearer than the anchor's farthest similar pair; a
    similar one if, the margin subtracted, it is no farther than the anchor's nearest dissimilar pair.

    Args:
        cosines: Of anchors with candidates, [B, B]; constants.
        similar: True where two items share a label, [B, B] bool.
        margin: m.
        strict: Whether these bounds are taken over pairs of their own kind alone; if not, pairs of the other kind count
            in them as 0.

    Returns:
        [B, B].

    Source:
        DNcH, ESWA 2025, discriminative sample mining.
    """
    other = torch.inf if strict else 0.0
    farthest = cosines.where(similar, other).amin(1, keepdim=True)
    nearest = cosines.where(~similar, -other).amax(1, keepdim=True)
    easy = torch.where(similar, cosines - margin >= nearest, cosines + margin <= farthest)
    return cosines.masked_fill(easy, 0)


def weighted_sums(
    cosines: Tensor, hardness: Tensor, positive: Tensor, temperature: float, delta: float
) -> tuple[Tensor, Tensor]:
    """Exponentials of cosines, summed over positive and over negative pairs, hard ones with more weight.

    Args:
        cosines: Of anchors with items or prototypes, [B, D].
        hardness: Cosines that the weights depend on, [B, D]; constants.
        positive: Which pairs are positive, [B, D] bool.
        temperature: tau.
        delta: Weights are `e^(-delta (1 + cos) / 4)` for positive pairs and `e^(delta (cos - 1))` for the others.

    Returns:
        The sums over positive pairs and over the others, [B] each.

    Source:
        DNcH, ESWA 2025, weights of the neighbor-coherence loss.
    """
    exponents = torch.where(positive, -delta * (1 + hardness) / 4, delta * (hardness - 1))
    weighted = (cosines / temperature).exp() * exponents.exp()
    return (weighted * positive).sum(1), (weighted * ~positive).sum(1)


def balance(items: Tensor, classes: Tensor) -> Tensor:
    """How many items an anchor has for each class: the weight that makes both sides count as much; 0 without a class.

    Args:
        items: Which items of the batch count, [B, B] bool.
        classes: Which classes count, [B, C] bool.

    Returns:
        [B] float64.
    """
    return torch.where(classes.any(1), items.sum(1).double() / classes.sum(1).clamp(min=1), 0)
