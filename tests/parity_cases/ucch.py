"""UCCH: the authors' code, on features."""

from typing import Any

from torch import Tensor

from models.ucch import UCCH, unit_vectors
from tests.parity_cases.base import ON_FEATURES, MethodCase, Tree


class Case(MethodCase):
    """A case of UCCH."""

    recorded_as = ON_FEATURES
    buffers = {"memory": "memory.rows"}

    def model_section(self) -> Tree:
        """Our settings."""
        s = self.settings
        middle = [s["mid_num1"], s["mid_num2"]]
        return {
            "input": "features",
            "backbone": "none",
            "cache_features": False,
            "image_hidden": hidden(s["image_layers"], middle),
            "text_hidden": hidden(s["text_layers"], middle),
            "memory_init": "reference",
            "memory_momentum": s["momentum"],
            "warmup_epochs": s["warmup_epoch"],
            "negatives": s["K"],
            "temperature": s["T"],
            "contrast_share": s["alpha"],
            "margin": s["margin"],
            "shift": s["shift"],
        }

    def optim_section(self) -> Tree:
        """The authors' Adam over both networks."""
        return self.adam({"main": {"image_model.": "image", "text_model.": "text"}})

    def arrange(self, model: Any, step: int) -> None:
        """The recorded memory, and the recorded draws of every step."""
        super().arrange(model, step)
        if "in/negatives" in self.arrays:
            model.draw = lambda index: model.count(self.arrays["in/negatives"][step])

    def terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same terms under the reference's names."""
        return {
            "Lc.image": terms["contrast_image"],
            "Lc.text": terms["contrast_text"],
            "Lr": terms["ranking"],
        }

    def outputs(self, model: UCCH) -> dict[str, Tensor]:
        """Unit vectors and codes."""
        return {
            "out/image_code": unit_vectors(model.image_net(self.batch["image_feature"])),
            "out/text_code": unit_vectors(model.text_net(self.batch["text_feature"])),
            "out/image_binary": model.encode_image(self.batch),
            "out/text_binary": model.encode_text(self.batch),
        }


def hidden(layers: int, middle: list[int]) -> list[int]:
    """Widths of the hidden layers of a perceptron of 1 to many linear maps; after the second the width stays."""
    return [middle[min(place, 1)] for place in range(layers - 1)]
