"""DGHDGH: deep global-sense hard-negative discriminative generation hashing.

Paper: "Deep Global-sense Hard-negative Discriminative Generation Hashing for Cross-modal Retrieval", ICLR 2026,
https://openreview.net/forum?id=GAQEsnnQtG.
Authors' code: https://github.com/QinLab-WFU/DGHDGH, commit 7f37ac0, which cannot run: modules are missing; no licence
stated; none of it is used here.

One linear tanh head per modality on CLIP's pooled feature, trained with all triplets of the batch. A graph network over
all pairs of items says for each pair and each bit how far the negative may be moved towards its anchor; the moved,
"synthetic" negatives give a second triplet loss. The graph network, here `generator`, learns the labels along with the
codes; then, in a stage of its own, it learns to make negatives that are near their anchor, still of their class to a
linear `classifier`, and unlike each other. The classifier has a stage of its own, too. Codes need neither of them.

Deviations from the authors' code:
1. The attention of edges and the initialisation, which the release lacks, are those that its other code implies.
2. Generator and classifier are part of the model and of its checkpoint; the release never saves them.
3. A batch of one row trains by running statistics instead of failing; codes whose entries are all equal, which stop the
   release, correlate with nothing.
4. A synthetic negative is a + r (b - a), which is linear in the ratio of distances, so its cosine and its class scores
   come from those of pairs: no tensor of B^3 K numbers is made.
5. A code has no zeros: the sign of an exact 0 is +1.
6. CLIP's weights are read as float32; the authors round the matrices of a float32 file to float16.
As released, the weight of synthetic triplets is 0.9 or 0.1, nothing between; `adaptive_weight: true` takes the value
that its formula gives.

Results reproduced: the golden case of the authors' code (tests/golden/DGHDGH-*.npz).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from common.losses import full_precision, masked_mean, soft_cross_entropy
from common.registry import MODELS
from common.similarity import label_similarity, without_self
from common.types import Batch, DataInfo, Progress, Stage, StepOutput
from models.base import ParamGroups
from models.blocks.pair_graph import PairGraph
from models.blocks.pooled import TanhHashingConfig, TanhHashingModel
from models.blocks.proxies import require_classes
from utils.distributed import gather_rows

_NO_MEAN = 1e6  # stands for the mean of an epoch's earlier losses where there are none
_TRIPLETS_AT_ONCE = 1 << 18  # whose class scores are computed together, and again for the gradient


class DGHDGHConfig(TanhHashingConfig):
    """`model:` section of DGHDGH."""

    graph_layers: int = Field(gt=0)
    graph_heads: int = Field(gt=0)  # of the attention between items; they divide the bits
    graph_dropout: float = Field(ge=0, lt=1)  # of the attention of pairs to their items
    margin: float = Field(ge=0)  # of both triplet losses
    triplet_weight: float = Field(ge=0)  # lambda_1
    graph_weight: float = Field(ge=0)  # lambda_2, of the graph network's cross entropy
    trust: float = Field(ge=0)  # alpha: pairs move their negatives by lambda e^(-alpha / mean triplet loss)
    ripeness: float = Field(ge=0)  # beta: synthetic triplets weigh 1 - e^(-beta / mean loss of the generator)
    adaptive_weight: bool  # weights between 0.1 and 0.9 as the formula gives them, see the file's header
    classifier_weight: float = Field(ge=0)  # lambda_4, of the classifier's own loss
    class_weight: float = Field(ge=0)  # lambda_5: synthetic negatives keep their class
    nearness_weight: float = Field(ge=0)  # lambda_6: they are near their anchor
    diversity_weight: float = Field(ge=0)  # lambda_7: pairs of an anchor move differently


@dataclass(frozen=True)
class Triplets:
    """All anchors with a similar and a dissimilar item.

    Attributes:
        near: Pair of anchor i and similar item j as i B + j, [T] int64.
        far: Pair of anchor and dissimilar item, [T] int64.
    """

    near: Tensor
    far: Tensor

    @classmethod
    def of(cls, similar: Tensor, within: bool) -> "Triplets":
        """Those of a batch: similar [B, B] bool; `within` a modality an item is not similar to itself."""
        count = len(similar)
        positive = without_self(similar) if within else similar
        anchor, near, far = (positive[:, :, None] & ~similar[:, None, :]).nonzero().unbind(1)
        return cls(anchor * count + near, anchor * count + far)


@dataclass(frozen=True)
class Direction:
    """Anchors of one modality, items of the same or the other one, and their triplets.

    Attributes:
        anchors: Unit vectors, [B, K].
        items: Unit vectors, [B, K].
        triplets: The triplets.
    """

    anchors: Tensor
    items: Tensor
    triplets: Triplets

    def cosines(self, places: Tensor) -> Tensor:
        """Cosines of pairs i B + j, [T] for [T] int64."""
        return (self.anchors @ self.items.T).flatten().index_select(0, places)


@MODELS.register("DGHDGH")
class DGHDGH(TanhHashingModel):
    """Triplets with negatives that a graph network moves towards their anchors, on CLIP's pooled features.

    Args:
        config: `model:` section.
        data: What is known of the training data.

    Raises:
        UserError: If the heads of the graph network do not divide the bits.
    """

    Config = DGHDGHConfig
    reference_names = (
        *TanhHashingModel.reference_names,
        (r"^criterion\.softmax_classifier\.", "classifier."),
        (r"^criterion\.gnn\.gnn\.(\d+)\.(node|edge)_model\.", r"generator.\2s.\1."),
        (r"^(generator\..*)\.(?:mmsa|cross)_attn\.", r"\1."),
        (r"^(generator\..*)\.q_linear\.", r"\1.query."),
        (r"^(generator\..*)\.k_linear\.", r"\1.key."),
        (r"^(generator\..*)\.v_linear\.", r"\1.value."),
        (r"^(generator\..*)\.edge_to_node\.0\.", r"\1.from_edges."),
        (r"^(generator\..*)\.node_to_edge\.0\.", r"\1.from_nodes."),
        (r"^(generator\..*)\.norm\.1\.", r"\1.norm."),
        (r"^(generator\..*)\.FFN\.", r"\1.feed_forward."),
        (r"^criterion\.gnn\.reduce_fc\.", "generator.reduce."),
        (r"^criterion\.gnn\.bottleneck1\.", "generator.edge_norm."),
        (r"^criterion\.gnn\.bottleneck2\.", "generator.node_norm."),
        (r"^criterion\.gnn\.cls\.", "generator.classes."),
        (r"^criterion\.gnn\.fc\.", "generator.pair."),
    )
    reference_lacks = (r"generator\..*", r"classifier\..*", r"(triplet|generator)_sum")  # codes do not depend on them
    triplet_sum: Tensor
    generator_sum: Tensor

    def __init__(self, config: DGHDGHConfig, data: DataInfo) -> None:
        super().__init__(config, data, "fan_out")
        self.config = config
        if config.bits % config.graph_heads:
            raise UserError(
                f"model.graph_heads is {config.graph_heads}, which does not divide model.bits = {config.bits}; "
                "the attention of the graph network takes as many bits for every head"
            )
        self.generator = PairGraph(
            config.bits, data.num_classes, config.graph_layers, config.graph_heads, config.graph_dropout
        )
        self.classifier = nn.Linear(config.bits, data.num_classes)
        self.register_buffer("triplet_sum", torch.zeros(()))  # of this epoch's steps
        self.register_buffer("generator_sum", torch.zeros(()))

    @property
    def loss_reaches_all(self) -> bool:
        """The classifier, and what makes the values of pairs, learn in stages of their own."""
        return False

    def param_groups(self) -> ParamGroups:
        """CLIP and the heads at rates of their own; generator and classifier with an optimizer each."""
        return {
            "main": self.backbone_and_head("generator", "classifier"),
            "generator": {"generator": [p for p in self.generator.parameters() if p.requires_grad]},
            "classifier": {"classifier": list(self.classifier.parameters())},
        }

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        """Loss of codes and generator over the global batch, and the stages of classifier and generator."""
        features = self.gathered_features(batch)
        image, text = self.image_head(features[0]), self.text_head(features[1])
        with full_precision(image.device):
            return self.objective_at(
                image, text, gather_rows(batch["labels"]), progress.step % progress.steps_per_epoch
            )

    def objective_at(self, image: Tensor, text: Tensor, labels: Tensor, step: int) -> StepOutput:
        """The loss of relaxed codes, and the stages that follow.

        Args:
            image: Relaxed codes of the pictures, [B, K].
            text: Relaxed codes of the texts, [B, K].
            labels: Multi-hot labels, [B, C].
            step: Steps of this epoch before this one.

        Returns:
            `J_m`, its terms without their weights, and the stages; [].

        Raises:
            UserError: If the labels are of other classes than the model knows.
        """
        require_classes(labels, self.classifier.out_features)
        c = self.config
        if step == 0:
            self.triplet_sum.zero_()
            self.generator_sum.zero_()
        weight = synthetic_weight(mean_so_far(self.generator_sum, step), c.ripeness, c.adaptive_weight)
        trust = (-c.trust / mean_so_far(self.triplet_sum, step)).exp()
        similar = label_similarity(labels, labels) > 0
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        triplet, graph, synthetic = (torch.zeros((), device=image.device) for _ in range(3))
        for pairs in directions(image, text, similar):
            scores, moves = self.generator(pairs.anchors, pairs.items, similar)
            graph = graph + soft_cross_entropy(scores, labels) / 4
            triplet = triplet + triplet_loss(pairs, c.margin) / 4
            negatives = SyntheticNegatives(pairs, moves.detach() * trust)
            synthetic = synthetic + synthetic_triplet_loss(pairs, negatives.cosines(), c.margin) / 4
        self.triplet_sum += triplet.detach()
        loss = c.triplet_weight * triplet + c.graph_weight * graph + weight * synthetic
        terms = {"triplet": triplet, "graph": graph, "synthetic": synthetic, "synthetic_weight": weight}
        image, text = image.detach(), text.detach()
        return StepOutput(
            loss,
            terms,
            (
                Stage("classifier", ("classifier",), lambda: self.classifier_objective(image, text, labels)),
                Stage("generator", ("generator",), lambda: self.generator_objective(image, text, labels, step)),
            ),
        )

    def classifier_objective(self, image: Tensor, text: Tensor, labels: Tensor) -> StepOutput:
        """The classifier's loss: unit vectors of codes, [B, K], should have the classes of their labels, [B, C]."""
        with full_precision(image.device):
            losses = [soft_cross_entropy(self.classifier(units), labels) for units in (image, text)]
            return StepOutput(self.config.classifier_weight * (losses[0] + losses[1]) / 2)

    def generator_objective(self, image: Tensor, text: Tensor, labels: Tensor, step: int) -> StepOutput:
        """The generator's loss: synthetic negatives of their own class, near their anchors, each moved in its own way.

        Args:
            image: Unit vectors of the pictures' codes, [B, K]; constants.
            text: Those of the texts, [B, K].
            labels: Multi-hot labels, [B, C].
            step: Steps of this epoch before this one.

        Returns:
            `J_gen` and its terms without their weights, [].
        """
        c = self.config
        with full_precision(image.device):
            trust = (-c.trust / mean_so_far(self.triplet_sum, step + 1)).exp()
            similar = label_similarity(labels, labels) > 0
            of_class, nearness, diversity = (torch.zeros((), device=image.device) for _ in range(3))
            for pairs in directions(image, text, similar):
                _, moves = self.generator(pairs.anchors, pairs.items, similar)
                negatives = SyntheticNegatives(pairs, moves * trust)
                of_class = of_class + negatives.cross_entropy(self.classifier, labels) / 4
                distances = 1 - negatives.cosines()
                nearness = nearness + distances.sum() / max(len(distances), 1) / 4
                diversity = diversity + (1 - spread(moves)) / 4
            loss = c.class_weight * of_class + c.nearness_weight * nearness + c.diversity_weight * diversity
            self.generator_sum += loss.detach()
            return StepOutput(loss, {"of_class": of_class, "nearness": nearness, "diversity": diversity})


def mean_so_far(total: Tensor, steps: int) -> Tensor:
    """Mean of an epoch's losses from their sum [] and number; 1e6 where there are none, or where they were all 0."""
    if steps == 0:
        return torch.full_like(total, _NO_MEAN)
    return torch.where(total == 0, _NO_MEAN, total / steps)


def synthetic_weight(generator_mean: Tensor, ripeness: float, adaptive: bool) -> Tensor:
    """Weight of synthetic triplets, [] in [0.1, 0.9]: the more, the better the generator has become.

    Args:
        generator_mean: Mean loss of the generator over the epoch's earlier steps, [].
        ripeness: beta.
        adaptive: Whether values between the limits are used; if not, they become 0.1, as in the authors' code.

    Source:
        DGHDGH, ICLR 2026, lambda_3 = 1 - e^(-beta / mean).
    """
    weight = (1 - (-ripeness / generator_mean).exp()).clamp(0.1, 0.9)
    return weight if adaptive else torch.where(weight < 0.9, 0.1, weight)


def directions(image: Tensor, text: Tensor, similar: Tensor) -> Iterator[Direction]:
    """The four pairings of modalities: unit vectors [B, K] of both, and which items are similar, [B, B] bool."""
    within, across = Triplets.of(similar, within=True), Triplets.of(similar, within=False)
    yield Direction(image, image, within)
    yield Direction(image, text, across)
    yield Direction(text, image, across)
    yield Direction(text, text, within)


def triplet_loss(pairs: Direction, margin: float) -> Tensor:
    """Mean over the triplets that cost something of `cos(a, n) - cos(a, p) + margin`; [], 0 if there are none.

    Source:
        DGHDGH, ICLR 2026, J_r.
    """
    costs = (pairs.cosines(pairs.triplets.far) - pairs.cosines(pairs.triplets.near) + margin).clamp(min=0)
    return masked_mean(costs, costs > 0)


def synthetic_triplet_loss(pairs: Direction, synthetic: Tensor, margin: float) -> Tensor:
    """Mean over the triplets that cost something, and whose synthetic negative is nearer than the positive.

    Args:
        pairs: Anchors, items and triplets.
        synthetic: Cosines of anchors with the synthetic negatives, [T].
        margin: The margin.

    Returns:
        Scalar; 0 if there are none.

    Source:
        DGHDGH, ICLR 2026, J_syn.
    """
    positive = pairs.cosines(pairs.triplets.near)
    costs = (synthetic - positive + margin).clamp(min=0)
    return masked_mean(costs, (costs > 0) & (positive < synthetic))


def spread(moves: Tensor) -> Tensor:
    """Root mean square over pairs of the deviation from their anchor's mean, [] for values [B, B, K]."""
    deviations = moves - moves.mean(1, keepdim=True)
    return deviations.square().sum(-1).mean().clamp(min=1e-12).sqrt()


class SyntheticNegatives:
    """Negatives moved towards their anchors, but no nearer than the triplet's positive would be.

    With d the distance of a pair and s = min(d_near / d_far, 1), bit k of the negative is `a + r (b - a)` with
    r = s + m (1 - s): for m = 0 at the positive's distance, for m = 1 where the negative was. In s this is the line
    u + s v with u = a + m (b - a) and v = (1 - m) (b - a), which depend on anchor and negative alone.

    Args:
        pairs: Anchors, items and triplets.
        moves: m of every pair and bit, [B, B, K] in [0, 1].

    Source:
        DGHDGH, ICLR 2026, synthetic negatives.
    """

    def __init__(self, pairs: Direction, moves: Tensor) -> None:
        difference = pairs.items - pairs.anchors[:, None]  # [B, B, K]
        self.anchors, self.far = pairs.anchors[:, None], pairs.triplets.far
        self.start = self.anchors + moves * difference
        self.line = (1 - moves) * difference
        distances = torch.linalg.vector_norm(difference, dim=-1).clamp(min=1e-6).flatten()
        near, far = (distances.index_select(0, places) for places in (pairs.triplets.near, self.far))
        self.ratio = (near / far).clamp(max=1)  # s, [T]

    def cosines(self) -> Tensor:
        """Cosines of the anchors, which are unit vectors, with the negatives, [T]."""
        a, u, v, s = self.anchors, self.start, self.line, self.ratio
        products = torch.stack([(x * y).sum(-1) for x, y in ((a, u), (a, v), (u, u), (u, v), (v, v))], dim=-1)
        au, av, uu, uv, vv = products.flatten(0, 1).index_select(0, self.far).unbind(1)
        squares = uu + s * (2 * uv + s * vv)
        return (au + s * av) / squares.clamp(min=1e-12).sqrt()

    def cross_entropy(self, classifier: nn.Linear, labels: Tensor) -> Tensor:
        """How far the negatives are from their own classes, mean over the triplets; [], 0 if there are none.

        Args:
            classifier: K -> C.
            labels: Multi-hot labels of the batch, [B, C].
        """
        total = self.start.new_zeros(())
        start = classifier(self.start).flatten(0, 1)  # class scores at u, [B B, C]
        line = F.linear(self.line, classifier.weight).flatten(0, 1)  # what they gain along v
        for far, ratio in zip(self.far.split(_TRIPLETS_AT_ONCE), self.ratio.split(_TRIPLETS_AT_ONCE), strict=True):
            part = checkpoint(_sum_of_entropies, start, line, far, ratio, labels, use_reentrant=False)
            total = total + part
        return total / max(len(self.far), 1)


def _sum_of_entropies(start: Tensor, line: Tensor, far: Tensor, ratio: Tensor, labels: Tensor) -> Tensor:
    scores = start.index_select(0, far) + ratio[:, None] * line.index_select(0, far)  # [T, C]
    return -(scores.log_softmax(-1) * labels[far % len(labels)]).sum()
