"""Hash centres and transforms: properties, worked values, the cache, files, the converter of published ones."""

import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from common.errors import UserError
from data.convert_twdh_centers import convert, main
from models.blocks.center_files import HashCentersConfig, find_centers, read_centers, write_centers
from models.blocks.hash_centers import (
    HashCenters,
    TransformTraining,
    closed_form_transform,
    code_pairs,
    hadamard,
    long_centers,
    majority_codes,
    short_centers,
    train_transform,
    wrong_bits,
)
from models.blocks.heads import pair_codes
from tests.processes import run_processes
from tests.tiny_models import section
from tests.worked import multi_hot, wave

TRAINING: dict[str, Any] = {**section("TwDH")["transform_training"], "epochs": 12, "batch_size": 8}
TRAINING["optimizer"] = {**TRAINING["optimizer"], "lr": {"transform": 0.1}}


def distances(centers: Tensor) -> Tensor:
    """Hamming distances of all pairs of different rows."""
    all_pairs = (centers.shape[1] - centers @ centers.T) / 2
    return all_pairs[~torch.eye(len(centers), dtype=torch.bool)]


def settings(**overrides: Any) -> HashCentersConfig:
    """Settings of TwDH's YAML for centres, with small lengths."""
    small = {"bits": 8, "long_bits": 32, "short_bits": [8, 4], "transform_training": TRAINING}
    given = {name: value for name, value in section("TwDH").items() if name in HashCentersConfig.model_fields}
    return HashCentersConfig.model_validate({**given, **small, **overrides})


# ---------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize(("classes", "bits"), [(24, 512), (80, 512), (80, 128), (7, 8), (1, 2)])
def test_long_centers_are_distinct_orthogonal_balanced_rows(classes: int, bits: int) -> None:
    centers = long_centers(classes, bits, 3)
    assert centers.shape == (classes, bits) and centers.dtype == torch.float32
    assert torch.equal(centers @ centers.T, bits * torch.eye(classes))
    assert not centers.sum(1).any()  # so the first row of the matrix, all ones, is not among them
    rows = {tuple(row) for row in hadamard(bits).tolist()}
    assert all(tuple(row) in rows for row in centers.tolist())


def test_hadamard_by_hand() -> None:
    wanted = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert hadamard(4).tolist() == wanted


@pytest.mark.parametrize(("classes", "bits", "fix"), [(24, 500, "powers of two"), (64, 64, "long_bits=128 or more")])
def test_long_centers_that_do_not_exist(classes: int, bits: int, fix: str) -> None:
    with pytest.raises(UserError, match=fix):
        long_centers(classes, bits, 0)


@pytest.mark.parametrize("fallback", ["balanced", "hadamard_pm"])
def test_short_centers_are_rows_while_they_suffice(fallback: Any) -> None:
    centers = short_centers(24, 32, 5, fallback)
    assert torch.equal(centers @ centers.T, 32 * torch.eye(24)) and not centers.sum(1).any()
    assert len(short_centers(31, 32, 5, fallback)) == 31


@pytest.mark.parametrize(
    ("classes", "bits", "least"), [(24, 16, 6), (35, 16, 4), (80, 16, 4), (80, 32, 10), (80, 64, 24), (21, 12, 2)]
)
def test_balanced_short_centers_keep_apart_and_never_cancel(classes: int, bits: int, least: int) -> None:
    for seed in (1, 1814):
        centers = short_centers(classes, bits, seed, "balanced")
        assert centers.shape == (classes, bits) and not centers.sum(1).any()
        assert least <= distances(centers).min() and distances(centers).max() <= bits - least


def test_negated_rows_as_an_option() -> None:
    centers = short_centers(24, 16, 1, "hadamard_pm")
    assert set((centers @ centers.T).flatten().tolist()) == {-16.0, 0.0, 16.0}
    assert distances(centers).min() == 8 and not centers.sum(1).any()


@pytest.mark.parametrize(("classes", "bits", "fallback"), [(31, 16, "hadamard_pm"), (80, 6, "balanced")])
def test_short_centers_that_do_not_exist(classes: int, bits: int, fallback: Any) -> None:
    with pytest.raises(UserError, match=f"no {classes} short centres of {bits} bits"):
        short_centers(classes, bits, 0, fallback)


def test_centers_follow_the_seed_and_lengths_are_independent() -> None:
    assert torch.equal(long_centers(9, 64, 1), long_centers(9, 64, 1))
    assert not torch.equal(long_centers(9, 64, 1), long_centers(9, 64, 2))
    assert not torch.equal(long_centers(9, 64, 1), short_centers(9, 64, 1, "balanced"))
    assert not torch.equal(short_centers(40, 16, 1, "balanced"), short_centers(40, 16, 2, "balanced"))


# ---------------------------------------------------------------------------------------------- codes, transforms


def test_majority_by_hand() -> None:
    centers = torch.tensor([[1.0, 1.0, -1.0], [1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    labels = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    wanted = [[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]]
    assert majority_codes(labels, centers, torch.tensor([-1, 1, 1])).tolist() == wanted
    assert majority_codes(labels, centers, torch.tensor([-1, -1, 1]))[1].tolist() == [1.0, -1.0, -1.0]


def test_pairs_of_codes_and_back() -> None:
    codes = torch.tensor([[1.0, -1.0, -1.0]])
    assert code_pairs(codes).tolist() == [[0.0, 1.0, 1.0, 0.0, 1.0, 0.0]]
    assert torch.equal(pair_codes(code_pairs(codes)), codes)


def test_worked_closed_form() -> None:
    long, short = hadamard(8)[1:6], wave(0.3, 5, 4).sign()
    transform = closed_form_transform(long, short)
    torch.testing.assert_close(transform[0], torch.tensor([2.5, -2.5, -0.5, 0.5, -0.5, 0.5, -0.5, 0.5]))
    assert transform.shape == (16, 8) and wrong_bits(transform, long, short) == 0


@pytest.mark.parametrize(("classes", "bits"), [(24, 16), (80, 16), (80, 64), (21, 32)])
def test_closed_form_is_lossless_and_votes(classes: int, bits: int) -> None:
    long, short = long_centers(classes, 512, 1), short_centers(classes, bits, 1, "balanced")
    transform = closed_form_transform(long, short)
    assert wrong_bits(transform, long, short) == 0
    logits = code_pairs(long) @ transform
    torch.testing.assert_close(logits[:, 1::2] - logits[:, ::2], 8 * short, atol=1e-4, rtol=0)
    labels = torch.zeros(classes, classes)  # three classes an item: no ties, the vote is the majority
    for step in (0, 1, 5):
        labels[torch.arange(classes), (torch.arange(classes) + step) % classes] = 1
    ones = torch.ones(1)
    item, wanted = majority_codes(labels, long, ones), majority_codes(labels, short, ones)
    # Not 0: the majority of rows a, b, c also resembles -abc, which may be the centre of another class.
    assert (pair_codes(code_pairs(item) @ transform) != wanted).float().mean() < 0.05


def test_closed_form_of_centers_that_are_not_orthogonal() -> None:
    long, short = wave(0.1, 6, 20).sign(), wave(0.7, 6, 5).sign()
    assert (long @ long.T)[0, 1:].any()
    assert wrong_bits(closed_form_transform(long, short), long, short) == 0


def test_training_improves_a_transform_and_follows_the_seed() -> None:
    labels, long, short = multi_hot(40, 5), long_centers(5, 32, 1), short_centers(5, 8, 1, "balanced")
    config = TransformTraining.model_validate(TRAINING)
    start = train_transform(labels, long, short, config.model_copy(update={"epochs": 1}), 1)
    trained = train_transform(labels, long, short, config, 1)
    assert trained.shape == (64, 16) and not trained.requires_grad
    assert wrong_bits(start, long, short) > 0.2 and wrong_bits(trained, long, short) < 0.05
    assert torch.equal(train_transform(labels, long, short, config, 1), trained)
    assert not torch.equal(train_transform(labels, long, short, config, 2), trained)


def test_training_shrinks_entries_by_their_weight() -> None:
    labels, long, short = multi_hot(40, 5), long_centers(5, 32, 1), short_centers(5, 8, 1, "balanced")
    config = TransformTraining.model_validate(TRAINING)
    free, sparse = (
        train_transform(labels, long, short, config.model_copy(update={"sparsity_weight": weight, "epochs": 3}), 1)
        for weight in (0.0, 1.0)
    )
    assert sparse.abs().sum() < free.abs().sum()


# ---------------------------------------------------------------------------------------------- settings, cache


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ({"bits": 16}, "must hold model.bits, which is 16"),
        ({"short_bits": [8, 32]}, "must be shorter than model.long_bits, which is 32"),
        ({"short_bits": [8, 8]}, "twice"),
        ({"short_bits": []}, "at least 1"),
        ({"transform": "file"}, "must be closed_form or trained"),
        ({"centers": "file"}, "must name a folder"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(overrides: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        settings(**overrides)


@pytest.mark.parametrize("transform", ["closed_form", "trained"])
def test_cache_is_used_again_for_the_same_inputs_only(
    tmp_path: Path, transform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = multi_hot(40, 5)
    first = find_centers(settings(transform=transform, short_bits=[8]), labels, str(tmp_path))
    files = list(tmp_path.rglob("*.*"))
    assert [path.suffix for path in files] == [".safetensors"]  # and nothing half written beside it
    with safetensors.safe_open(files[0], framework="pt") as opened:
        header = json.loads(opened.metadata()["header"])
    wanted = {"classes": 5, "long_bits": 32, "short_bits": [8], "seed": 1, "transform": transform}
    assert header.items() >= wanted.items() and "hadamard" in header["generator"] and "row c" in header["class_order"]

    other = settings(transform=transform, short_bits=[8], center_seed=2)
    assert not torch.equal(find_centers(other, labels, str(tmp_path)).long, first.long)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    flipped = find_centers(settings(transform=transform, short_bits=[8]), 1 - labels, str(tmp_path))
    assert len(list(tmp_path.rglob("*.safetensors"))) == (3 if transform == "trained" else 2)
    assert torch.equal(flipped.transforms[8], first.transforms[8]) == (transform == "closed_form")

    monkeypatch.setattr("models.blocks.center_files.long_centers", None)  # would fail if anything were made again
    again = find_centers(settings(transform=transform, short_bits=[8]), labels, str(tmp_path))
    assert torch.equal(again.long, first.long) and torch.equal(again.transforms[8], first.transforms[8])
    assert torch.equal(again.short[8], first.short[8])


def test_damaged_cache_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels, config = multi_hot(12, 5), settings(short_bits=[8])
    first = find_centers(config, labels, str(tmp_path))
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:200])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(find_centers(config, labels, str(tmp_path)).long, first.long)
    assert "making them anew" in caplog.text
    assert torch.equal(read_centers(path, 5, 32, [8], transforms=True).long, first.long)


def make_in_a_process(cache: str) -> list[Tensor]:
    centers = find_centers(settings(transform="trained", short_bits=[8]), multi_hot(40, 5), cache)
    return [centers.long, centers.short[8], centers.transforms[8]]


def test_several_processes_make_them_once(tmp_path: Path) -> None:
    one, other = run_processes(make_in_a_process, 2, str(tmp_path))
    alone = make_in_a_process(str(tmp_path / "alone"))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, other, alone, strict=True))
    assert len(list((tmp_path / "hash_centers").rglob("*.safetensors"))) == 1


# ---------------------------------------------------------------------------------------------- files


def some_centers() -> HashCenters:
    """Centres of five classes with transforms that are no closed form."""
    long = long_centers(5, 32, 7)
    short = {bits: wave(bits, 5, bits).sign() for bits in (4, 8)}
    return HashCenters(long, short, {bits: wave(bits, 64, 2 * bits) for bits in short})


def test_file_round_trip_and_use(tmp_path: Path) -> None:
    centers = some_centers()
    write_centers(tmp_path / "32.safetensors", centers, {"seed": None})
    config = settings(centers="file", transform="file", center_folder=str(tmp_path))
    found = find_centers(config, multi_hot(12, 5), str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()  # there is nothing to keep
    assert torch.equal(found.long, centers.long)
    for bits in (4, 8):
        assert torch.equal(found.short[bits], centers.short[bits])
        assert torch.equal(found.transforms[bits], centers.transforms[bits])
    closed = settings(centers="file", center_folder=str(tmp_path))
    found = find_centers(closed, multi_hot(12, 5), str(tmp_path / "cache"))
    assert torch.equal(found.long, centers.long) and wrong_bits(found.transforms[8], found.long, found.short[8]) == 0


@pytest.mark.parametrize(
    ("overrides", "classes", "fault"),
    [
        ({}, 6, "long is 5 x 32, but 6 x 32 is needed"),
        ({"long_bits": 64}, 5, "64.safetensors is not there"),
        ({"short_bits": [8, 16]}, 5, "has no short.16, only long, short.4, short.8"),
    ],
    ids=str,
)
def test_file_of_other_bits_or_classes(tmp_path: Path, overrides: dict[str, Any], classes: int, fault: str) -> None:
    write_centers(tmp_path / "32.safetensors", some_centers(), {})
    config = settings(centers="file", transform="file", center_folder=str(tmp_path), **overrides)
    with pytest.raises(UserError, match=fault) as raised:
        find_centers(config, multi_hot(12, classes), str(tmp_path))
    assert "\n" not in str(raised.value)


def test_file_with_other_values_or_damaged(tmp_path: Path) -> None:
    centers = some_centers()
    path = tmp_path / "32.safetensors"
    write_centers(path, HashCenters(centers.long / 2, centers.short, centers.transforms), {})
    with pytest.raises(UserError, match="values other than -1 and"):
        read_centers(path, 5, 32, [8], transforms=True)
    centers.transforms[8][3, 3] = float("nan")
    write_centers(path, centers, {})
    assert read_centers(path, 5, 32, [8], transforms=False).transforms == {}
    with pytest.raises(UserError, match="not finite"):
        read_centers(path, 5, 32, [8], transforms=True)
    nested = safetensors.torch.save({"long": centers.long}, {"header": "[" * 100_000})
    for content in (b"nothing of the kind", nested):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            read_centers(path, 5, 32, [8], transforms=True)


# ---------------------------------------------------------------------------------------------- converter


class Malicious:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def publish(folder: Path) -> HashCenters:
    """Files as the authors lay them out, with their mixture of types."""
    centers = some_centers()
    for name in ("long", "short", "trans/32"):
        (folder / name).mkdir(parents=True)
    torch.save(centers.long.long(), folder / "long/32.pkl")
    torch.save(centers.short[4].long(), folder / "short/4.pkl")
    torch.save(centers.short[8], folder / "short/8.pkl")
    for bits, transform in centers.transforms.items():
        torch.save(transform, folder / f"trans/32/{bits}.pkl")
    return centers


def test_converts_one_set_or_all(tmp_path: Path) -> None:
    centers = publish(tmp_path / "published/coco")
    publish(tmp_path / "published/mirflickr")
    assert convert(tmp_path / "published/coco", tmp_path / "one") == [tmp_path / "one/32.safetensors"]
    assert convert(tmp_path / "published", tmp_path / "all") == [
        tmp_path / "all/coco/32.safetensors",
        tmp_path / "all/mirflickr/32.safetensors",
    ]
    assert (tmp_path / "all/coco/32.safetensors").read_bytes() == (tmp_path / "one/32.safetensors").read_bytes()
    found = read_centers(tmp_path / "one/32.safetensors", 5, 32, [4, 8], transforms=True)
    assert torch.equal(found.long, centers.long)
    for bits in (4, 8):
        assert torch.equal(found.short[bits], centers.short[bits])
        assert torch.equal(found.transforms[bits], centers.transforms[bits])


def test_converter_takes_plain_numbers_of_bits_only(tmp_path: Path) -> None:
    publish(tmp_path / "published")
    written = convert(tmp_path / "published", tmp_path / "out")
    content = written[0].read_bytes()
    for name in ("short/08.pkl", "short/0.pkl", "long/\N{ARABIC-INDIC DIGIT THREE}2.pkl", "trans/32/16 (1).pkl"):
        (tmp_path / "published" / name).write_bytes(b"no array")
    assert convert(tmp_path / "published", tmp_path / "out") == written and written[0].read_bytes() == content


def test_converter_as_a_command(tmp_path: Path) -> None:
    publish(tmp_path / "published")
    script = Path(__file__).parents[1] / "data/convert_twdh_centers.py"
    command = [sys.executable, str(script), "--source", str(tmp_path / "published"), "--root", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "5 classes; class bits that its transforms miss: 4 bits" in done.stderr
    assert (tmp_path / "out/32.safetensors").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "bare pickle"])
def test_converter_runs_no_code(tmp_path: Path, zipped: bool, capsys: pytest.CaptureFixture[str]) -> None:
    publish(tmp_path / "published")
    victim = tmp_path / "published/trans/32/8.pkl"
    if zipped:
        torch.save({"a": Malicious(tmp_path / "made")}, victim)
    else:
        victim.write_bytes(pickle.dumps(Malicious(tmp_path / "made"), protocol=2))
    assert main(["--source", str(tmp_path / "published"), "--root", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and str(victim) in message
    assert not (tmp_path / "made").exists() and not (tmp_path / "out").exists()
    if zipped:
        assert "could run code" in message


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("short/8.pkl", torch.ones(6, 8), "is 6 x 8, but 5 x 8 is needed"),
        ("short/8.pkl", torch.ones(5, 4), "is 5 x 4, but 5 x 8 is needed"),
        ("short/8.pkl", torch.zeros(5, 8), "values other than -1 and"),
        ("long/32.pkl", torch.tensor(1.0), "a single number"),
        ("trans/32/8.pkl", torch.ones(64, 8), "is 64 x 8, but 64 x 16 is needed"),
        ("trans/32/8.pkl", torch.full((64, 16), float("inf")), "not finite"),
        ("trans/32/8.pkl", torch.full((64, 16), 1e300, dtype=torch.float64), "not finite"),  # in float32
        ("long/32.pkl", torch.ones(0, 32), "is 0 x 32, but 1 x 32 is needed"),
        ("trans/32/16.pkl", torch.ones(64, 32), "leads to 16 bits"),
        ("short/8.pkl", {"centers": torch.ones(5, 8)}, "holds dict, not one real array"),
        ("short/8.pkl", torch.ones(5, 8, dtype=torch.complex64), "not one real array"),
        ("short/8.pkl", torch.ones(5, 8, dtype=torch.bool), "not one real array"),
        ("short/8.pkl", torch.ones(5, 8).to(torch.float8_e4m3fn), "not one real array"),
        ("short/8.pkl", torch.empty(5, 8, device="meta"), "not one real array"),
        ("long/32.pkl", torch.ones(1, 1).expand(10**13, 32), "not one real array"),
        ("short/8.pkl", b"PK\x03\x04 cut off", "damaged"),
        ("short/8.pkl", b"", "damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_converter_refuses(tmp_path: Path, name: str, content: Any, fault: str) -> None:
    publish(tmp_path / "published")
    if isinstance(content, bytes):
        (tmp_path / "published" / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / "published" / name)
    with pytest.raises(UserError, match=fault) as raised:
        convert(tmp_path / "published", tmp_path / "out")
    assert "\n" not in str(raised.value) and Path(name).name in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_converter_without_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="neither it nor a folder in it"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "long").mkdir()
    with pytest.raises(UserError, match="holds no <bits>.pkl"):
        convert(tmp_path, tmp_path / "out")
