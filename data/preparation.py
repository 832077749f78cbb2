"""What the preparation scripts of the benchmark data sets share: from a list of pairs to checked files.

A script reads the official annotation files and hands `Pairs` to `prepare`, which goes through every picture, refuses
or leaves out what is missing or broken, writes `index.mat`, `caption.mat`, `label.mat` and `labels.txt`, and states
what it found beside the known figures. `run` is a script's command line, `prepare` its work.
"""

import argparse
import logging
import os
import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from data.command_line import named_path, run_script
from data.mat_files import clean_text, made_here, string_cells, string_rows, write_set
from data.source_files import Picture, scan_pictures
from utils.arguments import Parser
from utils.files import claimed, is_utf8, write_text
from utils.output import say

log = logging.getLogger(__name__)

MATS = ("index.mat", "caption.mat", "label.mat")
REPORT = "check.txt"
SHOWN = 10  # missing or broken pictures named on the terminal; the report names all


@dataclass(frozen=True)
class Protocol:
    """One way in which papers select pairs from a data set.

    Attributes:
        rule: Which pairs, with which text, in one line.
        papers: Who reports on it.
        known: Published figures: name of a `Pairs.facts` entry, "pairs" or "labels" to its value.
    """

    rule: str
    papers: str
    known: Mapping[str, int]


@dataclass(frozen=True)
class Pairs:
    """Pairs as the annotation files give them, in the order in which they are written.

    Attributes:
        images: N picture files, relative to the source folder, with forward slashes.
        captions: The texts of every pair; empty where there is none.
        labels: [N, C] bool, multi-hot.
        classes: C names of labels, in column order.
        facts: Further counts for the report, by name.
        padded: Captions as one string array [N, 1], as this data set is distributed, not as a cell array; every
            pair has exactly one.
    """

    images: Sequence[str]
    captions: Sequence[Sequence[str]]
    labels: npt.NDArray[np.bool_]
    classes: Sequence[str]
    facts: Mapping[str, int] = field(default_factory=dict)
    padded: bool = False

    def only(self, kept: npt.NDArray[np.bool_]) -> "Pairs":
        """The pairs at which `kept` [N] is True."""
        rows = [int(row) for row in np.flatnonzero(kept)]
        images, captions = [self.images[row] for row in rows], [self.captions[row] for row in rows]
        return Pairs(images, captions, self.labels[rows], self.classes, self.facts, self.padded)


def prepare(title: str, protocol: Protocol, pairs: Pairs, source: Path, root: Path, skip_broken: bool) -> None:
    """Checks the pictures, writes the files of the data set, and reports.

    Args:
        title: Heading of the report.
        protocol: What is known about these pairs.
        pairs: What to write.
        source: Folder that the pictures' names start from.
        root: Folder to write to; it exists.
        skip_broken: Leave out pairs whose picture is missing or broken; otherwise they stop the preparation.

    Raises:
        UserError: If there are no pairs, names cannot stand in the files, pictures are missing or broken, or something
            cannot be written. But for the report, the files of an earlier preparation are then untouched.
    """
    if not pairs.images:
        raise UserError(f"{source}: no pair has a label and, where the protocol asks for them, tags; unpack it again")
    _require_writable(source, pairs)
    _require_room(root, pairs)
    pictures = scan_pictures(source, pairs.images, root)
    whole = np.array([_is_whole(pictures[image]) for image in pairs.images], dtype=np.bool_)
    kept = pairs.only(whole)
    report, summary = make_report(title, protocol, pairs, kept, pictures)
    if not whole.all() and not (skip_broken and whole.any()):
        write_text(root / REPORT, report)
        say(summary)
        raise UserError(
            f"{source}: {np.count_nonzero(~whole):,} of {len(whole):,} pictures are missing or broken, named in "
            f"{root / REPORT}; unpack them again, or leave these pairs out with --skip-broken"
        )
    _link_pictures(source, root, kept.images)
    captions = string_rows([item[0] for item in kept.captions])[:, None] if kept.padded else string_cells(kept.captions)
    index, caption, label = (root / name for name in MATS)
    write_set(
        {
            index: {"index": string_rows(kept.images)},
            caption: {"caption": captions},
            label: {"category": kept.labels.astype(np.int64)},
            root / "labels.txt": "".join(f"{name}\n" for name in kept.classes),
            root / REPORT: report,
        }
    )
    say(summary)
    log.info("%s: index.mat, caption.mat, label.mat, labels.txt and %s are written", root, REPORT)


def make_report(
    title: str, protocol: Protocol, pairs: Pairs, kept: Pairs, pictures: Mapping[str, Picture | None]
) -> tuple[str, str]:
    """States what was found, beside the known figures.

    Args:
        title: Heading.
        protocol: Known figures.
        pairs: All pairs of the protocol.
        kept: Those that have a picture.
        pictures: By name.

    Returns:
        The whole report, and a form for the terminal with at most a few pictures named.
    """
    seen = [picture for image in kept.images if (picture := pictures[image]) is not None]
    missing = [image for image in pairs.images if pictures[image] is None]
    broken = [f"{image} ({picture.fault})" for image in pairs.images if (picture := pictures[image]) and picture.fault]
    words = [len(text.split()) for item in kept.captions for text in item]
    a_pair, items = kept.labels.sum(axis=1), kept.labels.sum(axis=0)
    counts = {"pairs": len(kept.images), "labels": len(kept.classes), **kept.facts}
    rows = [("", "found", "known")]
    for name, count in counts.items():
        known = protocol.known.get(name)
        verdict = "" if known is None else f"{known:,}" + ("" if known == count else "   <- differs")
        rows.append((name, f"{count:,}", verdict))
    rows += [
        ("labels without items", f"{np.count_nonzero(items == 0):,}", ""),
        ("labels a pair", _spread(a_pair), ""),
        ("captions a pair", _spread([len(item) for item in kept.captions]), ""),
        ("words a caption", _spread(words), ""),
        ("pairs without text", f"{sum(not any(item) for item in kept.captions):,}", ""),
        ("pictures missing", f"{len(missing):,}", ""),
        ("pictures broken", f"{len(broken):,}", ""),
        ("pictures listed twice", f"{len(kept.images) - len(set(kept.images)):,}", ""),
        ("pictures with equal bytes", f"{len(set(kept.images)) - len({p.digest for p in seen}):,}", ""),
        ("picture modes", ", ".join(f"{mode} {n:,}" for mode, n in sorted(Counter(p.mode for p in seen).items())), ""),
        ("picture widths", _spread([p.width for p in seen]), ""),
        ("picture heights", _spread([p.height for p in seen]), ""),
    ]
    table = "\n".join(f"{name:<28}{found:<18}{known}".rstrip() for name, found, known in rows)
    labels = "; ".join(f"{name} {count:,}" for name, count in zip(kept.classes, items, strict=True))
    histogram = textwrap.fill(f"items of every label: {labels}", 118, subsequent_indent="  ")
    head = f"{title}: {protocol.rule}\nreported by {protocol.papers}\n\n{table}\n\n{histogram}\n"
    lists = (("missing pictures", missing), ("broken pictures", broken))
    return head + _listing(lists, None), head + _listing(lists, SHOWN)


def run(
    name: str,
    title: str,
    protocols: Mapping[str, Protocol],
    collect: Callable[[Path, str], Pairs],
    arguments: Sequence[str] | None = None,
) -> int:
    """The command line of a preparation script: a user's mistake is one line and exit code 2.

    Args:
        name: Name of the data set; its default output folder is `data/<name>`.
        title: Its name for people.
        protocols: By name; the first is the default.
        collect: Reads the annotation files: (source folder, protocol) to pairs.
        arguments: Of the command line; None takes those of the process.

    Returns:
        Exit code.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = Parser(
        description=f"Prepares {title} from its official archives (data/README.md says where they are).",
        epilog="protocols: " + "; ".join(f"{key}: {value.rule} ({value.papers})" for key, value in protocols.items()),
    )
    parser.add_argument("--source", type=named_path, required=True, help="folder in which the archives are unpacked")
    parser.add_argument("--root", type=named_path, default=Path("data") / name, help="folder to write to (%(default)s)")
    parser.add_argument(
        "--protocol",
        choices=list(protocols),
        default=next(iter(protocols)),
        help="which pairs (%(default)s); see below",
    )
    parser.add_argument("--skip-broken", action="store_true", help="leave out pairs whose picture is missing or broken")

    def prepare_set(options: argparse.Namespace) -> None:
        if not options.source.is_dir():
            raise UserError(f"--source {options.source}: no such folder; unpack the archives of {title} there")
        if not os.access(options.source, os.R_OK | os.X_OK, effective_ids=True):
            raise UserError(f"--source {options.source}: may not be read; allow it")
        with claimed(options.root, "--root"):
            _require_own(options.root)
            pairs = collect(options.source, options.protocol)
            heading = f"{title}, protocol {options.protocol}"
            protocol = protocols[options.protocol]
            prepare(heading, protocol, pairs, options.source, options.root, options.skip_broken)

    return run_script(parser, prepare_set, arguments)


def _is_whole(picture: Picture | None) -> bool:
    return picture is not None and not picture.fault


def _require_own(root: Path) -> None:
    """Refuses a folder with files of others, such as those that authors pass on, which would be replaced."""
    for name in MATS:
        path = root / name
        if path.exists() and not made_here(path):
            raise UserError(f"{path}: was not made by this script; move it away, or choose another --root")


def _require_writable(source: Path, pairs: Pairs) -> None:
    """Refuses names that the files cannot hold as they are, so that nobody could find the pictures again."""
    for what, names in (("picture", pairs.images), ("label", pairs.classes)):
        for name in names:
            if clean_text(name) != name or not is_utf8(name) or ".." in name.split("/"):
                raise UserError(
                    f"{source}: {what} {name!r} cannot stand in the files as it is: no '..', no line breaks, blanks "
                    "only one at a time, nothing but UTF-8; rename it"
                )


def _require_room(root: Path, pairs: Pairs) -> None:
    """Refuses to start on a disk that cannot take the files, an upper bound as they are compressed."""
    texts = sum(len(text) for item in pairs.captions for text in item) + sum(len(image) for image in pairs.images)
    need = texts + pairs.labels.size + 256 * len(pairs.images)  # 256: a cell's header, a line of the journal
    free = shutil.disk_usage(root).free
    if free < need:
        raise UserError(
            f"--root {root}: about {need / 2**20:,.1f} MiB are needed and {free / 2**20:,.1f} MiB are free; "
            "free some room or choose another --root"
        )


def _link_pictures(source: Path, root: Path, images: Sequence[str]) -> None:
    """Makes the pictures' names valid from the output folder too, so that no path needs to be edited or configured."""
    for top in sorted({image.split("/", 1)[0] for image in images}):
        target, link = (source / top).resolve(), root / top
        if link.exists() and link.resolve() == target:
            continue
        if link.exists() and not link.is_symlink():
            raise UserError(f"{link}: is in the way of a link to {target}; remove it, or choose another --root")
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(target)
        except OSError:
            log.warning("%s: no link to %s can be made here; train with dataset.image_root=%s", root, top, source)
            return


def _spread(values: Sequence[int] | npt.NDArray[np.int_]) -> str:
    numbers = np.asarray(values)
    if not numbers.size:
        return "none"
    return f"{numbers.mean():,.2f} ({numbers.min():,} to {numbers.max():,})"


def _listing(lists: Iterable[tuple[str, Sequence[str]]], limit: int | None) -> str:
    text = ""
    for heading, names in lists:
        if names:
            shown = names if limit is None else names[:limit]
            more = [f"... and {len(names) - len(shown):,} more in {REPORT}"] if len(shown) < len(names) else []
            text += f"\n{heading}:\n" + "".join(f"  {name}\n" for name in [*shown, *more])
    return text
