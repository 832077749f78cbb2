"""Methods on sets of vectors made from tokens: what they share beside equations."""

from abc import abstractmethod

from einops import rearrange
from pydantic import Field
from torch import Tensor

from common.losses import full_precision
from common.schemas import Section
from common.set_losses import SetMode, set_cosines, set_distance
from common.types import Batch, Progress, StepOutput
from models.base import ClipHashingModel
from utils.distributed import gather_rows


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
        for each in (cosines, rearrange(cosines, "N1 N2 M1 M2 -> N2 N1 M2 M1"))
    )
    return forth, back


class TokenSetModel(ClipHashingModel):
    """Makes a set of vectors from the tokens of every item; the loss compares the sets of the global batch."""

    fields = frozenset({"image", "text", "labels"})

    @abstractmethod
    def image_sets(self, image: Tensor) -> Tensor:
        """Pictures [B, 3, R, R] -> sets [B, M, W]."""

    @abstractmethod
    def text_sets(self, ids: Tensor) -> Tensor:
        """Token ids of texts [B, L] -> sets [B, M, W]."""

    @abstractmethod
    def binarise(self, sets: Tensor) -> Tensor:
        """Sets [B, M, W] -> codes in {-1, +1}, [B, K]."""

    @abstractmethod
    def objective(self, image: Tensor, text: Tensor, labels: Tensor) -> StepOutput:
        """The loss of one batch.

        Args:
            image: Sets of pictures, [B, M, W].
            text: Sets of texts, [B, M, W].
            labels: Multi-hot labels, [B, C].

        Returns:
            Loss and terms, unweighted.
        """

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One step's loss over the global batch."""
        image, text = gather_rows(self.image_sets(batch["image"])), gather_rows(self.text_sets(batch["text"]))
        with full_precision(image.device):
            return self.objective(image, text, gather_rows(batch["labels"]))

    def encode_image(self, batch: Batch) -> Tensor:
        """Codes of pictures, [B, K]."""
        return self.binarise(self.image_sets(batch["image"]))

    def encode_text(self, batch: Batch) -> Tensor:
        """Codes of texts, [B, K]."""
        return self.binarise(self.text_sets(batch["text"]))
