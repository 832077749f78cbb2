"""VTPH: visual-textual prompt hashing.

Paper: B. Chen, Q. Wu, Y. Liu, J. Zeng, G. Lu, Z. Zhang, "Enhancing Cross-Modal Retrieval via Visual-Textual Prompt
Hashing", IJCAI 2024, pages 623-631.
Authors' code: https://github.com/Binz-Chen/IJCAI2024-VTPH, commit 86f9199, no licence stated; none of it is used here.

CLIP stays as it is. Between it and MITH's head (`models/blocks/concept_head.py`) stand prompts, which bring the picture
and a sentence about the picture into the text: a gate from the picture's class token on every text token (VAP), an
adapter on the text's pooled feature (TAP), and two residual blocks for each modality, those of the text reading the
tokens of the sentence, too.

A text is encoded together with a counterpart where there is one: a picture and its caption. That is the text's own
picture in the database, and a generated one for queries; without, a shorter path is taken. Which of the two happened is
a mark on the results, since a text code that looked at its own picture is partly an image code.

Deviations from the authors' code:
1. Queries without generated pictures are encoded by the path without counterpart, which the authors' code computes and
   throws away; its paths to generated pictures are placeholders.
2. The banks are part of the checkpoint and drawn from the run's seed, so that a resumed run is exact.
3. A code has no zeros: the sign of an exact 0 is +1.
4. CLIP's weights are read as float32; the authors round the matrices of a float32 file to float16.
5. The softmax of the gate names its dimension, the features; the authors' code leaves it to torch, which takes those.

Results reproduced: the golden case of the authors' code (tests/golden/VTPH-*.npz).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from common.errors import UserError
from common.losses import diagonal_contrast, full_precision
from common.registry import MODELS
from common.types import Batch, DataInfo, Progress, StepOutput
from models.base import ClipHashingModel, ParamGroups
from models.blocks.concept_head import CONCEPT_HEAD_NAMES, ConceptBanks, ConceptCodes, ConceptHead, ConceptHeadConfig
from models.blocks.dropout import RowDropout
from models.blocks.memory import FeatureCache
from models.clip.towers import Transformer
from utils.distributed import gather_rows

Affinity = Literal["jeffreys", "js"]
ADAPTER_SHARE = 4  # the adapter's hidden width is E / 4, as 128 of 512 in the paper


class VTPHConfig(ConceptHeadConfig):
    """`model:` section of VTPH."""

    cache_features: bool  # keep CLIP's features of the training split in memory: 4 N (1 + P + 2 L) E bytes
    prompt_layers: int = Field(ge=0)  # residual blocks of each modality behind CLIP
    prompt_heads: int = Field(gt=0)  # their attention heads; must divide E
    prompt_dropout: float = Field(ge=0, lt=1)  # of the adapter
    mask_padding: bool  # whether the text's blocks pass over padding; the authors' code lets them read it
    affinity: Affinity  # of a text and the caption of its picture: authors' code, or the paper's figure
    affinity_scale: float = Field(ge=0)  # gamma: how much their distance warms the contrast
    temperature: float = Field(gt=0)  # of the contrast where they agree
    margin: float = Field(ge=0)  # of the triplets
    local_likelihood_weight: float = Field(ge=0)  # local hashes within a modality
    global_likelihood_weight: float = Field(ge=0)  # alpha: global hashes across modalities
    quantization_weight: float = Field(ge=0)  # beta
    contrast_weight: float = Field(ge=0)  # zeta
    distillation_weight: float = Field(ge=0)
    triplet_weight: float = Field(ge=0)


@dataclass(frozen=True)
class TextFeatures:
    """What CLIP makes of texts.

    Attributes:
        ids: Token ids, [B, L] int64.
        pooled: Features at end-of-text, [B, E].
        tokens: Features of all tokens, padding included, [B, L, E].
    """

    ids: Tensor
    pooled: Tensor
    tokens: Tensor


class Prompts(nn.Module):
    """What is trained between CLIP and the head.

    Args:
        width: E.
        config: Settings of the prompts.

    Raises:
        UserError: If the heads do not divide the width.

    Source:
        VTPH, IJCAI 2024: VAP is `gate`, TAP is `reduce` and `expand`. The gate's softmax makes tokens about E times
        smaller, so small that the eps of the next normalisation (1e-5) outweighs their variance.
    """

    def __init__(self, width: int, config: VTPHConfig) -> None:
        super().__init__()
        if width % config.prompt_heads:
            raise UserError(
                f"model.prompt_heads is {config.prompt_heads}, which does not divide {width}, the width of the "
                f"backbone {config.backbone}; choose a divisor"
            )
        self.gate = nn.Linear(width, width)
        self.reduce = nn.Linear(width, width // ADAPTER_SHARE)
        self.dropout = RowDropout(config.prompt_dropout)
        self.expand = nn.Linear(width // ADAPTER_SHARE, width)
        self.image_blocks = Transformer(width, config.prompt_layers, config.prompt_heads)
        self.text_blocks = Transformer(width, config.prompt_layers, config.prompt_heads)

    def adapt(self, pooled: Tensor) -> Tensor:
        """Pooled features of texts [B, E] -> adapted ones [B, E]."""
        adapted: Tensor = pooled + self.expand(self.dropout(self.reduce(pooled).relu()))
        return adapted

    def prompt(self, tokens: Tensor, class_token: Tensor) -> Tensor:
        """Text tokens [B, L, E], each feature weighed by what the picture's class token [B, E] opens: [B, L, E]."""
        gate: Tensor = self.gate(class_token).softmax(dim=-1)
        return gate[:, None] * tokens


def jeffreys_affinity(text: Tensor, caption: Tensor) -> Tensor:
    """Distance of two features as distributions over E: Jeffreys divergence, the mean over E.

    Args:
        text: Pooled features of texts, [B, E].
        caption: Pooled features of the captions of their pictures, [B, E].

    Returns:
        One distance a row, >= 0, [B].

    Source:
        VTPH, authors' code.
    """
    p, q = text.log_softmax(-1), caption.log_softmax(-1)
    return ((p.exp() - q.exp()) * (p - q)).mean(-1)


def js_affinity(text: Tensor, caption: Tensor) -> Tensor:
    """Distance of two features as distributions over E: Jensen-Shannon divergence, the sum over E.

    Args:
        text: Pooled features of texts, [B, E].
        caption: Pooled features of the captions of their pictures, [B, E].

    Returns:
        One distance a row, in [0, log 2], [B].

    Source:
        VTPH, IJCAI 2024, the figure of the framework.
    """
    p, q = text.log_softmax(-1), caption.log_softmax(-1)
    middle = torch.logaddexp(p, q) - math.log(2)
    return (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1) / 2


AFFINITIES: dict[Affinity, Callable[[Tensor, Tensor], Tensor]] = {"jeffreys": jeffreys_affinity, "js": js_affinity}


def caption_triplets(adapted: Tensor, caption: Tensor, margin: float) -> Tensor:
    """Every text should be nearer to the caption of its own picture than to the others, and every caption likewise.

    Args:
        adapted: Adapted features of texts, [B, E].
        caption: Pooled features of the captions of their pictures, [B, E].
        margin: By how much nearer, of a cosine.

    Returns:
        Scalar: the sum over all B (B - 1) wrong pairs of both hinges, divided by B.

    Source:
        VTPH, IJCAI 2024, the triplet term, with the reduction of the authors' code.
    """
    cosines = F.normalize(adapted, dim=-1) @ F.normalize(caption, dim=-1).T  # [B, B]
    own = cosines.diagonal()
    hinges = (margin + cosines - own[:, None]).relu() + (margin + cosines - own[None, :]).relu()
    return (hinges.sum() - hinges.diagonal().sum()) / len(own)


@MODELS.register("VTPH")
class VTPH(ClipHashingModel):
    """Concept hashing behind prompts on a frozen CLIP; texts see a picture and a sentence about it.

    Args:
        config: `model:` section.
        data: What is known of the training data.
    """

    Config = VTPHConfig
    fields = frozenset({"image", "text", "image_caption", "labels"})
    text_fields = frozenset({"text", "counterpart_image", "counterpart_caption"})
    optional_fields = frozenset({"counterpart_image", "counterpart_caption"})
    reference_names = (
        (r"^clip\.", "backbone."),
        (r"^vtp\.vap\.fc\.0\.", "prompts.gate."),
        (r"^vtp\.tap\.mlp\.0\.", "prompts.reduce."),
        (r"^vtp\.tap\.mlp\.3\.", "prompts.expand."),
        (r"^vtp\.te_i\.", "prompts.image_blocks."),
        (r"^vtp\.te_t\.", "prompts.text_blocks."),
        *CONCEPT_HEAD_NAMES,
    )
    reference_lacks = (r"banks\..*", r"backbone\..*")  # the authors save neither; CLIP is the published one

    def __init__(self, config: VTPHConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.config = config
        width = data.clip.shape.embed_dim
        self.backbone.requires_grad_(False)
        self.prompts = Prompts(width, config)
        self.head = ConceptHead(width, config)
        for projection in (self.head.image_projection, self.head.text_projection):
            projection.requires_grad_(False)  # no loss of VTPH uses them; its checkpoints hold them
        self.banks = ConceptBanks(data.num_train, data.num_classes, config)
        self.features = FeatureCache(data.num_train)

    def prepare(self, data: DataInfo) -> None:
        """Loads CLIP's weights and fills the banks."""
        super().prepare(data)
        self.banks.prepare(data)

    @property
    def rememberable_fields(self) -> frozenset[str]:
        """Of pictures and sentences, training needs only what a frozen CLIP makes of them."""
        return self.fields - {"labels"} if self.config.cache_features else frozenset()

    @torch.no_grad()
    def remember(self, batch: Batch) -> None:
        """Keeps CLIP's features of rows of the training split, those of all processes on each."""
        index = gather_rows(batch["index"])
        if "image" in batch:
            self.features.write("image", index, gather_rows(self.backbone.image_tokens(batch["image"])))
        for field in ("text", "image_caption"):
            if field in batch:
                text = self.read_text(batch[field])
                for name, rows in vars(text).items():
                    self.features.write(f"{field}_{name}", index, gather_rows(rows))

    def hash_image(self, tokens: Tensor) -> ConceptCodes:
        """Hashes of CLIP's tokens of pictures, [B, 1+P, E], class token first."""
        tokens = self.prompts.image_blocks(tokens)
        return self.head.hash_image(tokens[:, 0], tokens[:, 1:])

    def hash_text(
        self, text: TextFeatures, adapted: Tensor, counterpart: tuple[Tensor, TextFeatures] | None
    ) -> ConceptCodes:
        """Hashes of texts.

        Args:
            text: CLIP's features of the texts.
            adapted: Adapted pooled features of the texts, [B, E].
            counterpart: Class tokens of pictures, [B, E], and features of their captions; None: the text alone, which
                then passes no gate.

        Returns:
            The hashes; padding and end-of-text have no vote in the local one.
        """
        ids, length = text.ids, text.ids.shape[1]
        tokens = text.tokens
        if counterpart is not None:
            class_token, caption = counterpart
            tokens = torch.cat([self.prompts.prompt(tokens, class_token), caption.tokens], dim=1)
            ids = torch.cat([ids, caption.ids], dim=1)
        visible = None
        if self.config.mask_padding:
            visible = F.pad(ids != 0, (1, 0), value=True)[:, None, None]  # [B, 1, 1, 1+L or 1+2L]
        tokens = self.prompts.text_blocks(torch.cat([adapted[:, None], tokens], dim=1), visible)
        ignored = (text.ids == 0) | (text.ids == self.backbone.shape.end_of_text)
        return self.head.hash_text(tokens[:, 0], tokens[:, 1 : 1 + length], ignored)

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One step's loss over the global batch; writes the banks."""
        picture = self._image_of(batch)
        text, caption = self._text_of(batch, "text"), self._text_of(batch, "image_caption")
        adapted = self.prompts.adapt(text.pooled)
        image_codes = self.hash_image(picture)
        text_codes = self.hash_text(text, adapted, (picture[:, 0], caption))
        with full_precision(picture.device):
            return self.objective(
                gather_rows(batch["index"]),
                gather_rows(batch["labels"]),
                image_codes.gathered(),
                text_codes.gathered(),
                *(gather_rows(feature.float()) for feature in (text.pooled, caption.pooled, adapted)),
            )

    def objective(
        self,
        index: Tensor,
        labels: Tensor,
        image: ConceptCodes,
        text: ConceptCodes,
        pooled: Tensor,
        caption: Tensor,
        adapted: Tensor,
    ) -> StepOutput:
        """The loss from what was computed for the global batch; writes the banks.

        Args:
            index: Places of the rows in the training split, [B] int64.
            labels: Multi-hot labels, [B, C].
            image: Hashes of the pictures.
            text: Hashes of the texts.
            pooled: CLIP's pooled features of the texts, [B, E]; constants.
            caption: CLIP's pooled features of the captions of the pictures, [B, E]; constants.
            adapted: Adapted pooled features of the texts, [B, E].

        Returns:
            The loss and its unweighted terms.

        Source:
            VTPH, IJCAI 2024, with the constants of the authors' code. Both directions of the contrast use the
            temperature of the text (the column), as there.
        """
        c = self.config
        terms = self.banks.terms(index, labels, image, text)
        temperature = c.temperature + c.affinity_scale * AFFINITIES[c.affinity](pooled, caption)  # [B]
        contrast = diagonal_contrast(image.feature @ text.feature.T / temperature)
        triplet = caption_triplets(adapted, caption, c.margin)
        loss = (
            c.local_likelihood_weight * (terms["local_likelihood_image"] + terms["local_likelihood_text"])
            + c.global_likelihood_weight * (terms["global_likelihood_image"] + terms["global_likelihood_text"])
            + c.quantization_weight * (terms["quantization_image"] + terms["quantization_text"])
            + c.contrast_weight * contrast
            + c.distillation_weight * terms["distillation"]
            + c.triplet_weight * triplet
        )
        return StepOutput(loss, {**terms, "contrast": contrast, "triplet": triplet})

    def encode_image(self, batch: Batch) -> Tensor:
        """Codes of pictures, [B, K]."""
        return self.hash_image(self.backbone.image_tokens(batch["image"])).codes

    def encode_text(self, batch: Batch) -> Tensor:
        """Codes of texts, [B, K]; of texts with their counterpart where the batch has it."""
        text = self.read_text(batch["text"])
        counterpart = None
        if "counterpart_image" in batch:
            class_token = self.backbone.image_features(batch["counterpart_image"])
            counterpart = class_token, self.read_text(batch["counterpart_caption"])
        return self.hash_text(text, self.prompts.adapt(text.pooled), counterpart).codes

    def param_groups(self) -> ParamGroups:
        """One optimizer for prompts and head; CLIP is in none."""
        head = [parameter for parameter in self.head.parameters() if parameter.requires_grad]
        return {"main": {"prompts": list(self.prompts.parameters()), "head": head}}

    def train(self, mode: bool = True) -> "VTPH":
        """As torch's; CLIP stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def read_text(self, ids: Tensor) -> TextFeatures:
        """CLIP's features of texts [B, L]; no token looks at padding."""
        return TextFeatures(ids, *self.backbone.text_tokens(ids, ids == 0))

    def _image_of(self, batch: Batch) -> Tensor:
        """CLIP's tokens of the training pictures, remembered or computed, [B, 1+P, E]."""
        if "image" in self.features:
            return self.features.read("image", batch["index"])
        return self.backbone.image_tokens(batch["image"])

    def _text_of(self, batch: Batch, field: str) -> TextFeatures:
        """CLIP's features of the training texts of a field, remembered or computed."""
        if f"{field}_ids" in self.features:
            ids, pooled, tokens = (
                self.features.read(f"{field}_{name}", batch["index"]) for name in ("ids", "pooled", "tokens")
            )
            return TextFeatures(ids, pooled, tokens)
        return self.read_text(batch[field])
