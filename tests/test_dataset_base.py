"""Splits, columns, draws: what every data set shares."""

from typing import Any, cast

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.registry import DATASETS
from dataset.base import Contents, PairedDataset, dataset_class
from dataset.columns import MatrixColumn
from dataset.pictures.draws import Purpose, permutation, uniform
from dataset.pictures.reading import PictureFiles
from dataset.splits import PerLabelConfig, SplitConfig, make_splits
from dataset.texts.captions import Captions
from dataset.texts.tokenizer import tokenize
from dataset.texts.word_vectors import WordVectors
from tests import datasets
from utils.seeding import seed_torch


@pytest.mark.parametrize(
    ("seed", "count", "first", "last"),
    [
        (1814, 24581, [21572, 1377, 336, 2853, 24194, 8676], [10265, 22400, 24065]),
        (1814, 195834, [57723, 167302, 18799, 22944, 102189, 93328], [43053, 43033, 91702]),
        (1814, 122218, [110374, 106988, 64378, 99951, 94930, 44562], [91702, 120704, 89601]),
        (1, 20015, [11550, 16587, 6189, 5542, 4365, 12141], [5192, 12172, 235]),
        (1, 190421, [114085, 13813, 155323, 21038, 143234, 176457], [50057, 5192, 128037]),
        (1, 122218, [89146, 35722, 24652, 90025, 51044, 4262], [5192, 77708, 98539]),
    ],
)
def test_splits_are_those_of_the_papers(seed, count, first, last):
    splits = make_splits(
        torch.ones(count, 1, dtype=torch.bool), datasets.permutation(seed=seed, query=5000, train=10000)
    )
    assert splits.query[:6].tolist() == first
    assert splits.database[-3:].tolist() == last
    assert (len(splits.query), len(splits.train), len(splits.database)) == (5000, 10000, count - 5000)
    assert torch.equal(splits.train, splits.database[:10000])
    assert torch.cat([splits.query, splits.database]).sort().values.equal(torch.arange(count))


def test_fingerprint_changes_with_labels_seed_and_sizes_only():
    labels = torch.ones(20, 3, dtype=torch.bool)

    def fingerprint(labels=labels, seed=1, query=4, train=8):
        return make_splits(labels, datasets.permutation(seed=seed, query=query, train=train)).fingerprint

    other = labels.clone()
    other[13, 1] = False
    assert fingerprint() == fingerprint(labels.clone())
    assert (
        len({fingerprint(), fingerprint(other), fingerprint(seed=2), fingerprint(query=5), fingerprint(train=9)}) == 5
    )


@pytest.mark.parametrize(("query", "train"), [(15, 6), (21, 1), (20, 1)])
def test_more_pairs_asked_for_than_there_are(query, train):
    with pytest.raises(UserError, match=rf"{query} query and {train} train pairs, but there are 20") as error:
        make_splits(torch.ones(20, 2, dtype=torch.bool), datasets.permutation(seed=1, query=query, train=train))
    assert "\n" not in str(error.value)


def test_query_without_a_label_is_named():
    config = datasets.permutation(seed=1, query=5, train=10)
    labels = torch.ones(20, 2, dtype=torch.bool)
    query = make_splits(labels, config).query
    labels[query[1]] = False
    with pytest.raises(UserError, match=rf"1 pairs of the query split have no label.*rows {int(query[1])} "):
        make_splits(labels, config)
    labels[:] = True
    labels[make_splits(labels, config).database] = False  # elsewhere it is allowed
    make_splits(labels, config)


def by_label(seed=5, query=9, train=15, shares=(2, 3)) -> SplitConfig:
    per_label = PerLabelConfig(query=shares[0], train=shares[1])
    return SplitConfig(protocol="per_label", seed=seed, query=query, train=train, validation=0, per_label=per_label)


def test_every_label_gives_its_share_and_the_first_what_is_left():
    """Sizes of MIRFlickr by JDSH's rule: 160 and 400 pairs of the first of 24 labels, 80 and 200 of every other one."""
    draw = np.random.default_rng(0)
    labels = torch.from_numpy(draw.random((20015, 24)) < 0.1)
    labels[:, 0] |= ~labels.any(dim=1)
    config = by_label(query=2000, train=5000, shares=(80, 200))
    splits = make_splits(labels, config)
    assert (len(splits.query), len(splits.train), len(splits.database)) == (2000, 5000, 18015)
    assert torch.cat([splits.query, splits.database]).sort().values.equal(torch.arange(20015))
    assert torch.equal(splits.train, splits.database[:5000])
    assert labels[splits.query[:160], 0].all() and labels[splits.train[:400], 0].all()
    for label in range(1, 24):
        assert labels[splits.query[80 * label + 80 :][:80], label].all()
        assert labels[splits.train[200 * label + 200 :][:200], label].all()
    assert make_splits(labels, config).fingerprint == splits.fingerprint
    assert make_splits(labels, config.model_copy(update={"seed": 6})).fingerprint != splits.fingerprint


def test_the_training_set_is_filled_up_where_a_label_has_too_few():
    labels = torch.zeros(60, 3, dtype=torch.bool)
    labels[:40, 0] = labels[40:43, 1] = labels[43:, 2] = True  # after its two queries label 1 has one pair left
    splits = make_splits(labels, by_label())
    assert (len(splits.query), len(splits.train), len(splits.database)) == (9, 15, 51)
    assert sorted(labels[splits.query].sum(dim=0).tolist()) == [2, 2, 5]
    assert labels[splits.train, 1].sum() == 1
    assert len(torch.cat([splits.query, splits.database]).unique()) == 60


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (by_label(query=3), r"2 labels with 2 query and 3 train pairs each take more than 3 and 15"),
        (by_label(train=5), r"take more than 9 and 5"),
        (by_label(shares=(4, 1)), r"label 1 \(from 0\) has 3 pairs left for its 4 queries"),
        (by_label(train=52), r"9 query and 52 train pairs, but there are 60"),
    ],
)
def test_shares_that_labels_cannot_give(config, match):
    labels = torch.zeros(60, 3, dtype=torch.bool)
    labels[:40, 0] = labels[40:43, 1] = labels[43:, 2] = True
    with pytest.raises(UserError, match=match) as error:
        make_splits(labels, config)
    assert "\n" not in str(error.value)


def test_per_label_needs_its_shares():
    with pytest.raises(ValueError, match="per_label needs per_label"):
        SplitConfig(protocol="per_label", seed=1, query=4, train=4, validation=0, per_label=None)


def test_the_last_pairs_are_the_queries():
    config = SplitConfig(protocol="last", seed=1, query=3, train=5, validation=0, per_label=None)
    splits = make_splits(torch.ones(10, 2, dtype=torch.bool), config)
    assert splits.query.tolist() == [7, 8, 9]
    assert splits.train.tolist() == [0, 1, 2, 3, 4]
    assert splits.database.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_listed_queries_and_database():
    labels, lists = torch.ones(10, 2, dtype=torch.bool), (torch.tensor([8, 2]), torch.tensor([0, 1, 4, 5, 9]))
    config = SplitConfig(protocol="lists", seed=1, query=2, train=3, validation=0, per_label=None)
    splits = make_splits(labels, config, lists=lists)
    assert splits.query.tolist() == [8, 2]
    assert sorted(splits.database.tolist()) == [0, 1, 4, 5, 9]
    assert torch.equal(splits.train, splits.database[:3])
    with pytest.raises(UserError, match="lists 2 queries; set dataset.split.query=2"):
        make_splits(labels, config.model_copy(update={"query": 3}), lists=lists)
    with pytest.raises(UserError, match="this data set lists no queries"):
        make_splits(labels, config)


def test_draws_depend_on_each_argument_and_on_no_other_row():
    rows = np.arange(500)
    base = uniform(1, 0, Purpose.AUGMENT, rows, 3)
    assert base.shape == (500, 3)
    assert np.array_equal(uniform(1, 0, Purpose.AUGMENT, rows[[7, 3]], 3), base[[7, 3]])
    for other in (
        uniform(2, 0, Purpose.AUGMENT, rows, 3),
        uniform(1, 1, Purpose.AUGMENT, rows, 3),
        uniform(1, 0, Purpose.TRAIN_CAPTION, rows, 3),
    ):
        assert not np.isin(base, other).any()
    assert np.unique(base).size == base.size


def test_draws_are_uniform_and_independent():
    drawn = uniform(9, 4, Purpose.AUGMENT, np.arange(20000), 4)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    histogram = np.stack([np.histogram(column, bins=10, range=(0, 1))[0] for column in drawn.T])
    assert np.abs(histogram - 2000).max() < 5 * np.sqrt(2000)
    correlation = np.corrcoef(np.concatenate([drawn.T, np.roll(drawn.T, 1, axis=1)])) - np.eye(8)
    assert np.abs(correlation).max() < 0.04


def test_draws_are_those_of_every_version():
    """A run's config.yaml alone reproduces it, also with a later version."""
    drawn = [uniform(1, 2, purpose, np.array([0, 3]), 2)[1, 0] for purpose in Purpose]
    assert drawn == pytest.approx([0.92697220580646, 0.58146857267366, 0.10314827976414, 0.41893706290517], abs=1e-13)
    assert permutation(1, 0, 10).tolist() == [3, 8, 2, 5, 0, 7, 4, 6, 1, 9]
    with torch.random.fork_rng():
        seed_torch(1, 5)
        assert torch.initial_seed() == 7576354313457842240


def test_the_largest_seed_works():
    assert sorted(permutation(2**32 - 1, 10**6, 50)) == list(range(50))


def test_permutation_is_one_and_changes_every_epoch():
    orders = [permutation(5, epoch, 1000) for epoch in range(3)]
    assert all(np.array_equal(np.sort(order), np.arange(1000)) for order in orders)
    assert not any(np.array_equal(orders[a], orders[b]) for a, b in ((0, 1), (1, 2), (0, 2)))
    assert np.array_equal(orders[1], permutation(5, 1, 1000))


def test_captions_choose_by_draw():
    captions = Captions([["one", "two", "three"], ["four"], []], 8, 600)
    expected = tokenize(["one", "two", "three", "four", ""], 8, 600)
    items = torch.tensor([0, 0, 0, 0, 1, 2])
    rows = captions.rows(items, torch.tensor([0.0, 0.34, 0.67, 0.999999, 0.9, 0.9], dtype=torch.float64))
    assert torch.equal(rows, expected[[0, 1, 2, 2, 3, 4]])
    assert rows.dtype == torch.int64


def test_word_vectors_follow_a_worked_example():
    texts = [["A cat, a CAT!", "the dog"], ["dog ox x"], [""], ["the ox and the cat"]]
    words = WordVectors(texts, 4)
    assert words.vocabulary == ["cat", "the", "dog", "ox"]  # 3, 3, 2, 2; `a` and `x` have one letter; `and` has one
    rows = words.rows(torch.tensor([3, 0, 2, 1]))
    assert rows.tolist() == [[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]]
    with pytest.raises(UserError, match=r"vocabulary is 6, but the captions have 5"):
        WordVectors(texts, 6).rows(torch.tensor([0]))


def test_offers_and_require(tmp_path):
    data = datasets.opened(datasets.write(tmp_path / "data"))
    assert len(data) == datasets.ITEMS
    assert data.labels.dtype == torch.bool
    shapes = {"image": (3, 16, 16), "labels": (4,), "text": (12,), "bag_of_words": (5,)}
    assert all(data.offers(split) == shapes for split in ("query", "train", "database"))
    data.require("train", frozenset(shapes) | {"index"})
    with pytest.raises(UserError, match=r"small has no 'depth' for the train split; it offers image, labels"):
        data.require("train", frozenset({"depth"}))
    with pytest.raises(UserError, match=r"no 'image_caption' .*put one of image_caption.mat, image_caption.txt"):
        data.require("query", frozenset({"image_caption"}))


# ---------------------------------------------------------------------------------------- a data set from outside


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": torch.ones(4, 2)}, r"tensor of torch.bool \[N, C\], not torch.float32 \[4, 2\]"),
        ({"labels": torch.ones(4, dtype=torch.bool)}, r"not torch.bool \[4\]"),
        ({"labels": np.ones((4, 2), bool)}, r"not ndarray"),
        ({"labels": torch.ones(3, 2, dtype=torch.bool)}, r"labels of 3 items, but names of 4"),
        ({"captions": [["a"]]}, r"labels of 4 items, but captions of 1"),
        ({"captions": ["a", "b", "c", "d"]}, r"a list of texts for every item, not one text"),
        ({"families": torch.zeros(5)}, r"labels of 4 items, but families of 5"),
        ({"pictures": ["1.png"]}, r"pictures of a data set are Pictures"),
        ({"pictures": PictureFiles(["1.png"], "index")}, r"labels of 4 items, but pictures of 1"),
        ({"label_names": ["cat"]}, r"2 labels, but 1 label_names"),
    ],
)
def test_contents_that_do_not_fit_together_are_refused(change: dict[str, Any], said: str) -> None:
    """They would train on wrong pairs in silence, or end far from here."""
    paths = [f"{number}.png" for number in range(4)]
    fitting: dict[str, Any] = {
        "names": paths,
        "pictures": PictureFiles(paths, "index"),
        "captions": [["a"]] * 4,
        "labels": torch.ones(4, 2, dtype=torch.bool),
        "words": None,
    }
    Contents(**fitting)
    with pytest.raises(UserError, match=said):
        Contents(**{**fitting, **change})


def test_a_field_has_a_row_for_every_item() -> None:
    MatrixColumn(torch.ones(3, 2), torch.tensor([2, 0]))
    for matrix, items in ((torch.ones(3, 2), [3]), (torch.ones(3), [0])):
        with pytest.raises(UserError, match="it is a matrix with a row for every item"):
            MatrixColumn(matrix, torch.tensor(items))


def test_a_class_that_is_no_whole_data_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    half = type("Half", (PairedDataset,), {})
    none = type("None", (PairedDataset,), {"open": lambda self: None})
    for cls, said in ((object, "Mine is no PairedDataset"), (half, "Mine lacks open; see dataset/base.py")):
        monkeypatch.setitem(DATASETS._classes, "Mine", cls)
        with pytest.raises(UserError, match=said):
            dataset_class("Mine")
    monkeypatch.setitem(DATASETS._classes, "Mine", none)
    with pytest.raises(UserError, match=r"None.open returned a NoneType; return Contents\(...\)"):
        dataset_class("Mine")(cast(Any, None))
