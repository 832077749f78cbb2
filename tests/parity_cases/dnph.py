"""DNPH: the authors' code and the unified peer's, which trains the proxies and classifies into 80 whatever the data."""

from typing import Any

from torch import Tensor

from common.errors import UserError
from models.dnph import DNPH
from tests.parity_cases.base import PooledCase, Tree


class Case(PooledCase):
    """A case of DNPH."""

    def model_section(self) -> Tree:
        """Our settings; where the case names none, what the reference's code falls back to."""
        s = self.settings
        if s.get("hash_func", "tanh") != "tanh":
            raise UserError(f"a head with hash_func {s['hash_func']!r} is not offered, only tanh")
        classifier = next(value for name, value in self.part("sd/").items() if name.endswith("image_pre.fc.bias"))
        return {
            "initialization": "fan_out" if self.unified else "torch",
            "dropout": self.cfg["dropout"],
            "classifier_outputs": len(classifier),
            "train_proxies": self.trains_proxies(),
            "margin": s.get("mrg", 1.0),
            "uniformity_weight": s.get("noise_alpha", 1.0 if self.unified else 0.1),
        }

    def loose_terms(self) -> frozenset[str]:
        """The authors' code was asked for its sums, not for these two."""
        return frozenset() if self.unified else frozenset({"proxy", "noise"})

    def trains_proxies(self) -> bool:
        """Whether the reference steps the optimizer of the proxies."""
        return self.cfg["optimizer"].get("loss") is not None

    def optim_section(self) -> Tree:
        """BertAdam for all but the proxies, which have a plain SGD or none."""
        if not self.trains_proxies():
            return super().optim_section()
        proxies = {
            "type": "SGD",
            "lr": {"proxies": self.cfg["optimizer"]["loss"]["lr"]},
            "momentum": 0.0,
            "weight_decay": 0.0,
            "nesterov": False,
            "schedule": "constant",
        }
        return super().optim_section() | {"proxies": proxies}

    def arrange(self, model: Any, step: int) -> None:
        """The recorded draw of the step; and the gradient of fixed proxies, which the reference computes for nobody."""
        model.draw_targets = lambda rows: self.arrays["in/noise"][step]
        model.proxies.vectors.requires_grad_()

    def terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' uniformity is one sum, the peer's is one term for each modality."""
        image, text = terms["uniformity_image"], terms["uniformity_text"]
        return {
            "proxy": terms["proxy"],
            "cls_image": terms["classification_image"],
            "cls_text": terms["classification_text"],
            **({"Noise.image": image, "Noise.text": text} if self.unified else {"noise": image + text}),
        }

    def outputs(self, model: DNPH) -> dict[str, Tensor]:
        """Relaxed codes, codes and class scores."""
        image, text = (
            model.backbone.image_features(self.batch["image"]),
            model.backbone.text_features(self.batch["text"]),
        )
        return {
            **super().outputs(model),
            "out/image_pre": model.image_classifier(image),
            "out/text_pre": model.text_classifier(text),
        }
