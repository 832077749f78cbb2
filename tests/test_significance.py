"""Intervals and tests: known values, and how often the test cries wolf."""

import itertools

import numpy as np
import pytest
from scipy import stats

from common.significance import band, holm, paired_test, summary


def test_interval_of_a_mean() -> None:
    found = summary([0.5, 0.52, 0.54])
    assert (found.count, found.mean, found.deviation) == pytest.approx((3, 0.52, 0.02))
    low, high = stats.t.interval(0.95, 2, loc=0.52, scale=0.02 / 3**0.5)
    assert (found.low, found.high) == pytest.approx((low, high))
    alone = summary([0.5])
    assert alone.mean == 0.5 and np.isnan([alone.deviation, alone.low, alone.high, alone.half]).all()
    assert found.half == pytest.approx((high - low) / 2)


def test_band_of_curves() -> None:
    mean, deviation = band([[0.2, 0.5, np.nan], [0.4, 0.5, 0.1]])
    assert mean.tolist() == pytest.approx([0.3, 0.5, np.nan], nan_ok=True)
    assert deviation.tolist() == pytest.approx([0.02**0.5, 0, np.nan], nan_ok=True)
    mean, deviation = band([[0.2, 0.5]])
    assert mean.tolist() == [0.2, 0.5] and np.isnan(deviation).all()


def test_few_queries_are_tested_with_all_flips() -> None:
    a, b = np.array([0.9, 0.8, 0.7, 0.4]), np.array([0.5, 0.6, 0.6, 0.5])
    d = a - b
    means = [np.mean(d * signs) for signs in itertools.product((1, -1), repeat=4)]
    expected = np.mean(np.abs(means) >= abs(d.mean()) - 1e-12)
    assert paired_test(a, b) == pytest.approx(expected)


@pytest.mark.parametrize("shift", [0.0, 0.005, 0.02])
def test_many_queries_as_scipy_tests_them(shift: float) -> None:
    draw = np.random.default_rng(3)
    a = draw.beta(2, 2, 150)
    b = np.where(draw.random(150) < 0.3, a, a + draw.normal(shift, 0.1, 150))  # ties, too
    expected = stats.permutation_test(
        (b - a,), lambda one, axis: one.mean(axis=axis), permutation_type="samples", vectorized=True, rng=draw
    ).pvalue
    assert paired_test(b, a, draws=20000) == pytest.approx(expected, abs=0.02)


def test_a_difference_is_found_and_the_same_is_not() -> None:
    draw = np.random.default_rng(0)
    a = draw.beta(2, 2, 300)
    better = np.clip(a + draw.normal(0.03, 0.1, 300), 0, 1)
    assert paired_test(better, a) < 0.001 and paired_test(a, better) == pytest.approx(paired_test(better, a), abs=0.001)
    assert paired_test(a, a) == 1.0
    with_gaps = a.copy()
    with_gaps[:5] = np.nan
    assert paired_test(with_gaps, a) == 1.0
    with pytest.raises(ValueError, match="no query"):
        paired_test(np.array([np.nan]), np.array([0.5]))


def test_false_alarms_are_as_rare_as_they_should_be() -> None:
    """1,000 pairs of methods that are alike: about 5 % of the tests fall below 5 %."""
    draw = np.random.default_rng(1)
    alarms = 0
    for number in range(1000):
        quality = draw.beta(2, 2, 40)
        a, b = (np.clip(quality + draw.normal(0, 0.1, 40), 0, 1) for _ in range(2))
        alarms += paired_test(a, b, draws=199, seed=number) <= 0.05
    assert 30 <= alarms <= 75  # 50 +- 3 standard deviations, and a little


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []
