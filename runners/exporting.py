"""A trained method as ONNX: a network of pictures, one of texts, and a description that says how to feed them."""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.types import Batch
from dataset.pictures.transforms import MEAN, STD
from runners.encoder import Encoder
from runners.encoding import PICTURES, TEXTS
from runners.search.engine import KINDS, Kind
from runners.search.inputs import DATASET, open_input
from utils.extras import extra
from utils.files import claimed, make_folder, sync_folder, write_json
from utils.output import say, table

logger = logging.getLogger(__name__)
DESCRIPTION = "model.json"
_CHECKED = 256  # rows of each kind that are compared, at most
_WRONG = 0.05  # share of bits: rounding turns far fewer, a network that is not the model's about half of them


class Network(nn.Module):
    """What makes codes of one kind of thing, from one tensor.

    Args:
        encoder: The trained method.
        kind: Pictures or texts.
        field: The batch field that codes are made from.
    """

    def __init__(self, encoder: Encoder, kind: Kind, field: str) -> None:
        super().__init__()
        self.model = encoder.model
        self.kind, self.field, self.columns = kind, field, encoder.columns

    def forward(self, values: Tensor) -> Tensor:
        """The field's values, [B, ...] -> codes in {-1, +1}, [B, K] or [B, n, K] int8."""
        batch = Batch({"index": torch.arange(values.shape[0]), self.field: values})
        codes = self.model.encode_image(batch) if self.kind == "image" else self.model.encode_text(batch)
        return codes[..., self.columns].to(torch.int8)


def export_command(source: Path, folder: str | None, inputs: Sequence[str], overrides: Sequence[str]) -> None:
    """`--export CHECKPOINT --save-dir DIR`: writes a folder with two networks and their description, or none.

    Args:
        source: A checkpoint of this library.
        folder: The folder; it may exist if it is empty.
        inputs: Pictures and texts to compare codes of, see `open_input`; the queries of its own data set where empty.
        overrides: Entries `dataset.key=value`, of a data set among them.

    Raises:
        UserError: If the method does not encode a picture and a text each on its own, a package is missing, there is
            nothing to compare codes of, or the folder cannot be written.
        RuntimeError: If the networks do not give the model's codes.
    """
    if folder is None:
        raise UserError("--export needs --save-dir, the folder of the networks and their description")
    other = next((entry for entry in overrides if not entry.startswith("dataset.")), None)
    if other is not None:
        raise UserError(f"{other}: --export takes the checkpoint as it is, and settings of dataset alone; leave it out")
    for module in ("onnx", "onnxscript", "onnxruntime"):
        extra(module, "requirements-onnx.txt", "--export")
    target = Path(os.path.abspath(folder))
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--save-dir {folder} is there and not empty; name another, or remove it")
    encoder = Encoder.load(source, device="cpu")
    fields = {kind: field_alone(encoder, kind) for kind in KINDS}
    samples = _samples(encoder, fields, inputs, overrides)

    make_folder(target.parent, "--save-dir")
    part = target.with_name(f".{target.name}.part")
    with claimed(part, "--save-dir"):
        for left in part.glob("[!.]*"):  # not the lock
            left.unlink()
        described = _described(encoder)
        rows = [["file", "input", "code", "rows compared", "bits that differ"]]
        for kind, field in fields.items():
            file = part / f"{kind}.onnx"
            write_network(Network(encoder, kind, field), samples[kind], file)
            differ, bits = differing_bits(encoder, kind, field, samples[kind], file)
            if differ > _WRONG * bits:
                raise RuntimeError(f"{file.name} gives {differ:,} of {bits:,} bits otherwise than {encoder.name}")
            described[kind] = _part(encoder, kind, field) | {
                "checked": {"rows": len(samples[kind]), "bits": bits, "bits_that_differ": differ}
            }
            shown = (described[kind]["input"]["shape"], described[kind]["output"]["shape"])
            rows.append([file.name, *(json.dumps(shape) for shape in shown), str(len(samples[kind])), str(differ)])
        write_json(part / DESCRIPTION, described)
        for written in part.glob("[!.]*"):
            with open(written, "rb") as opened:
                os.fsync(opened.fileno())
        try:
            os.rename(part, target)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise UserError(f"--save-dir {folder} cannot be written ({error.strerror}); name another") from None
        sync_folder(target.parent)
    say(table(rows))
    say(f"written to {folder}: {', '.join(sorted(path.name for path in target.iterdir()))}")


def field_alone(encoder: Encoder, kind: Kind) -> str:
    """The one batch field that codes of a kind are made from.

    Raises:
        UserError: If they need more than one.
    """
    needed = sorted(encoder.fields[kind] - encoder.model.optional_fields)
    if len(needed) > 1:
        raise UserError(
            f"{encoder.name}: {kind} codes are made from {' and '.join(needed)} together, so there is no network of "
            f"{'a picture' if kind == 'image' else 'a text'} alone to export; use the checkpoint itself"
        )
    return needed[0]


def write_network(network: Network, sample: Tensor, file: Path) -> None:
    """Writes a network as ONNX whose number of rows is free.

    Args:
        network: The network.
        sample: Rows of its input, [B, ...].
        file: Where to; weights of 2 GB and more, which ONNX cannot hold, go into a file beside it.
    """
    example = sample[:1].expand(2, *sample.shape[1:]).contiguous()  # of one row, the number 1 would be built in
    quiet = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in quiet]
    try:
        for log in quiet:
            log.setLevel(logging.ERROR)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(network.eval(), (example,), dynamic_shapes=rows)
            exported = torch.onnx.export(
                program, (), input_names=[network.field], output_names=["code"], dynamo=True, verbose=False
            )
    finally:
        for log, level in zip(quiet, levels, strict=True):
            log.setLevel(level)
    if exported is None:
        raise RuntimeError("the exporter returned nothing")
    exported.save(file)


def differing_bits(encoder: Encoder, kind: Kind, field: str, sample: Tensor, file: Path) -> tuple[int, int]:
    """How many bits of some rows a network gives otherwise than the evaluation, and of how many.

    Args:
        encoder: The trained method.
        kind: Pictures or texts.
        field: The network's input.
        sample: Rows of it, [B, ...].
        file: The network.
    """
    runtime = extra("onnxruntime", "requirements-onnx.txt", "--export")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    differ = bits = 0
    for rows in sample.split([1, *_sizes(len(sample) - 1, encoder.batch_size)]):  # one row, and many
        codes = encoder.encode(kind, Batch({"index": torch.arange(len(rows)), field: rows}))
        found = session.run(None, {field: rows.numpy()})[0]
        if found.shape != codes.shape or not (np.abs(found) == 1).all():
            raise RuntimeError(f"{file.name} gives no codes of shape {list(codes.shape)} in -1 and +1")
        differ, bits = differ + int((found != codes).sum()), bits + codes.size
    return differ, bits


def _sizes(count: int, size: int) -> list[int]:
    return [min(size, count - start) for start in range(0, count, size)]


def _samples(
    encoder: Encoder, fields: dict[Kind, str], inputs: Sequence[str], overrides: Sequence[str]
) -> dict[Kind, Tensor]:
    """Rows of every network's input, [B, ...], of the things that inputs name."""
    section = encoder.tree.get("dataset")
    own = f"{DATASET}{section.get('name') if isinstance(section, dict) else None}:query"
    try:
        opened = [open_input(text, encoder, overrides) for text in inputs or [own]]
    except UserError as error:
        if inputs:
            raise
        raise UserError(
            f"--export compares codes of queries of the data set, and {error}; or name pictures and texts with --input"
        ) from None
    found = {}
    for kind, field in fields.items():
        rows = list(islice(_rows(encoder, kind, field, opened), _CHECKED))
        if not rows:
            named = " ".join(inputs or [own])
            raise UserError(f"--input {named} has no {kind}s to compare codes of; name some, too")
        found[kind] = encoder.batch(rows)[field]
    return found


def _rows(encoder: Encoder, kind: Kind, field: str, inputs: Sequence[Any]) -> Iterator[dict[str, Tensor]]:
    for thing in (thing for source in inputs for thing in source.things() if thing.kind == kind):
        reads = {name: read for name, read in encoder.reads(kind, thing.item).items() if read == field}
        row = encoder.row({read: thing.item[name] for name, read in reads.items()})
        if isinstance(row, UserError):
            logger.warning("%s", row)
        else:
            yield row


def _described(encoder: Encoder) -> dict[str, Any]:
    """What holds for both networks."""
    return {
        "method": encoder.settings.name,
        "bits": encoder.bits,
        "codes_per_item": encoder.model.codes_per_item,
        "fingerprint": encoder.fingerprint,
        "precision": "float32",
        "trained_in": encoder.encoding.precision,
        "marks": encoder.encoding.marks,
    }


def _part(encoder: Encoder, kind: Kind, field: str) -> dict[str, Any]:
    """What a user of one network needs to know."""
    shape = encoder.encoding.field_shapes[field]
    described: dict[str, Any] = {
        "file": f"{kind}.onnx",
        "input": {"name": field, "shape": ["batch", *shape], "type": "int64" if field in TEXTS else "float32"},
        "output": {"name": "code", "shape": ["batch", *encoder.code_shape], "type": "int8", "values": [-1, 1]},
    }
    left_out = sorted(encoder.fields[kind] - {field})
    if left_out:
        described["without"] = left_out
    if field in PICTURES:
        described["picture"] = {
            "size": shape[-1],
            "colours": "RGB",
            "resize": "bicubic to size x size, the aspect ratio not kept",
            "normalisation": {"scale": 1 / 255, "mean": MEAN, "std": STD},  # (pixel * scale - mean) / std
        }
    elif field in TEXTS:
        described["tokenizer"] = {
            "name": "CLIP byte-pair encoding, bpe_simple_vocab_16e6",
            "length": shape[0],
            "tokens": encoder.encoding.tokens,  # the first of its pieces, then start and end
            "start": encoder.encoding.tokens - 2,
            "end": encoder.encoding.tokens - 1,
            "padding": 0,
        }
    elif field == "bag_of_words" and encoder.encoding.vocabulary is not None:
        described["vocabulary"] = encoder.encoding.vocabulary  # 1 where a word occurs, else 0
    return described
