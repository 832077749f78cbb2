"""DNcH: worked values of the loss, mining by hand, rows without or with all labels."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.dnch import DNcH, pass_over_easy_pairs
from tests.tiny_models import build
from tests.worked import multi_hot, wave

DOUBLE = torch.float64


def worked_codes() -> tuple[Tensor, Tensor, Tensor]:
    """Relaxed codes of both modalities, [6, 4], and prototypes, [5, 4]; float64."""
    starts = ((1.5, 0.2, 6), (1.5, 0.9, 6), (1.0, 2.0, 5))
    image, text, prototypes = (torch.tanh(a * wave(s, n, 4, DOUBLE)).requires_grad_() for a, s, n in starts)
    return image, text, prototypes


def small(tmp_path: Path, **overrides: Any) -> DNcH:
    """DNcH on the tiny CLIP, with 4 bits."""
    model = build("DNcH", str(tmp_path), bits=4, **overrides)
    assert isinstance(model, DNcH)
    return model


def test_worked_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(tmp_path)
    image, text, prototypes = worked_codes()
    monkeypatch.setattr(type(model.prototypes), "forward", lambda _: prototypes)
    out = model.objective(image, text, multi_hot(6, 5))
    wanted = (0.5794400695, 0.6234527789, 0.9091419003, 1.0375566567, 3.6698096015, 3.4879139939)
    assert [term.item() for term in out.terms.values()] == pytest.approx(wanted, abs=1e-9)
    assert out.loss.item() == pytest.approx(3.8653637649, abs=1e-9)
    torch.autograd.backward(out.loss)
    norms = [float(x.grad.norm()) for x in (image, text, prototypes) if x.grad is not None]
    assert norms == pytest.approx((0.3092898282, 0.3352043524, 0.4888086970), abs=1e-9)


def contrast_by_loops(a: Tensor, b: Tensor, prototypes: Tensor, labels: Tensor, strict: bool) -> float:
    """The contrast for temperature 0.2, margin 0.3 and delta 0.5, as the paper's sums."""
    units = [torch.nn.functional.normalize(x).tolist() for x in (a, b, prototypes)]
    rows, total = labels.tolist(), 0.0

    def cosine(x: list[float], y: list[float]) -> float:
        return sum(u * v for u, v in zip(x, y, strict=True))

    for own, anchor in zip(rows, units[0], strict=True):
        to_items = [cosine(anchor, x) for x in units[1]]
        to_classes = [cosine(anchor, x) for x in units[2]]
        alike = [cosine(own, other) > 0 for other in rows]
        zeros = [] if strict else [0.0]
        lowest = min([d for d, s in zip(to_items, alike, strict=True) if s] + (zeros if not all(alike) else []))
        highest = max([d for d, s in zip(to_items, alike, strict=True) if not s] + zeros, default=-math.inf)
        sums = {True: 0.0, False: 0.0}
        for d, s in zip(to_items, alike, strict=True):
            easy = d - 0.3 >= highest if s else d + 0.3 <= lowest
            mined = 0.0 if easy else d
            sums[s] += math.exp(d / 0.2 + (-0.5 * (1 + mined) / 4 if s else 0.5 * (mined - 1)))
        for kind in (True, False):
            share = sum(s is kind for s in alike) / max(1, sum((y > 0) is kind for y in own))
            for e, y in zip(to_classes, own, strict=True):
                if (y > 0) is kind:
                    sums[kind] += share * math.exp(e / 0.2 + (-0.5 * (1 + e) / 4 if kind else 0.5 * (e - 1)))
        total -= math.log(sums[True] / (sums[True] + sums[False]))
    return total / len(rows)


@pytest.mark.parametrize("strict", [False, True])
def test_contrast_by_loops(strict: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(tmp_path, temperature=0.2, margin=0.3, delta=0.5, strict_mining=strict)
    image, text, prototypes = (x.detach() for x in worked_codes())
    monkeypatch.setattr(type(model.prototypes), "forward", lambda _: prototypes)
    out, labels = model.objective(image, text, multi_hot(6, 5)), multi_hot(6, 5)
    for name, (a, b) in {"image": (image, image), "i2t": (image, text), "t2i": (text, image)}.items():
        wanted = contrast_by_loops(a, b, prototypes, labels, strict)
        assert out.terms[f"contrast_{name}"].item() == pytest.approx(wanted, abs=1e-9)


def test_mining_by_hand() -> None:
    cosines = torch.tensor([[0.9, 0.2, 0.1, -0.4]])
    similar = torch.tensor([[True, True, False, False]])
    loose = pass_over_easy_pairs(cosines, similar, margin=0.5, strict=False)  # bounds 0 and 0.1
    assert torch.equal(loose, torch.tensor([[0.0, 0.2, 0.1, -0.4]]))
    strict = pass_over_easy_pairs(cosines, similar, margin=0.5, strict=True)  # bounds 0.2 and 0.1
    assert torch.equal(strict, torch.tensor([[0.0, 0.2, 0.1, 0.0]]))


def test_a_row_without_labels_is_no_anchor_but_a_candidate(tmp_path: Path) -> None:
    model, labels = small(tmp_path).double(), multi_hot(6, 5)
    labels[2] = 0
    image, text, _ = worked_codes()
    before = model.objective(image, text, labels)
    torch.autograd.backward(before.loss)
    assert before.loss.isfinite() and image.grad is not None and image.grad[2].abs().sum() > 0
    kept = torch.tensor([0, 1, 3, 4, 5])
    rows = model.objective(image[kept], text[kept], labels[kept])
    assert before.terms["contrast_image"] > rows.terms["contrast_image"]  # one more candidate that nobody wants
    entropies = before.terms["classification_image"].item() * 6, rows.terms["classification_image"].item() * 5
    assert entropies[0] == pytest.approx(entropies[1])


def test_a_row_of_all_labels_has_nothing_to_keep_apart_from(tmp_path: Path) -> None:
    image, text, _ = worked_codes()
    out = small(tmp_path).double().objective(image, text, torch.ones(6, 5))
    assert all(out.terms[f"contrast_{name}"].item() == 0 for name in ("image", "text", "i2t", "t2i"))
