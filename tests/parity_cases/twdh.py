"""TwDH: its authors' code in the unified library. The recorded centres and transforms are read as a user's files."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from models.base import HashingModel
from models.blocks.center_files import write_centers
from models.blocks.hash_centers import HashCenters
from models.twdh import TwDH
from tests.parity_cases.base import MethodCase, Tree


class Case(MethodCase):
    """A case of TwDH."""

    def build(self) -> HashingModel:
        """Our model, with the recorded centres and transforms in a file."""
        centers, transforms = (
            {int(bits): value for bits, value in self.part(f"in/{kind}/").items()} for kind in ("short_center", "trans")
        )
        long = self.arrays["in/long_center"]
        with tempfile.TemporaryDirectory() as folder:
            self.center_folder = folder
            write_centers(Path(folder) / f"{long.shape[1]}.safetensors", HashCenters(long, centers, transforms), {})
            return super().build()

    def short_bits(self) -> list[int]:
        """Lengths of the recorded short codes, ascending."""
        return sorted(int(bits) for bits in self.part("in/short_center/"))

    def bits(self) -> int:
        """The case's length if there are short codes of it, else the shortest."""
        lengths, bits = self.short_bits(), int(self.cfg["bits"])
        return lengths[0] if lengths and bits not in lengths else bits

    def model_section(self) -> Tree:
        """Our settings."""
        s = self.settings
        if s["hash_func"] != "softmax":
            raise UserError(f"hash_func {s['hash_func']!r} is not offered, only softmax")
        if not self.short_bits():
            raise UserError("the case has no short codes; a model without them is not offered")
        optimizer = {**self.optim_section()["main"], "lr": {"transform": 1e-3}}  # trains nothing here
        return {
            "long_bits": s["long_dim"],
            "short_bits": self.short_bits(),
            "centers": "file",
            "center_seed": 0,
            "short_fallback": "balanced",
            "transform": "file",
            "transform_training": {"epochs": 1, "batch_size": 1, "sparsity_weight": 0.0, "optimizer": optimizer},
            "center_folder": self.center_folder,
            "unlabelled": "minus_one",
            "quantization_weight": s["quan_alpha"],
            "low_rate": s["low_rate"],
        }

    def arrange(self, model: Any, step: int) -> None:
        """The recorded bits of ties, the same at every step."""
        lengths = {bits: str(bits) for bits in self.short_bits()} | {self.settings["long_dim"]: "long"}
        model.draw_ties = lambda bits: self.arrays[f"in/random_center/{lengths[bits]}"]

    def terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Everything without its weight; of short codes the means over both modalities."""
        named = {
            "Long.NCE.image": terms["center_image"],
            "Long.NCE.text": terms["center_text"],
            "Long.Quan.image": terms["quantization_image"],
            "Long.Quan.text": terms["quantization_text"],
        }
        for bits in self.short_bits():
            named |= {f"Short.{bits}.NCE": terms[f"center_{bits}"], f"Short.{bits}.Quan": terms[f"quantization_{bits}"]}
        return named

    def outputs(self, model: TwDH) -> dict[str, Tensor]:
        """Soft-max pairs and codes of all lengths."""
        encoded = {"image": model.encode_image(self.batch), "text": model.encode_text(self.batch)}
        pairs = {
            "image": model.image_head(model.backbone.image_features(self.batch["image"])),
            "text": model.text_head(model.backbone.text_features(self.batch["text"])),
        }
        found: dict[str, Tensor] = {}
        for kind, codes in encoded.items():
            for bits, code in zip(model.code_lengths, torch.split(codes, list(model.code_lengths), dim=1), strict=True):
                is_long = bits == model.code_lengths[-1]
                place = "out" if is_long else f"out/short/{bits}"
                found[f"{place}/{kind}_code"] = pairs[kind] if is_long else model.shorten(pairs[kind], bits)
                found[f"{place}/{kind}_binary"] = code
        return found
