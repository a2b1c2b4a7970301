"""Speed and memory, printed as a table of one run: python scripts/bench.py [names ...]   (all without names)

Nothing here is a test: machines are shared and noisy, so every row is compared with another row of the same run.
"""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_attacks import bench_attack, bench_convnet, bench_gpu, bench_quality
from bench_parts import DEVICE, images, seconds, victim
from rich.console import Console
from rich.table import Table

from gia_bench.allocator import keep_freed_memory
from gia_bench.data.datamodule import FederatedDataModule
from gia_bench.data.partition import Iid
from gia_bench.data.source import Dataset
from gia_bench.defenses.none import NoDefense
from gia_bench.federated.execution import Executor, Loop, Vmap
from gia_bench.federated.local import FedSGD
from gia_bench.federated.round import play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.models.lenet import lenet
from gia_bench.records.store import read


def data(clients: int, per_client: int = 8, channels: int = 3, size: int = 32) -> FederatedDataModule:
    train, test = images(clients * per_client, channels, size), images(100, channels, size)
    dataset = Dataset(
        name="noise", train=train, test=test, num_classes=10, shape=(channels, size, size),
        mean=(0.5,) * channels, std=(0.25,) * channels, version="none",
    )  # fmt: skip
    split = Iid(num_clients=clients, samples_per_client=per_client).split(train.labels, None, 0)
    return FederatedDataModule(
        dataset=dataset, partition=split, local=FedSGD(batch_size=per_client), clients_per_round=None, seed=0
    )


def one_round(executor: Executor, clients: int) -> Callable[[], object]:
    model, source = victim(lenet), data(clients)
    rules = Rules(victim=model, defense=NoDefense(), local=FedSGD(batch_size=8), executor=executor, seed=0)
    params, buffers = ({k: v.to(DEVICE) for k, v in part.items()} for part in model.initial())
    cohort = source.cohort(0).to(DEVICE)
    return lambda: play_round(rules, Server(params, buffers, {}), {}, cohort)


def bench_round(table: Table) -> None:
    loop = seconds(one_round(Loop(), 100))
    mapped = seconds(one_round(Vmap(chunk_size=25), 100))
    table.add_row("FedSGD round, 100 clients x 8 images, LeNet: loop", f"{1e3 * loop:.0f} ms", "1.0x")
    table.add_row("the same under vmap (25 at a time)", f"{1e3 * mapped:.0f} ms", f"{loop / mapped:.1f}x faster")


def shell_run(rounds: int) -> tuple[float, float]:
    """Seconds of a whole run of so many rounds, and the mean seconds inside one."""
    with tempfile.TemporaryDirectory() as outputs:
        command = [
            sys.executable,
            "-m",
            "gia_bench",
            "dataset=digits",
            "model=mlp",
            "model.network.hidden=[64]",
            "fl.attack_rounds=[]",
            "logger=none",
        ]
        command += [f"fl.rounds={rounds}", f"fl.eval_every={rounds}", f"paths.outputs={outputs}"]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        whole = time.perf_counter() - started
        frame = read(Path(outputs).rglob("records.jsonl"))
    return whole, float(frame[frame.metric == "round_seconds"].value.mean())


def bench_shell(table: Table) -> None:
    """What Trainer, probes at rest and records add to a round: a long run less a short one, less its rounds. The long
    one's peak memory above the short one's is what grows with rounds."""
    short, long = 200, 4200
    start, _ = shell_run(short)
    small = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    end, inside = shell_run(long)
    grown = (resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss - small) / 1024
    shell = (end - start) / (long - short) - inside
    table.add_row(
        "the shell around a round (Trainer, probes at rest, records)", f"{1e3 * shell:.2f} ms",
        f"a round itself: {1e3 * inside:.1f} ms",
    )  # fmt: skip
    table.add_row(f"peak memory added by {long - short:,} more rounds", f"{grown:.0f} MiB", "")


def bench_training(table: Table) -> None:
    """A whole training as GradDefense sets it up, from the command line; needs Fashion-MNIST."""
    with tempfile.TemporaryDirectory() as outputs:
        command = [sys.executable, "-m", "gia_bench", "dataset=fashion_mnist", "model=lenet", "fl=graddefense_mnist"]
        command += ["fl.attack_rounds=[]", "logger=none", f"paths.outputs={outputs}"]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        took = time.perf_counter() - started
    table.add_row("2,000 rounds, Fashion-MNIST, LeNet, 10 clients a round", f"{took:.0f} s", f"{took / 2:.0f} ms/round")


def peak_memory(clients: int) -> float:
    """MiB that a process takes at most for rounds of so many clients, above what it takes before the first."""
    code = (
        "import resource, bench\n"
        f"play = bench.one_round(bench.Vmap(chunk_size=16), {clients})\n"
        "small = bench.one_round(bench.Vmap(chunk_size=16), 16)\n"
        "small(); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "play(); play()\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    here = Path(__file__).resolve().parent
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=here)
    return float(done.stdout)


def bench_memory(table: Table) -> None:
    for clients in (10, 100, 1000):
        table.add_row(f"peak memory added by rounds of {clients} clients, LeNet", f"{peak_memory(clients):.0f} MiB", "")


BENCHES = {
    "round": bench_round,
    "shell": bench_shell,
    "training": bench_training,
    "memory": bench_memory,
    "attack": bench_attack,
    "convnet": bench_convnet,
    "quality": bench_quality,
    "gpu": bench_gpu,
}


def main() -> None:
    keep_freed_memory()  # as every run does
    names = sys.argv[1:] or list(BENCHES)
    device = (
        torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    table = Table("what", "measured", "ratio", title=f"torch {torch.__version__} on {device}")
    for name in names:
        BENCHES[name](table)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
