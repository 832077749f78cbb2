"""DNpH: deep neighborhood-preserving hashing. Not DNPH (TOMM 2024), another method whose name differs in case only.

Some file systems do not see case, so this file, its configs (`configs/DNpH-pairwise/`) and the folders of its runs have
a name of their own; in a YAML the method is `DNpH`, as in its paper.

Paper: Q. Qin, Y. Huo, L. Huang, J. Dai, H. Zhang, W. Zhang, "Deep Neighborhood-Preserving Hashing With Quadratic
Spherical Mutual Information for Cross-Modal Retrieval", IEEE Transactions on Multimedia 2024,
https://doi.org/10.1109/TMM.2023.3349075.
Authors' code: https://github.com/QinLab-WFU/CLIP-based-Cross-Modal-Hashing, commit 8040b44, no licence stated; none of
it is used here.

One linear tanh head per modality on CLIP's pooled feature. The cosines of all pairs of a batch, within and across
modalities, should carry as much information as possible about which pairs share a label: similar pairs are drawn
together, all pairs are kept apart in proportion to how many pairs are similar.

Deviations from the authors' code:
1. The share of similar pairs is used as it is; the release divides by its inverse, which is infinite for a batch in
   which no pair is similar.
2. A relaxed code of zeros has a finite gradient; in the release it has none.
3. A code has no zeros: the sign of an exact 0 is +1.
4. CLIP's weights are read as float32; the authors round the matrices of a float32 file to float16.

The loss is a sum over the B^2 pairs of a batch, not a mean, as in the release.

Results reproduced: the golden case of the authors' code (tests/golden/DNpH-*.npz).
"""

from torch import Tensor

from common.registry import MODELS
from common.similarity import cosine_similarity, label_similarity
from common.types import DataInfo, StepOutput
from models.blocks.pooled import TanhHashingConfig, TanhHashingModel


class DNpHConfig(TanhHashingConfig):
    """`model:` section of DNpH: the loss has no settings."""


@MODELS.register("DNpH", folder="DNpH-pairwise")
class DNpH(TanhHashingModel):
    """Hashing by quadratic spherical mutual information, on CLIP's pooled features.

    Args:
        config: `model:` section.
        data: What is known of the training data.
    """

    Config = DNpHConfig

    def __init__(self, config: DNpHConfig, data: DataInfo) -> None:
        super().__init__(config, data, "fan_out")

    def objective(self, image: Tensor, text: Tensor, labels: Tensor) -> StepOutput:
        """The loss of relaxed codes, [B, K], as `PooledHashingModel.objective`."""
        similar = label_similarity(labels, labels)
        information_image = spherical_information(image, image, similar)
        information_text = spherical_information(text, text, similar)
        information_cross = spherical_information(image, text, similar)
        loss = information_image + information_text + information_cross
        terms = {
            "information_image": information_image,
            "information_text": information_text,
            "information_cross": information_cross,
        }
        return StepOutput(loss, terms)


def spherical_information(a: Tensor, b: Tensor, similar: Tensor) -> Tensor:
    """Quadratic mutual information of cosines and label similarities, as a loss: the lower, the more they share.

    With S = (cos + 1) / 2, R the label similarity and 1 / M the share of similar pairs, the sum over all pairs of
    `(R S - 1)^2 + S^2 / M`. A pair that shares no label adds a constant 1 to the first part.

    Args:
        a: Relaxed codes, [B, K].
        b: Relaxed codes, [B, K].
        similar: R, 1 where two items share a label, else 0, [B, B].

    Returns:
        Scalar.

    Source:
        DNpH, TMM 2024, quadratic spherical mutual information with square clamping.
    """
    closeness = (cosine_similarity(a, b) + 1) / 2
    return ((similar * closeness - 1).square() + closeness.square() * similar.mean()).sum()
