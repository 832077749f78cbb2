"""Where hash centres and transforms come from: the settings, the cache of what was generated, files of others.

A file is safetensors: `long`, `short.<bits>` and `transform.<bits>`, and JSON under `header` that says what they are.
Generated centres and trained transforms are kept in such files in the cache, under the fingerprint of their inputs;
`data/convert_twdh_centers.py` writes them from what the authors of TwDH published.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
from pydantic import Field, PositiveInt, ValidationInfo, field_validator
from torch import Tensor

from common.errors import UserError
from common.places import Mark
from common.tensor_files import CHECKSUM, checksum, read_tensors
from models.base import ClipModelConfig
from models.blocks.hash_centers import (
    GENERATOR,
    HashCenters,
    TransformTraining,
    closed_form_transform,
    long_centers,
    short_centers,
    train_transform,
    wrong_bits,
)
from utils.distributed import barrier, is_main
from utils.files import atomic, in_turn

logger = logging.getLogger(__name__)

CLASS_ORDER = "row c belongs to column c of the labels"


class HashCentersConfig(ClipModelConfig):
    """The part of the `model:` section that says where centres and transforms come from."""

    long_bits: int = Field(gt=0)  # length of the codes that are trained; a power of two for generated centres
    short_bits: list[PositiveInt] = Field(min_length=1)  # lengths read off the long code; `bits` is one of them
    centers: Literal["generated", "file"]
    center_seed: int = Field(ge=0)  # of generated centres and trained transforms; apart from run.seed, as files are
    short_fallback: Literal["balanced", "hadamard_pm"]  # generated short centres beyond the rows: random, or -rows
    transform: Literal["closed_form", "trained", "file"]  # from long to short codes
    transform_training: TransformTraining  # of transform: trained
    # holds <long_bits>.safetensors of data/convert_twdh_centers.py, for `file`
    center_folder: Annotated[str, Mark.READ] | None

    @field_validator("short_bits")
    @classmethod
    def _lengths_fit(cls, short_bits: list[int], info: ValidationInfo) -> list[int]:
        if len(set(short_bits)) < len(short_bits):
            raise ValueError("must not name a length twice")
        if info.data.get("bits", short_bits[0]) not in short_bits:
            raise ValueError(f"must hold model.bits, which is {info.data['bits']}")
        if max(short_bits) >= info.data.get("long_bits", max(short_bits) + 1):
            raise ValueError(f"must be shorter than model.long_bits, which is {info.data['long_bits']}")
        return short_bits

    @field_validator("transform")
    @classmethod
    def _transform_fits_its_centers(cls, transform: str, info: ValidationInfo) -> str:
        if transform == "file" and info.data.get("centers") == "generated":
            raise ValueError("must be closed_form or trained while model.centers is generated: a file's fit its own")
        return transform

    @field_validator("center_folder")
    @classmethod
    def _folder_is_named(cls, folder: str | None, info: ValidationInfo) -> str | None:
        if folder is None and info.data.get("centers") == "file":
            raise ValueError("must name a folder that data/convert_twdh_centers.py wrote, since model.centers is file")
        return folder


def write_centers(path: Path, centers: HashCenters, facts: Mapping[str, Any]) -> None:
    """Writes centres and transforms, atomically.

    Args:
        path: The file; its folder exists.
        centers: What to write.
        facts: JSON values for the header, beside classes and lengths.

    Raises:
        UserError: If the file cannot be written.
    """
    tensors = {
        "long": centers.long,
        **{f"short.{bits}": value for bits, value in centers.short.items()},
        **{f"transform.{bits}": value for bits, value in centers.transforms.items()},
    }
    header = {
        "classes": centers.long.shape[0],
        "long_bits": centers.long.shape[1],
        "short_bits": sorted(centers.short),
        "class_order": CLASS_ORDER,
        **facts,
    }
    content = {name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}
    header[CHECKSUM] = checksum(content)
    metadata = {"header": json.dumps(header)}  # one key: several would be written in any order
    with atomic(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(content, metadata))


def read_centers(path: Path, classes: int, long_bits: int, short_bits: Sequence[int], transforms: bool) -> HashCenters:
    """Reads what `write_centers` wrote, and checks that it fits.

    Args:
        path: The file.
        classes: C of the data set.
        long_bits: K wanted.
        short_bits: Short lengths wanted; others in the file are passed over.
        transforms: Whether transforms are wanted, too.

    Returns:
        Centres of the wanted lengths.

    Raises:
        UserError: If the file is missing, damaged, or of other bits or classes.
    """
    if not path.exists():
        raise UserError(
            f"centre file {path} is not there; write it with data/convert_twdh_centers.py, or set "
            "model.centers=generated model.transform=closed_form"
        )
    try:
        file = read_tensors(path)
        header = json.loads(file.metadata.get("header", "{}"))
        if header.get(CHECKSUM, found := checksum(file.tensors)) != found:
            raise UserError("its values are not those that were written (the checksum differs)")
    except (UserError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"centre file {path} cannot be read ({error}); convert it again") from None
    content = {name: value.float() for name, value in file.tensors.items()}

    def take(name: str, shape: tuple[int, int]) -> Tensor:
        if name not in content:
            raise UserError(
                f"centre file {path} has no {name}, only {', '.join(sorted(content))}; convert it, or change "
                "model.short_bits"
            )
        check_centers(content[name], shape, f"centre file {path}: {name}", signs=not name.startswith("transform"))
        return content[name]

    lengths = sorted(short_bits)
    return HashCenters(
        take("long", (classes, long_bits)),
        {bits: take(f"short.{bits}", (classes, bits)) for bits in lengths},
        {bits: take(f"transform.{bits}", (2 * long_bits, 2 * bits)) for bits in lengths if transforms},
    )


def check_centers(values: Tensor, shape: tuple[int, int], place: str, signs: bool) -> None:
    """Refuses centres or a transform of another shape, or with other values than they may have.

    Args:
        values: What a file holds, [C, K] (a transform: [2K, 2S]).
        shape: What it should be.
        place: Where it stands, for the message.
        signs: Whether all values must be -1 or +1, as those of centres; else they must be finite.

    Raises:
        UserError: With the first thing that is wrong.
    """
    if tuple(values.shape) != shape:
        found = " x ".join(map(str, values.shape)) or "a single number"
        kind = "one row per class, one column per bit" if signs else "two rows per long bit, two columns per short bit"
        raise UserError(
            f"{place} is {found}, but {shape[0]} x {shape[1]} is needed ({kind}): it is for other classes or bits; "
            "name the files of this data set and these lengths"
        )
    if signs and not bool((values.abs() == 1).all()):
        raise UserError(f"{place} holds values other than -1 and +1, so it is no set of hash centres; use another file")
    if not bool(values.isfinite().all()):
        raise UserError(f"{place} holds values that are not finite; use another file")


# ---------------------------------------------------------------------------------------------- all together


def find_centers(config: HashCentersConfig, labels: Tensor, cache_dir: str) -> HashCenters:
    """Centres and transforms as the config says, from the cache where they have been made before.

    Args:
        config: Settings.
        labels: Of the training split, [N, C] multi-hot; a trained transform learns from them.
        cache_dir: Folder of results that are costly to make.

    Returns:
        Centres and transforms of all `short_bits`.

    Raises:
        UserError: If they cannot be generated, or the file does not fit.
    """
    c, classes = config, labels.shape[1]
    given = None
    if c.centers == "file":
        path = Path(str(c.center_folder)) / f"{c.long_bits}.safetensors"
        given = read_centers(path, classes, c.long_bits, c.short_bits, transforms=c.transform == "file")
        if c.transform == "file":
            return given

    def make() -> HashCenters:
        centers = given or HashCenters(
            long_centers(classes, c.long_bits, c.center_seed),
            {bits: short_centers(classes, bits, c.center_seed, c.short_fallback) for bits in c.short_bits},
            {},
        )
        transforms = {}
        for bits, short in centers.short.items():
            if c.transform == "trained":
                transforms[bits] = train_transform(labels, centers.long, short, c.transform_training, c.center_seed)
            else:
                transforms[bits] = closed_form_transform(centers.long, short)
            missed = wrong_bits(transforms[bits], centers.long, short)
            logger.info("%s transform %d -> %d bits: %.1f %% wrong", c.transform, c.long_bits, bits, 100 * missed)
        return replace(centers, transforms=transforms)

    trained = c.transform == "trained"
    inputs = {
        "classes": classes,
        "long_bits": c.long_bits,
        "short_bits": sorted(c.short_bits),
        "generator": GENERATOR if given is None else f"file {_digest(given.long, *given.short.values())}",
        "seed": c.center_seed,
        "short_fallback": c.short_fallback,
        "transform": c.transform,
        "training": {**c.transform_training.model_dump(), "labels": _digest(labels)} if trained else None,
    }
    return _kept(Path(cache_dir), inputs, make)


def _kept(cache: Path, inputs: Mapping[str, Any], make: Callable[[], HashCenters]) -> HashCenters:
    """What an earlier call with these inputs made, else made now by one process while the others wait."""
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / "hash_centers" / digest / "centers.safetensors"
    sizes = inputs["classes"], inputs["long_bits"], inputs["short_bits"]
    if not is_main():
        barrier()
    try:
        with in_turn(path.parent, "run.cache_dir"):
            if path.exists():
                try:
                    return read_centers(path, *sizes, transforms=True)
                except UserError as error:
                    logger.warning("%s; making them anew", error)
            centers = make()
            write_centers(path, centers, inputs)
            return centers
    finally:
        if is_main():
            barrier()


def _digest(*tensors: Tensor) -> str:
    """Fingerprint of values and shapes [...]."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(f"{tuple(tensor.shape)}".encode())
        state.update(tensor.float().numpy().tobytes())
    return state.hexdigest()[:16]
