"""Every golden file against this library, and what the parity check says when something is off."""

import functools
import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.types import Progress
from tests.parity import check_file, main
from tests.parity_cases import open_case
from tests.parity_cases.rows import EQUAL, LOSS, absolute, compare

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(path for path in GOLDEN.iterdir() if path.suffix in (".npz", ".json"))


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_golden_case(path: Path) -> None:
    rows = list(check_file(path))
    assert rows
    assert not [str(row) for row in rows if not row.passed]


def test_compare_finds_errors_shapes_nans_and_absences() -> None:
    reference = {"a": torch.tensor([1.0, 100.0])}
    assert compare("c", "q", {"a": torch.tensor([1.00004, 100.004])}, reference, LOSS).passed
    assert not compare("c", "q", {"a": torch.tensor([1.0001, 100.0])}, reference, LOSS).passed
    assert not compare("c", "q", {"a": torch.tensor([1.0, torch.nan])}, reference, LOSS).passed
    assert not compare("c", "q", {"a": torch.tensor([[1.0, 100.0]])}, reference, LOSS).passed
    assert "not computed" in compare("c", "q", {}, reference, LOSS).note
    assert not compare("c", "q", {}, {}, LOSS).passed
    assert compare("c", "q", {"a": torch.tensor([torch.nan])}, {"a": torch.tensor([torch.nan])}, EQUAL).passed
    assert compare("c", "q", {"a": torch.tensor([1.0, 99.0])}, reference, absolute(2.0)).error == pytest.approx(0.01)


def test_a_changed_weight_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with np.load(GOLDEN / "DCMHT-original-b16B8C24s1201.npz") as file:
        arrays = {name: file[name] for name in file.files}
    weight = arrays["sd/text_hash.hash_list.2.weight"].copy()
    weight[0] += np.float32(0.01)  # of one logit of the pair: the same on both would change nothing
    arrays["sd/text_hash.hash_list.2.weight"] = weight
    path = tmp_path / "changed.npz"
    np.savez(path, **arrays)
    assert main([str(path)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert any("codes" in line and "FAIL" in line for line in printed)
    assert printed[-1].endswith("failed") and not printed[-1].endswith(" 0 failed")


def change_case(source: str, target: Path, keep: Callable[[str], bool], **changes: Any) -> Path:
    """Copies the arrays of a golden file whose names `keep` wants, with other settings."""
    with np.load(GOLDEN / source) as file:
        arrays = {name: file[name] for name in file.files if keep(name)}
    cfg = json.loads(str(arrays["cfg"]))
    for place, value in changes.items():
        *sections, key = place.split("__")
        functools.reduce(operator.getitem, sections, cfg)[key] = value
    np.savez(target, **{**arrays, "cfg": np.array(json.dumps(cfg))})
    return target


@pytest.mark.parametrize("source", ["DIMCH-unified-b64B13C80s2101.npz", "UMoED-unified-b16B8C24s2202.npz"])
def test_the_dropout_that_ran_counts_not_the_configured_one(source: str, tmp_path: Path) -> None:
    rows = list(check_file(change_case(source, tmp_path / source, lambda name: True, model__dropout=0.3)))
    assert len(rows) > 5 and all(row.passed for row in rows)


@pytest.mark.parametrize(
    ("source", "absent"),
    [
        ("DSPH-original-b16B8C80s1601.npz", ["threshold"]),  # 16 bits, 80 classes: 0.25 in the table
        ("DSPH-unified-b16B13C80s1501.npz", ["threshold"]),
        ("DNPH-original-b16B13C80s1801.npz", ["mrg", "noise_alpha"]),  # written into the authors' code
        ("DNPH-unified-b16B8C24s1701.npz", ["mrg"]),
    ],
)
def test_settings_that_a_case_leaves_to_the_reference(source: str, absent: list[str], tmp_path: Path) -> None:
    with np.load(GOLDEN / source) as file:
        arrays = {name: file[name] for name in file.files}
    cfg = json.loads(str(arrays["cfg"]))
    cfg["model"] = {key: value for key, value in cfg["model"].items() if key not in absent}
    np.savez(tmp_path / source, **{**arrays, "cfg": np.array(json.dumps(cfg))})
    rows = list(check_file(tmp_path / source))
    assert len(rows) > 5 and all(row.passed for row in rows), [str(row) for row in rows]


def test_entries_of_openai_s_file_that_are_no_weights(tmp_path: Path) -> None:
    with np.load(GOLDEN / "clip-w64p16.npz") as file:
        arrays = {name: file[name] for name in file.files}
    sizes = {"sd/input_resolution": 64, "sd/context_length": 77, "sd/vocab_size": 600}
    np.savez(tmp_path / "clip.npz", **{**arrays, **{name: np.array(size) for name, size in sizes.items()}})
    rows = list(check_file(tmp_path / "clip.npz"))
    assert len(rows) == 3 and all(row.passed for row in rows), [str(row) for row in rows]


DIMCH, UMOED = "DIMCH-unified-b64B13C80s2101.npz", "UMoED-unified-b16B8C24s2202.npz"
SIMILARITY = {"temperature": 8.0, "scale": 0.5, "denominator": 1.5}


@pytest.mark.parametrize(
    ("source", "changes", "wanted"),
    [
        (DIMCH, {"model__distance__mode": "max"}, {"distance": "max"}),
        (
            DIMCH,
            {"model__chamfer__mmd_gamma": 1, "model__hash_pars__quan_alpha": 2},
            {"discrepancy_gamma": 1.0, "quantization_weight": 2.0},
        ),
        (UMOED, {"model__distance_mode": "euclidean"}, {"distance": "euclidean"}),
        (UMOED, {"model__distance__mode": "chamfer"}, {"distance": "chamfer"}),
        (UMOED, {"model__extreme": False}, {"distribution_temperature": None}),
        (UMOED, {"model__extreme_T": 0.02}, {"distribution_temperature": 0.02}),
        (UMOED, {"model__decoder_heads": 2, "model__chamfer__token_triplet_margin": 0.5}, {"heads": 2, "margin": 0.5}),
        ("TwDH-unified-b16B8C24s2003.npz", {"model__low_rate": 0, "bits": 32}, {"low_rate": 0.0, "bits": 32}),
        (
            "VTPH-original-b16B8C24s1901.npz",
            {"model__top_k_label": 3, "model__vtp_heads": 8},
            {"top_k": 3, "prompt_heads": 8},
        ),
    ],
    ids=str,
)
def test_other_settings_of_a_case_reach_the_model(
    source: str, changes: dict[str, Any], wanted: dict[str, Any], tmp_path: Path
) -> None:
    if source in (DIMCH, UMOED):
        for name, ours in (("temperature", "temperature"), ("temperature_txt_scale", "scale"), ("denominator",) * 2):
            changes = {f"model__distance__{name}": SIMILARITY[ours], **changes}
        wanted = {**wanted, "set_similarity": SIMILARITY}
    path = change_case(source, tmp_path / source, lambda name: name.startswith(("cfg", "in/", "sd/")), **changes)
    with np.load(path) as file:
        case = open_case(json.loads(str(file["cfg"])), {name: file[name] for name in file.files})
    config: Any = case.build().config
    assert config.model_dump().items() >= wanted.items()


def test_features_of_the_query_path_are_compared_where_a_case_records_them(tmp_path: Path) -> None:
    source = "VTPH-original-b16B8C24s1901.npz"
    with np.load(GOLDEN / source) as file:
        arrays = {name: file[name] for name in file.files if not name.startswith(("traj/", "grad/", "loss/"))}
    arrays["out_query/image_trans_tokens"] = arrays["out/image_trans_tokens"]  # a picture's path is the same
    np.savez(tmp_path / source, **arrays)
    rows = {row.quantity: row for row in check_file(tmp_path / source)}
    assert rows["intermediate outputs"].passed and rows["intermediate outputs"].note == "15 arrays"


def test_what_a_case_does_not_record_is_not_compared(tmp_path: Path) -> None:
    source = "MITH-unified-b16B8C24s1401.npz"
    path = change_case(source, tmp_path / source, lambda name: not name.startswith(("traj/", "loss/", "grad/")))
    rows = list(check_file(path))
    assert [row.quantity for row in rows] == ["codes", "binary codes", "intermediate outputs"]
    assert all(row.passed for row in rows)
    bare = ("traj/", "loss/", "grad/", "out/image_binary", "out/text_binary")
    rows = list(check_file(change_case(source, tmp_path / source, lambda name: not name.startswith(bare))))
    assert [row.quantity for row in rows if row.passed] == ["codes", "intermediate outputs"] and len(rows) == 2
    rows = list(check_file(change_case(source, tmp_path / source, lambda name: name.startswith(("cfg", "in/", "sd/")))))
    assert [(row.quantity, row.passed) for row in rows] == [("codes", False)]  # nothing to compare is no success


def test_only_terms_recovered_by_subtraction_have_a_loose_bound() -> None:
    for source, loose in (("DNPH-original-b16B13C80s1801.npz", True), ("DNPH-unified-b16B8C24s1701.npz", False)):
        (terms,) = (row for row in check_file(GOLDEN / source) if row.quantity == "terms")
        assert ("1e-4" in terms.bound) == loose


def test_a_term_without_a_name_here_fails_alone(tmp_path: Path) -> None:
    source = "DSPH-original-b16B8C80s1601.npz"
    with np.load(GOLDEN / source) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["loss/sonnet"] = np.array(14, np.float32)
    np.savez(tmp_path / source, **arrays)
    failed = [row for row in check_file(tmp_path / source) if not row.passed]
    assert [(row.quantity, "sonnet: not computed" in row.note) for row in failed] == [("terms", True)]


@pytest.mark.parametrize("warmup", [-1, 0.0, 0.3])
@pytest.mark.parametrize("schedule", ["warmup_linear", "warmup_constant", "warmup_cosine"])
def test_bertadam_with_other_schedules(schedule: str, warmup: float, tmp_path: Path) -> None:
    steps, rate, decay = 8, 0.01, 0.2
    falls = {
        "warmup_linear": lambda x: (x - 1) / (warmup - 1),
        "warmup_constant": lambda x: 1.0,
        "warmup_cosine": lambda x: 0.5 * (1 + np.cos(np.pi * x)),
    }
    factors = [x / warmup if x < warmup else falls[schedule](x) for x in (step / steps for step in range(steps))]
    gradients = np.random.default_rng(0).normal(size=(steps, 3)).astype(np.float32) * 0.1  # too short to be clipped
    path, mean, square = [np.ones(3)], np.zeros(3), np.zeros(3)
    for factor, gradient in zip(factors, gradients.astype(np.float64), strict=True):
        mean, square = 0.9 * mean + 0.1 * gradient, 0.98 * square + 0.02 * gradient**2
        path.append(path[-1] - rate * factor * (mean / (np.sqrt(square) + 1e-6) + decay * path[-1]))
    cfg = {"kind": "bertadam", "b1": 0.9, "b2": 0.98, "e": 1e-6, "max_grad_norm": 1.0, "weight_decay": decay}
    cfg |= {"steps": steps, "t_total": steps, "schedule": schedule, "warmup": warmup}
    cfg |= {"group_lr": [rate], "groups": {"given": [["a"]]}}
    given = {"grads": gradients, "has_grad": np.ones(steps, bool), "traj": np.array(path, np.float32)}
    arrays: dict[str, Any] = {f"given/a/{name}": value for name, value in given.items()}
    arrays |= {"given/schedule": np.array(factors), "cfg": np.array(json.dumps(cfg))}
    file = tmp_path / "bertadam.npz"
    np.savez(file, **arrays)
    rows = list(check_file(file))
    assert [row.quantity for row in rows] == ["given gradients", "schedule"]
    assert all(row.passed for row in rows), [str(row) for row in rows]


def test_dcmht_linear_head_whose_codes_the_authors_do_not_binarise(tmp_path: Path) -> None:
    with np.load(GOLDEN / "DCMHT-original-b16B8C24s1201.npz") as file:
        kept = ("cfg", "in/", "sd/clip.")
        arrays: dict[str, Any] = {name: file[name] for name in file.files if name.startswith(kept)}
    cfg = json.loads(str(arrays.pop("cfg")))
    cfg["model"] |= {"hash_layer": "linear", "sim_threshold": 0.0}
    random = np.random.default_rng(0)
    for modality in ("image", "text"):
        arrays[f"sd/{modality}_hash.fc.weight"] = random.normal(size=(16, 128)).astype(np.float32) / 10
        arrays[f"sd/{modality}_hash.fc.bias"] = random.normal(size=16).astype(np.float32)
    case = open_case(cfg, arrays)
    model = case.build()
    with torch.no_grad():
        out = model(case.batch, Progress(epoch=0, epochs=1, step=0, steps_per_epoch=1))
        codes = {name: x for name, x in case.outputs(model.eval()).items() if name.endswith("_code")}
    away = {name: (x.sign() - x).norm(dim=-1).mean() / 2 for name, x in codes.items()}
    quantization = (away["out/image_code"] + away["out/text_code"]) / 2
    six = [value for name, value in case.terms(out.terms).items() if not name.startswith("quantization")]
    assert len(six) == 6 and float(sum(six) + quantization) == pytest.approx(float(out.loss), rel=1e-6)
    relaxed = {name.replace("_code", "_binary"): x for name, x in codes.items()}
    terms = {"loss/quantization": quantization, "loss/quantization.image": away["out/image_code"]}
    arrays |= {name: x.numpy() for name, x in (codes | relaxed | terms | {"loss/total": out.loss}).items()}
    path = tmp_path / "DCMHT-original.npz"
    cfg["steps"] = 1
    np.savez(path, **{**arrays, "cfg": np.array(json.dumps(cfg))})
    rows = list(check_file(path))
    assert [row.quantity for row in rows] == ["codes", "binary codes", "terms", "loss"]
    assert all(row.passed for row in rows), [str(row) for row in rows]


def test_unreadable_cases_fail_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken, unknown, method = tmp_path / "broken.npz", tmp_path / "unknown.npz", tmp_path / "method.npz"
    broken.write_bytes(b"not a zip")
    np.savez(unknown, cfg=np.array(json.dumps({"kind": "sonnet"})))
    np.savez(method, cfg=np.array(json.dumps({"method": "Sonnet"})))
    assert main([str(broken), str(unknown), str(method), str(tmp_path / "missing.npz")]) == 1
    printed = capsys.readouterr().out
    assert "unknown model 'Sonnet'" in printed
    assert printed.endswith("0 passed, 4 failed\n")
