"""Speed and memory of the training loader against the way that published code reads its pictures, in one run.

    python -m benchmarks.loading                                          # 2,000 pictures of 500 x 375, two processes
    python -m benchmarks.loading --pictures 400 --repeats 3

The baseline is written from what the published repositories do for every item, in as many worker processes: open with
Pillow, flip, random resized crop, to tensor, normalise, tokenise one caption. It gets this library's tokenizer, and
workers that outlive the epoch. The limit is what remains if nothing were computed: the stored bytes of every picture
are read once, and its numbers written once, by as many threads.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import scipy.io
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.report import machine, print_table, write_results
from common.yaml_layers import read_yaml
from dataset.loader import Loader, build_loader
from dataset.mat import MatConfig, MatDataset
from dataset.pictures.cache import CachedPictures, cached_pictures
from dataset.pictures.transforms import MEAN, STD
from dataset.texts.tokenizer import tokenize
from utils.output import say
from utils.progress import progress

WIDTH, HEIGHT, QUALITY = 500, 375, 90  # as COCO's and Flickr's pictures
FIELDS = frozenset({"image", "text", "labels"})
CONFIG = Path(__file__).parents[1] / "configs" / "datasets" / "coco.yaml"
WORDS = "a two the man dog street red bicycle riding near table with plate of food and on in cat bus".split()


def make_data(root: Path, pictures: int, seed: int) -> None:
    """Writes JPEGs with structure and grain, so that they take about as many bytes as photographs, and five captions.

    Args:
        root: Where to.
        pictures: How many.
        seed: Of the draw.
    """
    (root / "images").mkdir(parents=True)
    captions = np.empty(pictures, dtype=object)
    names = [f"images/{number}.jpg" for number in range(pictures)]
    for number in progress(range(pictures), desc="JPEGs", unit="picture"):
        draw = np.random.default_rng((seed, number))
        coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        grain = draw.standard_normal((HEIGHT, WIDTH, 3), np.float32) * 6
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(root / names[number], quality=QUALITY)
        captions[number] = np.array([" ".join(draw.choice(WORDS, 11)) for _ in range(5)])
    scipy.io.savemat(root / "index.mat", {"index": np.array(names)})
    scipy.io.savemat(root / "caption.mat", {"caption": captions})
    scipy.io.savemat(root / "label.mat", {"category": np.ones((pictures, 80), np.uint8)})


def open_data(root: Path, pictures: int, cache: Path | None) -> MatDataset:
    """The data set with COCO's settings, its pictures augmented; all but one of them are trained on."""
    section = read_yaml(CONFIG.read_text(encoding="utf-8"), str(CONFIG))["dataset"]
    section["split"] |= {"query": 1, "train": pictures - 1}
    section |= {"root": str(root), "augment": True, "cache": None if cache is None else str(cache)}
    return MatDataset(MatConfig.model_validate(section))


class PublishedItems(Dataset[tuple[Tensor, Tensor, Tensor, int]]):
    """One item at a time, as published code reads it.

    Args:
        paths: Picture files.
        captions: Texts of every item.
        labels: Multi-hot labels, [N, C] float32.
        size: Side R in pixels.
        length: Tokens L.
    """

    def __init__(
        self, paths: Sequence[str], captions: Sequence[Sequence[str]], labels: Tensor, size: int, length: int
    ) -> None:
        self.paths, self.captions, self.labels, self.length = paths, captions, labels, length
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.RandomResizedCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor, int]:
        image = self.transform(Image.open(self.paths[row]).convert("RGB"))
        texts = self.captions[row]
        text = tokenize([texts[int(torch.randint(len(texts), ()))]], self.length)[0]
        return image, text, self.labels[row], row


def published(data: MatDataset, batch_size: int, workers: int) -> DataLoader[Any]:
    """The baseline on the training split."""
    items = data.splits.train.tolist()
    files, column = data.pictures.files(), data.columns["train"]["text"]
    captions = column.captions.texts  # type: ignore[attr-defined]
    dataset = PublishedItems(
        [files[item] for item in items],  # type: ignore[index]
        [captions[item] for item in items],
        data.labels[data.splits.train].float(),
        data.config.image_size,
        data.config.text_length,
    )
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def touch(pictures: CachedPictures, size: int, threads: int) -> None:
    """Reads all stored bytes once and writes as many numbers as the batches of an epoch hold.

    Args:
        pictures: The cache.
        size: Side R in pixels.
        threads: How many share the work.
    """

    def work(number: int) -> None:
        np.asarray(pictures.read(number)).max()
        np.full((3, size, size), 1, np.float32)

    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for _ in pool.map(work, range(len(pictures))):
            pass


def pinned_megabytes() -> float:
    """Memory of this process and of those it started that cannot be dropped: pages of files do not count. MB."""
    total, waiting = 0, [os.getpid()]
    while waiting:
        process = Path("/proc") / str(waiting.pop())
        try:
            for children in process.glob("task/*/children"):
                waiting += map(int, children.read_text().split())
            for line in (process / "smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    total += int(line.split()[1]) * 1024
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total / 1e6


def peak_megabytes(work: Callable[[], Any]) -> float:
    """Runs once; returns the peak of memory above its start, MB."""
    start = peak = pinned_megabytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, pinned_megabytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return peak - start


def seconds_of(work: Callable[[], Any]) -> float:
    """Runs once and returns the seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def drain(batches: Any) -> None:
    """Takes every batch and lets it go."""
    for _ in batches:
        pass


def main() -> None:
    """Measures, prints a table, and writes the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("result/benchmarks/loading.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), args)
    write_results(args.output, results)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures, as they are written; prints the table."""
    make_data(folder / "data", args.pictures, args.seed)
    plain, stored = (open_data(folder / "data", args.pictures, cache) for cache in (None, folder / "cache"))
    config = plain.config

    def loader_of(data: MatDataset) -> Loader:
        return build_loader(
            data, "train", FIELDS, batch_size=args.batch_size, seed=args.seed, device=torch.device("cpu"),
            kind="workers", workers=args.workers, caption="random",
        )  # fmt: skip

    built: list[Loader] = []
    build_seconds = seconds_of(lambda: built.append(loader_of(stored)))
    without, within, baseline = loader_of(plain), built[0], published(plain, args.batch_size, args.workers)
    cache = cached_pictures(plain.pictures, folder / "cache", config.name, config.stored_size)
    epochs = iter(range(10**6))
    ways: dict[str, Callable[[], Any]] = {
        "published way": lambda: drain(baseline),
        "workers, no cache": lambda: drain(without.epoch(next(epochs))),
        "workers, cache": lambda: drain(within.epoch(next(epochs))),
        "reading and writing alone": lambda: touch(cache, config.image_size, args.workers),
    }
    megabytes = {name: peak_megabytes(work) for name, work in ways.items()}  # and all workers run, all code is compiled
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):  # interleaved, so that a busy moment of the machine meets all alike
        for name, work in ways.items():
            seconds[name].append(seconds_of(work))

    rows = args.pictures - 1
    slowest = statistics.median(seconds["published way"])
    stored_bytes = int(cache.starts[-1])
    results: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "machine": f"{machine(torch.device('cpu'))}, Pillow {PIL.__version__}",
        "bytes_of_a_jpeg": sum(map(os.path.getsize, plain.pictures.files() or ())) / args.pictures,
        "bytes_of_a_stored_picture": stored_bytes / args.pictures,
        "cache_build_s": build_seconds,
        "ways": {
            name: {
                "samples_per_s": rows / statistics.median(seconds[name]),
                "fastest_samples_per_s": rows / min(seconds[name]),
                "peak_mb": megabytes[name],
                "ratio_to_published_way": slowest / statistics.median(seconds[name]),
            }
            for name in ways
        },
    }
    say(
        f"{args.pictures} JPEGs of {WIDTH} x {HEIGHT}, {results['bytes_of_a_jpeg'] / 1e3:.0f} kB each; batches of "
        f"{args.batch_size}, {args.workers} worker processes, medians of {args.repeats} epochs; {results['machine']}"
    )
    columns = [("samples / s", "samples_per_s", ".0f"), ("fastest", "fastest_samples_per_s", ".0f"),
               ("peak MB", "peak_mb", ".0f"), ("x published", "ratio_to_published_way", ".2f")]  # fmt: skip
    print_table(results["ways"], columns)
    say(
        f"cache of {stored_bytes / 1e6:.0f} MB ({results['bytes_of_a_stored_picture'] / 1e3:.0f} kB a picture), "
        f"built in {build_seconds:.1f} s, opening included"
    )
    return results


if __name__ == "__main__":
    main()
