from __future__ import annotations

import json
import math
from typing import Any

import pytest

from gia_bench.errors import ConfigError
from gia_bench.records.schema import KEYS, METRICS, Record

WHO: dict[str, Any] = {
    "run_id": "r1", "experiment": "demo", "seed": 0, "dataset": "digits", "model": "lenet", "fl": "fedsgd",
    "threat": "curious_server", "defense": "none",
}  # fmt: skip


def test_a_line_has_exactly_the_agreed_keys_in_their_order() -> None:
    line = Record.of("psnr_db", 20.5, **WHO, round=3, client=7, victim=0, attack="dlg").to_json()
    agreed = (
        "run_id experiment seed dataset model fl threat attack defense round client victim metric value unit "
        "better_for_defender status reason"
    )
    assert " ".join(json.loads(line)) == agreed == " ".join(KEYS)


def test_what_does_not_apply_is_null() -> None:
    line = json.loads(Record.of("test_accuracy", 0.9, **WHO, round=3).to_json())
    nulls = {key for key, value in line.items() if value is None}
    assert nulls == {"attack", "client", "victim", "unit", "better_for_defender", "reason"}


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_every_metric_brings_its_own_unit_and_direction(metric: str) -> None:
    record = Record.of(metric, 1, **WHO)
    assert (record.unit, record.better_for_defender) == (METRICS[metric].unit, METRICS[metric].better_for_defender)
    assert record.value == 1.0
    assert json.loads(record.to_json())["metric"] == metric


def test_a_high_leak_is_bad_for_the_defender_and_a_high_error_good() -> None:
    directions = {metric: METRICS[metric].better_for_defender for metric in ("psnr_db", "ssim", "mse", "lpips_alex")}
    assert directions == {"psnr_db": "lower", "ssim": "lower", "mse": "higher", "lpips_alex": "higher"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_have_becomes_a_failure_with_its_reason(value: float) -> None:
    record = Record.of("train_loss", value, **WHO)
    assert (record.value, record.status, record.reason) == (None, "failed", f"the value is {value}")
    assert "NaN" not in record.to_json()
    assert "Infinity" not in record.to_json()


def test_an_unknown_metric_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"metric='psnr' is not known.*psnr_db"):
        Record.of("psnr", 1.0, **WHO)


@pytest.mark.parametrize(
    ("value", "more"),
    [
        (None, {}),
        (1.0, {"status": "failed", "reason": "x"}),
        (None, {"status": "failed"}),
        (None, {"status": "unavailable"}),
    ],
)
def test_ok_goes_with_a_value_and_all_else_with_a_reason(value: float | None, more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="goes with a value"):
        Record.of("ssim", value, **WHO, **more)


def test_a_value_may_carry_a_remark() -> None:
    assert Record.of("dropped_clients", 1, **WHO, reason="its update was not finite").status == "ok"


@pytest.mark.parametrize("run_id", ["123456789012", "12e4", "inf"])
def test_a_run_id_that_pandas_would_turn_into_a_number_is_refused(run_id: str) -> None:
    with pytest.raises(ConfigError, match="reads as a number"):
        Record.of("ssim", 0.5, **{**WHO, "run_id": run_id})


def test_a_record_made_by_hand_is_held_to_the_same_rules() -> None:
    good = Record.of("ssim", 0.5, **WHO)
    fields = {key: getattr(good, key) for key in KEYS}
    assert Record(**fields) == good
    with pytest.raises(ConfigError, match="not known"):
        Record(**{**fields, "metric": "beauty"})
    with pytest.raises(ConfigError, match="not finite"):
        Record(**{**fields, "value": math.nan})
