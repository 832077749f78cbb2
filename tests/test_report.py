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

from common.significance import holm, paired_test
from runners.comparison import MARKS, RunFolder, tell_apart
from runners.report.charts import bar_chart, line_chart
from runners.report.page import render
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


HEADS = {"a": "optim.main.lr.head=0.001", "b": "optim.main.lr.head=0.0001"}


@pytest.fixture
def compared(sweep: Path, tmp_path: Path) -> Path:
    """Known average precisions of i2t/mAP@all: two variants of DSPH by three seeds, three other methods by one.

    `a` is the best; `b` is worse at every query; MITH is now better, now worse; DNPH has another split; CFRH kept none.
    """
    folder = tmp_path / "compared"
    q = len(ReportedRun(sweep / "DSPH-seed1").arrays["q_l"])
    best, turns = np.linspace(0.5, 0.7, q), np.where(np.arange(q) % 2, 1.0, -1.0)
    kinds = {"a": ("DSPH", best, 3), "b": ("DSPH", best - 0.2, 3), "MITH": ("MITH", best + 0.05 * turns - 0.001, 1),
             "DNPH": ("DNPH", best - 0.3, 1), "CFRH": ("CFRH", best - 0.3, 1)}  # fmt: skip
    for kind, (method, values, seeds) in kinds.items():
        for seed in range(1, seeds + 1):
            own = folder / f"{kind}-seed{seed}"
            shutil.copytree(sweep / "DSPH-seed1", own, ignore=shutil.ignore_patterns("checkpoints", "*.pt", "*.mat"))
            results = json.loads((own / "results.json").read_text())
            results.update(model=method, seed=seed)
            found = values + 0.01 * (seed - 2) * (seeds > 1)
            results["best"]["reports"]["16"]["i2t/mAP@all"] = float(found.mean())
            if kind == "DNPH":
                results["split"]["fingerprint"] = "another"
            (own / "results.json").write_text(json.dumps(results))
            np.savez(own / "ap-best.npz", allow_pickle=False, **{"16/i2t/mAP@all": found})
            config = re.sub(r"(\n  seed: )1\n(?=.*\bepochs)", rf"\g<1>{seed}\n", (own / "config.yaml").read_text())
            if kind in HEADS:
                config, changed = re.subn(r"\bhead: \S+", HEADS[kind].rpartition(".lr.")[2].replace("=", ": "), config)
                assert changed == 1
            (own / "config.yaml").write_text(config)
    (folder / "CFRH-seed1/ap-best.npz").unlink()
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
    assert any(row[:3] == ["run.seed", "1", "2"] for row in page.rows)
    assert "run.save_dir" not in text
    assert len([tag for tag, _ in page.tags if tag == "img"]) >= 3 * 10  # three text queries
    for word in ("mAP@all", "bit correlation", "95 % interval", "Average precision by label"):
        assert word in text
    assert len(text) < 1_000_000


def test_the_page_marks_what_cannot_be_told_from_the_best(compared: Path) -> None:
    """The rows are the variants, the marks and the intervals are those of tests and formulas worked out here."""
    runs, unfinished = find_runs(compared)
    text = render("compared", runs, unfinished)
    page = Page(text)
    head = next(row for row in page.rows if row and row[0] == "data set")
    column = head.index("i2t/mAP@all")
    cells = {row[1]: (row[3], row[column]) for row in page.rows if len(row) == len(head) and row[2] == "16"}
    mean = {run.folder.name: run.numbers["i2t/mAP@all"] for run in runs}
    half = 4.30265273 * 0.01 / 3**0.5  # Student's t of two degrees of freedom
    assert cells == {
        f"DSPH ({HEADS['a']})": ("1, 2, 3", f"{mean['a-seed2']:.4f} ± {half:.4f} *"),
        f"DSPH ({HEADS['b']})": ("1, 2, 3", f"{mean['b-seed2']:.4f} ± {half:.4f}"),
        "MITH": ("1", f"{mean['MITH-seed1']:.4f} ~"),
        "DNPH": ("1", f"{mean['DNPH-seed1']:.4f} ?"),
        "CFRH": ("1", f"{mean['CFRH-seed1']:.4f} ?"),
    }
    values = {kind: np.load(compared / f"{kind}-seed{2 if kind in HEADS else 1}/ap-best.npz")["16/i2t/mAP@all"]
              for kind in ("a", "b", "MITH")}  # fmt: skip
    p = dict(zip(("b", "MITH"), holm([paired_test(values["a"], values[kind]) for kind in ("b", "MITH")]), strict=True))
    tests = {row[1]: row[4:] for row in page.rows if len(row) == 11 and row[3] == "i2t/mAP@all"}
    assert tests[f"DSPH ({HEADS['b']})"][-2:] == [f"{p['b']:.4f}", ""]
    assert tests["MITH"] == ["1", f"{mean['MITH-seed1']:.4f}", "–", "–", "–", f"{p['MITH']:.4f}", "~"]
    assert tests[f"DSPH ({HEADS['a']})"][2] == "0.0100" and tests["DNPH"][-2:] == ["–", "?"]
    for meaning in MARKS.values():
        assert text.count(html.escape(meaning)) >= 2  # above the table and among the definitions
    assert len([tag for tag, _ in page.tags if tag == "polygon"]) == 2 * 4  # two variants of several runs, four charts
    assert "nan" not in text.lower()


def test_one_run_has_no_interval_and_nothing_to_compare_with(sweep: Path) -> None:
    runs, _ = find_runs(sweep / "DSPH-seed1")
    page = Page(text := render("run", runs, []))
    head, row = page.rows[:2]
    assert row[head.index("i2t/mAP@all")] == f"{runs[0].numbers['i2t/mAP@all']:.4f}"
    assert "so there is no interval" in text and "Within a data set" not in text and "<polygon" not in text
    assert "nan" not in text.lower()


def test_runs_of_one_seed_are_no_several_seeds(sweep: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(sweep / "DSPH-seed1", tmp_path / "runs" / name)
    runs, _ = find_runs(tmp_path / "runs")
    assert "the interval is too narrow" in render("runs", runs, [])


def test_variants_are_settings_that_differ_within_a_length(tmp_path: Path) -> None:
    """Seeds, what changes no result and what goes with the length make none; a variant is named at every length."""
    settings = [("A", 16, 1, 0.1, 5), ("A", 16, 2, 0.2, 5), ("A", 32, 1, 0.1, 7), ("B", 16, 1, 0.3, 9)]
    runs = []
    for number, (model, bits, seed, rate, top) in enumerate(settings):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps({"model": model, "dataset": "d", "bits": bits}))
        (folder / "config.yaml").write_text(
            f"model: {{name: {model}, bits: {bits}, top: {top}}}\n"
            f"dataset: {{name: d, root: /{number}, split: {{seed: {seed}}}}}\noptim: {{lr: {rate}}}\n"
            f"run: {{seed: {seed}, device: '{number}', save_dir: x{number}}}\n"
        )
        runs.append(RunFolder(folder))
    tell_apart(runs)
    assert [run.model for run in runs] == ["A (optim.lr=0.1)", "A (optim.lr=0.2)", "A (optim.lr=0.1)", "B"]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (None, "ap-best.npz is missing or damaged"),
        (np.zeros(3), "does not hold one number of every query"),
        (np.array(["a"]), "does not hold one number of every query"),
        (np.array([None]), "ap-best.npz is missing or damaged"),  # needs code to be read
    ],
)
def test_damaged_average_precisions(compared: Path, arrays: np.ndarray | None, said: str) -> None:
    path = compared / "MITH-seed1/ap-best.npz"
    if arrays is None:
        path.write_bytes(path.read_bytes()[:40])
    else:
        np.savez(path, allow_pickle=True, **{"16/i2t/mAP@all": arrays})
    assert said in refused("--report", compared)
    assert not (compared / "report.html").exists()


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
        ("config.yaml", b"[1]", "config.yaml is no mapping of keys to values"),
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
    assert "half" not in refused("--report", tmp_path).partition("holds")[2]  # a YAML alone is no run
    (tmp_path / "half/log.jsonl").touch()
    assert "half not finished" in refused("--report", tmp_path)


def test_charts_of_few_points() -> None:
    assert line_chart("t", "x", "y", {"a": ([], [[]]), "b": ([1.0], [[float("nan")]])}) is None
    chart = line_chart("t", "x", "y", {"a": ([3.0], [[0.0]])})
    assert chart is not None and re.fullmatch(r"[\d.]+,[\d.]+", chart["lines"][0]["points"])
    assert chart["lines"][0]["band"] == ""
    bars = bar_chart("t", "x", "y", {"a": [0.0, 0.5], "b": [0.25, 0.0]})["bars"]
    heights = [bar["height"] for bar in bars]
    assert heights[0] == heights[3] == 0 and heights[1] == pytest.approx(2 * heights[2], abs=0.02)


def test_bands_lie_about_the_mean() -> None:
    """One standard deviation to either side, and not below 0; the axis leaves room for it."""
    chart = line_chart("t", "x", "y", {"a": ([1, 2], [[0.2, 0.0], [0.4, 0.4]]), "b": ([1, 2], [[0.1, 0.1]])})
    assert chart is not None
    first, second = chart["lines"]
    band = [tuple(map(float, point.split(","))) for point in first["band"].split()]
    points = [tuple(map(float, point.split(","))) for point in first["points"].split()]
    (zero, _), (level, says) = chart["levels"][0], chart["levels"][1]
    unit = (zero - level) / float(says)
    spread = [0.02**0.5, 0.08**0.5]
    assert [x for x, _ in band] == [points[0][0], points[1][0], points[1][0], points[0][0]]
    assert [zero - y for _, y in band] == pytest.approx(
        [unit * (0.3 + spread[0]), unit * (0.2 + spread[1]), 0, unit * (0.3 - spread[0])], abs=0.3
    )
    assert [zero - y for _, y in points] == pytest.approx([unit * 0.3, unit * 0.2], abs=0.3)
    assert second["band"] == "" and min(y for _, y in band) > 0
    assert first["dots"][0][2] == f"1: 0.3000 ± {spread[0]:.4f}"
