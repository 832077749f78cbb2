"""DGHDGH: its losses by loops over triplets, the order of its stages, means over an epoch, its options."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.types import Progress
from models.blocks.pair_graph import NodeBlock, PairGraph
from models.dghdgh import DGHDGH, SyntheticNegatives, directions, synthetic_triplet_loss, synthetic_weight, triplet_loss
from runners.steps import updates
from tests.tiny_models import build, descents, rows_of
from tests.worked import multi_hot, wave

DOUBLE = torch.float64
B, K, C = 6, 4, 5


def small(tmp_path: Path, **overrides: Any) -> DGHDGH:
    """DGHDGH on the tiny CLIP, without dropout."""
    model = build("DGHDGH", str(tmp_path), dropout=0.0, graph_dropout=0.0, **overrides)
    assert isinstance(model, DGHDGH)
    return model.train()


def units() -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of both modalities, [6, 4], and which items are similar."""
    image, text = (F.normalize(wave(start, B, K, DOUBLE), dim=-1) for start in (0.2, 0.9))
    labels = multi_hot(B, C).double()
    return image, text, labels @ labels.T > 0


def test_losses_by_loops() -> None:
    image, text, similar = units()
    moves = torch.sigmoid(wave(0.4, B * B, K, DOUBLE)).view(B, B, K)
    classifier = nn.Linear(K, C).double()
    labels = multi_hot(B, C).double()
    count = 0
    for number, pairs in enumerate(directions(image, text, similar)):
        a, b = ((image, image), (image, text), (text, image), (text, text))[number]
        costs, synthetic, entropies, cosines = [], [], [], []
        for i in range(B):
            for p in range(B):
                for n in range(B):
                    if not similar[i, p] or similar[i, n] or (p == i and number in (0, 3)):
                        continue
                    d_p, d_n = float((a[i] - b[p]).norm()), float((a[i] - b[n]).norm())
                    r = (1 - moves[i, n]) * d_p / d_n + moves[i, n]
                    z = (1 - r) * a[i] + r * b[n] if d_p < d_n else b[n]
                    cosines.append(float(F.cosine_similarity(a[i], z, dim=0)))
                    costs.append(float(a[i] @ b[n] - a[i] @ b[p]) + 0.25)
                    if float(a[i] @ b[p]) < cosines[-1]:
                        synthetic.append(cosines[-1] - float(a[i] @ b[p]) + 0.25)
                    entropies.append(-(labels[n] * classifier(z).log_softmax(-1)).sum().item())
        count += len(cosines)
        negatives = SyntheticNegatives(pairs, moves)
        assert negatives.cosines().tolist() == pytest.approx(cosines, abs=1e-12)
        positive = [cost for cost in costs if cost > 0]
        assert float(triplet_loss(pairs, 0.25)) == pytest.approx(sum(positive) / len(positive), abs=1e-12)
        found = float(synthetic_triplet_loss(pairs, negatives.cosines(), 0.25))
        assert found == pytest.approx(sum(synthetic) / len(synthetic), abs=1e-12)
        entropy = negatives.cross_entropy(classifier, labels).item()
        assert entropy == pytest.approx(sum(entropies) / len(entropies), abs=1e-12)
    assert count > 40


def test_class_scores_in_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, similar = units()
    moves = torch.sigmoid(wave(0.4, B * B, K, DOUBLE)).view(B, B, K).requires_grad_()
    classifier, pairs = nn.Linear(K, C).double(), list(directions(image, text, similar))[1]
    found = []
    for at_once in (1 << 18, 7):
        monkeypatch.setattr("models.dghdgh._TRIPLETS_AT_ONCE", at_once)
        entropy = SyntheticNegatives(pairs, moves).cross_entropy(classifier, multi_hot(B, C).double())
        found.append((entropy.item(), torch.autograd.grad(entropy, moves)[0]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("mean", "released", "intended"),
    [(1e6, 0.1, 0.1), (2.0, 0.1, 1 - math.exp(-1)), (0.87, 0.1, 1 - math.exp(-2 / 0.87)), (0.86, 0.9, 0.9)],
)
def test_weight_of_synthetic_triplets(mean: float, released: float, intended: float) -> None:
    generator_mean = torch.tensor(mean)
    assert float(synthetic_weight(generator_mean, 2.0, False)) == pytest.approx(released, abs=1e-6)
    assert float(synthetic_weight(generator_mean, 2.0, True)) == pytest.approx(intended, abs=1e-6)


def test_stages_update_their_own_parameters_and_means_begin_anew_with_an_epoch(tmp_path: Path) -> None:
    model = small(tmp_path)
    optimizers, batch = descents(model, 0.1), rows_of().only(model.fields)
    sums = []
    for step in range(3):
        output = model(batch, Progress(epoch=step // 2, epochs=2, step=step, steps_per_epoch=2))
        before: dict[str, Tensor] = {}
        for name, done in updates(output, optimizers):
            now = {key: value.clone() for key, value in model.named_parameters()}
            if name == "generator":  # the classifier's update is made, its own is not
                moved = {key.partition(".")[0] for key in now if not torch.equal(now[key], before[key])}
                assert moved == {"classifier"}
                sums.append((output.terms["triplet"].item(), done.loss.item()))
            before = now
        moved = {
            key.partition(".")[0] for key, value in model.named_parameters() if not torch.equal(value, before[key])
        }
        assert moved == {"generator"}
        triplets, losses = (sum(column) for column in zip(*sums[step // 2 * 2 :], strict=True))
        assert model.triplet_sum.item() == pytest.approx(triplets, rel=1e-6)
        assert model.generator_sum.item() == pytest.approx(losses, rel=1e-6)


def test_a_target_that_may_hear_nobody_hears_all_alike() -> None:
    block = NodeBlock(8, heads=2)
    nodes, edges = torch.randn(3, 8), torch.zeros(3, 3, 8)
    deaf = block(nodes, nodes, edges, torch.ones(3, 3, dtype=torch.bool))
    torch.nn.init.zeros_(block.query.weight)
    torch.testing.assert_close(deaf, block(nodes, nodes, edges, torch.zeros(3, 3, dtype=torch.bool)))


def test_equal_entries_correlate_with_nothing() -> None:
    graph = PairGraph(8, classes=3, layers=1, heads=2, dropout=0.0)
    scores, values = graph(torch.ones(4, 8), torch.randn(4, 8), torch.eye(4, dtype=torch.bool))
    assert scores.isfinite().all() and values.isfinite().all() and values.shape == (4, 4, 8)
