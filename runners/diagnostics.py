"""What a run says of itself beside its numbers: where it starts from, what its codes are like, when it learns nothing.

Nothing here changes a weight, an optimizer or a generator that training draws from.
"""

import logging
from collections.abc import Callable, Sequence

import torch

from dataset.splits import Split
from runners.evaluation import Evaluation, Evaluator, SplitCodes, encode_split, evaluate_codes
from runners.selection import BITS, Entry, Reports, headline, scores
from utils.logging import Record

logger = logging.getLogger(__name__)
PATIENCE = 3  # evaluations after which mAPs at the level of random codes are called a collapse
LEVEL = 1.05  # times the mAP of random codes: not better than them
SIDES = ("image", "text")


def report_untrained(
    evaluator: Evaluator, split: Split, record: Record | None, check: Callable[[], None]
) -> dict[str, float]:
    """Says how well codes of the present weights find each other within one split, beside random codes.

    The split is asked and searched at once, so only few items are encoded; its numbers are not those of the database.

    Args:
        evaluator: Of the run, before its first step.
        split: A small one.
        record: The run's; None on other processes than the first.
        check: Called before every batch; raises to stop.

    Returns:
        `{"i2t/mAP@all": 0.12, "random i2t/mAP@all": 0.11, ...}`, for the first code length.
    """
    config = evaluator.config
    codes = encode_split(
        evaluator.model, evaluator.loaders[split], evaluator.labels[split], config.run.precision, check
    )
    found, chance = (headline(_reports(evaluator, side, side)) for side in (codes, random_like(codes, config.run.seed)))
    scores = {**found, **{f"random {name}": value for name, value in chance.items()}}
    if record is not None:
        record.write("untrained", 0, scores)
        logger.info(
            "untrained, the %d items of the %s split among themselves: %s",
            len(codes.labels),
            split,
            "  ".join(f"{name} {value:.4f} (random codes {chance[name]:.4f})" for name, value in found.items()),
        )
    return scores


def report(
    step: int, history: Sequence[Entry], found: Evaluation, evaluator: Evaluator, record: Record | None, best: bool
) -> None:
    """Says and records what an evaluation found, and warns where learning has collapsed.

    Args:
        step: Steps taken.
        history: All evaluations of the run, the newest last.
        found: What the newest found.
        evaluator: Of the run.
        record: The run's; None on other processes than the first.
        best: Whether it is the best so far.
    """
    warning = collapse(history, found, evaluator)
    if record is None:
        return
    epoch, seen = history[-1]["epoch"], scores(found.reports)
    record.write("evaluation", step, {"epoch": epoch, **seen, **_codes(history[-1])})
    numbers = "  ".join(f"{name} {value:.4f}" for name, value in seen.items())
    logger.info("epoch %d/%d  %s%s", epoch, evaluator.config.run.epochs, numbers, "  (best so far)" if best else "")
    logger.info("%s", codes_line(history[-1]))
    if warning is not None:
        logger.warning("%s", warning)


def random_like(codes: SplitCodes, seed: int) -> SplitCodes:
    """Random codes of the same items, of a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (
        torch.randint(0, 2, getattr(codes, side).shape, generator=generator, dtype=torch.int8) * 2 - 1 for side in SIDES
    )
    return SplitCodes(image, text, codes.labels)


def codes_line(entry: Entry) -> str:
    """What the codes of an evaluation are like, in one line: the first code length, pictures before texts."""
    numbers = _codes(entry)
    found: dict[str, list[str]] = {}
    for name, value in numbers.items():
        found.setdefault(name.partition("/")[2], []).append(f"{value:.3f}")
    return "codes, image / text:  " + "  ".join(f"{name} {' / '.join(values)}" for name, values in found.items())


def collapse(history: Sequence[Entry], found: Evaluation, evaluator: Evaluator) -> str | None:
    """What shows that a run learns nothing, in one line; None where nothing does, or it was said before.

    Args:
        history: All evaluations of the run, the newest last.
        found: What the newest found.
        evaluator: Of the run.
    """
    split = next(iter(found.reports))
    equal = [_equal_sides(entry) for entry in history[-2:]]
    if equal[-1] and (len(equal) == 1 or equal[0] != equal[-1]):
        return f"collapsed: all {' and all '.join(equal[-1])} codes are equal; lower optim.*.lr, or look at the loss"
    if len(history) != PATIENCE or not evaluator.labels[split].shape[1]:
        return None
    seed = evaluator.config.run.seed
    places = evaluator.splits.searched_by(split)
    asks, searched = random_like(found.codes[split], seed), random_like(found.codes["database"], seed + 1)
    chance = first_maps(_reports(evaluator, asks, searched.rows(places)))
    values = first_maps(found.reports[split])
    if any(value > LEVEL * chance[name] for name, value in values.items()):
        return None
    return (
        f"collapsed: after {PATIENCE} evaluations "
        + ", ".join(f"{name} {value:.4f} (random codes {chance[name]:.4f})" for name, value in values.items())
        + ": nothing is learned; look at optim.*.lr and at the loss in log.jsonl"
    )


def first_maps(reports: Reports) -> dict[str, float]:
    """The first mAP of every direction, for the first code length."""
    numbers = next(iter(reports.values()))
    names = {name.partition("/")[0]: name for name in reversed(numbers) if "/mAP" in name}
    return {name: numbers[name] for name in reversed(names.values())}


def _codes(entry: Entry) -> dict[str, float]:
    """What the codes of the first length are like, `{"image/constant bits": 0.0, ...}`."""
    numbers: dict[str, float] = next(iter(entry[BITS].values()))
    return numbers


def _equal_sides(entry: Entry) -> list[str]:
    """The modalities of which all codes of the first length are equal."""
    return [side for side in SIDES if _codes(entry)[f"{side}/constant bits"] == 1] if BITS in entry else []


def _reports(evaluator: Evaluator, asks: SplitCodes, searched: SplitCodes) -> Reports:
    lengths, config = evaluator.model.code_lengths, evaluator.config.evaluate
    return evaluate_codes(asks, searched, lengths, config, evaluator.device)[0]
