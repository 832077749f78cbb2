"""DCMHT: the authors' code (select and linear heads) and the author's re-implementation in the unified library."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from common.errors import UserError
from models.blocks.heads import sign_codes
from tests.parity_cases.base import PooledCase, Tree


class Case(PooledCase):
    """A case of DCMHT."""

    code_bound = 3e-3

    def __init__(self, cfg: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__(cfg, arrays)
        self.linear = not self.unified and self.settings["hash_layer"] == "linear"
        if self.linear:  # the authors forget to binarise these
            self.arrays |= {f"out/{name}": sign_codes(x) for name, x in self.part("out/").items() if "_binary" in name}

    def model_section(self) -> Tree:
        """Our settings."""
        s = self.settings
        if not self.unified:
            return {
                "head": s["hash_layer"],
                "dropout": self.cfg["dropout"],
                "similarity": s["similarity_function"],
                "loss_type": s["loss_type"],
                "margin": s["vartheta"],
                "cosine_threshold": s["sim_threshold"] or 0.05,  # the reference takes 0 for 'not given'
                "quantization_weight": 1.0 if self.linear else 0.0,
            }
        if s["hash_func"] != "softmax":
            raise UserError(f"the unified head with hash_func {s['hash_func']!r} is not offered, only softmax")
        return {
            "head": "unified",
            "dropout": self.cfg["dropout"],
            "similarity": {"euclidean": "euclidean", "cosine": "clipped_cosine"}[s["similarity_function"]],
            "loss_type": "l2",  # the re-implementation never reads its own setting
            "margin": s["vartheta"],
            "cosine_threshold": s["threshold"],
            "quantization_weight": s["quan_alpha"],
        }

    def terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The references call the terms across modalities 'intra' and those within one 'inter'.

        The linear head has a quantisation beside the six: as it enters the total, and of each modality.
        """
        if self.unified:
            names = {
                "Intra.Positive": "cross_positive",
                "Intra.Negative": "cross_negative",
                "Inter.Positive.i2t": "image_positive",
                "Inter.Positive.t2i": "text_positive",
                "Inter.Negative.i2t": "image_negative",
                "Inter.Negative.t2i": "text_negative",
                "Quan.Image": "quantization_image",
                "Quan.Text": "quantization_text",
            }
        else:
            names = {
                "intra.positive": "cross_positive",
                "intra.negative": "cross_negative",
                "inter_image.positive": "image_positive",
                "inter_image.negative": "image_negative",
                "inter_text.positive": "text_positive",
                "inter_text.negative": "text_negative",
            }
        named = {name: terms[ours] for name, ours in names.items()}
        if self.linear:
            image, text = terms["quantization_image"], terms["quantization_text"]
            named |= {"quantization": (image + text) / 2, "quantization.image": image, "quantization.text": text}
        return named
