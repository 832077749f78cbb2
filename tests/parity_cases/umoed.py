"""UMoED: its author's code in the unified library."""

import re

from torch import Tensor

from common.errors import UserError
from models.umoed import UMoED
from tests.parity_cases.base import MethodCase, Tree
from tests.parity_cases.dimch import set_similarity


class Case(MethodCase):
    """A case of UMoED."""

    weight_bound = 2e-5

    def model_section(self) -> Tree:
        """Our settings."""
        s = self.settings
        for key, offered in (("hash_func", "linear_subspace"), ("merge_func", "concatenate"), ("triplet", True)):
            if s[key] != offered:
                raise UserError(f"{key} {s[key]!r} is not offered, only {offered!r}")
        mode = s["distance"]["mode"]
        pairwise = "agreement" if s["distance_mode"] == "cosine" else "euclidean"
        return {
            "set_size": s["setDim"],
            "width": s["hidden_dim"],
            "layers": s["decoder_layers"],
            "heads": s["decoder_heads"],
            "feed_forward_width": self.feed_forward_width(),
            "mixture": {"experts": s["num_experts"], "slots": s["slots_per_expert"], "init": "release"}
            if s["MoE"]
            else None,
            "dropout": self.cfg["dropout"],
            "separate_heads": False,
            "mask_padding": False,
            "distribution_temperature": s["extreme_T"] if s["extreme"] else None,
            "distance": pairwise if mode == "pairwise" else mode,
            "set_similarity": set_similarity(s["distance"]),
            "margin": s["chamfer"]["token_triplet_margin"],
            "triplet_weight": s["hash_pars"]["triplet_alpha"],
            "diversity_weight": s["chamfer"]["unif_alpha"],
        }

    def feed_forward_width(self) -> int:
        """Width that the recorded decoder has; the reference's configuration does not tell it."""
        expansions = (x for name, x in self.part("sd/").items() if re.search(r"\.linear1?\.weight$", name))
        return len(next(expansions))

    def terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms of its disabled fusion are 0; the sums are stored with their weights."""
        zero = terms["triplet_i2t"].new_zeros(())
        triplets = (terms["triplet_i2t"] + terms["triplet_t2i"]) / 4
        diversity = (terms["diversity_image"] + terms["diversity_text"]) / 3
        return {
            "Tokens.Similarity.i2t": terms["triplet_i2t"],
            "Tokens.Similarity.t2i": terms["triplet_t2i"],
            "Tokens.Similarity.it2i": zero,
            "Tokens.Similarity.it2t": zero,
            "Tokens.Similarity.All": self.settings["hash_pars"]["triplet_alpha"] * triplets,
            "Tokens.Diversity.i": terms["diversity_image"],
            "Tokens.Diversity.t": terms["diversity_text"],
            "Tokens.Diversity.it": zero,
            "Tokens.Diversity.All": self.settings["chamfer"]["unif_alpha"] * diversity,
        }

    def outputs(self, model: UMoED) -> dict[str, Tensor]:
        """Logits of the bit patterns and the bits of the most likely."""
        return {
            "out/image_code": model.image_sets(self.batch["image"]),
            "out/text_code": model.text_sets(self.batch["text"]),
            "out/image_binary": model.encode_image(self.batch),
            "out/text_binary": model.encode_text(self.batch),
        }
