"""The hash head of MITH, which VTPH uses too: concepts seen globally and locally, their memory banks and loss terms.

Paper: Liu et al., "Multi-Granularity Interactive Transformer Hashing for Cross-modal Retrieval", ACM MM 2023,
https://doi.org/10.1145/3581783.3612411. Written from the equations; names follow the paper's parts: GCL is
`GlobalConcepts`, LTA `aggregate_tokens`, LCT `LocalConcepts`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from common.losses import asymmetric_likelihood, mutual_distillation
from common.similarity import label_similarity
from common.types import DataInfo
from models.base import ClipModelConfig
from models.blocks.dropout import RowDropout
from models.blocks.heads import sign_codes
from models.blocks.memory import MemoryBank
from models.clip.towers import HEAD_WIDTH, Transformer
from utils.distributed import gather_rows

TEACHER_SHARE = 0.1  # of the distillation's gradient that reaches the global hash; a constant of the authors' code


class ConceptHeadConfig(ClipModelConfig):
    """The part of the `model:` section that describes the head and its targets."""

    top_k: int = Field(gt=0)  # concepts that a token may vote for; at most bits
    transformer_layers: int = Field(ge=0)  # blocks over the concepts
    res_mlp_layers: int = Field(ge=0)  # residual MLP blocks before the concepts
    activation: Literal["gelu", "relu"]  # of the residual MLP
    dropout: float = Field(ge=0, lt=1)  # of the residual MLP
    target_share: float = Field(ge=0, le=1)  # lambda: share of the global hash in the target codes

    @field_validator("top_k")
    @classmethod
    def _top_k_concepts_exist(cls, top_k: int, info: ValidationInfo) -> int:
        bits = info.data.get("bits", top_k)
        if top_k > bits:
            raise ValueError(f"must be at most model.bits, which is {bits}: every bit is one concept")
        return top_k


@dataclass(frozen=True)
class ConceptCodes:
    """What the head makes of one modality.

    Attributes:
        feature: Global feature of length one, [B, E].
        global_hash: Relaxed code of the pooled feature, [B, K] in (-1, 1).
        local_hash: Relaxed code of the tokens, [B, K] in (-1, 1).
        concepts: Concept vectors behind the local hash, [B, K, E].
    """

    feature: Tensor
    global_hash: Tensor
    local_hash: Tensor
    concepts: Tensor

    @property
    def codes(self) -> Tensor:
        """Codes in {-1, +1}: the sign of the plain sum of both hashes, [B, K]."""
        return sign_codes(self.global_hash + self.local_hash)

    def gathered(self) -> "ConceptCodes":
        """The rows of all processes; `concepts`, which no loss compares across rows, stay this process's."""
        feature, global_hash, local_hash = (gather_rows(x) for x in (self.feature, self.global_hash, self.local_hash))
        return ConceptCodes(feature, global_hash, local_hash, self.concepts)


class ResidualMLP(nn.Module):
    """`x + contract(dropout(activation(expand(LN(x)))))` with a hidden width of 4 E.

    Args:
        width: E.
        activation: "gelu" (exact) or "relu".
        dropout: Probability in [0, 1).
    """

    def __init__(self, width: int, activation: Literal["gelu", "relu"], dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.activation = nn.GELU() if activation == "gelu" else nn.ReLU()
        self.dropout = RowDropout(dropout)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Features [..., E] -> [..., E]."""
        out: Tensor = x + self.contract(self.dropout(self.activation(self.expand(self.norm(x)))))
        return out


class GlobalConcepts(nn.Module):
    """Global concept learning: residual MLP blocks, then one concept vector per bit. Shared by both modalities.

    Args:
        width: E.
        config: Settings of the head.
    """

    def __init__(self, width: int, config: ConceptHeadConfig) -> None:
        super().__init__()
        blocks = (ResidualMLP(width, config.activation, config.dropout) for _ in range(config.res_mlp_layers))
        self.mlp = nn.Sequential(*blocks)
        self.embedding = nn.Linear(width, config.bits, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features or tokens [..., E] -> the same refined [..., E], and concept scores [..., K] in (-1, 1)."""
        refined: Tensor = self.mlp(x)
        return refined.float(), self.embedding(refined).float().tanh()


def aggregate_tokens(tokens: Tensor, scores: Tensor, top_k: int, ignored: Tensor | None = None) -> Tensor:
    """Localized token aggregation: every concept becomes the weighted mean of the tokens that vote for it.

    A token votes for those of its `top_k` highest scores that are positive (ties with the last of them included). The
    weights of a concept are the softmax of its votes over the tokens; a concept without votes is the zero vector.

    Args:
        tokens: [B, L, E]; gradient flows through them only.
        scores: Concept scores of the tokens, [B, L, K] in (-1, 1); constants.
        top_k: At most K.
        ignored: True for tokens without votes, [B, L] bool.

    Returns:
        [B, K, E].

    Source:
        MITH, ACM MM 2023, LTA. Differs from the authors' code: a softmax over no votes is zero, not NaN made zero.
    """
    voting = scores > 0
    if ignored is not None:
        voting = voting & ~ignored[..., None]
    votes = scores.masked_fill(~voting, -torch.inf)
    threshold = votes.topk(top_k, dim=-1).values[..., -1:]  # -inf where fewer than top_k are positive: all stay
    mass = votes.masked_fill(votes < threshold, -torch.inf).exp()  # [B, L, K], 0 or in (1, e): needs no shift
    weights = mass / mass.sum(dim=1, keepdim=True).clamp(min=1)
    return weights.to(tokens.dtype).transpose(1, 2) @ tokens


def concept_positions(bits: int, width: int) -> Tensor:
    """Fixed sine and cosine position table of the concepts over the root of the width, [K, E]."""
    place = torch.arange(bits, dtype=torch.float64)[:, None]
    column = torch.arange(width)
    angle = place * 10000.0 ** (-(column - column % 2) / width)
    return (torch.where(column % 2 == 0, angle.sin(), angle.cos()) / width**0.5).to(torch.get_default_dtype())


class LocalConcepts(nn.Module):
    """Local concept transforming: residual blocks over the K concepts, then one linear unit per bit.

    The K units keep a weight [1, E] and a bias [1] of their own, since BertAdam clips gradients per tensor.

    Args:
        width: E.
        config: Settings of the head.
    """

    positions: Tensor

    def __init__(self, width: int, config: ConceptHeadConfig) -> None:
        super().__init__()
        self.register_buffer("positions", concept_positions(config.bits, width), persistent=False)
        self.transformer = Transformer(width, config.transformer_layers, max(1, width // HEAD_WIDTH))
        units = [nn.Linear(width, 1) for _ in range(config.bits)]
        self.bit_weights = nn.ParameterList(unit.weight for unit in units)
        self.bit_biases = nn.ParameterList(unit.bias for unit in units)

    def forward(self, concepts: Tensor) -> tuple[Tensor, Tensor]:
        """Aggregated tokens [B, K, E] -> relaxed codes [B, K] in (-1, 1), and transformed concepts [B, K, E]."""
        concepts = self.transformer(concepts + self.positions)
        weights, biases = torch.cat(list(self.bit_weights)), torch.cat(list(self.bit_biases))  # [K, E], [K]
        local_hash = (concepts.float() * weights).sum(-1) + biases
        return local_hash.tanh(), concepts.float()


class ConceptHead(nn.Module):
    """The whole head: global concepts for both modalities, local concepts and an alignment projection for each.

    Args:
        width: E.
        config: Settings of the head.
    """

    def __init__(self, width: int, config: ConceptHeadConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.global_concepts = GlobalConcepts(width, config)
        self.image_concepts = LocalConcepts(width, config)
        self.text_concepts = LocalConcepts(width, config)
        self.image_projection = nn.Linear(width, width)
        self.text_projection = nn.Linear(width, width)

    def hash_image(self, pooled: Tensor, tokens: Tensor) -> ConceptCodes:
        """Pooled feature [B, E] and patch tokens [B, L, E] of pictures -> their hashes."""
        return self._hash(self.image_concepts, pooled, tokens, None)

    def hash_text(self, pooled: Tensor, tokens: Tensor, ignored: Tensor) -> ConceptCodes:
        """Pooled feature [B, E] and tokens [B, L, E] of texts -> their hashes; `ignored` [B, L] bool has no vote."""
        return self._hash(self.text_concepts, pooled, tokens, ignored)

    def _hash(self, local: LocalConcepts, pooled: Tensor, tokens: Tensor, ignored: Tensor | None) -> ConceptCodes:
        refined, global_hash = self.global_concepts(pooled)
        with torch.no_grad():
            _, scores = self.global_concepts(tokens)
        local_hash, concepts = local(aggregate_tokens(tokens, scores, self.top_k, ignored))
        return ConceptCodes(F.normalize(refined, dim=-1), global_hash, local_hash, concepts)

    def align(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Projects concepts of both modalities into the space where they are compared.

        Args:
            image: Concepts of pictures, [B, K, E].
            text: Concepts of texts, [B, K, E].

        Returns:
            Both projected, rows of length one, [B, K, E] each.
        """
        projected_image: Tensor = self.image_projection(image)
        projected_text: Tensor = self.text_projection(text)
        return F.normalize(projected_image.float(), dim=-1), F.normalize(projected_text.float(), dim=-1)


class ConceptBanks(nn.Module):
    """Hashes of all training items, their labels, and the loss terms that need them.

    Args:
        num_train: N.
        num_classes: C.
        config: Settings of the head.
    """

    train_labels: Tensor

    def __init__(self, num_train: int, num_classes: int, config: ConceptHeadConfig) -> None:
        super().__init__()
        self.target_share = config.target_share
        self.image_global = MemoryBank(num_train, config.bits)
        self.text_global = MemoryBank(num_train, config.bits)
        self.image_local = MemoryBank(num_train, config.bits)
        self.text_local = MemoryBank(num_train, config.bits)
        self.register_buffer("train_labels", torch.zeros(num_train, num_classes))

    def prepare(self, data: DataInfo) -> None:
        """Draws the banks from a standard normal by the run's seed; keeps the labels of the training split."""
        generator = torch.Generator().manual_seed(data.seed)
        for bank in (self.image_global, self.text_global, self.image_local, self.text_local):
            bank.fill_normal(generator)
        self.train_labels.copy_(data.labels_of_training_set)

    def terms(self, index: Tensor, labels: Tensor, image: ConceptCodes, text: ConceptCodes) -> dict[str, Tensor]:
        """Remembers the hashes of the global batch, then computes the terms that look at them.

        Args:
            index: Places of the rows in the training split, [B] int64.
            labels: Multi-hot labels, [B, C].
            image: Hashes of the pictures, rows of the global batch.
            text: Hashes of the texts, rows of the global batch.

        Returns:
            Unweighted scalars: `local_likelihood_*` (a modality against itself), `global_likelihood_*` (the bank of a
            modality against the other's hashes), `quantization_*`, `distillation` (both modalities).
        """
        self.image_global.write(index, image.global_hash)
        self.text_global.write(index, text.global_hash)
        self.image_local.write(index, image.local_hash)
        self.text_local.write(index, text.local_hash)
        similarity = label_similarity(self.train_labels, labels)  # [N, B]
        share = self.target_share
        target = torch.sign(
            share * (image.global_hash + text.global_hash) + (1 - share) * (image.local_hash + text.local_hash)
        ).detach()
        terms: dict[str, Tensor] = {}
        for name, own, other in (("image", image, text), ("text", text, image)):
            local_bank, global_bank = (
                (self.image_local.rows, self.image_global.rows)
                if own is image
                else (self.text_local.rows, self.text_global.rows)
            )
            terms[f"local_likelihood_{name}"] = asymmetric_likelihood(local_bank, own.local_hash, similarity)
            terms[f"global_likelihood_{name}"] = asymmetric_likelihood(global_bank, other.global_hash, similarity)
            terms[f"quantization_{name}"] = F.mse_loss((own.global_hash + own.local_hash) / 2, target)
        terms["distillation"] = mutual_distillation(
            image.global_hash, image.local_hash, TEACHER_SHARE
        ) + mutual_distillation(text.global_hash, text.local_hash, TEACHER_SHARE)
        return terms


CONCEPT_HEAD_NAMES = (  # reference name -> ours, for `reference_names` of methods with a ConceptHead
    (r"^hash\.gcl_t\.", "hash.gcl_i."),  # the same module saved under a second name
    (r"^hash\.lct_[it]\.position\.pe$", ""),  # a fixed table
    (r"^hash\.gcl_i\.mlp\.lns\.(\d+)\.", r"head.global_concepts.mlp.\1.norm."),
    (r"^hash\.gcl_i\.mlp\.mlps\.(\d+)\.0\.", r"head.global_concepts.mlp.\1.expand."),
    (r"^hash\.gcl_i\.mlp\.mlps\.(\d+)\.3\.", r"head.global_concepts.mlp.\1.contract."),
    (r"^hash\.gcl_i\.common_concept_embedding\.", "head.global_concepts.embedding."),
    (r"^hash\.lct_i\.", "head.image_concepts."),
    (r"^hash\.lct_t\.", "head.text_concepts."),
    (r"^(head\.\w+_concepts)\.hashing\.fc_list\.(\d+)\.weight$", r"\1.bit_weights.\2"),
    (r"^(head\.\w+_concepts)\.hashing\.fc_list\.(\d+)\.bias$", r"\1.bit_biases.\2"),
    (r"^hash\.img_concept_proj\.", "head.image_projection."),
    (r"^hash\.txt_concept_proj\.", "head.text_projection."),
)
