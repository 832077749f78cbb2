"""DNPH: deep neighborhood-aware proxy hashing. Not DNpH (TMM 2024), another method whose name differs in case only.

Paper: Y. Huo, Q. Qin, J. Dai, W. Zhang, L. Huang, C. Wang, "Deep Neighborhood-aware Proxy Hashing with Uniform
Distribution Constraint for Cross-modal Retrieval", ACM TOMM 20(6), 2024, https://doi.org/10.1145/3643639.
Authors' code: https://github.com/QinLab-WFU/OUR-DNPH, commit e3f19ec, no licence stated; none of it is used here. Where
the unified library https://github.com/kalenforn/clip-based-cross-modal-hash, commit 6d64ae2, departs from it, an option
follows: `train_proxies`, `initialization`, `classifier_outputs`.

One linear tanh head and one linear classifier per modality on CLIP's pooled feature. A proxy-NCA loss with a margin
draws codes to the proxies of their labels; every batch is drawn towards uniformly random codes, each to the one that an
optimal assignment gives it, so that codes fill the space evenly.

The classifiers learn an item's *first* label, so the order of the label columns matters: results on MIRFlickr-25K,
whose published preparation took the order of a directory listing, depend on the label file.

Deviations from the authors' code:
1. Proxies are part of the model and of its checkpoint, and drawn from the run's seed. By default they stay as they are
   drawn, as in the release, which makes an optimizer for them and never steps it.
2. The random targets come from torch's generator, which the run seeds for every step, not from NumPy's, so that a
   resumed run is exact.
3. A code has no zeros: the sign of an exact 0 is +1.
4. CLIP's weights are read as float32; the authors round the matrices of a float32 file to float16.

Results reproduced: the golden cases of the authors' and of the unified library's code (tests/golden/DNPH-*.npz).
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from common.errors import UserError
from common.losses import full_precision
from common.registry import MODELS
from common.types import Batch, DataInfo, Progress, StepOutput
from models.base import ParamGroups
from models.blocks.heads import init_fan_out
from models.blocks.pooled import TanhHashingConfig, TanhHashingModel
from models.blocks.proxies import ClassProxies
from utils.distributed import gather_rows

PROXY_DEVIATION = 1 / 8  # standard deviation of the start values of the proxies; a constant of the authors' code


class DNPHConfig(TanhHashingConfig):
    """`model:` section of DNPH."""

    initialization: Literal["torch", "fan_out"]  # of heads and classifiers: torch's (authors) | unified library's
    classifier_outputs: Annotated[int, Field(gt=0)] | None  # null: one per class; the unified library always has 80
    train_proxies: bool  # false: fixed at their random start; true: `optim:` needs an optimizer `proxies`
    margin: float = Field(ge=0)  # added to the squared distance between a code and the proxies of its labels
    uniformity_weight: float = Field(ge=0)  # nu


@MODELS.register("DNPH")
class DNPH(TanhHashingModel):
    """Neighborhood-aware proxy hashing with uniformly distributed codes, on CLIP's pooled features.

    Args:
        config: `model:` section.
        data: What is known of the training data.

    Raises:
        UserError: If the classifiers would have fewer outputs than there are classes.
    """

    Config = DNPHConfig
    reference_names = (
        *TanhHashingModel.reference_names,
        (r"^(?:hash\.)?(image|text)_pre\.fc\.", r"\1_classifier."),
        (r"^(loss|DNPH)\.proxies$", "proxies.vectors"),
    )
    reference_lacks = (r"proxies\.vectors", r"(image|text)_classifier\..*")  # codes depend on neither

    def __init__(self, config: DNPHConfig, data: DataInfo) -> None:
        super().__init__(config, data, config.initialization)
        self.config = config
        width, classes = data.clip.shape.embed_dim, data.num_classes
        outputs = classes if config.classifier_outputs is None else config.classifier_outputs
        if outputs < classes:
            raise UserError(
                f"model.classifier_outputs is {outputs}, but the data have {classes} classes; set it to null, which "
                "stands for the number of classes, or to at least that"
            )
        self.image_classifier = nn.Linear(width, outputs)
        self.text_classifier = nn.Linear(width, outputs)
        if config.initialization == "fan_out":
            init_fan_out(self.image_classifier), init_fan_out(self.text_classifier)
        self.proxies = ClassProxies(PROXY_DEVIATION * torch.randn(classes, config.bits), config.train_proxies)

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One step's loss over the global batch."""
        image, text = self.gathered_features(batch)
        codes = self.image_head(image), self.text_head(text)
        logits = self.image_classifier(image).float(), self.text_classifier(text).float()
        with full_precision(image.device):
            return self.joint_objective(codes, logits, gather_rows(batch["labels"]))

    def joint_objective(
        self, codes: tuple[Tensor, Tensor], logits: tuple[Tensor, Tensor], labels: Tensor
    ) -> StepOutput:
        """The loss of relaxed codes and logits; draws the targets of this step.

        Args:
            codes: Relaxed codes of pictures and of texts, [B, K] each.
            logits: Class scores of pictures and of texts, [B, C] each or wider.
            labels: Multi-hot labels, [B, C].

        Returns:
            Loss, and its terms without their weights.

        Raises:
            UserError: If a class has no proxy.
        """
        positive = self.proxies.positives(labels)
        first_label = positive.int().argmax(-1)  # class 0 for a row without labels
        targets = self.draw_targets(labels.shape[0]).to(codes[0])
        proxy = proxy_loss(self.proxies(torch.cat(codes)), torch.cat((positive, positive)), self.config.margin)
        classification_image, classification_text = (F.cross_entropy(scores, first_label) for scores in logits)
        uniformity_image, uniformity_text = (agreement(x, assign_targets(x, targets)) for x in codes)
        classification, uniformity = classification_image + classification_text, uniformity_image + uniformity_text
        loss = proxy + classification - self.config.uniformity_weight * uniformity
        terms = {
            "proxy": proxy,
            "classification_image": classification_image,
            "classification_text": classification_text,
            "uniformity_image": uniformity_image,
            "uniformity_text": uniformity_text,
        }
        return StepOutput(loss, terms)

    def draw_targets(self, rows: int) -> Tensor:
        """Uniformly random codes in {-1, +1}, [rows, K] on the CPU, from torch's global generator."""
        return torch.randint(2, (rows, self.bits)) * 2 - 1

    def param_groups(self) -> ParamGroups:
        """CLIP apart from heads and classifiers; the proxies, if they are trained, with an optimizer of their own."""
        groups = {"main": self.backbone_and_head("proxies")}
        return groups | ({"proxies": {"proxies": [self.proxies.vectors]}} if self.config.train_proxies else {})


def proxy_loss(cosines: Tensor, positive: Tensor, margin: float) -> Tensor:
    """Proxy-NCA with a margin: a code should be nearer to the proxies of its labels than to the others.

    With D the squared distance of normalised code and proxy, plus the margin where the row has the label, a row costs
    the sum over its labels of `-log softmax(-D)`; the softmax runs over all classes.

    Args:
        cosines: Of codes with proxies, [B, C].
        positive: True where the row has the label, [B, C] bool.
        margin: m.

    Returns:
        Scalar, mean over rows; a row without labels costs 0.

    Source:
        DNPH, TOMM 2024, proxy loss.
    """
    distances = 2 - 2 * cosines + margin * positive
    return -((-distances).log_softmax(-1) * positive).sum(-1).mean()


@torch.no_grad()
def assign_targets(relaxed: Tensor, targets: Tensor) -> Tensor:
    """Deals targets out to codes, one each, so that the sum of Euclidean distances (not squared) is least.

    Args:
        relaxed: Relaxed codes, [B, K].
        targets: Random codes, [B, K].

    Returns:
        The rows of `targets` in the order of the codes they go to, [B, K].

    Source:
        DNPH, TOMM 2024, uniform distribution constraint; distances in float64 as in the authors' code.
    """
    costs = torch.cdist(relaxed.double(), targets.double(), compute_mode="donot_use_mm_for_euclid_dist")
    # Codes that are not finite make a loss that is not; whoever looks at the loss says so, not the solver.
    _, order = linear_sum_assignment(costs.nan_to_num().cpu().numpy())
    return targets[torch.from_numpy(order).to(targets.device)]


def agreement(relaxed: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of the inner product of a relaxed code and its target, both [B, K]; at most K."""
    return (relaxed * targets).sum(-1).mean()
