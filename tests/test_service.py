"""The JSON service: answers, limits, errors that a client can read, and an end in order."""

import io
import json
import re
import shutil
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from PIL import Image

from common.config import load_section
from runners.encoder import Encoder
from runners.search.searcher import Searcher
from tests.checkpoints import configured, saved
from tests.commands import ROOT, finish, refused, run, start
from tests.datasets import smooth_picture

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient  # noqa: E402

from runners.search.service import HEADERS, ServeConfig, Service, create_app, thumbnail_of  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Path:
    """An index of ten pictures with a text each, and a text alone."""
    root = tmp_path_factory.mktemp("served")
    saved(configured("DSPH", tiny_overrides), root / "best.pt")
    rows = []
    for number in range(10):
        smooth_picture(number, 400, 300).save(root / f"{number}.png")
        rows.append({"image": f"{number}.png", "text": f"picture {number}", "labels": [number % 3]})
    (root / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"text": "<b>alone</b> & well"}])
    )
    code, _, err = run(
        "--index", root / "best.pt", "--input", root / "rows.jsonl", "--save-dir", root / "index", "--device", "cpu"
    )
    assert code == 0, err
    return root / "index"


def serve_config(**values: Any) -> ServeConfig:
    return load_section(
        ROOT / "configs/serve.yaml", "serve", ServeConfig, [f"serve.{k}={v}" for k, v in values.items()]
    )


def client_of(folder: Path, **values: Any) -> TestClient:
    service = Service(Searcher.open(folder, device="cpu"), serve_config(**values))
    return TestClient(create_app(service), base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with client_of(folder, upload_bytes=100_000, upload_pixels=200_000) as client:
        yield client


def png(picture: Image.Image) -> dict[str, tuple[str, bytes]]:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return {"file": ("picture.png", out.getvalue())}


def test_answers_are_those_of_the_index(client: TestClient, folder: Path) -> None:
    with Searcher.open(folder, device="cpu") as searcher:
        text = searcher.by_texts(["picture 3"], 4)[0]
        both = searcher.by_texts(["picture 3", "alone"], 20, ("image", "text"))
        picture = searcher.by_pictures([str(folder.parent / "3.png")], 3)[0]
        like = searcher.like_item(picture[0].id, 5)

    def ids(answer: Any) -> list[tuple[int, int]]:
        return [(hit["id"], hit["distance"]) for hit in answer["hits"]]

    def same(hits: Any) -> list[tuple[int, int]]:
        return [(hit.id, hit.distance) for hit in hits]

    assert ids(client.post("/api/search", json={"text": "picture 3", "k": 4}).json()) == same(text)
    batch = {"texts": ["picture 3", "alone"], "k": 20, "find": "both"}
    answers = client.post("/api/search/batch", json=batch).json()["answers"]
    assert [ids(answer) for answer in answers] == [same(hits) for hits in both] and len(answers[0]["hits"]) == 20
    files = png(Image.open(folder.parent / "3.png"))
    assert ids(client.post("/api/search/picture?k=3", files=files).json()) == same(picture)
    assert picture[0].distance == 0
    found = client.get(f"/api/items/{picture[0].id}/similar?k=5").json()
    assert ids(found) == same(like) and picture[0].id not in dict(ids(found))
    assert client.get("/api/health").json() == {
        "status": "ok", "images": 10, "texts": 11, "bits": 16, "model": "DSPH, 16 bits", "engine": "flat",
    }  # fmt: skip


def test_items_and_their_pictures(client: TestClient, folder: Path) -> None:
    hits = client.post("/api/search", json={"text": "x", "k": 30, "find": "both"}).json()["hits"]
    assert len(hits) == 21
    for hit in hits:
        assert client.get(f"/api/items/{hit['id']}").json() == {**hit, "distance": 0}
        if hit["caption"] == "<b>alone</b> & well":
            assert hit["thumbnail"] is None
            assert client.get(f"/api/items/{hit['id']}/thumbnail").status_code == 404
            continue
        number = re.sub(r"\D", "", hit["caption"])
        assert hit["metadata"]["path"] == str(folder.parent / f"{number}.png")
        answer = client.get(hit["thumbnail"])
        assert answer.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(answer.content)).size == (320, 240)


def test_thumbnails_are_turned_and_lie_on_white(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (80, 40), "red").save(tmp_path / "a.jpg", exif=exif)
    assert Image.open(io.BytesIO(thumbnail_of(str(tmp_path / "a.jpg"), 20))).size == (10, 20)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    corner = Image.open(io.BytesIO(thumbnail_of(str(tmp_path / "a.png"), 20))).getpixel((0, 0))
    assert isinstance(corner, tuple) and min(corner) > 250


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "message"),
    [
        ("POST", "/api/search", {"json": {}}, 422, "text: Field required"),
        ("POST", "/api/search", {"json": {"text": ""}}, 422, "text: String should have at least 1 character"),
        ("POST", "/api/search", {"json": {"text": "x" * 2001}}, 422, "at most 2000 characters"),
        ("POST", "/api/search", {"json": {"text": "x", "k": 0}}, 422, "k: Input should be greater than or equal to 1"),
        ("POST", "/api/search", {"json": {"text": "x", "k": 201}}, 400, "at most 200 hits are given"),
        ("POST", "/api/search", {"json": {"text": "x", "find": "all"}}, 422, "find: Input should be 'image'"),
        ("POST", "/api/search", {"json": {"text": "x", "path": "/etc"}}, 422, "path: Extra inputs are not permitted"),
        ("POST", "/api/search", {"content": b"{", "headers": JSON}, 422, "JSON decode error"),
        ("POST", "/api/search", {"content": b"\xff\xfe", "headers": JSON}, 422, ""),
        ("POST", "/api/search", {"content": b"x" * 100_001}, 413, "a request may have 100,000 bytes"),
        ("POST", "/api/search/batch", {"json": {"texts": []}}, 422, "texts: List should have at least 1 item"),
        ("POST", "/api/search/batch", {"json": {"texts": ["x"] * 65}}, 400, "65 questions, and at most 64"),
        ("POST", "/api/search/picture", {}, 422, "file: Field required"),
        ("POST", "/api/search/picture", {"files": {"file": b"no picture"}}, 400, "is not a picture"),
        ("POST", "/api/search/picture", {"files": png(Image.new("L", (448, 448)))}, 400, "more than 200000 pixels"),
        ("POST", "/api/search/picture", {"data": {"file": "/etc/passwd"}}, 422, "file: "),
        ("GET", "/api/search", {}, 405, "Method Not Allowed"),
        ("GET", "/api/items/999", {}, 404, "there is no item 999"),
        ("GET", "/api/items/-1/similar", {}, 404, "there is no item -1"),
        ("GET", f"/api/items/{10**30}/thumbnail", {}, 404, "there is no item"),
        ("GET", "/api/items/..%2F..%2Fetc%2Fpasswd/thumbnail", {}, 404, "Not Found"),
        ("GET", "/../../etc/passwd", {}, 404, "Not Found"),
        ("GET", "/page.html", {}, 404, "Not Found"),
        ("GET", "/docs", {}, 404, "Not Found"),
        ("GET", "/api/health", {"headers": {"Host": "evil.example"}}, 400, "answers at 127.0.0.1, not"),
    ],
)  # fmt: skip
def test_errors_can_be_read(
    client: TestClient, method: str, path: str, content: dict[str, Any], status: int, message: str
) -> None:
    answer = client.request(method, path, **content)
    assert answer.status_code == status
    error = answer.json()
    assert list(error) == ["error"] and message in error["error"] and "\n" not in error["error"]
    for name, value in HEADERS.items():
        assert answer.headers[name] == value


def test_a_body_without_a_length_is_bounded(client: TestClient) -> None:
    answer = client.post("/api/search", content=(b"x" * 10_000 for _ in range(11)))
    assert answer.status_code == 413 and answer.json() == {"error": "a request may have 100,000 bytes"}


def test_a_truncated_picture_is_an_error_of_the_client(client: TestClient) -> None:
    content = png(smooth_picture(0, 90, 90))["file"][1]
    answer = client.post("/api/search/picture", files={"file": content[: len(content) // 2]})
    assert answer.status_code == 400 and "the picture is truncated or broken" in answer.json()["error"]


def test_a_defect_is_told_without_its_inside(folder: Path) -> None:
    with client_of(folder) as client, mock.patch.object(Searcher, "by_texts", side_effect=ZeroDivisionError("secret")):
        answer = client.post("/api/search", json={"text": "x"})
    assert answer.status_code == 500 and answer.json() == {"error": "the service failed; its log says how"}
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_names_no_other_host(client: TestClient) -> None:
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        answer = client.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        assert not re.search(r"https?:|//[a-z]|@import", re.sub(r"^\s*//.*$| // .*$", "", answer.text, flags=re.M))
    described = client.get("/openapi.json").json()
    assert {path for path in described["paths"] if path.startswith("/api")} == set(described["paths"])
    assert "/api/search/picture" in described["paths"]


def test_a_changed_index_is_followed(folder: Path, tmp_path: Path) -> None:
    moved, trained = tmp_path / "index", folder.parent / "best.pt"
    lines = tmp_path / "lines.txt"
    lines.write_text("one\n")
    assert run("--index", trained, "--input", lines, "--save-dir", moved, "--device", "cpu")[0] == 0
    with client_of(moved) as client:
        old = client.post("/api/search", json={"text": "x", "find": "text"}).json()["hits"]
        lines.write_text("two\nthree\n")
        assert run("--index", trained, "--input", lines, "--save-dir", moved, "--device", "cpu")[0] == 0
        new = client.post("/api/search", json={"text": "x", "find": "text"}).json()["hits"]
        assert [hit["caption"] for hit in old] == ["one"]
        assert sorted(hit["caption"] for hit in new) == ["three", "two"]
        assert client.get(f"/api/items/{old[0]['id']}").status_code == 404
        assert client.get("/api/health").json()["texts"] == 2


def test_what_is_refused_before_serving(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = refused("--serve", folder, f"serve.port={taken.getsockname()[1]}")
        assert "cannot listen there (Address already in use); choose another serve.port" in line
    assert "cannot listen there" in refused("--serve", folder, "serve.host=no.such.host.invalid")
    assert "serve.port" in refused("--serve", folder, "serve.port=70000")
    assert "holds no index" in refused("--serve", tmp_path, "serve.port=0")
    with mock.patch.dict(sys.modules, {"uvicorn": None}):
        assert "--serve needs the package uvicorn, which is not installed; pip install -r requirements-serve.txt" in (
            refused("--serve", folder)
        )


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_it_listens_here_alone_and_ends_when_asked(folder: Path, number: signal.Signals) -> None:
    process = start("--serve", folder, "serve.port=0", "--device", "cpu")
    assert process.stdout is not None
    said = process.stdout.readline()
    address = re.search(r"http://127\.0\.0\.1:(\d+)/", said)
    assert address, said
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{address[0]}api/health") as answer:
                assert json.load(answer)["status"] == "ok"
            break
        except OSError:
            assert time.monotonic() < deadline
    process.send_signal(number)
    code, out, err = finish(process)
    assert (code, out.strip()) == (0, "stopped") and "Traceback" not in err, err


def test_encoders_of_other_models_are_refused(folder: Path, tmp_path: Path, tiny_overrides: list[str]) -> None:
    shutil.copytree(folder, tmp_path / "index")
    saved(configured("DSPH", tiny_overrides, "run.seed=9"), tmp_path / "index/model.pt")
    assert Encoder.load(tmp_path / "index/model.pt", device="cpu").bits == 16
    assert "is not the model whose codes the index" in refused("--serve", tmp_path / "index", "serve.port=0")
