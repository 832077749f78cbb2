"""DIMCH: worked values of head and loss, initial weights, edge cases."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.types import Progress
from models.dimch import DIMCH, TokenSetHead, relaxed_codes, sign_quantization
from tests.tiny_models import LENGTH, build, rows_of
from tests.worked import multi_hot, wave

START = Progress(epoch=0, epochs=1, step=0, steps_per_epoch=1)
DOUBLE = torch.float64


def small(tmp_path: Path, **overrides: Any) -> DIMCH:
    """DIMCH on the tiny CLIP."""
    model = build("DIMCH", str(tmp_path), **overrides)
    assert isinstance(model, DIMCH)
    return model


def worked_sets() -> tuple[Tensor, Tensor, Tensor]:
    """Sets of both modalities, [4, 3, 8] float64, and labels [4, 5]."""
    image, text = (wave(start, 12, 8, DOUBLE).view(4, 3, 8).requires_grad_() for start in (0.3, 1.9))
    return image, text, multi_hot(4, 5)


def test_worked_head() -> None:
    heads = {m: TokenSetHead(tokens, 16, 3, 8, 0.3) for m, tokens in (("img", 5), ("txt", 4))}
    layers = {"hash_layer.0": "hidden", "hash_layer.3": "out", "token_layer": "mix"}
    names = sorted(
        f"{m}_token_hash.{layer}.{kind}" for m in ("img", "txt") for layer in layers for kind in ("weight", "bias")
    )
    for rank, name in enumerate(names):
        head, layer, kind = (
            heads[name[:3]].double().eval(),
            name.split(".", 1)[1].rpartition(".")[0],
            name.split(".")[-1],
        )
        parameter = head.get_parameter(f"{layers[layer]}.{kind}")
        values = 0.1 * torch.sin(0.37 * torch.arange(parameter.numel(), dtype=DOUBLE) + 0.5 * rank)
        parameter.data = values.view(parameter.shape)
    image = heads["img"](wave(0.1, 20, 16, DOUBLE).view(4, 5, 16))
    text = heads["txt"](wave(0.2, 16, 16, DOUBLE).view(4, 4, 16))
    for values, total, squares, first in (
        (image, 4.599472306, 0.667824476, (0.102005017, 0.068996747, 0.137748636)),
        (relaxed_codes(image), 1.528017363, 0.220638401, (0.105271965, 0.066362584)),
        (text, -5.429297414, 0.492421179, (-0.075680250, -0.094195528)),
        (relaxed_codes(text), -1.805146572, 0.163304092, (-0.075536094,)),
    ):
        assert float(values.sum()) == pytest.approx(total, abs=1e-8)
        assert float(values.square().sum()) == pytest.approx(squares, abs=1e-8)
        assert values.flatten()[: len(first)].tolist() == pytest.approx(first, abs=1e-8)


def test_worked_loss(tmp_path: Path) -> None:
    model = small(tmp_path, set_size=3, bits=8)
    image, text, labels = worked_sets()
    out = model.objective(image, text, labels)
    wanted = {
        "set_triplet_i2t": 0.127861864,
        "set_triplet_t2i": 0.119546261,
        "discrepancy": 0.037077568,
        "code_triplet_i2t": 0.166838700,
        "code_triplet_t2i": 0.234102015,
        "quantization_image": 0.432241811,
        "quantization_text": 0.408937660,
    }
    for name, value in wanted.items():
        assert out.terms[name].item() == pytest.approx(value, abs=2e-9), name
    assert float(out.terms["diversity_image"] + out.terms["diversity_text"]) == pytest.approx(1.6266e-8, abs=1e-12)
    assert out.loss.item() == pytest.approx(16.666388290, abs=2e-7)


def test_gradients_are_those_of_the_loss(tmp_path: Path) -> None:
    model = small(tmp_path, set_size=3, bits=8)
    image, text, labels = worked_sets()
    signs = relaxed_codes(image).sign(), relaxed_codes(text).sign()
    assert torch.autograd.gradcheck(lambda a, b: model.objective(a, b, labels).loss, (image, text))
    for sets, sign in zip((image, text), signs, strict=True):
        codes = relaxed_codes(sets).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(sign_quantization(codes), codes)
        torch.testing.assert_close(gradient, 2 * (codes - sign) / codes.numel())


def test_head_is_a_convolution_over_features_with_tokens_as_channels() -> None:
    torch.manual_seed(0)
    head, tokens = TokenSetHead(4, 6, 2, 3, 0.0).double(), torch.randn(2, 4, 6, dtype=DOUBLE)
    weight, bias = head.mix.weight, head.mix.bias
    assert bias is not None
    padded = F.pad(tokens, (1, 1))
    for n in range(2):
        rows = []
        for m in range(2):
            window = [(weight[m] * padded[n, :, d : d + 3]).sum() + bias[m] for d in range(6)]
            rows.append(head.out(F.relu(head.hidden(F.relu(torch.stack(window))))))
        torch.testing.assert_close(head(tokens)[n], torch.stack(rows))


def test_initial_weights() -> None:
    torch.manual_seed(0)
    head = TokenSetHead(50, 512, 8, 64, 0.3)
    assert float(head.mix.weight.std()) == pytest.approx((2 / 150) ** 0.5, rel=0.1)
    for linear in (head.hidden, head.out):
        bound = (6 / linear.out_features) ** 0.5
        assert 0.99 * bound < float(linear.weight.abs().max()) <= bound
    assert head.hidden.out_features == 256
    assert not any(p.any() for name, p in head.named_parameters() if name.endswith("bias"))


def test_options_change_what_they_name(tmp_path: Path) -> None:
    def terms(**overrides: Any) -> dict[str, float]:
        image, text, labels = worked_sets()
        out = small(tmp_path, set_size=3, bits=8, **overrides).objective(image, text, labels)
        return {name: value.item() for name, value in out.terms.items()}

    plain, within, best = terms(), terms(diversity="sample"), terms(distance="max")
    assert {name for name in plain if plain[name] != within[name]} == {"diversity_image", "diversity_text"}
    assert {name for name in plain if plain[name] != best[name]} == {"set_triplet_i2t", "set_triplet_t2i"}


def test_text_to_image_is_the_transpose_only_at_scale_one(tmp_path: Path) -> None:
    def forth_and_back(scale: float) -> tuple[float, float]:
        similarity = {"temperature": 16.0, "scale": scale, "denominator": 2.0}
        model = small(tmp_path, set_size=3, bits=8, set_similarity=similarity)
        image, text, labels = worked_sets()
        swapped = model.objective(text, image, labels).terms["set_triplet_t2i"]
        return model.objective(image, text, labels).terms["set_triplet_i2t"].item(), swapped.item()

    assert forth_and_back(1.0)[0] == pytest.approx(forth_and_back(1.0)[1], abs=1e-12)
    assert forth_and_back(0.5)[0] == pytest.approx(forth_and_back(0.5)[1], abs=1e-12)  # anchors are always first
    assert forth_and_back(0.5)[0] != pytest.approx(forth_and_back(1.0)[0], abs=1e-6)


def test_padding_has_a_vote(tmp_path: Path) -> None:
    model, ids = small(tmp_path).eval(), rows_of()["text"][:1]
    end = int(ids.argmax())
    assert end < LENGTH - 1
    tokens = model.backbone.text_tokens(ids)[1]
    cut = tokens.clone()
    cut[:, end + 1 :] = 0
    assert not torch.equal(model.text_head(tokens), model.text_head(cut))
