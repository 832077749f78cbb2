"""Every golden file against this library, and what the parity check says when something is off."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity import EQUAL, LOSS, absolute, check_file, compare, main

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


def test_unreadable_cases_fail_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken, unknown, method = tmp_path / "broken.npz", tmp_path / "unknown.npz", tmp_path / "method.npz"
    broken.write_bytes(b"not a zip")
    np.savez(unknown, cfg=np.array(json.dumps({"kind": "sonnet"})))
    np.savez(method, cfg=np.array(json.dumps({"method": "Sonnet"})))
    assert main([str(broken), str(unknown), str(method), str(tmp_path / "missing.npz")]) == 1
    printed = capsys.readouterr().out
    assert "Sonnet has no parity case" in printed
    assert printed.endswith("0 passed, 4 failed\n")
