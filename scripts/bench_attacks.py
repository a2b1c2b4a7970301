"""Attacks: batched against one at a time, and beside breaching on the same victims, settings and threads.

Cosine distance + total variation in breaching's scale, signed Adam, images kept in their range, labels known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import bench_breaching as peer
import torch
from bench_parts import DEVICE, images, observed, photographs, seconds, victim
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from gia_bench.attacks.arithmetic import PLAIN, Arithmetic
from gia_bench.attacks.inverting_gradients import inverting_gradients
from gia_bench.attacks.matching import GradientMatching
from gia_bench.attacks.priors import PaddedTotalVariation
from gia_bench.errors import ConfigError
from gia_bench.metrics.images import psnr_db
from gia_bench.models.convnet import convnet
from gia_bench.models.functional import Victim
from gia_bench.models.lenet import lenet_zhu
from gia_bench.models.resnet import resnet
from gia_bench.values import Observation

ABSENT = "breaching is not installed: pip install 'gia-bench[bench]'"


def matching(steps: int, weight: float, restarts: int = 1, arithmetic: Arithmetic = PLAIN) -> GradientMatching:
    return inverting_gradients(
        steps=steps, restarts=restarts, labels="known", priors={"tv": PaddedTotalVariation(weight=weight)},
        arithmetic=arithmetic, snapshot_every=steps,
    )  # fmt: skip


def ours(attack: GradientMatching, model: Victim, seen: list[Observation]) -> Callable[[], object]:
    return lambda: attack.reconstruct_many(seen, model, seeds=list(range(len(seen))))


def theirs(steps: int, weight: float, model: Victim, seen: list[Observation]) -> Callable[[], object]:
    return lambda: [peer.reconstruct(model, o, steps, weight, seed) for seed, o in enumerate(seen)]


def reason(refused: ConfigError) -> str:
    """Why an arithmetic was refused, without what to do about it."""
    return str(refused).partition(":")[2].partition(";")[0].strip()


def noise(model: Victim, count: int) -> list[Observation]:
    source = images(count)
    return observed(model, source.images(torch.arange(count)), source.labels)


def work_of_a_step(model: Victim, seen: list[Observation], weight: float) -> float:
    """Floating-point operations: what a second step adds, since the look at the last result costs less than a step."""

    def work(steps: int) -> int:
        with FlopCounterMode(display=False) as counter:
            ours(matching(steps, weight), model, seen)()
        return counter.get_total_flops()

    return work(2) - work(1)


def bench_attack(table: Table, victims: int = 64, steps: int = 200) -> None:
    """DLG's LeNet: one victim, its restarts, many victims, and breaching one by one. With fewer steps what is done once
    an attack, such as the comparison of the quicker steps with the sure ones, would show."""
    model, weight = victim(lenet_zhu), 1e-4
    seen = noise(model, victims)
    by_turns = [  # so that a change of the machine hits both
        [seconds(ours(matching(steps, weight, restarts=r), model, seen[:1]), repeats=1) / steps for r in (1, 4)]
        for _ in range(7)
    ]
    one, four = (median(column) for column in zip(*by_turns, strict=True))
    theirs(steps, weight, model, seen[:1])() if peer.installed() else None  # its imports, and what it compiles at first
    turns = [  # by turns again: all victims at once, and every fourth by breaching, one by one
        (
            seconds(ours(matching(steps, weight), model, seen), repeats=1, warm=turn == 0) / victims,
            seconds(theirs(steps, weight, model, seen[turn::4]), repeats=1, warm=False) / len(seen[turn::4])
            if peer.installed() else 0.0,
        )
        for turn in range(4)
    ]  # fmt: skip
    many, single = (median(column) / steps for column in zip(*turns, strict=True))
    name = "gradient matching, DLG-LeNet, cosine + TV"
    table.add_row(f"{name}: 1 victim", f"{1e3 * one:.2f} ms/step", "1.0x")
    table.add_row("the same with 4 restarts at once", f"{1e3 * four:.2f} ms/step", f"{four / one:.2f}x the time")
    table.add_row(
        f"the same with {victims} victims at once", f"{1e3 * many:.2f} ms/victim and step", f"{one / many:.1f}x faster"
    )
    if peer.installed() is None:
        table.add_row("the same by breaching", ABSENT, "")
        return
    table.add_row(
        f"breaching {peer.installed()}, the same {victims} victims one by one",
        f"{1e3 * single:.2f} ms/victim and step",
        f"ours {single / many:.1f}x faster",
    )


def bench_convnet(table: Table, steps: int = 10) -> None:
    """ConvNet64, one victim: the time, and how near it is to what the machine can multiply and add."""
    a = torch.rand(2048, 2048, device=DEVICE)
    products = 2 * 2048**3 / seconds(lambda: a @ a) / 1e9
    x, w = torch.rand(1, 256, 32, 32, device=DEVICE), torch.rand(256, 256, 3, 3, device=DEVICE)
    convolutions = 2 * 256 * 256 * 9 * 32 * 32 / seconds(lambda: torch.conv2d(x, w, padding=1), repeats=21) / 1e9
    table.add_row("this machine: a matrix product (2048)", f"{products:.0f} GFLOP/s", "")
    table.add_row("this machine: ConvNet64's largest convolution, one image", f"{convolutions:.0f} GFLOP/s", "")
    for training in (False, True):
        model = victim(convnet, init="default", normalize=True, training=training)
        seen, weight = noise(model, 1), 1e-4
        work = work_of_a_step(model, seen, weight) / 1e9
        mine, other = [], []
        for _ in range(5 if peer.installed() else 0):  # by turns, so that a change of the machine hits both
            mine.append(seconds(ours(matching(steps, weight), model, seen), repeats=1) / steps)
            other.append(seconds(theirs(steps, weight, model, seen), repeats=1) / steps)
        took = median(mine or [seconds(ours(matching(steps, weight), model, seen), repeats=3) / steps])
        mode = "training" if training else "evaluation"
        table.add_row(
            f"ConvNet64 ({mode} mode), one victim: {work:.1f} GFLOP a step",
            f"{1e3 * took:.0f} ms/step",
            f"{work / took:.0f} GFLOP/s, {100 * work / took / convolutions:.0f}% of the convolution's",
        )
        if other:
            single = median(other)
            table.add_row(
                f"breaching {peer.installed()}, the same", f"{1e3 * single:.0f} ms/step",
                f"ours {single / took:.2f}x faster",
            )  # fmt: skip
        else:
            table.add_row("the same by breaching", ABSENT, "")


def bench_quality(table: Table) -> None:
    """The same number of steps on the same photographs: what both rebuild, and what other arithmetic changes."""
    others = [Arithmetic(compile=True), Arithmetic(precision="bf16")]
    others += [Arithmetic(precision="tf32")] if DEVICE.type == "cuda" else []
    beside_breaching(table, "DLG-LeNet", victim(lenet_zhu), victims=8, steps=600, others=others)
    for name, network in (("ConvNet64", convnet), ("ResNet-18", resnet)):
        if DEVICE.type == "cuda" or network is convnet:  # the precisions that are timed there; minutes of a CPU
            model = victim(network, init="default", normalize=True, training=False)
            few = others if DEVICE.type == "cuda" else []
            beside_breaching(table, f"{name} in evaluation mode", model, victims=4, steps=100, others=few)


def beside_breaching(
    table: Table, name: str, model: Victim, victims: int, steps: int, others: Sequence[Arithmetic] = ()
) -> None:
    source = photographs()
    if source is None:
        table.add_row(f"PSNR beside breaching, {name}", "no CIFAR-10 at hand; see GIA_BENCH_DATA", "")
        return
    chosen = [i for i in range(len(source.train)) if i not in source.unfit_targets][:victims]
    truth, labels = source.train.images(torch.tensor(chosen)).to(DEVICE), source.train.labels[chosen]
    weight, seen = 1e-4, observed(model, truth, labels)

    def row(name: str, found: list[torch.Tensor], took: float) -> None:
        scores = psnr_db(torch.cat(found).clamp(0, 1), truth).sort().values
        middle, low, high = scores.median(), scores[0], scores[-1]
        table.add_row(name, f"median {middle:.1f} dB ({low:.1f} to {high:.1f})", f"{took:.0f} s")

    def rebuilt(arithmetic: Arithmetic) -> tuple[list[torch.Tensor], float]:
        attack = matching(steps, weight, arithmetic=arithmetic)
        found: list[torch.Tensor] = []

        def run() -> None:
            found[:] = [r.inputs for r in attack.reconstruct_many(seen, model, seeds=list(range(victims)))]

        took = seconds(run, repeats=1, warm=False)
        return found, took

    row(f"PSNR, {victims} photographs, {name}, {steps} steps", *rebuilt(PLAIN))
    for other in others:
        same = f"the same, compile={other.compile}, {other.precision}"
        try:
            row(same, *rebuilt(other))
        except ConfigError as refused:  # not equal enough on the first guesses: that is a result too
            table.add_row(same, "refused", reason(refused))
    if peer.installed() is None:
        table.add_row("the same by breaching", ABSENT, "")
        return
    theirs_found: list[torch.Tensor] = []

    def run() -> None:
        theirs_found[:] = [peer.reconstruct(model, o, steps, weight, s) for s, o in enumerate(seen)]

    took = seconds(run, repeats=1, warm=False)
    row(f"the same by breaching {peer.installed()}", theirs_found, took)


def bench_gpu(table: Table, victims: int = 64, steps: int = 50) -> None:
    """ConvNet64 and ResNet-18 with many victims: throughput, share of the card's own products, memory, precisions; what
    these rebuild is in the rows of ``bench_quality``."""
    if DEVICE.type != "cuda":
        table.add_row(f"ConvNet64 and ResNet-18, {victims} victims", "needs a GPU", "")
        return
    torch.backends.cudnn.allow_tf32 = False  # of what does not choose for itself: breaching
    a = torch.rand(8192, 8192, device=DEVICE)
    products = 2 * 8192**3 / seconds(lambda: a @ a) / 1e12
    table.add_row("this card: a matrix product (8192), fp32", f"{products:.1f} TFLOP/s", "")
    for name, network in (("ConvNet64", convnet), ("ResNet-18", resnet)):
        model, weight = victim(network, init="default", normalize=True, training=False), 1e-4
        seen = noise(model, victims)
        work = work_of_a_step(model, seen[:1], weight) / 1e12
        best = float("inf")
        for arithmetic in [Arithmetic(compile=c, precision=p) for p in ("fp32", "tf32", "bf16") for c in (False, True)]:
            attack = matching(steps, weight, arithmetic=arithmetic)
            torch.cuda.reset_peak_memory_stats()
            row = f"{name}, {victims} victims at once, {arithmetic.precision}, compile={arithmetic.compile}"
            try:
                took = seconds(ours(attack, model, seen), repeats=2) / steps / victims
            except ConfigError as refused:
                table.add_row(row, "refused", reason(refused))
                continue
            best = took if arithmetic == PLAIN else best
            table.add_row(
                row,
                f"{1e3 * took:.2f} ms/victim and step, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB",
                f"{work / took:.1f} TFLOP/s, {100 * work / took / products:.0f}% of the product's",
            )
        if peer.installed() is None:
            table.add_row("the same by breaching", ABSENT, "")
            continue
        few = seen[:4]  # one by one, so that four say what sixty-four would
        single = seconds(theirs(steps, weight, model, few), repeats=1) / steps / len(few)
        table.add_row(
            f"breaching {peer.installed()}, the same, one by one", f"{1e3 * single:.2f} ms/victim and step",
            f"ours (fp32) {single / best:.1f}x faster",
        )  # fmt: skip
