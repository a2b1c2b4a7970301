"""Unknowns and equations of attacked updates, and the line that tells them."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from attack_problems import problem

from gia_bench.federated.local import FedAvg
from gia_bench.metrics import Scores
from gia_bench.metrics.evaluate import FLAT, Status, Value
from gia_bench.probes.feasibility import feasibility, tell, tell_control


def test_what_is_known_of_an_update_is_counted_by_hand() -> None:
    p = problem(1, batch=3)
    o = p.observations[0]
    update = {k: torch.zeros_like(v) for k, v in o.update.items()}
    first = next(iter(update))
    update[first].view(-1)[:5] = 1.0
    local = FedAvg(learning_rate=0.1, epochs=2, batch_size=2)
    before = {k: v.clone() for k, v in update.items()}
    before[first].view(-1)[:7] = 1.0  # five of the seven are sent again
    earlier = dataclasses.replace(o, update=before)
    other = dataclasses.replace(o, update={k: torch.ones_like(v) for k, v in update.items()}, num_examples=2)
    seen = dataclasses.replace(o, update=update, local=local, earlier=(earlier, other))
    expected = {"equations": 7.0, "examples": 3.0, "unknowns": 3.0 * 64, "local_steps": 4.0}
    assert feasibility(seen, p.victim) == expected
    assert feasibility(dataclasses.replace(seen, num_examples=None, earlier=()), p.victim) == {"equations": 5.0}


def test_one_line_tells_all_updates_and_a_warning_those_that_cannot_be_solved(caplog: pytest.LogCaptureFixture) -> None:
    plenty, few = {"equations": 900.0, "unknowns": 64.0}, {"equations": 12.0, "unknowns": 64.0}
    with caplog.at_level(logging.INFO):
        tell("dlg", [plenty, few])
        tell("idlg", [plenty])
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "dlg looks at 2 updates: equations 12 to 900, unknowns 64"),
        (
            "WARNING",
            "dlg: 1 of 2 updates have more unknown pixels than equations: what is rebuilt of them is the prior's guess",
        ),
        ("INFO", "idlg looks at 1 update: equations 900, unknowns 64"),
    ]


def scores(*pairs: tuple[float | None, float]) -> list[Scores]:
    """Of one image each: (its PSNR, that of a flat image)."""
    made = []
    for own, flat in pairs:
        status: Status = "failed" if own is None else "ok"
        values = (Value(metric="psnr_db", victim=0, value=own, status=status), Value(metric=FLAT, victim=0, value=flat))
        made.append(Scores(values, torch.tensor([0])))
    return made


def test_an_attack_that_shows_nothing_without_a_defense_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        tell_control("dlg", scores((30.0, 12.0), (8.0, 13.0), (28.0, 14.0)))
        tell_control("gia", scores((9.0, 12.0), (14.0, 13.0), (None, 11.0)))
        tell_control("idlg", scores((None, 12.0)))
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "dlg: the control holds, 28.0 dB in the median, a flat image 13.0 dB"),
        (
            "WARNING",
            "gia: failed control, without a defense it reaches 11.5 dB in the median, and a flat image of the right "
            "colour 12.0 dB; under a defense it says nothing",
        ),
    ]
