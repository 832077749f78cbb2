"""From a model and two splits to codes, and from codes to retrieval numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.io
import torch
from torch import Tensor

from common.checkpoint import load
from common.code_statistics import code_report, squared_gaps
from common.config import Config
from common.errors import UserError
from common.metrics import mean_over_queries, retrieval_values
from common.pair_metrics import pair_report, partner_values
from common.schemas import EvaluateConfig
from dataset.base import PairedDataset
from dataset.loader import Loader
from dataset.splits import Split
from models.base import HashingModel
from models.blocks.heads import watch_relaxed
from runners.results import results_table, summarise
from runners.selection import BITS, KEYS, Entry, Reports, require_measurable
from runners.setup import autocast, build_model, encoded_splits, make_loader, open_dataset
from utils.distributed import barrier, gather_rows, is_main, rank, world_size
from utils.files import atomic, make_folder, write_json
from utils.launch import pick_device
from utils.output import say
from utils.progress import progress

Precisions = dict[str, Tensor]  # "<bits>/<direction>/<name of a mAP>" -> [Q] float64, NaN without a relevant item
DIRECTIONS = {"i2t": ("image", "text"), "t2i": ("text", "image"), "i2i": ("image", "image"), "t2t": ("text", "text")}


@dataclass(frozen=True)
class SplitCodes:
    """Codes of every row of a split, in the split's order.

    Attributes:
        image: Codes of the pictures, [N, K] or, n an item, [N, n, K]; int8 in {-1, +1}.
        text: Codes of the texts, of the same shape.
        labels: Multi-hot labels, [N, C] bool.
        gaps: By modality, the mean over the whole split of (u - sign u)^2 of every bit of what was binarised, [K];
            [0] where the method binarises otherwise, and none where nobody asked.
    """

    image: Tensor
    text: Tensor
    labels: Tensor
    gaps: dict[str, Tensor] = field(default_factory=dict)

    def columns(self, start: int, stop: int) -> "SplitCodes":
        """The same rows with the bits `start` to `stop` of every code."""
        gaps = {name: values[start:stop] for name, values in self.gaps.items()}
        return SplitCodes(self.image[..., start:stop], self.text[..., start:stop], self.labels, gaps)

    def rows(self, places: Tensor) -> "SplitCodes":
        """Some of the rows, by their places in the split, [n] int64."""
        return SplitCodes(self.image[places], self.text[places], self.labels[places])


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        codes: Codes of the splits that asked, and of the database.
        reports: Of every split that asked: retrieval numbers by code length, see `evaluate_codes`.
        bits: What the database's codes are like, by code length, see `describe_codes`.
        precisions: Of every split that asked: average precisions of every query, see `evaluate_codes`.
    """

    codes: dict[Split, SplitCodes]
    reports: dict[Split, Reports]
    bits: Reports
    precisions: dict[Split, Precisions]

    @property
    def entry(self) -> Entry:
        """What a run's history keeps of it, beside the epoch."""
        return {**{KEYS[split]: numbers for split, numbers in self.reports.items()}, BITS: self.bits}


@torch.no_grad()
def encode_split(
    model: HashingModel, loader: Loader, labels: Tensor, precision: str, check: Callable[[], None]
) -> SplitCodes:
    """Encodes every row of a split once, over all processes.

    Args:
        model: The method; its image codes see only `image_fields`, its text codes only `text_fields`.
        loader: The split's loader.
        labels: The split's labels, [N, C] bool, in the split's order.
        precision: `run.precision`.
        check: Called before every batch; raises to stop.

    Returns:
        Codes on the CPU, the same on every process.

    Raises:
        UserError: If codes have another shape than the model says, or are not +-1.
        RuntimeError: If a row came twice or never.
    """
    was_training = model.training
    model.eval()
    index: list[Tensor] = []
    codes: dict[str, list[Tensor]] = {"image": [], "text": []}
    gaps: dict[str, list[Tensor]] = {"image": [], "text": []}
    encoders = {"image": (model.encode_image, model.image_fields), "text": (model.encode_text, model.text_fields)}
    batches = -(-len(loader.own_rows) // loader.batch_size)
    for batch in progress(loader.once(), total=batches, desc="encode", unit="batch", leave=False):
        check()
        with autocast(precision, batch["index"].device):
            index.append(batch["index"])
            for side, (encode, fields) in encoders.items():
                with watch_relaxed() as relaxed:
                    signs = encode(batch.only(fields))
                _require_codes(signs, (len(batch["index"]), *model.code_shape), f"{type(model).__name__}.encode_{side}")
                codes[side].append((signs * (signs.abs() == 1)).to(torch.int8))  # 0 for what is no sign, such as 1.5
                gaps[side].append(squared_gaps(relaxed, signs))
    model.train(was_training)
    order = gather_rows(torch.cat(index)).cpu()
    if not torch.equal(order.sort().values, torch.arange(len(labels))):
        raise RuntimeError(f"{len(order)} rows were encoded for a split of {len(labels)}; each must come once")
    whole, mean_gaps = {}, {}
    for side, parts in codes.items():
        rows = gather_rows(torch.cat(parts)).cpu()
        if not bool((rows.abs() == 1).all()):
            raise UserError(f"{type(model).__name__}.encode_{side} returned codes other than -1 and +1; binarise them")
        whole[side] = torch.empty_like(rows).index_copy_(0, order, rows)
        mean_gaps[side] = gather_rows(torch.stack(gaps[side]).sum(0, keepdim=True)).sum(0).cpu() / len(labels)
    return SplitCodes(whole["image"], whole["text"], labels, mean_gaps)


def _require_codes(codes: Tensor, expected: tuple[int, ...], place: str) -> None:
    """Refuses what cannot be codes; whether all are +-1 is told at the end, without waiting for the device here."""
    if not isinstance(codes, Tensor) or codes.dtype is torch.bool or codes.is_complex():
        kind = codes.dtype if isinstance(codes, Tensor) else f"a {type(codes).__name__}"
        raise UserError(f"{place} returned {kind}; codes are a float32 tensor of -1 and +1, as sign_codes makes them")
    if codes.shape != expected:
        raise UserError(
            f"{place} returned codes of the shape {list(codes.shape)}; that of this batch is {list(expected)}"
        )


def evaluate_codes(
    query: SplitCodes, database: SplitCodes, lengths: tuple[int, ...], config: EvaluateConfig, device: torch.device
) -> tuple[Reports, Precisions]:
    """Retrieval numbers of all four directions, for every code length; the processes share the queries.

    Args:
        query: Codes of the query split.
        database: Codes of the database split.
        lengths: Lengths of the codes that stand side by side in the columns.
        config: Cutoffs and definitions.
        device: Where to rank.

    Returns:
        `{"16": {"i2t/mAP@all": 0.71, ...}, ...}` by code length, and what the mAPs are the means of, of every query.
    """
    precisions: Precisions = {}
    own = torch.arange(len(query.labels)).tensor_split(world_size())[rank()]  # gathered again in the same order
    reports: dict[str, dict[str, float]] = {}
    start = 0
    for bits in lengths:
        q, d = query.columns(start, start + bits), database.columns(start, start + bits)
        start += bits
        numbers: dict[str, float] = {}
        for direction, (asks, answers) in DIRECTIONS.items():
            if config.pairs and asks != answers:
                pairs = partner_values(getattr(q, asks)[own].to(device), getattr(q, answers).to(device), own.to(device))
                report = pair_report({name: gather_rows(part) for name, part in pairs.items()})
                numbers.update({f"{direction}/{name}": value for name, value in report.items()})
            if not q.labels.shape[1]:  # nothing to share
                continue
            values = retrieval_values(
                getattr(q, asks)[own].to(device),
                getattr(d, answers).to(device),
                q.labels[own].to(device),
                d.labels.to(device),
                cutoffs=config.cutoffs,
                definitions=config.definitions,
            )
            gathered = {name: gather_rows(part) for name, part in values.items()}
            report = mean_over_queries(gathered)
            numbers.update({f"{direction}/{name}": value for name, value in report.items()})
            precisions.update({f"{bits}/{direction}/{n}": part.cpu() for n, part in gathered.items() if "mAP" in n})
        reports[str(bits)] = numbers
    return reports, precisions


def describe_codes(codes: SplitCodes, lengths: tuple[int, ...], device: torch.device) -> Reports:
    """What the codes of both modalities are like: `{"16": {"image/constant bits": 0.0, ...}}`, see `code_report`.

    Args:
        codes: Codes of a split.
        lengths: Lengths of the codes that stand side by side in the columns.
        device: Where to compute.
    """
    found: Reports = {}
    start = 0
    for bits in lengths:
        part = codes.columns(start, start + bits)
        start += bits
        reports = {
            side: code_report(getattr(part, side).to(device), part.gaps[side] if side in part.gaps else torch.zeros(0))
            for side in ("image", "text")
        }
        found[str(bits)] = {
            f"{side}/{name}": value for side, report in reports.items() for name, value in report.items()
        }
    return found


class Evaluator:
    """Encodes the splits that ask and the database, and computes the numbers of `evaluate_codes`, as often as asked.

    Its loaders last as long as it does, so that pictures held in memory are decoded once.

    Args:
        config: The configuration.
        dataset: The data set.
        model: The method.
        device: Where to encode and rank.
    """

    def __init__(self, config: Config, dataset: PairedDataset, model: HashingModel, device: torch.device) -> None:
        self.config = config
        self.model = model
        self.device = device
        self.labels: dict[Split, Tensor] = {}
        self.loaders: dict[Split, Loader] = {}
        self.splits = dataset.splits
        for split in encoded_splits(dataset):
            absent = model.optional_fields - dataset.offers(split).keys()
            fields = (model.image_fields | model.text_fields) - absent
            self.labels[split] = dataset.labels[dataset.splits.items(split)]
            self.loaders[split] = make_loader(config, dataset, split, fields, device)

    def evaluate(self, check: Callable[[], None] = lambda: None, asking: Sequence[Split] = ("query",)) -> Evaluation:
        """Evaluates the model's present weights.

        Args:
            check: Called before every batch; raises to stop.
            asking: The splits whose items are queries, of `query` and `validation`. No other is encoded.
        """
        codes = {
            split: encode_split(self.model, self.loaders[split], self.labels[split], self.config.run.precision, check)
            for split in (*asking, "database")
        }
        database = codes["database"]
        reports: dict[Split, Reports] = {}
        precisions: dict[Split, Precisions] = {}
        for split in asking:
            searched = database.rows(self.splits.searched_by(split))
            lengths = self.model.code_lengths
            reports[split], precisions[split] = evaluate_codes(
                codes[split], searched, lengths, self.config.evaluate, self.device
            )
        return Evaluation(codes, reports, describe_codes(database, self.model.code_lengths, self.device), precisions)

    def evaluate_saved(self, path: Path, check: Callable[[], None]) -> Evaluation:
        """Evaluates the weights of a checkpoint of the model's own, which keeps its present ones.

        Args:
            path: The checkpoint.
            check: As in `evaluate`.
        """
        present = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(load(path).model)
        try:
            return self.evaluate(check)
        finally:
            self.model.load_state_dict(present)


def evaluate_file(config: Config, path: Path) -> None:
    """Evaluates a checkpoint file and writes numbers and codes into the run's folder, under the file's name.

    Args:
        config: The configuration of the method that the checkpoint holds.
        path: A checkpoint of this library, or a state dict that the authors' code wrote.

    Raises:
        UserError: If the checkpoint does not fit, or the data cannot be read.
    """
    device = pick_device(config.run.device, config.run.distribute)
    loaded = load(path)
    dataset = open_dataset(config)
    require_measurable(config, dataset)
    model = build_model(config, dataset, loaded, device, training=False)
    found = Evaluator(config, dataset, model, device).evaluate()
    if is_main():
        folder = config.run_folder
        make_folder(folder, "--save-dir")
        files = [
            *save_codes(folder, path.stem, found, model.code_lengths),
            folder / f"evaluation-{path.stem}.json",
        ]
        entry = {"epoch": loaded.meta.get("epoch", 0), **found.entry}
        results = summarise(config, model, dataset, [entry], entry)
        write_json(files[-1], results)
        say(results_table(results))
        say(f"written to {folder}: {', '.join(file.name for file in files)}")
    barrier()


def save_codes(folder: Path, name: str, found: Evaluation, lengths: tuple[int, ...]) -> list[Path]:
    """Writes codes and labels, and the queries' average precisions.

    Codes have the peers' key names, in `codes-<name>.npz` and `codes-<name>.mat`, which `--score` reads;
    `ap-<name>.npz` has an array [Q] under each name of `Precisions`.

    Args:
        folder: The run's folder.
        name: What the codes are those of, such as `best`.
        found: An evaluation of the query split.
        lengths: Lengths of the codes that stand side by side in the last axis; written as `lengths`.

    Returns:
        The paths.
    """
    query, database = found.codes["query"], found.codes["database"]
    arrays = {
        "q_img": query.image,
        "q_txt": query.text,
        "r_img": database.image,
        "r_txt": database.text,
        "q_l": query.labels,
        "r_l": database.labels,
    }
    small = {key: value.numpy().astype(np.int8) for key, value in arrays.items()}
    small["lengths"] = np.array(lengths)
    paths = [folder / f"codes-{name}.npz", folder / f"codes-{name}.mat", folder / f"ap-{name}.npz"]
    with atomic(paths[0]) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **small)
    with atomic(paths[1]) as temporary, open(temporary, "wb") as file:
        scipy.io.savemat(file, {key: value.astype(np.float32) for key, value in small.items()}, do_compression=True)
    with atomic(paths[2]) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **{key: value.numpy() for key, value in found.precisions["query"].items()})
    return paths
