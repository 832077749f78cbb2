"""Settings that no golden case has: their terms, from the outputs that the references recorded, by loops in float64."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from common.types import Progress
from tests.parity_cases import open_case

GOLDEN = Path(__file__).parent / "golden"
Array = npt.NDArray[np.float64]


def computed_terms(name: str, settings: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    """Terms of the first step under the reference's names, `cfg.model`, and the arrays; settings by dotted place."""
    with np.load(GOLDEN / name) as file:
        arrays = {key: file[key] for key in file.files}
    cfg = json.loads(str(arrays["cfg"]))
    for place, value in settings.items():
        section = cfg["model"]
        *sections, key = place.split(".")
        for part in sections:
            section = section[part]
        section[key] = value
    case = open_case(cfg, arrays)
    model = case.build().train()
    with torch.no_grad():
        out = model(case.batch, Progress(epoch=0, epochs=1, step=0, steps_per_epoch=20))
    return {key: float(value) for key, value in case.terms(out.terms).items()}, cfg["model"], arrays


def units(rows: Any) -> Array:
    """Vectors of length one, [..., W] float64."""
    wide = np.asarray(rows, np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=-1, keepdims=True))


def set_distances_by_loops(a: Array, b: Array, s: dict[str, Any]) -> Array:
    """Distances of sets [N, M, W] whose members have length one, first argument as rows, [N, N]."""
    distances = np.empty((len(a), len(b)))
    for i, first in enumerate(a):
        for j, second in enumerate(b):
            c, t = first @ second.T, s["temperature"]
            sharp = t * s["temperature_txt_scale"]
            similarity = {
                "smooth_chamfer": np.log(np.exp(sharp * c).sum(1)).sum() / (len(first) * sharp * s["denominator"])
                + np.log(np.exp(t * c).sum(0)).sum() / (len(second) * t * s["denominator"]),
                "chamfer": (c.max(1).sum() / len(first) + c.max(0).sum() / len(second)) / s["denominator"],
                "max": c.max(),
                "avg": (1 / (1 + np.exp(-c))).mean(),
            }[s["mode"]]
            distances[i, j] = max(0.0, 1 - similarity)
    return distances


def triplet_by_loops(distances: Array, labels: Any, margin: float) -> float:
    """The weighted triplet loss of distances [N, N] and labels [N, C]."""
    shared = labels.astype(int) @ labels.astype(int).T
    total, count = 0.0, 0
    for i, row in enumerate(shared.tolist()):
        ideal = sum((2**n - 1) / math.log2(rank + 2) for rank, n in enumerate(sorted(row, reverse=True)))
        for j, n in enumerate(row):
            for k in np.flatnonzero(shared[i] == 0):
                cost = (2**n - 1) / ideal * (distances[i, j] - distances[i, k] + margin)
                if cost > 1e-16:
                    total, count = total + cost, count + 1
    return total / count


SETS = [
    {"mode": "smooth_chamfer", "temperature": 4.0, "temperature_txt_scale": 2.0, "denominator": 3.0},
    {"mode": "chamfer", "denominator": 3.0},
    {"mode": "max"},
    {"mode": "avg"},
]


def assert_triplets_of_sets(terms: dict[str, float], s: dict[str, Any], labels: Any, image: Array, text: Array) -> None:
    """The terms of both directions are those of loops over sets [N, M, W] and labels [N, C]."""
    for name, distances in (
        ("i2t", set_distances_by_loops(image, text, s["distance"])),
        ("t2i", set_distances_by_loops(text, image, s["distance"])),
    ):
        wanted = triplet_by_loops(distances, labels, s["chamfer"]["token_triplet_margin"])
        assert terms[f"Tokens.Similarity.{name}"] == pytest.approx(wanted, rel=5e-5)


@pytest.mark.parametrize("changed", SETS, ids=lambda changed: changed["mode"])
def test_distances_of_sets_in_dimch(changed: dict[str, Any]) -> None:
    settings = {f"distance.{key}": value for key, value in changed.items()}
    terms, s, arrays = computed_terms("DIMCH-unified-b64B13C80s2101.npz", settings)
    image, text = (units(arrays[f"out/{name}_token_embeds"]) for name in ("image", "text"))
    assert_triplets_of_sets(terms, s, arrays["in/label"], image, text)


@pytest.mark.parametrize("changed", SETS, ids=lambda changed: changed["mode"])
def test_distances_of_sets_in_umoed(changed: dict[str, Any]) -> None:
    settings = {f"distance.{key}": value for key, value in changed.items()}
    terms, s, arrays = computed_terms("UMoED-unified-b16B8C24s2202.npz", settings)
    image, text = units(arrays["out/image_code"]), units(arrays["out/text_code"])
    assert_triplets_of_sets(terms, s, arrays["in/label"], image, text)


@pytest.mark.parametrize("extreme", [0.02, 0.3, None])
@pytest.mark.parametrize("measure", ["cosine", "euclidean"])
def test_distances_by_position_in_umoed(measure: str, extreme: float | None) -> None:
    settings = {"distance_mode": measure, "extreme": extreme is not None, "extreme_T": extreme or 0.3}
    terms, s, arrays = computed_terms("UMoED-unified-b16B8C24s2202.npz", settings)
    image, text = units(arrays["out/image_code"]), units(arrays["out/text_code"])
    if extreme is not None:
        image, text = np.exp(image / extreme), np.exp(text / extreme)
        image, text = image / image.sum(-1, keepdims=True), text / text.sum(-1, keepdims=True)
    members = image.shape[1]
    distances = np.zeros((len(image), len(text)))
    for i, first in enumerate(image):
        for j, second in enumerate(text):
            for p, q in zip(first, second, strict=True):
                agreed = (1 - max(0.0, p @ q)) / members
                distances[i, j] += agreed if measure == "cosine" else np.linalg.norm(p - q) / members**2
    margin = s["chamfer"]["token_triplet_margin"]
    for name, rows in (("i2t", distances), ("t2i", distances.T)):
        wanted = triplet_by_loops(rows, arrays["in/label"], margin)
        assert terms[f"Tokens.Similarity.{name}"] == pytest.approx(wanted, rel=5e-5)
