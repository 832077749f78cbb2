"""Validation split, choice of the reported epoch, early stopping: nothing changes without them, and they are exact."""

import json
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from common.errors import UserError
from dataset.splits import SplitConfig, make_splits
from runners import evaluation
from runners.selection import choices, choose, out_of_patience
from tests import datasets
from tests.commands import refused, run
from tests.runs import arguments, assert_same_state, final_state, interrupted_at, losses
from tests.tiny_data import PAIRS, QUERY

VALIDATION = 11  # with QUERY and TRAIN it is all of the tiny data
PROTOCOLS: dict[str, dict[str, Any]] = {
    "permutation": {"protocol": "permutation", "per_label": None},
    "last": {"protocol": "last", "per_label": None},
    "per_label": {"protocol": "per_label", "per_label": {"query": 2, "train": 3}},
}


def splits_of(protocol: str, validation: int, families: bool = False, train: int = 20):
    labels = torch.from_numpy(datasets.labels_of(60) != 0)
    settings = {**PROTOCOLS[protocol], "seed": 5, "query": 9, "train": train, "validation": validation}
    return make_splits(labels, SplitConfig.model_validate(settings), torch.arange(60) // 3 if families else None)


@pytest.mark.parametrize(
    ("protocol", "families", "fingerprint"),
    [
        ("permutation", False, "964d4437053d"),
        ("permutation", True, "88ab5ab9227e"),
        ("last", False, "ae8bfc0d1a6e"),
        ("per_label", False, "78b11df7348e"),
    ],
)
def test_without_validation_splits_are_those_of_before(protocol: str, families: bool, fingerprint: str) -> None:
    """The fingerprints were computed before there was a validation split."""
    splits = splits_of(protocol, 0, families)
    assert splits.fingerprint == fingerprint and len(splits.validation) == 0
    assert torch.equal(splits.searched_by("query"), torch.arange(51))


@pytest.mark.parametrize("families", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_validation_is_held_out(protocol: str, families: bool) -> None:
    """Queries, and without families what is trained on, are those of before; families stay on one side."""
    before, splits = splits_of(protocol, 0, families), splits_of(protocol, 12, families)
    assert torch.equal(splits.query, before.query) and torch.equal(splits.database, before.database)
    assert families or torch.equal(splits.train, before.train)
    assert (len(splits.validation), len(splits.train)) == (12, 20)
    sets = [set(splits.items(split).tolist()) for split in ("query", "train", "validation")]
    assert sum(map(len, sets)) == len(set().union(*sets)) and sets[1] | sets[2] <= set(splits.database.tolist())
    searched = splits.database[splits.searched_by("validation")]
    assert set(searched.tolist()) == set(splits.database.tolist()) - sets[2]
    assert splits.fingerprint != before.fingerprint
    if families:
        ours, others = {item // 3 for item in sets[2]}, {item // 3 for item in searched.tolist()}
        assert len(ours) == 4 and not ours & others


def test_a_validation_split_that_cannot_be_made() -> None:
    with pytest.raises(UserError, match="9 query, 20 train and 32 validation pairs, but there are 60 pairs; lower"):
        splits_of("permutation", 32)
    with pytest.raises(UserError, match=r"do not fill a validation split of 10; change dataset.split.validation"):
        splits_of("permutation", 10, families=True)
    labels = torch.ones(60, 2, dtype=torch.bool)
    labels[splits_of("permutation", 12).validation[3]] = False
    with pytest.raises(UserError, match="1 pairs of the validation split have no label"):
        make_splits(labels, datasets.permutation(seed=5, query=9, train=20, validation=12))


def history(query: list[float] | None, validation: list[float] | None) -> list[dict[str, Any]]:
    """One entry an epoch, from 1, with the headline of i2t; that of t2i is 0."""
    found: list[dict[str, Any]] = []
    for epoch in range(len(query or validation or [])):
        reports = [("reports", query), ("validation", validation)]
        entry = {key: {"8": {"i2t/mAP@all": v[epoch], "t2i/mAP@all": 0.0}} for key, v in reports if v is not None}
        found.append({"epoch": epoch + 1, **entry})
    return found


def test_choices_are_those_that_are_known() -> None:
    both = history([0.1, 0.5, 0.3, 0.5], [0.2, 0.1, 0.4, 0.4])
    assert {select: entry["epoch"] for select, entry in choices(both).items()} == {
        "query": 2,
        "validation": 3,
        "last": 4,
    }
    assert set(choices(history([0.1, 0.5], None))) == {"query", "last"}
    held = history(None, [0.2, 0.5, 0.1])
    assert choices(held) == {} and choose(held, "query") is None
    chosen = choose(held, "validation")
    assert chosen is held[1]
    chosen["reports"] = {"8": {}}
    assert choices(held) == {"validation": held[1]}


@pytest.mark.parametrize(
    ("select", "patience", "ends"),
    [("query", None, None), ("query", 1, 2), ("query", 2, 6), ("validation", 2, 3), ("last", 2, 3), ("query", 3, None)],
)
def test_patience_counts_evaluations_without_gain(select: str, patience: int | None, ends: int | None) -> None:
    whole = history([0.3, 0.2, 0.4, 0.5, 0.5, 0.1], [0.5, 0.4, 0.4, 0.6, 0.4, 0.4])
    config = mock.Mock()
    config.run.patience, config.evaluate.select = patience, select
    stops = [count for count in range(len(whole) + 1) if out_of_patience(whole[:count], config)]
    assert (stops[0] if stops else None) == ends


def held_out(tiny_overrides: list[str], *more: str) -> list[str]:
    return [*tiny_overrides, f"dataset.split.validation={VALIDATION}", "evaluate.select=validation", *more]


def results_of(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def test_queries_are_encoded_once_and_resume_is_exact(tmp_path: Path, tiny_overrides: list[str]) -> None:
    encode, rows = evaluation.encode_split, []

    def counted(*arguments: Any) -> evaluation.SplitCodes:
        rows.append(len(arguments[2]))
        return encode(*arguments)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = held_out(tiny_overrides, "run.epochs=3")
    with mock.patch.object(evaluation, "encode_split", counted):
        code, out, err = run(*arguments("MITH", whole, settings))
    assert code == 0, err
    assert rows == [VALIDATION, PAIRS - QUERY] * 3 + [QUERY, PAIRS - QUERY]
    results = results_of(whole)
    assert f"on {VALIDATION} validation pairs" in out and "validation i2t/mAP@all" in err
    known = ["validation", *(["last"] if results["best"]["epoch"] == 3 else [])]  # the queries met one set of weights
    assert results["select"] == "validation" and list(results["choices"]) == known
    assert [set(entry) for entry in (results["best"], results["last"])][0] == {
        "epoch",
        "reports",
        "validation",
        "codes",
    }

    code, _, err = run("--evaluate", whole / "best.pt", "--save-dir", tmp_path / "again")
    assert code == 0, err
    assert (
        json.loads((tmp_path / "again" / "evaluation-best.json").read_text())["best"]["reports"]
        == (results["best"]["reports"])
    )
    with np.load(whole / "codes-best.npz", allow_pickle=False) as ours:
        with np.load(tmp_path / "again" / "codes-best.npz", allow_pickle=False) as theirs:
            assert all(np.array_equal(ours[name], theirs[name]) for name in ours.files)

    assert interrupted_at(7, signal.SIGTERM, *arguments("MITH", parts, settings))[0] == 75
    assert run(*arguments("MITH", parts, settings, "--resume"))[0] == 0
    assert results_of(parts) == results
    assert_same_state(final_state(whole), final_state(parts))


def test_a_split_of_zero_and_the_ways_of_choosing_change_no_number(tmp_path: Path, tiny_overrides: list[str]) -> None:
    """Query numbers of every epoch are the same whether or not validation pairs are looked at beside them."""
    folders = {"plain": [], "last": ["evaluate.select=last"], "beside": [f"dataset.split.validation={VALIDATION}"]}
    for name, settings in folders.items():
        code, out, err = run(*arguments("DSPH", tmp_path / name, [*tiny_overrides, *settings]))
        assert code == 0, err
    plain, last, beside = (results_of(tmp_path / name) for name in folders)
    assert losses(tmp_path / "plain") == losses(tmp_path / "last") == losses(tmp_path / "beside")
    assert last["best"] == last["last"] == plain["last"]
    assert beside["best"]["reports"] == plain["best"]["reports"]
    assert plain["choices"]["query"] == last["choices"]["query"] == beside["choices"]["query"]
    assert list(beside["choices"]) == ["query", "validation", "last"]
    assert "epoch chosen by" in out and plain["split"]["fingerprint"] == last["split"]["fingerprint"]


def test_patience_ends_a_run_and_a_resumed_one_alike(tmp_path: Path, tiny_overrides: list[str]) -> None:
    settings = held_out(tiny_overrides, "run.epochs=50", "run.patience=1", "optim.main.lr.head=0.0",
                        "optim.main.lr.backbone=0.0")  # fmt: skip
    code, _, err = run(*arguments("DSPH", tmp_path / "whole", settings))
    assert code == 0, err
    results = results_of(tmp_path / "whole")
    assert results["best"]["epoch"] == 1 and results["last"]["epoch"] == 2 and len(losses(tmp_path / "whole")) == 10
    assert interrupted_at(6, signal.SIGTERM, *arguments("DSPH", tmp_path / "parts", settings))[0] == 75
    assert run(*arguments("DSPH", tmp_path / "parts", settings, "--resume"))[0] == 0
    assert results_of(tmp_path / "parts") == results
    assert run(*arguments("DSPH", tmp_path / "parts", settings, "--resume"))[0] == 0  # a finished one stays as it is
    assert results_of(tmp_path / "parts") == results


def test_mistakes_are_named(tmp_path: Path, tiny_overrides: list[str]) -> None:
    command = arguments("DSPH", tmp_path, tiny_overrides)
    line = refused(*command, "evaluate.select=validation")
    assert "evaluate.select is validation, but dataset.split.validation is 0; set it" in line
    line = refused(*command, "dataset.split.validation=12")
    assert "8 query, 37 train and 12 validation pairs, but there are 56 pairs" in line
    assert "run.patience" in refused(*command, "run.patience=0")
