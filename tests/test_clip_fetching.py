"""Public weights of CLIP: fetched once, checked, and gone on with after whatever networks do."""

import hashlib
import http.server
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

import models.clip.weights as clip_weights
from common.errors import UserError
from models.clip.weights import is_config, open_backbone, write_clip
from tests.clip_files import SHAPE, State, openai_state


@pytest.fixture(scope="module")
def state() -> State:
    return openai_state()


@dataclass
class Site:
    """A web server of one file, and what it should do wrong."""

    content: bytes
    ranges: bool = True  # whether it can send a part
    break_after: list[int] = field(default_factory=list)  # bytes after which to hang up, one entry a request
    requests: list[str] = field(default_factory=list)  # the Range header of every request
    url: str = ""


@pytest.fixture
def site(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    write_clip(tmp_path / "source", state, {})
    served = Site((tmp_path / "source").read_bytes())
    digest = hashlib.sha256(served.content).hexdigest()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 - http.server's name
            wanted = self.headers.get("Range", "")
            served.requests.append(wanted)
            if self.path != f"/{digest}/ViT-B-32.pt":
                self.send_error(404)
                return
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and served.ranges else 0
            if wanted and served.ranges and start >= len(served.content):
                self.send_error(416)
                return
            self.send_response(206 if wanted and served.ranges else 200)
            self.send_header("Content-Length", str(len(served.content) - start))
            self.end_headers()
            end = start + served.break_after.pop(0) if served.break_after else None
            self.wfile.write(served.content[start:end])

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setitem(clip_weights.OPENAI, "ViT-B/32", (digest, "ViT-B-32.pt"))
    monkeypatch.setenv("CLIP_WEIGHTS_URL", served.url + "/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def cached(tmp_path: Path) -> dict[str, int]:
    return {entry.name: entry.stat().st_size for entry in (tmp_path / "cache" / "clip").iterdir()}


def test_fetches_once_with_progress(
    tmp_path: Path, site: Site, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        backbone = open_backbone("ViT-B/32", str(tmp_path / "cache"))
        assert backbone.weights is not None
        assert torch.equal(backbone.weights["text_projection"], state["text_projection"])
    assert site.requests == [""]
    assert cached(tmp_path) == {"ViT-B-32.pt": len(site.content)}
    progress = capsys.readouterr().err
    assert "ViT-B-32.pt: 100%" in progress
    assert "B/s" in progress


def test_bad_digest_is_an_error_and_removed(tmp_path: Path, site: Site) -> None:
    site.content = bytes(len(site.content))
    with pytest.raises(UserError, match="another SHA-256 and was removed"):
        open_backbone("ViT-B/32", str(tmp_path / "cache"))
    assert cached(tmp_path) == {}


def test_cached_file_that_is_not_openais(tmp_path: Path, site: Site) -> None:
    path = tmp_path / "cache" / "clip" / "ViT-B-32.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"by hand")
    with pytest.raises(UserError, match="is not OpenAI's file"):
        open_backbone("ViT-B/32", str(tmp_path / "cache"))
    assert path.exists()
    assert site.requests == []


@pytest.mark.parametrize("ranges", [True, False], ids=["resumes", "restarts"])
def test_interrupted_fetch_goes_on(tmp_path: Path, site: Site, ranges: bool) -> None:
    site.ranges, site.break_after = ranges, [1000, 5000]
    assert open_backbone("ViT-B/32", str(tmp_path / "cache")).shape == SHAPE
    assert site.requests == ["", "bytes=1000-", f"bytes={6000 if ranges else 5000}-"]
    assert cached(tmp_path) == {"ViT-B-32.pt": len(site.content)}


def test_fetch_that_stalls_keeps_its_part_for_the_next_run(tmp_path: Path, site: Site) -> None:
    site.break_after = [3000, 0]
    with pytest.raises(UserError, match="the next run goes on from there"):
        open_backbone("ViT-B/32", str(tmp_path / "cache"))
    assert cached(tmp_path) == {"ViT-B-32.pt.part": 3000}
    open_backbone("ViT-B/32", str(tmp_path / "cache"))
    assert site.requests == ["", "bytes=3000-", "bytes=3000-"]
    assert cached(tmp_path) == {"ViT-B-32.pt": len(site.content)}


def test_part_that_was_complete_or_is_wrong(tmp_path: Path, site: Site) -> None:
    part = tmp_path / "cache" / "clip" / "ViT-B-32.pt.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(site.content)
    open_backbone("ViT-B/32", str(tmp_path / "cache"))
    (part.parent / "ViT-B-32.pt").unlink()
    part.write_bytes(b"of another file")
    with pytest.raises(UserError, match="another SHA-256"):
        open_backbone("ViT-B/32", str(tmp_path / "cache"))
    assert cached(tmp_path) == {}


def test_offline_says_which_file_to_put_where(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_WEIGHTS_URL", "http://127.0.0.1:9")  # nobody listens to the discard port
    with pytest.raises(UserError) as caught:
        open_backbone("ViT-B/32", str(tmp_path / "cache"))
    digest = clip_weights.OPENAI["ViT-B/32"][0]
    for part in (f"http://127.0.0.1:9/{digest}/ViT-B-32.pt", f"put it at {tmp_path}/cache/clip/ViT-B-32.pt", "refused"):
        assert part in str(caught.value)


def test_address_without_the_file(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_WEIGHTS_URL", f"{site.url}/elsewhere")
    with pytest.raises(UserError, match="HTTP 404"):
        open_backbone("ViT-B/32", str(tmp_path / "cache"))


def _open_in_process(cache: str) -> int:
    logging.disable()
    return len(open_backbone("ViT-B/32", cache).weights or {})


def test_two_processes_fetch_once(tmp_path: Path, site: Site, state: State) -> None:
    with get_context("fork").Pool(2) as pool:  # forked: they share the patched table
        assert pool.map(_open_in_process, [str(tmp_path / "cache")] * 2) == [len(state)] * 2
    assert site.requests == [""]
    assert cached(tmp_path) == {"ViT-B-32.pt": len(site.content)}


def test_openais_digests_are_whole() -> None:
    for digest, file in clip_weights.OPENAI.values():
        assert len(digest) == 64 and int(digest, 16)
        assert file.endswith(".pt")


def test_names_of_backbones(tmp_path: Path) -> None:
    assert is_config("configs/CLIP/config.yaml") and is_config("a.YML")
    assert not is_config("ViT-B/32") and not is_config("clip.pt")
    with pytest.raises(UserError, match=r"neither a file nor a public name \(ViT-B/32, .*did you mean 'ViT-B/32'"):
        open_backbone("VIT-B-32", str(tmp_path))
    with pytest.raises(UserError, match="weights/clip.pt"):
        open_backbone("weights/clip.pt", str(tmp_path))
