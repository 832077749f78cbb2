"""DPBE: the collection's code, with CLIP's features handed to the step, and recorded draws."""

from typing import Any

import torch
from torch import Tensor

from models.blocks.posterior import outputs_of, to_sphere
from models.dpbe import DPBE
from tests.parity_cases.base import MethodCase, Tree


class Case(MethodCase):
    """A case of DPBE."""

    buffers = {"hessian_i": "image_head.hessian", "hessian_t": "text_head.hessian"}

    def model_section(self) -> Tree:
        """Our settings."""
        s = self.settings
        return {
            "probabilistic": s["use_lam"],
            "dropout": self.cfg["dropout"],
            "train_samples": s["train_n_samples"],
            "average_samples": False,
            "eval_samples": s["valid_n_samples"],
            "eval_seed": 0,
            "hessian": "mse" if s["loss"] == "acm" else "contrastive",
            "hessian_memory": s["hessian_memory_factor"],
            "max_pairs": s["max_pairs"],
            "strict_triplets": False,
        }

    def arrange(self, model: Any, step: int) -> None:
        """The recorded draws, also for encoding."""
        super().arrange(model, step)
        noise = self.arrays["in/noise_image"][step], self.arrays["in/noise_text"][step]
        model.draw = lambda: noise
        heads = (model.image_head, model.text_head)
        for head, draws in zip(heads, noise, strict=True):
            head.noise = draws
        with torch.no_grad():  # what was drawn before a step also makes the mean codes after it
            self.drawn = [head.drawn(draws) for head, draws in zip(heads, noise, strict=True)]

    def terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same terms under the reference's names."""
        return {name: terms[name] for name in ("image", "text", "cross")}

    def outputs(self, model: DPBE) -> dict[str, Tensor]:
        """Points of the mean heads, means over drawn heads, codes."""
        found: dict[str, Tensor] = {}
        for name, head, drawn in zip(("image", "text"), (model.image_head, model.text_head), self.drawn, strict=True):
            tower = getattr(model.backbone, f"{name}_features")
            features = tower(self.batch[name])
            found[f"out/{name}_code"] = to_sphere(head.fc(features))
            found[f"out/{name}_sample_code"] = to_sphere(outputs_of(features, *drawn)).mean(0)
            found[f"out/{name}_binary"] = getattr(model, f"encode_{name}")(self.batch)
        return found
