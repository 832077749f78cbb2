"""Making an index, keeping it up to date, and asking it, through the command line."""

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import sqlite3
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from common import checkpoint
from common.codes import Codes
from common.errors import UserError
from runners.encoder import Encoder
from runners.evaluation import Evaluator, SplitCodes
from runners.search.engine import Kind, merged
from runners.search.index import Index
from runners.search.inputs import Files, Manifest
from tests.checkpoints import configured, saved
from tests.commands import refused, run
from tests.datasets import smooth_picture
from tests.disks import without_rights
from tests.processes import Forked

SMALL = ("search.batch_size=4", "search.save_every=8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Path:
    """A checkpoint of DSPH in small."""
    path = tmp_path_factory.mktemp("trained") / "best.pt"
    saved(configured("DSPH", tiny_overrides), path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve pictures in two folders, one of them broken, beside files that are none."""
    folder = tmp_path / "photos"
    for number in range(12):
        add_picture(folder / ("sub" if number % 2 else "."), number)
    (folder / "sub" / "5.png").write_bytes(b"no picture")
    (folder / "notes.md").write_text("no picture, and not named like one")
    (folder / ".thumbnails").mkdir()
    shutil.copy(folder / "0.png", folder / ".thumbnails" / "0.png")
    return folder


def add_picture(folder: Path, number: int, name: str | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    smooth_picture(number, 40, 30).save(folder / f"{number if name is None else name}.png")


def index(trained: Path, folder: Path, *inputs: str | Path, settings: tuple[str, ...] = SMALL) -> tuple[str, str]:
    """Runs `--index`: stdout, stderr."""
    code, out, err = run("--index", trained, "--input", *inputs, "--save-dir", folder, "--device", "cpu", *settings)
    assert code == 0, err
    return out, err


def content(folder: Path) -> dict[tuple[str, str], tuple[bytes, dict[str, Any]]]:
    """Code and metadata of all that an index holds, whatever its number."""
    with Index.open(folder) as opened:
        return {
            (kind, key): (opened.codes([number]).packed().tobytes(), opened.hit(number).metadata)
            for number, kind, key, _ in opened.listing()
        }


def counts(out: str, kind: str) -> list[int]:
    """Encoded, kept, in the index."""
    line = next(line for line in out.splitlines() if line.startswith(f"{kind}s "))
    return [int(word) for word in line.split()[1:]]


def test_a_folder_and_what_becomes_of_it(
    trained: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = index(trained, tmp_path / "index", photos)
    assert counts(out, "image") == [11, 0, 11] and counts(out, "text") == [0, 0, 0]
    assert "1 could not be read and were skipped" in out
    assert err.count("5.png is not a picture") == 1
    assert "5.png is not a picture" in (tmp_path / "index/skipped.txt").read_text()
    before = content(tmp_path / "index")
    encoder = Encoder.load(trained, device="cpu")
    for (_, path), (code, metadata) in before.items():
        assert code == encoder.images([path]).packed().tobytes()
        assert metadata == {"path": path, "width": 40, "height": 30}
    assert {str(Path(path).relative_to(photos)) for _, path in before} == {
        f"{'sub/' if number % 2 else ''}{number}.png" for number in range(12) if number != 5
    }

    (photos / "0.png").unlink()  # vanished
    add_picture(photos, 3, "2")  # changed
    add_picture(photos / "sub", 5)  # mended
    add_picture(photos, 30)  # new
    (photos / "4.png").write_bytes(b"broken now")
    read: list[str] = []
    opened = Image.open

    def noted(path: Any, **more: Any) -> Image.Image:
        read.append(str(path))
        return opened(path, **more)

    monkeypatch.setattr("PIL.Image.open", noted)
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(photos.parent)
        out, err = index(trained, tmp_path / "index", Path(os.path.relpath(photos, Path(__file__).parents[1])))
    assert sorted(Path(path).name for path in read) == ["2.png", "30.png", "4.png", "5.png"]
    assert counts(out, "image") == [3, 8, 11] and "1 have vanished and were removed" in out
    index(trained, tmp_path / "fresh", photos)
    assert content(tmp_path / "index") == content(tmp_path / "fresh") != before
    read.clear()
    out, _ = index(trained, tmp_path / "index", photos)
    assert counts(out, "image") == [0, 11, 11] and [Path(path).name for path in read] == ["4.png"]


def test_a_manifest(trained: Path, photos: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image": "photos/0.png", "texts": ["zero", "nil"], "labels": ["even", 7], "year": 2019},
        {"image": "photos/0.png", "text": "zero once more"},
        {"image": "photos/none.png", "text": "no such picture"},
        {"text": "nil"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, err = index(trained, tmp_path / "index", path)
    assert counts(out, "image") == [1, 0, 1] and counts(out, "text") == [5, 0, 5]
    assert "none.png is missing" in err
    found, picture = content(tmp_path / "index"), str(photos / "0.png")
    shared = {"labels": ["even", "7"], "year": 2019, "path": picture}
    assert found["image", picture][1] == {**shared, "texts": ["zero", "nil"], "width": 40, "height": 30}
    assert found["text", f"{picture}\nnil"][1] == {**shared, "text": "nil"}
    assert found["text", "nil"][1] == {"text": "nil"}
    assert found["text", "nil"][0] == found["text", f"{picture}\nnil"][0]
    rows[0]["year"] = 2020  # what is shown of three things
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, _ = index(trained, tmp_path / "index", path)
    assert counts(out, "text") == [2, 3, 5]
    assert content(tmp_path / "index")["text", f"{picture}\nnil"][1]["year"] == 2020


def test_lines_patterns_and_several_inputs(trained: Path, photos: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_bytes("\ufeffein rotes Herz\r\n\r\na dog\na dog\n".encode())
    folder = tmp_path / "index"
    out, _ = index(trained, folder, photos / "**/[0-3].png", lines, photos / "0.png")
    assert counts(out, "image") == [4, 0, 4] and counts(out, "text") == [2, 0, 2]
    line = refused("--index", trained, "--input", lines, "--save-dir", folder)
    assert "[0-3].png" in line or "0.png" in line
    assert "which is not named now, so that all of it would be dropped" in line


def test_a_data_set_ranks_as_the_evaluation(tmp_path: Path, tiny_overrides: list[str]) -> None:
    """Codes, distances and order in all four directions, and the mAP of the full ranking."""
    config = configured("MITH", tiny_overrides, "evaluate.caption=random")
    dataset, model, query, database = saved(config, tmp_path / "best.pt")
    reports = Evaluator(config, dataset, model, CPU).evaluate().reports["query"]
    assert_same_ranking(tmp_path / "best.pt", tmp_path / "index", query, database, reports)
    out, _ = index(
        tmp_path / "best.pt", tmp_path / "queries", "dataset:tiny:query", f"dataset.root={config.dataset.root}"
    )
    assert counts(out, "image") == [len(query.labels), 0, len(query.labels)]


CPU = torch.device("cpu")


def assert_same_ranking(trained: Path, folder: Path, query: Any, database: Any, reports: Any) -> None:
    tree = checkpoint.load(trained).meta["config"]
    index(trained, folder, f"dataset:{tree['dataset']['name']}", settings=(f"dataset.root={tree['dataset']['root']}",))
    encoder, items = Encoder.load(trained, device="cpu"), len(database.labels)
    kinds: tuple[tuple[Kind, Any], ...] = (("image", database.image), ("text", database.text))
    for answers, codes in kinds:
        with Index.open(folder) as opened:
            numbers = [number for number, kind, _, _ in opened.listing() if kind == answers]
            held = opened.codes(numbers).values
            assert np.array_equal(held, codes.numpy())
            for asks, asked in (("image", query.image), ("text", query.text)):
                ranked, distances = opened.nearest(Codes(asked.numpy()), items + 7, (answers,))
                far = (asked.numpy()[:, None] != held[None]).sum(-1)
                order = np.argsort(far, axis=1, kind="stable")
                assert np.array_equal(np.array(numbers)[order], ranked[:, :items])
                assert np.array_equal(np.take_along_axis(far, order, 1), distances[:, :items])
                labels = [opened.hit(number).metadata["labels"] for number in numbers]
                precision = [
                    average_precision(row, [set(labels[numbers.index(number)]) for number in line[:items]])
                    for row, line in zip(query.labels, ranked.tolist(), strict=True)
                ]
                reported = reports[str(encoder.bits)][f"{asks[0]}2{answers[0]}/mAP@all"]
                assert np.nanmean(precision) == pytest.approx(reported, abs=1e-6)


def average_precision(labels: torch.Tensor, ranked: list[set[int]]) -> float:
    wanted = set(labels.nonzero()[:, 0].tolist())
    relevant = np.array([bool(wanted & found) for found in ranked])
    hits = np.cumsum(relevant)
    return float((hits / np.arange(1, len(ranked) + 1))[relevant].mean()) if relevant.any() else float("nan")


def test_names_that_are_not_utf8(trained: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As archives of other systems leave them: passed over with a word; all else, such as questions, works."""
    odd = os.fsdecode(os.fsencode(photos) + b"/caf\xe9.png")
    shutil.copy(photos / "0.png", odd)
    out, err = index(trained, tmp_path / "index", photos)
    assert counts(out, "image") == [11, 0, 11] and "2 could not be read" in out
    assert "caf\\udce9.png' has a name that is not UTF-8; rename it" in err
    assert "caf\\udce9.png'" in (tmp_path / "index/skipped.txt").read_text()
    redirect = contextlib.redirect_stdout
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    for options in ((), ("--json",)):
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr("contextlib.redirect_stdout", lambda _: redirect(terminal))
            code, _, err = run("--search", tmp_path / "index", odd, "a \U0001f436 caf\xe9", *options, "--device", "cpu")
        assert code == 0, err
    shown = terminal.buffer.getvalue().decode("latin-1")
    assert "caf\\udce9.png\nrank" in shown and "a \\U0001f436 caf\xe9\nrank" in shown
    assert [json.loads(line)["query"] for line in shown.splitlines()[-2:]] == [odd, "a \U0001f436 caf\xe9"]


def test_questions(trained: Path, photos: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"image": f"photos/{n}.png", "text": f"number {n}"}) + "\n" for n in (0, 2, 4, 6))
    )
    index(trained, tmp_path / "index", rows)
    picture = photos / "2.png"
    code, out, err = run("--search", tmp_path / "index", "number 2", picture, "--json", "search.k=3", "--device", "cpu")
    assert code == 0, err
    text, image = (json.loads(line) for line in out.splitlines())
    assert text["query"] == "number 2" and [hit["kind"] for hit in text["hits"]] == ["image"] * 3
    assert image["query"] == str(picture) and len(image["hits"]) == 3
    assert [hit["distance"] for hit in image["hits"]] == sorted(hit["distance"] for hit in image["hits"])
    assert (0, str(picture)) in [(hit["distance"], hit.get("path")) for hit in image["hits"]]
    code, out, _ = run("--search", tmp_path / "index", "number 2", "search.find=text", "--device", "cpu")
    assert code == 0 and "number 2\nrank  bits apart  kind  what" in out and "  text  number 2 " in out


def test_bad_commands(trained: Path, photos: Path, tmp_path: Path, tiny_overrides: list[str]) -> None:
    folder = tmp_path / "index"
    index(trained, folder, photos)
    other = tmp_path / "other.pt"
    saved(configured("DSPH", tiny_overrides, "model.bits=8"), other)
    (tmp_path / "empty").mkdir()
    (tmp_path / "evil.jsonl").write_text('{"image": "../../etc/passwd.png"}')
    (tmp_path / "text.bin").write_text("x")
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    odd.mkdir()
    new = ("--save-dir", tmp_path / "new")
    for arguments, message in (
        (("--index", trained, *new), "--index needs --input"),
        (("--index", trained, "--input", photos), "--index needs --save-dir"),
        (("--index", tmp_path / "no.pt", "--input", photos, *new), "no.pt is not there"),
        (("--index", trained, "--input", tmp_path / "empty", *new), "there are no pictures and no texts"),
        (("--index", trained, "--input", tmp_path / "nothing", *new), "nothing is not there; name a folder"),
        (("--index", trained, "--input", tmp_path / "*.gif", *new), "is not there; name a folder, a pattern"),
        (("--index", trained, "--input", tmp_path / "text.bin", *new), "is of no known kind"),
        (("--index", trained, "--input", tmp_path / "evil.jsonl", *new), "line 1: image '../../etc/passwd.png' leads"),
        (("--index", trained, "--input", "dataset:cocoa", *new), "did you mean 'coco'"),
        (("--index", trained, "--input", "dataset:tiny:test", *new), "'test' is no split; name one of query"),
        (("--index", trained, "--input", photos, *new, "search.engin=ivf"), "search.engin: unknown key; did you mean"),
        (("--index", trained, "--input", photos, *new, "search.engine=flatt"), "'flatt'"),
        (("--index", trained, "--input", photos, *new, "dataset.root=x"), "is no data set, so it has no such setting"),
        (("--index", other, "--input", photos, "--save-dir", folder), "holds codes of DSPH, 16 bits"),
        (("--index", trained, "--input", photos, "--save-dir", photos), "so it is no folder for an index"),
        (("--search", folder), "ask something"),
        (("--search", folder, "a dog", " "), "a question is empty"),
        (("--index", trained, "--input", odd, *new), "has a name that is not UTF-8"),
        (("--search", tmp_path / "empty", "a dog"), "holds no index"),
        (("--search", folder, "photos/dog.jpg"), "picture photos/dog.jpg is not there"),
        (("--search", folder, photos / "sub/5.png"), "5.png is not a picture"),
        (("--search", folder, "a dog", "search.k=0"), "search.k"),
    ):  # fmt: skip
        assert message in refused(*arguments), arguments
    assert not (tmp_path / "new").exists()
    with Index.open(folder, writable=True):
        assert "another process is changing the index" in refused(
            "--index", trained, "--input", photos, "--save-dir", folder
        )


def test_engines_that_cannot_be_had(trained: Path, photos: Path, tmp_path: Path) -> None:
    arguments = ("--index", trained, "--input", photos, "--save-dir", tmp_path / "new", "search.engine=pgvector")
    assert "search.address is null" in refused(*arguments)
    assert "127.0.0.1" in refused(*arguments, "search.address=postgresql://nobody@127.0.0.1:1/none")
    with mock.patch.dict(sys.modules, {"psycopg": None}):
        assert "pip install -r requirements-engines.txt" in refused(*arguments, "search.address=postgresql://x@y/z")
    assert not (tmp_path / "new/index.json").exists()


def test_pictures_of_a_manifest_in_the_other_normal_form(tmp_path: Path) -> None:
    stored = tmp_path / unicodedata.normalize("NFD", "é.png")
    smooth_picture(0, 8, 8).save(stored)
    rows = [{"image": unicodedata.normalize("NFC", "é.png")}, {"image": "ü.png"}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    things = list(Manifest(str(tmp_path / "m.jsonl")).things())
    assert [thing.key for thing in things] == [str(stored), str(tmp_path / "ü.png")]


def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "photos" / "closed").mkdir(parents=True)
    smooth_picture(0, 8, 8).save(tmp_path / "photos" / "closed" / "1.png")
    files = Files(str(tmp_path / "photos"))
    assert len(list(files.things())) == 1
    (tmp_path / "photos" / "closed").chmod(0)
    with without_rights(tmp_path), pytest.raises(UserError, match=r"folder .*closed cannot be read \(Permission"):
        list(files.things())
    (tmp_path / "photos" / "closed").chmod(0o755)


def test_a_picture_bomb_is_passed_over(
    trained: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    Image.new("L", (50, 50)).save(photos / "bomb.png")
    out, err = index(trained, tmp_path / "index", photos)
    assert counts(out, "image") == [11, 0, 11] and "bomb.png has more than 2000 pixels" in err


def test_methods_that_need_more_than_a_picture_or_a_text(
    tmp_path: Path, tiny_overrides: list[str], photos: Path
) -> None:
    """They take it from the rows of a manifest; where nothing can give it, that is said before anything is written."""
    trained = tmp_path / "best.pt"
    saved(configured("UCMFH", tiny_overrides, "model.missing=paired"), trained)
    line = refused("--index", trained, "--input", photos, "--save-dir", tmp_path / "index")
    assert "image codes are made from image and text, and there is no text here" in line
    assert not (tmp_path / "index").exists()
    rows = tmp_path / "rows.csv"
    rows.write_text("image,text\nphotos/0.png,zero\nphotos/2.png,two\n")
    index(trained, tmp_path / "index", rows)
    encoder, found = Encoder.load(trained, device="cpu"), content(tmp_path / "index")
    pictures, texts = [str(photos / "0.png"), str(photos / "2.png")], ["zero", "two"]
    for kind, keys, codes in (
        ("image", pictures, encoder.images(pictures, text=texts)),
        ("text", [f"{p}\n{t}" for p, t in zip(pictures, texts, strict=True)], encoder.texts(texts, image=pictures)),
    ):
        assert [found[kind, key][0] for key in keys] == [code.tobytes() for code in codes.packed()]
    assert "there is no image here" in refused("--search", tmp_path / "index", "zero")


def test_damaged_indexes(trained: Path, photos: Path, tmp_path: Path, tiny_overrides: list[str]) -> None:
    whole = tmp_path / "whole"
    index(trained, whole, photos)
    expected = content(whole)
    for name, damage, message in (
        ("index.json", None, "holds no index"),
        ("index.json", b"{}", "index.json is damaged"),
        ("catalog.sqlite", None, "catalog.sqlite is missing"),
        ("catalog.sqlite", b"x" * 8192, "catalog.sqlite cannot be read"),
        ("search.yaml", None, "search.yaml is missing; remove the folder"),
        ("model.pt", None, "model.pt is missing; index again"),
        ("model.pt", b"x", "model.pt"),
    ):
        folder = tmp_path / "damaged"
        shutil.copytree(whole, folder)
        (folder / name).unlink()
        if damage is not None:
            (folder / name).write_bytes(damage)
        assert message in refused("--search", folder, "a dog"), (name, damage)
        shutil.rmtree(folder)
    for name in ("codes.npz", "model.pt", "inputs.json", "skipped.txt", "catalog.sqlite"):  # what can be made again is
        folder = tmp_path / "mended"
        shutil.copytree(whole, folder)
        (folder / name).unlink()
        index(trained, folder, photos)
        assert content(folder) == expected
        shutil.rmtree(folder)
    other = tmp_path / "other.pt"
    saved(configured("DSPH", tiny_overrides, "model.bits=16", "run.seed=5"), other)
    shutil.copy(other, whole / "model.pt")
    assert "is not the model whose codes the index" in refused("--search", whole, "a dog")


def test_rows_without_an_index_file_are_no_ones(trained: Path, photos: Path, tmp_path: Path) -> None:
    index(trained, tmp_path / "index", photos)
    (tmp_path / "index/index.json").unlink()
    line = refused("--index", trained, "--input", photos, "--save-dir", tmp_path / "index")
    assert "rows of another index where those of" in line


def test_where_there_is_no_hit_number_and_distance_are_minus_one() -> None:
    ids, distances = np.array([[4, -1]]), np.array([[3, 2**31 - 1]])
    assert [found.tolist() for found in merged([(ids, distances)], 2)] == [[[4, -1]], [[3, -1]]]


@pytest.mark.slow
def test_sigkill_at_any_moment(trained: Path, tmp_path: Path) -> None:
    """Twenty kills while pictures and texts come and go: the next run completes, and work done is not lost."""
    photos, killed = tmp_path / "photos", tmp_path / "killed"
    lines, made = photos / "lines.txt", itertools.count()

    def more_pictures(count: int) -> None:
        for _ in range(count):
            add_picture(photos, next(made))

    more_pictures(400)
    lines.write_text("".join(f"text {number}\n" for number in range(400)))
    settings = ("search.batch_size=4", "search.save_every=4")
    arguments = ("--index", str(trained), "--input", str(photos), str(lines), "--save-dir", str(killed), *settings)
    draw, done, kills = random.Random(5), [], 0
    while kills < 20:
        process = Forked(run, *arguments, "--device", "cpu")
        time.sleep(0.2 + draw.random() * 1.3)
        if process.exitcode is None:
            kills += 1
            process.kill()
        else:  # all was done: without more to do, no later one would be killed at work
            more_pictures(100)
        process.join()
        if (killed / "index.json").exists():
            with Index.open(killed) as opened:
                done.append(len(opened))
        if kills in (8, 14):  # in between the folder changes
            (photos / f"{kills}.png").unlink(missing_ok=True)
            more_pictures(1)
    assert len(done) > 10 and all(later >= earlier - 2 for earlier, later in zip(done, done[1:], strict=False))
    index(trained, killed, photos, lines, settings=settings)
    index(trained, tmp_path / "whole", photos, lines, settings=settings)
    assert content(killed) == content(tmp_path / "whole")
    with sqlite3.connect(killed / "catalog.sqlite") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.slow
def test_openmoji_ranks_as_the_evaluation(tmp_path: Path, tiny_overrides: list[str]) -> None:
    """The embedded data set, one epoch on random towers: what the README's first command reports, from the index."""
    backbone = next(entry for entry in tiny_overrides if entry.startswith("model.backbone="))
    code, _, err = run(
        "--config-file", "configs/MITH/config.yaml", "--save-dir", tmp_path / "run", backbone, "dataset.image_size=32",
        f"dataset.root={tmp_path / 'openmoji'}", "run.epochs=1", "evaluate.every=1", "run.device=cpu",
        f"run.cache_dir={tmp_path / 'cache'}", "model.bits=16", "dataset.tokens=1024",
    )  # fmt: skip
    assert code == 0, err
    reports = json.loads((tmp_path / "run/results.json").read_text())["best"]["reports"]
    with np.load(tmp_path / "run/codes-best.npz", allow_pickle=False) as codes:
        splits = [
            SplitCodes(
                torch.from_numpy(codes[f"{side}_img"]),
                torch.from_numpy(codes[f"{side}_txt"]),
                torch.from_numpy(codes[f"{side}_l"]),
            )
            for side in "qr"
        ]
    assert_same_ranking(tmp_path / "run/best.pt", tmp_path / "index", splits[0], splits[1], reports)
