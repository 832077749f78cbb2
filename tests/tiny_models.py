"""Every registered method in small: a tiny CLIP, a few rows of data, the settings of the method's own YAML."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.registry import MODELS
from common.types import Backbone, Batch, DataInfo, Progress
from common.yaml_layers import read_yaml
from models.base import HashingModel
from runners.steps import updates
from tests import tiny_data
from tests.processes import run_processes
from utils.distributed import data_parallel, rank, world_size

SHAPE = dataclasses.replace(tiny_data.SHAPE, vocabulary=60)
ROWS, CLASSES, LENGTH, WORDS = 11, 5, 12, 20
SMALL: dict[str, dict[str, Any]] = {  # what a method's own YAML makes large, beside `bits`; most methods need no entry
    "CLIP": {"bits": SHAPE.embed_dim, **dataclasses.asdict(SHAPE)},
    "UCCH": {"image_hidden": [24], "text_hidden": [], "negatives": 8},
    "UCMFH": {"feed_forward_width": 32, "hidden_width": 32},
    "UMoED": {"layers": 2, "feed_forward_width": 128},
}


def section(method: str, **overrides: Any) -> dict[str, Any]:
    """The `model:` section of `configs/<METHOD>/config.yaml` for 16 bits, with some values replaced."""
    path = Path(__file__).parents[1] / "configs" / MODELS.folder(method) / "config.yaml"
    return {**read_yaml(path.read_text(encoding="utf-8"), str(path))["model"], "bits": 16, **overrides}


def small_settings(method: str) -> list[str]:
    """What makes a method small, as entries of a command line."""
    return [f"model.{key}={value}" for key, value in SMALL.get(method, {}).items()]


def rows_of(seed: int = 0) -> Batch:
    """A training split of 11 rows with every field that a data set may offer; each row has one label or more."""
    draw = torch.Generator().manual_seed(seed)
    labels = (torch.rand(ROWS, CLASSES, generator=draw) < 0.3).float()
    labels[torch.arange(ROWS), torch.arange(ROWS) % CLASSES] = 1.0

    def pictures() -> Tensor:
        return torch.randn(ROWS, 3, SHAPE.image_size, SHAPE.image_size, generator=draw)

    def texts() -> Tensor:
        ids = torch.randint(1, SHAPE.end_of_text - 1, (ROWS, LENGTH), generator=draw)
        words = torch.randint(1, LENGTH - 1, (ROWS, 1), generator=draw)
        place = torch.arange(LENGTH)
        ids = torch.where(place <= words, ids, torch.where(place == words + 1, SHAPE.end_of_text, 0))
        ids[:, 0] = SHAPE.end_of_text - 1
        return ids

    return Batch(
        {
            "index": torch.arange(ROWS),
            "image": pictures(),
            "text": texts(),
            "labels": labels,
            "image_caption": texts(),
            "counterpart_image": pictures(),
            "counterpart_caption": texts(),
            "bag_of_words": (torch.rand(ROWS, WORDS, generator=draw) < 0.2).float(),
            "image_feature": torch.randn(ROWS, 24, generator=draw),
            "text_feature": torch.randn(ROWS, 9, generator=draw),
        }
    )


def pick(batch: Batch, rows: slice | list[int]) -> Batch:
    """Some rows of a batch."""
    return Batch({name: value[rows] for name, value in batch.items()})


def data_info(batch: Batch, cache_dir: str) -> DataInfo:
    """What a model may know of the split that `rows_of` made."""
    return DataInfo(
        num_train=ROWS,
        field_shapes={name: tuple(value.shape[1:]) for name, value in batch.items()},
        train_labels=batch["labels"],
        backbone=Backbone(SHAPE, None, "tiny"),
        seed=3,
        cache_dir=cache_dir,
    )


def build(method: str, cache_dir: str, **overrides: Any) -> HashingModel:
    """A method as its YAML says, on the tiny CLIP, prepared; the same weights at every call."""
    torch.manual_seed(7)
    cls: type[HashingModel] = MODELS.get(method)
    data = data_info(rows_of(), cache_dir)
    model = cls(cls.Config.model_validate(section(method, **overrides)), data)
    model.prepare(data)
    return model


def descents(model: HashingModel, lr: float) -> dict[str, torch.optim.Optimizer]:
    """Plain gradient descent in place of every optimizer of a model."""
    members = {name: [p for group in groups.values() for p in group] for name, groups in model.param_groups().items()}
    return {name: torch.optim.SGD(parameters, lr) for name, parameters in members.items()}


def train_steps(method: str, cache_dir: str, batches: list[list[int]], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Trains by plain gradient descent on the named global batches; every process takes its share of the rows.

    Args:
        method: Registered name.
        cache_dir: For what `prepare` keeps.
        batches: Row numbers of every global batch.
        overrides: Of the `model:` section.

    Returns:
        `losses` of the global batches, those of stages included, and `state` after them.
    """
    model = build(method, cache_dir, **overrides)
    model.train()
    wrapped = data_parallel(model, model.loss_reaches_all)
    optimizers = descents(model, 1e-4)
    split, losses = rows_of().only(model.fields), []
    for step, batch in enumerate(batches):
        share = [batch[place] for place in torch.arange(len(batch)).tensor_split(world_size())[rank()]]
        torch.manual_seed(100 + step)
        out = wrapped(pick(split, share), Progress(epoch=0, epochs=1, step=step, steps_per_epoch=len(batches)))
        losses += [done.loss.item() for _, done in updates(out, optimizers)]
    return {"losses": losses, "state": {name: value.clone() for name, value in model.state_dict().items()}}


def train_all(jobs: list[tuple[str, str, list[list[int]], Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """`train_steps` for each of several argument lists: starting processes costs more than the steps."""
    return [train_steps(*job) for job in jobs]


def assert_same_in_processes(
    method: str, cache_dir: str, settings: Sequence[Mapping[str, Any]], counts: tuple[int, ...] = (2,)
) -> None:
    """Several gloo processes end in the state of one, after a batch in uneven parts and one of too few rows for all.

    Args:
        method: Registered name.
        cache_dir: For what `prepare` keeps.
        settings: Overrides of the `model:` section, one for each comparison.
        counts: Numbers of processes.
    """
    batches = [[0, 1, 2, 3, 4], [1]]
    jobs = [(method, cache_dir, batches, overrides) for overrides in settings]
    alone = train_all(jobs)
    for count in counts:
        for results in run_processes(train_all, count, jobs):
            for one, several in zip(alone, results, strict=True):
                assert_same_training(one, several)


def assert_same_training(one: Mapping[str, Any], several: Mapping[str, Any], tolerance: float = 1e-5) -> None:
    """The losses and every entry of the state agree, relative to the largest value of the entry."""
    torch.testing.assert_close(torch.tensor(several["losses"]), torch.tensor(one["losses"]), rtol=tolerance, atol=0)
    assert one["state"].keys() == several["state"].keys()
    for name, wanted in one["state"].items():
        error = (several["state"][name].double() - wanted.double()).abs().max() if wanted.numel() else 0.0
        assert float(error) <= tolerance * max(1.0, float(wanted.double().abs().max())), name
