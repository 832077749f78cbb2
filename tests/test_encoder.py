"""The encoder gives the codes of the evaluation, from a checkpoint alone; what it lacks it says in one line."""

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common import checkpoint
from common.errors import UserError
from common.registry import MODELS
from dataset.base import PairedDataset
from dataset.columns import CaptionColumn, MatrixColumn, PictureColumn, WordColumn
from dataset.splits import Split
from models.base import HashingModel
from models.clip.towers import CLIP
from models.clip.weights import write_clip
from runners import encoding
from runners.encoder import Encoder
from runners.evaluation import Evaluator, SplitCodes
from runners.setup import build_model
from tests.checkpoints import configured, saved
from tests.tiny_data import SHAPE

METHODS = [name for name in MODELS.names() if name != "CLIP"]  # its own test is below: it names no backbone


def raw(dataset: PairedDataset, split: Split, field: str) -> Any:
    """What a user has of a field: paths, sentences, rows of numbers."""
    column = dataset.columns[split][field]
    if isinstance(column, PictureColumn):
        files = dataset.pictures.files()
        assert files is not None
        return [files[number] for number in column.numbers.tolist()]
    if isinstance(column, CaptionColumn):
        return [column.captions.texts[item][0] for item in column.items.tolist()]
    if isinstance(column, WordColumn):
        return ["\n".join(column.words.texts[item]) for item in column.items.tolist()]
    assert isinstance(column, MatrixColumn)
    return column.matrix[column.items].numpy()


def check(encoder: Encoder, dataset: PairedDataset, model: HashingModel, split: Split, codes: SplitCodes) -> None:
    """Pictures and texts of a split, with all that the method makes codes from, give the evaluation's codes."""
    lengths = model.code_lengths
    start = sum(lengths[: lengths.index(encoder.bits)])
    for kind, encode, own in (("image", encoder.images, codes.image), ("text", encoder.texts, codes.text)):
        reads = model.image_fields if kind == "image" else model.text_fields
        fields = reads & dataset.columns[split].keys()
        values = {field: raw(dataset, split, field) for field in fields}
        main = next(field for field in (kind, "bag_of_words", f"{kind}_feature") if field in values)
        made = encode(values.pop(main), **values)
        assert made.values.dtype == np.int8
        assert np.array_equal(made.values, own.numpy()[..., start : start + encoder.bits]), (split, kind)
        assert np.array_equal(np.unpackbits(made.packed(), axis=-1, count=encoder.bits) * 2.0 - 1, made.values)


@pytest.mark.parametrize("method", METHODS)
def test_codes_are_those_of_the_evaluation(method: str, tmp_path: Path, tiny_overrides: list[str]) -> None:
    config = configured(method, tiny_overrides)
    dataset, model, query, database = saved(config, tmp_path / "best.pt")
    encoder = Encoder.load(tmp_path / "best.pt", device="cpu")
    assert encoder.encoding.marks == [*model.marks, *dataset.marks(model.image_fields | model.text_fields)]
    check(encoder, dataset, model, "query", query)
    check(encoder, dataset, model, "database", database)
    for bits in model.code_lengths[1:]:
        check(Encoder.load(tmp_path / "best.pt", device="cpu", bits=bits), dataset, model, "query", query)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("UCMFH", ["model.missing=paired"]),
        ("UCCH", ["run.precision=bf16"]),
    ],
)
def test_other_settings_that_change_codes(
    method: str, settings: list[str], tmp_path: Path, tiny_overrides: list[str]
) -> None:
    dataset, model, query, _ = saved(configured(method, tiny_overrides, *settings), tmp_path / "best.pt")
    check(Encoder.load(tmp_path / "best.pt", device="cpu"), dataset, model, "query", query)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> tuple[Encoder, list[str]]:
    """DSPH in small, and the paths of its pictures."""
    path = tmp_path_factory.mktemp("trained") / "best.pt"
    dataset, *_ = saved(configured("DSPH", tiny_overrides), path)
    return Encoder.load(path, device="cpu"), list(dataset.pictures.files() or ())


def test_pictures_in_every_form(trained: tuple[Encoder, list[str]]) -> None:
    encoder, paths = trained
    expected = encoder.images(paths[:3]).values
    pictures = [Image.open(path).convert("RGB") for path in paths[:3]]
    forms: list[list[Any]] = [
        [Path(path) for path in paths[:3]],
        pictures,
        [np.array(picture) for picture in pictures],
        [io.BytesIO(Path(path).read_bytes()) for path in paths[:3]],
        [lambda picture=picture: picture for picture in pictures],
        [picture.convert("RGBA") for picture in pictures],
    ]
    for form in forms:
        assert np.array_equal(encoder.images(form).values, expected)
    grey = np.array(pictures[0].convert("L"))
    assert encoder.images([grey]).values.shape == (1, 16) and encoder.images([]).values.shape == (0, 16)


def test_what_cannot_be_read_stands_in_its_place(trained: tuple[Encoder, list[str]], tmp_path: Path) -> None:
    """Items around it get the codes that they get without it, whatever the batch."""
    encoder, paths = trained
    (tmp_path / "broken.png").write_bytes(Path(paths[0]).read_bytes()[:100])
    items = [*paths[:20], str(tmp_path / "broken.png"), *paths[20:], str(tmp_path / "none.png")]
    made = list(encoder.stream("image", ({"image": path} for path in items)))
    errors = {row: value for row, value in enumerate(made) if isinstance(value, UserError)}
    assert set(errors) == {20, len(items) - 1}
    assert f"{tmp_path}/broken.png is truncated or broken" in str(errors[20])
    codes = [value for value in made if not isinstance(value, UserError)]
    assert np.array_equal(np.stack(codes), encoder.images(paths).values)
    with pytest.raises(UserError, match=r"none.png is missing; fetch it again, or name one that is there"):
        encoder.images(items[-1:])


def test_what_is_refused(trained: tuple[Encoder, list[str]], tmp_path: Path, tiny_overrides: list[str]) -> None:
    encoder, paths = trained
    with pytest.raises(UserError, match="1 rows of labels for 2 images; give one for each"):
        encoder.images(paths[:2], labels=["x"])
    with pytest.raises(UserError, match=r"uint8, no side 0, not \[2, 2\] float64"):
        encoder.images([np.zeros((2, 2))])
    with pytest.raises(UserError, match="gives codes of 16 bits, not of 32"):
        Encoder.load(encoder.name.rpartition(" of ")[2], bits=32)
    paired = tmp_path / "paired.pt"
    saved(configured("UCMFH", tiny_overrides, "model.missing=paired"), paired)
    with pytest.raises(UserError, match="text codes are made from image and text, and there is no image here"):
        Encoder.load(paired, device="cpu").texts(["a red heart"])


def test_one_thing_is_not_several(trained: tuple[Encoder, list[str]]) -> None:
    """The letters of one text, or the rows of one picture, would get codes, too."""
    encoder, paths = trained
    picture = Image.open(paths[0]).convert("RGB")
    grey = np.array(picture.convert("L"))
    for one in (paths[0], Path(paths[0]), picture, np.array(picture), grey, None, {"a": paths[0]}, set(paths[:2])):
        with pytest.raises(UserError, match=f"images takes a list, not a {type(one).__name__}; one alone"):
            encoder.images(one)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="texts takes a list, not a str; one alone"):
        encoder.texts("a red heart")
    stack = np.stack([np.array(picture)] * 2)
    assert np.array_equal(encoder.images(stack).values, encoder.images(iter(stack)).values)  # type: ignore[arg-type]


def test_things_that_are_no_picture_and_no_text(trained: tuple[Encoder, list[str]], tmp_path: Path) -> None:
    encoder, paths = trained
    whole = Path(paths[0]).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    closed = Image.open(paths[0])
    closed.close()
    arrays = [np.zeros(shape, np.uint8) for shape in ((3, 8, 8), (8, 8, 1), (8, 8, 2), (0, 8, 3), (8,), (1, 8, 8, 3))]
    for thing, message in (
        *((array, r"array is \[H, W\], \[H, W, 3\] or \[H, W, 4\] uint8, no side 0, not") for array in arrays),
        (None, "a picture is a path, .*, not a NoneType"),
        (whole, "a picture is a path, .*, not a bytes"),
        (torch.zeros(8, 8, 3), "a picture is a path, .*, not a Tensor"),
        (Image.new("RGB", (0, 8)), "the picture has no pixels; leave it out"),
        (Image.open(tmp_path / "half.png"), "the picture is truncated or broken"),
        (lambda: Image.open(tmp_path / "half.png"), "the picture is truncated or broken"),
        (closed, "the picture is truncated or broken"),
        (lambda: None, "a picture is a path, .*, not a NoneType"),
    ):
        with pytest.raises(UserError, match=message):
            encoder.images([thing])  # type: ignore[list-item]
    for text in (None, 3, float("nan"), b"heart", ["a"]):
        with pytest.raises(UserError, match=f"a text is a string, not a {type(text).__name__}"):
            encoder.texts([text])


def test_fields_beside(trained: tuple[Encoder, list[str]], tmp_path: Path, tiny_overrides: list[str]) -> None:
    encoder, paths = trained
    stored = tmp_path / "stored.pt"
    with pytest.raises(UserError, match="there is no field 'capton' here, only image, labels, text"):
        encoder.images(paths[:1], capton=["x"])
    with pytest.raises(UserError, match="image is given twice"):
        encoder.images(paths[:1], image=paths[1:2])
    with pytest.raises(UserError, match="text takes a list, not a str; one alone"):
        encoder.images(paths[:1], text="a")
    with pytest.raises(UserError, match="device 'cuda:0' is none of auto, cpu, cuda and the number of a GPU"):
        Encoder.load(stored, device="cuda:0")
    saved(configured("CFRH", tiny_overrides), stored)
    other = Encoder.load(stored, device="cpu")
    with pytest.raises(UserError, match="a row of bag_of_words holds NaN or infinity"):
        other.texts([np.full(other.encoding.field_shapes["bag_of_words"], np.nan)])


def test_an_item_may_lack_what_another_has(tmp_path: Path, tiny_overrides: list[str]) -> None:
    """In one stream: each gets the code that it gets alone."""
    dataset, model, *_ = saved(configured("VTPH", tiny_overrides), tmp_path / "best.pt")
    encoder = Encoder.load(tmp_path / "best.pt", device="cpu")
    optional = sorted(model.optional_fields & encoder.fields["text"])
    assert optional
    has = {field: raw(dataset, "database", field)[0] for field in encoder.fields["text"]}
    lacks = {field: value for field, value in has.items() if field not in optional}

    def codes(*items: dict[str, Any]) -> list[Any]:
        made = list(encoder.stream("text", items))
        assert not any(isinstance(code, UserError) for code in made)
        return [code.tolist() for code in made if not isinstance(code, UserError)]

    (with_all,), (without,) = codes(has), codes(lacks)
    assert with_all != without
    assert codes(has, lacks, lacks, has, has) == [with_all, without, without, with_all, with_all]


def test_checkpoints_that_do_not_say_how_they_encode(tmp_path: Path, tiny_overrides: list[str]) -> None:
    path, config = tmp_path / "best.pt", configured("DSPH", tiny_overrides)
    *_, model, query, _ = saved(config, path)
    loaded = checkpoint.load(path)
    damaged = loaded.meta | {encoding.KEY: loaded.meta[encoding.KEY] | {"batch_size": 0}}
    for meta, message in (
        ({"config": config.tree}, "was written by an earlier version and lacks 'encoding'"),
        (damaged, r"is damaged \(encoding.batch_size: Input should be greater than 0\)"),
        (loaded.meta | {"config": {}}, "model.name: missing"),
        ({encoding.KEY: loaded.meta[encoding.KEY]}, "does not hold the configuration of its run"),
    ):
        checkpoint.save(path, meta, model.state_dict())
        with pytest.raises(UserError, match=message) as refused:
            Encoder.load(path)
        assert "\n" not in str(refused.value)
    torch.save(model.state_dict(), path)
    with pytest.raises(UserError, match="was written by another program"):
        Encoder.load(path)
    checkpoint.save(path, loaded.meta, {"proxies": torch.zeros(3, 3)})
    with pytest.raises(UserError, match=f"checkpoint {path}: not a whole CLIP"):
        Encoder.load(path)
    checkpoint.save(path, loaded.meta, {**model.state_dict(), "proxies": torch.zeros(3, 3)})
    with pytest.raises(UserError, match="does not fit DSPH with 16 bits"):
        Encoder.load(path)


def test_sizes_that_the_weights_do_not_have(tmp_path: Path, tiny_overrides: list[str]) -> None:
    """Told before memory is taken: each of these would be far more than a machine has, or a traceback."""
    path = tmp_path / "best.pt"
    saved(configured("MITH", tiny_overrides), path)
    loaded = checkpoint.load(path)
    encoded = loaded.meta[encoding.KEY]
    shapes, clip = encoded["field_shapes"], encoded["clip"]
    for changed, message in (
        ({"num_train": 10**9}, "does not fit MITH with 16 bits: 5 other shapes"),
        ({"num_train": 10**30}, "encoding.num_train: Input should be less than or equal to"),
        ({"field_shapes": shapes | {"labels": [10**6]}}, "other shapes"),
        ({"field_shapes": shapes | {"labels": [10**30]}}, "encoding.field_shapes"),
        ({"field_shapes": shapes | {"text": [1]}}, "text of 1 tokens"),
        ({"field_shapes": shapes | {"text": [10**6]}}, f"text of {10**6} tokens"),
        ({"field_shapes": shapes | {"text": []}}, "encoding.field_shapes"),
        ({"field_shapes": shapes | {"image": [3, 10**6, 10**6]}}, r"image of the shape \[3, 1000000, 1000000\]"),
        ({"field_shapes": {}}, "lacks image, labels, text"),
        ({"clip": None}, "its CLIP"),
        *(
            ({"clip": clip | {name: size}}, "its CLIP")
            for name in set(clip) - {"activation"}
            for size in (-1, 0, 10**30)
        ),
    ):
        checkpoint.save(path, loaded.meta | {encoding.KEY: encoded | changed}, loaded.model)
        with pytest.raises(UserError, match=message) as refused:
            Encoder.load(path, device="cpu")
        assert str(refused.value).startswith(f"checkpoint {path} ") and "\n" not in str(refused.value)


def test_weights_of_another_kind(tmp_path: Path, tiny_overrides: list[str]) -> None:
    """Whole numbers or truth values in place of weights give codes, too: of another model."""
    path = tmp_path / "best.pt"
    saved(configured("MITH", tiny_overrides), path)
    loaded = checkpoint.load(path)
    for kind in (torch.int64, torch.bool, torch.complex64):
        other = {name: value.to(kind) if value.is_floating_point() else value for name, value in loaded.model.items()}
        checkpoint.save(path, loaded.meta, other)
        with pytest.raises(UserError, match=f"is {kind} there, torch.float32 here"):
            Encoder.load(path, device="cpu")
    for kind in (torch.float64, torch.bfloat16):
        other = {name: value.to(kind) if value.is_floating_point() else value for name, value in loaded.model.items()}
        checkpoint.save(path, loaded.meta, other)
        assert Encoder.load(path, device="cpu").texts(["a red heart"]).values.shape == (1, 16)


def test_a_checkpoint_is_enough(tmp_path: Path, tiny_overrides: list[str]) -> None:
    """Data and backbone are gone, and nothing of the machine that trained it is here."""
    root = next(entry.partition("=")[2] for entry in tiny_overrides if entry.startswith("dataset.root="))
    shutil.copytree(root, tmp_path / "data")
    config = configured("CFRH", tiny_overrides, f"dataset.root={tmp_path / 'data'}")
    dataset, _, query, _ = saved(config, tmp_path / "best.pt")
    texts, picture = raw(dataset, "query", "bag_of_words"), Image.open(raw(dataset, "query", "image")[0]).convert("RGB")
    shutil.rmtree(tmp_path / "data")
    encoder = Encoder.load(tmp_path / "best.pt", device="cpu")
    assert np.array_equal(encoder.texts(texts).values, query.text.numpy())
    assert np.array_equal(encoder.images([picture]).values[0], query.image.numpy()[0])


def test_a_method_may_compute_while_it_is_built(
    tmp_path: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, _, query, _ = saved(configured("DSPH", tiny_overrides), tmp_path / "best.pt")
    method = MODELS.get("DSPH")
    plain = method.__init__

    def with_a_value(self: HashingModel, *arguments: Any) -> None:
        plain(self, *arguments)
        assert isinstance(next(self.parameters()).flatten()[0].item(), float)

    monkeypatch.setattr(method, "__init__", with_a_value)
    encoder = Encoder.load(tmp_path / "best.pt", device="cpu")
    assert np.array_equal(encoder.texts(raw(dataset, "query", "text")).values, query.text.numpy())


def test_equal_models_have_equal_fingerprints(tmp_path: Path, tiny_overrides: list[str]) -> None:
    config = configured("DSPH", tiny_overrides)
    _, model, _, _ = saved(config, tmp_path / "one.pt")
    loaded = checkpoint.load(tmp_path / "one.pt")
    state = model.state_dict()
    checkpoint.save(tmp_path / "two.pt", loaded.meta | {"epoch": 3}, state, {"main": {"step": 7}})
    name = next(name for name in state if name.startswith("backbone."))
    state[name] = state[name] + 1
    checkpoint.save(tmp_path / "three.pt", loaded.meta, state)
    one, two, three = (
        Encoder.load(tmp_path / f"{name}.pt", device="cpu").fingerprint for name in ("one", "two", "three")
    )
    assert one == two != three


def test_the_activation_of_a_foreign_clip_is_kept(tmp_path: Path, tiny_overrides: list[str]) -> None:
    """No weight shows it, so the checkpoint says it; evaluation obeys, too."""
    backbone = tmp_path / "gelu.safetensors"
    torch.manual_seed(0)
    write_clip(backbone, CLIP(replace(SHAPE, activation="gelu")).state_dict(), {"activation": "gelu"})
    config = configured("DSPH", tiny_overrides, f"model.backbone={backbone}")
    dataset, model, query, _ = saved(config, tmp_path / "best.pt")
    check(Encoder.load(tmp_path / "best.pt", device="cpu"), dataset, model, "query", query)
    again = build_model(config, dataset, checkpoint.load(tmp_path / "best.pt"), torch.device("cpu"), training=False)
    towers = again.get_submodule("backbone")
    assert isinstance(towers, CLIP) and towers.shape.activation == "gelu"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_on_a_gpu(precision: str, tmp_path: Path, tiny_overrides: list[str]) -> None:
    config = configured("MITH", tiny_overrides, f"run.precision={precision}")
    dataset, model, *_ = saved(config, tmp_path / "best.pt")
    device = torch.device("cuda")
    codes = Evaluator(config, dataset, model.to(device), device).evaluate().codes
    query, database = codes["query"], codes["database"]
    encoder = Encoder.load(tmp_path / "best.pt", device="cuda")
    check(encoder, dataset, model, "query", query)
    check(encoder, dataset, model, "database", database)
