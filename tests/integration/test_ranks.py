"""Two processes that share a cohort play the round that one process plays."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.distributed
from command import CONTEXT, SMALL, gia_bench

from gia_bench.data.cohort import Cohort
from gia_bench.data.source import InMemory
from gia_bench.defenses.adgp import ADGP
from gia_bench.federated.execution import Vmap
from gia_bench.federated.local import FedAvg
from gia_bench.federated.ranks import current_ranks
from gia_bench.federated.round import Round, play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.models.build import build_victim
from gia_bench.models.convnet import convnet
from gia_bench.seeding import stream

SIZES = (6, 4, 6, 5, 3)


def one_round() -> Round:
    """A round with everything that ranks have to exchange: states, masks, BatchNorm, observed updates."""
    generator = stream(0, "images")
    total = sum(SIZES)
    source = InMemory(torch.rand(total, 1, 9, 9, generator=generator), torch.randint(3, (total,), generator=generator))
    local = FedAvg(epochs=1, batch_size=3)
    owned = torch.split(torch.arange(total), list(SIZES))
    steps = [tuple(own[p] for p in local.schedule(len(own), 0, 0, c)) for c, own in enumerate(owned)]
    cohort = Cohort(round_index=0, clients=tuple(range(5)), steps=tuple(steps), weights=SIZES, source=source)
    victim = build_victim(
        partial(convnet, width=2), input_shape=(1, 9, 9), num_classes=3, mean=(0.5,), std=(0.2,)
    )  # fmt: skip
    rules = Rules(victim=victim, defense=ADGP(), local=local, executor=Vmap(chunk_size=2), seed=0)
    return play_round(rules, Server(*victim.initial(), {}), {}, cohort, observed=(0, 3), ranks=current_ranks())


def child(rank: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(folder / "store"), 2), rank=rank, world_size=2
    )
    played = one_round()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    assert played.transcript is not None
    content = {
        "aggregate": played.aggregate, "buffers": played.buffers, "states": dict(played.states), "loss": played.loss,
        "uplink": dict(played.uplink_bytes), "updates": dict(played.transcript.updates),
    }  # fmt: skip
    torch.save(content, folder / f"{rank}.pt")


def test_two_ranks_play_the_round_of_one() -> None:
    alone = one_round()
    assert alone.transcript is not None
    with tempfile.TemporaryDirectory() as name:
        processes = [CONTEXT.Process(target=child, args=(rank, Path(name))) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        for rank in range(2):
            both = torch.load(Path(name) / f"{rank}.pt", weights_only=True)
            torch.testing.assert_close(both["aggregate"], alone.aggregate)
            torch.testing.assert_close(both["buffers"], alone.buffers)
            torch.testing.assert_close(both["states"], dict(alone.states))
            torch.testing.assert_close(both["updates"], dict(alone.transcript.updates))
            assert both["uplink"] == alone.uplink_bytes
            assert abs(both["loss"] - alone.loss) < 1e-5


def test_a_run_on_two_processes_records_what_one_process_records(tmp_path: Path) -> None:
    settings = [*SMALL, "defense=dgp", "fl.rounds=4"]
    frames = []
    for name, more in (("one", []), ("two", ["trainer.devices=2", "trainer.strategy=ddp_spawn"])):
        done = gia_bench(tmp_path / name, *settings, *more)
        assert done.status == 0, done.err
        [path] = (tmp_path / name).rglob("records.jsonl")
        frame = pd.read_json(path, lines=True)
        frames.append(frame[frame.unit != "s"].reset_index(drop=True))
    pd.testing.assert_frame_equal(frames[0], frames[1], rtol=1e-3)
