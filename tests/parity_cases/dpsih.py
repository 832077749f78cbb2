"""DPSIH: the authors' code."""

from torch import Tensor

from models.dpsih import DPSIH
from tests.parity_cases.base import MethodCase, Tree


class Case(MethodCase):
    """A case of DPSIH."""

    def model_section(self) -> Tree:
        """Our settings."""
        s = self.settings
        return {
            "dropout": self.cfg["dropout"],
            "instances": s["num_embeds"],
            "residual_dropout": self.cfg["dropout"],
            "patch_norm": "twice",
            "mask_padding": False,
            "margin": s["margin"],
            "triplet_weight": s["msc_weight"],
            "discrepancy_weight": s["alpha1"],
            "discrepancy_gamma": s["rbf_gamma"],
            "diversity_weight": s["alpha2"],
            "auxiliary_reduction": s["reduction"],
        }

    def terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The reference stores the triplets of all three comparisons as one sum."""
        return {
            "msc_loss": terms["triplet_image"] + terms["triplet_text"] + terms["triplet_cross"],
            "dc_loss": terms["discrepancy"],
            "ed_loss": terms["diversity"],
        }

    def outputs(self, model: DPSIH) -> dict[str, Tensor]:
        """Instances, codes, and what the attentions weigh and find; one instance has no axis in the reference."""
        image, found_image = model.image_parts(self.batch["image"])
        text, found_text = model.text_parts(self.batch["text"])
        patches, words = (
            tokens
            for _, tokens in (model.image_tokens(self.batch["image"]), model.backbone.text_states(self.batch["text"]))
        )
        instances = {
            "out/image_code": model.image_instances(model.image_head(image), found_image),
            "out/text_code": model.text_instances(model.text_head(text), found_text),
            "out/image_residual": found_image,
            "out/text_residual": found_text,
        }
        return {
            **{name: values.squeeze(1) for name, values in instances.items()},
            "out/image_binary": model.encode_image(self.batch),
            "out/text_binary": model.encode_text(self.batch),
            "out/image_attention": model.image_instances.attention(patches),
            "out/text_attention": model.text_instances.attention(words),
        }
