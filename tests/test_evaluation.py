"""Evaluation: over several processes the numbers of one, to the last bit; pictures in memory are decoded once."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.schemas import EvaluateConfig
from dataset.pictures.reading import PictureFiles
from runners.evaluation import SplitCodes, evaluate_codes
from tests.commands import run
from tests.processes import run_processes
from tests.tiny_data import PAIRS

CONFIG = EvaluateConfig(
    every=1,
    batch_size=4,
    cutoffs=["all", 5],
    definitions=["relevant", "top", "expected"],
    caption="first",
    pairs=False,
    select="query",
)


def codes(rows: int, seed: int) -> SplitCodes:
    """Random codes of 8 and 4 bits side by side; the first row has no label."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randint(0, 2, (rows, 12), generator=generator, dtype=torch.int8) * 2 - 1 for _ in range(2))
    labels = torch.rand(rows, 5, generator=generator) < 0.4
    labels[0] = False
    return SplitCodes(image, text, labels)


def reports(queries: int) -> dict[str, dict[str, float]]:
    return evaluate_codes(codes(queries, 0), codes(30, 1), (8, 4), CONFIG, torch.device("cpu"))[0]


@pytest.mark.parametrize(("queries", "count"), [(7, 2), (7, 3), (2, 4)])
def test_processes_give_the_numbers_of_one(queries: int, count: int) -> None:
    """Also with fewer queries than processes, and a process whose only query has no relevant item."""
    alone = reports(queries)
    assert set(alone) == {"8", "4"} and alone["8"]["i2t/queries without relevant items"] >= 1
    assert run_processes(reports, count, queries) == [alone] * count


def test_a_run_decodes_every_picture_once(
    tmp_path: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training and two evaluations of both splits, with `loader: memory`."""
    counts: Counter[int] = Counter()
    read = PictureFiles.read

    def counted(self: PictureFiles, number: int) -> Image.Image:
        counts[number] += 1
        return read(self, number)

    monkeypatch.setattr(PictureFiles, "read", counted)
    code, _, err = run("--config-file", "configs/DSPH/coco.yaml", "--save-dir", tmp_path / "run", *tiny_overrides)
    assert code == 0, err
    assert counts == dict.fromkeys(range(PAIRS), 1)
