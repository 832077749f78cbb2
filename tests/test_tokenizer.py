"""The tokenizer: equal to CLIP's on recorded texts, and the rules of cutting and padding."""

import json
from pathlib import Path

import pytest
import torch

from dataset.texts.tokenizer import SMALLEST, VOCABULARY, tokenize

START_OF_TEXT, END_OF_TEXT = VOCABULARY - 2, VOCABULARY - 1
GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN, ids=[repr(case["text"][:24]) for case in GOLDEN])
def test_ids_equal_those_of_clip(case):
    assert tokenize([case["text"]], 32)[0].tolist() == case["ids"]


def test_texts_together_equal_texts_alone():
    texts = [case["text"] for case in GOLDEN]
    together = tokenize(texts, 32)
    assert together.dtype == torch.int64
    assert torch.equal(together, torch.cat([tokenize([text], 32) for text in texts]))


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("A woman cutting a large white sheet cake", [320, 2308, 7266, 320, 3638, 1579, 7298, 2972]),
        ("wow!! nice", [2781, 748, 1805]),
        ("123456", [272, 273, 274, 275, 276, 277]),
        ("don't   stop &amp; go   ", [847, 713, 1691, 261, 861]),
        ("!@#", [0, 39397]),  # id 0 is a genuine piece
        ("", []),
    ],
)
def test_worked_texts(text, ids):
    expected = [START_OF_TEXT, *ids, END_OF_TEXT]
    assert tokenize([text], 32)[0].tolist() == expected + [0] * (32 - len(expected))


@pytest.mark.parametrize("length", [2, 3, 7, 32, 77])
def test_long_text_is_cut_so_that_the_end_fits(length):
    ids = tokenize(["dog " * 100, "dog"], length)
    assert ids.shape == (2, length)
    assert ids[0].tolist() == [START_OF_TEXT, *[1929] * (length - 2), END_OF_TEXT]
    assert (ids == END_OF_TEXT).sum(dim=1).tolist() == [1, 1]


def test_a_word_without_pieces_does_not_count_when_a_text_is_cut():
    """U+0345 is no letter, but folds to one, so that no class of CLIP's expression takes it: a word of no pieces."""
    assert tokenize(["\u0345 dog dog"], 3).tolist() == [[START_OF_TEXT, 1929, END_OF_TEXT]]


def test_the_first_maximum_is_the_end():
    ids = tokenize([case["text"] for case in GOLDEN], 32)
    assert (ids[torch.arange(len(ids)), ids.argmax(dim=1)] == END_OF_TEXT).all()


def test_plain_and_repaired_texts_agree():
    """Texts in plain ASCII skip the repair; beside a character that needs it they must give the same pieces."""
    plain = ["It's 3 o'clock\tin  the \n (old) town; [they'll] \"come\"... <b>", "a-b_c+d=e^f`g{h}~i|j/k\\l"]
    for text in plain:
        body = tokenize([text], 77)[0]
        with_accent = tokenize([text + " é"], 77)[0]
        count = int((body == END_OF_TEXT).nonzero())
        assert torch.equal(body[:count], with_accent[:count])


def test_nothing_gives_no_rows_and_short_length_is_refused():
    assert tokenize([], 32).shape == (0, 32)
    with pytest.raises(ValueError, match="length is 1"):
        tokenize(["a"], 1)
    for vocabulary in (SMALLEST - 1, VOCABULARY + 1):
        with pytest.raises(ValueError, match=f"vocabulary is {vocabulary}"):
            tokenize(["a"], 32, vocabulary)


@pytest.mark.parametrize(
    ("vocabulary", "the"),
    [
        (SMALLEST, [83, 71, 256 + 68]),  # t, h, and e at the end of a word: bytes alone
        (SMALLEST + 2, [513, 256 + 68]),  # `i n` and `t h` are the first two merges
        (SMALLEST + 100, [518]),  # `the</w>`
    ],
)
def test_a_smaller_vocabulary_has_the_first_merges(vocabulary, the):
    """A worked word; the table begins with `i n`, `t h`, `a n`, `r e`, `a r`, `e r`, `th e</w>`."""
    ids = tokenize(["the"], 8, vocabulary)[0].tolist()
    assert ids == [vocabulary - 2, *the, vocabulary - 1] + [0] * (8 - 2 - len(the))
    assert int(tokenize([case["text"] for case in GOLDEN], 2000, vocabulary).max()) == vocabulary - 1
