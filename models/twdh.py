"""TwDH: two-step discrete hashing.

Paper: J. Tu, X. Liu, Y. Hao, R. Hong, M. Wang, "Two-Step Discrete Hashing for Cross-Modal Retrieval", IEEE Transactions
on Multimedia 2024, https://doi.org/10.1109/TMM.2024.3381828.
Authors' code: https://github.com/kalenforn/clip-based-cross-modal-hash, commit 6d64ae2, no licence stated; and
https://github.com/QinLab-WFU/CLIP-based-Cross-Modal-Hashing, which has the method too. None of it is used here.

CLIP is trained so that a long code of two-way softmax bits becomes the hash centre of the item's classes, bit by bit as
most of them have it. Short codes need no training: a fixed transform maps the long pairs to theirs. Centres and
transforms stand in `models/blocks/hash_centers.py`, their files in `models/blocks/center_files.py`.

Deviations from the authors' code:
1. Centres are generated from a seed and transforms are in closed form (which misses no bit of a class); the authors'
   files, which hold up to 18 % wrong bits, are read with `centers: file, transform: file`.
2. Centres and transforms are part of the checkpoint; the authors' checkpoints lack them and need their files.
3. Short lengths are taken in ascending order; the authors' order, and so their random bits, follow the file system.
4. A training item without labels is refused; `unlabelled: minus_one` gives it the code of -1 that the authors' has.
5. A last batch of one row trains: the image head then normalises by running statistics.
6. Evaluation normalises by running statistics, not by those of the batch as in QinLab's version.

Results reproduced: the golden case of the authors' code (tests/golden/TwDH-*.npz).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from common.errors import UserError
from common.losses import full_precision, pair_quantization
from common.registry import MODELS
from common.types import DataInfo, StepOutput
from models.blocks.center_files import HashCentersConfig, find_centers
from models.blocks.hash_centers import code_pairs, majority_codes
from models.blocks.heads import PAIR_HEAD_NAMES, AttentionPairHead, BatchNorm, pair_codes, pair_softmax
from models.blocks.pooled import PooledHashingModel


class TwDHConfig(HashCentersConfig):
    """`model:` section of TwDH."""

    unlabelled: Literal["refuse", "minus_one"]  # a training item without labels: an error, or the code -1 throughout
    quantization_weight: float = Field(ge=0)  # alpha_q of the long code; the short codes' has weight 1
    low_rate: float = Field(ge=0)  # rho_s, weight of everything about short codes; 0 only logs it


@MODELS.register("TwDH")
class TwDH(PooledHashingModel):
    """Two-way softmax hashing towards centres of classes; short codes are read off a long one.

    Args:
        config: `model:` section.
        data: What is known of the training data.
    """

    Config = TwDHConfig
    reference_names = (
        (r"^(clip|backbone)\.", "backbone."),
        (r"^(img|txt)_hash\.", r"hash.\1_hash."),  # QinLab's
        (r"^(image|text)_hash\..*", ""),  # heads that QinLab's model carries and never uses
        *PAIR_HEAD_NAMES,
    )
    reference_lacks = (r"long_centers", r"short_centers_\d+", r"transform_\d+")
    image_head: AttentionPairHead
    text_head: AttentionPairHead

    def __init__(self, config: TwDHConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.config = config
        self.short_bits = tuple(sorted(config.short_bits))
        width, classes = data.clip.shape.embed_dim, data.num_classes
        self.image_head = AttentionPairHead(width, config.long_bits, BatchNorm(width))
        self.text_head = AttentionPairHead(width, config.long_bits, nn.LayerNorm(width))
        self.register_buffer("long_centers", torch.zeros(classes, config.long_bits))
        for bits in self.short_bits:
            self.register_buffer(f"short_centers_{bits}", torch.zeros(classes, bits))
            self.register_buffer(f"transform_{bits}", torch.zeros(2 * config.long_bits, 2 * bits))

    @property
    def code_lengths(self) -> tuple[int, ...]:
        """The headline, the other short lengths, the long one."""
        return (self.bits, *(bits for bits in self.short_bits if bits != self.bits), self.config.long_bits)

    @property
    def marks(self) -> tuple[str, ...]:
        """How short codes come about, and the paper's metric."""
        c = self.config
        origin = {"closed_form": "in closed form", "trained": "trained", "file": "of a file"}[c.transform]
        return (
            f"short codes are read off the {c.long_bits}-bit code by a transform {origin}; hash centres: {c.centers}",
            "the paper reports mAP@5000 of the short codes as defined here by 'relevant': the mean over the first "
            "min(5000, relevant) relevant items, wherever they rank",
        )

    def prepare(self, data: DataInfo) -> None:
        """Loads CLIP's weights and fills centres and transforms."""
        super().prepare(data)
        labels = data.labels_of_training_set
        bare = int((~labels.any(dim=-1)).sum())
        if bare and self.config.unlabelled == "refuse":
            raise UserError(
                f"{bare} of {len(labels)} training items have no label, so TwDH has no hash centre for them; remove "
                "them from the data set, or set model.unlabelled=minus_one"
            )
        centers = find_centers(self.config, labels, data.cache_dir)
        self.get_buffer("long_centers").copy_(centers.long)
        for bits in self.short_bits:
            self.get_buffer(f"short_centers_{bits}").copy_(centers.short[bits])
            self.get_buffer(f"transform_{bits}").copy_(centers.transforms[bits])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; a state without centres is the authors', and takes the centres that it was trained with.

        Raises:
            UserError: If such a state meets generated centres.
        """
        if "long_centers" not in state_dict and self.config.centers == "generated":
            raise UserError(
                "the checkpoint holds no hash centres, as the authors' do not, and generated ones are not those it was "
                "trained with; convert theirs with data/convert_twdh_centers.py, then set model.centers=file "
                "model.transform=file model.center_folder=<folder>"
            )
        return super().load_state_dict(state_dict, strict, assign)

    def objective(self, image: Tensor, text: Tensor, labels: Tensor) -> StepOutput:
        """Loss of one batch; draws the bits of ties, for the long code first, then for the short ones by length.

        Args:
            image: Softmax pairs of long codes, [B, 2K].
            text: Softmax pairs of long codes, [B, 2K].
            labels: Multi-hot, [B, C].

        Returns:
            Loss and terms.
        """
        c = self.config
        target = self.target_pairs(labels, "long_centers")
        terms = {
            "center_image": F.binary_cross_entropy(image, target),
            "center_text": F.binary_cross_entropy(text, target),
            "quantization_image": pair_quantization(image),
            "quantization_text": pair_quantization(text),
        }
        loss = (terms["center_image"] + terms["center_text"]) / 2
        loss = loss + c.quantization_weight * (terms["quantization_image"] + terms["quantization_text"]) / 2
        both = torch.cat((image, text))  # as many rows of either, so means over both are means of means
        for bits in self.short_bits:
            short, target = self.shorten(both, bits), self.target_pairs(labels, f"short_centers_{bits}")
            center, quantization = F.binary_cross_entropy(short, torch.cat((target, target))), pair_quantization(short)
            loss = loss + c.low_rate * (center + quantization)
            terms |= {f"center_{bits}": center, f"quantization_{bits}": quantization}
        return StepOutput(loss, terms)

    def target_pairs(self, labels: Tensor, name: str) -> Tensor:
        """Pairs [B, 2K] of the majority codes of labels [B, C] among the named centres; ties agree in all rows."""
        centers = self.get_buffer(name)
        return code_pairs(majority_codes(labels, centers, self.draw_ties(centers.shape[1])))

    def draw_ties(self, bits: int) -> Tensor:
        """Uniformly random bits in {-1, +1}, [bits] on the CPU, from torch's global generator."""
        return torch.randint(2, (bits,)) * 2 - 1

    def shorten(self, pairs: Tensor, bits: int) -> Tensor:
        """Softmax pairs [B, 2S] of the short code of `bits` = S bits, from those of the long one [B, 2K]."""
        with full_precision(pairs.device):
            return pair_softmax(pairs @ self.get_buffer(f"transform_{bits}"))

    def binarise(self, relaxed: Tensor) -> Tensor:
        """Softmax pairs of long codes [B, 2K] -> codes of all lengths, [B, sum(code_lengths)]; short from soft long."""
        short = [self.shorten(relaxed, bits) for bits in self.code_lengths[:-1]]
        return torch.cat([pair_codes(x) for x in (*short, relaxed)], dim=-1)
