"""Settings that take other ways through a method than its YAML: they train, encode, and divide among processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from common.errors import UserError
from common.registry import MODELS
from common.types import Progress
from runners.steps import updates
from tests.tiny_models import CLASSES, ROWS, SMALL, assert_same_in_processes, build, descents, pick, rows_of, section

START = Progress(epoch=0, epochs=1, step=0, steps_per_epoch=1)
OPTIONS: dict[str, list[dict[str, Any]]] = {  # beside its own YAML, which every method is tried with
    "CFRH": [{"hidden_width": 32}, {"hidden_width": 32, "fusion": "jdsh"}],
    "DAGtH": [{"triplets": "hard", "pair_term": True}, {"distance": "squared_euclidean", "triplets": "semi_hard"}],
    "DCMHT": [
        {"head": "linear", "quantization_weight": 1.0},
        {"head": "unified", "quantization_weight": 0.001},
        {"loss_type": "l1"},
        {"similarity": "cosine"},
        {"similarity": "cosine", "loss_type": "l1"},
        {"similarity": "clipped_cosine"},
    ],
    "DGHDGH": [{"adaptive_weight": True, "graph_layers": 1, "graph_heads": 1}],
    "DIMCH": [
        *({"distance": name} for name in ("chamfer", "max", "avg")),
        *({"distance": name, "diversity": "sample"} for name in ("smooth_chamfer", "chamfer", "max", "avg")),
        {"set_size": 1},
    ],
    "DNPH": [{"train_proxies": True}, {"initialization": "fan_out", "classifier_outputs": 80}],
    "DPBE": [
        {"probabilistic": False},
        {"hessian": "contrastive", "max_pairs": 20, "average_samples": True, "eval_samples": 0},
        {"strict_triplets": True, "train_samples": 1},
    ],
    "DPSIH": [
        {"instances": 1},
        {"mask_padding": True, "patch_norm": "once", "auxiliary_reduction": "mean", "residual_dropout": 0.5},
    ],
    "DSPH": [{"threshold": 0.1}],
    "MITH": [{"activation": "relu"}, {"res_mlp_layers": 0}, {"transformer_layers": 0}, {"dropout": 0.5}],
    "TwDH": [
        {"short_bits": [16, 8], "long_bits": 64},
        {"low_rate": 0.5},
        {"short_fallback": "hadamard_pm", "bits": 4, "short_bits": [4]},
        {"transform": "trained", "transform_training": {**section("TwDH")["transform_training"], "epochs": 2}},
    ],
    "UCCH": [
        {"input": "features"},
        {"warmup_epochs": 0},
        {"warmup_epochs": 0, "input": "features", "cache_features": False, "memory_init": "reference"},
    ],
    "UCMFH": [{"missing": "paired"}, {"cache_features": False, "layers": 1, "heads": 1}],
    "UMoED": [
        *({"distance": name} for name in ("euclidean", "smooth_chamfer", "chamfer", "max", "avg")),
        {"distribution_temperature": None},
        {"mixture": None},
        {"width": 32},
        {"mixture": None, "width": 32},
        {"separate_heads": True},
        {"mask_padding": True},
        {"separate_heads": True, "mask_padding": True, "mixture": None},
        {"set_size": 4},
        {"set_size": 1},
    ],
    "VTPH": [{"affinity": "js"}, {"mask_padding": True}, {"prompt_layers": 0}, {"prompt_heads": 4}],
}
REFUSED: list[tuple[str, dict[str, Any], str]] = [  # method, settings, what is said
    ("DGHDGH", {"graph_heads": 3}, r"model\.graph_heads is 3, which does not divide model\.bits = 16"),
    *(
        ("DIMCH", wrong, next(iter(wrong)))
        for wrong in (
            {"set_size": 0},
            {"distance": "cosine"},
            {"diversity": "row"},
            {"dropout": 1.0},
            {"set_margin": 0.0},
        )
    ),
    ("DNPH", {"classifier_outputs": 3}, rf"model\.classifier_outputs is 3.*{CLASSES} classes"),
    ("MITH", {"bits": 4, "top_k": 8}, "must be at most model.bits, which is 4"),
    ("TwDH", {"bits": 24}, "must hold model.bits, which is 24"),
    ("UCCH", {"negatives": 12}, rf"model\.negatives is 12, but the training split has {ROWS} pairs"),
    ("UCCH", {"contrast_share": 1.5}, "contrast_share"),
    ("UCMFH", {"heads": 3}, "model.heads is 3, which does not divide 128"),
    ("UCMFH", {"input": "features"}, "features of pictures have 24 values and those of texts 9"),
    ("UCMFH", {"missing": "mean"}, "missing"),
    ("UMoED", {"set_size": 5}, r"must divide model\.bits, which is 16"),
    ("UMoED", {"bits": 64, "set_size": 2}, "must be at least 4"),
    ("UMoED", {"set_size": 0}, "greater than 0"),
    ("UMoED", {"distribution_temperature": 0.0}, "greater than 0"),
    ("UMoED", {"mixture": {"experts": 0, "slots": 1, "init": "release"}}, "experts"),
    ("UMoED", {"mixture": {"experts": 1, "slots": 1, "init": "none"}}, "init"),
    ("UMoED", {"distance": "cosine"}, "distance"),
    ("VTPH", {"prompt_heads": 7}, "model.prompt_heads is 7, which does not divide 64"),
]


def settings(method: str) -> list[dict[str, Any]]:
    """Every set of options of a method in small; the first is its own YAML."""
    return [{**SMALL.get(method, {}), **options} for options in [{}, *OPTIONS.get(method, [])]]


def with_dropout(method: str, probability: float) -> dict[str, float]:
    return {name: probability for name in section(method) if "dropout" in name}


def name_of(value: Any) -> str:
    return value if isinstance(value, str) else " ".join(f"{key}={chosen}" for key, chosen in value.items())[:60]


CASES = [(method, options) for method in MODELS.names() for options in settings(method)]


@pytest.mark.parametrize(("method", "options"), CASES, ids=name_of)
def test_options_train_and_encode(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Many rows and one; a row's code is the same among others and alone."""
    model = build(method, str(tmp_path), **options).train()
    rows = rows_of().only(model.fields)
    trained = [p for groups in model.param_groups().values() for group in groups.values() for p in group]
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}
    for batch in (rows, pick(rows, [4])):
        reached: set[int] = set()
        for step, done in updates(model(batch, START), descents(model, 0.0)):
            assert done.loss.isfinite()
            gradients = {id(p): p.grad for p in trained if p.grad is not None}
            assert all(gradient.isfinite().all() for gradient in gradients.values())
            assert step != "loss" or not model.loss_reaches_all or len(gradients) == len(trained)
            reached |= gradients.keys()
        assert reached == {id(p) for p in trained}
    model.eval()
    for encode, fields in ((model.encode_image, model.image_fields), (model.encode_text, model.text_fields)):
        with torch.no_grad():
            codes, alone = encode(rows_of().only(fields)), encode(pick(rows_of().only(fields), [4]))
        assert codes.shape == (ROWS, *model.code_shape) and torch.equal(codes.abs(), torch.ones_like(codes))
        assert torch.equal(alone[:, -model.bits :], codes[4:5, -model.bits :])


@pytest.mark.slow
@pytest.mark.parametrize("method", MODELS.names())
def test_processes_train_as_one(method: str, tmp_path: Path) -> None:
    every = [{**options, **with_dropout(method, 0.3)} for options in settings(method)]
    assert_same_in_processes(method, str(tmp_path), every, counts=(3,))


@pytest.mark.parametrize("method", MODELS.names())
def test_bf16_moves_the_loss_little(method: str, tmp_path: Path) -> None:
    losses = []
    for mixed in (False, True):
        model = build(method, str(tmp_path), **SMALL.get(method, {}), **with_dropout(method, 0.0)).train()
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            losses.append(model(rows_of().only(model.fields), START).loss)
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.05)


@pytest.mark.parametrize(("method", "wrong", "message"), REFUSED, ids=name_of)
def test_settings_that_cannot_be_are_refused(method: str, wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValidationError, UserError), match=message) as error:
        build(method, str(tmp_path), **wrong)
    assert isinstance(error.value, ValidationError) or "\n" not in str(error.value)
