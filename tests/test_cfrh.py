"""CFRH: worked values in float64, fusions, sharpness, absence of labels."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import load_config
from common.types import Batch, Progress
from models.cfrh import (
    CFRH,
    CFRHConfig,
    HashAutoencoder,
    affinity,
    affinity_product,
    bit_bias,
    cross_loss,
    fused_affinity,
    intra_loss,
)
from tests.tiny_models import SHAPE, WORDS, build, pick, rows_of, section, train_steps
from tests.worked import wave

CONFIGS = Path(__file__).parents[1] / "configs" / "CFRH"
DOUBLE = torch.float64


def at(epoch: int) -> Progress:
    return Progress(epoch=epoch, epochs=9, step=epoch, steps_per_epoch=1)


def settings(**overrides: object) -> CFRHConfig:
    return CFRHConfig.model_validate(section("CFRH", **overrides))


def built(cache_dir: Path, **overrides: object) -> CFRH:
    model = build("CFRH", str(cache_dir), **{"hidden_width": 32, **overrides})
    assert isinstance(model, CFRH)
    return model


def worked_inputs() -> tuple[Tensor, Tensor]:
    """Image features [5, 6] and word vectors [5, 7]."""
    words = (wave(0.7, 5, 7, DOUBLE) > 0.2).double()
    rows = ["1100011", "1100110", "1001100", "1001000", "0011001"]
    assert words.tolist() == [[float(word) for word in row] for row in rows]
    return 2 * wave(0.1, 5, 6, DOUBLE) + 1, words


def worked_codes() -> tuple[Tensor, Tensor]:
    """Relaxed codes of both modalities, [5, 8]."""
    return torch.tanh(1.5 * wave(0.3, 5, 8, DOUBLE)), torch.tanh(1.5 * wave(0.9, 5, 8, DOUBLE))


def assert_row(row: Tensor, *wanted: float) -> None:
    torch.testing.assert_close(row, torch.tensor(wanted, dtype=DOUBLE), rtol=0, atol=1e-7)


def test_worked_affinities() -> None:
    image, text = map(affinity, worked_inputs())
    assert_row(image[0], 1, 0.501734804, -0.402785032, -1.255208170, -1.213285887)
    assert_row(text[0], 1, 0.5, -0.422649731, -0.292893219, -0.422649731)
    product = F.normalize(image @ text, dim=1)
    assert_row(product[0], 0.527015616, 0.577119622, -0.260566518, -0.395540659, -0.406005122)
    torch.testing.assert_close(affinity_product(image, text, "row_normalised"), (product + product.T) / 2)


def test_worked_target() -> None:
    target = fused_affinity(*worked_inputs(), settings())
    assert_row(target[0], 2.455643725, 1.791455788, -0.958936543, -2.320886534, -2.149347202)
    assert float(target.sum()) == pytest.approx(1.553086290, abs=1e-7)
    assert float(target.square().sum()) == pytest.approx(96.865170767, abs=1e-7)


def test_worked_target_of_jdsh() -> None:
    target = fused_affinity(*worked_inputs(), settings(fusion="jdsh", fusion_weight=0.3))
    assert_row(target[0], 1.331712970, 0.778776467, -0.529714994, -1.292464211, -1.240716646)
    assert float(target.sum()) == pytest.approx(-0.331840213, abs=1e-7)
    assert float(target.square().sum()) == pytest.approx(26.518461959, abs=1e-7)


def test_mean_product_by_hand() -> None:
    image = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    text = torch.tensor([[1.0, -3.0], [-3.0, 1.0]])
    assert affinity_product(image, text, "mean").tolist() == [[2.0, -2.0], [-2.0, 2.0]]


@pytest.mark.parametrize("fusion", ["row_normalised", "jdsh", "mean"])
def test_targets_are_symmetric_and_bear_a_text_without_words(fusion: str) -> None:
    image, text = worked_inputs()
    text[2] = 0
    target = fused_affinity(image, text, settings(fusion=fusion))
    assert target.isfinite().all()
    torch.testing.assert_close(target, target.T)


def test_worked_losses(tmp_path: Path) -> None:
    image, text = worked_inputs()
    target, codes = fused_affinity(image, text, settings()), worked_codes()
    terms = {
        "intra": intra_loss(*codes, target),
        "cross": cross_loss(*codes, target),
        "autoencoder": F.mse_loss(wave(1.1, 5, 6, DOUBLE), image) + F.mse_loss(wave(1.3, 5, 7, DOUBLE), text),
    }
    wanted = {"intra": 3.747094601, "cross": 3.810768446, "autoencoder": 3.082849322}
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(wanted, abs=1e-7)
    assert float(built(tmp_path).objective(terms)) == pytest.approx(4.493762838, abs=1e-7)


def test_bit_bias_by_hand() -> None:
    constant, balanced = torch.full((4, 1), 0.3), torch.tensor([[0.1], [-0.9], [0.4], [-0.2]])
    assert float(bit_bias(torch.cat([constant, balanced], dim=1))) == 0.5
    assert float(bit_bias(-constant)) == 1.0


def test_autoencoder_decodes_the_relaxed_code() -> None:
    torch.manual_seed(0)
    net, inputs = HashAutoencoder(6, 10, 4), wave(0.1, 5, 6)
    relaxed, decoded = net(inputs, 2.0)
    hidden = net.encoder[2](F.relu(net.encoder[0](inputs)))
    torch.testing.assert_close(relaxed, torch.tanh(2 * hidden))
    torch.testing.assert_close(decoded, relaxed @ net.decoder.weight.T + net.decoder.bias)


def test_a_step_is_what_the_equations_say(tmp_path: Path) -> None:
    """The whole step once more, from the page's formulas, at epoch 3: alpha = 2."""
    model, batch, m = built(tmp_path, bits=8), rows_of(), 11
    output = model(batch, at(3))

    def rn(rows: Tensor) -> Tensor:
        return rows / rows.norm(dim=1, keepdim=True)

    x, y = model.backbone.image_features(batch["image"]), batch["bag_of_words"]
    b_i, b_t = (2 * model.image.encoder(x)).tanh(), (2 * model.text.encoder(y)).tanh()
    s_i, s_t = 2 * rn(x) @ rn(x).T - 1, 2 * rn(y) @ rn(y).T - 1
    p = rn(s_i @ s_t)
    s = 1.4 * (0.5 * s_i + 0.2 * s_t + 2 * (p + p.T) / 2)
    b_i, b_t = rn(b_i), rn(b_t)
    intra = ((b_i @ b_i.T - s).square().sum() + (b_t @ b_t.T - s).square().sum()) / m**2
    cross = ((b_i @ b_t.T - s).square().sum() + (b_t @ b_i.T - s).square().sum()) / m**2 - (b_i * b_t).sum() / m
    x_hat = model.image.decoder((2 * model.image.encoder(x)).tanh())
    y_hat = model.text.decoder((2 * model.text.encoder(y)).tanh())
    autoencoder = (x_hat - x).square().mean() + (y_hat - y).square().mean()
    torch.testing.assert_close(output.loss, 0.1 * intra + cross + 0.1 * autoencoder)
    assert 0 <= float(output.terms["bit_bias"]) <= 1


@pytest.mark.parametrize(("epoch", "alpha"), [(0, 1.0), (1, math.sqrt(2)), (3, 2.0)])
def test_sharpness_follows_the_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int, alpha: float) -> None:
    model, seen = built(tmp_path), []
    forward = HashAutoencoder.forward

    def spy(net: HashAutoencoder, inputs: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
        seen.append(sharpness)
        return forward(net, inputs, sharpness)

    monkeypatch.setattr(HashAutoencoder, "forward", spy)
    model(rows_of(), at(epoch))
    assert seen == [pytest.approx(alpha)] * 2


def test_labels_reach_neither_the_model_nor_its_training(tmp_path: Path) -> None:
    """Trained on rows that have no labels at all, it ends in the same weights, to the last bit."""
    assert CFRH.fields | CFRH.image_fields | CFRH.text_fields == {"image", "bag_of_words"}
    steps = [[0, 1, 2, 3], [4, 5, 6, 7]]
    wanted = train_steps("CFRH", str(tmp_path), steps, {"hidden_width": 32})["state"]

    model = built(tmp_path)
    split = Batch({name: value for name, value in rows_of().items() if name != "labels"})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for step, rows in enumerate(steps):
        optimizer.zero_grad()
        model(pick(split, rows), Progress(epoch=0, epochs=1, step=step, steps_per_epoch=2)).loss.backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_clip_is_frozen_and_in_no_group(tmp_path: Path) -> None:
    model = built(tmp_path)
    assert not any(p.requires_grad for p in model.backbone.parameters())
    groups = model.param_groups()
    assert set(groups) == {"image", "text"}
    for name, net in (("image", model.image), ("text", model.text)):
        assert [id(p) for p in groups[name]["autoencoder"]] == [id(p) for p in net.parameters()]
    assert not model.image_features(rows_of()).requires_grad


@pytest.mark.parametrize("fusion", ["row_normalised", "jdsh", "mean"])
def test_fusions_train_also_on_one_row(tmp_path: Path, fusion: str) -> None:
    model = built(tmp_path, fusion=fusion)
    for batch in (rows_of(), pick(rows_of(), [4])):
        model.zero_grad()
        loss = model(batch, at(0)).loss
        loss.backward()
        assert loss.isfinite()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(grad is not None and grad.isfinite().all() for grad in grads)


def test_decoders_of_the_other_modality_stay_unknown(tmp_path: Path) -> None:
    imported = CFRH.import_reference({"ImgNet.decode.weight": torch.zeros(WORDS, 16)})
    assert not imported.keys() & built(tmp_path).state_dict().keys()


def test_shapes_follow_the_data(tmp_path: Path) -> None:
    model = built(tmp_path, bits=24)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad and "weight" in name}
    assert shapes == {
        "image.encoder.0.weight": (32, SHAPE.embed_dim),
        "image.encoder.2.weight": (24, 32),
        "image.decoder.weight": (SHAPE.embed_dim, 24),
        "text.encoder.0.weight": (32, WORDS),
        "text.encoder.2.weight": (24, 32),
        "text.decoder.weight": (WORDS, 24),
    }


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_report_the_cut_at_rank_50(path: Path) -> None:
    evaluate = load_config(path).evaluate
    assert evaluate.cutoffs == ["all", 50] and "top" in evaluate.definitions
