"""Making an index and keeping it up to date: what is new or changed is encoded, what has vanished is dropped.

An index holds what its inputs name, no more. Work is made durable every `search.save_every` rows, so that a process
killed at any moment leaves a whole index, and the next one goes on where it stood.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from common import checkpoint
from common.codes import Codes
from common.config import load_section
from common.errors import UserError
from common.places import ROOT
from runners.encoder import Encoder
from runners.search.engine import KINDS, Header, Kind
from runners.search.index import HEADER, SETTINGS, Entry, Index
from runners.search.inputs import Input, PictureFile, Thing, open_input
from runners.search.settings import SearchConfig
from utils.files import write_json, write_text
from utils.progress import progress

logger = logging.getLogger(__name__)
MODEL, INPUTS, SKIPPED = "model.pt", "inputs.json", "skipped.txt"
DEFAULTS = ROOT / "configs/search.yaml"
_NAMED = 10  # things named that could not be read; the file has all


@dataclass
class Summary:
    """What an indexing did.

    Attributes:
        encoded: Pictures and texts encoded.
        kept: Those that were there already.
        removed: Those dropped, because they have vanished.
        skipped: Why some could not be read.
    """

    encoded: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    kept: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    removed: int = 0
    skipped: list[str] = field(default_factory=list)


def build_index(
    source: Path, inputs: Sequence[str], folder: Path, overrides: Sequence[str] = (), device: str = "auto"
) -> tuple[Index, Summary]:
    """Makes an index of what some inputs name, or brings one up to date.

    Args:
        source: The checkpoint whose model encodes.
        inputs: Folders, patterns, files, `dataset:NAME`.
        folder: The index's folder.
        overrides: Entries `search.key=value` and `dataset.key=value`.
        device: Where to encode.

    Returns:
        The index, open for reading, and what was done.

    Raises:
        UserError: If an input cannot be read or holds nothing, the index is another model's or another process is
            changing it, or files cannot be written.
    """
    encoder = Encoder.load(source, device=device)
    for_search = [entry for entry in overrides if not entry.startswith("dataset.")]
    for_data = [entry for entry in overrides if entry.startswith("dataset.")]
    opened = [open_input(text, encoder, for_data) for text in inputs]
    count = 0
    for thing in itertools.chain.from_iterable(source.things() for source in opened):
        encoder.reads(thing.kind, thing.item)  # to the end, so that what is wrong is found before anything is written
        count += 1
    if not count:
        raise UserError(f"{', '.join(inputs)}: there are no pictures and no texts; name another --input")
    with _open(folder, encoder, for_search) as index:
        if index.config.batch_size is not None:
            encoder.batch_size = index.config.batch_size
        names = _checked_names(folder, opened)
        _keep_model(folder, encoder)
        write_json(folder / INPUTS, names)
        index.save()  # of a new index: before the first row, so that whose codes these are is known whenever it ends
        summary = _Update(index, encoder, opened).run()
        write_text(folder / SKIPPED, "".join(f"{line}\n" for line in summary.skipped))
    return Index.open(folder), summary


def _open(folder: Path, encoder: Encoder, overrides: list[str]) -> Index:
    """The index for writing: the one that lies there, if it is this model's, or a new one."""
    if (folder / HEADER).exists():
        index = Index.open(folder, writable=True, overrides=overrides)
        if index.header.fingerprint != encoder.fingerprint:
            index.close()
            raise UserError(
                f"index {folder} holds codes of {index.header.model}, not of {encoder.name}; name that checkpoint, or "
                "another --save-dir"
            )
        return index
    config = load_section(DEFAULTS, "search", SearchConfig, overrides)
    ours = {MODEL, INPUTS, SETTINGS, SKIPPED}
    if folder.is_dir():
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        others = sorted(name for name in names - ours if not name.startswith(("catalog.sqlite", "codes.")))
        if others:
            raise UserError(f"{folder} holds {others[0]!r}, so it is no folder for an index; name another --save-dir")
    shape = encoder.code_shape
    header = Header(
        engine=config.engine,
        bits=encoder.bits,
        codes_per_item=1 if len(shape) == 1 else shape[0],
        fingerprint=encoder.fingerprint,
        model=encoder.name,
    )
    index = Index(folder, header, config, writable=True)
    if len(index):
        index.close()
        raise UserError(
            f"there are rows of another index where those of {folder} would go ({config.engine}, collection "
            f"{config.collection}), or {HEADER} was removed; name another search.collection and --save-dir"
        )
    return index


def _checked_names(folder: Path, inputs: Sequence[Input]) -> list[str]:
    """Names of the inputs; one that was named before must be again, since what it holds would be dropped."""
    names = [source.name for source in inputs]
    if not (folder / HEADER).exists():
        return names
    try:
        before = json.loads((folder / INPUTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return names
    left_out = [name for name in before if name not in names] if isinstance(before, list) else []
    if left_out:
        raise UserError(
            f"index {folder} was made from {left_out[0]}, which is not named now, so that all of it would be dropped; "
            "name it, too, or another --save-dir"
        )
    return names


def _keep_model(folder: Path, encoder: Encoder) -> None:
    """Puts the model beside its codes, so that the index can be searched wherever it is taken."""
    path = folder / MODEL
    if path.exists() and (folder / HEADER).exists():
        return
    loaded = checkpoint.load(encoder.path)
    checkpoint.save(path, loaded.meta, loaded.model)


class _Update:
    """One run over the inputs.

    Args:
        index: The index, open for writing.
        encoder: Makes the codes.
        inputs: What is indexed.
    """

    def __init__(self, index: Index, encoder: Encoder, inputs: Sequence[Input]) -> None:
        self.index = index
        self.encoder = encoder
        self.inputs = inputs
        self.summary = Summary()
        self.known = {(kind, key): (number, stamp) for number, kind, key, stamp in index.listing()}
        self.next = max((number for number, _ in self.known.values()), default=-1) + 1

    def run(self) -> Summary:
        """Brings the index up to date."""
        present, due = self._look()
        for kind in KINDS:
            self._encode(kind, due[kind])
        vanished = [number for (key, (number, _)) in self.known.items() if key not in present]
        self.index.remove(vanished)
        self.summary.removed = len(vanished)
        self.index.save()
        return self.summary

    def _look(self) -> tuple[set[tuple[Kind, str]], dict[Kind, int]]:
        """What the inputs name, and how much of it must be encoded."""
        present: set[tuple[Kind, str]] = set()
        due = dict.fromkeys(KINDS, 0)
        for thing in self._things(present):
            if self._is_due(thing, self._stamp(thing)):
                due[thing.kind] += 1
            else:
                self.summary.kept[thing.kind] += 1
        return present, due

    def _things(self, seen: set[tuple[Kind, str]], kind: Kind | None = None) -> Iterator[Thing]:
        """Everything that the inputs name, once; of one kind if asked for."""
        for source in self.inputs:
            for thing in source.things():
                name = (thing.kind, thing.key)
                if (kind is None or thing.kind == kind) and name not in seen:
                    seen.add(name)
                    yield thing

    def _is_due(self, thing: Thing, stamp: str) -> bool:
        known = self.known.get((thing.kind, thing.key))
        return known is None or known[1] != stamp

    def _stamp(self, thing: Thing) -> str:
        """State of all that the thing is encoded from, and of what is shown with it."""
        digest = hashlib.sha256(json.dumps(thing.metadata, sort_keys=True).encode())
        for name in sorted(self.encoder.reads(thing.kind, thing.item)):
            value = thing.item[name]
            state = value.stamp if isinstance(value, PictureFile) else value
            digest.update(f"\0{name}\0".encode())
            digest.update(state.numpy().tobytes() if isinstance(state, torch.Tensor) else str(state).encode())
        return digest.hexdigest()[:32]

    def _encode(self, kind: Kind, count: int) -> None:
        """Encodes what is new or changed of a kind; every `save_every` rows become durable together."""
        if not count:
            return
        stamped = ((thing, self._stamp(thing)) for thing in self._things(set(), kind))  # the state before it is read
        due, items = itertools.tee(pair for pair in stamped if self._is_due(*pair))
        stream = self.encoder.stream(kind, (thing.item for thing, _ in items))
        codes: list[npt.NDArray[np.int8]] = []
        entries: list[Entry] = []
        with progress(total=count, desc=f"index {kind}s", unit=kind) as bar:
            for (thing, stamp), code in zip(due, stream, strict=True):
                bar.update()
                if isinstance(code, UserError):
                    self._skip(thing, code)
                    continue
                entries.append(Entry(kind, thing.key, stamp, _shown(thing)))
                codes.append(code)
                if len(codes) == self.index.config.save_every:
                    self._store(entries, codes)
                    entries, codes = [], []
            if codes:
                self._store(entries, codes)

    def _skip(self, thing: Thing, error: UserError) -> None:
        """Passes over what cannot be read; a code of what it was before goes."""
        self.summary.skipped.append(str(error))
        if len(self.summary.skipped) <= _NAMED:
            logger.warning("skipped: %s", error)
        known = self.known.pop((thing.kind, thing.key), None)
        if known is not None:
            self.index.remove([known[0]])

    def _store(self, entries: Sequence[Entry], codes: Sequence[npt.NDArray[np.int8]]) -> None:
        """Replaces rows of the same keys, or adds new ones."""
        names = [(entry.kind, entry.key) for entry in entries]
        self.index.remove([self.known[name][0] for name in names if name in self.known])
        numbers = range(self.next, self.next + len(entries))
        self.index.add(numbers, Codes(np.stack(codes)), entries)
        self.index.save()
        self.next += len(entries)
        self.summary.encoded[entries[0].kind] += len(entries)
        self.known.update(
            (name, (number, entry.stamp)) for name, number, entry in zip(names, numbers, entries, strict=True)
        )


def _shown(thing: Thing) -> dict[str, object]:
    """The metadata of a thing, with what reading its picture told."""
    picture = thing.item.get("image")
    if thing.kind != "image" or not isinstance(picture, PictureFile) or picture.size is None:
        return thing.metadata
    width, height = picture.size
    return {**thing.metadata, "width": width, "height": height}
