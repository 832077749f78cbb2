"""Parity with the reference implementations: `python -m tests.parity CASE [CASE ...]`.

A case is a golden file: a method's checkpoint, batch and results (`<METHOD>-*.npz`), CLIP alone (`clip-*.npz`),
BertAdam alone (`bertadam.npz`), retrieval metrics (`map*.npz`), the tokenizer (`tokenizer.json`), or a loss of which no
method was published (`DAGtH-loss-*.npz`). Each is computed
anew by this library; one row is printed per quantity, then `N passed, M failed`. Exit code 1 if any row is beyond its
bound or a case cannot be read. The bounds are those suggested by whoever recorded the cases.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.metrics import average_precision
from common.optim import build_optimizers
from common.optimizers.base import scheduled_factor
from common.optimizers.bert_adam import BertAdam, BertAdamConfig
from common.similarity import hamming_distance
from common.types import Progress
from dataset.texts.tokenizer import tokenize
from models.clip.formats import NOT_WEIGHTS, shape_of
from models.clip.towers import CLIP
from runners.steps import updates
from tests.parity_cases import open_case
from tests.parity_cases.base import MethodCase
from tests.parity_cases.dagth_loss import check_dagth_loss
from tests.parity_cases.rows import (
    BANKS,
    EQUAL,
    GRADIENTS,
    LOOSE_TERM,
    LOSS,
    METRICS,
    OUTPUTS,
    PROBABILITIES,
    TRAJECTORY,
    Arrays,
    Row,
    absolute,
    compare,
    weights_bound,
)

# ---------------------------------------------------------------------------------------------- methods


def check_method(name: str, case: MethodCase) -> Iterator[Row]:
    """Codes, terms, loss, gradients, then the recorded steps with this library's optimizers."""
    model = case.build()
    case.arrange(model, 0)
    yield from _check_outputs(name, case, model)

    total_steps = int(case.cfg["optimizer"]["t_total"])
    optimizers = build_optimizers(case.optim_config(), model.param_groups(), total_steps)
    values: list[dict[str, Tensor]] = []  # of every step: losses of all passes, and terms
    model.train()
    for step in range(int(case.cfg["steps"])):
        case.arrange(model, step)
        out = model(case.batch, Progress(epoch=0, epochs=1, step=step, steps_per_epoch=total_steps))
        values.append({})
        for of_pass, done in updates(out, optimizers):
            values[-1].update({of_pass: done.loss.detach(), **done.terms})
            if step == 0:
                yield from _check_gradients(name, case, model, of_pass)
        if step == 0:
            yield from _check_first_step(name, case, values[0])

    # What happens after the first step is compared as far as the case records it.
    recorded, state = case.part("traj/"), model.state_dict()
    named = [{"total": one["loss"], **case.terms(one)} for one in values]
    paths = {key: torch.stack([one[key] for one in named]) for key in named[0]} if named else {}
    if steps := {key: value for key, value in recorded.items() if key in paths}:
        yield compare(name, "trajectory", paths, steps, TRAJECTORY)
    if weights := case.model_class().import_reference(case.part("traj/sd/")):
        yield compare(name, "weights after the steps", state, weights, weights_bound(case.weight_bound))
    if banks := {case.buffers.get(key, key): value for key, value in case.part("traj/buffer/").items()}:
        yield compare(name, "buffers after the steps", state, banks, BANKS)
    if after := {f"out/{key}": value for key, value in recorded.items() if key.endswith("_code")}:
        yield compare(name, "codes after the steps", _outputs(case, model), after, absolute(case.code_bound))


def _outputs(case: MethodCase, model: torch.nn.Module) -> dict[str, Tensor]:
    model.eval()
    with torch.no_grad():
        return case.outputs(model)


def _check_outputs(name: str, case: MethodCase, model: torch.nn.Module) -> Iterator[Row]:
    ours = _outputs(case, model)
    wanted = {key: value for key, value in case.arrays.items() if key.startswith(("out/", "out_query/"))}
    draws = {key: value for key, value in case.arrays.items() if key.startswith("miner/")}
    codes = {key: value for key, value in wanted.items() if key.endswith("_code")}
    binary = {key: value for key, value in wanted.items() if key.endswith("_binary")}
    features = {key: value for key, value in wanted.items() if key not in codes and key not in binary}
    yield compare(name, "codes", ours, codes, OUTPUTS)
    if binary:
        yield compare(name, "binary codes", ours, binary, EQUAL)
    if features:
        yield compare(name, "intermediate outputs", ours, features, OUTPUTS)
    if draws:
        yield compare(name, "drawing probabilities", ours, draws, PROBABILITIES)


def _check_first_step(name: str, case: MethodCase, values: dict[str, Tensor]) -> Iterator[Row]:
    wanted = case.part("loss/")
    total = {"total": wanted.pop("total")} if "total" in wanted else {}
    bounds = {key: LOOSE_TERM if key in case.loose_terms() else LOSS for key in wanted}
    if wanted:
        yield compare(name, "terms", case.terms(values), wanted, bounds)
    if total:
        yield compare(name, "loss", {"total": values["loss"]}, total, LOSS)


def _check_gradients(name: str, case: MethodCase, model: torch.nn.Module, of_pass: str) -> Iterator[Row]:
    recorded = case.part(case.gradients[of_pass])
    recorded = {key: value for key, value in recorded.items() if not case.noise.search(key)}
    if not recorded:
        return
    gradients = case.model_class().import_reference(recorded)
    ours = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    row = compare(name, case.gradients[of_pass].rstrip("/").replace("grad", "gradients"), ours, gradients, GRADIENTS)
    if len(gradients) != len(recorded):
        fault = f"{len(recorded) - len(gradients)} of {len(recorded)} gradients have no name here"
        row = Row(name, row.quantity, False, row.error, row.bound, fault)
    yield row


# ---------------------------------------------------------------------------------------------- CLIP


def check_clip(name: str, cfg: dict[str, Any], arrays: Arrays) -> Iterator[Row]:
    """Pooled features, tokens with and without the key padding mask. No method uses attention weights, nor do we."""
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items() if key != "cfg"}
    state = {key.removeprefix("sd/"): value for key, value in tensors.items() if key.startswith("sd/")}
    state = {key: value for key, value in state.items() if not NOT_WEIGHTS.search(key)}
    clip = CLIP(shape_of(state))
    clip.load_state_dict(state)
    clip.eval()
    image, ids = tensors["in/image"], tensors["in/text"]
    padding = tensors.get("in/key_padding_mask", ids == 0)
    with torch.no_grad():
        tokens = clip.image_tokens(image)
        masked, unmasked = clip.text_tokens(ids, padding), clip.text_tokens(ids)
        pooled_image, pooled_text = clip.image_features(image), clip.text_features(ids)
        cosines = torch.nn.functional.cosine_similarity(pooled_image[:, None], pooled_text[None], dim=-1)
        ours = {
            "out/image_embed": pooled_image,
            "out/text_embed": pooled_text,
            "out/logits_per_image": clip.logit_scale.exp() * cosines,
            "out/masked/image_cls": tokens[:, 0],
            "out/masked/image_tokens": tokens[:, 1:].transpose(0, 1),
            "out/masked/text_eos": masked[0],
            "out/masked/text_tokens": masked[1].transpose(0, 1),
            "out/unmasked/text_eos": unmasked[0],
            "out/unmasked/text_tokens": unmasked[1].transpose(0, 1),
            "out/masked/new_key_padding_mask": padding | (ids == clip.shape.end_of_text),
        }
    bound = absolute(2e-5)
    for quantity, start in (("pooled features", "out/"), ("masked tokens", "out/masked/"), ("tokens", "out/unmasked/")):
        wanted = {
            key: value
            for key, value in tensors.items()
            if key.rpartition("/")[0] + "/" == start and not key.endswith("_attn")
        }
        if wanted:
            yield compare(name, quantity, ours, wanted, bound)


# ---------------------------------------------------------------------------------------------- BertAdam


def _bertadam(cfg: dict[str, Any], groups: dict[str, list[torch.nn.Parameter]]) -> BertAdam:
    endless = cfg["t_total"] <= 0  # the reference's sign for a constant rate
    schedule, warmup = ("constant" if endless else cfg["schedule"]), max(cfg["warmup"], 0.0)
    # Below 0 there is no warm-up, but the reference's line still falls from where it would cross warm-up's end.
    height = (1 - warmup) / (1 - cfg["warmup"]) if schedule == "warmup_linear" else 1.0
    config = BertAdamConfig.model_validate(
        {
            "type": "BertAdam",
            "lr": {name: height * rate for name, rate in zip(groups, cfg["group_lr"], strict=True)},
            "schedule": schedule,
            "warmup": warmup,
            "b1": cfg["b1"],
            "b2": cfg["b2"],
            "eps": cfg["e"],
            "weight_decay": cfg["weight_decay"],
            "max_grad_norm": cfg["max_grad_norm"],
        }
    )
    return BertAdam.build(groups, config, 1 if endless else cfg["t_total"])


def check_bertadam(name: str, cfg: dict[str, Any], arrays: Arrays) -> Iterator[Row]:
    """Given gradients, the schedule, and a small regression problem."""
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items() if key != "cfg"}
    bound, steps = absolute(2e-6), range(cfg["steps"])

    def start(part: str) -> tuple[dict[str, torch.nn.Parameter], BertAdam]:
        names = cfg["groups"][part]
        parameters = {
            key: torch.nn.Parameter(tensors[f"{part}/{key}/traj"][0].clone()) for group in names for key in group
        }
        groups = {str(number): [parameters[key] for key in group] for number, group in enumerate(names)}
        return parameters, _bertadam(cfg, groups)

    parameters, optimizer = start("given")
    paths = {key: [value.detach().clone()] for key, value in parameters.items()}
    for step in steps:
        for key, value in parameters.items():
            given = bool(tensors[f"given/{key}/has_grad"][step])
            value.grad = tensors[f"given/{key}/grads"][step].clone() if given else None
        optimizer.step()
        for key, value in parameters.items():
            paths[key].append(value.detach().clone())
    ours = {key: torch.stack(path) for key, path in paths.items()}
    yield compare(name, "given gradients", ours, {key: tensors[f"given/{key}/traj"] for key in ours}, bound)

    schedule: Any = "constant" if cfg["t_total"] <= 0 else cfg["schedule"]
    factors = [scheduled_factor(schedule, step / max(cfg["t_total"], 1), cfg["warmup"]) for step in steps]
    yield compare(name, "schedule", {"factor": torch.tensor(factors)}, {"factor": tensors["given/schedule"]}, bound)

    if "problem" not in cfg["groups"]:
        return
    parameters, optimizer = start("problem")
    paths = {key: [value.detach().clone()] for key, value in parameters.items()}
    losses, rates = [], []
    x, y = tensors["problem/x"], tensors["problem/y"]
    for _ in steps:
        hidden = torch.tanh(x @ parameters["w1"] + parameters["b1"])
        loss = (hidden @ parameters["w2"] + parameters["b2"] - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        rates.append(torch.tensor(optimizer.get_lr()))
        for key, value in parameters.items():
            paths[key].append(value.detach().clone())
    ours = {key: torch.stack(path) for key, path in paths.items()}
    yield compare(name, "problem trajectory", ours, {key: tensors[f"problem/{key}/traj"] for key in ours}, bound)
    recorded = {"loss": tensors["problem/loss"], "rates": tensors["problem/get_lr"]}
    yield compare(
        name, "problem loss and rates", {"loss": torch.stack(losses), "rates": torch.stack(rates)}, recorded, bound
    )


# ---------------------------------------------------------------------------------------------- metrics


def check_map(name: str, cfg: dict[str, Any], arrays: Arrays) -> Iterator[Row]:
    """Hamming distances and mAP in the definitions of the references, query by query and as means."""
    for problem in cfg["problems"]:
        part = {
            key.removeprefix(f"{problem}/"): torch.from_numpy(np.asarray(array))
            for key, array in arrays.items()
            if key.startswith(f"{problem}/")
        }
        codes = part["in/query_code"], part["in/db_code"]
        labels = part["in/query_label"], part["in/db_label"]
        if "out/hamming" in part:
            distances = {"out/hamming": hamming_distance(*codes)}
            yield compare(
                f"{name} {problem}", "Hamming distances", distances, {"out/hamming": part["out/hamming"]}, EQUAL
            )
        ours: dict[str, Tensor] = {}
        for key in part:
            _, _, rest = key.partition("out/")
            kind, _, cutoff = rest.partition("/")
            if kind not in ("ap", "map", "map_matrix", "top_map"):
                continue
            k = None if cutoff == "all" else int(cutoff)
            each = average_precision(*codes, *labels, k=k, definition="top" if kind == "top_map" else "relevant")
            # A query without relevant items is NaN here; the references count it as 0, or let it spoil the mean.
            counted = each.nan_to_num(nan=0.0)
            ours[key] = {"ap": counted, "map_matrix": each.mean()}.get(kind, counted.mean())
        wanted = {key: part[key] for key in ours}
        for quantity, kinds in (
            ("average precision", ("ap",)),
            ("mAP", ("map", "map_matrix")),
            ("top mAP", ("top_map",)),
        ):
            chosen = {key: value for key, value in wanted.items() if key.split("/")[1] in kinds}
            if chosen:
                yield compare(f"{name} {problem}", quantity, ours, chosen, METRICS)


# ---------------------------------------------------------------------------------------------- tokenizer


def check_tokenizer(name: str, entries: list[dict[str, Any]]) -> Iterator[Row]:
    """Token ids of every text."""
    wanted = {entry["text"]: torch.tensor(entry["ids"]) for entry in entries}
    ours = {text: tokenize([text], len(ids))[0] for text, ids in wanted.items()}
    yield compare(name, "token ids", ours, wanted, EQUAL)


# ---------------------------------------------------------------------------------------------- files

KINDS: dict[str, Callable[[str, dict[str, Any], Arrays], Iterator[Row]]] = {
    "clip": check_clip,
    "bertadam": check_bertadam,
    "map": check_map,
    "dagth_loss": check_dagth_loss,
}


def check_file(path: Path) -> Iterator[Row]:
    """The rows of one golden file; a file that cannot be read, or a method that is not there, is one failed row."""
    try:
        if path.suffix == ".json":
            yield from check_tokenizer(path.name, json.loads(path.read_text(encoding="utf-8")))
            return
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        cfg = json.loads(str(arrays["cfg"]))
        if "method" in cfg:
            yield from check_method(path.name, open_case(cfg, arrays))
        elif cfg.get("kind") in KINDS:
            yield from KINDS[cfg["kind"]](path.name, cfg, arrays)
        else:
            raise UserError(f"neither a method's case nor one of {', '.join(KINDS)}")
    except Exception as error:  # one broken case must not hide the others
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        yield Row(path.name, "case", False, float("inf"), "readable", reason.removeprefix("UserError: "))


def main(arguments: list[str]) -> int:
    """Checks the named cases and prints the table.

    Args:
        arguments: Command line without the program's name.

    Returns:
        Exit code: 0 if every quantity is within its bound, else 1.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tests.parity", description="Compares with reference implementations."
    )
    parser.add_argument("cases", nargs="+", type=Path, metavar="CASE", help="golden file, .npz or .json")
    passed = failed = 0
    sys.stdout.write(f"{'case':<38} {'quantity':<24} {'error':>9}  {'bound':<24} verdict\n")
    for path in parser.parse_args(arguments).cases:
        for row in check_file(path):
            sys.stdout.write(f"{row}\n")
            passed, failed = passed + row.passed, failed + (not row.passed)
    sys.stdout.write(f"{passed} passed, {failed} failed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
