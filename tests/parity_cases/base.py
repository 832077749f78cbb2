"""A golden case of a method: what a reference implementation was given and what it computed.

A subclass named `Case` says what only its method knows: settings in our names, terms, intermediate outputs, buffers,
recorded random draws. Everything else is read from the arrays here.
"""

import re
import tempfile
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.registry import MODELS, OPTIMIZERS
from common.schemas import OptimizerConfig
from common.types import Backbone, Batch, DataInfo
from models.base import HashingModel
from models.clip.formats import shape_of

Tree = dict[str, Any]
ON_FEATURES = {"index": "index", "image_feature": "image", "text_feature": "text", "labels": "label"}


class MethodCase:
    """One batch through one method.

    Args:
        cfg: Every setting that the reference used.
        arrays: Name -> array, as the golden README describes them.
    """

    # batch field -> name under in/
    recorded_as: ClassVar[Mapping[str, str]] = {"index": "index", "image": "image", "text": "text", "labels": "label"}
    buffers: ClassVar[Mapping[str, str]] = {}  # name under in/buffer/ and traj/buffer/ -> name in our state dict
    gradients: ClassVar[Mapping[str, str]] = {"loss": "grad/"}  # pass of a step -> where its gradients are recorded
    noise: ClassVar[re.Pattern[str]] = re.compile("(?!)")  # gradients that are 0 but for rounding
    code_bound: ClassVar[float] = 3e-4  # absolute, of relaxed codes after the steps
    weight_bound: ClassVar[float] = 1e-5  # absolute, of weights after the steps, beside 1e-4 relative

    def __init__(self, cfg: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        self.cfg = cfg
        self.settings: dict[str, Any] = cfg["model"]
        self.unified = cfg["source"] == "unified"
        self.arrays = {name: torch.from_numpy(array) for name, array in arrays.items() if name != "cfg"}
        self.batch = self.make_batch()

    # ------------------------------------------------------------------ for the method to say

    def model_section(self) -> Tree:
        """Our `model:` section for `cfg`, without name, bits and backbone."""
        raise NotImplementedError

    def terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The reference's terms, by its names under loss/ and traj/, from the losses of all passes and their terms."""
        raise NotImplementedError

    def outputs(self, model: Any) -> dict[str, Tensor]:
        """Everything under out/ (out_query/, miner/) in evaluation mode, by full name, in the reference's layout."""
        raise NotImplementedError

    def loose_terms(self) -> frozenset[str]:
        """Terms that were recovered by subtraction: 1e-4 absolute is near enough."""
        return frozenset()

    def make_batch(self) -> Batch:
        """The batch under our field names."""
        return Batch({field: self.arrays[f"in/{name}"] for field, name in self.recorded_as.items()})

    def arrange(self, model: Any, step: int) -> None:
        """Puts recorded inputs into the model before step `step`; before step 0 also for the outputs."""
        if step == 0:
            for name, rows in self.part("in/buffer/").items():
                cast(HashingModel, model).get_buffer(self.buffers[name]).copy_(rows)

    def bits(self) -> int:
        """K of our config."""
        return int(self.cfg["bits"])

    def optim_section(self) -> Tree:
        """Our `optim:` section: one optimizer, CLIP and everything else at rates of their own."""
        return {"main": self.main_optimizer({"clip.": "backbone", "backbone.": "backbone", "": "head"})}

    # ------------------------------------------------------------------ the same for all

    def main_optimizer(self, groups: Mapping[str, str]) -> Tree:
        """Settings of the reference's BertAdam.

        Args:
            groups: Start of a reference group's key prefix -> our group name; the first that fits counts.
        """
        recorded = self.cfg["optimizer"]
        rates: dict[str, float] = {}
        for group in recorded["param_groups"]:
            name = next(ours for prefix, ours in groups.items() if group["prefix"].startswith(prefix))
            if rates.setdefault(name, float(group["lr"])) != group["lr"]:
                raise UserError(f"the case trains parts of our group {name!r} at different rates")
        clipped = (
            {"type": "ClippedBertAdam", "max_total_norm": recorded["global_clip"]} if "global_clip" in recorded else {}
        )
        return {
            "type": recorded["arch"],
            "lr": rates,
            "schedule": recorded["schedule"],
            "warmup": recorded["warmup_proportion"],
            "b1": recorded["b1"],
            "b2": recorded["b2"],
            "eps": recorded["e"],
            "weight_decay": recorded["weight_decay"],
            "max_grad_norm": recorded["max_grad_norm"],
            **clipped,
        }

    def adam(self, optimizers: Mapping[str, Mapping[str, str]]) -> Tree:
        """Settings of the reference's Adam.

        Args:
            optimizers: Our optimizer name -> key prefix of a reference group -> our group name.
        """
        recorded = self.cfg["optimizer"]
        rates = {group["prefix"]: float(group["lr"]) for group in recorded["param_groups"]}
        return {
            name: {
                "type": recorded["arch"],
                "lr": {ours: rates[prefix] for prefix, ours in groups.items()},
                "b1": recorded["b1"],
                "b2": recorded["b2"],
                "eps": recorded["e"],
                "weight_decay": recorded["weight_decay"],
                "max_grad_norm": recorded["max_grad_norm"],
                "milestones": [],
                "milestone_factor": 1.0,
            }
            for name, groups in optimizers.items()
        }

    def optim_config(self) -> dict[str, OptimizerConfig]:
        """`optim_section`, checked."""
        return {
            name: OPTIMIZERS.get(tree["type"]).Config.model_validate(tree)
            for name, tree in self.optim_section().items()
        }

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The arrays whose name starts with `prefix`, by the rest of the name."""
        return {name.removeprefix(prefix): x for name, x in self.arrays.items() if name.startswith(prefix)}

    def model_class(self) -> type[HashingModel]:
        """The method's class."""
        cls: type[HashingModel] = MODELS.get(self.cfg["method"])
        return cls

    def build(self) -> HashingModel:
        """Our model with the weights that the reference started from, as `--evaluate` loads them.

        Raises:
            UserError: If the checkpoint does not fit the model to the last entry.
        """
        cls = self.model_class()
        state = cls.import_reference(self.part("sd/"))
        towers = {name.removeprefix("backbone."): x for name, x in state.items() if name.startswith("backbone.")}
        labels = self.batch["labels"]
        rows = int(self.cfg["train_num"])
        with tempfile.TemporaryDirectory() as folder:
            data = DataInfo(
                num_train=rows,
                field_shapes={name: tuple(rows.shape[1:]) for name, rows in self.batch.items()},
                train_labels=self.arrays.get("in/train_label", torch.zeros(rows, labels.shape[1])),
                backbone=Backbone(shape_of(towers), None, "golden case") if towers else None,
                seed=0,
                cache_dir=folder,
            )
            section = {"name": self.cfg["method"], "bits": self.bits(), **self.model_section()}
            if towers:
                section["backbone"] = "golden"
            model = cls(cls.Config.model_validate(section), data)
            model.prepare(data)
        missing, unknown = model.load_state_dict(state, strict=False)
        missing = [name for name in missing if not model.may_be_absent(name)]
        if missing or unknown:
            raise UserError(f"the checkpoint does not fit: missing {missing[:3]}, unknown {unknown[:3]}")
        return model


class PooledCase(MethodCase):
    """One batch through a method with a head for each modality on CLIP's pooled features."""

    def outputs(self, model: Any) -> dict[str, Tensor]:
        """Relaxed codes and codes."""
        return {
            "out/image_code": model.image_head(model.backbone.image_features(self.batch["image"])),
            "out/text_code": model.text_head(model.backbone.text_features(self.batch["text"])),
            "out/image_binary": model.encode_image(self.batch),
            "out/text_binary": model.encode_text(self.batch),
        }
