"""DPBE: deep probabilistic binary embedding.

Paper: "Deep Probabilistic Binary Embedding via Learning Reliable Uncertainty for Cross-Modal Retrieval", ACM MM 2025,
https://doi.org/10.1145/3746027.3754811.
Authors' code: https://github.com/QinLab-WFU/DPBE, commit 9088cc0, and the collection
https://github.com/QinLab-WFU/CLIP-based-Cross-Modal-Hashing, commit 8040b44; neither runs as published, and neither
states a licence; none of it is used here.

One linear head per modality, whose output is brought onto the unit sphere. Its weights are a Gaussian posterior: every
step draws heads, regresses the cosines of what they make on the number of labels that two items share, and adds the
curvature of the heads to a running diagonal Hessian, which sets the spread of the next draws. A code is the sign of the
mean over drawn heads.

Deviations from the authors' code:
1. The step applies the heads to CLIP's features; the release applies them twice, which fails.
2. Heads for encoding are drawn anew from the present posterior, by a seed of their own (`eval_seed`), the same for all
   items; the release evaluates with those of the last training step, and has none after loading a checkpoint.
   `eval_samples: 0` takes the means, without a draw.
3. A batch without a triplet leaves the Hessian as it is; there it becomes infinite.
4. An output of zeros stays zero; there it is NaN.
5. A code has no zeros: the sign of an exact 0 is +1.
6. CLIP's weights are read as float32; the authors round the matrices of a float32 file to float16.
As released, the loss is that of the last drawn head over the number of heads (`average_samples: true` takes the mean of
all), and an item counts as dissimilar unless exactly one label is shared (`strict_triplets: true`: unless none is),
which matters for the number of triplets alone.

Results reproduced: the golden case of the authors' code (tests/golden/DPBE-*.npz).
"""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from common.losses import full_precision
from common.registry import MODELS
from common.types import Batch, DataInfo, Progress, StepOutput
from models.base import ClipModelConfig
from models.blocks.heads import TanhHead, sign_codes
from models.blocks.pooled import PooledHashingModel
from models.blocks.posterior import PosteriorHead, head_curvature, outputs_of, sphere_cosines, to_sphere
from utils.distributed import gather_rows


class DPBEConfig(ClipModelConfig):
    """`model:` section of DPBE."""

    probabilistic: bool  # false: tanh heads without a posterior; what follows but `dropout` then has no meaning
    dropout: float = Field(ge=0, lt=1)  # of the tanh heads alone, before tanh
    train_samples: int = Field(gt=0)  # n, heads drawn in a step
    average_samples: bool  # whether the loss is the mean over all of them, or the last one's over n
    eval_samples: int = Field(ge=0)  # heads drawn for encoding; 0: the means alone
    eval_seed: int = Field(ge=0, lt=2**32 - 1)  # of these draws
    hessian: Literal["mse", "contrastive"]  # mean curvature of the batch, or that of positives less that of negatives
    hessian_memory: float = Field(ge=0, le=1)  # share of the Hessian that a step keeps
    max_pairs: int = Field(gt=0)  # most triplets that count in its scale
    strict_triplets: bool  # whether items that share two labels or more are no negatives


@MODELS.register("DPBE")
class DPBE(PooledHashingModel):
    """Regression of label overlap with heads drawn from a posterior, on CLIP's pooled features.

    Args:
        config: `model:` section.
        data: What is known of the training data.
    """

    Config = DPBEConfig
    reference_names = (
        (r"^(clip|backbone)\.", "backbone."),
        (r"^(image|text)_hash\.(0\.|fc\.)?", r"\1_head.fc."),
        (r"^hessian_i$", "image_head.hessian"),
        (r"^hessian_t$", "text_head.hessian"),
    )
    reference_lacks = (r"(image|text)_head\.hessian",)

    def __init__(self, config: DPBEConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.config = config
        self.rows = data.num_train
        width = data.clip.shape.embed_dim
        self.image_head: PosteriorHead | TanhHead
        self.text_head: PosteriorHead | TanhHead
        if config.probabilistic:
            self.image_head, self.text_head = (
                PosteriorHead(width, config.bits, data.num_train, config.eval_samples, config.eval_seed + modality)
                for modality in range(2)
            )
        else:
            self.image_head, self.text_head = (
                TanhHead(width, config.bits, config.dropout, "fan_out") for _ in range(2)
            )

    @property
    def marks(self) -> tuple[str, ...]:
        """Says that codes hang on draws, if they do."""
        c = self.config
        if not (c.probabilistic and c.eval_samples):
            return ()
        return (f"codes are means over {c.eval_samples} heads that were drawn with the seed {c.eval_seed}",)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Standard normal draws for the heads of pictures and of texts, [n, K E + K] each."""
        heads = (self.image_head, self.text_head)
        sizes = [(self.config.train_samples, sum(p.numel() for p in head.parameters())) for head in heads]
        image, text = (torch.randn(size, device=self.image_head.fc.weight.device) for size in sizes)
        return image, text

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One step's loss over the global batch; moves the Hessians on."""
        if not self.config.probabilistic:
            return super().training_step(batch, progress)
        image, text = self.gathered_features(batch)
        with full_precision(image.device):
            return self.probabilistic_objective(image.float(), text.float(), gather_rows(batch["labels"]))

    def probabilistic_objective(self, image: Tensor, text: Tensor, labels: Tensor) -> StepOutput:
        """The loss with drawn heads; moves the Hessians on.

        Args:
            image: CLIP's features of the pictures, [B, E].
            text: CLIP's features of the texts, [B, E].
            labels: Multi-hot labels, [B, C].

        Returns:
            Loss and terms, those of the head or the heads that the loss looks at.
        """
        c = self.config
        counts = (labels @ labels.T).detach()
        outputs = []
        heads = cast(tuple[PosteriorHead, PosteriorHead], (self.image_head, self.text_head))
        for head, features, noise in zip(heads, (image, text), self.draw(), strict=True):
            outputs.append(outputs_of(features, *head.drawn(noise)))
            self.update_hessian(head, features.detach(), outputs[-1].detach(), counts)
        seen = [to_sphere(one if c.average_samples else one[-1:]) for one in outputs]
        found = self.objective(seen[0], seen[1], labels)
        return StepOutput(found.loss if c.average_samples else found.loss / c.train_samples, found.terms)

    def objective(self, image: Tensor, text: Tensor, labels: Tensor) -> StepOutput:
        """Mean squared errors of cosines against the overlap of labels, tanh of half the number of shared ones.

        Args:
            image: Relaxed codes of the pictures, [B, K], or of n heads, [n, B, K].
            text: Relaxed codes of the texts, of the same shape.
            labels: Multi-hot labels, [B, C].

        Returns:
            Their sum, and each of them; means over the heads.

        Source:
            DPBE, ACM MM 2025, similarity regression.
        """
        overlap = (labels @ labels.T / 2).tanh()
        terms = {
            name: F.mse_loss(sphere_cosines(a, b), overlap.expand(*a.shape[:-2], -1, -1))
            for name, a, b in (("image", image, image), ("text", text, text), ("cross", image, text))
        }
        return StepOutput(terms["image"] + terms["text"] + terms["cross"], terms)

    @torch.no_grad()
    def update_hessian(self, head: PosteriorHead, features: Tensor, outputs: Tensor, counts: Tensor) -> None:
        """Adds the curvature of a batch to a head's Hessian; a batch without a triplet adds and forgets nothing.

        Args:
            head: The head.
            features: Its inputs, [B, E].
            outputs: Of the drawn heads, before the sphere, [n, B, K].
            counts: Labels that items share, [B, B].
        """
        c = self.config
        positive, negative = counts > 0, counts == 0 if c.strict_triplets else counts != 1
        triplets = int((positive.sum(1) * negative.sum(1)).sum())
        if triplets == 0:
            return
        if c.hessian == "mse":
            weights = features.new_full((len(features),), 1 / len(features))
        else:
            weights = drawn_balance(positive, negative, c.max_pairs).to(features.dtype)
        curvature = head_curvature(features, outputs, weights).mean(0)
        head.remember(curvature * self.rows**2 / min(triplets, c.max_pairs), c.hessian_memory)

    def binarise(self, relaxed: Tensor) -> Tensor:
        """Relaxed codes [B, K] -> codes [B, K]."""
        return sign_codes(relaxed)


def drawn_balance(positive: Tensor, negative: Tensor, limit: int) -> Tensor:
    """How much more often each item is the positive than the negative of a triplet, among some that are drawn.

    Args:
        positive: Items that an anchor's triplets may have as the positive, itself included, [B, B] bool.
        negative: As the negative, [B, B] bool.
        limit: Triplets that are drawn, from torch's global generator; all if there are no more.

    Returns:
        [B] int64.
    """
    _, near, far = (positive[:, :, None] & negative[:, None, :]).nonzero().unbind(1)
    if len(near) > limit:
        chosen = torch.randperm(len(near), device=near.device)[:limit]
        near, far = near[chosen], far[chosen]
    size = len(positive)
    return torch.bincount(near, minlength=size) - torch.bincount(far, minlength=size)
