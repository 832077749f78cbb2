"""A data set on disk and weights of a tiny CLIP, so that every method trains an epoch through `main.py` in seconds."""

from pathlib import Path

import numpy as np
import scipy.io
import torch
from PIL import Image

from common.types import ClipShape
from models.clip.towers import CLIP
from models.clip.weights import write_clip

SHAPE = ClipShape(
    embed_dim=64,
    image_size=32,
    patch_size=16,
    vision_width=64,
    vision_layers=1,
    text_width=64,
    text_layers=1,
    context_length=16,
    vocabulary=1024,
)
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
PAIRS, QUERY, TRAIN = 56, 8, 37  # with batches of 8 the last one is partial


def make_dataset(root: Path) -> Path:
    """Pictures of two coloured halves, with captions that name the colours and a label for each."""
    (root / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    names = list(COLOURS)
    paths, captions, labels = [], [], np.zeros((PAIRS, len(names)), np.uint8)
    for item in range(PAIRS):
        left, right = generator.choice(len(names), 2)
        pixels = generator.integers(0, 60, (40, 48, 3), np.uint8)
        pixels[:, :24] ^= np.array(COLOURS[names[left]], np.uint8)
        pixels[:, 24:] ^= np.array(COLOURS[names[right]], np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{item}.png")
        paths.append(f"images/{item}.png")
        captions.append(np.array([f"{names[left]} and {names[right]}", f"a {names[right]} picture, {names[left]} too"]))
        labels[item, [left, right]] = 1
    cells = np.empty(PAIRS, dtype=object)
    cells[:] = captions
    scipy.io.savemat(root / "index.mat", {"index": np.array(paths)})
    scipy.io.savemat(root / "caption.mat", {"caption": cells})
    scipy.io.savemat(root / "label.mat", {"category": labels})
    sentences = [f"drawing {item}, {texts[0]}" for item, texts in enumerate(captions)]
    scipy.io.savemat(root / "image_caption.mat", {"image_caption": np.array(sentences)})
    return root


def make_backbone(path: Path) -> Path:
    """Random weights of a tiny CLIP, as a safetensors file."""
    torch.manual_seed(0)
    write_clip(path, CLIP(SHAPE).state_dict(), {"source": "random"})
    return path


def overrides(root: Path, backbone: Path, cache: Path) -> list[str]:
    """`key=value` entries that put any method's COCO config on the tiny data, 16 bits, two epochs of five steps."""
    return [
        "dataset.name=tiny",
        f"dataset.root={root}",
        "dataset.image_size=32",
        "dataset.text_length=16",
        f"dataset.tokens={SHAPE.vocabulary}",
        "dataset.vocabulary=7",
        f"dataset.split.query={QUERY}",
        f"dataset.split.train={TRAIN}",
        f"model.backbone={backbone}",
        "model.bits=16",
        f"run.cache_dir={cache}",
        "run.device=cpu",
        "run.epochs=2",
        "run.batch_size=8",
        "run.log_every=2",
        "run.loader=memory",
        "evaluate.batch_size=16",
        "evaluate.cutoffs=[all]",
    ]
