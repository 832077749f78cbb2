"""UCMFH: unsupervised contrastive multi-modal fusion hashing. Labels never reach it.

Paper: X. Xia, G. Dong, F. Li, L. Zhu, X. Ying, "When CLIP meets cross-modal hashing retrieval: A new strong baseline",
Information Fusion 100, 2023, https://doi.org/10.1016/j.inffus.2023.101968.
Authors' code: https://github.com/XinyuXia97/UCMFH, commit 116f015, no licence stated; none of it is used here.

A small transformer reads the features of frozen CLIP of a picture and its text side by side; of what it returns, the
first half is the picture's and the second the text's. A perceptron makes a relaxed code of each half. A contrastive
loss draws the halves of a pair together, and the relaxed codes of a pair.

Deviations from the authors' code:
1. A code sees its own modality alone: the half of the other is 0 (`missing: zero`). In the release, and so in the
   numbers of the paper, a code of a picture is made from the picture and its text, also for queries, and the other way
   round (`missing: paired`): a query then holds what is searched for, and no other method may be compared with it.
2. A code is the same whatever else is encoded. In the release all items of an evaluation batch attend to each other, by
   weights that were never trained (`across_batch: true`).
3. All items are encoded, all training pairs are used, and the last partial batch is kept; the release leaves out the
   last partial batch of queries and of the database too, and trains on the first 4,992 pairs.
4. The epoch is chosen as for all methods; the release reports the last.
5. Queries and keys of attention have a gradient of exactly 0; in the release rounding moves them.
Its first stage, which the hashing does not use, is left out.

Results reproduced: the golden case of the authors' code (tests/golden/UCMFH-*.npz), with `missing: paired` and
`across_batch: true`, and without `across_batch` as the golden case has it too.
"""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from common.errors import UserError
from common.losses import full_precision
from common.registry import MODELS
from common.similarity import cosine_similarity
from common.types import Batch, DataInfo, Progress, StepOutput
from models.base import ParamGroups
from models.blocks.frozen import FrozenFeaturesConfig, FrozenFeaturesModel
from models.blocks.heads import sign_codes
from utils.distributed import gather_rows


class UCMFHConfig(FrozenFeaturesConfig):
    """`model:` section of UCMFH."""

    layers: int = Field(gt=0)  # of the transformer; 2
    heads: int = Field(gt=0)  # of its attention; 4
    feed_forward_width: int = Field(gt=0)  # of its layers; 2048
    fusion_dropout: float = Field(ge=0, lt=1)  # in its layers; 0.1
    hidden_width: int = Field(gt=0)  # of the hashing perceptrons; 4096
    dropout: float = Field(ge=0, lt=1)  # in the hashing perceptrons; 0.3
    temperature: float = Field(ge=0.02)  # of both contrasts; far below, exponentials leave the range of float32
    hash_weight: float = Field(ge=0)  # of the contrast of relaxed codes; the one of features has 1
    missing: Literal["zero", "paired"]  # the other modality when an item is encoded: 0, or the item's own (an oracle)
    across_batch: bool  # whether items that are encoded together attend to each other

    def reads(self, fields: frozenset[str]) -> frozenset[str]:
        """As `ModelConfig.reads`; either modality with the other where codes are made from both."""
        both = fields | {"image", "text"} if self.missing == "paired" and fields else fields
        return super().reads(both)


class FusionLayer(nn.Module):
    """A post-norm transformer layer whose sequences are of one token: its attention weight is 1.

    Parameters are named as in torch's TransformerEncoderLayer. Rows of queries and keys have a gradient of 0.

    Args:
        width: Width of a token.
        heads: Of the attention.
        feed_forward_width: Of the perceptron.
        dropout: Of attention weights, both branches, and inside the perceptron.
    """

    def __init__(self, width: int, heads: int, feed_forward_width: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout)
        self.linear1 = nn.Linear(width, feed_forward_width)
        self.linear2 = nn.Linear(feed_forward_width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, across: bool) -> Tensor:
        """Tokens [B, W] -> tokens [B, W]; `across`: the rows are one sequence instead."""
        attended = self.self_attn(tokens, tokens, tokens, need_weights=False)[0] if across else self.alone(tokens)
        tokens = self.norm1(tokens + self.dropout(attended))
        spread = self.dropout(self.linear1(tokens).relu())
        normed: Tensor = self.norm2(tokens + self.dropout(self.linear2(spread)))
        return normed

    def alone(self, tokens: Tensor) -> Tensor:
        """Attention of tokens [B, W] to themselves alone: their values, of which dropout takes whole heads; [B, W]."""
        rows, width = tokens.shape
        attention = self.self_attn
        values = F.linear(tokens, attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :])
        weights = self.dropout(values.new_ones(rows, attention.num_heads, 1))
        mixed: Tensor = attention.out_proj((values.view(rows, attention.num_heads, -1) * weights).flatten(1))
        return mixed


class HashPerceptron(nn.Module):
    """Two linear maps with ReLU and dropout between them, tanh, norm 1; torch's default initialisation.

    Args:
        width: Width E of the features.
        hidden_width: Between the maps.
        bits: K.
        dropout: Probability in [0, 1).
    """

    def __init__(self, width: int, hidden_width: int, bits: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden_width)
        self.out = nn.Linear(hidden_width, bits)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, E] -> relaxed codes of norm 1, [B, K] float32; a row of zeros stays 0."""
        hidden = self.dropout(self.hidden(F.normalize(features, dim=-1)).relu())
        return F.normalize(self.out(hidden).float().tanh(), dim=-1)


@MODELS.register("UCMFH")
class UCMFH(FrozenFeaturesModel):
    """Unsupervised contrast of fused features and of codes, on frozen features.

    Args:
        config: `model:` section.
        data: What is known of the training data.

    Raises:
        UserError: If features of pictures and texts differ in width, or heads do not divide it.
    """

    Config = UCMFHConfig
    reference_names = (
        (r"^FusionTransformer\.transformerEncoder\.layers\.", "fusion."),
        (r"^ImageMlp\.", "image_head."),
        (r"^TextMlp\.", "text_head."),
        (r"^(image|text)_head\.fc1\.", r"\1_head.hidden."),
        (r"^(image|text)_head\.tohash\.", r"\1_head.out."),
    )

    def __init__(self, config: UCMFHConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.config = config
        width = self.image_width
        if self.text_width != width:
            raise UserError(
                f"features of pictures have {width} values and those of texts {self.text_width}, but UCMFH compares "
                "them; give features of one width in dataset.image_features and dataset.text_features"
            )
        if 2 * width % config.heads:
            raise UserError(f"model.heads is {config.heads}, which does not divide {2 * width}, twice the features")
        layer = FusionLayer(2 * width, config.heads, config.feed_forward_width, config.fusion_dropout)
        self.fusion = nn.ModuleList(copy.deepcopy(layer) for _ in range(config.layers))  # equal at the start
        self.image_head, self.text_head = (
            HashPerceptron(width, config.hidden_width, config.bits, config.dropout) for _ in range(2)
        )

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One step's loss over the global batch."""
        image, text = (gather_rows(features) for features in self.training_features(batch))
        image, text = self.fuse(image, text, across=False)
        image_relaxed, text_relaxed = self.image_head(image), self.text_head(text)
        with full_precision(image.device):
            fusion = pair_contrast(image, text, self.config.temperature)
            code = pair_contrast(image_relaxed, text_relaxed, self.config.temperature)
        return StepOutput(fusion + self.config.hash_weight * code, {"fusion": fusion, "hash": code})

    def fuse(self, image: Tensor, text: Tensor, across: bool) -> tuple[Tensor, Tensor]:
        """What the transformer makes of pairs.

        Args:
            image: Features of pictures, [B, E].
            text: Features of their texts, [B, E].
            across: Whether all pairs are one sequence.

        Returns:
            Of pictures and of texts, [B, E] float32 each; the two of a pair side by side have norm 1.
        """
        tokens = torch.cat([image, text], dim=-1)
        for layer in self.fusion:
            tokens = layer(tokens, across)
        fused_image, fused_text = F.normalize(tokens.float(), dim=-1).chunk(2, dim=-1)
        return fused_image, fused_text

    def fuse_batch(self, batch: Batch, own: Literal["image", "text"]) -> Tensor:
        """The half of modality `own` that items are encoded from, [B, E]."""
        if self.config.missing == "paired":
            image, text = self.image_features(batch), self.text_features(batch)
        elif own == "image":
            image = self.image_features(batch)
            text = torch.zeros_like(image)
        else:
            text = self.text_features(batch)
            image = torch.zeros_like(text)
        halves = self.fuse(image, text, self.config.across_batch)
        return halves[0] if own == "image" else halves[1]

    def encode_image(self, batch: Batch) -> Tensor:
        """Codes of pictures, [B, K]."""
        return sign_codes(self.image_head(self.fuse_batch(batch, "image")))

    def encode_text(self, batch: Batch) -> Tensor:
        """Codes of texts, [B, K]."""
        return sign_codes(self.text_head(self.fuse_batch(batch, "text")))

    def param_groups(self) -> ParamGroups:
        """An optimizer for the transformer and for each perceptron; CLIP is in none."""
        return {
            "fusion": {"fusion": list(self.fusion.parameters())},
            "image": {"head": list(self.image_head.parameters())},
            "text": {"head": list(self.text_head.parameters())},
        }

    @property
    def marks(self) -> tuple[str, ...]:
        """What codes have seen beside their own item and modality."""
        paired = "every code is made from a picture and its text together, an oracle: do not report these numbers"
        across = "codes depend on the items that are encoded in the same batch (evaluate.batch_size)"
        shown = ((self.config.missing == "paired", paired), (self.config.across_batch, across))
        return tuple(mark for holds, mark in shown if holds)


def pair_contrast(image: Tensor, text: Tensor, temperature: float) -> Tensor:
    """Each of 2B vectors should choose its partner among all the others, of both modalities.

    Args:
        image: Vectors of pictures, [B, K].
        text: Vectors of texts, [B, K].
        temperature: Of cosines.

    Returns:
        Scalar, mean over the 2B vectors; 0 for a single pair.

    Source:
        NT-Xent of SimCLR, ICML 2020, which UCMFH takes for features and codes.
    """
    rows = torch.cat([image, text])
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    logits = (cosine_similarity(rows, rows) / temperature).masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(rows), device=rows.device).roll(len(image)))
