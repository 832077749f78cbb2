"""Speed of training against the way that published code trains, in one run, for any registered method.

    python -m benchmarks.training                                     # MITH; on a CPU with small towers
    python -m benchmarks.training --method DCMHT --towers ViT-B/32 --batch-size 16 --pictures 65 --steps 3
    python -m benchmarks.training --device cuda --compile

The baseline does what the published repositories do: float32, attention that returns its weights, text towers over all
tokens, an optimizer that goes through the tensors one by one, `.item()` after every step, and worker processes that
read, crop and tokenise one item at a time with Pillow. It gets this library's loss, so that both compute the same.

All ways train the same method on the same data from random weights, and take turns, some steps each. A step is
everything from batch to updated weights; waiting for the batch is counted apart. The limit is what the operations of a
step (counted, forward and backward) would take at the speed of the machine's fastest bf16 matrix product (measured).
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.loading import make_data, published
from benchmarks.report import machine, print_table, write_results
from common.config import Config, load_config
from common.optim import build_optimizers
from common.optimizers.base import scheduled_factor
from common.registry import DATASETS, MODELS
from common.types import Backbone, Batch, ClipShape, DataInfo, Progress
from dataset.mat import MatDataset
from models.base import HashingModel
from models.clip.towers import CLIP, Attention, ResidualBlock
from runners.setup import autocast, make_loader, spare_memory
from runners.steps import updates
from utils.output import say

LOADERS = {"memory": "run.loader=memory", "workers, cache": "dataset.cache={}/cache"}  # name -> setting
CONFIGS = Path(__file__).parents[1] / "configs"
TOWERS = {
    "ViT-B/32": ClipShape(512, 224, 32, 768, 12, 512, 12, 77, 49408),
    "ViT-B/16": ClipShape(512, 224, 16, 768, 12, 512, 12, 77, 49408),
    "ViT-L/14": ClipShape(768, 224, 14, 1024, 24, 768, 12, 77, 49408),
    "small": ClipShape(128, 224, 32, 128, 3, 128, 3, 77, 49408),
}


# ---------------------------------------------------------------------------------------------- the published way


class PublishedAttention(Attention):
    """Attention of the same weights that makes its weights, [B, L, L], a tensor and returns their mean over heads."""

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Attends over tokens [B, L, W]; returns [B, L, W]."""
        length = x.shape[1]
        if causal and mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        hidden = None if mask is None else ~mask.expand(len(x), self.heads, length, length).flatten(0, 1)
        tokens = x.transpose(0, 1)
        out, _ = F.multi_head_attention_forward(
            tokens, tokens, tokens, x.shape[2], self.heads, self.in_proj_weight, self.in_proj_bias, None, None, False,
            0.0, self.out_proj.weight, self.out_proj.bias, self.training, attn_mask=hidden, need_weights=True,
        )  # fmt: skip
        return out.transpose(0, 1)


class PublishedQuickGELU(nn.Module):
    """The activation as it is written in OpenAI's release."""

    def forward(self, u: Tensor) -> Tensor:
        """Elementwise on `u` [...]; returns [...]."""
        return u * torch.sigmoid(1.702 * u)


class PublishedCLIP(CLIP):
    """The same towers, computed as OpenAI's release does; the parameters have the same names."""

    def __init__(self, shape: ClipShape) -> None:
        super().__init__(shape)
        for block in [module for module in self.modules() if isinstance(module, ResidualBlock)]:
            block.attn = PublishedAttention(block.attn.out_proj.in_features, block.attn.heads)
            block.mlp.gelu = PublishedQuickGELU()

    def text_features(self, ids: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Pooled features [B, E] of texts [B, L], all L tokens computed."""
        return self.text_tokens(ids, key_padding_mask)[0]


class PublishedBertAdam(torch.optim.Optimizer):
    """BertAdam tensor by tensor; settings as `common.optimizers.bert_adam.BertAdam`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every tensor that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {"n": 0, "m": torch.zeros_like(parameter), "v": torch.zeros_like(parameter)}
                nn.utils.clip_grad_norm_(parameter, group["max_grad_norm"])
                state["m"].mul_(group["b1"]).add_(parameter.grad, alpha=1 - group["b1"])
                state["v"].mul_(group["b2"]).addcmul_(parameter.grad, parameter.grad, value=1 - group["b2"])
                update = state["m"] / (state["v"].sqrt() + group["eps"]) + group["weight_decay"] * parameter
                done = state["n"] / group["total_steps"]
                parameter.add_(update, alpha=-group["lr"] * scheduled_factor(group["schedule"], done, group["warmup"]))
                state["n"] += 1


# ---------------------------------------------------------------------------------------------- ways to train


@dataclass
class Way:
    """One way to train and what was measured of it, in seconds a step.

    Attributes:
        batches: Endless batches.
        step: Trains on one.
    """

    batches: Iterator[Batch]
    step: Callable[[Batch, int], None]
    waiting: list[float] = field(default_factory=list)
    stepping: list[float] = field(default_factory=list)
    peak_mb: float | None = None

    def take(self, steps: int, device: torch.device) -> None:
        """Trains some steps and keeps their times."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(steps):
            start = time.perf_counter()
            batch = next(self.batches)
            ready = time.perf_counter()
            self.step(batch, len(self.stepping))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.waiting.append(ready - start)
            self.stepping.append(time.perf_counter() - ready)
        if device.type == "cuda":
            self.peak_mb = max(self.peak_mb or 0.0, torch.cuda.max_memory_allocated(device) / 1e6)


def build(config: Config, data: MatDataset, shape: ClipShape, towers: type[CLIP], device: torch.device) -> HashingModel:
    """The method with towers of random weights, the same at every call."""
    cls: type[HashingModel] = MODELS.get(config.model.name)
    torch.manual_seed(config.run.seed)
    info = DataInfo(
        num_train=len(data.splits.train),
        field_shapes={
            name: value for name, value in data.offers("train").items() if name in config.model.reads(cls.fields)
        },
        train_labels=data.labels[data.splits.train].float(),
        backbone=Backbone(shape, None, "random weights"),
        seed=config.run.seed,
        cache_dir=config.run.cache_dir,
    )
    model = cls(config.model, info)
    backbone = towers(shape)
    backbone.logit_scale.requires_grad_(False)
    backbone.load_state_dict(model.backbone.state_dict())  # type: ignore[union-attr]
    model.backbone = backbone
    model.prepare(info)
    return model.to(device).train()


def our_way(
    config: Config, data: MatDataset, model: HashingModel, batches: Iterator[Batch], precision: str, compiled: bool
) -> Way:
    """A step as `runners/runner.py` takes it."""
    device = next(model.parameters()).device
    optimizers = build_optimizers(config.optim, model.param_groups(), 10**6)
    module: Callable[..., Any] = torch.compile(model) if compiled else model

    def step(batch: Batch, number: int) -> None:
        context: AbstractContextManager[Any] = autocast(precision, device)
        with context:
            output = module(batch, Progress(0, 1, number, 10**6))
        for _ in updates(output, optimizers, lambda: autocast(precision, device)):
            pass

    return Way(batches, step)


def published_way(config: Config, data: MatDataset, model: HashingModel, workers: int) -> Way:
    """The baseline; parts that do not train with BertAdam keep their optimizer."""
    device = next(model.parameters()).device
    optimizers = []
    for optimizer in build_optimizers(config.optim, model.param_groups(), 10**6).values():
        plain = "max_grad_norm" in optimizer.defaults
        optimizers.append(PublishedBertAdam(optimizer.param_groups, optimizer.defaults) if plain else optimizer)
    loader = published(data, config.run.batch_size, workers)

    def batches() -> Iterator[Batch]:
        while True:
            for image, text, labels, index in loader:
                fields = {"image": image, "text": text, "labels": labels, "index": index}
                yield Batch({name: value.to(device) for name, value in fields.items()})

    def step(batch: Batch, number: int) -> None:
        output = model(batch, Progress(0, 1, number, 10**6))
        for optimizer in optimizers:
            optimizer.zero_grad()
        output.loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        output.loss.item()

    return Way(batches(), step)


def endless(config: Config, data: MatDataset, fields: frozenset[str], device: torch.device) -> Iterator[Batch]:
    """This library's training batches, epoch after epoch."""
    loader = make_loader(config, data, "train", fields, device)
    for epoch in itertools.count():
        yield from loader.epoch(epoch)


def fastest_product(device: torch.device) -> float:
    """Operations a second of the fastest of some bf16 matrix products."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        b = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best if b.numel() else 0.0


# ---------------------------------------------------------------------------------------------- measuring


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures, as they are written; prints the table."""
    device, shape = args.device, TOWERS[args.towers]
    make_data(folder / "data", args.pictures, args.seed)
    splits = f"{{protocol: permutation, seed: 1, query: 1, train: {args.pictures - 1}, validation: 0, per_label: null}}"

    def settings(*overrides: str) -> Config:
        return load_config(
            CONFIGS / args.method / "coco.yaml",
            [f"dataset.root={folder / 'data'}", f"dataset.split={splits}", f"run.cache_dir={folder / 'centres'}",
             f"run.seed={args.seed}", f"run.batch_size={args.batch_size}", f"run.workers={args.workers}", *overrides],
        )  # fmt: skip

    ways: dict[str, Way] = {}
    config = settings()
    data: MatDataset = DATASETS.get(config.dataset.type)(config.dataset)
    ways["published way"] = published_way(config, data, build(config, data, shape, PublishedCLIP, device), args.workers)
    names = ["float32", "bf16"]
    if args.compile:
        names.append("bf16, compiled")
    if args.recompute:
        names += ["float32, recompute", "bf16, recompute"]
    for name in names:
        for kind, override in LOADERS.items():
            if kind not in args.loaders:
                continue
            config = settings(override.format(folder), f"run.recompute={str('recompute' in name).lower()}")
            data = DATASETS.get(config.dataset.type)(config.dataset)
            model = build(config, data, shape, CLIP, device)
            spare_memory(model, config.run)
            batches = endless(config, data, model.fields, device)
            precision = name.partition(",")[0]
            ways[f"{name}; {kind}"] = our_way(config, data, model, batches, precision, "compiled" in name)

    for way in ways.values():  # workers start, caches and memories fill, code is compiled
        way.take(args.warmup, device)
        way.waiting.clear()
        way.stepping.clear()
    counter = FlopCounterMode(display=False)
    ours = next(way for name, way in ways.items() if name.startswith("float32;"))
    with counter:
        ours.step(next(ours.batches), 0)
    operations, peak = counter.get_total_flops() / args.batch_size, fastest_product(device)
    for _ in range(args.repeats):  # interleaved, so that a busy moment of the machine meets all alike
        for way in ways.values():
            way.take(args.steps, device)

    slowest = ways["published way"]
    base_step = statistics.median(slowest.stepping)
    base_all = sum(slowest.stepping) + sum(slowest.waiting)
    results: dict[str, Any] = {
        "settings": vars(args) | {"device": str(device), "output": str(args.output)},
        "machine": machine(device),
        "operations_of_a_pair": operations,
        "fastest_product_per_s": peak,
        "ways": {
            name: {
                "pairs_per_s": args.batch_size * len(way.stepping) / (sum(way.stepping) + sum(way.waiting)),
                "step_median_s": statistics.median(way.stepping),
                "step_p95_s": float(np.quantile(way.stepping, 0.95)),
                "waiting_share": sum(way.waiting) / (sum(way.stepping) + sum(way.waiting)),
                "share_of_peak": operations * args.batch_size / statistics.median(way.stepping) / peak,
                "peak_mb": way.peak_mb,
                "step_ratio_to_published_way": base_step / statistics.median(way.stepping),
                "ratio_to_published_way": base_all / (sum(way.stepping) + sum(way.waiting)),
            }
            for name, way in ways.items()
        },
    }
    say(
        f"{args.method}, towers {args.towers}, batches of {args.batch_size}, {args.workers} worker processes, "
        f"{args.repeats} turns of {args.steps} steps; {results['machine']}"
    )
    say(f"{operations / 1e9:.1f} GFLOP a pair; fastest bf16 product {peak / 1e12:.2f} TFLOP/s")
    columns = [
        ("pairs / s", "pairs_per_s", ".1f"), ("step s", "step_median_s", ".4f"), ("p95 s", "step_p95_s", ".4f"),
        ("waiting", "waiting_share", ".0%"), ("of peak", "share_of_peak", ".1%"), ("peak MB", "peak_mb", ".0f"),
        ("step x", "step_ratio_to_published_way", ".2f"), ("x published", "ratio_to_published_way", ".2f"),
    ]  # fmt: skip
    print_table(results["ways"], columns)
    return results


def main() -> None:
    """Measures, prints a table, and writes the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    card = torch.cuda.is_available()
    parser.add_argument("--method", default="MITH", help="MITH, DCMHT, DSPH, or another that needs no more fields")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if card else "cpu"))
    parser.add_argument("--towers", choices=sorted(TOWERS), default="ViT-B/32" if card else "small")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--pictures", type=int, default=1025)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--compile", action="store_true", help="measure bf16 with torch.compile, too")
    parser.add_argument("--recompute", action="store_true", help="measure both precisions with run.recompute, too")
    parser.add_argument("--loaders", nargs="+", choices=list(LOADERS), default=list(LOADERS),
                        help="fewer need less memory: every way holds a model")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("result/benchmarks/training.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), args)
    write_results(args.output, results)


if __name__ == "__main__":
    main()
