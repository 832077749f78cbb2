"""Manifests: what a row becomes, and what is refused with its line."""

import json
import resource
import time
from pathlib import Path

import pytest

from common.errors import UserError
from dataset.manifest_rows import ManifestRow, read_manifest


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_both_forms_give_the_same_rows(tmp_path: Path) -> None:
    rows = [
        {"image": "a/1.jpg", "texts": ["a cat", " ein Kätzchen "], "labels": ["cat", "7"], "year": "2019"},
        {"image": "./a/../b.png", "text": 'two\nlines, "quoted" | one text', "labels": []},
        {"text": "alone"},
    ]
    lines = written(tmp_path, "m.jsonl", "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    table = written(
        tmp_path,
        "m.csv",
        "image,text,texts,labels,year\r\n"
        "a/1.jpg,,a cat| ein Kätzchen ,cat|7,2019\r\n"
        './a/../b.png,"two\nlines, ""quoted"" | one text",,|,\r\n'
        "\r\n,alone,,,\r\n",
    )
    expected = [
        (f"{tmp_path}/a/1.jpg", ("a cat", "ein Kätzchen"), ("cat", "7"), {"year": "2019"}),
        (f"{tmp_path}/b.png", ('two\nlines, "quoted" | one text',), (), {}),
        (None, ("alone",), None, {}),
    ]
    for path, numbers in ((lines, [1, 3, 5]), (table, [2, 4, 6])):
        assert list(read_manifest(path)) == [
            ManifestRow(line, *values) for line, values in zip(numbers, expected, strict=True)
        ]


def test_json_values_are_kept_and_class_numbers_are_names(tmp_path: Path) -> None:
    row = '{"text": ["one", "two"], "labels": [3, "x"], "split": null, "box": {"w": [1, 2.5]}}'
    (read,) = read_manifest(written(tmp_path, "m.ndjson", row), needs=("text", "labels"))
    assert (read.texts, read.labels) == (("one", "two"), ("3", "x"))
    assert read.metadata == {"split": None, "box": {"w": [1, 2.5]}}


def test_paths_stay_under_the_root(tmp_path: Path) -> None:
    inside, root = tmp_path / "sub", tmp_path / "pictures"
    inside.mkdir()
    for outside in (
        "../x.jpg",
        "/etc/passwd",
        "a/../../x.jpg",
        "../sub2/x.jpg",
        "..\\\\x.jpg",
        str(tmp_path / "x.jpg"),
    ):
        path = written(inside, "m.jsonl", f'{{"text": "ok"}}\n{{"image": "{outside}"}}')
        with pytest.raises(UserError, match=r"m.jsonl, line 2: image .* leads out of .*sub, so it is not read"):
            list(read_manifest(path))
    for value in ("x.jpg", str(root / "x.jpg"), "../pictures/x.jpg", "a\\..\\x.jpg"):
        path = written(inside, "m.jsonl", json.dumps({"image": value}))
        assert [row.image for row in read_manifest(path, root=root)] == [str(root / "x.jpg")]


@pytest.mark.parametrize(
    ("name", "content", "needs", "message"),
    [
        ("m.txt", "{}", (), "is no manifest"),
        ("m.csv", "text,labels\na,\"['cat', 'dog']\"\n", (), r"line 2: labels is .*; write a list as a\|b\|c"),
        ("m.csv", 'text,labels\na,"[0, 1]"\n', (), r"line 2: labels is .*; write a list as a\|b\|c"),
        ("m.csv", 'image,texts\n1.jpg,"[""a"", ""b""]"\n', (), r"line 2: texts is .*; write a list as a\|b\|c"),
        ("m.jsonl", None, (), "cannot be read"),
        ("m.jsonl", '{"text": "a"}\n{"text": ', (), r"line 2: is not JSON"),
        ("m.jsonl", '{"text": "a", "x": NaN}', (), "NaN is no JSON value"),
        ("m.jsonl", "[" * 100_000, (), "line 1: is not JSON"),
        ("m.jsonl", '["a"]', (), "is no JSON object"),
        ("m.jsonl", '{"text": "a"}\n{"image": "", "text": "  "}', (), "line 2: has neither image nor text"),
        ("m.jsonl", '{"text": "a"}', ("image", "text"), "line 1: has no image"),
        ("m.jsonl", '{"image": "a.jpg"}', ("image", "text"), "line 1: has no text"),
        ("m.jsonl", '{"text": "a", "labels": []}', ("labels",), "line 1: has no labels"),
        ("m.jsonl", '{"image": 7}', (), "image is 7, not a path"),
        ("m.jsonl", '{"image": "a\\u0000b"}', (), "not a path"),
        ("m.jsonl", '{"text": ["a", 2]}', (), "text holds 2, which is not a text"),
        ("m.jsonl", '{"text": "a", "labels": [true]}', (), "labels holds True, which is not a label"),
        ("m.jsonl", '{"text": "a", "labels": [1, 0, 0]}', (), "names a label twice"),
        ("m.jsonl", b'{"text": "a"}\n{"text": "\xe4"}', (), "line 2: is not UTF-8 text .byte 10 of the line"),
        ("m.jsonl", '{"text": "a \\ud83d\\udc36"}\n{"text": "a \\ud83d"}', (), "line 2: holds half of a character"),
        ("m.jsonl", '{"text": "a", "x": [{"\\udce9": 1}]}', (), "line 1: holds half of a character"),
        ("m.jsonl", " " * (1 << 20) + '{"text": "a"}', (), "line 1: is longer than 1 MB"),
        ("m.csv", "a,b\n1,2", (), "names neither image nor text, but 'a, b'"),
        ("m.csv", "image,image\na,b", (), "must name every column, each once"),
        ("m.csv", "image,text\na.jpg\n", (), "line 2: has 1 cells, the heading 2"),
        ("m.csv", 'text\n"open', (), "line 2: is not CSV"),
        ("m.csv", b"text\n\xff", (), "line 2: is not UTF-8"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, name: str, content: str | bytes | None, needs: tuple[str, ...], message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        written(tmp_path, name, content)
    with pytest.raises(UserError, match=message) as refused:
        list(read_manifest(path, needs=needs))
    assert "\n" not in str(refused.value)


def test_a_folder_or_a_pipe_is_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "m.csv").mkdir()
    with pytest.raises(UserError, match="is no regular file"):
        list(read_manifest(tmp_path / "m.csv"))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_million_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m.{suffix}"
    with path.open("w") as file:
        file.write("image,text,labels,year\n" if suffix == "csv" else "")
        for number in range(1_000_000):
            row = (f"{number % 1000}/{number}.jpg", f"a picture of thing {number} in a room", "cat|dog", "2019")
            names = ("image", "text", "labels", "year")
            file.write(
                ",".join(row) + "\n" if suffix == "csv" else json.dumps(dict(zip(names, row, strict=True))) + "\n"
            )
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    assert sum(row.image is not None for row in read_manifest(path)) == 1_000_000
    assert time.monotonic() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB: rows are not kept
