"""`--score`: files as libraries of this field write them, the run's own numbers again, and what cannot be scored."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io

from common.errors import UserError
from runners.scoring import read_code_file
from tests.commands import refused, run

Q, D, BITS, C = 7, 40, 16, 4
Arrays = dict[str, Any]


def arrays(several: int = 0, seed: int = 0) -> Arrays:
    """Codes that carry the labels, under our names."""
    draw = np.random.default_rng(seed)
    labels = {side: draw.random((n, C)) < 0.4 for side, n in (("q", Q), ("r", D))}
    for rows in labels.values():
        rows[:, 0] |= ~rows.any(1)
    plane = draw.standard_normal((C, BITS))
    found: Arrays = {f"{side}_l": value.astype(np.int8) for side, value in labels.items()}
    for side, value in labels.items():
        for modality in ("img", "txt"):
            shape = (len(value), several, BITS) if several else (len(value), BITS)
            noisy = (value @ plane).reshape(len(value), *([1] if several else []), BITS) + draw.standard_normal(shape)
            found[f"{side}_{modality}"] = np.where(noisy > 0, 1, -1).astype(np.int8)
    return found


def score(path: Path, *settings: str) -> Arrays:
    """What `--score` found, from its file."""
    code, out, err = run("--score", path, *settings)
    assert code == 0, err
    results: Arrays = json.loads((path.parent / f"score-{path.stem}.json").read_text())
    assert f"written to {path.parent / f'score-{path.stem}.json'}" in out
    for bits, numbers in results["reports"].items():
        assert all(f"{value:.4f}" in out for name, value in numbers.items() if "mAP" in name), bits
    return results


def write_v73(path: Path, contents: Arrays) -> None:
    """As MATLAB stores arrays in HDF5: dimensions turned around."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, value in contents.items():
            file[name] = np.asarray(value, dtype=np.float64).T
            file[name].attrs["MATLAB_class"] = np.bytes_("double")


PEERS = {"q_img": "qBX", "q_txt": "qBY", "r_img": "rBX", "r_txt": "rBY", "q_l": "query_L", "r_l": "retrieval_L"}


@pytest.mark.parametrize("several", [0, 3])
def test_every_form_of_a_file_has_the_same_numbers(several: int, tmp_path: Path) -> None:
    ours = arrays(several)
    np.savez(tmp_path / "ours.npz", **ours)
    scipy.io.savemat(tmp_path / "peers.mat", {PEERS[name]: value.astype(np.float64) for name, value in ours.items()})
    zeros = {name: value if name.endswith("_l") else (value + 1) // 2 for name, value in ours.items()}
    write_v73(tmp_path / "zeros.mat", zeros)
    draw = np.random.default_rng(1)
    real = {n: v * 2 - 1 if n.endswith("_l") else v * draw.uniform(0.1, 2, v.shape) for n, v in ours.items()}
    np.savez(tmp_path / "real.npz", **real)
    files = {name: score(tmp_path / name) for name in ("ours.npz", "peers.mat", "zeros.mat", "real.npz")}
    reports = [found["reports"] for found in files.values()]
    assert all(report == reports[0] for report in reports)
    assert reports[0][str(BITS)].keys() >= {
        f"{way}/mAP@{name}"
        for way in ("i2t", "t2i", "i2i", "t2t")
        for name in ("all", "all(expected)", "50", "50(top)", "50(expected)")
    }
    assert files["ours.npz"]["codes_per_item"] == max(several, 1)
    assert not any("read as" in remark for remark in files["ours.npz"]["remarks"])
    assert any("0 is read as -1" in remark for remark in files["zeros.mat"]["remarks"])
    assert any("real values" in remark for remark in files["real.npz"]["remarks"])


def test_each_array_may_be_of_another_kind(tmp_path: Path) -> None:
    ours = arrays()
    np.savez(tmp_path / "ours.npz", **ours)
    np.savez(tmp_path / "mixed.npz", **(ours | {name: (ours[name] + 1) // 2 for name in ("r_img", "r_txt")}))
    expected, found = score(tmp_path / "ours.npz"), score(tmp_path / "mixed.npz")
    assert found["reports"] == expected["reports"]
    assert "database image and database text codes are 0 and 1; 0 is read as -1" in found["remarks"]


def test_one_query_is_not_said_to_have_constant_bits(tmp_path: Path) -> None:
    ours = arrays()
    np.savez(tmp_path / "one.npz", **(ours | {name: ours[name][:1] for name in ("q_img", "q_txt", "q_l")}))
    assert not any("one sign" in remark for remark in score(tmp_path / "one.npz")["remarks"])


def test_one_direction_and_class_numbers(tmp_path: Path) -> None:
    ours = arrays()
    numbers = [(np.arange(n) % 5 if n == D else np.arange(n) % 3 + 2).reshape(1, -1) for n in (Q, D)]
    scipy.io.savemat(
        tmp_path / "one.mat",
        {"qB": ours["q_img"], "rB": ours["r_txt"], "query_L": numbers[0], "retrieval_L": numbers[1]},
    )
    multi_hot = [np.eye(5)[n[0]] for n in numbers]
    np.savez(tmp_path / "two.npz", q_img=ours["q_img"], r_txt=ours["r_txt"], q_l=multi_hot[0], r_l=multi_hot[1])
    one, two = (score(tmp_path / name)["reports"]["16"] for name in ("one.mat", "two.npz"))
    assert {name.partition("/")[2]: value for name, value in one.items()} == {
        name.partition("/")[2]: value for name, value in two.items()
    }
    assert one.keys() != two.keys() and all(name.startswith("i2t/") for name in two)


def test_codes_side_by_side_and_settings(tmp_path: Path) -> None:
    ours = arrays()
    np.savez(tmp_path / "both.npz", **ours, lengths=np.array([12, 4]))
    np.savez(tmp_path / "first.npz", **{n: v if n.endswith("_l") else v[:, :12] for n, v in ours.items()})
    both, first = score(tmp_path / "both.npz"), score(tmp_path / "first.npz", "score.cutoffs=[all]")
    assert list(both["reports"]) == ["12", "4"]
    assert both["reports"]["12"].items() >= first["reports"]["12"].items()
    assert list(score(tmp_path / "both.npz", "score.bits=[16]")["reports"]) == ["16"]
    line = refused("--score", tmp_path / "both.npz", "score.bits=[8]")
    assert "score.bits: lengths [8]" in line and "16 columns" in line


def test_what_makes_numbers_incomparable_is_said(tmp_path: Path) -> None:
    ours = arrays()
    for name in ("q_img", "q_txt", "q_l"):
        other = f"r{name[1:]}"
        ours[other][:2], ours[other][2] = ours[name][:2], ours[name][1]  # two queries in the database, one twice
    ours["r_txt"][:, 3] = 1
    ours["q_txt"][:, 3] = 1
    ours["q_l"][4:] = 0
    np.savez(tmp_path / "odd.npz", **ours)
    remarks = " | ".join(score(tmp_path / "odd.npz")["remarks"])
    assert "1 of 16 bits of the database text codes have one sign for all 40 items" in remarks
    assert "2 of 7 queries equal a database item" in remarks
    assert "1 of 40 database items equal an earlier one" in remarks
    assert "3 of 7 queries share no label" in remarks


def without(name: str) -> Arrays:
    return {key: value for key, value in arrays().items() if key != name}


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (without("r_l"), "lacks database labels, it has"),
        ({k: v for k, v in arrays().items() if k[0] == "q"} | {"r_l": arrays()["r_l"]}, "lacks codes of queries and"),
        ({**arrays(), "r_txt": arrays()["r_txt"][:, :8]}, "codes of 8 bits, but .* of 16"),
        ({**arrays(), "r_txt": arrays()["r_txt"][1:]}, "have .39, 40. rows"),
        ({**arrays(), "q_l": arrays()["q_l"][1:]}, "there are codes of 7 items"),
        ({**arrays(), "q_l": arrays()["q_l"][:, 1:]}, "both must be of the same classes"),
        ({**arrays(), "q_img": np.full((Q, BITS), np.nan)}, "not finite"),
        ({**arrays(), "q_img": np.full((Q, BITS), 200, np.uint8)}, "packed into bytes"),
        ({**arrays(), "q_img": np.ones(Q)}, r"write \[items, bits\]"),
        ({**arrays(), "q_img": np.array(["a"] * Q)}, "holds no numbers"),
        ({**arrays(), "q_l": np.full((Q, C), 7)}, "is 7"),
        (
            {**arrays(), "q_l": np.eye(C, dtype=np.int8)[[0] * Q], "r_l": np.eye(C, dtype=np.int8)[[1] * D]},
            "no query shares",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(contents: Arrays, said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "codes.npz", **contents)
    line = refused("--score", tmp_path / "codes.npz")
    assert re.search(said, line), line
    assert not (tmp_path / "score-codes.json").exists()


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    assert "is missing" in refused("--score", tmp_path / "no.npz")
    (tmp_path / "text.npz").write_text("codes")
    assert "cannot be read as a .npz file" in refused("--score", tmp_path / "text.npz")
    np.savez(tmp_path / "objects.npz", q_img=np.array([{}], dtype=object), r_img=np.ones((2, 4)), q_l=[1], r_l=[1])
    assert "cannot be read" in refused("--score", tmp_path / "objects.npz")


def test_archives_that_claim_more_than_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that names 10^10 rows, and an array that unpacks to a thousand times its size."""
    path = tmp_path / "claims.npz"
    np.savez(path, **arrays())
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    grown = b"(10000000000, 16)"
    parts["q_img.npy"] = parts["q_img.npy"].replace(b"(7, 16), }" + b" " * 10, grown + b", }")
    assert grown in parts["q_img.npy"]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="decompression bomb"):
        read_code_file(path)
    monkeypatch.setattr("dataset.mat_bounds.FLOOR", 2**16)
    np.savez_compressed(tmp_path / "bomb.npz", **{**arrays(), "q_img": np.ones((3, 1_000_000), np.int8)})
    with pytest.raises(UserError, match="decompression bomb"):
        read_code_file(tmp_path / "bomb.npz")
