"""The results page: its numbers are the runs', it needs no other host, and nothing in a run becomes markup."""

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from runners.report.charts import bar_chart, line_chart
from runners.report.page import interval, render
from runners.report.runs import ReportedRun, find_runs, nearest_distances
from tests.commands import ROOT, refused, run


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Path:
    """Two finished runs of one method, seeds 1 and 2."""
    folder = tmp_path_factory.mktemp("report") / "sweep"
    for seed in (1, 2):
        command: list[str | Path] = ["--config-file", ROOT / "configs/DSPH/coco.yaml", *tiny_overrides]
        code, _, err = run(*command, f"run.seed={seed}", "--save-dir", folder / f"DSPH-seed{seed}")
        assert code == 0, err
    return folder


class Page(HTMLParser):
    """Start tags with their attributes, and rows of tables as text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def test_the_page_has_the_runs_numbers(sweep: Path) -> None:
    code, out, err = run("--report", sweep)
    assert code == 0 and "2 runs" in out, err
    text = (sweep / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    results = [json.loads((sweep / f"DSPH-seed{seed}/results.json").read_text()) for seed in (1, 2)]
    numbers = [found["best"]["reports"]["16"] for found in results]
    rows = {row[0]: row for row in page.rows if row}
    head = next(row for row in page.rows if row and row[0] == "run")
    for seed in (1, 2):
        for name, value in numbers[seed - 1].items():
            if "/mAP" in name:
                assert rows[f"DSPH-seed{seed}"][head.index(name)] == f"{value:.4f}"
                assert f'data-value="{value}"' in text
    values = [found["t2i/mAP@all"] for found in numbers]
    half = 12.706204736 * np.std(values, ddof=1) / 2**0.5  # Student's t of one degree of freedom
    assert any(f"{np.mean(values):.4f} ± {half:.4f}" in row for row in page.rows)
    assert interval([0.3]) is None
    assert any(row[:3] == ["run.seed", "1", "2"] for row in page.rows)
    assert "run.save_dir" not in text
    assert len([tag for tag, _ in page.tags if tag == "img"]) >= 3 * 10  # three text queries
    for word in ("mAP@all", "bit correlation", "95 % interval", "Average precision by label"):
        assert word in text
    assert len(text) < 1_000_000


def test_no_other_host_is_needed(sweep: Path) -> None:
    runs, unfinished = find_runs(sweep)
    text = render("sweep", runs, unfinished)
    assert "default-src 'none'" in text
    for tag, attributes in Page(text).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "action", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/jpeg;base64,", "#")), (tag, value)
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text


def test_nothing_of_a_run_becomes_markup(sweep: Path, tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>\"'</script>{{ 7*7 }}"
    folder = tmp_path / "runs"
    shutil.copytree(sweep / "DSPH-seed1", folder / "<b onclick=1>")
    path = folder / "<b onclick=1>/results.json"
    results = json.loads(path.read_text())
    results.update(model=evil, dataset=evil, marks=[evil], selection=evil)
    results["best"]["reports"]["16"][f"i2t/mAP{evil}"] = 0.5
    path.write_text(json.dumps(results))
    runs, _ = find_runs(folder)
    data = runs[0].dataset
    assert not isinstance(data, str)
    data.label_names = [evil] * data.labels.shape[1]
    data.columns["query"]["text"].captions.texts[:] = [[evil]] * len(data)
    text = render(evil, runs, [evil])
    tags = Page(text).tags
    assert not any(tag == "b" or any(name.startswith("on") for name in attributes) for tag, attributes in tags)
    assert all(str(attributes["src"]).startswith("data:") for tag, attributes in tags if tag == "img")
    assert len([tag for tag, _ in tags if tag == "script"]) == 1
    assert html.escape("<img src=x onerror=alert(1)>") in text and "{{ 7*7 }}" in text


def test_hits_distances_and_labels_are_those_of_the_codes(sweep: Path) -> None:
    found = ReportedRun(sweep / "DSPH-seed1")
    query, database = found.sides("t2i")
    wanted = (query[:, None].int() != database[None].int()).sum(-1)
    assert torch.equal(nearest_distances(query, database), wanted)
    shares, asked = found.histogram("t2i")
    relevant = (found.arrays["q_l"].int() @ found.arrays["r_l"].int().T) > 0
    assert asked == len(query)
    assert shares["relevant"] == pytest.approx(
        (torch.bincount(wanted[relevant], minlength=17) / relevant.sum()).tolist()
    )
    example = next(one for one in found.examples() if one["direction"] == "t2i" and one["kind"] == "best")
    row = int(found.precision("t2i").nan_to_num(-1).argmax())
    order = sorted(range(len(database)), key=lambda item: (int(wanted[row, item]), item))[:10]
    assert [hit["distance"] for hit in example["hits"]] == [int(wanted[row, item]) for item in order]
    assert [hit["right"] for hit in example["hits"]] == [bool(relevant[row, item]) for item in order]
    for _, count, i2t, _ in found.label_rows():
        assert 0 <= count <= len(query) and (i2t is None or 0 <= i2t <= 1)
    several = torch.stack([database, -database], dim=1)
    both = torch.stack([query, query], dim=1)
    assert torch.equal(nearest_distances(both, several), torch.minimum(wanted, 16 - wanted))


def test_without_its_data_set_a_page_says_so(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep / "DSPH-seed1", tmp_path / "run")
    path = tmp_path / "run/config.yaml"
    path.write_text(re.sub(r"root: .*", "root: /nowhere/at/all", path.read_text()))
    assert run("--report", tmp_path / "run")[0] == 0
    text = (tmp_path / "run/report.html").read_text()
    assert "texts and pictures are not shown" in text and "database item" in text and "<img" not in text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("results.json", b"{", "results.json is missing or damaged"),
        ("results.json", b"{}", "results.json is missing or damaged"),
        ("results.json", b"[]", "results.json is missing or damaged"),
        ("codes-best.npz", b"PK", "codes-best.npz is missing or damaged"),
        ("codes-best.npz", None, "codes-best.npz is missing or damaged"),
        ("config.yaml", None, "config.yaml"),
        ("config.yaml", b"a: [", "config.yaml"),
    ],
)
def test_damaged_runs(sweep: Path, tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    shutil.copytree(sweep / "DSPH-seed1", tmp_path / "runs/one")
    path = tmp_path / "runs/one" / name
    path.unlink() if content is None else path.write_bytes(content)
    assert said in refused("--report", tmp_path / "runs")
    assert not (tmp_path / "runs/report.html").exists()


def test_codes_of_another_length_are_refused(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep / "DSPH-seed1", tmp_path / "run")
    with np.load(tmp_path / "run/codes-best.npz", allow_pickle=False) as file:
        arrays = {name: file[name][:, :8] if name == "q_txt" else file[name] for name in file.files}
    np.savez(tmp_path / "run/codes-best.npz", allow_pickle=False, **arrays)
    assert "does not hold codes of 16 bits" in refused("--report", tmp_path / "run")


def test_folders_without_runs(tmp_path: Path) -> None:
    assert "there is no such folder" in refused("--report", tmp_path / "nothing")
    assert "holds no finished run" in refused("--report", tmp_path)
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.yaml").write_text("model: {}")
    assert "half not finished" in refused("--report", tmp_path)


def test_charts_of_few_points() -> None:
    assert line_chart("t", "x", "y", {"a": ([], []), "b": ([1.0], [float("nan")])}) is None
    chart = line_chart("t", "x", "y", {"a": ([3.0], [0.0])})
    assert chart is not None and re.fullmatch(r"[\d.]+,[\d.]+", chart["lines"][0]["points"])
    bars = bar_chart("t", "x", "y", {"a": [0.0, 0.5], "b": [0.25, 0.0]})["bars"]
    heights = [bar["height"] for bar in bars]
    assert heights[0] == heights[3] == 0 and heights[1] == pytest.approx(2 * heights[2], abs=0.02)
