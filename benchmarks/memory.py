"""Memory that training needs by backbone, precision and `run.recompute`, without a GPU: what backward keeps is counted.

    python -m benchmarks.memory                                   # MITH with ViT-B/32, ViT-B/16 and ViT-L/14
    python -m benchmarks.memory --method DSPH --towers ViT-B/32

Counted (measured): the bytes of all tensors that a training step keeps for its backward pass, for two numbers of pairs;
their difference is what a pair takes. Computed from it: the state (weights, gradients and both means of BertAdam, 16
bytes a parameter) and the largest batch for a card, with a tenth of it left free. With `run.recompute` one block's
share is added, which backward makes anew. What kernels need beside this, and losses that grow with the square of the
batch, are not in it.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import machine, print_table, write_results
from benchmarks.training import CONFIGS, TOWERS
from common.config import Config, load_config
from common.registry import MODELS
from common.types import Backbone, Batch, ClipShape, DataInfo, Progress
from models.base import HashingModel
from models.clip.towers import CLIP
from runners.setup import autocast, spare_memory
from utils.output import say

CLASSES, LENGTH, PAIRS = 80, 32, (4, 8)  # COCO's labels, and the text length of its configs
CARDS = (24, 40, 80)  # GB
FREE = 0.1  # share of a card that is left free
STATE_BYTES = 16  # of a parameter: weight, gradient, two means


def random_rows(shape: ClipShape, rows: int) -> Batch:
    """Pairs of noise, with what MITH, DCMHT, DSPH and their like read."""
    draw = torch.Generator().manual_seed(rows)
    text = torch.randint(1, shape.end_of_text - 1, (rows, LENGTH), generator=draw)
    text[:, -1] = shape.end_of_text
    return Batch(
        {
            "index": torch.arange(rows),
            "image": torch.randn(rows, 3, shape.image_size, shape.image_size, generator=draw),
            "text": text,
            "labels": torch.eye(CLASSES)[torch.arange(rows) % CLASSES],
        }
    )


def build(config: Config, shape: ClipShape, cache_dir: str) -> HashingModel:
    """The method with towers of random weights."""
    batch = random_rows(shape, max(PAIRS))
    torch.manual_seed(config.run.seed)
    data = DataInfo(
        num_train=len(batch["labels"]),
        field_shapes={name: tuple(value.shape[1:]) for name, value in batch.items()},
        train_labels=batch["labels"],
        backbone=Backbone(shape, None, "random weights"),
        seed=config.run.seed,
        cache_dir=cache_dir,
    )
    model: HashingModel = MODELS.get(config.model.name)(config.model, data)
    model.prepare(data)
    return model.train()


def kept_bytes(model: HashingModel, rows: int, precision: str) -> int:
    """Bytes that a training step keeps for backward, its parameters not counted."""
    towers = next(module for module in model.modules() if isinstance(module, CLIP))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = random_rows(towers.shape, rows).only(model.fields)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        autocast(precision, torch.device("cpu")),
    ):
        output = model(batch, Progress(0, 1, 0, 1))
    total = sum(kept.values())  # while the graph of `output` keeps them, so that no address is used twice
    del output
    return total


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures, as they are written; prints the table."""
    rows: dict[str, Any] = {}
    for name in args.towers:
        shape = TOWERS[name]
        with tempfile.TemporaryDirectory() as folder:
            config = load_config(CONFIGS / args.method / "coco.yaml", [f"run.cache_dir={folder}"])
            model = build(config, shape, folder)
        state = STATE_BYTES * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        for precision in ("float32", "bf16"):
            found = []
            for recompute in (False, True):
                spare_memory(model, config.run.model_copy(update={"recompute": recompute}))
                few, many = (kept_bytes(model, pairs, precision) for pairs in PAIRS)
                found.append((few, (many - few) / (PAIRS[1] - PAIRS[0])))
            for recompute, (few, pair) in zip((False, True), found, strict=True):
                block = (found[0][1] - pair) / shape.vision_layers  # 0 where nothing is computed again
                fixed = state + few - PAIRS[0] * pair
                rows[f"{name}, {precision}{', recompute' if recompute else ''}"] = {
                    "parameters": state // STATE_BYTES,
                    "state_gb": state / 1e9,
                    "fixed_gb": fixed / 1e9,
                    "pair_mb": pair / 1e6,
                    "block_mb": block / 1e6,
                    **{f"batch_{gb}": int(((1 - FREE) * gb * 1e9 - fixed) / (pair + block)) for gb in CARDS},
                }
    results = {
        "settings": {"method": args.method, "towers": args.towers, "text_length": LENGTH, "classes": CLASSES},
        "machine": machine(torch.device("cpu")),
        "rows": rows,
    }
    say(f"{args.method}, {LENGTH} tokens a text; {results['machine']}")
    cards = [(f"batch, {gb} GB", f"batch_{gb}", ",") for gb in CARDS]
    print_table(rows, [("state GB", "state_gb", ".2f"), ("MB a pair", "pair_mb", ".1f"), *cards])
    return results


def main() -> None:
    """Measures, prints a table, and writes the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="MITH", help="MITH, DCMHT, DSPH, or another that needs no more fields")
    large = [name for name in TOWERS if name != "small"]
    parser.add_argument("--towers", nargs="+", choices=sorted(TOWERS), default=large)
    parser.add_argument("--output", type=Path, default=Path("result/benchmarks/memory.json"))
    args = parser.parse_args()
    write_results(args.output, measure(args))


if __name__ == "__main__":
    main()
