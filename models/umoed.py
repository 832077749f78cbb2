"""UMoED: unified generative hashing with a decoder of soft mixtures of experts.

Paper: "A Unified Generative Hashing for Cross-Modal Retrieval", ACM TOMM 2025, https://doi.org/10.1145/3744567.
Authors' code: https://github.com/kalenforn/clip-based-cross-modal-hash, commit 6d64ae2, no licence stated; none of it
is used here.

A code is generated like a text: M learned queries attend to the CLIP tokens of a picture or a text, and each chooses
one of the W = 2^(K/M) patterns of its K/M bits. One decoder serves both modalities. A weighted triplet loss compares
the distributions of pictures and texts position by position; a diversity term keeps the positions apart.

Deviations from the authors' code:
1. Tokens are batch first whatever their number; the release guesses the layout from sizes and gives wrong codes for
   batches of exactly 32 texts or 50 pictures.
2. A row without labels has no weight in the triplet loss; in the release it makes the whole loss NaN.
3. `fusion: false`, by which the release builds a second head that it never uses, is imported as the one head it uses;
   `model.separate_heads: true` gives each modality a head that is used.
4. `model.width` may differ from CLIP's with a mixture of experts too; M x K/M may be any division of K into up to 16
   bits a query. `triplet: false`, which fails in the release, is not offered.
5. CLIP's weights are read as float32; the authors round the matrices of a float32 file to float16.
`model.mixture.init: release` starts the experts about 22 times smaller than a linear map of their size, since the
release takes the bound from the shape of the stacked weights; `per_expert` takes each expert's own. All layers start
with the same weights, as the release's do. `model.mask_padding: true` hides text tokens behind the end of the text.

Results reproduced: the golden case of the authors' code (tests/golden/UMoED-*.npz).
"""

import copy
import math
from typing import Literal, cast

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from common.errors import UserError
from common.registry import MODELS
from common.schemas import Section
from common.set_losses import diversity, weighted_triplet
from common.types import DataInfo, StepOutput
from models.base import ClipModelConfig
from models.blocks.dropout import RowDropout
from models.blocks.token_sets import SetSimilarityConfig, TokenSetModel, set_distances

MAX_PATTERN_BITS = 16  # of one query: 65,536 patterns


class MixtureConfig(Section):
    """A soft mixture of experts."""

    experts: int = Field(gt=0)  # n
    slots: int = Field(gt=0)  # p, of every expert
    init: Literal["release", "per_expert"]  # bound of the experts' first weights, see the file's header


class UMoEDConfig(ClipModelConfig):
    """`model:` section of UMoED."""

    set_size: int | None = Field(gt=0)  # M, queries; divides bits. null: one query per bit
    width: int | None = Field(gt=0)  # of the decoder, a multiple of heads; null: CLIP's embedding width
    layers: int = Field(gt=0)  # decoder layers
    heads: int = Field(gt=0)  # attention heads
    feed_forward_width: int = Field(gt=0)
    mixture: MixtureConfig | None  # second map of every feed-forward part; null: an ordinary linear map
    dropout: float = Field(ge=0, lt=1)  # attention weights and the outputs of every part of a layer
    separate_heads: bool  # a decoder for each modality instead of one for both
    mask_padding: bool  # queries do not see text tokens behind the end of the text
    distribution_temperature: float | None = Field(gt=0)  # T_e, of the distributions; null: unit logits in their place
    # of distributions by position (agreement: paper; euclidean), or of sets
    distance: Literal["agreement", "euclidean", "smooth_chamfer", "chamfer", "max", "avg"]
    set_similarity: SetSimilarityConfig  # of distances of sets
    margin: float = Field(gt=0)  # mu
    triplet_weight: float = Field(ge=0)  # a_t
    diversity_weight: float = Field(ge=0)  # a_u

    @field_validator("set_size")
    @classmethod
    def _queries_share_the_bits(cls, set_size: int | None, info: ValidationInfo) -> int | None:
        if set_size is None or "bits" not in info.data:
            return set_size
        bits = info.data["bits"]
        if bits % set_size:
            raise ValueError(f"must divide model.bits, which is {bits}: every query makes an equal share of the bits")
        if bits // set_size > MAX_PATTERN_BITS:
            raise ValueError(
                f"must be at least {-(-bits // MAX_PATTERN_BITS)}: with model.bits={bits} a query would choose one of "
                f"2^{bits // set_size} patterns"
            )
        return set_size

    @property
    def queries(self) -> int:
        """M."""
        return self.set_size or self.bits


class SoftMixture(nn.Module):
    """Soft mixture of linear experts: every slot takes an average of the positions, every position one of the slots.

    Args:
        inputs: Width of the input.
        outputs: Width of the output.
        config: Number of experts and slots, initialisation.

    Source:
        Puigcerver et al., "From Sparse to Soft Mixtures of Experts", ICLR 2024, Eq. (1)-(3).
    """

    def __init__(self, inputs: int, outputs: int, config: MixtureConfig) -> None:
        super().__init__()
        bound = (inputs if config.init == "per_expert" else inputs * outputs) ** -0.5
        router_bound = (config.experts * config.slots) ** -0.5
        self.phi = nn.Parameter(torch.empty(inputs, config.experts, config.slots).uniform_(-router_bound, router_bound))
        self.weight = nn.Parameter(torch.empty(config.experts, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(config.experts, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Positions [B, M, inputs] -> [B, M, outputs]."""
        logits = einsum(x, self.phi, "B M inputs, inputs experts slots -> B M experts slots")
        slots = einsum(logits.softmax(1), x, "B M experts slots, B M inputs -> B experts slots inputs")
        slots = einsum(slots, self.weight, "B experts slots inputs, experts inputs outputs -> B experts slots outputs")
        slots = rearrange(slots + self.bias[:, None], "B experts slots outputs -> B (experts slots) outputs")
        return rearrange(logits, "B M experts slots -> B M (experts slots)").softmax(-1) @ slots


class Attention(nn.Module):
    """Multi-head attention of one sequence to another, with dropout of its weights.

    Args:
        width: E, a multiple of `heads`.
        heads: Number of heads.
        dropout: Probability in [0, 1).
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.dropout = RowDropout(dropout)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, queries: Tensor, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Queries [B, M, E] that look at tokens [B, L, E], but at none that is `hidden` [B, L] bool: [B, M, E]."""
        inputs = (queries, tokens, tokens)
        projections = zip(inputs, self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        query, key, value = (
            rearrange(F.linear(*projection), "B L (heads w) -> B heads L w", heads=self.heads)
            for projection in projections
        )
        logits = query @ key.transpose(2, 3) / key.shape[-1] ** 0.5  # [B, heads, M, L]
        if hidden is not None:
            logits = logits.masked_fill(hidden[:, None, None], -torch.inf)
        mixed = self.dropout(logits.softmax(-1)) @ value
        out: Tensor = self.out_proj(rearrange(mixed, "B heads M w -> B M (heads w)"))
        return out


class DecoderLayer(nn.Module):
    """Post-norm decoder layer: queries look at each other, then at the tokens, then each passes a small MLP.

    Parameters are named as those of `torch.nn.TransformerDecoderLayer`, whose dropout knows nothing of processes.

    Args:
        width: E, a multiple of the heads.
        config: `model:` section.
    """

    def __init__(self, width: int, config: UMoEDConfig) -> None:
        super().__init__()
        self.self_attn, self.multihead_attn = (Attention(width, config.heads, config.dropout) for _ in range(2))
        self.linear1 = nn.Linear(width, config.feed_forward_width)
        self.linear2: nn.Module = nn.Linear(config.feed_forward_width, width)
        if config.mixture is not None:
            self.linear2 = SoftMixture(config.feed_forward_width, width, config.mixture)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = RowDropout(config.dropout)

    def forward(self, queries: Tensor, tokens: Tensor, hidden: Tensor | None) -> Tensor:
        """Queries [B, M, E] and tokens [B, L, E], of which those `hidden` [B, L] bool are not seen -> [B, M, E]."""
        queries = self.norm1(queries + self.dropout(self.self_attn(queries, queries)))
        queries = self.norm2(queries + self.dropout(self.multihead_attn(queries, tokens, hidden)))
        inner = self.dropout(self.linear1(queries).relu())
        out: Tensor = self.norm3(queries + self.dropout(self.linear2(inner)))
        return out


class TokenDecoder(nn.Module):
    """Learned queries that attend to tokens, and choose one of the bit patterns each.

    Layers are post-norm without masks over the queries; all start with the same weights.

    Args:
        tokens_width: Width E of the tokens.
        config: `model:` section.

    Raises:
        UserError: If the width is not a multiple of the heads.
    """

    def __init__(self, tokens_width: int, config: UMoEDConfig) -> None:
        super().__init__()
        width = config.width or tokens_width
        if width % config.heads:
            raise UserError(
                f"model.heads is {config.heads}, which does not divide the decoder's width of {width}: "
                "choose another number of heads, or a model.width"
            )
        self.queries = nn.Parameter(torch.randn(config.queries, width))
        self.project = (
            nn.Identity() if width == tokens_width else nn.Sequential(nn.Linear(tokens_width, width), nn.ReLU())
        )
        layer = DecoderLayer(width, config)
        layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(config.layers))
        self.decoder = nn.ModuleDict({"layers": layers})  # named as in torch's decoder
        self.classifier = nn.Linear(width, 2 ** (config.bits // config.queries))

    def forward(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Chooses the bits of each row.

        Args:
            tokens: Of one modality, [B, L, E].
            hidden: True for tokens that no query sees, [B, L] bool; every row shows one.

        Returns:
            Logits of the patterns, [B, M, W].
        """
        queries, tokens = self.queries.expand(tokens.shape[0], -1, -1), self.project(tokens)
        for layer in cast(nn.ModuleList, self.decoder["layers"]):
            queries = layer(queries, tokens, hidden)
        logits: Tensor = self.classifier(queries)
        return logits


@MODELS.register("UMoED")
class UMoED(TokenSetModel):
    """Codes generated from CLIP tokens by a decoder with soft mixtures of experts.

    Args:
        config: `model:` section.
        data: What is known of the training data.
    """

    Config = UMoEDConfig
    reference_names = (
        (r"^(clip|backbone)\.", "backbone."),
        (r"^hash\.(hash_module|img_token_hash)\.", "heads.shared."),
        (r"^hash\.txt_token_hash\..*", ""),  # built without fusion, never used
        (r"^heads\.shared\.decoder_learned_parameters$", "heads.shared.queries"),
        (r"^heads\.shared\.first_layer\.", "heads.shared.project.0."),
        (r"\.linear\.(weight|bias)$", r".linear1.\1"),
        (r"\.moe\.(experts\.)?(\w+)$", r".linear2.\2"),
        (r"^distance\..*", ""),  # constants that a run without GPU stores
    )

    def __init__(self, config: UMoEDConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.config = config
        names = ("image", "text") if config.separate_heads else ("shared",)
        self.heads = nn.ModuleDict({name: TokenDecoder(data.clip.shape.embed_dim, config) for name in names})

    def image_sets(self, image: Tensor) -> Tensor:
        """Logits of the bit patterns of pictures [B, 3, R, R], from the class token and all patches: [B, M, W]."""
        return self._decode("image", self.backbone.image_tokens(image), None)

    def text_sets(self, ids: Tensor) -> Tensor:
        """Logits of the bit patterns of texts [B, L], from all positions unless padding is masked: [B, M, W]."""
        behind_end = torch.arange(ids.shape[1], device=ids.device) > ids.argmax(1, keepdim=True)
        hidden = behind_end if self.config.mask_padding else None
        return self._decode("text", self.backbone.text_tokens(ids)[1], hidden)

    def _decode(self, modality: str, tokens: Tensor, hidden: Tensor | None) -> Tensor:
        """Tokens [B, L, E] and those that are hidden, [B, L] bool -> logits [B, M, W] float32."""
        head = self.heads[modality if self.config.separate_heads else "shared"]
        logits: Tensor = head(tokens, hidden).float()
        return logits

    def objective(self, image: Tensor, text: Tensor, labels: Tensor) -> StepOutput:
        """The loss of the paper from the logits of all rows, [B, M, W], as `TokenSetModel.objective`."""
        c = self.config
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        i2t_distances, t2i_distances = self.distances(image, text)
        terms = {
            "triplet_i2t": weighted_triplet(i2t_distances, labels, c.margin),
            "triplet_t2i": weighted_triplet(t2i_distances, labels, c.margin),
            "diversity_image": diversity(image, "sample"),
            "diversity_text": diversity(text, "sample"),
        }
        # Means over four and three terms: the release counts its disabled fusion terms as 0.
        loss = (
            c.triplet_weight * (terms["triplet_i2t"] + terms["triplet_t2i"]) / 4
            + c.diversity_weight * (terms["diversity_image"] + terms["diversity_text"]) / 3
        )
        return StepOutput(loss, terms)

    def distances(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Distances of all pictures and texts, by the configured measure.

        Args:
            image: Logits of pictures, every position of length one, [B, M, W].
            text: Logits of texts, likewise, [B, M, W].

        Returns:
            Picture to text, [B, B], and text to picture, [B, B].
        """
        c = self.config
        if c.distance != "agreement" and c.distance != "euclidean":
            return set_distances(image, text, c.distance, c.set_similarity)
        if c.distribution_temperature is not None:
            image = (image / c.distribution_temperature).softmax(-1)
            text = (text / c.distribution_temperature).softmax(-1)
        measure = disagreement if c.distance == "agreement" else position_distance
        distances = measure(image, text)
        return distances, distances.T

    def binarise(self, sets: Tensor) -> Tensor:
        """Logits of the bit patterns [B, M, W] -> codes [B, K]."""
        return pattern_codes(sets)


def pattern_codes(logits: Tensor) -> Tensor:
    """Binarises: every position's most likely pattern, written in bits, most significant first; 0 -> -1, 1 -> +1.

    Args:
        logits: Of the W = 2^g patterns, [B, M, W].

    Returns:
        Codes in {-1, +1}, [B, M g] float32.
    """
    places = 2 ** torch.arange(int(math.log2(logits.shape[-1])) - 1, -1, -1, device=logits.device)
    bits = logits.argmax(-1, keepdim=True) // places % 2  # [B, M, g]; ONNX's exporter knows no shift
    return bits.flatten(1).float() * 2 - 1


def disagreement(image: Tensor, text: Tensor) -> Tensor:
    """How often two items would draw different patterns, averaged over positions.

    It is an inner product of distributions, not a cosine: an item's distance to itself is above 0.

    Args:
        image: Distributions (or unit logits) of pictures, [B, M, W].
        text: The same of texts, [B, M, W].

    Returns:
        `mean_m (1 - max(0, <image_m, text_m>))` of all pairs, [B, B].

    Source:
        UMoED, TOMM 2025, distance of generated codes; the authors' code, `distance_mode: cosine`.
    """
    return 1 - einsum(image, text, "B M W, D M W -> B D M").clamp(min=0).mean(-1)


def position_distance(image: Tensor, text: Tensor) -> Tensor:
    """Euclidean distance of two items' distributions at the same positions.

    Args:
        image: Distributions (or unit logits) of pictures, [B, M, W].
        text: The same of texts, [B, M, W].

    Returns:
        Sum over the M positions divided by M^2, of all pairs, [B, B].

    Source:
        The authors' code, other values of `distance_mode`; the divisor counts the pairs of unequal positions, which are
        masked out, too.
    """
    exact = "donot_use_mm_for_euclid_dist"
    by_position = torch.cdist(image.transpose(0, 1), text.transpose(0, 1), compute_mode=exact)  # [M, B, B]
    return by_position.sum(0) / image.shape[1] ** 2
