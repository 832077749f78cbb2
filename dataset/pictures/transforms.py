"""From a decoded picture to the model's input: geometry on uint8, one picture at a time or a batch at once.

Two paths give the same pixels: Pillow, for pictures read one by one, and weighted sums over a whole batch, for
pictures that lie side by side on a device. Random choices come in as numbers, see `dataset.pictures.draws`.
"""

# Not torchvision: on Pillow pictures its v2 resize and crop call Pillow too (60 of 60 pictures bit-equal, no gain in
# time beyond noise); on tensors it took 0.94 ms a picture for 2.44 here, but all of 40 pictures differed, by up to 2.

import math
from enum import Enum

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dataset.pictures.draws import Floats
from utils.transfer import sent

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, scaled to [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
CROP_TRIES = 10
CROP_DRAWS = (
    2 * CROP_TRIES + 3
)  # numbers that one random crop takes: tries of (area, ratio), two for the place, the flip


class View(Enum):
    """What a picture is turned into."""

    CROPPED = "shorter side to R, centre crop"  # training in the papers' code
    SQUASHED = "resized to R x R"  # evaluation
    RANDOM = "random crop and flip, resized to R x R"  # training with dataset.augment


def cropped(picture: Image.Image, size: int) -> Image.Image:
    """Resizes the shorter side to `size` pixels (bicubic) and cuts out the centre.

    Source:
        Training transform of DCMHT, MITH, DSPH, DNPH; equals torchvision's Resize and CenterCrop.
    """
    width, height, left, top = _shorter_side_to(picture.size, size)
    return picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def cropped_box(size: tuple[int, int], result: int) -> tuple[float, float, float, float]:
    """The part of a picture that `cropped` shows.

    Args:
        size: Width and height of the picture.
        result: Side of the result in pixels.

    Returns:
        Left, top, right, bottom in pixels of the picture, fractions of pixels included.
    """
    width, height, left, top = _shorter_side_to(size, result)
    across, down = size[0] / width, size[1] / height
    return left * across, top * down, (left + result) * across, (top + result) * down


def _shorter_side_to(size: tuple[int, int], result: int) -> tuple[int, int, int, int]:
    """Width and height of a picture whose shorter side becomes `result`, and where its centre begins: left, top."""
    width, height = size
    if width <= height:
        width, height = result, int(result * height / width)
    else:
        width, height = int(result * width / height), result
    return width, height, round((width - result) / 2), round((height - result) / 2)


def squashed(picture: Image.Image, size: int) -> Image.Image:
    """Resizes to `size` x `size` pixels (bicubic), the aspect ratio not kept."""
    return picture.resize((size, size), Image.Resampling.BICUBIC)


def random_crop(picture: Image.Image, draws: Floats, size: int) -> Image.Image:
    """Cuts out the box of `crop_boxes`, resizes it (bilinear), and mirrors it or not.

    Args:
        picture: The picture.
        draws: Numbers in [0, 1), [CROP_DRAWS].
        size: Side of the result in pixels.
    """
    (left, top, right, bottom), flip = crop_boxes(np.array([picture.size]), draws[None])[0], flips(draws[None])[0]
    box = (int(left), int(top), int(right), int(bottom))
    picture = picture.crop(box).resize((size, size), Image.Resampling.BILINEAR)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else picture


def flips(draws: Floats) -> npt.NDArray[np.bool_]:
    """Which pictures are mirrored, each with probability 1/2: [B] from the last of `draws` [B, CROP_DRAWS]."""
    mirrored: npt.NDArray[np.bool_] = draws[:, -1] < 0.5
    return mirrored


def crop_boxes(sizes: npt.NDArray[np.int64], draws: Floats) -> npt.NDArray[np.int64]:
    """Boxes of random area (8 % to 100 % of the picture) and aspect ratio (3/4 to 4/3, log-uniform).

    Of ten tries the first that fits into the picture is taken; if none does, the largest central box within the ratios.

    Args:
        sizes: Width and height of every picture in pixels, [B, 2].
        draws: Numbers in [0, 1), [B, CROP_DRAWS].

    Returns:
        Left, top, right, bottom in whole pixels, right and bottom exclusive, [B, 4].

    Source:
        The distribution of torchvision's RandomResizedCrop, which the unified library trains with.
    """
    width, height = sizes[:, :1], sizes[:, 1:]  # [B, 1]
    area = width * height * (0.08 + 0.92 * draws[:, :CROP_TRIES])
    ratio = np.exp(np.log(3 / 4) + np.log((4 / 3) / (3 / 4)) * draws[:, CROP_TRIES : 2 * CROP_TRIES])
    box_width, box_height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (box_width >= 1) & (box_width <= width) & (box_height >= 1) & (box_height <= height)
    rows, first = np.arange(len(sizes)), fits.argmax(axis=1)
    fallback_width = np.minimum(width, np.rint(height * 4 / 3))[:, 0]
    fallback_height = np.minimum(height, np.rint(width * 4 / 3))[:, 0]
    any_fits = fits.any(axis=1)
    chosen_width = np.where(any_fits, box_width[rows, first], np.maximum(fallback_width, 1))
    chosen_height = np.where(any_fits, box_height[rows, first], np.maximum(fallback_height, 1))
    spare_width, spare_height = width[:, 0] - chosen_width, height[:, 0] - chosen_height
    left = np.where(any_fits, np.floor(draws[:, -3] * (spare_width + 1)), spare_width // 2)
    top = np.where(any_fits, np.floor(draws[:, -2] * (spare_height + 1)), spare_height // 2)
    return np.stack([left, top, left + chosen_width, top + chosen_height], axis=1).astype(np.int64)


def to_pixels(picture: Image.Image) -> Tensor:
    """Grey levels of a picture in RGB, [H, W, 3] uint8."""
    return torch.from_numpy(np.array(picture))


def view_pixels(picture: Image.Image, view: View, size: int, draws: Floats | None) -> Tensor:
    """One picture as the model sees it, before normalisation.

    Args:
        picture: In RGB.
        view: The transform.
        size: Side R in pixels.
        draws: Numbers for `View.RANDOM`, [CROP_DRAWS].

    Returns:
        Pixels, [3, R, R] uint8.
    """
    if draws is not None and view is View.RANDOM:
        picture = random_crop(picture, draws, size)
    else:
        picture = cropped(picture, size) if view is View.CROPPED else squashed(picture, size)
    return to_pixels(picture).permute(2, 0, 1)


def resample(pictures: Tensor, boxes: Tensor, mirrored: Tensor, size: int) -> Tensor:
    """Cuts a box out of every picture of a batch, resizes it and mirrors it or not, as `random_crop` does.

    Resizing is separable: first rows are averaged, then columns, each with a few weights per result. With whole-pixel
    boxes it differs from Pillow by at most one grey level of 255, since Pillow rounds twice on the way.

    Args:
        pictures: Pictures side by side, [B, S, S, 3], grey levels 0 to 255.
        boxes: Left, top, right, bottom in pixels of `pictures`, fractions allowed, [B, 4] float32.
        mirrored: Which results are mirrored, [B] bool.
        size: Side R of the results.

    Returns:
        Grey levels, not rounded, [B, 3, R, R] float32.
    """
    batch, side = pictures.shape[:2]
    rows, row_weights = _triangles(boxes[:, 1], boxes[:, 3], side, size)
    columns, column_weights = _triangles(boxes[:, 0], boxes[:, 2], side, size)
    columns = torch.where(mirrored[:, None, None], columns.flip(1), columns)
    column_weights = torch.where(mirrored[:, None, None], column_weights.flip(1), column_weights)
    lines = pictures.float().reshape(batch * side, side * 3)
    lines = F.embedding_bag(rows.flatten(0, 1), lines, mode="sum", per_sample_weights=row_weights.flatten(0, 1))
    lines = lines.view(batch, size, side, 3).transpose(1, 2).reshape(batch * side, size * 3)
    lines = F.embedding_bag(columns.flatten(0, 1), lines, mode="sum", per_sample_weights=column_weights.flatten(0, 1))
    return lines.view(batch, size, size, 3).permute(0, 3, 2, 1).contiguous()  # from [B, column, row, 3]


def _triangles(start: Tensor, end: Tensor, side: int, size: int) -> tuple[Tensor, Tensor]:
    """Which source pixels make up each of `size` results on intervals [B], and their weights, both [B, size, taps].

    Weights fall off linearly from each result's centre, over the step between results but no less than a pixel;
    pixels outside the interval do not count. Pixels are numbered through the batch, `side` to each picture.
    """
    step = ((end - start) / size)[:, None, None]  # [B, 1, 1]
    reach = step.clamp(min=1.0)
    centre = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * step  # [B, size, 1]
    taps = math.ceil(2 * max(1.0, side / size)) + 1
    pixel = (centre - reach + 0.5).floor() + torch.arange(taps, device=start.device)
    inside = (pixel + 1 > start[:, None, None]) & (pixel < end[:, None, None])
    weights = (1.0 - (pixel + 0.5 - centre).abs() / reach).clamp(min=0.0) * inside
    picture = torch.arange(len(start), device=start.device)[:, None, None] * side
    return picture + pixel.clamp(0, side - 1).long(), weights / weights.sum(dim=-1, keepdim=True)


def normalise(pixels: Tensor) -> Tensor:
    """Scales grey levels to [0, 1] and standardises the channels with CLIP's mean and deviation.

    Args:
        pixels: Grey levels 0 to 255 of any dtype, [B, 3, R, R].

    Returns:
        The model's input, [B, 3, R, R] float32.
    """
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    scale, shift = (sent(numbers, pixels.device) for numbers in (1 / (255 * std), mean / std))
    if pixels.device.type != "cpu":
        return pixels.to(torch.float32, copy=True).mul_(scale).sub_(shift)
    # One picture at a time stays in the processor's cache, and NumPy, unlike torch, asks for huge pages: much faster
    result = torch.from_numpy(np.empty(pixels.shape, np.float32))
    for picture, out in zip(pixels, result, strict=True):
        out.copy_(picture).mul_(scale).sub_(shift)
    return result
