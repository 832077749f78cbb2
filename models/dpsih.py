"""DPSIH: polysemic semantic instance network for cross-modal hashing.

Paper: S. Han, Q. Qin, K. Xie, W. Zhang, L. Huang, "Polysemic Semantic Instance Network for Cross-Modal Hashing",
AAAI 2026, https://doi.org/10.1609/aaai.v40i6.42459.
Authors' code: https://github.com/QinLab-WFU/DPSIH, commit 1b713c6, no licence stated; none of it is used here.

Every picture and every text has n codes, its "instances": the relaxed code of a tanh head on CLIP's pooled feature,
moved in n ways by what n attentions find among the patches or the words. The similarity of two items is that of their
best pair of instances, in training as in retrieval. Triplets of such similarities are the loss; the instances of both
modalities are drawn to one distribution, those of an item apart.

An item takes n K bits, and a comparison n^2 distances: results say so, and are not to be compared with those of one
code of K bits without it. `model.instances: 1` has one code.

Deviations from the authors' code:
1. A step whose loss is exactly 0 is a step like any other; the release skips its backward pass.
2. An instance whose values are all equal, which the release divides by 0, becomes a vector of zeros.
3. A code has no zeros: the sign of an exact 0 is +1.
4. CLIP's weights are read as float32; the authors round the matrices of a float32 file to float16.
As released, unless a setting says otherwise: the last normalisation of the image tower is applied twice to the patches
(`patch_norm`), padding takes part in the attention (`mask_padding`), the terms beside the triplets are sums over the
batch, because the release hands a GPU's number over as their reduction (`auxiliary_reduction`), the own partner is
never a positive, and pictures are compared with texts in one direction only.

Results reproduced: the golden case of the authors' code (tests/golden/DPSIH-*.npz).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from pydantic import Field
from torch import Tensor, nn

from common.losses import full_precision, sum_over_triplets
from common.registry import MODELS
from common.set_losses import maximum_mean_discrepancy
from common.similarity import label_similarity, without_self
from common.types import Batch, DataInfo, Progress, StepOutput
from models.blocks.pooled import TanhHashingConfig, TanhHashingModel
from utils.distributed import gather_rows


class DPSIHConfig(TanhHashingConfig):
    """`model:` section of DPSIH."""

    instances: int = Field(gt=0)  # n, codes of an item
    residual_dropout: float = Field(ge=0, lt=1)  # of what the attentions find
    patch_norm: Literal["twice", "once"]  # how often patches are normalised before the attention; released: twice
    mask_padding: bool  # whether the attention passes over padding (token id 0); the authors' code lets it read it
    margin: float = Field(ge=0)  # of the triplets
    triplet_weight: float = Field(ge=0)
    discrepancy_weight: float = Field(ge=0)  # alpha_1, between the instances of pictures and those of texts
    discrepancy_gamma: float = Field(gt=0)  # of its kernel
    diversity_weight: float = Field(ge=0)  # alpha_2, of what an item's attentions find
    auxiliary_reduction: Literal["sum", "mean"]  # of both: over the batch (released) or per pair of rows and per item


class InstanceHead(nn.Module):
    """Makes n instances of a relaxed code and of what n attentions find among the tokens.

    Args:
        width: Width W of the tokens.
        bits: K.
        instances: n.
        dropout: Of what the attentions find.
    """

    def __init__(self, width: int, bits: int, instances: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width // 2, bias=False)
        self.weigh = nn.Linear(width // 2, instances, bias=False)
        self.fc = nn.Linear(width, bits)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(bits)
        for linear in (self.hidden, self.weigh, self.fc):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(self.fc.bias)

    def attention(self, tokens: Tensor, ignore: Tensor | None = None) -> Tensor:
        """Weights of the tokens.

        Args:
            tokens: [B, L, W].
            ignore: True for tokens that get no weight, [B, L] bool; at least one of each row is False.

        Returns:
            [B, L, n] float32; every column sums to 1.
        """
        logits = self.weigh(self.hidden(tokens).tanh()).float()
        if ignore is not None:
            logits = logits.masked_fill(ignore[:, :, None], -torch.inf)
        return logits.softmax(1)

    def residual(self, tokens: Tensor, ignore: Tensor | None = None) -> Tensor:
        """What the attentions find in tokens [B, L, W]: [B, n, K] float32 in (0, 1); `ignore` as in `attention`."""
        found = einsum(self.attention(tokens, ignore), tokens.float(), "B L n, B L W -> B n W")
        return self.fc(found).float().sigmoid()

    def forward(self, relaxed: Tensor, residual: Tensor) -> Tensor:
        """Relaxed codes [B, K] and residuals [B, n, K], after their dropout -> instances, unit vectors [B, n, K]."""
        return F.normalize(self.norm(relaxed[:, None] + residual), dim=-1, eps=1e-12)


@MODELS.register("DPSIH")
class DPSIH(TanhHashingModel):
    """Several codes an item, of which the best pair decides, from CLIP's pooled features and its tokens.

    Args:
        config: `model:` section.
        data: What is known of the training data.
    """

    Config = DPSIHConfig
    reference_names = (
        *TanhHashingModel.reference_names,
        (r"^DSIE_i\.", "image_instances."),
        (r"^DSIE_t\.", "text_instances."),
        (r"^(image|text)_instances\.attention\.w_1\.", r"\1_instances.hidden."),
        (r"^(image|text)_instances\.attention\.w_2\.", r"\1_instances.weigh."),
        (r"^(image|text)_instances\.layer_norm\.", r"\1_instances.norm."),
    )

    def __init__(self, config: DPSIHConfig, data: DataInfo) -> None:
        super().__init__(config, data, "fan_out")
        self.config = config
        shape = data.clip.shape
        self.image_instances, self.text_instances = (
            InstanceHead(width, config.bits, config.instances, config.residual_dropout)
            for width in (shape.vision_width, shape.text_width)
        )

    @property
    def codes_per_item(self) -> int:
        """The number n of instances."""
        return self.config.instances

    def image_tokens(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, R, R] -> pooled features [B, E] and the patches for the attention, [B, P, W]."""
        pooled, states = self.backbone.image_states(image)
        patches = states[:, 1:]
        return pooled, self.backbone.visual.ln_post(patches) if self.config.patch_norm == "twice" else patches

    def image_parts(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, R, R] -> pooled features [B, E] and residuals [B, n, K]."""
        pooled, patches = self.image_tokens(image)
        return pooled, self.image_instances.residual(patches)

    def text_parts(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids of texts [B, L] -> pooled features [B, E] and residuals [B, n, K]."""
        pooled, tokens = self.backbone.text_states(ids)
        return pooled, self.text_instances.residual(tokens, self._ignored(ids))

    def _ignored(self, ids: Tensor) -> Tensor | None:
        """Where the attention passes over token ids [B, L], [B, L] bool; never over the first token."""
        if not self.config.mask_padding:
            return None
        ignored = ids == 0
        ignored[:, 0] = False
        return ignored

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One step's loss over the global batch.

        Rows are gathered before the heads, so that dropout is that of one process.
        """
        (image, found_image), (text, found_text) = self.image_parts(batch["image"]), self.text_parts(batch["text"])
        found_image = self.image_instances.dropout(gather_rows(found_image))
        found_text = self.text_instances.dropout(gather_rows(found_text))
        relaxed_image, relaxed_text = self.image_head(gather_rows(image)), self.text_head(gather_rows(text))
        with full_precision(image.device):
            return self.objective_of(
                self.image_instances(relaxed_image, found_image),
                self.text_instances(relaxed_text, found_text),
                (found_image, found_text),
                gather_rows(batch["labels"]),
            )

    def objective_of(self, image: Tensor, text: Tensor, residuals: tuple[Tensor, Tensor], labels: Tensor) -> StepOutput:
        """The loss of instances.

        Args:
            image: Instances of the pictures, unit vectors [B, n, K].
            text: Instances of the texts, [B, n, K].
            residuals: What the attentions found in pictures and in texts, after dropout, [B, n, K] each.
            labels: Multi-hot labels, [B, C].

        Returns:
            Loss, and its terms without their weights.
        """
        c = self.config
        similar = label_similarity(labels, labels) > 0
        triplet_image = triplet_loss(best_pairs(image, image), similar, c.margin)
        triplet_text = triplet_loss(best_pairs(text, text), similar, c.margin)
        triplet_cross = triplet_loss(best_pairs(image, text), similar, c.margin)
        if self.codes_per_item > 1:
            discrepancy = maximum_mean_discrepancy(
                image.flatten(0, 1), text.flatten(0, 1), c.discrepancy_gamma, exact=True
            )
            diversity = instance_likeness(residuals[0]) + instance_likeness(residuals[1])
            if c.auxiliary_reduction == "sum":
                rows = len(image) * self.codes_per_item
                discrepancy, diversity = rows**2 * discrepancy, len(image) * diversity
        else:
            discrepancy, diversity = image.new_zeros(()), image.new_zeros(())
        loss = (
            c.triplet_weight * (triplet_image + triplet_text + triplet_cross)
            + c.discrepancy_weight * discrepancy
            + c.diversity_weight * diversity
        )
        terms = {
            "triplet_image": triplet_image,
            "triplet_text": triplet_text,
            "triplet_cross": triplet_cross,
            "discrepancy": discrepancy,
            "diversity": diversity,
        }
        return StepOutput(loss, terms)

    def binarise(self, relaxed: Tensor) -> Tensor:
        """Instances [B, n, K] -> codes [B, n, K], or [B, K] for n = 1."""
        codes = super().binarise(relaxed)
        return codes if self.codes_per_item > 1 else codes.squeeze(1)

    def encode_image(self, batch: Batch) -> Tensor:
        """Codes of pictures, [B, *code_shape]."""
        pooled, residual = self.image_parts(batch["image"])
        return self.binarise(self.image_instances(self.image_head(pooled), residual))

    def encode_text(self, batch: Batch) -> Tensor:
        """Codes of texts, [B, *code_shape]."""
        pooled, residual = self.text_parts(batch["text"])
        return self.binarise(self.text_instances(self.text_head(pooled), residual))


def best_pairs(a: Tensor, b: Tensor) -> Tensor:
    """Similarity of items that have several instances: the largest inner product of a pair of them.

    Args:
        a: Instances, [N, n, K].
        b: Instances, [M, n, K].

    Returns:
        [N, M]; a gradient reaches the best pair alone, the first of equal ones.

    Source:
        DPSIH, AAAI 2026.
    """
    products = rearrange(einsum(a, b, "N p K, M q K -> N M p q"), "N M p q -> N M (p q)")
    return products.max(-1).values


def triplet_loss(similarity: Tensor, similar: Tensor, margin: float) -> Tensor:
    """Mean over the triplets that do not keep the margin of `s(i, m) - s(i, p) + margin`.

    p shares a label with i and is another item, also in the other modality; m shares none.

    Args:
        similarity: Anchors as rows, [B, B].
        similar: True where two items share a label, [B, B] bool.
        margin: The margin; triplets that keep it exactly count.

    Returns:
        Scalar; 0 if there are none.

    Source:
        DPSIH, AAAI 2026, multi-similarity triplets; as in the authors' code.
    """

    def cost(similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        costs = similarity[:, None, :] - similarity[:, :, None] + margin  # [anchors, p, m]
        kept = positive[:, :, None] & negative[:, None, :] & (costs >= 0)
        return (costs * kept).sum(), kept.sum()

    total, count = sum_over_triplets(cost, similarity, without_self(similar), ~similar)
    return total / count.clamp(min=1)


def instance_likeness(residuals: Tensor) -> Tensor:
    """How alike the residuals of an item are: the norm of the cosines of its pairs, divided by n^2, mean over items.

    Args:
        residuals: [B, n, K].

    Returns:
        Scalar.

    Source:
        DPSIH, AAAI 2026, instance diversity.
    """
    units = F.normalize(residuals, dim=-1)
    count = residuals.shape[1]
    own = torch.eye(count, dtype=torch.bool, device=residuals.device)
    cosines = (units @ units.transpose(1, 2)).masked_fill(own, 0)
    return (torch.linalg.matrix_norm(cosines) / count**2).mean()
