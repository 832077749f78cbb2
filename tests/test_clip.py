"""CLIP: equal to what the authors' towers computed, and the properties that the methods rely on."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from common.errors import UserError
from common.types import ClipShape
from models.clip.towers import CLIP, ResidualBlock, Transformer, without_padding
from runners.setup import autocast
from utils.launch import pick_device

GOLDEN = Path(__file__).parent / "golden" / "clip-w64p16.npz"
TINY = ClipShape(
    embed_dim=64,
    image_size=16,
    patch_size=8,
    vision_width=64,
    vision_layers=2,
    text_width=64,
    text_layers=2,
    context_length=77,
    vocabulary=49408,
)


def pictures(rows: int, size: int = 16) -> Tensor:
    """Pictures [rows, 3, size, size] float64, a fixed formula."""
    b, c, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (rows, 3, size, size)), indexing="ij")
    return torch.sin(0.3 + 0.9 * b + 0.5 * c + 0.17 * y + 0.29 * x + 0.01 * y * x)


def texts() -> Tensor:
    """Three token rows [3, 32]: a sentence, one with id 0 inside a word, and an empty text."""
    rows = [
        [49406, 320, 2308, 7266, 320, 3638, 1579, 7298, 2972, 49407],
        [49406, 0, 39397, 1805, 49407],
        [49406, 49407],
    ]
    return torch.tensor([row + [0] * (32 - len(row)) for row in rows])


def fill(model: nn.Module) -> None:
    """Gives every parameter values by formula, from its rank among the sorted names."""
    for rank, (name, parameter) in enumerate(sorted(model.named_parameters())):
        values = 0.1 * torch.sin(0.37 * torch.arange(parameter.numel(), dtype=torch.float64) + 0.5 * rank)
        is_norm = name.rsplit(".", 2)[-2:][0].startswith("ln_") and name.endswith("weight")
        parameter.data = (values + float(is_norm)).view(parameter.shape)


@pytest.fixture(scope="module")
def filled() -> CLIP:
    model = CLIP(TINY).double()
    fill(model)
    return model


@pytest.fixture(scope="module")
def small() -> CLIP:
    torch.manual_seed(0)
    return CLIP(replace(TINY, vocabulary=600, context_length=40))


def small_texts() -> Tensor:
    """Four token rows [4, 12] of the vocabulary of `small`."""
    rows = [[598, 5, 9, 200, 599], [598, 599], [598, 0, 7, 599], [598, *range(1, 11), 599]]
    return torch.tensor([row + [0] * (12 - len(row)) for row in rows])


def check(values: Tensor, total: float, squares: float, first: list[float]) -> None:
    assert values.sum().item() == pytest.approx(total, abs=1e-7)
    assert values.square().sum().item() == pytest.approx(squares, abs=1e-6)
    torch.testing.assert_close(values.flatten()[:4], torch.tensor(first, dtype=torch.float64), atol=1e-8, rtol=0)


# ------------------------------------------------------------------------------------------ against the authors' code


def test_golden_case_of_the_authors_towers() -> None:
    case = np.load(GOLDEN)
    sizes = json.loads(str(case["cfg"]))["clip"]
    model = CLIP(
        ClipShape(
            embed_dim=sizes["embed_dim"],
            image_size=sizes["res"],
            patch_size=sizes["patch"],
            vision_width=sizes["vwidth"],
            vision_layers=sizes["vlayers"],
            text_width=sizes["twidth"],
            text_layers=sizes["tlayers"],
            context_length=sizes["ctx"],
            vocabulary=sizes["vocab"],
        )
    )
    state = {name[3:]: torch.from_numpy(case[name]) for name in case.files if name.startswith("sd/")}
    model.load_state_dict(state)  # strict: exactly OpenAI's names
    image, ids, mask = (torch.from_numpy(case[f"in/{name}"]) for name in ("image", "text", "key_padding_mask"))

    def same(values: Tensor, name: str) -> None:
        torch.testing.assert_close(values, torch.from_numpy(case[f"out/{name}"]), atol=2e-5, rtol=0)

    with torch.no_grad():
        tokens = model.image_tokens(image)
        same(model.image_features(image), "image_embed")
        same(model.text_features(ids), "text_embed")
        same(tokens[:, 0], "masked/image_cls")
        same(tokens[:, 1:].transpose(0, 1), "masked/image_tokens")
        for case_name, key_padding_mask in (("masked", mask), ("unmasked", None)):
            pooled, words = model.text_tokens(ids, key_padding_mask)
            same(pooled, f"{case_name}/text_eos")
            same(words.transpose(0, 1), f"{case_name}/text_tokens")
        image_units, text_units = (
            nn.functional.normalize(model.image_features(image)),
            nn.functional.normalize(model.text_features(ids)),
        )
        same(model.logit_scale.exp() * image_units @ text_units.T, "logits_per_image")


def test_worked_values_in_double_precision(filled: CLIP) -> None:
    ids = texts()
    padding = ids == 0
    with torch.no_grad():
        tokens = filled.image_tokens(pictures(2))
        check(
            filled.image_features(pictures(2)),
            -14.139851787,
            356.435784077,
            [2.343432168, 1.892921359, 1.186212524, 0.318955389],
        )
        check(
            tokens[:, 1:].transpose(0, 1),
            -24.875789623,
            687.203491682,
            [2.159092291, 1.710576539, 1.030542277, 0.211028953],
        )
        pooled, words = filled.text_tokens(ids, padding)
        check(pooled, -9.673003372, 473.465037518, [-1.096126542, -1.749359803, -2.165825421, -2.289156728])
        kept = (~(padding | (ids == 49407))).T[..., None]
        assert kept.sum(0).flatten().tolist() == [9, 3, 1]
        check(
            words.transpose(0, 1) * kept,
            -13.790693377,
            1494.794834811,
            [-1.032656930, -1.670735134, -2.082687175, -2.212757277],
        )


def test_mask_hides_id_zero_inside_a_word(filled: CLIP) -> None:
    ids = texts()
    with torch.no_grad():
        masked = filled.text_features(ids, ids == 0).sum(1)
        plain = filled.text_features(ids).sum(1)
    expected = torch.tensor([-3.315516546, -3.369177459, -2.988309367], dtype=torch.float64)
    torch.testing.assert_close(masked, expected, atol=1e-8, rtol=0)
    expected[1] = -3.385258811
    torch.testing.assert_close(plain, expected, atol=1e-8, rtol=0)


# ------------------------------------------------------------------------------------------------------- properties


def test_token_zero_is_the_pooled_image_and_batches_of_one_are_rows(small: CLIP) -> None:
    image = pictures(3).float()
    tokens = small.image_tokens(image)
    assert tokens.shape == (3, 1 + TINY.patches, 64)
    torch.testing.assert_close(tokens[:, 0], small.image_features(image))
    torch.testing.assert_close(small.image_features(image[1:2]), small.image_features(image)[1:2])
    ids = small_texts()
    for row in range(len(ids)):
        torch.testing.assert_close(small.text_features(ids[row : row + 1]), small.text_features(ids)[row : row + 1])


def test_pooled_text_is_the_token_at_the_first_end_of_text(small: CLIP) -> None:
    ids = small_texts()
    ids[1, 5] = 599  # a second end-of-text does not count
    pooled, tokens = small.text_tokens(ids)
    torch.testing.assert_close(pooled, tokens[torch.arange(4), torch.tensor([4, 1, 3, 11])])
    torch.testing.assert_close(small.text_features(ids), pooled)


def test_length_of_the_padding_does_not_matter(small: CLIP) -> None:
    ids = small_texts()
    longer = nn.functional.pad(ids, (0, 28))
    torch.testing.assert_close(small.text_features(longer), small.text_features(ids))
    torch.testing.assert_close(small.text_features(longer, longer == 0), small.text_features(ids, ids == 0))


def test_what_is_cut_is_padding_of_all_texts() -> None:
    ids = small_texts()
    assert without_padding(nn.functional.pad(ids, (0, 28))).equal(ids)
    assert without_padding(ids[[1, 1]]).equal(ids[[1, 1], :2])
    behind = ids[:1].clone()
    behind[0, -1] = 5  # behind its end-of-text, but no padding
    assert without_padding(behind).equal(behind)
    assert without_padding(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3)


def test_padding_mask_leaves_ordinary_words_alone(small: CLIP) -> None:
    ids = small_texts()[[0, 1, 3]]
    masked, plain = small.text_tokens(ids, ids == 0)[1], small.text_tokens(ids)[1]
    words = ids != 0
    torch.testing.assert_close(masked[words], plain[words])
    assert (masked[~words] - plain[~words]).abs().max() > 1e-4


def test_attention_is_causal(small: CLIP) -> None:
    ids = small_texts()
    other = ids.clone()
    other[:, 6:] = 77
    torch.testing.assert_close(small.text_tokens(ids)[1][:, :6], small.text_tokens(other)[1][:, :6])


def test_row_of_padding_only_stays_finite(small: CLIP) -> None:
    ids = torch.zeros(2, 8, dtype=torch.int64)
    pooled, tokens = small.text_tokens(ids, ids == 0)
    torch.autograd.backward(pooled.sum() + tokens.sum())
    assert torch.isfinite(tokens).all()
    assert all(torch.isfinite(p.grad).all() for p in small.parameters() if p.grad is not None)
    small.zero_grad()


def test_mask_of_the_caller_is_not_written(small: CLIP) -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    mask = ids == 0
    small.text_tokens(ids, mask)
    assert mask.all()


def test_every_parameter_but_the_temperature_gets_a_gradient(small: CLIP) -> None:
    loss = small.image_tokens(pictures(2).float()).square().sum() + small.text_tokens(small_texts())[1].square().sum()
    torch.autograd.backward(loss)
    assert [name for name, p in small.named_parameters() if p.grad is None] == ["logit_scale"]
    small.zero_grad()


def recompute(model: CLIP, wanted: bool) -> None:
    for stack in (model.visual.transformer, model.transformer):
        stack.recompute = wanted


def loss_and_gradients(model: CLIP, parts: int, rows: int) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """What all four ways into the towers give, the gradients of a loss across rows, and the bytes kept for backward."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    image, ids = pictures(rows).float(), small_texts()[[0, 1, 2, 3] * 3][:rows]
    model.parts = parts
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pooled, tokens = model.text_tokens(ids, ids == 0)
        features = [model.image_features(image), model.image_tokens(image), model.text_features(ids), pooled, tokens]
        mean = torch.stack([part.flatten(1).mean(1) for part in features], dim=1)
        loss = (mean @ mean.T).exp().mean()
    loss.backward()
    model.parts = 1
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [loss, *features], gradients, sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize(("rows", "parts"), [(10, 4), (10, 10), (3, 4), (1, 2), (0, 2)])
def test_parts_give_values_and_gradients_of_the_whole_batch(small: CLIP, rows: int, parts: int) -> None:
    whole, gradients, _ = loss_and_gradients(small, 1, rows)
    split, other, _ = loss_and_gradients(small, parts, rows)
    for value, wanted in zip(split, whole, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)  # no row has no mean
    assert gradients.keys() == other.keys()
    for name, wanted in gradients.items():
        torch.testing.assert_close(other[name], wanted, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_parts_keep_little_for_backward(small: CLIP) -> None:
    whole, split = (loss_and_gradients(small, parts, rows=12)[2] for parts in (1, 4))
    assert split < whole / 4


@pytest.mark.parametrize("parts", [1, 3])
def test_recomputed_blocks_give_the_same_bits(small: CLIP, parts: int) -> None:
    values, gradients, _ = loss_and_gradients(small, parts, 10)
    recompute(small, True)
    again, other, _ = loss_and_gradients(small, parts, 10)
    recompute(small, False)
    assert all(map(torch.equal, again, values))
    assert gradients.keys() == other.keys() and all(torch.equal(other[name], gradients[name]) for name in gradients)


def test_recomputed_blocks_keep_little_for_backward(small: CLIP) -> None:
    whole = loss_and_gradients(small, 1, rows=12)[2]
    recompute(small, True)
    kept = loss_and_gradients(small, 1, rows=12)[2]
    recompute(small, False)
    assert kept < whole / 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("again", "precision"),
    [(False, "float32"), (False, "bf16"), (True, "float32")],
)
def test_towers_compile_as_one_graph_and_once_more_for_the_last_batch(again: bool, precision: Any) -> None:
    """All ways into them, with blocks computed again or not; further numbers of rows compile nothing."""

    def features(image: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        if again:
            return model.image_tokens(image), model.text_features(ids, ids == 0), *model.text_tokens(ids)
        return model.image_features(image), model.text_features(ids), *model.text_tokens(ids, ids == 0)

    model = CLIP(replace(TINY, vocabulary=600, context_length=40, vision_layers=1, text_layers=1))
    recompute(model, again)
    graphs = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(features, backend=graphs, fullgraph=True)
    for rows in (4, 4, 3, 2, 3):
        image, ids = pictures(rows).float(), small_texts()[:rows]
        with autocast(precision, torch.device("cpu")):
            for found, wanted in zip(compiled(image, ids), features(image, ids), strict=True):
                torch.testing.assert_close(found, wanted)
    assert graphs.frame_count == 2


def test_bf16_autocast_is_close_and_returns_float32(small: CLIP) -> None:
    image, ids = pictures(4).float(), small_texts()
    with torch.no_grad():
        exact = small.image_features(image), *small.text_tokens(ids, ids == 0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = small.image_features(image), *small.text_tokens(ids, ids == 0)
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == torch.float32
        assert 0 < (a - b).norm() / a.norm() < 0.03


@pytest.mark.gpu
def test_gpu_equals_cpu_and_runs_under_autocast(small: CLIP) -> None:
    image, ids = pictures(4).float(), small_texts()
    device = pick_device("cuda", distribute=False)
    with torch.no_grad():
        expected = small.image_tokens(image), *small.text_tokens(ids, ids == 0)
        small.to(device)
        try:
            found = small.image_tokens(image.cuda()), *small.text_tokens(ids.cuda(), (ids == 0).cuda())
            with torch.autocast("cuda", dtype=torch.bfloat16):
                rough = small.image_tokens(image.cuda()), *small.text_tokens(ids.cuda(), (ids == 0).cuda())
        finally:
            small.cpu()
    for a, b, c in zip(expected, found, rough, strict=True):
        torch.testing.assert_close(b.cpu(), a, atol=1e-4, rtol=1e-4)
        assert c.dtype == torch.float32
        assert (c.cpu() - a).norm() / a.norm() < 0.03


# --------------------------------------------------------------------------------------------- blocks, names, mistakes


def test_block_equals_its_formula_on_torch_attention() -> None:
    torch.manual_seed(1)
    block: Any = ResidualBlock(48, heads=4).double()
    attention = nn.MultiheadAttention(48, 4, batch_first=True).double()
    attention.load_state_dict(block.attn.state_dict())  # the same key names
    x = torch.randn(3, 5, 48, dtype=torch.float64)
    allowed = torch.rand(5, 5) < 0.5
    allowed.fill_diagonal_(True)

    def norm(values: Tensor) -> Tensor:
        centred = values - values.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    for mask, causal in ((None, False), (allowed, False), (torch.ones(5, 5).tril().bool(), True)):
        hidden = norm(x)
        out = x + attention(hidden, hidden, hidden, attn_mask=None if mask is None else ~mask, need_weights=False)[0]
        inner = nn.functional.linear(norm(out), block.mlp.c_fc.weight, block.mlp.c_fc.bias)
        out = out + nn.functional.linear(
            inner * torch.sigmoid(1.702 * inner), block.mlp.c_proj.weight, block.mlp.c_proj.bias
        )
        torch.testing.assert_close(block(x, causal=True) if causal else block(x, mask), out)


def test_blocks_alone_start_as_torch_does() -> None:
    torch.manual_seed(2)
    block: Any = Transformer(64, layers=1, heads=8).resblocks[0]
    bound = (6 / (64 + 3 * 64)) ** 0.5  # Xavier-uniform on [3W, W]
    weight = block.attn.in_proj_weight
    assert 0.95 * bound < weight.abs().max() <= bound
    assert not block.attn.in_proj_bias.any()
    assert not block.attn.out_proj.bias.any()
    assert 0.9 / 8 < block.attn.out_proj.weight.abs().max() <= 1 / 8
    assert 0.9 / 16 < block.mlp.c_proj.weight.abs().max() <= 1 / 16
    assert block.ln_1.eps == 1e-5


def test_new_clip_starts_as_openai_does() -> None:
    torch.manual_seed(3)
    model = CLIP(replace(TINY, vision_width=128, text_width=192, text_layers=3))
    text: Any = model.transformer.resblocks[2]
    expected: Mapping[str, tuple[Tensor, float]] = {
        "token_embedding": (model.token_embedding.weight, 0.02),
        "positional_embedding": (model.positional_embedding, 0.01),
        "in_proj": (text.attn.in_proj_weight, 192**-0.5),
        "out_proj": (text.attn.out_proj.weight, 192**-0.5 * 6**-0.5),
        "c_fc": (text.mlp.c_fc.weight, (2 * 192) ** -0.5),
        "c_proj": (text.mlp.c_proj.weight, 192**-0.5 * 6**-0.5),
        "text_projection": (model.text_projection, 192**-0.5),
        "visual.proj": (model.visual.proj, 128**-0.5),
        "visual.positional_embedding": (model.visual.positional_embedding, 128**-0.5),
    }
    for name, (values, std) in expected.items():
        assert values.std().item() == pytest.approx(std, rel=0.1), name
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_picture_of_another_size_is_a_users_error(small: CLIP) -> None:
    with pytest.raises(UserError, match="pictures of 24 x 24 pixels for a CLIP of 16"):
        small.image_features(pictures(1, size=24).float())


def test_text_beyond_the_context_is_a_users_error(small: CLIP) -> None:
    with pytest.raises(UserError, match="texts of 41 tokens for a CLIP whose position table has 40"):
        small.text_features(torch.full((1, 41), 598).index_fill(1, torch.tensor([40]), 599))
