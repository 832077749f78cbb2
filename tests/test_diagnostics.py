"""What a run says of itself: statistics of codes against others' formulas, the line before training, collapses."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.code_statistics import bit_correlation, code_report, constant_bits, squared_gaps
from common.config import load_config
from models.blocks.heads import pair_codes, sign_codes, watch_relaxed
from runners import diagnostics
from runners.evaluation import Evaluation, Evaluator, SplitCodes, describe_codes, evaluate_codes
from tests.commands import ROOT, run
from tests.runs import assert_same_state, final_state


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8) * 2 - 1


@pytest.mark.parametrize("shape", [(40, 9), (20_000, 6), (12, 3, 5)])
def test_correlation_is_numpys(shape: tuple[int, ...]) -> None:
    codes = random_codes(*shape)
    codes[..., 1] = codes[..., 0]
    codes[..., 2] = 1  # constant: left out
    rows = np.delete(codes.flatten(0, -2).numpy(), 2, axis=1)
    wanted = np.abs(np.corrcoef(rows, rowvar=False))
    pairs = len(wanted) * (len(wanted) - 1)
    assert bit_correlation(codes) == pytest.approx((wanted.sum() - len(wanted)) / pairs, abs=1e-9)
    assert constant_bits(codes) == 1 / shape[-1]


def test_codes_without_two_moving_bits_have_no_correlation() -> None:
    assert bit_correlation(torch.ones(5, 4)) == 0 and constant_bits(torch.ones(5, 4)) == 1
    assert bit_correlation(torch.ones(1, 1)) == 0


def test_quantization_error_is_that_of_what_was_binarised() -> None:
    relaxed = torch.tensor([[0.5, -1.0], [-0.25, 0.0]])
    with watch_relaxed() as seen:
        codes = sign_codes(relaxed)
    sign_codes(relaxed)  # outside: not seen
    gaps = squared_gaps(seen, codes)
    assert len(seen) == 1 and gaps.tolist() == [0.5**2 + 0.75**2, 0 + 1.0]
    error = code_report(codes, gaps / 2)["quantization error"]
    assert error == pytest.approx(((relaxed - codes).square().sum() / 4).sqrt().item())

    with watch_relaxed() as seen:
        codes = torch.cat([pair_codes(torch.tensor([[0.1, 0.9]])), sign_codes(torch.tensor([[-2.0]]))], dim=-1)
    assert squared_gaps(seen, codes).tolist() == pytest.approx([0.2**2, 1.0])
    assert len(squared_gaps([], codes)) == 0  # a method that binarises otherwise
    assert "quantization error" not in code_report(codes, torch.zeros(0))


def found_with(query: SplitCodes, database: SplitCodes, config: Any) -> Evaluation:
    device = torch.device("cpu")
    reports, precisions = evaluate_codes(query, database, (8,), config.evaluate, device)
    return Evaluation(
        {"query": query, "database": database},
        {"query": reports},
        describe_codes(database, (8,), device),
        {"query": precisions},
    )


def evaluations(kind: str, count: int) -> tuple[list[str | None], list[dict[str, Any]]]:
    """What each of some evaluations of codes that are `equal`, `random` or `good` is warned of, and the history."""
    config = load_config(ROOT / "configs/DSPH/config.yaml", [])
    labels = {split: torch.arange(rows)[:, None] % 5 == torch.arange(5) for split, rows in (("q", 200), ("d", 2000))}
    evaluator: Any = SimpleNamespace(
        config=config,
        labels={"query": labels["q"]},
        splits=SimpleNamespace(searched_by=lambda split: torch.arange(2000)),
        model=SimpleNamespace(code_lengths=(8,)),
        device=torch.device("cpu"),
    )
    said, history = [], []
    for number in range(count):
        sides = []
        for side, rows in labels.items():
            image, text = (random_codes(len(rows), 8, seed=number + 10 * ord(side) + one) for one in range(2))
            if kind == "good":
                image = text = random_codes(5, 8)[rows.int().argmax(1)]
            if kind == "equal":
                text = torch.ones_like(text)
            sides.append(SplitCodes(image, text, rows))
        found = found_with(sides[0], sides[1], config)
        history.append({"epoch": number + 1, "reports": found.reports["query"], "codes": found.bits})
        said.append(diagnostics.collapse(history, found, evaluator))
    return said, history


def test_collapses_are_said_once() -> None:
    assert evaluations("good", 4)[0] == [None] * 4
    said, _ = evaluations("random", 5)
    assert [line is not None for line in said] == [False, False, True, False, False]
    assert re.search(r"after 3 evaluations i2t/mAP@all 0\.\d{4} \(random codes 0\.\d{4}\), t2i", str(said[2]))
    said, history = evaluations("equal", 2)
    assert said[0] is not None and "all text codes are equal" in said[0] and said[1] is None
    line = diagnostics.codes_line(history[0])
    assert re.search(r"constant bits 0\.000 / 1\.000  bit correlation 0\.\d{3} / 0\.000", line) and "quant" not in line


def test_a_run_keeps_them_and_trains_as_it_would_without(
    tmp_path: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--config-file", "configs/DSPH/coco.yaml", *tiny_overrides, "--save-dir")
    code, _, err = run(*command, tmp_path / "one")
    assert code == 0, err
    assert re.search(r"untrained, the 8 items of the query split among themselves: i2t/mAP@all 0\.\d{4} \(random", err)
    assert len(re.findall(r"codes, image / text:  constant bits .* quantization error 0\.\d{3} / 0\.\d{3}", err)) == 2
    results = json.loads((tmp_path / "one/results.json").read_text())
    assert set(results["untrained"]) == {f"{kind}{way}/mAP@all" for kind in ("", "random ") for way in ("i2t", "t2i")}
    assert [entry["epoch"] for entry in results["history"]] == [1, 2]
    best = results["history"][results["best"]["epoch"] - 1]
    assert best["i2t/mAP@all"] == results["best"]["reports"]["16"]["i2t/mAP@all"]
    assert best["codes"] == results["best"]["codes"]["16"]
    lines = [json.loads(line) for line in (tmp_path / "one/log.jsonl").read_text().splitlines()]
    assert lines[0] == {"event": "untrained", "step": 0, **results["untrained"]}
    logged = next(line for line in lines if line["event"] == "evaluation" and line["epoch"] == best["epoch"])
    assert {**best["codes"], **logged} == logged
    with np.load(tmp_path / "one/codes-best.npz", allow_pickle=False) as arrays:
        for side, name in (("image", "r_img"), ("text", "r_txt")):
            assert best["codes"][f"{side}/bit correlation"] == bit_correlation(torch.from_numpy(arrays[name]))

    def nothing(*given: Any) -> dict[str, float]:
        torch.rand(7)  # even draws would not matter
        return {}

    monkeypatch.setattr(diagnostics, "report_untrained", nothing)
    evaluate = Evaluator.evaluate
    monkeypatch.setattr(Evaluator, "evaluate", lambda self, *given: (torch.rand(3), evaluate(self, *given))[1])
    code, _, err = run(*command, tmp_path / "two")
    assert code == 0, err
    assert_same_state(final_state(tmp_path / "one"), final_state(tmp_path / "two"))
