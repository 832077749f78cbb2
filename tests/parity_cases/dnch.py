"""DNcH: the authors' loss and trainer, which come from two commits."""

from typing import Any

from torch import Tensor

from tests.parity_cases.base import PooledCase, Tree


class Case(PooledCase):
    """A case of DNcH."""

    def model_section(self) -> Tree:
        """Our settings."""
        s = self.settings
        return {
            "dropout": self.cfg["dropout"],
            "prototype_hidden": s["hidden"],
            "temperature": s["temperature"],
            "margin": s["margin"],
            "strict_mining": False,
            "delta": s["delta"],
            "classification_weight": s["cls_weight"],
        }

    def terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same terms under the reference's names."""
        return {
            "image": terms["contrast_image"],
            "text": terms["contrast_text"],
            "image_text": terms["contrast_i2t"],
            "text_image": terms["contrast_t2i"],
            "cls_image": terms["classification_image"],
            "cls_text": terms["classification_text"],
        }

    def outputs(self, model: Any) -> dict[str, Tensor]:
        """Relaxed codes, codes and prototypes."""
        return {**super().outputs(model), "out/prototypes": model.prototypes()}
