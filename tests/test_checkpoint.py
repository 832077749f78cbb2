"""Checkpoints: whole or not at all, no code from files, damaged ones passed over."""

import itertools
import logging
import os
import pickle
import time
import zipfile
from pathlib import Path

import pytest
import torch

from common.checkpoint import FORMAT, Checkpoints, load, require_same, save
from common.errors import UserError
from common.tensor_files import unwrapped
from tests.processes import Forked


class Evil:
    """Pickles to a call of os.system."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch evil-was-here",)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD([torch.nn.Parameter(weight)], lr=0.1, momentum=0.9)
    save(tmp_path / "a.pt", {"step": 3, "note": "ü"}, {"w": weight}, {"main": optimizer.state_dict()})
    loaded = load(tmp_path / "a.pt")
    assert loaded.is_ours and loaded.meta == {"step": 3, "note": "ü"}
    assert torch.equal(loaded.model["w"], weight) and loaded.model["w"].dtype == torch.float64
    assert loaded.optimizers["main"] == optimizer.state_dict()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt"]


def test_foreign_state_dicts_are_read_and_flattened(tmp_path: Path) -> None:
    torch.save({"hash": {"fc.weight": torch.ones(2)}, "vtp": {"x": torch.zeros(1)}, "epoch": 3}, tmp_path / "b.pth")
    loaded = load(tmp_path / "b.pth")
    assert not loaded.is_ours and sorted(loaded.model) == ["hash.fc.weight", "vtp.x"]


@pytest.mark.parametrize("old_format", [False, True])
def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_format: bool) -> None:
    monkeypatch.chdir(tmp_path)
    if old_format:
        Path("evil.pt").write_bytes(pickle.dumps({"w": Evil()}))
    else:
        torch.save({"w": Evil()}, "evil.pt")
    with pytest.raises(UserError, match="evil.pt") as error:
        load(Path("evil.pt"))
    assert not Path("evil-was-here").exists()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_files_are_named(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "cut.pt"
    save(path, {"step": 1}, {"w": torch.randn(1000)})
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 or keep == 0 else len(content) * keep)])
    with pytest.raises(UserError, match="cut.pt"):
        load(path)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "flip.pt"
    save(path, {}, {"w": torch.zeros(100_000)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load(path)


@pytest.mark.parametrize("what", ["bomb", "expanded", "sparse", "meta", "laughs", "deep", "pipe"])
def test_files_that_claim_more_than_they_hold(tmp_path: Path, what: str) -> None:
    path = tmp_path / "file.pt"
    small = torch.ones(4)
    contents: dict[str, object] = {
        "expanded": {"w": small[:1].expand(10**9)},
        "sparse": {"w": torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), [1.0], (10**9,))},
        "meta": {"w": torch.empty(10**9, device="meta")},
    }
    if what == "pipe":
        os.mkfifo(path)
    elif what in ("laughs", "deep"):
        node: dict[str, object] = {"w": small}
        for _ in range(100 if what == "deep" else 40):
            node = {"a": node} if what == "deep" else {"a": node, "b": node}
        torch.save(node, path)
    else:
        torch.save(contents.get(what, {"w": torch.zeros(50_000_000)}), path)
    if what == "bomb":  # the same entries, compressed: 200 MB in 0.2 MB
        with (
            zipfile.ZipFile(path) as stored,
            zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed,
        ):
            for entry in stored.namelist():
                packed.writestr(entry, stored.read(entry))
        path = tmp_path / "bomb.pt"
    with pytest.raises(UserError, match=r"(file|bomb)\.pt") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_what_scripts_put_around_a_model_is_stripped() -> None:
    w, m = torch.ones(1), torch.zeros(1)
    file = {"epoch": m, "optimizer.state.0.exp_avg": m, "model.module._orig_mod.head._orig_mod.w": w, "ema.head.w": m}
    inside = unwrapped(file)
    assert list(inside) == ["", "model.", "model.module.", "model.module._orig_mod."]
    assert inside["model.module._orig_mod."] == {"head.w": w}
    assert list(unwrapped({"head.model.w": w})) == [""]  # a word inside of a name is the model's own


def test_missing_and_empty_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there"):
        load(tmp_path / "no.pt")
    torch.save({"epoch": 3}, tmp_path / "plain.pt")
    with pytest.raises(UserError, match="no tensors"):
        load(tmp_path / "plain.pt")
    with pytest.raises(UserError, match="no regular file"):
        load(tmp_path)


def test_newest_are_kept_and_damage_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert kept.newest() is None
    for step in (1, 2, 10):
        kept.save(step, {"step": step}, {"w": torch.full((3,), float(step))}, {"main": {"state": {}}})
    assert [path.name for path in kept.paths()] == ["step-00000002.pt", "step-00000010.pt"]
    newest = kept.newest()
    assert newest is not None and newest.meta["step"] == 10
    kept.paths()[-1].write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        newest = kept.newest()
    assert newest is not None and newest.meta["step"] == 2
    assert "step-00000010.pt" in caplog.text


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_one_that_was_passed_over_does_not_push_out_good_ones(keep: int, tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep)
    for step in (6, 8):
        kept.save(step, {"step": step}, {"w": torch.zeros(3)}, {"main": {"state": {}}})
    kept.path_of(8).write_bytes(b"half")
    kept.save(7, {"step": 7}, {"w": torch.zeros(3)}, {"main": {"state": {}}})
    assert kept.paths() == [kept.path_of(6), kept.path_of(7)][-keep:]


def test_if_all_are_damaged_nothing_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = Checkpoints(tmp_path, keep=2)
    for step in (6, 8):
        kept.save(step, {"step": step}, {"w": torch.zeros(3)}, {"main": {"state": {}}})
        kept.path_of(step).write_bytes(b"")
    with pytest.raises(UserError, match=r"step-00000006\.pt: .*the last of 2 in .* remove the folder of the run"):
        kept.newest()
    assert "step-00000008.pt" in caplog.text


@pytest.mark.parametrize(
    "part",
    [
        {"meta": None},
        {"meta": "{"},
        {"meta": "[]"},
        {"meta": '{"config": 3}'},
        {"model": 3},
        {"model": {3: torch.ones(1)}},
        {"optimizers": 3},
    ],
)
def test_own_files_with_a_part_missing_are_named(tmp_path: Path, part: dict[str, object]) -> None:
    kept = Checkpoints(tmp_path, keep=2)
    kept.save(1, {}, {"w": torch.zeros(1)}, {})
    content = {"format": FORMAT, "meta": "{}", "model": {}, "optimizers": {}, **part}
    torch.save({key: value for key, value in content.items() if value is not None}, kept.path_of(2))
    with pytest.raises(UserError, match=r"step-00000002\.pt was not written whole"):
        load(kept.path_of(2))
    newest = kept.newest()
    assert newest is not None and newest.path == kept.path_of(1)


def test_files_of_other_names_are_left_alone(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=1)
    path = kept.save(1, {}, {"w": torch.zeros(1)}, {})
    copy = tmp_path / "step-00000001 (copy).pt"
    copy.write_bytes(path.read_bytes())
    assert kept.paths() == [path]
    kept.save(2, {}, {"w": torch.zeros(1)}, {})
    assert sorted(tmp_path.iterdir()) == [copy, kept.path_of(2)]


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.pt cannot be written: No such file"):
        save(tmp_path / "no" / "a.pt", {}, {"w": torch.zeros(1)})


def test_a_run_whose_folder_is_gone_does_not_go_on_in_another(tmp_path: Path) -> None:
    """Which would hold a part of its files, and which its lock would not keep."""
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", 1)
    with pytest.raises(UserError, match=r"cannot be written to .*/run/checkpoints: No such file .*--resume"):
        checkpoints.save(1, {}, {}, {})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be written to .*/run/checkpoints: Not a directory"):
        checkpoints.save(1, {}, {}, {})


def test_every_differing_key_is_listed() -> None:
    require_same({"a.b": 1, "c.d": [2]}, {"a.b": 1, "c.d": [2]}, "x.pt")
    with pytest.raises(UserError) as error:
        require_same({"a.b": 1, "c.d": 2, "e.f": 0}, {"a.b": 3, "c.d": 2, "g.h": 5}, "x.pt")
    assert all(part in str(error.value) for part in ("a.b: 3 there, 1 now", "e.f: '(absent)' there", "g.h: 5 there"))
    assert "c.d" not in str(error.value)


def write_checkpoints(folder: Path) -> None:
    """Until killed; the file `written` has a byte for each that is there.

    It never waits for the disk: a killed process, unlike a power failure, loses nothing that was written.
    """
    os.fsync = lambda _: None  # type: ignore[assignment]
    kept = Checkpoints(folder / "checkpoints", keep=2)
    with (folder / "written").open("ab", buffering=0) as written:
        for step in itertools.count(1):
            kept.save(step, {"step": step}, {"w": torch.full((200_000,), float(step))}, {"main": {}})
            written.write(b".")


def test_a_writer_killed_at_any_moment_leaves_a_whole_newest(tmp_path: Path) -> None:
    folder, written = tmp_path / "checkpoints", tmp_path / "written"
    for delay in (0.0, 0.003, 0.007, 0.011, 0.018):
        written.write_bytes(b"")
        process = Forked(write_checkpoints, tmp_path)
        while written.stat().st_size < 3:
            assert process.poll() is None
            time.sleep(0.001)
        last = written.stat().st_size
        time.sleep(delay)
        process.kill()
        process.join()
        newest = Checkpoints(folder, keep=2).newest()
        assert newest is not None and newest.meta["step"] >= last
        assert torch.equal(newest.model["w"], torch.full((200_000,), float(newest.meta["step"])))
        for path in folder.glob("step-*.pt"):
            path.unlink()
