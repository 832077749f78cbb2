"""Where a method's CLIP comes from: a public weight file, a file of the user's, or a run of this library."""

import hashlib
import json
import logging
import shutil
from contextlib import nullcontext
from pathlib import Path

from common.config import Config, build_config, load_config
from common.errors import UserError
from common.registry import RUNNERS
from common.schemas import FREE_KEYS
from common.types import Backbone
from common.yaml_layers import flatten
from models.clip.weights import is_config, open_backbone, read_clip, write_clip
from models.clip_pretraining import export_clip
from utils.distributed import barrier, from_main, is_main
from utils.files import in_turn
from utils.signals import Interrupted

logger = logging.getLogger(__name__)


def find_backbone(config: Config) -> Backbone:
    """The CLIP that `model.backbone` names, with its weights.

    Args:
        config: The run's configuration. `model.backbone` is a public name (ViT-B/32), a weight file, or the YAML of a
            run that trains a CLIP; that run is made now if its result is not in the cache.

    Raises:
        UserError: If the weights cannot be had.
    """
    name = config.model.backbone
    if is_config(name):
        return _trained_backbone(name, config)
    if not is_main():
        barrier()  # the first process downloads
    backbone = open_backbone(name, config.run.cache_dir)
    if is_main():
        barrier()
    return backbone


def _trained_backbone(name: str, config: Config) -> Backbone:
    recipe = _recipe(name, config)
    folder = _cache_folder(recipe, config)
    weights = folder / "weights.safetensors"
    with in_turn(folder, "run.cache_dir") if is_main() else nullcontext():
        if not from_main(weights.exists()):
            logger.info("backbone %s is not in the cache; training it now, once, into %s", name, weights)
            _train(_moved(recipe, folder / "run"), weights, config)
    barrier()
    try:
        return read_clip(weights)
    except UserError as error:
        raise UserError(f"{error}; remove {folder}, and the backbone is trained anew") from None


def _recipe(name: str, config: Config) -> Config:
    """The backbone's own configuration; on the run's data set with the run's split, computed where the run is."""
    recipe = load_config(name)
    if "backbone" in type(recipe.model).model_fields:
        raise UserError(f"model.backbone: {name} trains {recipe.model.name}, which needs a backbone itself")
    tree = recipe.tree
    if tree["dataset"]["name"] == config.dataset.name:  # the queries of the run must stay unseen
        tree = {**tree, "dataset": config.tree["dataset"]}
    places = {key: getattr(config.run, key) for key in ("device", "distribute", "cache_dir")}
    origins = {**recipe.origins, **{key: file for key, file in config.origins.items() if key.startswith("dataset.")}}
    return build_config({**tree, "run": {**tree["run"], **places}}, origins)


def _cache_folder(recipe: Config, config: Config) -> Path:
    """A folder of its own for every recipe that would give other weights."""
    values = {key: value for key, value in flatten(recipe.tree).items() if key not in FREE_KEYS}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
    return Path(config.run.cache_dir) / "backbones" / f"{recipe.model.name}-{recipe.dataset.name}-{digest}"


def _moved(recipe: Config, folder: Path) -> Config:
    return build_config({**recipe.tree, "run": {**recipe.tree["run"], "save_dir": str(folder)}}, recipe.origins)


def _train(recipe: Config, weights: Path, config: Config) -> None:
    """Runs the recipe, going on where an earlier process stopped, and writes its last weights."""
    runner = RUNNERS.get(recipe.run.runner)(recipe)
    try:
        runner.setup(resume=True)
        runner.run()
    except Interrupted as stop:
        raise Interrupted(stop.number, 0, config.run_folder) from None
    if is_main():
        metadata = {"source": f"trained on {recipe.dataset.name}, split {runner.dataset.splits.fingerprint}"}
        write_clip(weights, export_clip(runner.model), metadata)
        shutil.rmtree(runner.checkpoints.folder)
