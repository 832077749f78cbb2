"""Pictures a second of the encoder, and of indexing, beside the evaluation of the same checkpoint, in one run.

    python -m benchmarks.encoding result/MITH/openmoji-32bits-seed1/best.pt

All encode the pictures of the checkpoint's database split from their files. `model alone` has them decoded already:
what remains is the model, which no way of reading can beat. `--index, from nothing` takes the whole folder of the
pictures, loads the checkpoint, and writes everything.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import machine, print_table, write_results
from common.checkpoint_config import checkpoint_config
from dataset.loader import Loader, build_loader
from runners.encoder import Encoder
from runners.search.building import build_index
from runners.setup import autocast, open_dataset
from utils.output import say


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description="Pictures a second of the encoder beside the evaluation.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of the evaluation's loader")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("result/benchmarks/encoding.json"))
    args = parser.parse_args()
    write_results(args.output, measure(args))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures, as they are written; prints the table."""
    encoder = Encoder.load(args.checkpoint, device=args.device)
    config = checkpoint_config(encoder.tree, args.checkpoint, [])
    dataset = open_dataset(config)
    files, items = dataset.pictures.files() or (), dataset.splits.database.tolist()
    paths = [files[item] for item in items]

    def loader_of(kind: Any) -> Loader:
        return build_loader(
            dataset, "database", frozenset({"image"}), batch_size=encoder.batch_size, seed=config.run.seed,
            device=encoder.device, kind=kind, workers=args.workers, caption="first",
        )  # fmt: skip

    def index() -> None:
        with tempfile.TemporaryDirectory() as folder:
            opened, _ = build_index(args.checkpoint, [str(Path(paths[0]).parent)], Path(folder) / "index")
            opened.close()

    workers, memory = loader_of("workers"), loader_of("memory")
    ways: dict[str, Callable[[], Any]] = {
        "evaluation, workers": lambda: evaluate(encoder, workers),
        "Encoder.images": lambda: encoder.images(paths),
        "--index, from nothing": index,
        "model alone": lambda: evaluate(encoder, memory),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(args.repeats + 1):  # interleaved, so that a busy moment of the machine meets all alike
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            if repeat:  # the first warms up: files are read, memory is filled, code is compiled
                seconds[name].append(time.perf_counter() - start)
    in_folder = sum(Path(file).parent == Path(paths[0]).parent for file in files)
    counts = {name: in_folder if work is index else len(paths) for name, work in ways.items()}
    base = len(paths) / statistics.median(seconds["evaluation, workers"])
    results: dict[str, Any] = {
        "settings": {name: str(value) for name, value in vars(args).items() if name != "output"},
        "machine": machine(encoder.device),
        "pictures": len(paths),
        "ways": {
            name: {
                "pictures_per_s": counts[name] / statistics.median(taken),
                "fastest_pictures_per_s": counts[name] / min(taken),
                "ratio_to_evaluation": counts[name] / statistics.median(taken) / base,
            }
            for name, taken in seconds.items()
        },
    }
    say(
        f"{len(paths)} pictures, batches of {encoder.batch_size}, {args.workers} worker processes, medians of "
        f"{args.repeats} passes; {results['machine']}"
    )
    columns = [("pictures / s", "pictures_per_s", ".0f"), ("fastest", "fastest_pictures_per_s", ".0f"),
               ("x evaluation", "ratio_to_evaluation", ".2f")]  # fmt: skip
    print_table(results["ways"], columns)
    return results


@torch.no_grad()
def evaluate(encoder: Encoder, loader: Loader) -> None:
    """Encodes the pictures of a split as `runners.evaluation.encode_split` does."""
    for batch in loader.once():
        with autocast(encoder.encoding.precision, encoder.device):
            encoder.model.encode_image(batch).to(torch.int8).cpu()


if __name__ == "__main__":
    main()
