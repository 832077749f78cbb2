"""DIMCH: its author's code in the unified library."""

from torch import Tensor

from common.errors import UserError
from models.dimch import DIMCH, relaxed_codes
from tests.parity_cases.base import MethodCase, Tree


def set_similarity(distance: Tree) -> Tree:
    """Our settings of the similarity of sets, from the reference's."""
    return {
        "temperature": distance["temperature"],
        "scale": distance["temperature_txt_scale"],
        "denominator": distance["denominator"],
    }


class Case(MethodCase):
    """A case of DIMCH."""

    code_bound = 3e-3

    def model_section(self) -> Tree:
        """Our settings."""
        s = self.settings
        if s["hash_func"] != "tanh":
            raise UserError(f"hash_func {s['hash_func']!r} is not offered, only tanh")
        chamfer, codes = s["chamfer"], s["hash_pars"]
        return {
            "set_size": s["setDim"],
            "dropout": self.cfg["dropout"],
            "distance": s["distance"]["mode"],
            "set_similarity": set_similarity(s["distance"]),
            "diversity": "batch",
            "set_margin": chamfer["token_triplet_margin"],
            "code_margin": codes["triplet_margin"],
            "set_triplet_weight": codes["triplet_alpha"],
            "discrepancy_weight": chamfer["mmd_alpha"],
            "discrepancy_gamma": chamfer["mmd_gamma"],
            "diversity_weight": chamfer["unif_alpha"],
            "code_triplet_weight": codes["hash_triplet_alpha"],
            "quantization_weight": codes["quan_alpha"],
        }

    def terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The reference stores the diversity of both modalities as one sum."""
        return {
            "Tokens.Similarity.i2t": terms["set_triplet_i2t"],
            "Tokens.Similarity.t2i": terms["set_triplet_t2i"],
            "Tokens.Maximum_Mean_Discrepancy": terms["discrepancy"],
            "Tokens.Diversity": terms["diversity_image"] + terms["diversity_text"],
            "Hash.Triplet.i2t": terms["code_triplet_i2t"],
            "Hash.Triplet.t2i": terms["code_triplet_t2i"],
            "Hash.Quantization.image": terms["quantization_image"],
            "Hash.Quantization.text": terms["quantization_text"],
        }

    def outputs(self, model: DIMCH) -> dict[str, Tensor]:
        """Sets, relaxed codes and their signs."""
        image, text = model.image_sets(self.batch["image"]), model.text_sets(self.batch["text"])
        return {
            "out/image_code": relaxed_codes(image),
            "out/text_code": relaxed_codes(text),
            "out/image_binary": model.encode_image(self.batch),
            "out/text_binary": model.encode_text(self.batch),
            "out/image_token_embeds": image,
            "out/text_token_embeds": text,
        }
