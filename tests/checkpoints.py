"""Checkpoints as a run writes them, of models with random weights: what they are used for does not mind."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from common import checkpoint
from common.config import Config, load_config
from common.registry import MODELS
from dataset.base import PairedDataset
from models.base import HashingModel
from runners import encoding
from runners.evaluation import Evaluator, SplitCodes
from runners.setup import build_model, open_dataset
from tests.commands import ROOT
from tests.tiny_models import small_settings


def configured(method: str, overrides: Sequence[str], *more: str) -> Config:
    path = ROOT / "configs" / MODELS.folder(method) / "coco.yaml"
    settings = ["evaluate.caption=first", *small_settings(method), *overrides, *more]
    return load_config(path, settings)


def saved(config: Config, path: Path) -> tuple[PairedDataset, HashingModel, SplitCodes, SplitCodes]:
    """A model with random weights, its checkpoint as a run writes it, and the evaluation's codes."""
    dataset = open_dataset(config)
    model = build_model(config, dataset, None, torch.device("cpu"), training=False)
    meta = {"config": config.tree, encoding.KEY: encoding.describe(config, model, dataset)}
    checkpoint.save(path, json.loads(json.dumps(meta)), model.state_dict())
    codes = Evaluator(config, dataset, model, torch.device("cpu")).evaluate().codes
    return dataset, model, codes["query"], codes["database"]
