"""DDWSH: the authors' code with its smallest repairs; the triplets that it drew are recorded."""

from typing import Any

import torch
from torch import Tensor

from tests.parity_cases.base import PooledCase, Tree

SIDES = ("image", "text", "cross")


class Case(PooledCase):
    """A case of DDWSH."""

    def model_section(self) -> Tree:
        """Our settings; boundaries start where the case's do."""
        s = self.settings
        return {
            "dropout": self.cfg["dropout"],
            "margin": s["margin"],
            "boundary_start": s["beta"],
            "sampling": "reference_rows",
            "lower_cutoff": s["lower_cutoff"],
            "upper_cutoff": None,
            "own_pair": False,
            "symmetric": False,
        }

    def optim_section(self) -> Tree:
        """One BertAdam of the reference is two of ours with the same settings."""
        settings = self.main_optimizer(
            {"backbone.": "backbone", "clip.": "backbone", "criterion.": "boundaries", "": "head"}
        )
        rates = settings.pop("lr")
        boundaries = {"boundaries": rates.pop("boundaries")}
        return {"main": {**settings, "lr": rates}, "boundaries": {**settings, "lr": boundaries}}

    def arrange(self, model: Any, step: int) -> None:
        """The recorded triplets of the step, in the order in which they are drawn."""
        recorded = iter([self.arrays[f"in/triplets/{side}"][step] for side in SIDES])
        model.draw_triplets = lambda *_: next(recorded)

    def terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same terms under the reference's names."""
        return dict(zip(SIDES, (terms["boundary_image"], terms["boundary_text"], terms["boundary_i2t"]), strict=True))

    def outputs(self, model: Any) -> dict[str, Tensor]:
        """Relaxed codes, codes, and how likely every negative is drawn by an anchor of a triplet."""
        outputs = super().outputs(model)
        image, text = (torch.nn.functional.normalize(outputs[f"out/{modality}_code"]) for modality in ("image", "text"))
        negative = self.batch["labels"] @ self.batch["labels"].T == 0
        for side, (a, b) in zip(SIDES, ((image, image), (text, text), (image, text)), strict=True):
            probabilities = model.negative_probabilities(torch.cdist(a, b), negative)
            anchors = self.arrays[f"in/triplets/{side}"][0, :, 0]
            outputs[f"miner/negative_probability/{side}"] = torch.zeros_like(probabilities).index_copy(
                0, anchors, probabilities[anchors]
            )
        return outputs
