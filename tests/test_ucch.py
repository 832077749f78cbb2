"""UCCH: losses by loops over draws and pairs, the memory, remembered and stored features, the command line."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.types import Progress
from models.ucch import UCCH, memory_contrast, ranking_loss
from runners.encoder import Encoder
from tests import commands, tiny_data
from tests.commands import ROOT
from tests.tiny_models import SMALL, build, pick, rows_of
from tests.worked import wave

DOUBLE = torch.float64


def ucch(cache: Path, **overrides: Any) -> UCCH:
    model = build("UCCH", str(cache), **{**SMALL["UCCH"], **overrides})
    assert isinstance(model, UCCH)
    return model


def at(epoch: int) -> Progress:
    return Progress(epoch=epoch, epochs=4, step=epoch, steps_per_epoch=1)


def test_contrast_is_that_of_a_loop_over_draws(tmp_path: Path) -> None:
    """Draws repeat, and one of them is the row's own item."""
    vectors, targets = wave(0.3, 3, 5, DOUBLE), wave(0.9, 11, 5, DOUBLE).sign()
    places, scale = torch.tensor([[4, 2, 2, 7], [0, 0, 10, 3], [9, 1, 5, 6]]), 0.9 * math.sqrt(5)
    rows = []
    for vector, drawn in zip(vectors, places.tolist(), strict=True):
        scores = [float(vector @ targets[place]) / scale for place in drawn]
        rows.append(math.log(sum(map(math.exp, scores))) - scores[0])
    counts = ucch(tmp_path).count(places)
    assert counts.sum(1).tolist() == [4.0] * 3 and counts[0, 2] == 2
    loss = memory_contrast(vectors, targets, counts.double(), places[:, 0], 0.9)
    assert loss.item() == pytest.approx(sum(rows) / 3, abs=1e-12)


@pytest.mark.parametrize(("margin", "shift"), [(0.2, 0.1), (0.0, 1.0), (0.5, 0.3)])
def test_ranking_is_that_of_a_loop_over_pairs(margin: float, shift: float) -> None:
    cosines = wave(0.4, 5, 5, DOUBLE)
    total, easy = 0.0, 0
    for mine in range(5):
        pair = float(cosines[mine, mine])
        for others in (cosines[mine], cosines[:, mine]):
            lowered = [float(x) - (shift if x < pair - margin else 0) for x in others]
            easy += sum(x < pair - margin for x in others.tolist())
            total += (-pair + math.log(sum(map(math.exp, lowered))) + margin) / 5
    assert 0 < easy < 50
    assert ranking_loss(cosines, margin, shift).item() == pytest.approx(total, abs=1e-12)


def test_the_memory_starts_at_signs_and_moves_to_the_mean_of_both(tmp_path: Path) -> None:
    fair, reference = (ucch(tmp_path, bits=1024, memory_init=start).memory.rows for start in ("fair", "reference"))
    for rows, share in ((fair, 0.5), (reference, 0.3085)):
        assert (rows > 0).float().mean().item() == pytest.approx(share, abs=0.02)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
    model = ucch(tmp_path)
    image, text = torch.eye(16)[:2], torch.eye(16)[2:4]
    before = model.memory.rows.clone()
    model.remember_pairs(torch.tensor([7, 3]), image, text, 0.4)
    for row, place in ((0, 7), (1, 3)):
        mixed = 0.4 * before[place] + 0.6 * (image[row] + text[row]) / math.sqrt(2)
        torch.testing.assert_close(model.memory.rows[place], mixed / mixed.norm())
    rest = [place for place in range(11) if place not in (7, 3)]
    assert torch.equal(model.memory.rows[rest], before[rest])


def test_the_batch_stands_in_for_the_memory_while_warming_up(tmp_path: Path) -> None:
    """Then the memory does not count, and its rows are replaced."""
    losses: dict[int, list[float]] = {0: [], 1: []}
    for epoch, found in losses.items():
        for sign in (1, -1):
            model = ucch(tmp_path)
            model.memory.rows.mul_(sign)
            torch.manual_seed(0)
            found.append(model(rows_of().only(model.fields), at(epoch)).terms["contrast_image"].item())
    assert losses[0][0] == losses[0][1] != losses[1][0] != losses[1][1]


def remembering(cache: Path, fields: list[str]) -> tuple[list[float], dict[str, Tensor]]:
    model, split = ucch(cache).train(), rows_of()
    if fields:
        model.remember(split.only(frozenset(fields)))
    optimizer, losses = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), []
    for step, rows in enumerate([[3, 0, 9], [1, 2, 10]]):
        torch.manual_seed(step)
        batch = pick(split.only(model.fields - frozenset(fields)), rows)
        loss = model(batch, at(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize("fields", [["image"], ["image", "text"]], ids=str)
def test_remembered_features_train_as_computed_ones(tmp_path: Path, fields: list[str]) -> None:
    computed, remembered = remembering(tmp_path, []), remembering(tmp_path, fields)
    assert remembered[0] == pytest.approx(computed[0], rel=1e-6)
    assert remembered[1].keys() == computed[1].keys()  # what is remembered is no part of a checkpoint
    for name, value in computed[1].items():
        torch.testing.assert_close(remembered[1][name], value, rtol=1e-5, atol=1e-6)


def test_stored_features_need_no_backbone_and_no_pictures(tmp_path: Path) -> None:
    model = ucch(tmp_path, input="features")
    assert model.fields == {"image_feature", "text_feature"} and not model.rememberable_fields
    assert model.image_fields == {"image_feature"} and model.text_fields == {"text_feature"}
    assert not [name for name in model.state_dict() if name.startswith("backbone.")]
    assert not ucch(tmp_path, cache_features=False).rememberable_fields


# ---------------------------------------------------------------------------------------------- command line


@pytest.fixture
def arguments(tmp_path: Path, tiny_overrides: list[str]) -> list[str]:
    """A run on stored features of widths 20 and 6; its backbone names no file, for none is opened."""
    random = np.random.default_rng(0)
    for name, width in (("image", 20), ("text", 6)):
        np.save(tmp_path / f"{name}.npy", random.normal(size=(tiny_data.PAIRS, width)).astype(np.float32))
    small = [f"model.{key}={value}" for key, value in SMALL["UCCH"].items()]
    places = [f"dataset.{name}_features=[{tmp_path / f'{name}.npy'}]" for name in ("image", "text")]
    file = str(ROOT / "configs/UCCH/coco.yaml")
    settings = [*tiny_overrides, *small, *places, "model.input=features", "model.backbone=missing.pt", "run.epochs=1"]
    return ["--config-file", file, "--save-dir", str(tmp_path / "run"), *settings]


def test_stored_features_of_another_width_than_the_checkpoint_s(tmp_path: Path, arguments: list[str]) -> None:
    code, _, err = commands.run(*arguments)
    assert code == 0, err
    best = ["--evaluate", str(tmp_path / "run/best.pt")]
    assert commands.run(*arguments, *best)[0] == 0
    np.save(tmp_path / "text.npy", np.ones((tiny_data.PAIRS, 7), np.float32))
    error = commands.refused(*arguments, *best)
    assert "does not fit UCCH" in error and "text_net.0.weight: (16, 6) there, (16, 7) here" in error


def test_checkpoint_of_the_authors(tmp_path: Path, arguments: list[str]) -> None:
    """Their file: a state dict for each network, numbers beside them, no memory."""
    torch.manual_seed(3)
    nets = {"image": torch.nn.Linear(20, 16), "text": torch.nn.Linear(6, 16)}
    saved = {
        f"{name}_model_state_dict": {f"fc.0.{key}": value for key, value in net.state_dict().items()}
        for name, net in nets.items()
    }
    torch.save({**saved, "epoch": 3, "Avg": 0.5}, tmp_path / "best.t7")
    code, _, err = commands.run(*arguments, "model.image_hidden=[]", "--evaluate", str(tmp_path / "best.t7"))
    assert code == 0, err
    with np.load(tmp_path / "run/codes-best.npz") as codes:
        found = np.concatenate([codes["q_txt"], codes["r_txt"]])
    features = torch.from_numpy(np.load(tmp_path / "text.npy"))
    wanted = (nets["text"](features) >= 0).numpy() * 2 - 1
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, wanted.tolist()))


def test_stored_features_that_are_missing_or_of_another_length(tmp_path: Path, arguments: list[str]) -> None:
    np.save(tmp_path / "image.npy", np.ones((tiny_data.PAIRS - 1, 20), np.float32))
    assert "image.npy has 55 items; they must list the same pairs" in commands.refused(*arguments)
    (tmp_path / "image.npy").unlink()
    error = commands.refused(*arguments)
    assert "no 'image_feature' for the train split; put one of" in error and "image.npy into" in error


def test_more_negatives_than_training_pairs(arguments: list[str]) -> None:
    error = commands.refused(*arguments, "model.negatives=38")
    assert "model.negatives is 38, but the training split has 37 pairs to draw them from" in error


def test_pictures_and_texts_for_a_model_of_stored_features(tmp_path: Path, arguments: list[str]) -> None:
    """Codes come from rows of features; whoever brings pictures or texts is told so."""
    code, _, err = commands.run(*arguments)
    assert code == 0, err
    best = tmp_path / "run/best.pt"
    encoder = Encoder.load(best, device="cpu")
    assert encoder.images(np.load(tmp_path / "image.npy")[:3]).values.shape == (3, 16)
    with pytest.raises(UserError, match=r"made from rows of image_feature, \[20\] numbers each, not from strs"):
        encoder.images(["dog.png"])
    with pytest.raises(UserError, match=r"made from rows of text_feature, \[6\] numbers each, not from strs"):
        encoder.texts(["a dog"])
    lines = tmp_path / "lines.txt"
    lines.write_text("a dog")
    assert "text codes are made from text_feature, and there is no text_feature here" in commands.refused(
        "--index", best, "--input", lines, "--save-dir", tmp_path / "index"
    )
