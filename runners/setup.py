"""From a checked configuration to what a run works with: data set, model with its weights, loaders, all guarded."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from common.config import Config
from common.errors import UserError
from common.places import CHECKPOINT
from common.registry import MODELS
from common.schemas import RunConfig
from common.tensor_files import Tensors, require_finite, unwrapped
from common.types import Backbone, ClipShape, DataInfo
from common.yaml_layers import flatten
from dataset.base import PairedDataset, dataset_class
from dataset.columns import CaptionColumn
from dataset.loader import Loader, build_loader
from dataset.splits import Split
from dataset.texts.tokenizer import SMALLEST, VOCABULARY
from models.base import ClipModelConfig, HashingModel
from models.clip.towers import CLIP
from runners.backbone import find_backbone
from runners.contract import require_backbone, require_whole
from runners.encoding import KEY, encoding_of, shape_in
from utils.distributed import barrier, is_main
from utils.progress import progress
from utils.seeding import seed_torch

logger = logging.getLogger(__name__)


def encoded_splits(dataset: PairedDataset) -> tuple[Split, ...]:
    """The splits of which codes are made: queries first, the database last."""
    return ("query", *(("validation",) if len(dataset.splits.validation) else ()), "database")


def open_dataset(config: Config) -> PairedDataset:
    """Opens and checks the data set, which makes itself first where it can and is not there.

    Raises:
        UserError: If files are missing, broken or do not agree.
    """
    cls = dataset_class(config.dataset.type)
    if is_main() and config.origins.get("dataset.root") != CHECKPOINT:  # nothing is made where a checkpoint says
        cls.ensure(config.dataset)
    barrier()
    dataset = cls(config.dataset)
    splits = dataset.splits
    logger.info(
        "%s: %d pairs, %d labels; %d query, %d train, %s%d database (split %s)",
        config.dataset.name,
        len(dataset),
        dataset.labels.shape[1],
        len(splits.query),
        len(splits.train),
        f"{len(splits.validation)} validation, " if len(splits.validation) else "",
        len(splits.database),
        splits.fingerprint,
    )
    return dataset


def build_model(
    config: Config, dataset: PairedDataset, loaded: Checkpoint | None, device: torch.device, *, training: bool
) -> HashingModel:
    """The model on its device: prepared afresh, or with the weights of a checkpoint.

    Args:
        config: The configuration.
        dataset: The open data set.
        loaded: A checkpoint of this library, or a state dict that the authors' code wrote; None to start afresh.
        device: Where the model goes.
        training: Whether it will be trained, which needs fields that encoding may not.

    Raises:
        UserError: If the method is not whole, the data lack a field that it needs, or the checkpoint does not fit.
    """
    cls: type[HashingModel] = MODELS.get(config.model.name)
    require_whole(cls, config.model.name)
    if training:
        dataset.require("train", config.model.reads(cls.fields - cls.optional_fields))
    for split in encoded_splits(dataset):
        needed = (cls.image_fields | cls.text_fields) - (cls.optional_fields - dataset.promised(split))
        dataset.require(split, config.model.reads(needed))
    states: dict[str, Tensors] = {}  # what stands before the names -> the model that the checkpoint may hold there
    if loaded is not None:
        inside = {"": loaded.model} if loaded.is_ours else unwrapped(loaded.model)
        states = {prefix: value if loaded.is_ours else cls.import_reference(value) for prefix, value in inside.items()}
        theirs = flatten(loaded.config).get("model.name") if loaded.is_ours else config.model.name
        if not isinstance(theirs, str):
            raise UserError(f"checkpoint {loaded.path} does not say which method it is of; use another")
        if theirs != config.model.name:
            raise UserError(
                f"checkpoint {loaded.path} is of {theirs}, not of {config.model.name}; give a config of {theirs}"
            )
    data = _data_info(cls, config, dataset, states, loaded)
    seed_torch(config.run.seed)  # here: finding the backbone may have trained one
    model = cls(config.model, data)
    for towers in model.modules():
        if isinstance(towers, CLIP) and data.backbone is None:
            _check_sizes(towers.shape, "the CLIP of model:", dataset)
    if loaded is None or not loaded.is_ours:
        model.prepare(data)
        require_backbone(model, data)
    if loaded is not None:
        load_weights(model, states, loaded)
    return model.to(device)


def _data_info(
    cls: type[HashingModel],
    config: Config,
    dataset: PairedDataset,
    states: Mapping[str, Tensors],
    loaded: Checkpoint | None,
) -> DataInfo:
    """What the model may know before the first batch; labels only if it names them."""
    fields = config.model.reads(cls.fields | cls.image_fields | cls.text_fields)
    backbone = None
    if isinstance(config.model, ClipModelConfig) and config.model.opens_backbone:
        prefix = "backbone."
        found = (
            {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            for state in states.values()
        )
        towers = next((inside for inside in found if inside), None)
        if loaded is None or towers is None:
            backbone = find_backbone(config)
        else:
            said = encoding_of(loaded).clip if KEY in loaded.meta else None
            backbone = Backbone(said or shape_in(loaded, towers), None, "the checkpoint")
        _check_sizes(backbone.shape, f"the backbone {config.model.backbone}", dataset)
    return DataInfo(
        num_train=len(dataset.splits.train),
        field_shapes={name: shape for name, shape in dataset.offers("train").items() if name in fields},
        train_labels=dataset.labels[dataset.splits.train].float() if "labels" in fields else None,
        backbone=backbone,
        seed=config.run.seed,
        cache_dir=config.run.cache_dir,
    )


def _check_sizes(shape: ClipShape, source: str, dataset: PairedDataset) -> None:
    """The data must have the sizes that the towers were made for.

    Args:
        shape: Of the towers.
        source: What they come from, for messages.
        dataset: The data.
    """
    offered = dataset.offers("train")
    if "image" in offered and offered["image"][-1] != shape.image_size:
        raise UserError(
            f"dataset.image_size is {offered['image'][-1]}, but {source} takes pictures of {shape.image_size} pixels; "
            f"set dataset.image_size={shape.image_size}"
        )
    if "text" in offered and offered["text"][0] > shape.context_length:
        raise UserError(
            f"dataset.text_length is {offered['text'][0]}, but {source} takes at most {shape.context_length} tokens; "
            f"set dataset.text_length={shape.context_length}"
        )
    ours = isinstance(dataset.columns["train"].get("text"), CaptionColumn)  # a data set may bring ids of its own
    if ours and shape.vocabulary != dataset.config.tokens:
        known = SMALLEST <= shape.vocabulary <= VOCABULARY
        remedy = f"set dataset.tokens={shape.vocabulary} if they are OpenAI's first" if known else "choose another"
        raise UserError(
            f"dataset.tokens is {dataset.config.tokens}, but {source} has a vocabulary of {shape.vocabulary} tokens, "
            f"OpenAI's of {VOCABULARY}; {remedy}"
        )


def load_weights(model: HashingModel, states: Mapping[str, Tensors], loaded: Checkpoint) -> None:
    """Copies a state into the model; every entry must fit, and none may be missing that codes depend on.

    Of the models that the checkpoint may hold, the one with the most names of this one. A reference checkpoint's entry
    that codes do not depend on may have another shape; it counts as missing.

    Args:
        model: The model.
        states: What stands before the names -> the model that the checkpoint may hold there, under our names.
        loaded: The checkpoint, for messages and whether it is ours.

    Raises:
        UserError: If none fits, two do, or a value is not finite.
    """
    own = model.state_dict()
    fitting = {prefix: len(own.keys() & state.keys()) for prefix, state in states.items()}
    prefix = max(fitting, key=lambda prefix: fitting[prefix])  # the first of equals, with the shortest prefix
    state = states[prefix]
    rivals = [other for other, count in fitting.items() if other != prefix and count == fitting[prefix] > 0]
    if any(not _same(state, states[rival]) for rival in rivals):
        raise UserError(
            f"checkpoint {loaded.path} holds several models that fit, under {prefix!r} and {rivals[0]!r}; save one"
        )
    if not loaded.is_ours:
        state = {
            name: value
            for name, value in state.items()
            if name not in own or value.shape == own[name].shape or not model.may_be_absent(name)
        }
    require_fit(model, state, loaded)
    if prefix:
        logger.info("%s: took the model under %r, %d entries", loaded.path, prefix, len(state))
    require_finite(state, f"checkpoint {loaded.path}")
    model.load_state_dict(state, strict=False)


def require_fit(model: HashingModel, state: Tensors, loaded: Checkpoint) -> None:
    """Refuses a state that lacks an entry which codes depend on, has another, or one of another shape or kind.

    Args:
        model: The model, perhaps without values (on torch's device `meta`).
        state: Tensors under its names.
        loaded: The checkpoint, for messages and whether it is ours: buffers of another's may be of another kind.

    Raises:
        UserError: With all of them.
    """
    own = model.state_dict()
    unknown = [name for name in state if name not in own]
    missing = [name for name in own if name not in state]
    if not loaded.is_ours:
        missing = [name for name in missing if not model.may_be_absent(name)]
    shapes = [
        f"{name}: {tuple(state[name].shape)} there, {tuple(own[name].shape)} here"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    strict = own.keys() if loaded.is_ours else dict(model.named_parameters()).keys()
    kinds = [
        f"{name} is {state[name].dtype} there, {own[name].dtype} here"
        for name in own
        if name in state and _kind(state[name]) != _kind(own[name]) and (name in strict or state[name].is_complex())
    ]
    if unknown or missing or shapes or kinds:
        what = [
            f"{len(names)} {kind} (first: {', '.join(names[:3])})"
            for kind, names in (
                ("entries missing", missing),
                ("unknown entries", unknown),
                ("other shapes", shapes),
                ("other kinds", kinds),
            )
            if names
        ]
        raise UserError(
            f"checkpoint {loaded.path} does not fit {type(model).__name__} with {model.bits} bits: {'; '.join(what)}; "
            "give the method, model.bits and the variant that it was trained with"
        )


def _kind(value: Tensor) -> tuple[bool, bool]:
    """Real, complex or whole numbers: copying one into another says nothing and changes what it means."""
    return value.is_floating_point(), value.is_complex()


def _same(one: Tensors, other: Tensors) -> bool:
    """Whether two states hold equal tensors under equal names."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def spare_memory(model: HashingModel, run: RunConfig) -> None:
    """Makes the model's CLIP compute a batch in `run.accumulate` parts, and its blocks again if `run.recompute`.

    Losses look at the whole batch, so those of parts of it must not be summed; what can be split is the backbone, which
    needs most of the memory.

    Raises:
        UserError: If the model trains no CLIP.
    """
    towers = [module for module in model.modules() if isinstance(module, CLIP)]
    trained = any(p.requires_grad for tower in towers for p in tower.parameters())
    if run.accumulate > 1 and not trained:
        raise UserError(
            f"run.accumulate is {run.accumulate}, but {type(model).__name__} trains no CLIP, the part that can compute "
            "a batch piece by piece; the loss needs the whole batch: set run.accumulate=1, or lower run.batch_size"
        )
    if run.recompute and not trained:
        raise UserError(
            f"run.recompute is true, but {type(model).__name__} trains no CLIP, whose blocks are what is computed "
            "again; set run.recompute=false, or lower run.batch_size"
        )
    for tower in towers:
        tower.parts = run.accumulate
        for stack in (tower.visual.transformer, tower.transformer):
            stack.recompute = run.recompute


def make_loader(
    config: Config, dataset: PairedDataset, split: Split, fields: frozenset[str], device: torch.device
) -> Loader:
    """The loader of a split as the configuration says; batches hold `fields` and `index`."""
    run, evaluate = config.run, config.evaluate
    return build_loader(
        dataset,
        split,
        fields,
        batch_size=run.batch_size if split == "train" else evaluate.batch_size,
        seed=run.seed,
        device=device,
        kind=run.loader,
        workers=run.workers,
        caption=evaluate.caption,
    )


def training_loader(config: Config, dataset: PairedDataset, model: HashingModel, device: torch.device) -> Loader:
    """The loader of the training split, once the model has seen what it can remember of it.

    Raises:
        UserError: If the model remembers fields, but all of them change from epoch to epoch.
    """
    wanted = model.rememberable_fields
    constant = wanted & dataset.constant_fields("train")
    if wanted and not constant:
        raise UserError(
            f"model.cache_features is true, but {', '.join(sorted(wanted))} of {config.dataset.name} change from epoch "
            "to epoch; set model.cache_features=false, or dataset.augment=false"
        )
    if constant:
        changing = f"; not of {', '.join(sorted(wanted - constant))}, which changes every epoch"
        logger.info(
            "keeping features of %s in memory%s", ", ".join(sorted(constant)), changing if wanted > constant else ""
        )
        loader = make_loader(config, dataset, "train", constant, device)
        with autocast(config.run.precision, device):
            for batch in progress(loader.epoch(0), total=len(loader), desc="features", unit="batch"):
                model.remember(batch)
    return make_loader(config, dataset, "train", model.fields - constant, device)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context of `run.precision` in which a model computes."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, torch.bfloat16)
