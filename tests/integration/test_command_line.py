"""What a person sees: runs, sweeps, help, and one sentence for whatever they can mend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from command import SMALL, gia_bench, run

from gia_bench.conf_path import CONF
from gia_bench.records.schema import KEYS


def records(outputs: Path) -> pd.DataFrame:
    return pd.concat([pd.read_json(p, lines=True) for p in sorted(outputs.rglob("records.jsonl"))])


def states(outputs: Path) -> dict[str, Any]:
    return {p.parent.name: json.loads(p.read_text()) for p in outputs.rglob("status.json")}


def test_a_run_leaves_records_images_config_and_status(tmp_path: Path) -> None:
    done = gia_bench(tmp_path, *SMALL, "fl.attack_rounds=[0,2]")
    assert done.status == 0, done.err
    frame = records(tmp_path)
    assert tuple(frame.columns) == KEYS
    assert set(frame.metric) >= {
        "psnr_db", "ssim", "mse", "label_accuracy", "test_accuracy", "uplink_bytes", "downlink_bytes", "train_loss",
        "dense_uplink_bytes", "dense_downlink_bytes", "round_seconds", "attack_seconds", "attack_score",
        "diverged_restarts",
    }  # fmt: skip
    leak = frame[frame.metric == "psnr_db"]
    assert sorted(zip(leak["round"], leak.client, leak.victim, strict=True)) == [
        (r, 0, v) for r in (0, 2) for v in (0, 1)
    ]
    [folder] = (tmp_path / "default").iterdir()
    assert {p.name for p in folder.iterdir()} >= {"config.yaml", "status.json", "records.jsonl", "images", "final.ckpt"}
    assert len(list((folder / "images").glob("*.npz"))) == 2
    status = states(tmp_path)[folder.name]
    assert status["state"] == "done"
    assert status["versions"]["data"].startswith("sha256:")


def test_a_sweep_runs_every_combination_and_counts_what_is_skipped(tmp_path: Path) -> None:
    done = run(
        "gia-bench", "-m", f"paths.outputs={tmp_path}", "logger=none", *SMALL, "fl.attack_rounds=[0]",
        "attack.inverting_gradients_fast.labels=known", "threat=curious_server,curious_server_labels", "seed=0,1",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert "4 runs: 2 done, 2 skipped" in done.out
    found = [(s["state"], s["reason"]) for s in states(tmp_path).values()]
    assert sorted(state for state, _ in found) == ["done", "done", "skipped", "skipped"]
    assert all("needs to see labels" in reason for state, reason in found if state == "skipped")
    assert set(records(tmp_path).seed) == {0, 1}


def test_a_failed_run_of_a_sweep_is_counted_and_the_others_go_on(tmp_path: Path) -> None:
    done = run(
        "gia-bench", "-m", f"paths.outputs={tmp_path}", "logger=none", *SMALL, "fl.local.batch_size=1,100000,2",
    )  # fmt: skip
    assert done.status == 1
    assert "3 runs: 2 done, 1 failed" in done.out
    assert sorted(s["state"] for s in states(tmp_path).values()) == ["done", "done", "failed"]


def test_the_same_settings_are_the_same_run_wherever_they_are_written(tmp_path: Path) -> None:
    for folder, trainer in (("a", "trainer.snapshot_every_seconds=7"), ("b", "trainer.progress_bar=false")):
        assert gia_bench(tmp_path / folder, *SMALL, trainer, "images=false").status == 0
    assert [*states(tmp_path / "a")] == [*states(tmp_path / "b")]
    assert gia_bench(tmp_path / "b", *SMALL, "seed=1").status == 0
    assert len(states(tmp_path / "b")) == 2


def test_help_and_misspelt_choices_need_no_torch() -> None:
    code = "import sys, gia_bench.app; assert 'torch' not in sys.modules; assert gia_bench.app.CONF"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_names_every_group_and_every_choice() -> None:
    shown = run("gia-bench", "--help")
    assert shown.status == 0
    for group in (
        "dataset",
        "partition",
        "model",
        "fl",
        "threat",
        "attack",
        "defense",
        "trainer",
        "logger",
        "launcher",
    ):
        line = next(line for line in shown.out.splitlines() if line.strip().startswith(f"{group}:"))
        for path in (CONF / group).glob("*.yaml"):
            assert path.stem in line, (group, path.stem)


BAD = {
    "unknown choice": (["defense=dpg"], "adgp"),
    "unknown key": (["defense=dgp", "defense.k3=0.1"], "k1"),
    "unknown fl key": (["fl.batchsize=3"], "clients_per_round"),
    "added key": (["+defense.k3=0.1", "defense=dgp"], "k3"),
    "unknown attack": (["attack=[foo]", "~attack.inverting_gradients_fast"], "inverting_gradients_dgp_paper"),
    "wrong type": (["fl.rounds=many"], "fl.rounds='many': give a whole number"),
    "half a round": (["fl.rounds=2.5"], "fl.rounds=2.5: give a whole number"),
    "half a client": (["partition.num_clients=2.5"], "partition.num_clients=2.5"),
    "a number where a list belongs": (["fl.attack_rounds=3"], "such as [0,10]"),
    "steps that are a word": (["attack.inverting_gradients_fast.steps=abc"], "steps='abc': give a whole number"),
    "no batch": (["fl=fedavg", "fl.local.batch_size=0"], "fl.local.batch_size=0"),
    "a switch that is a word": (["force=no"], "force='no': give true or false"),
    "unknown executor": (["fl.executor.kind=map"], "vmap"),
    "an executor without its key": (["fl.executor=loop"], "fl.executor.kind=loop"),
    "more attacked than play": (["fl.attack_clients=99"], "fl.attack_clients=99"),
    "a launcher that is not installed": (["launcher=ray"], "gia-bench[ray]"),
    "everything pruned": (["defense=dgp", "defense.k1=0.5", "defense.k2=0.5"], "k1"),
    "batch too large": (["fl.local.batch_size=5000"], "holds only"),
    "more clients than data": (["partition.num_clients=100000"], "num_clients"),
    "more clients per round than clients": (["fl.clients_per_round=99"], "fl.clients_per_round=99"),
    "attack after the end": (["fl.attack_rounds=[50]"], "round 50 is never played"),
    "labels that nobody sees": (["attack.inverting_gradients_fast.labels=known"], "needs to see labels"),
    "iDLG on a batch": (["attack=[idlg,inverting_gradients_fast]"], "at most 1 example"),
    "rounds of other examples": (
        ["attack=[dlg,inverting_gradients_fast]", "+attack.dlg.rounds=joint", "fl.attack_rounds=[0,1]"],
        "rounds=one",
    ),
    "DP-SGD with BatchNorm": (["defense=dp_sgd", "model=resnet20"], "GroupNorm"),
    "a closed form of convolutions": (["attack=[analytic,inverting_gradients_fast]", "model=lenet"], "model=mlp"),
    "unknown knowledge": (["threat.knows=[update,everything]"], "num_examples"),
    "a seed that is no number": (["seed=abc"], "seed='abc'"),
    "a learning rate below zero": (["fl.server.optimizer.lr=-1"], "fl.server.optimizer"),
    "an untested precision": (["trainer.precision=bf16-mixed"], "32-true"),
    "unknown policy": (["fl.on_nonfinite=shrug"], "drop_client"),
    "absent checkpoint": (["model.checkpoint=/nowhere.pt"], "/nowhere.pt"),
    "absent data": (["dataset=mnist", "dataset.download=false", "paths.data=/nowhere"], "/nowhere"),
    "wrong number of classes": (["model.network._target_=nowhere.Model"], "nowhere"),
    "unwritable outputs": (["paths.outputs=/proc/gia"], "/proc/gia"),
    "outputs below a file": (["paths.outputs=/etc/hostname/x"], "paths.outputs="),
    "a group set to null": (["experiment=null"], "A group takes a choice"),
    "settings without their attack": (["+attack.dlg.steps=5"], "~attack.dlg"),
    "no GPU": (["trainer.accelerator=gpu"], "gpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_person_can_mend_is_one_sentence_and_status_1(name: str, tmp_path: Path) -> None:
    overrides, expected = BAD[name]
    done = gia_bench(tmp_path, *SMALL, *overrides)
    assert done.status == 1, done.out + done.err
    assert expected in done.err
    assert "Traceback" not in done.err
    assert done.err.startswith("gia-bench: ")


def explode_in_round_two() -> None:
    import gia_bench.federated.module as module

    play = module.play_round

    def nan(rules: Any, server: Any, states: Any, cohort: Any, **kwargs: Any) -> Any:
        if cohort.round_index == 2:
            server.params[
                "network.0.weight" if "network.0.weight" in server.params else next(iter(server.params))
            ].fill_(float("nan"))
        return play(rules, server, states, cohort, **kwargs)

    module.play_round = nan


def test_nan_names_client_and_round_and_keeps_what_was_written(tmp_path: Path) -> None:
    done = gia_bench(tmp_path, *SMALL, before=explode_in_round_two)
    assert done.status == 1
    assert "Client 0 sent NaN or infinity in round 2" in done.err
    assert set(records(tmp_path)["round"]) == {0, 1}
    [status] = states(tmp_path).values()
    assert status["state"] == "failed"
    assert "round 2" in status["reason"]


def test_a_corrupt_checkpoint_of_a_run_is_named(tmp_path: Path) -> None:
    settings = SMALL
    assert gia_bench(tmp_path, *settings, before=explode_in_round_two).status == 1
    [checkpoint] = tmp_path.rglob("round*.ckpt")
    good = checkpoint.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    for bad in (good[:-200], flipped):
        checkpoint.write_bytes(bad)
        done = gia_bench(tmp_path, *settings)
        assert done.status == 1
        assert f"The checkpoint {checkpoint} is corrupt" in done.err


def fill_the_disk() -> None:
    """From the second write of records on, the disk takes no more."""
    import errno

    from gia_bench.records import store

    write, calls = os.write, 0

    def full(handle: int, content: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, content)

    class Os:
        def __getattr__(self, name: str) -> Any:
            return full if name == "write" else getattr(os, name)

    store.os = Os()  # type: ignore[attr-defined]


def test_a_full_disk_is_a_sentence_and_what_was_written_stays(tmp_path: Path) -> None:
    done = gia_bench(tmp_path, *SMALL, "fl.attack_rounds=[0]", before=fill_the_disk)
    assert done.status == 1
    assert "No space left on device" in done.err
    assert "Traceback" not in done.err
    frame = records(tmp_path)
    assert set(frame["round"]) == {0}
    assert (frame.metric == "psnr_db").any()


@pytest.mark.parametrize("kilobytes", [18, 19, 100])
def test_a_disk_that_is_full_for_a_state_is_a_sentence(kilobytes: int, tmp_path: Path) -> None:
    """18, 19: while an attack saves its state, in the archive's header or after it; 100: the training's checkpoint."""
    import resource

    size = kilobytes * 1024
    states = ["attack.inverting_gradients_fast.snapshot_every=1", "trainer.snapshot_every_seconds=0"]
    done = gia_bench(
        tmp_path, *SMALL, "fl.attack_rounds=[0]", *(states if kilobytes < 100 else []),
        before=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size)),
    )  # fmt: skip
    assert done.status == 1
    # the first line; after it the coverage of this process complains of the same disk
    assert done.err.startswith("gia-bench: ")
    assert "Free some space" in done.err.splitlines()[0]


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    from gia_bench.records.runs import locked

    assert gia_bench(tmp_path, *SMALL).status == 0
    [folder] = (tmp_path / "default").iterdir()
    with locked(folder):
        done = gia_bench(tmp_path, *SMALL, "force=true")
    assert done.status == 1
    assert "another process" in done.err
    assert states(tmp_path)[folder.name]["state"] == "done"


def test_no_wandb_is_needed_where_it_is_not_asked_for(tmp_path: Path) -> None:
    for logger in ("none", "csv"):
        done = gia_bench(tmp_path / logger, *SMALL, f"logger={logger}", before=hide_wandb)
        assert done.status == 0, done.err
        assert len(records(tmp_path / logger))
    done = gia_bench(tmp_path / "wandb", *SMALL, "logger=wandb", before=hide_wandb)
    assert done.status == 1
    assert "pip install wandb" in done.err


def hide_wandb() -> None:
    import sys

    for name in [n for n in sys.modules if n == "wandb" or n.startswith("wandb.")]:
        del sys.modules[name]
    sys.modules["wandb"] = None  # type: ignore[assignment]
