"""DCMHT: worked values of heads and losses."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.losses import pair_quantization
from common.similarity import label_similarity
from common.types import Progress
from models.blocks.heads import AttentionPairHead, BatchNorm, pair_codes, pair_softmax
from models.dcmht import (
    DCMHT,
    SelectHead,
    clipped_cosine_entropy,
    cosine_contrast,
    euclidean_contrast,
    tanh_quantization,
)
from tests.tiny_models import SHAPE, build, rows_of
from tests.worked import filled, multi_hot, wave

START = Progress(epoch=0, epochs=1, step=0, steps_per_epoch=1)


def worked_pairs() -> tuple[Tensor, Tensor, Tensor]:
    """Softmax pairs U and V [6, 8] and their label similarity [6, 6]."""
    u, v = pair_softmax(2 * wave(0.3, 6, 8)), pair_softmax(2 * wave(1.1, 6, 8))
    labels = multi_hot(6, 5)
    return u, v, label_similarity(labels, labels)


def test_worked_select_head() -> None:
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (128, 8), "fc.bias": (128,)}
    for bit in range(3):
        shapes |= {f"hash_list.{bit}.weight": (2, 128), f"hash_list.{bit}.bias": (2,)}
    state = DCMHT.import_reference({f"image_hash.{name}": value for name, value in filled(shapes).items()})
    head = SelectHead(8, 3)
    head.load_state_dict({name.removeprefix("image_head."): value for name, value in state.items()})
    out = head(3 * wave(0.3, 5, 8))
    assert float(out.detach().square().sum()) == pytest.approx(7.827989651, rel=1e-6)
    first = [0.540413018, 0.459586982, 0.385384573, 0.614615427, 0.339307196, 0.660692804]
    torch.testing.assert_close(out[0], torch.tensor(first))


def unified_head(norm: nn.Module) -> AttentionPairHead:
    shapes = {
        "atten.in_proj_bias": (24,),
        "atten.in_proj_weight": (24, 8),
        "atten.out_proj.bias": (8,),
        "atten.out_proj.weight": (8, 8),
        "fc2.bias": (6,),
        "fc2.weight": (6, 8),
        "norm.bias": (8,),
        "norm.weight": (8,),
    }
    values = filled(shapes, norms=("norm",), scale=0.5)
    values["norm.bias"] = values["norm.bias"] / 5
    state = DCMHT.import_reference({f"hash.img_hash.{name}": value for name, value in values.items()})
    head = AttentionPairHead(8, 3, norm)
    head.load_state_dict({name.removeprefix("image_head."): value for name, value in state.items()}, strict=False)
    return head


def test_worked_unified_head_with_batch_norm() -> None:
    norm = BatchNorm(8)
    head = unified_head(norm)
    out = head(3 * wave(0.3, 5, 8)).detach()
    assert float(out.square().sum()) == pytest.approx(7.747160693, rel=1e-6)
    first = [0.526919819, 0.473080181, 0.496243231, 0.503756769, 0.5, 0.5]
    torch.testing.assert_close(out.flatten()[:6], torch.tensor(first))
    assert norm.running_mean is not None and norm.running_var is not None
    torch.testing.assert_close(norm.running_mean[:3], torch.tensor([0.019841169, 0.053275201, 0.063099485]))
    assert float(norm.running_var[0]) == pytest.approx(0.902038488, rel=1e-6)
    out = head.eval()(3 * wave(0.3, 5, 8)).detach()
    assert float(out.square().sum()) == pytest.approx(8.468398252, rel=1e-6)
    assert float(out[0, 0]) == pytest.approx(0.682017065, rel=1e-6)


def test_worked_unified_head_with_layer_norm() -> None:
    out = unified_head(nn.LayerNorm(8))(3 * wave(0.3, 5, 8)).detach()
    assert float(out.square().sum()) == pytest.approx(9.880451430, rel=1e-6)
    first = [0.782136758, 0.217863242, 0.787220921, 0.212779079, 0.748558823, 0.251441177]
    torch.testing.assert_close(out.flatten()[:6], torch.tensor(first))


@pytest.mark.parametrize(
    ("margin", "negatives", "total", "norms"),
    [
        (0.5, (0.4681734302, 0.3302520188, 0.4279373927), 4.0147202883, (1.0213633921, 1.2154432415)),
        (0.75, (0.8174732430, 0.6460941828, 0.7552844364), 5.0072093087, (0.8994611554, 1.0678359056)),
    ],
)
def test_worked_euclidean_loss(
    margin: float, negatives: tuple[float, ...], total: float, norms: tuple[float, ...]
) -> None:
    u, v, similar = worked_pairs()
    u.requires_grad_()
    v.requires_grad_()
    distance = (2 * 4 * margin) ** 0.5
    loss = torch.zeros(())
    pairs = ((u, v, 0.9288492807), (u, u, 0.9179873855), (v, v, 0.9415207805))
    for (a, b, positive), negative in zip(pairs, negatives, strict=True):
        pull, push = euclidean_contrast(a, b, similar, distance, 2)
        assert float(pull) == pytest.approx(positive, rel=1e-6)
        assert float(push) == pytest.approx(negative, rel=1e-6)
        loss = loss + pull + push
    assert float(loss) == pytest.approx(total, rel=1e-6)
    loss.backward()
    assert u.grad is not None and v.grad is not None
    assert (float(u.grad.norm()), float(v.grad.norm())) == pytest.approx(norms, rel=1e-5)


def test_worked_other_losses() -> None:
    u, v, similar = worked_pairs()

    def pair(values: tuple[Tensor, Tensor]) -> tuple[float, float]:
        return float(values[0]), float(values[1])

    assert pair(euclidean_contrast(u, v, similar, 6**0.5, 1)) == pytest.approx((0.6233518182, 0.4666709359), rel=1e-6)
    assert pair(cosine_contrast(u, v, similar, 0.1, 1)) == pytest.approx((0.1132759061, 0.2508142078), rel=1e-5)
    assert pair(cosine_contrast(u, v, similar, 0.1, 2)) == pytest.approx((0.0538834507, 0.1975333174), rel=1e-5)
    assert float(clipped_cosine_entropy(u, v, similar, 0.1)) == pytest.approx(0.7535515508, rel=1e-6)
    assert (float(pair_quantization(u)), float(pair_quantization(v))) == pytest.approx(
        (0.5161752975, 0.5118984094), rel=1e-6
    )


def test_worked_codes_and_ties() -> None:
    u, _, _ = worked_pairs()
    rows = ["+-+-", "--+-", "-+-+", "-+-+", "-+--", "+-+-"]
    wanted = torch.tensor([[1.0 if sign == "+" else -1.0 for sign in row] for row in rows])
    assert torch.equal(pair_codes(u), wanted)
    assert torch.equal(pair_codes(torch.full((1, 4), 0.5)), torch.tensor([[-1.0, -1.0]]))


def test_tanh_quantization_by_hand() -> None:
    assert float(tanh_quantization(torch.tensor([[0.4, -0.2], [1.0, -1.0]]))) == pytest.approx(0.25)


def test_equal_rows_without_labels_have_finite_gradients() -> None:
    rows = torch.ones(3, 4, requires_grad=True)
    pull, push = euclidean_contrast(rows, rows, torch.zeros(3, 3), 1.0, 1)
    (pull + push).backward()
    assert rows.grad is not None and rows.grad.isfinite().all()


def test_only_clipping_bounds_the_threshold(tmp_path: Path) -> None:
    """The authors' slack may be any cosine distance; with Euclidean distances nothing reads it."""
    for similarity, threshold in (("cosine", 0.5), ("cosine", 1.2), ("euclidean", 0.0), ("euclidean", 0.5)):
        model = build("DCMHT", str(tmp_path), similarity=similarity, cosine_threshold=threshold)
        assert model(rows_of(), START).loss.isfinite()
    for threshold in (0.0, 0.5):
        with pytest.raises(ValueError, match="between 0 and 0.5"):
            build("DCMHT", str(tmp_path), similarity="clipped_cosine", cosine_threshold=threshold)


def test_initial_weights_follow_the_number_of_outputs() -> None:
    head = SelectHead(SHAPE.embed_dim, 64)
    assert 0.2 < float(head.fc.weight.abs().max()) <= (6 / 128) ** 0.5
    assert 1.7 < float(torch.cat(list(head.bit_weights)).abs().max()) <= 3**0.5
    assert not head.fc.bias.any()
