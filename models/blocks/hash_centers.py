"""Hash centres: a fixed code for every class, long and short, and the maps from long codes to short ones.

Long centres are rows of a Hadamard matrix, so any two differ in half of their bits. Short centres are, too, while the
matrix has rows enough; else balanced random codes that keep away from each other and from each other's negatives. A
transform maps the softmax pairs of a long code to logits of the pairs of a short one. Everything follows from a seed;
`models/blocks/center_files.py` keeps it in files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from common.errors import UserError
from common.losses import pair_quantization
from common.optim import build_optimizers
from common.optimizers.bert_adam import BertAdamConfig
from common.schemas import Section
from models.blocks.heads import pair_codes, pair_softmax
from utils.progress import progress

GENERATOR = "hadamard rows, else balanced codes, 1"  # change it with what the functions below generate
DRAWS = 20_000  # balanced random codes that are tried for every smallest distance
SHARPNESS = 8.0  # kappa of the closed form: how sharp its softmax is; codes do not depend on it


class TransformTraining(Section):
    """How a transform is trained."""

    epochs: int = Field(gt=0)  # over the training labels; training ends early once no bit of a class is wrong
    batch_size: int = Field(gt=0)  # rows of labels
    sparsity_weight: float = Field(ge=0)  # a, of the sum of absolute entries
    optimizer: BertAdamConfig  # one group, `transform`


@dataclass(frozen=True)
class HashCenters:
    """Centres of all lengths and the maps between them.

    Attributes:
        long: Long centres, [C, K] float32 in {-1, +1}.
        short: By length S: short centres, [C, S] float32 in {-1, +1}.
        transforms: By length S: map from long pairs to logits of short pairs, [2K, 2S] float32.
    """

    long: Tensor
    short: Mapping[int, Tensor]
    transforms: Mapping[int, Tensor]


# ---------------------------------------------------------------------------------------------- generation


def hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix, [size, size] float32 in {-1, +1}; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def long_centers(classes: int, bits: int, seed: int) -> Tensor:
    """Distinct random rows of the Hadamard matrix, never the first, which is all ones.

    Args:
        classes: C.
        bits: K, a power of two larger than C.
        seed: Of the choice.

    Returns:
        Centres, [C, K] float32: balanced, and any two at distance K / 2.

    Raises:
        UserError: If there is no such matrix or it has too few rows.
    """
    if not _has_hadamard(bits):
        raise UserError(f"model.long_bits={bits}: long centres are generated for powers of two, such as 512")
    if classes >= bits:
        enough = 1 << classes.bit_length()
        raise UserError(
            f"model.long_bits={bits}: {bits - 1} long centres exist, but the data set has {classes} classes; "
            f"set model.long_bits={enough} or more"
        )
    rows = 1 + _numbers(seed, 0, bits).permutation(bits - 1)[:classes]
    return hadamard(bits)[torch.from_numpy(rows)]


def short_centers(classes: int, bits: int, seed: int, fallback: Literal["balanced", "hadamard_pm"]) -> Tensor:
    """Hadamard rows while they suffice, else what `fallback` says.

    Args:
        classes: C.
        bits: K.
        seed: Of the choice.
        fallback: `balanced`: random codes, half +1, whose distances lie in [d, K - d] for the largest d at which C of
            20,000 draws are found, so that no two cancel in an item that has both classes. `hadamard_pm`: rows and
            negated rows of the Hadamard matrix, without the first.

    Returns:
        Centres, [C, K] float32 in {-1, +1}.

    Raises:
        UserError: If there are not so many codes of this kind.

    Source:
        TwDH's centres (after CSQ, CVPR 2020); the distance rule is this library's.
    """
    numbers = _numbers(seed, 1, bits)
    if _has_hadamard(bits):
        rows = hadamard(bits)[1:]
        if fallback == "hadamard_pm" and classes > len(rows):
            rows = torch.cat((rows, -rows))
        if classes <= len(rows):
            return rows[torch.from_numpy(numbers.permutation(len(rows))[:classes])]
    if fallback == "balanced":
        for distance in range(bits // 2, 0, -1):
            found = _apart(_balanced(numbers, bits), classes, distance)
            if found is not None:
                return found
    raise UserError(
        f"model.short_bits: no {classes} short centres of {bits} bits were found ({fallback}), one for each class; "
        "use more bits"
    )


def _apart(candidates: Tensor, count: int, distance: int) -> Tensor | None:
    """The first `count` rows, each at least `distance` from those before and from their negatives; None if too few."""
    bits = candidates.shape[1]
    accepted: list[Tensor] = []
    while len(accepted) < count and len(candidates):
        accepted.append(candidates[0])
        candidates = candidates[(candidates @ candidates[0]).abs() <= bits - 2 * distance]
    return torch.stack(accepted) if len(accepted) == count else None


def _balanced(numbers: np.random.Generator, bits: int) -> Tensor:
    """Random codes of which half of the bits (rounded down) are +1, [20000, bits]."""
    ranks = numbers.random((DRAWS, bits)).argsort(axis=1).argsort(axis=1)
    return torch.from_numpy(np.where(ranks < bits // 2, 1.0, -1.0).astype(np.float32))


def _has_hadamard(bits: int) -> bool:
    return bits > 1 and bits & (bits - 1) == 0


def _numbers(seed: int, purpose: int, bits: int) -> np.random.Generator:
    """Random numbers of their own for every purpose and length."""
    return np.random.default_rng((seed, purpose, bits))


# ---------------------------------------------------------------------------------------------- codes and transforms


def majority_codes(labels: Tensor, centers: Tensor, ties: Tensor) -> Tensor:
    """Every bit as most of a row's classes have it.

    Args:
        labels: Multi-hot, [B, C].
        centers: Code of every class, [C, K] in {-1, +1}.
        ties: Bits that stand where the classes are divided, [K] in {-1, +1}.

    Returns:
        Codes in {-1, +1}, [B, K], of the centres' type; -1 throughout for a row without labels.

    Source:
        TwDH, TMM 2024, targets of multi-label items; rows without labels as in the authors' code.
    """
    labels = labels.to(centers)
    votes = labels @ centers
    codes = torch.where(votes == 0, ties.to(centers), votes.sign())
    return torch.where(labels.any(dim=-1, keepdim=True), codes, -1.0)


def code_pairs(codes: Tensor) -> Tensor:
    """Codes [B, K] in {-1, +1} as pairs [B, 2K]: 1, 0 for -1, and 0, 1 for +1."""
    plus = codes > 0
    return rearrange([~plus, plus], "two B K -> B (K two)").to(codes)


def closed_form_transform(long: Tensor, short: Tensor) -> Tensor:
    """The least-squares map from long to short centres, written in pairs; exact for independent long centres.

    With M = pinv(long) short, entry (2i + a, 2j + b) is 4 M[i, j] for a = b and -4 M[i, j] else, so a short bit's
    logits differ by 8 (x M)[j] for a long code x.

    Args:
        long: Long centres, [C, K].
        short: Short centres, [C, S].

    Returns:
        Transform, [2K, 2S] float32.
    """
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    return torch.kron(SHARPNESS / 2 * (torch.linalg.pinv(long.double()) @ short.double()), signs).float()


def wrong_bits(transform: Tensor, long: Tensor, short: Tensor) -> float:
    """Fraction of the short centres' bits that the transform [2K, 2S] misses, from centres [C, K] and [C, S]."""
    return float((pair_codes(code_pairs(long) @ transform) != short).double().mean())


def train_transform(labels: Tensor, long: Tensor, short: Tensor, config: TransformTraining, seed: int) -> Tensor:
    """Learns the map from the majority codes of label sets; ends early when it misses no bit of a class.

    The loss of a batch, with p the softmax pairs of the mapped long majority code and z the pairs of the short one:
    `quantisation(p) + BCE(p, z) + a sum |T|`; ties are drawn for every batch.

    Args:
        labels: Of the training split, [N, C] multi-hot.
        long: Long centres, [C, K].
        short: Short centres, [C, S].
        config: Settings.
        seed: Of start, order and ties.

    Returns:
        Transform, [2K, 2S] float32.

    Source:
        TwDH, TMM 2024, second step, as the authors' script trains it.
    """
    bits = short.shape[1]
    draw = torch.Generator().manual_seed(int(_numbers(seed, 2, bits).integers(2**63)))
    transform = nn.Parameter(torch.rand(2 * long.shape[1], 2 * bits, generator=draw) * 2 - 1)
    batches = -(-len(labels) // config.batch_size)
    groups = {"transform": {"transform": [transform]}}
    optimizer = build_optimizers({"transform": config.optimizer}, groups, batches * config.epochs)["transform"]

    def ties(length: int) -> Tensor:
        return torch.randint(2, (length,), generator=draw) * 2 - 1

    with progress(total=batches * config.epochs, desc=f"transform to {bits} bits", unit="step", leave=False) as bar:
        for _ in range(config.epochs):
            for rows in torch.split(torch.randperm(len(labels), generator=draw), config.batch_size):
                source = code_pairs(majority_codes(labels[rows], long, ties(long.shape[1])))
                target = code_pairs(majority_codes(labels[rows], short, ties(bits)))
                pairs = pair_softmax(source @ transform)
                loss = pair_quantization(pairs) + F.binary_cross_entropy(pairs, target)
                loss = loss + config.sparsity_weight * transform.abs().sum()
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                bar.update()
            missed = wrong_bits(transform.detach(), long, short)
            bar.set_postfix_str(f"{missed:.1%} of class bits wrong", refresh=False)
            if missed == 0:
                break
    return transform.detach()
