"""DIMCH: cross-modal hashing via diverse instances matching.

Paper: "Cross-modal Hashing via Diverse Instances Matching", IEEE Transactions on Image Processing 2025,
https://ieeexplore.ieee.org/document/10974482.
Authors' code: https://github.com/kalenforn/clip-based-cross-modal-hash, commit 6d64ae2, no licence stated; none of it
is used here.

All CLIP tokens of a picture or a text become a set of M member vectors. The sets of both modalities are matched
many-to-many by a smooth Chamfer similarity under a weighted triplet loss, drawn to one distribution (MMD), and kept
diverse. The code is the sign of tanh of a set's mean, which has a triplet and a quantisation loss of its own.

Deviations from the authors' code:
1. Tokens are batch first whatever their number; the release guesses the layout from sizes and gives wrong codes for
   batches of exactly 32 texts or 50 pictures.
2. A row without labels has no weight in the triplet loss; in the release it makes the whole loss NaN.
3. A code has no zeros: the sign of an exact 0 is +1. A batch of one row keeps its batch axis.
4. `hash_func: softmax`, which the release cannot evaluate, is not offered.
5. CLIP's weights are read as float32; the authors round the matrices of a float32 file to float16.
`model.diversity`: `batch` is what the release computes (pairs across samples too), with which its weights were tuned;
`sample` is the paper's formula.

Results reproduced: the golden case of the authors' code (tests/golden/DIMCH-*.npz).
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from common.registry import MODELS
from common.set_losses import DiversityScope, SetMode, diversity, maximum_mean_discrepancy, weighted_triplet
from common.similarity import cosine_similarity
from common.types import DataInfo, StepOutput
from models.base import ClipModelConfig
from models.blocks.dropout import RowDropout
from models.blocks.heads import init_fan_out, sign_codes
from models.blocks.token_sets import SetSimilarityConfig, TokenSetModel, set_distances


class DIMCHConfig(ClipModelConfig):
    """`model:` section of DIMCH."""

    set_size: int = Field(gt=0)  # M, members of a set
    dropout: float = Field(ge=0, lt=1)  # in the heads
    distance: SetMode  # of sets; paper: smooth_chamfer
    set_similarity: SetSimilarityConfig
    diversity: DiversityScope  # pairs of the whole batch (release) | pairs within a set (paper)
    set_margin: float = Field(gt=0)  # mu_t, of the triplets of sets
    code_margin: float = Field(gt=0)  # mu_h, of the triplets of codes
    set_triplet_weight: float = Field(ge=0)  # a_t
    discrepancy_weight: float = Field(ge=0)  # a_m, MMD between all members of both modalities
    discrepancy_gamma: float = Field(gt=0)  # gamma of its kernel
    diversity_weight: float = Field(ge=0)  # a_u
    code_triplet_weight: float = Field(ge=0)  # a_h
    quantization_weight: float = Field(ge=0)  # a_q


class TokenSetHead(nn.Module):
    """Tokens of one modality -> a set of M vectors: a convolution with the tokens as channels, then a small MLP.

    Args:
        tokens: Number of tokens L; every input has as many.
        width: Width E of the tokens.
        set_size: M.
        bits: K.
        dropout: Probability in [0, 1), between the MLP's layers.
    """

    def __init__(self, tokens: int, width: int, set_size: int, bits: int, dropout: float) -> None:
        super().__init__()
        self.mix = nn.Conv1d(tokens, set_size, 3, padding=1)  # slides over the feature axis
        self.hidden = init_fan_out(nn.Linear(width, width // 2))
        self.dropout = RowDropout(dropout)
        self.out = init_fan_out(nn.Linear(width // 2, bits))
        nn.init.kaiming_normal_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)  # type: ignore[arg-type]  # it has a bias

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L, E] -> sets [B, M, K], unbounded."""
        mixed = F.relu(self.mix(tokens))  # [B, M, E]
        sets: Tensor = self.out(self.dropout(F.relu(self.hidden(mixed))))
        return sets


@MODELS.register("DIMCH")
class DIMCH(TokenSetModel):
    """Sets of instances from all CLIP tokens, matched many-to-many.

    Args:
        config: `model:` section.
        data: What is known of the training data.
    """

    Config = DIMCHConfig
    reference_names = (
        (r"^(clip|backbone)\.", "backbone."),
        (r"^hash\.img_token_hash\.", "image_head."),
        (r"^hash\.txt_token_hash\.", "text_head."),
        (r"^(image|text)_head\.token_layer\.", r"\1_head.mix."),
        (r"^(image|text)_head\.hash_layer\.0\.", r"\1_head.hidden."),
        (r"^(image|text)_head\.hash_layer\.3\.", r"\1_head.out."),
        (r"^distance\..*", ""),  # constants that a run without GPU stores
    )

    def __init__(self, config: DIMCHConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.config = config
        shape = data.clip.shape
        sizes = (shape.embed_dim, config.set_size, config.bits, config.dropout)
        self.image_head = TokenSetHead(1 + shape.patches, *sizes)
        self.text_head = TokenSetHead(data.field_shapes["text"][0], *sizes)

    def image_sets(self, image: Tensor) -> Tensor:
        """Sets of pictures [B, 3, R, R], from the class token and all patches: [B, M, K]."""
        sets: Tensor = self.image_head(self.backbone.image_tokens(image)).float()
        return sets

    def text_sets(self, ids: Tensor) -> Tensor:
        """Sets of texts [B, L], from all positions, padding included: [B, M, K]."""
        sets: Tensor = self.text_head(self.backbone.text_tokens(ids)[1]).float()
        return sets

    def objective(self, image_sets: Tensor, text_sets: Tensor, labels: Tensor) -> StepOutput:
        """The loss of the paper from the sets of all rows, [B, M, K], as `TokenSetModel.objective`."""
        c = self.config
        image, text = relaxed_codes(image_sets), relaxed_codes(text_sets)
        image_sets, text_sets = F.normalize(image_sets, dim=-1), F.normalize(text_sets, dim=-1)
        i2t_distances, t2i_distances = set_distances(image_sets, text_sets, c.distance, c.set_similarity)
        code_distances = (1 - cosine_similarity(image, text)).clamp(min=0)
        discrepancy = maximum_mean_discrepancy(
            image_sets.flatten(0, 1), text_sets.flatten(0, 1), c.discrepancy_gamma, exact=False
        )
        terms = {
            "set_triplet_i2t": weighted_triplet(i2t_distances, labels, c.set_margin),
            "set_triplet_t2i": weighted_triplet(t2i_distances, labels, c.set_margin),
            "discrepancy": discrepancy,
            "diversity_image": diversity(image_sets, c.diversity),
            "diversity_text": diversity(text_sets, c.diversity),
            "code_triplet_i2t": weighted_triplet(code_distances, labels, c.code_margin),
            "code_triplet_t2i": weighted_triplet(code_distances.T, labels, c.code_margin),
            "quantization_image": sign_quantization(image),
            "quantization_text": sign_quantization(text),
        }
        loss = (
            c.set_triplet_weight * (terms["set_triplet_i2t"] + terms["set_triplet_t2i"]) / 2
            + c.discrepancy_weight * discrepancy
            + c.diversity_weight * (terms["diversity_image"] + terms["diversity_text"])
            + c.code_triplet_weight * (terms["code_triplet_i2t"] + terms["code_triplet_t2i"]) / 2
            + c.quantization_weight * (terms["quantization_image"] + terms["quantization_text"]) / 2
        )
        return StepOutput(loss, terms)

    def binarise(self, sets: Tensor) -> Tensor:
        """Sets [B, M, K] -> codes [B, K]."""
        return sign_codes(relaxed_codes(sets))


def relaxed_codes(sets: Tensor) -> Tensor:
    """Relaxed codes of sets: tanh of the mean member, [B, M, K] -> [B, K] in (-1, 1)."""
    return sets.mean(1).tanh()


def sign_quantization(relaxed: Tensor) -> Tensor:
    """How far relaxed codes are from their signs: mean squared difference.

    Args:
        relaxed: Codes, [B, K] in (-1, 1).

    Returns:
        Scalar; no gradient flows through the sign.

    Source:
        DIMCH, TIP 2025, quantisation.
    """
    return (relaxed - relaxed.sign()).square().mean()
