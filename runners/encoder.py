"""Codes of any pictures and texts from a checkpoint alone: no data set, no configuration file, no training.

encoder = Encoder.load("best.pt")
codes = encoder.texts(["a red heart"])
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from common.checkpoint import Checkpoint, load
from common.codes import Codes
from common.config import check_model
from common.errors import UserError
from common.registry import MODELS, near_names
from common.types import Backbone, Batch, DataInfo
from dataset.pictures.opening import as_rgb, decoded, opened
from dataset.pictures.transforms import View, normalise, view_pixels
from dataset.texts.tokenizer import tokenize
from dataset.texts.word_vectors import word_vector
from models.base import HashingModel, ModelConfig
from runners.encoding import PICTURES, TEXTS, Encoding, encoding_of
from runners.search.engine import Kind
from runners.setup import autocast, load_weights, require_fit
from utils.launch import pick_device
from utils.progress import progress
from utils.threads import in_threads

# A path, a picture of Pillow, an array [H, W], [H, W, 3] or [H, W, 4], an open file, or what gives a picture when due
Picture = str | Path | Image.Image | npt.NDArray[Any] | BinaryIO | Callable[[], Image.Image]
Item = Mapping[str, Any]  # what an item has, by batch field: pictures, texts, rows of numbers

_STANDS_FOR: dict[Kind, tuple[str, ...]] = {  # what `images` and `texts` may be handed as the thing itself
    "image": ("image", "image_feature"),
    "text": ("text", "bag_of_words", "text_feature"),
}
_AHEAD = 4  # batches of pictures decoded while one is computed


class Encoder:
    """Makes codes with a trained model, as evaluation does, from what the user has.

    Codes are those of the evaluation, to the last bit, where rows come in the same order and number at a time, are read
    from the pictures themselves (`dataset.cache: null`) and computed on the same device. Otherwise sums are rounded in
    another order, and a bit whose value is next to 0 may turn.

    Args:
        model: The method, with its weights.
        encoding: What the checkpoint says of itself.
        settings: The `model:` section.
        source: The checkpoint.
        device: Where to compute.
        bits: Which of the lengths that the model gives.

    Attributes:
        path: The checkpoint.
        tree: The configuration that it was trained with.
        name: What the user calls this model.
        batch_size: Rows computed at a time; at first the evaluation's.
        fields: Batch fields that codes of pictures and of texts are made from.
        columns: Where codes of `bits` stand in what the model returns.
    """

    def __init__(
        self,
        model: HashingModel,
        encoding: Encoding,
        settings: ModelConfig,
        source: Checkpoint,
        device: torch.device,
        bits: int,
    ) -> None:
        self.model = model.to(device).eval()
        self.encoding = encoding
        self.settings = settings
        self.path = source.path
        self.tree: dict[str, Any] = source.config
        self.name = f"{settings.name}, {bits} bits, of {source.path}"
        self.batch_size = encoding.batch_size
        self.device = device
        self.bits = bits
        lengths = list(model.code_lengths)
        start = sum(lengths[: lengths.index(bits)])
        self.columns = slice(start, start + bits)
        self._number = {word: place for place, word in enumerate(encoding.vocabulary or ())}
        self.fields: dict[Kind, frozenset[str]] = {"image": model.image_fields, "text": model.text_fields}

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto", bits: int | None = None) -> Self:
        """Builds the model that a checkpoint holds.

        Args:
            path: A checkpoint of this library, such as `best.pt`.
            device: `auto` (a GPU if there is one), `cpu`, `cuda` or the number of a GPU.
            bits: For a method with codes of several lengths, which; None for `model.bits`.

        Raises:
            UserError: If the file cannot be used, or lacks what encoding needs.
        """
        if not re.fullmatch(r"auto|cpu|cuda|\d+", str(device)):
            raise UserError(f"device {device!r} is none of auto, cpu, cuda and the number of a GPU; name one of them")
        loaded = load(Path(path))
        encoding = encoding_of(loaded)
        tree = loaded.config
        config = check_model(tree.get("model"), f"checkpoint {path}")
        method: type[HashingModel] = MODELS.get(config.name)
        encoding.require_whole(config, method, f"checkpoint {path}")
        data = DataInfo(
            num_train=encoding.num_train,
            field_shapes=encoding.field_shapes,
            train_labels=None,
            backbone=None if encoding.clip is None else Backbone(encoding.clip, None, str(path)),
            seed=0,
            cache_dir="",
        )
        sizes = _without_values(method, config, data)
        if sizes is not None:  # those that the weights do not have might fill the memory
            require_fit(sizes, loaded.model, loaded)
        model = method(config, data)
        load_weights(model, {"": loaded.model}, loaded)
        bits = config.bits if bits is None else bits
        if bits not in model.code_lengths:
            raise UserError(
                f"checkpoint {path} gives codes of {', '.join(map(str, model.code_lengths))} bits, not of {bits}"
            )
        return cls(model, encoding, config, loaded, pick_device(str(device), False), bits)

    @cached_property
    def fingerprint(self) -> str:
        """Short digest of the weights and of how inputs are read: equal where codes can be compared."""
        settings = {key: value for key, value in self.settings.model_dump().items() if key != "backbone"}
        reads = (settings, self.encoding.clip, self.encoding.view, self.encoding.vocabulary)
        digest = hashlib.sha256(repr((self.bits, reads)).encode())
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def images(self, pictures: Sequence[Picture], **more: Sequence[Any]) -> Codes:
        """Codes of pictures.

        Args:
            pictures: N of them; for a method on stored features, rows of those, [N, W].
            more: What else the method makes such codes from, by batch field, N of each.

        Raises:
            UserError: If a picture cannot be read, there is one alone and no list, or the method needs something else,
                too.
        """
        return self._all("image", pictures, more)

    def texts(self, texts: Sequence[Any], **more: Sequence[Any]) -> Codes:
        """Codes of texts.

        Args:
            texts: N strings; for a method on stored features or word vectors, rows of those, [N, W].
            more: What else the method makes such codes from, by batch field, N of each: pictures for
                `counterpart_image`, strings for `counterpart_caption`, rows of numbers otherwise.

        Raises:
            UserError: If something is no text, there is one alone and no list, or the method needs something else, too.
        """
        return self._all("text", texts, more)

    def stream(self, kind: Kind, items: Iterable[Item]) -> Iterator[npt.NDArray[np.int8] | UserError]:
        """Codes of items, one after the other; items are taken as they are needed, pictures are decoded ahead.

        Args:
            kind: Whether codes of pictures or of texts are made.
            items: What each has; fields that the method does not read are passed over.

        Yields:
            For every item its code, [K] or [n, K] int8, or why it cannot be read.

        Raises:
            UserError: If an item lacks a field that the method cannot do without.
        """
        size = self.batch_size
        waiting: list[dict[str, Tensor] | UserError] = []
        good: list[dict[str, Tensor]] = []
        chosen = ({field: item[name] for name, field in self.reads(kind, item).items()} for item in items)
        for row in in_threads(self.row, chosen, ahead=_AHEAD * size):
            if not isinstance(row, UserError):
                if good and row.keys() != good[0].keys():  # an optional field comes or goes
                    yield from self._encode(kind, waiting)
                    waiting, good = [], []
                good.append(row)
            waiting.append(row)
            if len(good) == size:
                yield from self._encode(kind, waiting)
                waiting, good = [], []
        yield from self._encode(kind, waiting)

    def _all(self, kind: Kind, things: Sequence[Any], more: Mapping[str, Sequence[Any]]) -> Codes:
        field = next((field for field in _STANDS_FOR[kind] if field in self.fields[kind]), kind)
        known = {"text", *self.encoding.field_shapes}  # texts become a bag of words
        things = _listed(f"{kind}s", things, field)
        more = {name: _listed(name, values, name) for name, values in more.items()}
        for name, values in more.items():
            if name not in known:
                near = near_names(name, sorted(known))
                raise UserError(f"there is no field {name!r} here, only {', '.join(sorted(known))}{near}")
            if name == field:
                raise UserError(f"{name} is given twice; leave out {name}=")
            if len(values) != len(things):
                raise UserError(f"{len(values)} rows of {name} for {len(things)} {kind}s; give one for each")
        if field == "bag_of_words" and all(isinstance(thing, str) for thing in things):
            field = "text"
        items = (
            {field: thing, **{name: values[row] for name, values in more.items()}} for row, thing in enumerate(things)
        )
        stream: Iterable[npt.NDArray[np.int8] | UserError] = self.stream(kind, items)
        if len(things) > self.batch_size:
            stream = progress(stream, total=len(things), desc=f"encode {kind}s", unit=kind, leave=False)
        codes = []
        for code in stream:
            if isinstance(code, UserError):
                raise code
            codes.append(code)
        return Codes(np.stack(codes) if codes else np.empty((0, *self.code_shape), np.int8))

    def reads(self, kind: Kind, item: Item) -> dict[str, str]:
        """What codes of an item are made from: the item's field -> the batch field that it becomes.

        Raises:
            UserError: If it lacks what the method cannot do without.
        """
        found = {}
        for field in sorted(self.fields[kind]):
            if field in item:
                found[field] = field
            elif field == "bag_of_words" and self._number and "text" in item:
                found["text"] = field
            elif field not in self.model.optional_fields:
                raise UserError(
                    f"{self.name}: {kind} codes are made from {' and '.join(sorted(self.fields[kind]))}, and there is "
                    f"no {field} here; give it, too"
                )
        return found

    def row(self, item: Item) -> dict[str, Tensor] | UserError:
        """What an item has, by batch field, as tensors: pictures [3, R, R] uint8, ids [L] int64, numbers [W] float32.

        Returns:
            They, or why the item cannot be read.
        """
        try:
            return {field: self._value(field, value) for field, value in item.items()}
        except UserError as error:
            return error

    def batch(self, rows: Sequence[dict[str, Tensor]]) -> Batch:
        """Rows of `row`, one or more, as the model takes them: on its device, pictures normalised."""
        fields = {"index": torch.arange(len(rows), device=self.device)}
        for field in rows[0]:
            values = torch.stack([row[field] for row in rows]).to(self.device)
            fields[field] = normalise(values) if field in PICTURES else values
        return Batch(fields)

    @torch.no_grad()
    def encode(self, kind: Kind, batch: Batch) -> npt.NDArray[np.int8]:
        """Codes of a batch, [B, K] or [B, n, K] int8 in {-1, +1}."""
        encode = self.model.encode_image if kind == "image" else self.model.encode_text
        with autocast(self.encoding.precision, self.device):
            made = encode(batch).to(torch.int8)[..., self.columns]
        codes: npt.NDArray[np.int8] = made.cpu().numpy()
        return codes

    def _value(self, field: str, value: Any) -> Tensor:
        shape = self.encoding.field_shapes[field]
        if field in PICTURES:
            return view_pixels(read_picture(value), View[self.encoding.view], shape[-1], None)
        if field in TEXTS:
            if not isinstance(value, str):
                raise UserError(f"a text is a string, not a {type(value).__name__}; leave it out")
            return tokenize([value], shape[0], self.encoding.tokens)[0]
        if field == "bag_of_words" and isinstance(value, str):
            return word_vector(value, self._number)
        try:
            row = torch.as_tensor(np.asarray(value, np.float32))
        except (TypeError, ValueError):
            raise UserError(
                f"{self.name}: codes are made from rows of {field}, {list(shape)} numbers each, not from "
                f"{type(value).__name__}s; compute them as for the training data"
            ) from None
        if tuple(row.shape) != tuple(shape):
            raise UserError(f"{self.name}: a row of {field} has the shape {list(shape)}, not {list(row.shape)}")
        if not bool(row.isfinite().all()):
            raise UserError(f"{self.name}: a row of {field} holds NaN or infinity, whose code would mean nothing")
        return row

    def _encode(
        self, kind: Kind, rows: Sequence[dict[str, Tensor] | UserError]
    ) -> Iterator[npt.NDArray[np.int8] | UserError]:
        """Codes of rows in one batch, errors passed on in their places."""
        good = [row for row in rows if not isinstance(row, UserError)]
        codes = iter(self.encode(kind, self.batch(good)) if good else ())
        for row in rows:
            yield row if isinstance(row, UserError) else next(codes)

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of an item's code: (K,), or (n, K) for a method with n codes an item."""
        return (*self.model.code_shape[:-1], self.bits)


def read_picture(picture: Picture, pixels: int | None = None) -> Image.Image:
    """A picture in RGB.

    Args:
        picture: What the user has of it.
        pixels: Most pixels; None for Pillow's limit.

    Raises:
        UserError: If it cannot be read.
    """
    if isinstance(picture, str | os.PathLike):
        source: Any = str(picture)
        name = f"picture {picture}"
    elif hasattr(picture, "read"):
        source, name = picture, "the picture"
    else:
        return decoded(_in_memory(picture))
    with opened(source, name, found="name one that is there", instead="leave it out", pixels=pixels) as image:
        return as_rgb(image)


def _without_values(method: type[HashingModel], config: ModelConfig, data: DataInfo) -> HashingModel | None:
    """A model of sizes alone; None for a method that computes with values while it is built."""
    try:
        with torch.device("meta"):
            return method(config, data)
    except Exception:  # what it stumbles over depends on what it computes; if it is wrong, building it in full says so
        return None


def _in_memory(picture: Any) -> Image.Image:
    """A picture of Pillow, of an array, or of a function, of any mode; perhaps not decoded yet."""
    if isinstance(picture, np.ndarray):
        shape = picture.shape
        flat, coloured = len(shape) == 2, len(shape) == 3 and shape[-1] in (3, 4)
        if picture.dtype != np.uint8 or 0 in shape or not (flat or coloured):
            raise UserError(
                f"a picture as an array is [H, W], [H, W, 3] or [H, W, 4] uint8, no side 0, not {list(shape)} "
                f"{picture.dtype}"
            )
        return Image.fromarray(picture)
    made = picture() if callable(picture) else picture
    if not isinstance(made, Image.Image):
        raise UserError(
            "a picture is a path, one of Pillow's, an array, an open file, or a function that gives one of Pillow's, "
            f"not a {type(made).__name__}; leave it out"
        )
    return made


def _listed(name: str, things: Iterable[Any], field: str) -> list[Any]:
    """Things in a list, whatever holds them; `field` is what they are.

    Raises:
        UserError: If it is one thing, whose letters or rows would pass for things themselves, or has no order.
    """
    one = isinstance(things, str | bytes | os.PathLike | Image.Image | Mapping | Set) or not isinstance(
        things, Iterable
    )
    if isinstance(things, np.ndarray) and field in PICTURES:
        one = things.ndim < 3 or (things.ndim == 3 and things.shape[-1] in (3, 4))
    if one:
        raise UserError(f"{name} takes a list, not a {type(things).__name__}; one alone goes into a list, too")
    return list(things)
