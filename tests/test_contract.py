"""The contract of `models/base.py`, for every registered method from its own YAML."""

import ast
import dataclasses
import functools
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from common.config import load_config
from common.errors import UserError
from common.registry import MODELS
from common.types import Backbone, Batch, Progress, StepOutput
from models.base import HashingModel
from models.clip.towers import CLIP
from runners.contract import require_backbone
from runners.steps import updates
from tests import tiny_models as tiny

ROOT = Path(__file__).parent.parent
METHODS = MODELS.names()
PROGRESS = Progress(epoch=1, epochs=4, step=12, steps_per_epoch=10)

UNUSUAL_LABELS = {  # of six rows and five classes
    "no similar pair": torch.eye(6)[:, :5],  # and a row without a label
    "no dissimilar pair": torch.ones(6, 5),
    "a class without an item": torch.tensor([[1.0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]).repeat(2, 1),
    "an item without a label": torch.tensor([[1.0, 1, 0, 0, 1], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).repeat(2, 1),
    "no label at all": torch.zeros(6, 5),
}


# What they compute next depends on numbers: how many triplets a batch holds; which proxies its classes are assigned to.
LOOKING = {"DDWSH", "DGHDGH", "DPBE", "DNPH"}
LOOKS = r"aten\.nonzero|aten\._local_scalar_dense|\.numpy\(\) is not supported"


def build(name: str, cache: Path) -> HashingModel:
    return tiny.build(name, str(cache), **tiny.SMALL.get(name, {}))


def rows(fields: frozenset[str], count: int = 6, seed: int = 1) -> Batch:
    return tiny.pick(tiny.rows_of(seed).only(fields), slice(count))


@pytest.fixture(params=METHODS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> HashingModel:
    return build(request.param, tmp_path)


def test_a_step_gives_a_finite_scalar_and_every_parameter_a_gradient(model: HashingModel) -> None:
    model.train()
    output = model(rows(model.fields), PROGRESS)
    assert isinstance(output, StepOutput)
    assert output.loss.shape == () and output.loss.isfinite() and output.loss.dtype == torch.float32
    assert output.terms and all(term.shape == () and term.isfinite() for term in output.terms.values())
    groups = model.param_groups()
    grouped = [parameter for members in groups.values() for group in members.values() for parameter in group]
    assert len(grouped) == len({id(parameter) for parameter in grouped})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    reached: dict[str, set[int]] = {}
    for step, _ in updates(output, tiny.descents(model, 0.0)):
        reached[step] = {id(p) for p in grouped if p.grad is not None}
    of_loss = reached["loss"] if model.loss_reaches_all else set().union(*reached.values())
    assert [names[id(p)] for p in grouped if id(p) not in of_loss] == []
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {names[id(p)] for p in grouped} == trainable


def on_a_card(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A tensor of the same shape and dtype that has no numbers and lies on a GPU, which need not be there."""
    fake: Tensor = mode.from_tensor(tensor.detach())
    with mode:
        return fake.cuda()


def test_a_gpu_is_never_waited_for_and_nothing_lies_elsewhere(model: HashingModel) -> None:
    """Without a GPU: tensors that have only shapes and devices refuse to mix devices, and to tell their numbers."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for parameter_name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[parameter_name] = torch.nn.Parameter(on_a_card(parameter, mode))
        for buffer_name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[buffer_name] = on_a_card(buffer, mode)
    fields = model.fields | model.image_fields | model.text_fields
    batch = Batch({name: on_a_card(value, mode) for name, value in rows(fields).items()})
    with torch.no_grad(), mode:
        for encode in (model.encode_image, model.encode_text):
            assert encode(batch).device.type == "cuda"
        model.train()
        if _name(model) in LOOKING:
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException, RuntimeError), match=LOOKS):
                model(batch, PROGRESS)
            return
        output = model(batch, PROGRESS)
    assert {value.device.type for value in (output.loss, *output.terms.values())} == {"cuda"}


def test_groups_are_those_of_every_shipped_config(model: HashingModel) -> None:
    for path in sorted((ROOT / "configs" / MODELS.folder(_name(model))).glob("*.yaml")):
        optim = load_config(path).optim
        assert {name: set(entry.lr) for name, entry in optim.items()} == {
            name: set(groups) for name, groups in model.param_groups().items()
        }, path


def test_frozen_parameters_do_not_move(model: HashingModel) -> None:
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(rows(model.fields), PROGRESS).loss.backward()
    optimizer.step()
    for name, before in frozen.items():
        assert torch.equal(dict(model.named_parameters())[name], before), name


def test_codes_are_signs_of_the_right_width_and_repeatable(model: HashingModel) -> None:
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for encode, fields in ((model.encode_image, model.image_fields), (model.encode_text, model.text_fields)):
        batch = rows(fields)
        with torch.no_grad():
            codes, again = encode(batch), encode(batch)
            alone = torch.cat([encode(tiny.pick(batch, [row])) for row in range(batch.rows)])
        assert codes.shape == (batch.rows, *model.code_shape) and codes.dtype == torch.float32
        assert bool((codes.abs() == 1).all())
        assert torch.equal(codes, again)
        assert (codes != alone).float().mean() < 0.01  # a code is its row's own: only rounding may differ
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.code_lengths[0] == model.bits


def test_encoders_need_no_optional_field_and_nothing_of_the_other_modality(model: HashingModel) -> None:
    model.eval()
    assert "text" not in model.image_fields and "labels" not in model.image_fields | model.text_fields
    with torch.no_grad():
        model.encode_text(rows(model.text_fields - model.optional_fields))
        model.encode_image(rows(model.image_fields - model.optional_fields))


def test_a_batch_of_one_row_works(model: HashingModel) -> None:
    model.train()
    assert model(rows(model.fields, count=1), PROGRESS).loss.isfinite()


@pytest.mark.parametrize("kind", UNUSUAL_LABELS)
def test_unusual_labels_give_finite_losses_and_gradients(model: HashingModel, kind: str) -> None:
    batch = rows(model.fields)
    if "labels" not in batch:
        pytest.skip("the method sees no labels")
    model.train()
    output = model(Batch({**batch, "labels": UNUSUAL_LABELS[kind]}), PROGRESS)
    assert output.loss.isfinite() and all(term.isfinite() for term in output.terms.values())
    for step, done in updates(output, tiny.descents(model, 0.0)):
        assert all(value.isfinite() for value in (done.loss, *done.terms.values())), step
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), (step, name)


def test_all_state_is_parameters_and_buffers(model: HashingModel) -> None:
    for name, module in model.named_modules():
        hidden = [key for key, value in vars(module).items() if isinstance(value, Tensor)]
        assert hidden == [], f"{name}: {hidden}"


def test_state_dict_round_trip_gives_the_same_model(model: HashingModel, tmp_path: Path) -> None:
    model.train()
    torch.manual_seed(5)
    model(rows(model.fields), PROGRESS)
    other = build(_name(model), tmp_path)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(model.state_dict())
    model.eval(), other.eval()
    with torch.no_grad():
        batch = rows(model.image_fields)
        assert torch.equal(model.encode_image(batch), other.encode_image(batch))
        batch = rows(model.text_fields)
        assert torch.equal(model.encode_text(batch), other.encode_text(batch))
    model.train(), other.train()
    batch = rows(model.fields, seed=3)
    losses = []
    for each in (model, other):
        torch.manual_seed(4)
        losses.append(each(batch, PROGRESS).loss)
    assert torch.equal(losses[0], losses[1])


def test_steps_are_functions_of_the_seed(model: HashingModel) -> None:
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for _ in range(2):
        model.load_state_dict(state)
        torch.manual_seed(3)
        losses.append(model(rows(model.fields), PROGRESS).loss.item())
    assert losses[0] == losses[1]


def test_labels_reach_only_methods_that_name_them(model: HashingModel) -> None:
    source = inspect.getsource(type(model))
    if "labels" not in model.fields:
        assert "labels_of_training_set" not in source and '["labels"]' not in source


@functools.cache
def attributes_read() -> set[str]:
    """Names of all attributes that the models' files read."""
    trees = (ast.parse(path.read_text()) for path in (ROOT / "models").rglob("*.py"))
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("name", METHODS)
def test_every_config_field_is_read(name: str) -> None:
    """A setting that nothing reads would be a promise that nobody keeps."""
    cls, read = MODELS.get(name).Config, attributes_read()
    ours = {field for field in cls.model_fields if field not in {"name", "backbone"}}
    assert ours <= read, ours - read


@pytest.mark.parametrize("name", METHODS)
def test_header_says_where_it_comes_from(name: str) -> None:
    path = Path(inspect.getfile(MODELS.get(name)))
    header = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert re.search(r"^Paper: ", header, re.M) and "Deviations" in header
    assert "Authors' code: " in header
    assert len(path.read_text().splitlines()) <= 450


@pytest.mark.parametrize("folder", ["common", "runners", "utils"])
def test_shared_code_branches_on_no_method(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not words & set(METHODS), path


def test_a_prepare_that_leaves_clip_as_it_was_drawn_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    data = tiny.data_info(tiny.rows_of(), "")
    other = CLIP(tiny.SHAPE).state_dict()
    data = dataclasses.replace(data, backbone=Backbone(tiny.SHAPE, other, "tiny"))
    cls = MODELS.get("DNpH")
    model = cls(cls.Config.model_validate(tiny.section("DNpH")), data)
    with pytest.raises(UserError, match=r"DNpH.prepare left CLIP without its weights; call super\(\).prepare"):
        require_backbone(model, data)
    model.prepare(data)
    require_backbone(model, data)
    model.towers = model.backbone
    del model.backbone
    require_backbone(model, data)
    assert "DNpH has no CLIP as its attribute backbone, where checkpoints look for it" in caplog.text


def _name(model: HashingModel) -> str:
    return next(name for name in METHODS if MODELS.get(name) is type(model))
