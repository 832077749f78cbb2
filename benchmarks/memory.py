"""Memory that training CLIP needs by backbone and `run.recompute`, counted without a GPU and without computing.

    python -m benchmarks.memory                                   # ViT-B/32, ViT-B/16 and ViT-L/14, float32
    python -m benchmarks.memory --bf16 --towers ViT-B/32          # bf16, too, which is computed on the CPU: minutes

Counted: the bytes of all tensors that both towers, with all tokens, keep for their backward pass, for two numbers of
pairs; the difference is what a pair takes. Computed from it: the state (weights, gradients and both means of BertAdam,
16 bytes a parameter) and the largest batch for a card, with a fifth of it left free for what kernels, heads and losses
need beside this. With `run.recompute` one block's share is added, which backward makes anew.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import machine, print_table, write_results
from benchmarks.training import TOWERS
from models.clip.towers import CLIP
from runners.setup import autocast
from utils.output import say

LENGTH, PAIRS = 32, (2, 4)  # text length of the configs of COCO
CARDS = (24, 40, 80)  # GB
FREE = 0.2  # share of a card that is left free
STATE_BYTES = 16  # of a parameter: weight, gradient, two means


def kept_bytes(towers: CLIP, rows: int, precision: str) -> int:
    """Bytes that the towers keep for backward on `rows` pairs, their parameters not counted."""
    kept = {}
    own = {parameter.untyped_storage()._cdata for parameter in towers.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no address is used twice
        return tensor

    device, shape = towers.logit_scale.device, towers.shape
    image = torch.zeros(rows, 3, shape.image_size, shape.image_size, device=device)
    text = torch.zeros(rows, LENGTH, dtype=torch.int64, device=device)
    context = autocast(precision, device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context:
        features = towers.image_tokens(image), *towers.text_tokens(text, text == 0)
    total = sum(storage.nbytes() for address, storage in kept.items() if address not in own)
    del features
    return total


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures, as they are written; prints the table."""
    rows: dict[str, Any] = {}
    for name in args.towers:
        for precision in ("float32", "bf16") if args.bf16 else ("float32",):
            with torch.device("cpu" if precision == "bf16" else "meta"):
                towers = CLIP(TOWERS[name])
            state = STATE_BYTES * sum(parameter.numel() for parameter in towers.parameters())
            whole = 0.0
            for recompute in (False, True):
                for stack in (towers.visual.transformer, towers.transformer):
                    stack.recompute = recompute
                few, many = (kept_bytes(towers, pairs, precision) for pairs in PAIRS)
                pair = (many - few) / (PAIRS[1] - PAIRS[0])
                whole = whole or pair
                block = (whole - pair) / towers.shape.vision_layers  # 0 where nothing is computed again
                fixed = state + few - PAIRS[0] * pair
                rows[f"{name}, {precision}{', recompute' if recompute else ''}"] = {
                    "state_gb": state / 1e9,
                    "pair_mb": pair / 1e6,
                    "block_mb": block / 1e6,
                    **{f"batch_{gb}": int(((1 - FREE) * gb * 1e9 - fixed) / (pair + block)) for gb in CARDS},
                }
    say(f"{LENGTH} tokens a text; {machine(torch.device('cpu'))}")
    cards = [(f"batch, {gb} GB", f"batch_{gb}", ",") for gb in CARDS]
    print_table(rows, [("state GB", "state_gb", ".2f"), ("MB a pair", "pair_mb", ".1f"), *cards])
    return {"text_length": LENGTH, "machine": machine(torch.device("cpu")), "rows": rows}


def main() -> None:
    """Counts, prints a table, and writes the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    large = [name for name in TOWERS if name != "small"]
    parser.add_argument("--towers", nargs="+", choices=sorted(TOWERS), default=large)
    parser.add_argument("--bf16", action="store_true", help="count bf16, too")
    parser.add_argument("--output", type=Path, default=Path("result/benchmarks/memory.json"))
    args = parser.parse_args()
    write_results(args.output, measure(args))


if __name__ == "__main__":
    main()
