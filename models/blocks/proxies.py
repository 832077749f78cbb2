"""Class proxies: one vector per class, with which methods compare the codes of both modalities."""

from torch import Tensor, nn

from common.errors import UserError
from common.similarity import cosine_similarity


class ClassProxies(nn.Module):
    """One vector per class, shared by image and text.

    They are used inside the training step, so that DistributedDataParallel synchronises their gradients.

    Args:
        vectors: Their start values, [C, K].
        trained: Whether they are trained; if not, they stay as they are, but the checkpoint holds them all the same.
    """

    def __init__(self, vectors: Tensor, trained: bool) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors, requires_grad=trained)

    def forward(self, codes: Tensor) -> Tensor:
        """Cosines of relaxed codes [B, K] with every proxy, [B, C]; lengths make no difference."""
        return cosine_similarity(codes, self.vectors)

    def positives(self, labels: Tensor) -> Tensor:
        """True where a row should be near a proxy.

        Args:
            labels: Multi-hot labels, [B, C], any dtype.

        Returns:
            [B, C] bool.

        Raises:
            UserError: If the rows have labels of other classes than those with a proxy.
        """
        require_classes(labels, self.vectors.shape[0])
        return labels > 0


def require_classes(labels: Tensor, num_classes: int) -> None:
    """Checks that labels are of as many classes as the model has something for: proxies, prototypes, boundaries.

    Args:
        labels: Multi-hot labels, [B, C], any dtype.
        num_classes: Of the model.

    Raises:
        UserError: If they are not.
    """
    if labels.shape[1] != num_classes:
        raise UserError(
            f"a batch has labels of {labels.shape[1]} classes, but the model was made for {num_classes}: a class that "
            "it does not know cannot be trained; train on the data set that the run began with, or begin a new run"
        )
