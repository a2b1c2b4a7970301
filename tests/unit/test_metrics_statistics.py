from __future__ import annotations

import math

import pytest
from scipy.stats import ttest_1samp

from gia_bench.errors import ConfigError
from gia_bench.metrics import paired_difference, summarize


def test_nothing_has_no_summary() -> None:
    assert summarize([]) is None
    assert paired_difference({"a": None}, {"a": 1.0}) is None


def test_one_value_has_no_interval() -> None:
    summary = summarize([3.0], num_failed=2)
    assert summary is not None
    assert (summary.value, summary.low, summary.high, summary.num_victims, summary.num_failed) == (3, None, None, 1, 2)


def test_equal_values_have_an_interval_of_no_width() -> None:
    summary = summarize([2.5] * 7)
    assert summary is not None
    assert (summary.value, summary.low, summary.high) == (2.5, 2.5, 2.5)


def test_the_median_ignores_an_outlier_and_the_mean_does_not() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 1000.0]
    median, mean = summarize(values), summarize(values, statistic="mean")
    assert median is not None
    assert mean is not None
    assert (median.value, mean.value) == (3.0, 202.0)


def test_more_victims_narrow_the_interval() -> None:
    few, many = summarize([float(i % 10) for i in range(10)]), summarize([float(i % 10) for i in range(1000)])
    assert few is not None and few.low is not None and few.high is not None
    assert many is not None and many.low is not None and many.high is not None
    assert many.high - many.low < few.high - few.low


def test_a_difference_is_taken_victim_by_victim_and_the_unpaired_are_counted() -> None:
    condition = {"a": 10.0, "b": 20.0, "c": None, "d": 5.0}
    control = {"a": 12.0, "b": 23.0, "c": 1.0, "e": 7.0}
    difference = paired_difference(condition, control)
    assert difference is not None
    assert (difference.value, difference.num_victims, difference.num_failed) == (-2.5, 2, 3)


def test_unknown_statistics_and_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="Choose one of: mean, median"):
        summarize([1.0], statistic="mode")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not finite"):
        summarize([1.0, math.nan])


def test_the_interval_of_a_mean_over_seeds_is_students() -> None:
    values = [0.70, 0.71, 0.75]
    found = summarize(values, statistic="mean", interval="student_t")
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    alone = summarize([0.7], statistic="mean", interval="student_t")
    assert alone is not None
    assert alone.low is None
    with pytest.raises(ConfigError, match="of a mean"):
        summarize(values, interval="student_t")
