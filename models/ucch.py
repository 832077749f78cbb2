"""UCCH: unsupervised contrastive cross-modal hashing. Labels never reach it.

Paper: P. Hu, H. Zhu, J. Lin, D. Peng, Y.-P. Zhao, X. Peng, "Unsupervised Contrastive Cross-modal Hashing", IEEE TPAMI
45(3), 2023, https://doi.org/10.1109/TPAMI.2022.3177356.
Authors' code: https://github.com/penghu-cs/UCCH, commit 0c20e62, no licence stated; none of it is used here.

Two perceptrons map features of pictures and of texts to unit vectors. A contrastive loss compares each of them with
binary vectors from a memory, which holds an average of both modalities over time for every pair of the training split.
A ranking loss compares the pictures and texts of a batch; of its negatives, those that are easy have less weight.

Deviations from the authors' code:
1. Features are those of frozen CLIP by default, not normalised; the release has VGG features and bags of words or
   document vectors, which `input: features` takes.
2. The memory starts at signs that are fair draws; in the release a value is positive with probability 0.31
   (`memory_init: reference`).
3. The memory is part of the checkpoint; a run of the release that goes on starts with a new one.
4. The last partial batch of an epoch is kept; in the first epochs its rows have fewer negatives.
5. The epoch is chosen as for all methods; the release chooses it by labels of training pairs.
6. The rate is constant. The release lowers it for the first time after 30 epochs, of which it trains 20.
7. A code has no zeros: the sign of an exact 0 is +1. Memory targets keep their zeros, as in the release.
8. A training split with fewer pairs than negatives is refused; the release draws the same ones over and over.
The negatives may hold the pair itself, as in the release.

Results reproduced: the golden cases of the authors' code (tests/golden/UCCH-*.npz).
"""

import math
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from common.errors import UserError
from common.losses import full_precision
from common.registry import MODELS
from common.types import Batch, DataInfo, Progress, StepOutput
from models.base import ParamGroups
from models.blocks.frozen import FrozenFeaturesConfig, FrozenFeaturesModel
from models.blocks.heads import sign_codes
from models.blocks.memory import MemoryBank
from utils.distributed import gather_rows

Widths = Annotated[list[Annotated[int, Field(gt=0)]], Field(max_length=16)]


class UCCHConfig(FrozenFeaturesConfig):
    """`model:` section of UCCH."""

    image_hidden: Widths  # widths of the hidden layers of the pictures' perceptron; [8192, 8192]
    text_hidden: Widths  # ... of the texts'; [8192]
    memory_init: Literal["fair", "reference"]  # probability of a positive value at the start: 0.5, or 0.31
    memory_momentum: float = Field(gt=0, lt=1)  # m, share of a row of the memory that a step keeps; 0.4
    warmup_epochs: int = Field(ge=0)  # epochs in which the batch stands in for the memory; 1
    negatives: int = Field(gt=0)  # n, drawn from the memory for every row of a batch; 4096
    temperature: float = Field(ge=0.02)  # T, of the contrast; far below, exponentials leave the range of float32
    contrast_share: float = Field(ge=0, le=1)  # alpha; the ranking loss has the rest
    margin: float = Field(ge=0)  # delta: a negative is easy if it is farther than the positive by more
    shift: float = Field(ge=0)  # s, by which the cosine of an easy negative is lowered


def perceptron(width: int, hidden: list[int], bits: int) -> nn.Sequential:
    """Linear maps with ReLU between them; torch's default initialisation.

    Args:
        width: Width of the input.
        hidden: Widths between the maps.
        bits: K.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise([width, *hidden, bits]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@MODELS.register("UCCH")
class UCCH(FrozenFeaturesModel):
    """Unsupervised contrast with a binary memory, and ranking within the batch, on frozen features.

    Args:
        config: `model:` section.
        data: What is known of the training data.

    Raises:
        UserError: If there are more negatives than training pairs.
    """

    Config = UCCHConfig
    reference_names = (
        (r"^image_model(?:_state_dict)?\.fc\.", "image_net."),
        (r"^text_model(?:_state_dict)?\.fc\.", "text_net."),
    )
    reference_lacks = (*FrozenFeaturesModel.reference_lacks, r"memory\..*")  # codes do not depend on it

    def __init__(self, config: UCCHConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.config = config
        if config.negatives > data.num_train:
            raise UserError(
                f"model.negatives is {config.negatives}, but the training split has {data.num_train} pairs to draw "
                f"them from; set model.negatives={data.num_train} or lower"
            )
        self.image_net = perceptron(self.image_width, config.image_hidden, config.bits)
        self.text_net = perceptron(self.text_width, config.text_hidden, config.bits)
        self.memory = MemoryBank(data.num_train, config.bits)

    def prepare(self, data: DataInfo) -> None:
        """Loads CLIP's weights and fills the memory with +-1/sqrt(K)."""
        super().prepare(data)
        self.memory.fill_normal(torch.Generator().manual_seed(data.seed))
        bound = 0.5 if self.config.memory_init == "reference" else 0.0  # P(normal > 0.5) = 0.31
        self.memory.rows.copy_(sign_codes(self.memory.rows - bound) / math.sqrt(self.bits))

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One step's loss over the global batch; writes the memory."""
        c = self.config
        image_features, text_features = self.training_features(batch)
        image = unit_vectors(gather_rows(self.image_net(image_features)))
        text = unit_vectors(gather_rows(self.text_net(text_features)))
        index = gather_rows(batch["index"])
        warming_up = progress.epoch < c.warmup_epochs
        with full_precision(image.device):
            if warming_up:
                targets = (image + text).detach().sign()
                counts = torch.ones(len(index), len(index), device=index.device)
                own = torch.arange(len(index), device=index.device)
            else:
                targets, counts, own = self.memory.rows.sign(), self.draw(index), index
            contrast_image = memory_contrast(image, targets, counts, own, c.temperature)
            contrast_text = memory_contrast(text, targets, counts, own, c.temperature)
            ranking = ranking_loss(image @ text.T, c.margin, c.shift)
            self.remember_pairs(index, image.detach(), text.detach(), 0.0 if warming_up else c.memory_momentum)
        loss = c.contrast_share * (contrast_image + contrast_text) + (1 - c.contrast_share) * ranking
        terms = {"contrast_image": contrast_image, "contrast_text": contrast_text, "ranking": ranking}
        return StepOutput(loss, terms)

    def draw(self, index: Tensor) -> Tensor:
        """How often each item of the training split is a candidate of each row: itself once, and n uniform draws.

        Args:
            index: Places of the rows in the training split, [B] int64.

        Returns:
            [B, N] float32; a row sums to n + 1.
        """
        places = torch.randint(len(self.memory.rows), (len(index), self.config.negatives), device=index.device)
        return self.count(torch.cat([index[:, None], places], dim=1))

    def count(self, places: Tensor) -> Tensor:
        """How often each item of the training split stands in each row of `places` [B, n]: [B, N] float32."""
        counts = torch.zeros(len(places), len(self.memory.rows), device=places.device)
        return counts.scatter_add_(1, places, torch.ones(places.shape, device=places.device))

    def remember_pairs(self, index: Tensor, image: Tensor, text: Tensor, momentum: float) -> None:
        """Moves rows of the memory to the mean of both modalities.

        Args:
            index: Places in the training split, [B] int64.
            image: Unit vectors of the pictures, [B, K]; constants.
            text: Unit vectors of the texts, [B, K]; constants.
            momentum: m, share of the row that stays.
        """
        pair = F.normalize((image + text) / 2, dim=-1)
        self.memory.write(index, F.normalize(momentum * self.memory.rows[index] + (1 - momentum) * pair, dim=-1))

    def encode_image(self, batch: Batch) -> Tensor:
        """Codes of pictures, [B, K]."""
        return sign_codes(self.image_net(self.image_features(batch)))

    def encode_text(self, batch: Batch) -> Tensor:
        """Codes of texts, [B, K]."""
        return sign_codes(self.text_net(self.text_features(batch)))

    def param_groups(self) -> ParamGroups:
        """One optimizer, so that gradients of both perceptrons are clipped together; CLIP is in none."""
        return {"main": {"image": list(self.image_net.parameters()), "text": list(self.text_net.parameters())}}


def unit_vectors(outputs: Tensor) -> Tensor:
    """Outputs of a perceptron [B, K] -> tanh at norm 1, [B, K] float32; a row of zeros stays 0."""
    return F.normalize(outputs.float().tanh(), dim=-1)


def memory_contrast(vectors: Tensor, targets: Tensor, counts: Tensor, own: Tensor, temperature: float) -> Tensor:
    """Each vector should choose its own pair's binary target among the candidates.

    Candidates are given by how often they were drawn: `log sum_k e^x_k` over draws is `log sum_j count_j e^x_j` over
    targets, without a row in memory for every draw.

    Args:
        vectors: Unit vectors of one modality, [B, K].
        targets: Vectors of -1, 0 and +1, [D, K]; constants.
        counts: How often a target is a candidate of a row, its own included, [B, D] float32, >= 0.
        own: Which target is a row's own, [B] int64.
        temperature: T, of cosines.

    Returns:
        Scalar, mean over rows.

    Source:
        UCCH, TPAMI 2023, cross-modal contrastive loss.
    """
    scale = temperature * math.sqrt(vectors.shape[1])
    drawn = (vectors @ targets.T / scale + counts.log()).logsumexp(dim=1)
    return (drawn - (vectors * targets[own]).sum(dim=1) / scale).mean()


def ranking_loss(cosines: Tensor, margin: float, shift: float) -> Tensor:
    """A pair should be nearer than all others of its row and of its column; those that are easy count as farther still.

    Args:
        cosines: Of pictures (rows) and texts (columns), [B, B]; pairs stand on the diagonal.
        margin: delta; an entry is easy if it is below its pair's by more.
        shift: s, by which an easy entry is lowered.

    Returns:
        Scalar: 2 delta for a single pair.

    Source:
        UCCH, TPAMI 2023, cross-modal ranking loss; its tau is 1 in the authors' code.
    """
    pair = cosines.diagonal()
    by_row = torch.where(cosines >= pair[:, None] - margin, cosines, cosines - shift)
    by_column = torch.where(cosines >= pair[None] - margin, cosines, cosines - shift)
    return (by_row.logsumexp(1) - pair + margin).mean() + (by_column.logsumexp(0) - pair + margin).mean()
