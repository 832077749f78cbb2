"""UCMFH: the authors' code, on features, with its codes of pairs that attend across the batch."""

from torch import Tensor

from models.ucmfh import UCMFH
from tests.parity_cases.base import ON_FEATURES, MethodCase, Tree


class Case(MethodCase):
    """A case of UCMFH."""

    recorded_as = ON_FEATURES
    code_bound = 1e-3  # rounding moves the authors' queries and keys; ours stay

    def model_section(self) -> Tree:
        """Our settings."""
        s = self.settings
        return {
            "input": "features",
            "backbone": "none",
            "cache_features": False,
            "layers": s["layers"],
            "heads": s["heads"],
            "feed_forward_width": s["feedforward"],
            "fusion_dropout": self.cfg["dropout"],
            "hidden_width": s["hidden"],
            "dropout": self.cfg["dropout"],
            "temperature": s["temperature"],
            "hash_weight": s["hash_weight"],
            "missing": "paired",
            "across_batch": True,
        }

    def optim_section(self) -> Tree:
        """The authors' three Adams; the perceptrons' rates change at numbers of steps."""
        sections = self.adam(
            {"fusion": {"FusionTransformer.": "fusion"}, "image": {"ImageMlp.": "head"}, "text": {"TextMlp.": "head"}}
        )
        recorded = self.cfg["optimizer"]
        for name in ("image", "text"):
            sections[name] |= {"milestones": recorded["milestones"], "milestone_factor": recorded["gamma"]}
        return sections

    def terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same terms; the reference's names are ours."""
        return terms

    def outputs(self, model: UCMFH) -> dict[str, Tensor]:
        """Relaxed codes and codes."""
        return {
            "out/image_code": model.image_head(model.fuse_batch(self.batch, "image")),
            "out/text_code": model.text_head(model.fuse_batch(self.batch, "text")),
            "out/image_binary": model.encode_image(self.batch),
            "out/text_binary": model.encode_text(self.batch),
        }
