"""Plots: what is drawn, where it is written, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from common.errors import UserError
from utils import plots

LEVELS = [number / 10 for number in range(11)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that were saved, so that tests can look into them."""
    figures: list[Figure] = []
    save = plots._save

    def keep(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def test_precision_recall_has_every_curve_and_named_axes(tmp_path: Path, drawn: list[Figure]) -> None:
    curves = {f"method {n}": (LEVELS, [[1 - level * n / 10 for level in LEVELS]]) for n in range(9)}
    path = tmp_path / "pr.png"
    plots.plot_precision_recall(curves, "a title", path)
    axes = drawn[0].axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("Recall", "Precision", "a title")
    assert [line.get_label() for line in axes.lines] == list(curves)
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}
    assert len(looks) == len({line.get_color() for line in axes.lines}) == 9, "no two lines look alike"
    assert np.asarray(axes.lines[3].get_ydata()).tolist() == curves["method 3"][1][0]
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(maxcolors=10**6) or []) > 20, "not an empty picture"
    assert [file.name for file in tmp_path.iterdir()] == ["pr.png"]


def test_points_without_a_number_are_left_out(tmp_path: Path, drawn: list[Figure]) -> None:
    plots.plot_precision_at({"a": ([1, 2, 3], [[0.5, float("nan"), 0.25]])}, "t", tmp_path / "p.png")
    line = drawn[0].axes[0].lines[0]
    assert (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()) == ([1, 3], [0.5, 0.25])


def test_several_runs_are_a_mean_in_a_band(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = {"a": ([1, 2], [[0.2, 0.5], [0.4, 0.5]]), "b": ([1, 2], [[0.1, 0.1]])}
    plots.plot_precision_at(runs, "t", tmp_path / "p.png")
    axes = drawn[0].axes[0]
    assert np.asarray(axes.lines[0].get_ydata()).tolist() == pytest.approx([0.3, 0.5])
    (band,) = axes.collections
    heights = np.asarray(band.get_paths()[0].vertices)[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.3 - 0.02**0.5, 0.5))


def test_training_loss_shows_steps_and_their_running_mean(tmp_path: Path, drawn: list[Figure]) -> None:
    steps = list(range(100))
    losses = [float(step % 2) for step in steps]
    plots.plot_training_loss({"loss": (steps, losses)}, "t", tmp_path / "loss.png")
    raw, mean = drawn[0].axes[0].lines
    assert np.asarray(raw.get_ydata()).tolist() == losses
    assert np.asarray(mean.get_ydata()).tolist() == [0.0] + [0.5] * 99


def test_losses_of_several_methods_have_scales_of_their_own(tmp_path: Path, drawn: list[Figure]) -> None:
    curves = {f"method {scale}": ([1, 2], [2.0 * scale, 1.0 * scale]) for scale in (1, 10, 100, 1000)}
    plots.plot_training_loss(curves, "a title", tmp_path / "loss.png")
    panels = drawn[0].axes
    assert [axes.get_title() for axes in panels] == list(curves)
    for axes, (_, losses) in zip(panels, curves.values(), strict=True):
        low, high = axes.get_ylim()
        assert 0 < low <= min(losses) and max(losses) <= high < 1.2 * max(losses)


@pytest.mark.parametrize("plot", [plots.plot_precision_recall, plots.plot_precision_at, plots.plot_training_loss])
def test_nothing_to_draw_is_refused_and_writes_nothing(plot: Callable[..., None], tmp_path: Path) -> None:
    nothing = [float("nan")] if plot is plots.plot_training_loss else [[float("nan")]]
    for curves in ({}, {"a": ([1.0], nothing)}):
        with pytest.raises(UserError, match="nothing to draw in the plot 't'"):
            plot(curves, "t", tmp_path / "pr.png")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        plots.plot_precision_at({"a": ([1], [[0.5]])}, "t", tmp_path / "missing" / "p.png")


def write_log(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_the_training_log_is_read_by_term(tmp_path: Path) -> None:
    path = write_log(
        tmp_path / "log.jsonl",
        {"event": "step", "step": 1, "loss": 2.0, "contrast": 1.5},
        {"event": "evaluation", "step": 1, "epoch": 0, "i2t/mAP@all": 0.5},
        {"event": "step", "step": 2, "loss": 1.0, "contrast": 0.5},
    )
    path.write_text(path.read_text() + '{"event": "step", "st', encoding="utf-8")
    assert plots.read_training_log(path) == {"loss": ([1, 2], [2.0, 1.0]), "contrast": ([1, 2], [1.5, 0.5])}


@pytest.mark.parametrize(
    "text", ["no json\n", "[1]\n", '{"event": "step"}\n', '{"event": "step", "step": 1, "a": "b"}\n']
)
def test_what_is_no_log_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "step", "step": 0, "loss": 1.0}\n' + text, encoding="utf-8")
    with pytest.raises(UserError, match=r"log\.jsonl, line 2: not a line of a training log"):
        plots.read_training_log(path)


def test_a_missing_log_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        plots.read_training_log(tmp_path / "log.jsonl")
