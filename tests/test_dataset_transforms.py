"""Transforms: equal to torchvision's, and the batched path equal to Pillow's."""

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.pictures.draws import Purpose, uniform
from dataset.pictures.transforms import (
    CROP_DRAWS,
    MEAN,
    STD,
    View,
    crop_boxes,
    cropped,
    flips,
    normalise,
    random_crop,
    resample,
    squashed,
    to_pixels,
    view_pixels,
)
from tests.datasets import smooth_picture

SIZES = [(24, 24), (37, 23), (23, 37), (100, 17), (16, 16), (9, 40), (17, 16)]


def draws(count: int, seed: int = 1):
    return uniform(seed, 0, Purpose.AUGMENT, np.arange(count), CROP_DRAWS)


@pytest.mark.parametrize("size", SIZES)
def test_views_equal_torchvision(size):
    transforms = pytest.importorskip("torchvision.transforms.v2.functional")
    bicubic = pytest.importorskip("torchvision.transforms").InterpolationMode.BICUBIC
    picture = smooth_picture(3, *size)
    train = transforms.center_crop(transforms.resize(picture, [16], interpolation=bicubic), [16, 16])
    evaluate = transforms.resize(picture, [16, 16], interpolation=bicubic)
    assert np.array_equal(np.array(cropped(picture, 16)), np.array(train))
    assert np.array_equal(np.array(squashed(picture, 16)), np.array(evaluate))
    expected = transforms.normalize(
        transforms.to_dtype(transforms.to_image(train), torch.float32, scale=True), MEAN, STD
    )
    pixels = view_pixels(picture, View.CROPPED, 16, None)
    assert pixels.shape == (3, 16, 16)
    torch.testing.assert_close(normalise(pixels[None])[0], expected, rtol=0, atol=2e-6)


def test_normalise_keeps_its_argument_and_takes_no_rows():
    pixels = torch.full((1, 3, 2, 2), 255.0)
    normalised = normalise(pixels)
    assert (pixels == 255).all()
    torch.testing.assert_close(normalised[0, :, 0, 0], (1 - torch.tensor(MEAN)) / torch.tensor(STD))
    assert normalise(torch.empty(0, 3, 2, 2, dtype=torch.uint8)).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("size", [(24, 24), (500, 375), (64, 640), (3, 2), (1, 1), (1, 300)])
def test_crop_boxes_lie_inside_the_picture(size):
    boxes = crop_boxes(np.tile(np.array([size]), (2000, 1)), draws(2000))
    left, top, right, bottom = boxes.T
    assert ((left >= 0) & (top >= 0) & (right <= size[0]) & (bottom <= size[1])).all()
    assert ((right > left) & (bottom > top)).all()


def test_crop_boxes_have_the_stated_distribution():
    boxes = crop_boxes(np.full((20000, 2), 1000), draws(20000))
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = width * height / 1e6, width / height
    assert 0.079 < area.min()
    assert area.max() <= 1.0
    assert 0.74 < ratio.min()
    assert ratio.max() < 1.35
    small = area < 0.5  # every such box fits at the first try, so nothing is rejected
    assert abs(np.log(ratio[small]).mean()) < 0.01
    assert np.abs(np.histogram(area[small], bins=4, range=(0.08, 0.5))[0] / small.sum() - 0.25).max() < 0.02
    spare = (boxes[:, 0] / np.maximum(1000 - width, 1))[width < 900]
    assert abs(spare.mean() - 0.5) < 0.01
    assert abs(flips(draws(20000)).mean() - 0.5) < 0.02


def test_extreme_picture_gets_the_central_box():
    boxes = crop_boxes(np.array([[1000, 10], [10, 1000]]), draws(2))
    assert boxes.tolist() == [[493, 0, 506, 10], [0, 493, 10, 506]]


@pytest.mark.parametrize(("side", "size"), [(24, 16), (32, 16), (70, 16), (16, 16), (12, 16), (64, 33)])
def test_batched_crop_is_within_a_grey_level_of_pillow(side, size):
    count = 40
    noise = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    drawn = draws(count)
    expected = torch.stack(
        [to_pixels(random_crop(Image.fromarray(noise[row]), drawn[row], size)) for row in range(count)]
    )
    boxes = torch.from_numpy(crop_boxes(np.full((count, 2), side), drawn)).float()
    result = resample(torch.from_numpy(noise), boxes, torch.from_numpy(flips(drawn)), size)
    assert result.shape == (count, 3, size, size)
    assert (result - expected.permute(0, 3, 1, 2)).abs().max() <= 1.01


def test_batched_crop_takes_no_rows():
    empty = torch.empty(0, 24, 24, 3, dtype=torch.uint8)
    assert resample(empty, torch.empty(0, 4), torch.empty(0, dtype=torch.bool), 16).shape == (0, 3, 16, 16)
