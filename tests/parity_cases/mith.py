"""MITH: the authors' code and the unified peer's."""

from torch import Tensor

from common.errors import UserError
from models.blocks.concept_head import ConceptCodes
from models.mith import MITH
from tests.parity_cases.base import MethodCase, Tree

CONCEPT_BUFFERS = {
    "img_cls": "banks.image_global.rows",
    "txt_cls": "banks.text_global.rows",
    "img_tokens": "banks.image_local.rows",
    "txt_tokens": "banks.text_local.rows",
}


def concept_outputs(name: str, codes: ConceptCodes, aligned: Tensor) -> dict[str, Tensor]:
    """What the references store of a modality, by the part of its name behind `out/`; `aligned` is [B, K, E]."""
    return {
        f"{name}_code": codes.global_hash + codes.local_hash,
        f"{name}_binary": codes.codes,
        f"{name}_cls_hash": codes.global_hash,
        f"{name}_tokens_hash": codes.local_hash,
        f"{name}_res_cls": codes.feature,
        f"{name}_trans_tokens": aligned.transpose(0, 1),
    }


class Case(MethodCase):
    """A case of MITH."""

    buffers = CONCEPT_BUFFERS

    def model_section(self) -> Tree:
        """Our settings."""
        s = self.settings
        if s.get("hash_func", "tanh") != "tanh":
            raise UserError(f"a head with hash_func {s['hash_func']!r} is not offered, only tanh")
        return {
            "top_k": s["top_k_label"],
            "transformer_layers": s["transformer_layers"],
            "res_mlp_layers": s["res_mlp_layers"],
            "activation": s["activation"],
            "dropout": self.cfg["dropout"],
            "target_share": s["hyper_lambda"],
            "temperature": 0.07,
            "local_likelihood_weight": s["hyper_tokens_intra"],
            "global_likelihood_weight": s["hyper_cls_inter"],
            "quantization_weight": s["hyper_quan"],
            "contrast_weight": s["hyper_info_nce"],
            "token_contrast_share": s["hyper_alpha"],
            "distillation_weight": s["hyper_distill"],
        }

    def terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors store weighted terms, the peer unweighted ones per modality."""
        s, t = self.settings, terms
        if self.unified:
            return {
                "LikeHood.intra_tokens.image": t["local_likelihood_image"],
                "LikeHood.intra_tokens.text": t["local_likelihood_text"],
                "LikeHood.cls_inter.image": t["global_likelihood_image"],
                "LikeHood.cls_inter.text": t["global_likelihood_text"],
                "Quantization.image": t["quantization_image"],
                "Quantization.text": t["quantization_text"],
                "InfoNCE.cls": t["contrast"],
                "InfoNCE.tokens": t["token_contrast"],
                "Distillation": s["hyper_distill"] * t["distillation"],
            }
        local = t["local_likelihood_image"] + t["local_likelihood_text"]
        crossed = t["global_likelihood_image"] + t["global_likelihood_text"]
        return {
            "tokens_intra_likelihood": s["hyper_tokens_intra"] * local,
            "cls_inter_likelihood": s["hyper_cls_inter"] * crossed,
            "quantization": s["hyper_quan"] * (t["quantization_image"] + t["quantization_text"]),
            "infoNCE": s["hyper_info_nce"] * (t["contrast"] + s["hyper_alpha"] * t["token_contrast"]),
            "distillation": s["hyper_distill"] * t["distillation"],
        }

    def outputs(self, model: MITH) -> dict[str, Tensor]:
        """Both hashes, their sum, its sign, and the features behind them."""
        image, text = model.hash_image(self.batch["image"]), model.hash_text(self.batch["text"])
        aligned_image, aligned_text = model.head.align(image.concepts, text.concepts)
        stored = concept_outputs("image", image, aligned_image) | concept_outputs("text", text, aligned_text)
        stored["image_binary"], stored["text_binary"] = model.encode_image(self.batch), model.encode_text(self.batch)
        return {f"out/{name}": value for name, value in stored.items()}
