"""DAGtH: its published loss and rotation alone, in every setting but `easy`, which is not offered."""

from collections.abc import Iterator
from typing import Any

import torch

from models.blocks.householder import HouseholderRotation, bit_variance
from models.dagth import DAGtHConfig, adaptive_triplet_loss
from tests.parity_cases.rows import EQUAL, GRADIENTS, LOSS, OUTPUTS, Arrays, Row, absolute, compare


def check_dagth_loss(name: str, cfg: dict[str, Any], arrays: Arrays) -> Iterator[Row]:
    """Losses, what they hang on, and gradients of every setting; then the rotation."""
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items() if key != "cfg"}
    labels = tensors["in/label"]
    similar = labels @ labels.T > 0
    others = ~torch.eye(len(labels), dtype=torch.bool)
    for key, settings in cfg["settings"].items():
        if settings["type_of_triplets"] == "easy":
            continue
        codes = tensors["in/logits"].clone().requires_grad_()
        found = adaptive_triplet_loss(codes, codes, similar & others, ~similar, _config(cfg, settings))
        found.loss.backward()
        assert codes.grad is not None
        ours = {
            f"{key}/loss/total": found.loss,
            f"{key}/out/epsilon": found.margin,
            f"{key}/out/beta": found.threshold,
            f"{key}/out/n_triplets": found.triplets,
            f"{key}/out/n_an_pairs": found.pairs,
            f"{key}/grad/logits": codes.grad,
        }
        for quantity, parts, bound in (
            ("loss", ("loss/total",), LOSS),
            ("margins", ("out/epsilon", "out/beta"), absolute(1e-6)),
            ("counts", ("out/n_triplets", "out/n_an_pairs"), EQUAL),
            ("gradients", ("grad/logits",), GRADIENTS),
        ):
            wanted = {f"{key}/{part}": tensors[f"{key}/{part}"] for part in parts if f"{key}/{part}" in tensors}
            yield compare(name, f"{key}, {quantity}", ours, wanted, bound)
    rotation = HouseholderRotation(int(cfg["rotation_dim"]))
    rotation.load_state_dict({"weights": tensors["rotation/in/weights"]})
    rotated = rotation(tensors["rotation/in/x"])
    loss = bit_variance(rotated)
    loss.backward()
    assert rotation.weights.grad is not None
    ours = {
        "rotation/out/rotated": rotated,
        "rotation/loss/bit_var": loss,
        "rotation/grad/weights": rotation.weights.grad,
    }
    for part, bound in zip(ours, (OUTPUTS, LOSS, GRADIENTS), strict=True):
        yield compare(name, part.replace("/", ", ", 1), ours, {part: tensors[part]}, bound)


def _config(cfg: dict[str, Any], settings: dict[str, Any]) -> DAGtHConfig:
    return DAGtHConfig.model_validate(
        {
            "name": "DAGtH",
            "bits": cfg["bits"],
            "backbone": "none",
            "dropout": 0.0,
            "distance": settings["type_of_distance"],
            "triplets": settings["type_of_triplets"].replace("-", "_"),
            "k_delta": settings["k_delta"],
            "max_margin": 0.5,
            "pair_term": settings["calc_loss_an"],
            "k_an": settings["k_an"],
            "pair_weight": settings["la"],
            "rotation_epochs": 0,
        }
    )
