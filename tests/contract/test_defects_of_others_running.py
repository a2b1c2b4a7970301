"""Configuration and running: defects that other benches had, see docs/defects.md."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from attack_problems import problem
from command import SMALL, run
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from gia_bench.conf_path import CONF


def test_outputs_lie_where_the_command_was_given_and_the_folder_is_not_changed(tmp_path: Path) -> None:
    done = run(
        "gia-bench", *SMALL, "logger=none", "trainer=cpu", "paths.outputs=mine", before=partial(os.chdir, tmp_path)
    )
    assert done.status == 0, done.err
    assert [p.relative_to(tmp_path).parts[:2] for p in tmp_path.rglob("records.jsonl")] == [("mine", "default")]
    assert {p.name for p in tmp_path.iterdir()} == {"mine"}, "nothing else is left, no dated folder of Hydra's"
    assert "Warning" not in done.err, "no deprecated setting of Hydra's"


def test_a_federation_of_many_rounds_learns(tmp_path: Path) -> None:
    words = ("dataset=digits", "model=mlp", "fl=fedavg", "fl.rounds=6", "fl.eval_every=2", "partition.num_clients=4",
             "fl.local.batch_size=32", "fl.local.learning_rate=0.1", "attack=[]", "metrics.lpips=null", "logger=none",
             "trainer=cpu")  # fmt: skip
    done = run("gia-bench", f"paths.outputs={tmp_path}", *words)
    assert done.status == 0, done.err
    [path] = tmp_path.rglob("records.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    accuracy, loss = ([r["value"] for r in records if r["metric"] == m] for m in ("test_accuracy", "train_loss"))
    assert accuracy[-1] > 0.7 and loss == sorted(loss, reverse=True)
    assert loss[-1] < 0.5 * loss[0]


def test_a_gpu_is_used_where_there_is_one_without_being_asked_for() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose("config").trainer.accelerator == "auto"
        assert compose("prior").accelerator == "auto"


@pytest.mark.parametrize("boxed", [True, False])
def test_a_switch_on_the_command_line_turns_on_what_it_names(boxed: bool) -> None:
    name = "inverting_gradients"
    words = [f"attack=[{name}]", f"attack.{name}.boxed={str(boxed).lower()}", f"attack.{name}.steps=5"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        attack = instantiate(compose("config", overrides=words).attack[name], _convert_="all")
    p = problem(1)
    found = attack.reconstruct(p.observations[0], p.victim, seed=0).inputs
    assert (float(found.min()) >= 0 and float(found.max()) <= 1) == boxed
    assert torch.isfinite(found).all()


def explode() -> None:
    from gia_bench.attacks.matching import GradientMatching

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the attack broke in the middle")

    GradientMatching.reconstruct_many = broken  # type: ignore[method-assign, assignment]


def test_an_attack_that_breaks_ends_the_run_as_failed_and_is_never_left_out_of_the_mean(tmp_path: Path) -> None:
    done = run("gia-bench", f"paths.outputs={tmp_path}", *SMALL, "logger=none", "trainer=cpu", "fl.attack_rounds=[1]",
               before=explode)  # fmt: skip
    assert done.status != 0
    [path] = tmp_path.rglob("status.json")
    status = json.loads(path.read_text())
    assert status["state"] == "failed" and "the attack broke in the middle" in status["reason"]
