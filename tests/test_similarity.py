"""Similarities of rows against values worked by hand."""

import pytest
import torch

from common.similarity import cosine_similarity, hamming_distance, label_similarity


def test_label_similarity_is_one_where_a_label_is_shared() -> None:
    a = torch.tensor([[1, 0, 1], [0, 0, 0]])
    b = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 1]])
    expected = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    for dtype in (torch.bool, torch.int8, torch.float32):
        assert torch.equal(label_similarity(a.to(dtype), b.to(dtype)), expected)


def test_cosine_similarity_ignores_length_and_survives_zeros() -> None:
    a = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    b = torch.tensor([[6.0, 8.0], [-4.0, 3.0], [-3.0, -4.0]])
    assert torch.allclose(cosine_similarity(a, b), torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32, torch.float64])
def test_hamming_distance_counts_differing_bits(dtype: torch.dtype) -> None:
    a = torch.tensor([[1, 1, -1, -1]], dtype=dtype)
    b = torch.tensor([[1, 1, -1, -1], [-1, 1, -1, 1], [-1, -1, 1, 1]], dtype=dtype)
    distance = hamming_distance(a, b)
    assert distance.dtype == torch.float32
    assert distance.tolist() == [[0.0, 2.0, 4.0]]


def test_hamming_distance_of_long_codes_is_exact() -> None:
    codes = torch.randint(0, 2, (20, 2048), generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(hamming_distance(codes, codes), (codes[:, None] != codes[None]).sum(-1).float())


def test_hamming_distance_of_relaxed_codes_has_a_gradient() -> None:
    a = torch.tensor([[0.5, -0.5]], requires_grad=True)
    distance = hamming_distance(a, torch.tensor([[1.0, 1.0]]))
    distance.sum().backward()
    assert distance.item() == 1.0
    assert a.grad is not None and a.grad.tolist() == [[-0.5, -0.5]]


@pytest.mark.parametrize("function", [label_similarity, cosine_similarity, hamming_distance])
@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((3,), (2, 3))])
def test_shapes_that_do_not_match_are_refused(function, shapes) -> None:
    with pytest.raises(ValueError, match="two matrices of one width"):
        function(torch.ones(shapes[0]), torch.ones(shapes[1]))
