"""VTPH: the authors' code."""

from torch import Tensor

from common.types import Batch
from models.blocks.concept_head import ConceptCodes
from models.vtph import VTPH
from tests.parity_cases.base import MethodCase, Tree
from tests.parity_cases.mith import CONCEPT_BUFFERS, concept_outputs


class Case(MethodCase):
    """A case of VTPH."""

    buffers = CONCEPT_BUFFERS
    code_bound = 3e-3

    def model_section(self) -> Tree:
        """Our settings."""
        s = self.settings
        return {
            "cache_features": False,
            "top_k": s["top_k_label"],
            "transformer_layers": s["transformer_layers"],
            "res_mlp_layers": s["res_mlp_layers"],
            "activation": s["activation"],
            "dropout": float(self.cfg["dropout"]),
            "target_share": s["hyper_lambda"],
            "prompt_layers": s["vtp_layers"],
            "prompt_heads": s["vtp_heads"],
            "prompt_dropout": float(self.cfg["dropout"]),
            "mask_padding": False,
            "affinity": "jeffreys",
            "affinity_scale": s["hyper_gamma"],
            "temperature": 0.07,
            "margin": 1.0,
            "local_likelihood_weight": 1,
            "global_likelihood_weight": s["hyper_alpha"],
            "quantization_weight": s["hyper_beta"],
            "contrast_weight": s["hyper_zeta"],
            "distillation_weight": 1,
            "triplet_weight": 1,
        }

    def optim_section(self) -> Tree:
        """Prompts and head; CLIP is frozen."""
        return {"main": self.main_optimizer({"vtp.": "prompts", "hash.": "head"})}

    def make_batch(self) -> Batch:
        """With the captions of the pictures; pictures and captions are the counterparts, too."""
        image, caption = self.arrays["in/image"], self.arrays["in/caption"]
        further = {"image_caption": caption, "counterpart_image": image, "counterpart_caption": caption}
        return Batch({**super().make_batch(), **further})

    def terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors store weighted terms."""
        s, t = self.settings, terms
        crossed = t["global_likelihood_image"] + t["global_likelihood_text"]
        return {
            "tokens_intra_likelihood": t["local_likelihood_image"] + t["local_likelihood_text"],
            "cls_inter_likelihood": s["hyper_alpha"] * crossed,
            "quantization": s["hyper_beta"] * (t["quantization_image"] + t["quantization_text"]),
            "infoNCE": s["hyper_zeta"] * t["contrast"],
            "distillation": t["distillation"],
            "triplet": t["triplet"],
        }

    def outputs(self, model: VTPH) -> dict[str, Tensor]:
        """Both hashes of both paths: texts with their counterpart (`out`), and each modality alone (`out_query`)."""
        tokens = model.backbone.image_tokens(self.batch["image"])
        text, caption = model.read_text(self.batch["text"]), model.read_text(self.batch["image_caption"])
        adapted = model.prompts.adapt(text.pooled)
        image = model.hash_image(tokens)
        with_counterpart = model.hash_text(text, adapted, (tokens[:, 0], caption))
        alone = model.hash_text(text, adapted, None)
        without = self.batch.only(frozenset({"image", "text"}))
        stored = self._stored("out", model, image, with_counterpart, self.batch)
        return stored | self._stored("out_query", model, image, alone, without)

    def _stored(
        self, prefix: str, model: VTPH, image: ConceptCodes, text: ConceptCodes, batch: Batch
    ) -> dict[str, Tensor]:
        """What may be stored of one path; the binary codes as users get them."""
        aligned_image, aligned_text = model.head.align(image.concepts, text.concepts)
        stored = concept_outputs("image", image, aligned_image) | concept_outputs("text", text, aligned_text)
        stored["image_binary"], stored["text_binary"] = model.encode_image(batch), model.encode_text(batch)
        return {f"{prefix}/{name}": value for name, value in stored.items()}
