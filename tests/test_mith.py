"""MITH: worked values of head and loss, aggregation of tokens."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.losses import asymmetric_likelihood, diagonal_contrast
from common.types import Progress
from models.blocks.concept_head import (
    ConceptBanks,
    ConceptCodes,
    ConceptHead,
    ConceptHeadConfig,
    aggregate_tokens,
    concept_positions,
)
from models.mith import MITH
from tests.tiny_models import build, pick, rows_of
from tests.worked import filled, multi_hot, wave

E, K = 64, 8
START = Progress(epoch=0, epochs=1, step=0, steps_per_epoch=1)


def head_config(**overrides: object) -> ConceptHeadConfig:
    values = {
        "name": "MITH",
        "bits": K,
        "backbone": "tiny",
        "top_k": 3,
        "transformer_layers": 2,
        "res_mlp_layers": 2,
        "activation": "gelu",
        "dropout": 0.0,
        "target_share": 0.99,
    }
    return ConceptHeadConfig.model_validate({**values, **overrides})


def reference_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the head in the authors' checkpoints, the tables and the duplicate module left out."""
    shapes: dict[str, tuple[int, ...]] = {"gcl_i.common_concept_embedding.weight": (K, E)}
    for layer in range(2):
        shapes |= {f"gcl_i.mlp.lns.{layer}.{kind}": (E,) for kind in ("weight", "bias")}
        shapes |= {f"gcl_i.mlp.mlps.{layer}.0.weight": (4 * E, E), f"gcl_i.mlp.mlps.{layer}.0.bias": (4 * E,)}
        shapes |= {f"gcl_i.mlp.mlps.{layer}.3.weight": (E, 4 * E), f"gcl_i.mlp.mlps.{layer}.3.bias": (E,)}
    for local in ("lct_i", "lct_t"):
        for layer in range(2):
            block = f"{local}.transformer.resblocks.{layer}"
            shapes |= {f"{block}.{norm}.{kind}": (E,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
            shapes |= {f"{block}.attn.in_proj_weight": (3 * E, E), f"{block}.attn.in_proj_bias": (3 * E,)}
            shapes |= {f"{block}.attn.out_proj.weight": (E, E), f"{block}.attn.out_proj.bias": (E,)}
            shapes |= {f"{block}.mlp.c_fc.weight": (4 * E, E), f"{block}.mlp.c_fc.bias": (4 * E,)}
            shapes |= {f"{block}.mlp.c_proj.weight": (E, 4 * E), f"{block}.mlp.c_proj.bias": (E,)}
        shapes |= {f"{local}.hashing.fc_list.{bit}.weight": (1, E) for bit in range(K)}
        shapes |= {f"{local}.hashing.fc_list.{bit}.bias": (1,) for bit in range(K)}
    for name in ("img_concept_proj", "txt_concept_proj"):
        shapes |= {f"{name}.weight": (E, E), f"{name}.bias": (E,)}
    return shapes


def token_wave(start: float, tokens: int) -> Tensor:
    """Tokens of four rows by formula, [4, tokens, E]."""
    n, place, d = torch.meshgrid(*(torch.arange(s, dtype=torch.float64) for s in (4, tokens, E)), indexing="ij")
    return torch.sin(start + 0.5 * place + 0.9 * n + 0.37 * d + 0.013 * place * n * d).float()


def check(values: Tensor, total: float, squares: float, first: list[float]) -> None:
    assert float(values.double().sum()) == pytest.approx(total, abs=2e-4)
    assert float(values.double().square().sum()) == pytest.approx(squares, rel=1e-5)
    torch.testing.assert_close(values.flatten()[: len(first)], torch.tensor(first), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def head() -> ConceptHead:
    shapes = reference_shapes()
    assert len(shapes) == 97
    values = filled(shapes, norms=("ln_", ".lns."))
    state = MITH.import_reference({f"hash.{name}": value for name, value in values.items()})
    head = ConceptHead(E, head_config())
    head.load_state_dict({name.removeprefix("head."): value for name, value in state.items()})
    return head


def hashed(head: ConceptHead) -> tuple[ConceptCodes, ConceptCodes]:
    ignored = torch.arange(6) >= torch.tensor([6, 4, 3, 1])[:, None]
    image = head.hash_image(wave(0.1, 4, E), token_wave(0.2, 5))
    return image, head.hash_text(wave(0.8, 4, E), token_wave(1.4, 6), ignored)


def test_position_table() -> None:
    check(concept_positions(K, E), 31.0365214, 4.0, [0, 0.125, 0, 0.125])


def test_worked_scores_and_aggregation(head: ConceptHead) -> None:
    with torch.no_grad():
        _, image_scores = head.global_concepts(token_wave(0.2, 5))
        _, text_scores = head.global_concepts(token_wave(1.4, 6))
    first = [0.994176089, 0.064240054, -0.993997421, -0.634032646]
    check(image_scores.transpose(0, 1), 0.610373670, 99.359322338, first)
    first = [0.446687748, -0.990422758, -0.803750548, 0.983902866]
    check(text_scores.transpose(0, 1), 5.518308813, 106.902816060, first)
    image = aggregate_tokens(token_wave(0.2, 5), image_scores, 3)
    first = [0.568707626, 0.792284420, 0.908629235, 0.901995346]
    check(image.transpose(0, 1), -40.819110471, 603.642172508, first)
    ignored = torch.arange(6) >= torch.tensor([6, 4, 3, 1])[:, None]
    text = aggregate_tokens(token_wave(1.4, 6), text_scores, 3, ignored)
    check(text.transpose(0, 1), -38.012070735, 563.047192560, [0.0, 0.0, 0.0, 0.0])
    assert int((text.abs().sum(-1) == 0).sum()) == 11


def test_worked_hashes(head: ConceptHead) -> None:
    with torch.no_grad():
        image, text = hashed(head)
        aligned_image, aligned_text = head.align(image.concepts, text.concepts)
    check(image.global_hash, 1.226523735, 3.263938678, [-0.162776877, 0.355778044, 0.246682493, -0.302901367])
    check(text.global_hash, 1.284620650, 3.619099315, [-0.236377862, 0.340356008, 0.313515822, -0.271117334])
    check(image.feature, -0.709353956, 4, [0.010000846, 0.041922672, -0.070874371, -0.227373096])
    check(text.feature, -0.816805942, 4, [0.076132876, 0.027781167, -0.143474756, -0.249867439])
    check(image.local_hash, 1.873643336, 17.942008989, [0.949006865, 0.524004052, 0.475785637, -0.994606891])
    check(text.local_hash, 5.272363597, 18.343011099, [0.391098411, 0.999379817, -0.209149433, -0.978946271])
    first = [0.175814988, 0.005179326, -0.168838441, -0.036453826]
    check(aligned_image.transpose(0, 1), -0.340500206, 32, first)
    first = [0.165580631, 0.014409364, -0.187966048, -0.092807403]
    check(aligned_text.transpose(0, 1), -0.635055299, 32, first)


def test_worked_loss_and_gradients(head: ConceptHead) -> None:
    head.zero_grad()
    image, text = hashed(head)
    banks = ConceptBanks(7, 5, head_config())
    starts = (("image_local", 0.5), ("image_global", 0.6), ("text_local", 0.7), ("text_global", 0.8))
    for name, start in starts:
        banks.get_buffer(f"{name}.rows").copy_(wave(start, 7, K))
    banks.train_labels.copy_(multi_hot(7, 5))
    index = torch.tensor([5, 0, 3, 6])
    terms = banks.terms(index, banks.train_labels[index], image, text)
    a, b = head.align(image.concepts, text.concepts)
    contrast = diagonal_contrast(image.feature @ text.feature.T / 0.07)
    token_contrast = diagonal_contrast(a @ b.transpose(1, 2) / 0.07).mean()
    local = terms["local_likelihood_image"] + terms["local_likelihood_text"]
    crossed = 10 * (terms["global_likelihood_image"] + terms["global_likelihood_text"])
    quantization = 8 * (terms["quantization_image"] + terms["quantization_text"])
    total = local + crossed + quantization + 50 * (contrast + 0.01 * token_contrast) + terms["distillation"]
    worked = {
        1.5802915636: local,
        14.1646494541: crossed,
        12.9547702321: quantization,
        0.0542603729: contrast,
        14.8284998939: token_contrast,
        9.4575480899: terms["distillation"],
        48.2845279302: total,
    }
    for value, ours in worked.items():
        assert ours.item() == pytest.approx(value, rel=1e-5)
    assert torch.equal(banks.text_local.rows[index], text.local_hash)
    assert torch.equal(banks.text_local.rows[1], wave(0.7, 7, K)[1])

    total.backward()
    norms = {
        "global_concepts.embedding.weight": 34.729943967,
        "image_concepts.bit_weights.0": 7.749236636,
        "text_concepts.transformer.resblocks.0.attn.in_proj_weight": 0.371666811,
        "image_projection.weight": 6.087688297,
        "global_concepts.mlp.0.expand.weight": 22.623321458,
    }
    for name, norm in norms.items():
        gradient = head.get_parameter(name).grad
        assert gradient is not None and float(gradient.norm()) == pytest.approx(norm, rel=1e-4)


def test_aggregation_against_a_loop() -> None:
    draw = torch.Generator().manual_seed(1)
    tokens, scores = torch.randn(3, 6, 4, generator=draw), torch.rand(3, 6, 5, generator=draw) * 2 - 1
    scores[0, 1] = torch.tensor([0.5, 0.5, 0.5, -0.2, 0.1])  # a tie at the threshold is kept
    ignored = torch.rand(3, 6, generator=draw) < 0.4
    ours = aggregate_tokens(tokens, scores, 2, ignored)
    for b in range(3):
        kept = {}
        for token in range(6):
            positive = [k for k in range(5) if scores[b, token, k] > 0 and not ignored[b, token]]
            best = sorted((float(scores[b, token, k]) for k in positive), reverse=True)
            kept[token] = {k for k in positive if len(best) < 2 or scores[b, token, k] >= best[1]}
        for k in range(5):
            voters = [token for token in range(6) if k in kept[token]]
            wanted = torch.zeros(4)
            if voters:
                wanted = F.softmax(scores[b, voters, k], dim=0) @ tokens[b, voters]
            torch.testing.assert_close(ours[b, k], wanted, atol=1e-6, rtol=1e-5)


def test_likelihood_clamps_before_halving() -> None:
    codes = torch.full((1, 100), 2.0, requires_grad=True)
    loss = asymmetric_likelihood(torch.ones(1, 100), codes, torch.zeros(1, 1))
    assert loss.item() == pytest.approx(32.0)
    loss.backward()
    assert codes.grad is not None and not codes.grad.any()


def test_banks_follow_the_seed_and_the_batch(tmp_path: Path) -> None:
    model, again = (build("MITH", str(tmp_path), dropout=0.0) for _ in range(2))
    assert isinstance(model, MITH) and isinstance(again, MITH)
    before = model.banks.image_global.rows.clone()
    assert torch.equal(before, again.banks.image_global.rows)
    assert not torch.equal(before, model.banks.text_global.rows)
    assert abs(float(before.std()) - 1) < 0.3
    batch = pick(rows_of(), [2, 9])
    model(batch, START)
    written = model.banks.image_global.rows
    assert torch.equal(written[[2, 9]], model.hash_image(batch["image"]).global_hash.detach())
    others = [row for row in range(len(before)) if row not in (2, 9)]
    assert torch.equal(written[others], before[others])
