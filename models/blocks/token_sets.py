"""What methods on sets of vectors made from tokens share beside equations: settings of the similarity, directions."""

from pydantic import Field
from torch import Tensor

from common.config import Section
from common.set_losses import SetMode, set_cosines, set_distance


class SetSimilarityConfig(Section):
    """Settings of the similarity of two sets; only the Chamfer similarities read them."""

    temperature: float = Field(gt=0)  # t, of smooth_chamfer
    scale: float = Field(gt=0)  # sigma, of the first set's temperature in smooth_chamfer
    denominator: float = Field(gt=0)  # of both Chamfer similarities; 2 averages the two directions


def set_distances(image: Tensor, text: Tensor, mode: SetMode, config: SetSimilarityConfig) -> tuple[Tensor, Tensor]:
    """Distances of all pairs of sets, each modality once as the anchors.

    Args:
        image: Sets of pictures, [N, M, W].
        text: Sets of texts, [N, M, W].
        mode: Which similarity.
        config: Its settings.

    Returns:
        Picture to text, [N, N], and text to picture, [N, N]: each other's transpose where `scale` is 1.
    """
    cosines = set_cosines(image, text)  # [N, N, M, M]
    forth, back = (
        set_distance(each, mode, config.temperature, config.scale, config.denominator)
        for each in (cosines, cosines.permute(1, 0, 3, 2))
    )
    return forth, back
