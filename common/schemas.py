"""Schemas of the sections that every run or sweep has: types, meaning and ranges of their settings.

The values stand in `configs/base.yaml`; each method, data set and optimizer brings the schema of its own settings, a
class `Config` derived from one of these. `common/config.py` checks a configuration against them.
"""

import re
import string
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from common.places import Mark

# Keys that change where or how fast a run computes, but not what: they may differ when a run goes on.
FREE_KEYS = frozenset(
    f"run.{key}"
    for key in (
        "save_dir",
        "cache_dir",
        "device",
        "distribute",
        "recompute",
        "workers",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
    )
)


class Section(BaseModel):
    """Base of all schemas: frozen, unknown keys refused, no conversion between types, no NaN, no empty words."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, str_min_length=1, protected_namespaces=()
    )


class DatasetConfig(Section):
    """The part of the `dataset:` section that every data set has."""

    name: str  # for messages, result folders and tables
    type: str  # registered name of the class that reads it


class OptimizerConfig(Section):
    """The part of an entry of the `optim:` section that every optimizer has."""

    type: str  # registered name of the optimizer
    lr: dict[str, Annotated[float, Field(ge=0)]]  # learning rate of every parameter group, by the model's group names


def _of_form(pattern: str, form: str) -> AfterValidator:
    """Refuses words that do not match a pattern, naming their form in words."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"Input should be {form}")
        return value

    return AfterValidator(check)


PLACEHOLDERS = ("model", "dataset", "bits", "seed")  # of run.save_dir


def _with_placeholders(value: str) -> str:
    """Refuses a folder with anything in braces but the bare placeholders."""
    known = ", ".join("{" + name + "}" for name in PLACEHOLDERS)
    try:
        parts = list(string.Formatter().parse(value))
    except ValueError:
        raise ValueError(f"may hold no placeholder but {known}") from None
    if any(name is not None and (name not in PLACEHOLDERS or form or change) for _, name, form, change in parts):
        raise ValueError(f"may hold no placeholder but {known}")
    return value


class RunConfig(Section):
    """`run:` section. `configs/base.yaml` is the commented reference page of its values."""

    runner: str  # registered name of the loop
    # folder of the run; {model}, {dataset}, {bits} and {seed} are filled in
    save_dir: Annotated[str, AfterValidator(_with_placeholders), Mark.OF_MACHINE]
    # downloaded weights, trained backbones, hash centres: costly to make, safe to delete
    cache_dir: Annotated[str, Mark.OF_MACHINE]
    # auto, cpu, cpu:2 (two processes), cuda, or GPU numbers
    device: Annotated[
        str,
        BeforeValidator(lambda value: str(value) if type(value) is int else value),  # `device: 0` is a number in YAML
        _of_form(
            r"auto|cpu(:[1-9]\d{0,5})?|cuda|\d{1,5}(,\d{1,5})*", "auto, cpu, cuda, GPU numbers such as 0,1, or cpu:2"
        ),
        Mark.OF_MACHINE,
    ]
    distribute: Annotated[bool, Mark.OF_MACHINE]  # one process per device of `device`
    seed: int = Field(ge=0, lt=2**32)  # weights, order, augmentation, dropout (the split has its own seed)
    epochs: int = Field(gt=0)
    patience: Annotated[int, Field(gt=0)] | None  # evaluations without gain after which a run ends; null: it never does
    batch_size: int = Field(gt=0)  # pairs of the global batch, over all processes
    accumulate: int = Field(gt=0)  # parts in which CLIP computes a batch, to save memory
    recompute: bool  # CLIP's blocks are computed again in backward, to save memory
    precision: Literal["float32", "bf16"]  # bf16: autocast; codes and losses stay float32
    matmul: Literal["highest", "high"]  # of float32 in training steps; high: TF32 where the GPU has it
    compile: bool  # torch.compile
    log_every: int = Field(gt=0)  # steps after which their losses are read back, checked and logged together
    loader: Literal["memory", "workers"]  # pictures held as uint8 on the device, or read by worker processes
    workers: Annotated[int, Field(ge=0, le=1024), Mark.OF_MACHINE]  # worker processes of the loader `workers`
    # steps, or minutes as in "10m"
    checkpoint_every: Annotated[int, Field(gt=0)] | Annotated[str, _of_form(r"[1-9]\d*m", 'minutes such as "10m"')]
    keep_checkpoints: int = Field(gt=0)  # newest resumable checkpoints kept


class EvaluateConfig(Section):
    """`evaluate:` section."""

    every: int = Field(gt=0)  # epochs between evaluations; the last epoch is always evaluated
    batch_size: int = Field(gt=0)  # rows encoded at a time
    # k of mAP@k; the first is the headline
    cutoffs: list[Literal["all"] | Annotated[int, Field(gt=0)]] = Field(min_length=1)
    # see README, "How results are defined"
    definitions: list[Literal["relevant", "top", "expected"]] = Field(min_length=1)
    caption: Literal["random", "first"]  # of several captions: a seeded random one (as the papers), or the first
    pairs: bool  # also recall@k and median rank of a query's own partner, within the split that asks
    select: Literal["query", "validation", "last"]  # which epoch is reported: the best on that split, or the last


class SweepConfig(Section):
    """`sweep:` section; `configs/sweep_base.yaml` has what a sweep's own YAML may leave out."""

    configs: Annotated[list[str], Field(min_length=1), Mark.READ]  # the YAML of every method
    bits: list[Annotated[int, Field(gt=0)]] = Field(min_length=1)  # model.bits
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)  # run.seed
    split_seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None  # dataset.split.seed
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]]  # any key -> its values
    parallel: int = Field(gt=0, le=1024)  # runs made at once
    summary: bool  # whether table and curves are written in the end
    save_dir: str  # folder of the runs, the table and the curves
