"""The baselines of the benchmarks compute what this library computes, so that only the way differs."""

import argparse

import torch

from benchmarks import search
from benchmarks.training import PublishedBertAdam, PublishedCLIP
from common.optimizers.bert_adam import BertAdam
from models.clip.towers import CLIP
from tests import tiny_models


def test_published_towers_give_the_same_features() -> None:
    torch.manual_seed(0)
    ours, published = CLIP(tiny_models.SHAPE), PublishedCLIP(tiny_models.SHAPE)
    published.load_state_dict(ours.state_dict())
    batch = tiny_models.rows_of()
    hidden = batch["text"] == 0
    pairs = [
        (published.image_tokens(batch["image"]), ours.image_tokens(batch["image"])),
        (published.text_features(batch["text"]), ours.text_features(batch["text"])),
        (published.text_features(batch["text"], hidden), ours.text_features(batch["text"], hidden)),
    ]
    for theirs, wanted in pairs:
        torch.testing.assert_close(theirs, wanted, rtol=1e-4, atol=1e-5)


def test_published_optimizer_makes_the_same_updates() -> None:
    settings = {
        "schedule": "warmup_cosine", "warmup": 0.1, "total_steps": 20, "b1": 0.9, "b2": 0.98, "eps": 1e-6,
        "weight_decay": 0.2, "max_grad_norm": 1.0,
    }  # fmt: skip
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (
        (ours, BertAdam([{"params": [ours], "lr": 0.01}], **settings)),  # type: ignore[arg-type]
        (theirs, PublishedBertAdam([{"params": [theirs], "lr": 0.01}], settings)),
    )
    for step in range(5):
        for parameter, optimizer in optimizers:
            parameter.grad = torch.sin(start * (step + 1)) * (step + 1)
            optimizer.step()
    assert not torch.equal(ours, start)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


def test_all_ways_of_searching_find_the_nearest() -> None:
    settings = argparse.Namespace(codes=2000, queries=16, bits=64, k=10, centres=50, repeats=1, threads=1, seed=1)
    ways = search.measure(settings)["ways"]
    recalls = {name: way["recall"] for name, way in ways.items() if "recall" in way}
    assert recalls.pop("ivf") > 0.5
    assert recalls and set(recalls.values()) == {1.0}
