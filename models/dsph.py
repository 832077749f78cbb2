"""DSPH: deep semantic-aware proxy hashing.

Paper: Y. Huo, Q. Qin, J. Dai, L. Wang, W. Zhang, L. Huang, C. Wang, "Deep Semantic-Aware Proxy Hashing for Multi-Label
Cross-Modal Retrieval", IEEE TCSVT 34(1), 2024, https://doi.org/10.1109/TCSVT.2023.3285266.
Authors' code: https://github.com/QinLab-WFU/DSPH, commit 078b1a1, no licence stated; none of it is used here. The
unified library https://github.com/kalenforn/clip-based-cross-modal-hash, commit 6d64ae2, has the same head and loss.

One linear tanh head per modality on CLIP's pooled feature. Codes are pulled to the proxies of their labels and pushed
below a cosine from all others; items of several labels that share none are pushed apart. How far is far enough comes
from coding theory: C codewords of K bits cannot all differ in more bits than the best linear code allows. Proxies have
an SGD of their own.

Deviations from the authors' code:
1. Proxies are part of the model and of its checkpoint; the release never saves them.
2. Proxies are drawn on the CPU from a generator of their own; the release seeds torch's global generator for it, and so
   fixes whatever is drawn later. The values are those of the release on a CPU.
3. The number of classes is that of the data, and the table of code distances is a part of it; the release takes the
   number from the command line and reads a spreadsheet.
4. Means over nothing are 0 (a batch in which no entry is positive, or none is negative), not NaN.
5. A code has no zeros: the sign of an exact 0 is +1.
6. CLIP's weights are read as float32; the authors round the matrices of a float32 file to float16.

Results reproduced: the golden cases of the authors' and of the unified library's code (tests/golden/DSPH-*.npz).
"""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from common.errors import UserError
from common.losses import masked_mean
from common.registry import MODELS
from common.similarity import cosine_similarity, label_similarity
from common.types import DataInfo, StepOutput
from models.base import ParamGroups
from models.blocks.pooled import TanhHashingConfig, TanhHashingModel
from models.blocks.proxies import ClassProxies

# Largest known minimum distance of a binary linear code, by length K; entry k - 1 is that of dimension k.
# Source: A. E. Brouwer, M. Grassl, bounds on linear codes, https://www.codetables.de.
CODE_DISTANCES = {
    8: (8, 5, 4, 4, 2, 2, 2, 1),
    12: (12, 8, 6, 6, 4, 4, 4, 3, 2, 2),
    16: (16, 10, 8, 8, 8, 6, 6, 5, 4, 4),
    18: (18, 12, 10, 8, 8, 8, 7, 6, 6, 4),
    20: (20, 13, 11, 10, 9, 8, 8, 8, 7, 6),
    24: (24, 16, 13, 12, 12, 10, 10, 8, 8, 8),
    32: (32, 21, 18, 16, 16, 16, 14, 13, 12, 12),
    36: (36, 24, 20, 18, 17, 16, 16, 16, 14, 14),
    40: (40, 26, 22, 20, 20, 18, 18, 16, 16, 16),
    48: (48, 32, 27, 24, 24, 24, 22, 22, 20, 20),
    64: (64, 42, 36, 33, 32, 32, 32, 29, 28, 28),
    72: (72, 48, 40, 38, 36, 35, 34, 32, 32, 32),
    80: (80, 53, 45, 42, 40, 40, 38, 37, 36, 36),
    96: (96, 64, 54, 50, 48, 48, 48, 46, 44, 44),
    128: (128, 85, 72, 68, 64, 64, 64, 64, 60, 60),
    192: (192, 128, 109, 102, 98, 96, 96, 96, 93, 92),
    256: (256, 170, 146, 136, 131, 128, 128, 128, 128, 124),
}


class DSPHConfig(TanhHashingConfig):
    """`model:` section of DSPH."""

    threshold: Annotated[float, Field(ge=-1, le=1)] | None  # T, largest cosine that costs nothing; null: from the table
    separation_weight: float = Field(ge=0)  # alpha, of pairs without a common label
    proxy_seed: int = Field(ge=0, lt=2**32)  # of the start values of the proxies, whatever the run's seed


@MODELS.register("DSPH")
class DSPH(TanhHashingModel):
    """Proxy hashing with a threshold from coding theory, on CLIP's pooled features.

    Args:
        config: `model:` section.
        data: What is known of the training data.

    Raises:
        UserError: If the threshold should come from the table, which has no entry for this code length or classes.
    """

    Config = DSPHConfig
    reference_names = (*TanhHashingModel.reference_names, (r"^hyp\.proxies$", "proxies.vectors"))
    reference_lacks = (r"proxies\.vectors",)

    def __init__(self, config: DSPHConfig, data: DataInfo) -> None:
        super().__init__(config, data, "torch")
        self.config = config
        classes = data.num_classes
        self.threshold = table_threshold(config.bits, classes) if config.threshold is None else config.threshold
        self.proxies = ClassProxies(draw_proxies(classes, config.bits, config.proxy_seed), trained=True)

    def objective(self, image: Tensor, text: Tensor, labels: Tensor) -> StepOutput:
        """The loss of relaxed codes, [B, K], as `PooledHashingModel.objective`.

        Raises:
            UserError: If a class has no proxy.
        """
        positive = self.proxies.positives(labels)
        apart = apart_pairs(labels)
        proxy_image = proxy_loss(self.proxies(image), positive, self.threshold)
        proxy_text = proxy_loss(self.proxies(text), positive, self.threshold)
        separation_image = separation_loss(image, image, apart, self.threshold)
        separation_text = separation_loss(text, text, apart, self.threshold)
        separation_cross = separation_loss(image, text, apart, self.threshold)
        separation = separation_image + separation_text + separation_cross
        loss = proxy_image + proxy_text + self.config.separation_weight * separation
        terms = {
            "proxy_image": proxy_image,
            "proxy_text": proxy_text,
            "separation_image": separation_image,
            "separation_text": separation_text,
            "separation_cross": separation_cross,
        }
        return StepOutput(loss, terms)

    def param_groups(self) -> ParamGroups:
        """CLIP and the heads at rates of their own; the proxies with an optimizer of their own."""
        return {"main": self.backbone_and_head("proxies"), "proxies": {"proxies": [self.proxies.vectors]}}


def table_threshold(bits: int, num_classes: int) -> float:
    """T = 1 - 2 d / K: the cosine of two codewords of K bits that differ in d of them.

    d is the largest known minimum distance of a binary linear code of length K and dimension ceil(log2 C), that is of a
    code with a codeword for every class.

    Args:
        bits: K.
        num_classes: C.

    Returns:
        T, in [0, 1) for C > 2.

    Raises:
        UserError: If the table has no entry.

    Source:
        DSPH, TCSVT 2024; equal to the table of the authors' code wherever this one has an entry.
    """
    dimension = (num_classes - 1).bit_length()
    distances = CODE_DISTANCES.get(bits, ())
    if not 1 <= dimension <= len(distances):
        raise UserError(
            f"model.threshold: the table of code distances has no entry for {bits} bits and {num_classes} classes; "
            f"give a cosine (0 pushes codes of other classes to a right angle), or model.bits out of "
            f"{', '.join(str(length) for length in CODE_DISTANCES)} with 2 to 1024 classes"
        )
    return 1 - 2 * distances[dimension - 1] / bits


def draw_proxies(num_classes: int, bits: int, seed: int) -> Tensor:
    """Start values of the proxies, normal with variance 2 / C, [C, K].

    The second draw after seeding: the authors' code fills the matrix twice. Independent of torch's global generator.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.randn(num_classes, bits, generator=generator)
    return torch.randn(num_classes, bits, generator=generator) * math.sqrt(2 / num_classes)


def apart_pairs(labels: Tensor) -> Tensor:
    """True for ordered pairs of rows that both have several labels and share none, [B, B] bool; labels are [B, C]."""
    several = labels.sum(-1) > 1
    return (label_similarity(labels, labels) == 0) & several[:, None] & several


def proxy_loss(cosines: Tensor, positive: Tensor, threshold: float) -> Tensor:
    """Pulls codes to the proxies of their labels, pushes them from the others as far as the threshold asks.

    Args:
        cosines: Of codes with proxies, [B, C].
        positive: True where the row has the label, [B, C] bool.
        threshold: T.

    Returns:
        Scalar: mean of `1 - cos` over all positive entries plus mean of `max(0, cos - T)` over all others.

    Source:
        DSPH, TCSVT 2024, proxy loss. Differs from the authors' code: a mean over nothing is 0.
    """
    return masked_mean(1 - cosines, positive) + masked_mean((cosines - threshold).clamp(min=0), ~positive)


def separation_loss(a: Tensor, b: Tensor, apart: Tensor, threshold: float) -> Tensor:
    """Pushes apart pairs of items that share no label.

    Args:
        a: Relaxed codes, [B, K].
        b: Relaxed codes, [B, K].
        apart: The pairs, [B, B] bool.
        threshold: T.

    Returns:
        Scalar: mean of `max(0, cos - T)` over the pairs; 0 if there are none.

    Source:
        DSPH, TCSVT 2024, irrelevant-pair loss.
    """
    return masked_mean((cosine_similarity(a, b) - threshold).clamp(min=0), apart)
