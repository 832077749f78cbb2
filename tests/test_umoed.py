"""UMoED: worked values of decoder, loss and bits, initial weights, reference layout, edge cases."""

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.types import Progress
from models.umoed import DecoderLayer, MixtureConfig, SoftMixture, TokenDecoder, UMoED, UMoEDConfig, pattern_codes
from tests.tiny_models import LENGTH, build, rows_of, section
from tests.worked import multi_hot, wave

START = Progress(epoch=0, epochs=1, step=0, steps_per_epoch=1)
DOUBLE = torch.float64
NAMES = (  # ours -> the reference's, below the head's prefix
    ("queries", "decoder_learned_parameters"),
    ("project.0.", "first_layer."),
    (".linear1.", ".linear."),
    (".linear2.phi", ".moe.phi"),
    (".linear2.", ".moe.experts."),
)


def small(tmp_path: Path, **overrides: Any) -> UMoED:
    """UMoED on the tiny CLIP."""
    model = build("UMoED", str(tmp_path), **overrides)
    assert isinstance(model, UMoED)
    return model


def config(**overrides: Any) -> UMoEDConfig:
    """Settings of the openmoji config, with some replaced."""
    return UMoEDConfig.model_validate(section("UMoED", **overrides))


def reference_name(name: str) -> str:
    """A name below the head's prefix, as the reference has it with a mixture of experts."""
    for ours, theirs in NAMES:
        name = name.replace(ours, theirs)
    return name


def worked_logits() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of both modalities, [4, 6, 4] float64, and labels [4, 5]."""
    image, text = (wave(start, 24, 4, DOUBLE).view(4, 6, 4).requires_grad_() for start in (0.3, 1.9))
    return image, text, multi_hot(4, 5)


def test_worked_decoder() -> None:
    settings = config(
        bits=12,
        set_size=6,
        layers=2,
        heads=8,
        feed_forward_width=2048,
        mixture={"experts": 3, "slots": 2, "init": "release"},
    )
    decoder = TokenDecoder(64, settings).double().eval()
    parameters = {reference_name(name): value for name, value in decoder.named_parameters()}
    for rank, name in enumerate(sorted(parameters)):
        value = parameters[name]
        filled = 0.1 * torch.sin(0.37 * torch.arange(value.numel(), dtype=DOUBLE) + 0.5 * rank)
        value.data = (1 + filled if ".norm" in name and name.endswith("weight") else filled).view(value.shape)
    image = decoder(wave(0.1, 20, 64, DOUBLE).view(4, 5, 64))
    text = decoder(wave(0.2, 16, 64, DOUBLE).view(4, 4, 64))
    assert float(image.sum()) == pytest.approx(30.495586782, abs=1e-7)
    assert float(image.square().sum()) == pytest.approx(1011.264311236, abs=1e-6)
    first = (1.060828752, 4.591935635, 0.079767903, -4.463297595)
    assert image[0, 0].tolist() == pytest.approx(first, abs=1e-8)
    assert pattern_codes(image)[0].tolist() == [-1, 1] * 6
    assert float(text.sum()) == pytest.approx(30.496890027, abs=1e-7)
    assert float(text.square().sum()) == pytest.approx(1011.261724871, abs=1e-6)
    assert text[0, 0, :2].tolist() == pytest.approx((1.059810747, 4.592136632), abs=1e-8)


def test_worked_loss(tmp_path: Path) -> None:
    model = small(tmp_path, bits=12, set_size=6, diversity_weight=0.8)
    image, text, labels = worked_logits()
    out = model.objective(image, text, labels)
    distances, back = model.distances(*(nn.functional.normalize(x, dim=-1) for x in (image, text)))
    assert distances[0].tolist() == pytest.approx((0.8051, 0.5351, 0.6850, 0.7368), abs=5e-5)
    assert torch.equal(back, distances.T)
    wanted = {
        "triplet_i2t": 0.096605852,
        "triplet_t2i": 0.067383503,
        "diversity_image": 0.046910372,
        "diversity_text": 0.009334906,
    }
    assert {name: value.item() for name, value in out.terms.items()} == pytest.approx(wanted, abs=1e-9)
    assert out.loss.item() == pytest.approx(0.055996080, abs=1e-9)
    assert torch.autograd.gradcheck(lambda a, b: model.objective(a, b, labels).loss, (image, text))


def test_worked_bits() -> None:
    bits = pattern_codes(worked_logits()[0])
    assert bits.dtype == torch.float32 and bits.shape == (4, 12)
    assert bits[0].tolist() == [-1, 1, -1, -1, -1, -1, 1, 1, 1, 1, 1, -1]


@pytest.mark.parametrize("width", [1, 2, 3, 8, 16])
def test_bits_are_the_binary_digits_of_the_pattern(width: int) -> None:
    patterns = torch.tensor([[0, 2**width - 1, 1], [2**width // 2, 5 % 2**width, 2 % 2**width]])
    logits = torch.nn.functional.one_hot(patterns, 2**width).float()
    digits = [[[int(digit) * 2 - 1 for digit in f"{value:0{width}b}"] for value in row] for row in patterns.tolist()]
    assert pattern_codes(logits).tolist() == [sum(row, []) for row in digits]


def test_mixture_is_that_of_loops() -> None:
    torch.manual_seed(0)
    mixture = SoftMixture(5, 3, MixtureConfig(experts=2, slots=3, init="per_expert")).double()
    x = torch.randn(2, 4, 5, dtype=DOUBLE)
    ours = mixture(x)
    for b in range(2):
        logits = {(n, p): x[b] @ mixture.phi[:, n, p] for n in range(2) for p in range(3)}  # over positions
        outputs = {
            (n, p): (value.softmax(0) @ x[b]) @ mixture.weight[n] + mixture.bias[n] for (n, p), value in logits.items()
        }
        for m in range(4):
            combine = torch.stack([value[m] for value in logits.values()]).softmax(0)
            wanted = sum((share * each for share, each in zip(combine, outputs.values(), strict=True)), torch.zeros(3))
            torch.testing.assert_close(ours[b, m], wanted)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    mixture = {"experts": 8, "slots": 8, "init": "release"}
    decoder = TokenDecoder(512, config(bits=16, width=None, layers=2, feed_forward_width=2048, mixture=mixture))
    first, second = cast(nn.ModuleList, decoder.decoder["layers"])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert isinstance(first, DecoderLayer) and isinstance(first.linear2, SoftMixture)
    for value, bound in ((first.linear2.phi, 0.125), (first.linear2.weight, 1 / 1024), (first.linear2.bias, 1 / 1024)):
        assert 0.99 * bound < float(value.abs().max()) <= bound
    assert float(decoder.queries.std()) == pytest.approx(1, abs=0.05)
    assert not first.self_attn.in_proj_bias.any() and not first.multihead_attn.out_proj.bias.any()
    each = SoftMixture(2048, 64, MixtureConfig(experts=2, slots=1, init="per_expert"))
    assert float(each.weight.abs().max()) == pytest.approx(2048**-0.5, rel=0.01)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_is_silent_in_evaluation(tmp_path: Path, dropout: float) -> None:
    model, batch = small(tmp_path, dropout=dropout), rows_of()
    torch.manual_seed(0)
    first, second = model.image_sets(batch["image"]), model.image_sets(batch["image"])
    assert torch.equal(first, second) == (dropout == 0)
    model.eval()
    assert torch.equal(model.image_sets(batch["image"]), model.image_sets(batch["image"]))


def test_distances_are_those_of_loops(tmp_path: Path) -> None:
    image, text = (nn.functional.normalize(x.detach(), dim=-1) for x in worked_logits()[:2])
    for temperature in (0.3, None):
        if temperature is None:
            p, r = image, text
        else:
            p, r = (image / temperature).softmax(-1), (text / temperature).softmax(-1)
        agreement = small(tmp_path, distance="agreement", distribution_temperature=temperature)
        euclidean = small(tmp_path, distance="euclidean", distribution_temperature=temperature)
        for b in range(4):
            for k in range(4):
                products = [max(0.0, float(p[b, m] @ r[k, m])) for m in range(6)]
                wanted = sum(1 - product for product in products) / 6
                assert float(agreement.distances(image, text)[0][b, k]) == pytest.approx(wanted, abs=1e-12)
                wanted = sum(math.dist(p[b, m].tolist(), r[k, m].tolist()) for m in range(6)) / 36
                assert float(euclidean.distances(image, text)[0][b, k]) == pytest.approx(wanted, abs=1e-12)


def test_masked_padding_changes_nothing_and_else_it_does(tmp_path: Path) -> None:
    ids = rows_of()["text"][:1]
    end = int(ids.argmax())
    assert end < LENGTH - 1
    other = ids.clone()
    other[:, end + 1 :] = 7  # behind the end of the text; no earlier token sees it
    for mask, same in ((True, True), (False, False)):
        model = small(tmp_path, mask_padding=mask).eval()
        with torch.no_grad():
            assert torch.allclose(model.text_sets(ids), model.text_sets(other), atol=1e-6) == same


def test_separate_heads_are_two(tmp_path: Path) -> None:
    shared, separate = small(tmp_path), small(tmp_path, separate_heads=True)
    assert list(shared.heads) == ["shared"] and list(separate.heads) == ["image", "text"]
    separate(rows_of(), START).loss.backward()
    assert all(p.grad is not None for p in separate.heads.parameters())
    assert {id(p) for p in separate.heads["image"].parameters()}.isdisjoint(
        id(p) for p in separate.heads["text"].parameters()
    )


@pytest.mark.parametrize(("bits", "set_size", "patterns"), [(16, None, 2), (64, None, 2), (16, 8, 4), (48, 3, 65536)])
def test_queries_share_the_bits(bits: int, set_size: int | None, patterns: int) -> None:
    decoder = TokenDecoder(64, config(bits=bits, set_size=set_size))
    assert decoder.queries.shape[0] == (set_size or bits)
    assert decoder.classifier.out_features == patterns


def test_a_width_that_heads_do_not_divide_is_one_line() -> None:
    with pytest.raises(UserError, match=r"model\.heads is 8.*width of 60") as error:
        TokenDecoder(60, config(width=None, heads=8))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("mixture", [{"experts": 2, "slots": 2, "init": "release"}, None], ids=["mixture", "dense"])
def test_reference_layout(tmp_path: Path, fusion: bool, mixture: dict[str, Any] | None) -> None:
    model = small(tmp_path, mixture=mixture, width=32)
    prefix = "hash.hash_module." if fusion else "hash.img_token_hash."
    renamed = {"distance.mp_dist.beta": torch.zeros(1)}
    for name, value in model.state_dict().items():
        below = name.removeprefix("heads.shared.")
        if below == name:
            renamed[name] = value
            continue
        theirs = reference_name(below) if mixture else below.replace(*NAMES[0]).replace(*NAMES[1])
        renamed[prefix + theirs] = value
        if not fusion:
            renamed[f"hash.txt_token_hash.{theirs}"] = value + 1  # built, never used
    imported = UMoED.import_reference(renamed)
    assert all(torch.equal(imported[name], value) for name, value in model.state_dict().items())
    model.load_state_dict(imported, strict=True)
