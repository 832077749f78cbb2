"""BertAdam against recorded trajectories of the reference, published values, and a plain loop; guards of the groups."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import Parameter

from common.errors import UserError
from common.optim import build_optimizers
from common.optimizers import bert_adam as bert_adam_file
from common.optimizers.base import scheduled_factor
from common.optimizers.bert_adam import BertAdam, BertAdamConfig, ClippedBertAdamConfig
from common.optimizers.torch_optimizers import SGD, Adam, AdamW
from common.registry import OPTIMIZERS
from common.schemas import OptimizerConfig
from tests.worked import wave

GOLDEN = Path(__file__).parent / "golden" / "bertadam.npz"
BERT_ADAM: dict[str, Any] = {
    "type": "BertAdam",
    "schedule": "warmup_cosine",
    "warmup": 0.1,
    "b1": 0.9,
    "b2": 0.98,
    "eps": 1e-6,
    "weight_decay": 0.2,
    "max_grad_norm": 1.0,
}


def bert_adam(lr: dict[str, float], **changes: Any) -> BertAdamConfig:
    return BertAdamConfig(**{**BERT_ADAM, "lr": lr, **changes})


def some_parameters(count: int = 12, seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3,), (2, 5), (1,), (4, 1, 2)]
    return [Parameter(torch.randn(shapes[i % 4], generator=generator)) for i in range(count)]


def give_gradients(parameters: list[Parameter], step: int) -> None:
    """Gradients of very different size; every third tensor has none every fourth step."""
    generator = torch.Generator().manual_seed(1000 + step)
    for number, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator) * 10.0 ** (number % 5 - 3)
        parameter.grad = None if number % 3 == 0 and step % 4 == 1 else gradient


def plain_bert_adam(parameters: list[Parameter], lrs: list[float], state: list[dict[str, Any]], total: int) -> None:
    """The formula of the method's description, one tensor at a time, in float32."""
    for parameter, lr, own in zip(parameters, lrs, state, strict=True):
        if parameter.grad is None:
            continue
        if not own:
            own.update(n=0, m=torch.zeros_like(parameter), v=torch.zeros_like(parameter))
        g = parameter.grad * min(1.0, 1.0 / (float(parameter.grad.norm()) + 1e-6))
        own["m"] = 0.9 * own["m"] + 0.1 * g
        own["v"] = 0.98 * own["v"] + 0.02 * g * g
        x = own["n"] / total
        factor = x / 0.1 if x < 0.1 else 0.5 * (1 + math.cos(math.pi * x))
        update = own["m"] / (own["v"].sqrt() + 1e-6) + 0.2 * parameter.data
        parameter.data -= lr * factor * update
        own["n"] += 1


# ---------------------------------------------------------------------------------------------- BertAdam


def test_golden_given_gradients() -> None:
    golden = np.load(GOLDEN)
    first, second = json.loads(str(golden["cfg"]))["group_lr"]
    parameters = {name: Parameter(torch.tensor(golden[f"given/{name}/traj"][0])) for name in "abcd"}
    groups = {"x": [parameters["a"], parameters["b"]], "y": [parameters["c"], parameters["d"]]}
    optimizer = BertAdam.build(groups, bert_adam({"x": first, "y": second}), 20)
    for step in range(20):
        assert scheduled_factor("warmup_cosine", step / 20, 0.1) == pytest.approx(golden["given/schedule"][step])
        for name, parameter in parameters.items():
            has = golden[f"given/{name}/has_grad"][step]
            parameter.grad = torch.tensor(golden[f"given/{name}/grads"][step]) if has else None
        optimizer.step()
        for name, parameter in parameters.items():
            expected = golden[f"given/{name}/traj"][step + 1]
            np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=0, atol=2e-6)


def test_golden_regression_and_get_lr() -> None:
    golden = np.load(GOLDEN)
    first, second = json.loads(str(golden["cfg"]))["group_lr"]
    names = ["w1", "b1", "w2", "b2"]
    w1, b1, w2, b2 = (Parameter(torch.tensor(golden[f"problem/{name}/traj"][0])) for name in names)
    optimizer = BertAdam.build({"x": [w1, b1], "y": [w2, b2]}, bert_adam({"x": first, "y": second}), 20)
    x, y = torch.tensor(golden["problem/x"]), torch.tensor(golden["problem/y"])
    for step in range(20):
        loss = ((torch.tanh(x @ w1 + b1) @ w2 + b2 - y) ** 2).mean()
        assert loss.item() == pytest.approx(golden["problem/loss"][step], abs=2e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, parameter in zip(names, (w1, b1, w2, b2), strict=True):
            expected = golden[f"problem/{name}/traj"][step + 1]
            np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=0, atol=2e-6)
        np.testing.assert_allclose(optimizer.get_lr(), golden["problem/get_lr"][step], rtol=1e-6, atol=1e-9)


def test_published_values_in_float64() -> None:
    p0, p1 = Parameter(wave(0.1, 2, 3, torch.float64)), Parameter(wave(0.2, 1, 4, torch.float64)[0])
    optimizer = BertAdam.build({"p0": [p0], "p1": [p1]}, bert_adam({"p0": 0.01, "p1": 0.1}), 20)
    expected = {
        1: ([0.0998334166], [0.1986693308]),
        2: (
            [0.0961981881, 0.9796907936, 0.4225702734, 0.7118721325, 0.7970728676, -0.4552154969],
            [0.1489164105, 0.9409264253, 0.3787242700, -0.7625310696],
        ),
        5: (
            [0.0654472602, 0.9405634192, 0.4134567943, 0.6733382866, 0.7653851713, -0.4185499472],
            [-0.1982109074, 0.6713088790, 0.6936070970, -0.4062878022],
        ),
        12: (
            [0.0026154185, 0.9024379112, 0.4577529042, 0.6154860268, 0.7746649584, -0.3554200253],
            [-0.5955542045, 0.9238112765, 1.1909971564, -0.3174118982],
        ),
    }
    for step in range(12):
        p0.grad, p1.grad = 3 * wave(0.3 * step, 2, 3, torch.float64), 0.2 * wave(0.3 * step + 1, 1, 4, torch.float64)[0]
        optimizer.step()
        for parameter, values in zip((p0, p1), expected.get(step + 1, ([], [])), strict=True):
            assert parameter.flatten()[: len(values)].tolist() == pytest.approx(values, abs=1e-9)


def test_equals_a_plain_loop_over_tensors() -> None:
    fused, plain = some_parameters(), some_parameters()
    optimizer = BertAdam.build({"a": fused[:5], "b": fused[5:]}, bert_adam({"a": 0.01, "b": 0.1}), 30)
    state: list[dict[str, Any]] = [{} for _ in plain]
    for step in range(30):
        give_gradients(fused, step)
        give_gradients(plain, step)
        optimizer.step()
        plain_bert_adam(plain, [0.01] * 5 + [0.1] * 7, state, 30)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_portions_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that are cut, several that go together, and one that is not stored in one piece, so it cannot be cut."""
    shapes = [(33, 65), (3,), (5, 7), (64,), (129,)]
    results = []
    for size in (1 << 16, 64):
        monkeypatch.setattr(bert_adam_file, "_NUMBERS_OF_A_CORE", size)
        generator = torch.Generator().manual_seed(1)
        parameters = [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        parameters.append(Parameter(torch.randn(40, 30, generator=generator).T))
        optimizer = BertAdam.build({"head": parameters}, bert_adam({"head": 1e-2}), 10)
        for step in range(3):
            give_gradients(parameters, step)
            optimizer.step()
        results.append([*parameters, *(parameter.grad for parameter in parameters)])
    assert all(torch.equal(whole, cut) for whole, cut in zip(*results, strict=True))


def test_tensors_of_several_dtypes_in_one_group() -> None:
    single, double = Parameter(torch.ones(3)), Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = BertAdam.build({"a": [single, double]}, bert_adam({"a": 0.1}), 10)
    for _ in range(3):
        single.grad, double.grad = torch.full((3,), 0.3), torch.full((3,), 0.3, dtype=torch.float64)
        optimizer.step()
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=1e-7)


def test_clipping_is_per_tensor_and_stays_in_the_gradient() -> None:
    large, small = Parameter(torch.zeros(2)), Parameter(torch.zeros(2))
    large.grad, small.grad = torch.tensor([30.0, 40.0]), torch.tensor([0.3, 0.4])
    BertAdam.build({"a": [large, small]}, bert_adam({"a": 0.1}), 10).step()
    assert large.grad.tolist() == pytest.approx([0.6, 0.8])
    assert small.grad.tolist() == pytest.approx([0.3, 0.4])
    large.grad = torch.tensor([30.0, 40.0])
    BertAdam.build({"a": [large]}, bert_adam({"a": 0.1}, max_grad_norm=0.0), 10).step()
    assert large.grad.tolist() == [30.0, 40.0]


def test_a_tensor_without_gradient_neither_decays_nor_advances() -> None:
    still, moving = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    optimizer = BertAdam.build({"a": [still, moving]}, bert_adam({"a": 0.1}), 10)
    for _ in range(3):
        moving.grad = torch.zeros(2)
        optimizer.step()
    assert still.tolist() == [1.0, 1.0]
    assert still not in optimizer.state
    assert moving[0].item() < 1.0, "a zero gradient still decays"
    assert optimizer.state[moving]["step"] == 3


def test_get_lr_is_zero_before_the_first_update_of_any_tensor() -> None:
    a, b = Parameter(torch.ones(1)), Parameter(torch.ones(1))
    optimizer = BertAdam.build({"a": [a, b]}, bert_adam({"a": 0.1}), 10)
    a.grad = torch.ones(1)
    assert optimizer.get_lr() == [0.0]
    optimizer.step()
    assert optimizer.get_lr() == pytest.approx([0.1 * 0.5 * (1 + math.cos(math.pi * 0.1))])
    b.grad = torch.ones(1)
    assert optimizer.get_lr() == [0.0]


def test_clipping_all_gradients_together_keeps_their_direction() -> None:
    """The gradient 12, 16 is clipped to 1.2, 1.6, then each tensor to at most 1.5; both are as given to BertAdam."""
    clipped, plain = ([Parameter(torch.ones(1)), Parameter(torch.ones(1))] for _ in range(2))
    tree = {**bert_adam({"a": 0.1}, max_grad_norm=1.5).model_dump(), "type": "ClippedBertAdam", "max_total_norm": 2.0}
    config = ClippedBertAdamConfig.model_validate(tree)
    optimizers = [
        build_optimizers({"main": config}, {"main": {"a": clipped}}, 10)["main"],
        BertAdam.build({"a": plain}, bert_adam({"a": 0.1}, max_grad_norm=1.5), 10),
    ]
    for _ in range(3):
        for parameters, gradients in ((clipped, (12.0, 16.0)), (plain, (1.2, 1.6))):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = torch.tensor([gradient])
        for optimizer in optimizers:
            optimizer.step()
    assert clipped[0].grad is not None and clipped[0].grad.item() == pytest.approx(1.2)
    assert [p.item() for p in clipped] == pytest.approx([p.item() for p in plain], abs=1e-6)
    assert clipped[0].item() != 1


@pytest.mark.parametrize("kind", ["BertAdam", "ClippedBertAdam", "SGD", "Adam", "AdamW"])
def test_a_run_continued_from_its_state_ends_in_the_same_bits(kind: str) -> None:
    def build(parameters: list[Parameter]) -> torch.optim.Optimizer:
        groups, lr = {"a": parameters[:5], "b": parameters[5:]}, {"a": 0.01, "b": 0.1}
        configs: dict[str, OptimizerConfig] = {
            "BertAdam": bert_adam(lr),
            "ClippedBertAdam": ClippedBertAdamConfig.model_validate(
                {**bert_adam(lr).model_dump(), "type": "ClippedBertAdam", "max_total_norm": 0.5}
            ),
            "SGD": sgd(lr, schedule="cosine"),
            "Adam": adam(lr, milestones=[6, 12], max_grad_norm=0.5),
            "AdamW": adamw(lr),
        }
        return build_optimizers({"main": configs[kind]}, {"main": groups}, 20)["main"]

    def train(parameters: list[Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            give_gradients(parameters, step)
            optimizer.step()

    whole = some_parameters()
    train(whole, build(whole), range(20))
    first = some_parameters()
    optimizer = build(first)
    train(first, optimizer, range(9))
    file = io.BytesIO()
    torch.save({"weights": [p.data for p in first], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = [Parameter(data) for data in saved["weights"]]
    resumed = build(second)
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, range(9, 20))
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


def test_closure_is_called_with_gradients() -> None:
    p = Parameter(torch.ones(1))
    optimizer = BertAdam.build({"a": [p]}, bert_adam({"a": 0.1}), 10)

    def closure() -> float:
        loss = (p**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 1.0
    assert p.grad is not None


# ---------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("warmup_constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("warmup_linear", [0.0, 0.5, 1.0, 0.625, 0.0, 0.0]),
        (
            "warmup_cosine",
            [0.0, 0.5, 0.5 * (1 + math.cos(0.2 * math.pi)), 0.5, 0.0, 0.5 * (1 + math.cos(1.3 * math.pi))],
        ),
    ],
)
def test_schedules(schedule: Any, expected: list[float]) -> None:
    progress = [0.0, 0.1, 0.2, 0.5, 1.0, 1.3]
    assert [scheduled_factor(schedule, x, 0.2) for x in progress] == pytest.approx(expected, abs=1e-12)


def test_no_warmup_starts_at_the_full_rate() -> None:
    assert scheduled_factor("warmup_cosine", 0.0, 0.0) == 1.0


# ---------------------------------------------------------------------------------------------- SGD, Adam, AdamW


def sgd(lr: dict[str, float], **changes: Any) -> SGD.Config:
    base = {"type": "SGD", "momentum": 0.9, "weight_decay": 5e-4, "nesterov": False, "schedule": "constant"}
    return SGD.Config(**{**base, "lr": lr, **changes})


def adam(lr: dict[str, float], **changes: Any) -> Adam.Config:
    base = {"type": "Adam", "b1": 0.5, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    base |= {"max_grad_norm": 0.0, "milestones": [], "milestone_factor": 1.2}
    return Adam.Config(**{**base, "lr": lr, **changes})


def adamw(lr: dict[str, float], **changes: Any) -> AdamW.Config:
    base = {
        "type": "AdamW",
        "schedule": "warmup_linear",
        "warmup": 0.2,
        "b1": 0.9,
        "b2": 0.98,
        "eps": 1e-6,
        "weight_decay": 0.2,
    }
    return AdamW.Config(**{**base, "lr": lr, **changes})


def test_constant_sgd_is_torchs() -> None:
    ours, theirs = some_parameters(), some_parameters()
    optimizer = SGD.build({"a": ours}, sgd({"a": 0.05}), 10)
    reference = torch.optim.SGD(theirs, lr=0.05, momentum=0.9, weight_decay=5e-4)
    for step in range(10):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_adam_clips_all_groups_together_and_decays_through_the_gradient() -> None:
    """A loop over the formula in float64; the norm is that of the tensors that have a gradient, of both groups."""
    ours, plain = some_parameters(), [p.detach().double() for p in some_parameters()]
    optimizer = Adam.build(
        {"a": ours[:5], "b": ours[5:]}, adam({"a": 0.01, "b": 0.1}, max_grad_norm=1.0, milestones=[3, 5]), 8
    )
    means, squares, counts = [0 * p for p in plain], [0 * p for p in plain], [0] * len(plain)
    clipped = 0
    for step in range(8):
        give_gradients(ours, step)
        gradients = [None if p.grad is None else p.grad.double() for p in ours]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))
        clipped += norm > 1
        optimizer.step()
        for number, gradient in enumerate(gradients):
            if gradient is None:
                continue
            gradient = gradient * min(1.0, 1.0 / (norm + 1e-6)) + 0.01 * plain[number]
            counts[number] += 1
            means[number] = 0.5 * means[number] + 0.5 * gradient
            squares[number] = 0.999 * squares[number] + 0.001 * gradient.square()
            mean, square = means[number] / (1 - 0.5 ** counts[number]), squares[number] / (1 - 0.999 ** counts[number])
            rate = (0.01 if number < 5 else 0.1) * 1.2 ** ((step >= 3) + (step >= 5))
            plain[number] = plain[number] - rate * mean / (square.sqrt() + 1e-8)
    assert clipped
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.detach().double(), b, rtol=1e-4, atol=1e-5)


def test_adam_without_a_largest_norm_leaves_gradients_alone() -> None:
    p = Parameter(torch.zeros(2))
    p.grad = torch.tensor([30.0, 40.0])
    Adam.build({"a": [p]}, adam({"a": 0.1}, max_grad_norm=0.0), 10).step()
    assert p.grad.tolist() == [30.0, 40.0]
    Adam.build({"a": [p]}, adam({"a": 0.1}, max_grad_norm=5.0), 10).step()
    assert p.grad.tolist() == pytest.approx([3.0, 4.0])


def test_adamw_follows_its_schedule_and_spares_vectors() -> None:
    matrix, vector = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2))
    optimizer = AdamW.build({"a": [matrix, vector]}, adamw({"a": 0.1}), 10)
    rates = []
    for _ in range(10):
        matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1 * scheduled_factor("warmup_linear", n / 10, 0.2) for n in range(10)])
    assert vector.tolist() == [1.0, 1.0]
    assert matrix[0, 0].item() == pytest.approx(math.prod(1 - rate * 0.2 for rate in rates), rel=1e-6)


def test_cosine_sgd_ends_near_zero() -> None:
    p = Parameter(torch.ones(1))
    optimizer = SGD.build({"a": [p]}, sgd({"a": 0.1}, schedule="cosine"), 4)
    rates = []
    for _ in range(4):
        p.grad = torch.ones(1)
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1 * 0.5 * (1 + math.cos(math.pi * n / 4)) for n in range(4)])


# ---------------------------------------------------------------------------------------------- building


def test_build_optimizers_gives_every_group_its_rate() -> None:
    a, b, c = some_parameters(3)
    built = build_optimizers(
        {"proxies": sgd({"p": 0.02}), "main": bert_adam({"backbone": 1e-5, "head": 1e-3})},
        {"main": {"backbone": [a], "head": [b]}, "proxies": {"p": [c]}},
        100,
    )
    assert list(built) == ["main", "proxies"]
    assert isinstance(built["main"], BertAdam) and isinstance(built["proxies"], SGD)
    assert [(group["name"], group["lr"]) for group in built["main"].param_groups] == [
        ("backbone", 1e-5),
        ("head", 1e-3),
    ]


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"mian": {"head": 0.1}}, r"optim\.mian: .*did you mean 'main'.*optim\.main is missing"),
        ({}, r"optim\.main is missing; the model's are: main"),
        ({"main": {"head": 0.1}, "proxies": {"x": 0.1}}, r"optim\.proxies: the model has no such optimizer"),
        ({"main": {"haed": 0.1}}, r"optim\.main\.lr\.haed: .*did you mean 'head'"),
        ({"main": {}}, r"optim\.main\.lr\.head is missing"),
    ],
)
def test_names_that_differ_are_refused_in_one_line(optim: dict[str, dict[str, float]], message: str) -> None:
    configs = {name: bert_adam(lr) for name, lr in optim.items()}
    with pytest.raises(UserError, match=message) as caught:
        build_optimizers(configs, {"main": {"head": some_parameters(1)}}, 10)
    assert "\n" not in str(caught.value)


def test_a_parameter_that_stands_twice_is_refused() -> None:
    p = some_parameters(1)[0]
    with pytest.raises(UserError, match=r"shape \[3\] stands in main\.a and again in other\.b"):
        build_optimizers(
            {"main": bert_adam({"a": 0.1}), "other": sgd({"b": 0.1})}, {"main": {"a": [p]}, "other": {"b": [p]}}, 10
        )


def test_an_optimizer_that_cannot_be_built_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS._classes, "Mine", torch.optim.SGD)
    config = OptimizerConfig(type="Mine", lr={"head": 0.1})
    with pytest.raises(UserError, match=r"optim.main.type: Mine lacks the classmethod build\(groups, config"):
        build_optimizers({"main": config}, {"main": {"head": [Parameter(torch.ones(1))]}}, 3)


@pytest.mark.parametrize("cls", [BertAdam, SGD, Adam, AdamW])
def test_a_run_without_steps_is_refused(cls: Any) -> None:
    config = {BertAdam: bert_adam, SGD: sgd, Adam: adam, AdamW: adamw}[cls]({"a": 0.1})
    with pytest.raises(ValueError, match="total_steps"):
        cls.build({"a": some_parameters(1)}, config, 0)


@pytest.mark.parametrize(
    "changes", [{"b1": 1.0}, {"eps": 0.0}, {"warmup": 1.0}, {"schedule": "cosine"}, {"weight_decay": -1.0}, {"beta": 1}]
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        bert_adam({"a": 0.1}, **changes)


@pytest.mark.parametrize(
    "changes", [{"b1": 1.0}, {"milestones": [0]}, {"milestone_factor": 0.0}, {"schedule": "cosine"}]
)
def test_settings_of_adam_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        adam({"a": 0.1}, **changes)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValidationError, match="needs momentum above 0"):
        sgd({"a": 0.1}, nesterov=True, momentum=0.0)
