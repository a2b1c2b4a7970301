"""What every defense costs, as a Markdown table:  python scripts/defense_cost.py [options] [defense ...]

  --model lenet|lenet_zhu|resnet18|...  any choice of conf/model (lenet)       --clients N   in the round (10)
  --batch N                             examples per client (8)                 --repeats N   of each (9)
  --executor vmap|loop                  one of them (both)                      --image C N     channels and size (3 32)
  --wall                                time on the wall, of all threads at once, on a machine that does nothing else
  --residuals MODEL CLIENTS memory|disk
  --set OVERRIDE                        of the defenses, for example defense.directions=8; as often as needed

Time is what the clients compute (random numbers, local work, protection) in one FedSGD round on random images, in CPU
seconds of all threads, which other users of the machine disturb least (wall-clock seconds with --wall and on a GPU).
Each round of a defense follows one without any; the ratio is the median over these pairs. The server's is what it makes
of the mean (GradDefense's compensation), in seconds on the wall. Without names: all of conf/defense.
``--residuals`` instead plays rounds of 4 clients with DGP, twice for every client, and prints the peak memory; the
states lie below the current folder.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from bench import DEVICE, data, images
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console
from rich.markdown import Markdown

from gia_bench.allocator import keep_freed_memory
from gia_bench.conf_path import CONF
from gia_bench.data.cohort import Cohort
from gia_bench.defenses.base import Defense
from gia_bench.errors import IncompatibleError
from gia_bench.federated.clients import Clients
from gia_bench.federated.execution import Executor, Loop, Vmap
from gia_bench.federated.local import FedSGD
from gia_bench.federated.round import play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.federated.states import client_states
from gia_bench.models.build import build_victim
from gia_bench.values import Shared, State, Update

EXECUTORS: dict[str, Executor] = {"vmap": Vmap(chunk_size=16), "loop": Loop()}
RECIPES = [path.stem for path in sorted((CONF / "defense").glob("*.yaml"))]


def rules(
    model: str,
    defense: str,
    executor: str,
    batch: int,
    overrides: Sequence[str] = (),
    channels: int = 3,
    size: int = 32,
) -> Rules:
    """The parts of a run with square images of 10 classes."""
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        cfg = compose("config", [f"model={model}", f"defense={defense}", *overrides])
    inner: Defense = instantiate(cfg.defense, _convert_="all")
    settings = instantiate(cfg.model, _convert_="all")
    victim = build_victim(
        **settings, input_shape=(channels, size, size), num_classes=10, mean=(0.5,) * channels,
        std=(0.25,) * channels, seed=0, prepare=inner.prepare_model,
    ).to(DEVICE)  # fmt: skip
    inner.check_victim(victim)
    calibrated = inner.calibrate(victim, images(200, channels, size))
    return Rules(
        victim=victim, defense=calibrated, local=FedSGD(batch_size=batch), executor=EXECUTORS[executor], seed=0
    )


class ClientSide:
    """One round of the clients, again and again with the states that the last one left."""

    def __init__(self, made: Rules, cohort: Cohort) -> None:
        params, buffers = ({k: v.to(DEVICE) for k, v in part.items()} for part in made.victim.initial())
        self.rules, self.cohort = made, cohort
        self.server = Server(params, buffers, made.defense.init_server(params))
        self.states: dict[int, State] = {}
        self.sent: list[Update] = []
        self.shared: Shared = {}
        self.num_bytes = 0

    def compute(self) -> None:
        """Random numbers, local work and protection."""
        made, cohort = self.rules, self.cohort
        clients = Clients(made, self.server, self.states, cohort)
        self.shared, self.sent = clients.announce(), []
        for chunk in made.executor.chunks(cohort, range(len(cohort.clients)), made.victim.batch_coupled):
            outputs = clients.run(chunk, self.shared)
            self.sent += [{k: v[row] for k, v in outputs.sent.items()} for row in range(len(chunk))]
            if outputs.state:
                states = ({k: v[row] for k, v in outputs.state.items()} for row in range(len(chunk)))
                self.states |= zip((cohort.clients[m] for m in chunk), states, strict=True)

    def pack(self) -> None:
        """What the last ``compute`` left, as bytes."""
        encode = self.rules.defense.codec.encode
        payloads = [encode(u, self.shared, n) for u, n in zip(self.sent, self.cohort.num_examples, strict=False)]
        self.num_bytes = sum(p.num_bytes for p in payloads) // len(payloads)

    def serve(self) -> Callable[[], None]:
        """What the server does to the mean of what was sent, beside taking it."""
        mean = {k: torch.stack([update[k] for update in self.sent]).mean(0) for k in self.sent[0]}
        shares = [1 / len(self.sent)] * len(self.sent)

        def compensate() -> None:
            self.rules.defense.compensate(mean, self.server.defense, self.shared, shares)

        return compensate


def on_the_wall(options: argparse.Namespace) -> bool:
    return bool(options.wall) or DEVICE.type == "cuda"


def seconds(action: Callable[[], None], wall: bool) -> float:
    if wall:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started
    started = time.process_time()
    action()
    return time.process_time() - started


class Cost(NamedTuple):
    """Of one client: ms of computing and of packing, the median ratio of the former to no defense's, bytes; of the
    server: seconds a round."""

    compute: float
    ratio: float
    pack: float
    num_bytes: int
    server: float


def cost(options: argparse.Namespace, name: str, executor: str) -> Cost:
    clients, batch = options.clients, options.batch
    cohort = data(clients, batch, *options.image).cohort(0).to(DEVICE)
    settings = (("none", []), (name, options.overrides))
    made = [rules(options.model, n, executor, batch, overrides, *options.image) for n, overrides in settings]
    plain, defended = (ClientSide(m, cohort) for m in made)
    for warm_up in (plain.compute, defended.compute, defended.pack):
        warm_up()
    sides = (plain.compute, defended.compute, defended.pack)
    pairs = [[seconds(side, on_the_wall(options)) for side in sides] for _ in range(options.repeats)]
    each, compensate = 1e3 / clients, defended.serve()
    compensate()
    server = median(seconds(compensate, wall=True) for _ in range(3))
    return Cost(
        each * median(p[1] for p in pairs), median(p[1] / p[0] for p in pairs), each * median(p[2] for p in pairs),
        defended.num_bytes, server,
    )  # fmt: skip


@contextmanager
def rows(title: str, header: list[str]) -> Iterator[list[str]]:
    """Printed as it is where it goes to a file, drawn on a terminal."""
    lines: list[str] = []
    yield lines
    table = "\n".join([title, "", f"| {' | '.join(header)} |", "|---" * len(header) + "|", *lines])
    print(table) if not sys.stdout.isatty() else Console().print(Markdown(table))


def cost_table(options: argparse.Namespace) -> None:
    executors = [options.executor] if options.executor else list(EXECUTORS)
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = (
        f"{options.model}, {options.clients} clients x {options.batch} images of "
        + "x".join(map(str, (*options.image, options.image[1])))
        + f", torch {torch.__version__}, {where}, {'wall-clock' if on_the_wall(options) else 'processor'} time"
    )
    columns = [f"{e}: {what}" for e in executors for what in ("ms/client", "x none")]
    header = ["defense", *columns, "packing: ms/client", "uplink bytes", "server: s/round"]
    with torch.no_grad(), rows(title, header) as lines:
        for name in options.names or RECIPES:
            label = " ".join([name, *options.overrides])
            try:
                found = [cost(options, name, e) for e in executors]
            except IncompatibleError as error:
                lines.append(f"| {label} | skipped: {error} |" + " |" * (len(header) - 2))
                continue
            cells = [cell for c in found for cell in (f"{c.compute:.1f}", f"{c.ratio:.2f}")]
            last = found[-1]
            cells += [f"{last.pack:.2f}", f"{last.num_bytes:,}", f"{last.server:.3f}"]
            lines.append(f"| {label} | {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr)


def residuals(model: str, clients: int, storage: str) -> None:
    """Peak memory and bytes on disk once every client of a federation has a residual and has read it again."""
    made, cohort_size = rules(model, "dgp", "loop", 2), 4
    source = data(clients, 2)
    source.clients_per_round = cohort_size
    params, buffers = made.victim.initial()
    server = Server(params, buffers, {})
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder, torch.no_grad():
        states = client_states(storage, Path(folder) / "states", 1)
        round_index = 0
        started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(2):
            for first in range(0, clients, cohort_size):
                members = tuple(range(first, min(first + cohort_size, clients)))
                steps = tuple((source.partition.clients[c],) for c in members)
                cohort = Cohort(
                    round_index=round_index, clients=members, steps=steps, weights=(2,) * len(members),
                    source=source.dataset.train,
                )  # fmt: skip
                played = play_round(made, server, states, cohort, keep=states.keep)
                states.commit(round_index, played.states)
                round_index += 1
        on_disk = sum(path.stat().st_size for path in Path(folder).rglob("*.pt"))
        size = sum(t.nbytes for t in states[0].values())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{model}, {len(states)} clients, states of {size / 2**20:.1f} MiB in {storage}: {round_index} rounds, peak "
        f"memory {peak / 2**20:.2f} GiB ({started / 2**20:.2f} before the first), {on_disk / 2**30:.2f} GiB on disk"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--model", default="lenet")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--executor", choices=EXECUTORS, default=None)
    parser.add_argument("--image", nargs=2, type=int, default=(3, 32), metavar=("C", "N"))
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="OVERRIDE")
    parser.add_argument("--residuals", nargs=3, metavar=("MODEL", "CLIENTS", "STORAGE"))
    options = parser.parse_args()
    keep_freed_memory()  # as every run does
    if options.residuals:
        model, clients, storage = options.residuals
        residuals(model, int(clients), storage)
    else:
        cost_table(options)


if __name__ == "__main__":
    main()
