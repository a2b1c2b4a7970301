"""Pruning methods against naive loops, automatic differentiation, finite differences and numbers computed by hand."""

from __future__ import annotations

import copy
import dataclasses
import heapq
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gia_bench.data.source import InMemory
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.federated.local import FedSGD
from gia_bench.models.functional import Victim
from gia_bench.pruning.base import Pruning, Trained
from gia_bench.pruning.erk import erk_counts
from gia_bench.pruning.feddst import FedDST
from gia_bench.pruning.grasp import GraSP, grasp_scores
from gia_bench.pruning.initial import InitialPruning, has_settled
from gia_bench.pruning.prunefl import PruneFL, worthwhile
from gia_bench.pruning.random_mask import RandomMask
from gia_bench.pruning.scores import above_threshold, mean_loss, prunable, pruned_in_steps, public_batches
from gia_bench.pruning.snip import SNIP, snip_scores
from gia_bench.pruning.synflow import SynFlow, synflow_scores
from gia_bench.seeding import seeded, stream
from gia_bench.values import Batch

CLASSES = 3


def victim(*, norm: bool = False, activation: type[nn.Module] = nn.Tanh) -> Victim:
    with seeded(0, "test model"):
        middle = [nn.BatchNorm2d(4)] if norm else []
        module = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            *middle,
            activation(),
            nn.Flatten(),
            nn.Linear(64, 8),
            activation(),
            nn.Linear(8, CLASSES),
        )
    return Victim(module=module.double(), input_shape=(1, 6, 6), num_classes=CLASSES)


class Public:
    """Random images, float64."""

    def __init__(self, count: int = 60) -> None:
        g = stream(1, "public")
        self.source = InMemory(torch.rand(count, 1, 6, 6, generator=g), torch.randint(CLASSES, (count,), generator=g))

    @property
    def labels(self) -> Tensor:
        return self.source.labels

    def __len__(self) -> int:
        return len(self.source)

    def images(self, indices: Tensor) -> Tensor:
        return self.source.images(indices).double()


def test_only_weights_of_linear_layers_and_convolutions_are_prunable() -> None:
    model = victim(norm=True)
    assert prunable(model) == ["0.weight", "4.weight", "6.weight"]
    assert prunable(model, bias=True) == ["0.weight", "0.bias", "4.weight", "4.bias", "6.weight", "6.bias"]
    bare = Victim(module=nn.BatchNorm2d(1), input_shape=(1, 2, 2), num_classes=1)
    with pytest.raises(IncompatibleError, match="the model has none"):
        prunable(bare)


@pytest.mark.parametrize("density", [1.0, 0.9, 0.5, 0.1, 0.01])
def test_the_global_threshold_equals_a_sort_in_numpy(density: float) -> None:
    scores = {n: torch.randn(s, generator=stream(0, n)) for n, s in (("a", (7, 10)), ("b", (30,)))}
    row = np.sort(np.concatenate([scores[n].numpy().ravel() for n in scores]))
    k = round((1 - density) * 100)
    mask = above_threshold(scores, density)
    assert sum(int(m.sum()) for m in mask.values()) == 100 - k
    for name, score in scores.items():
        expected = score.numpy() > (row[k - 1] if k else -np.inf)
        assert np.array_equal(mask[name].numpy(), expected)


def test_the_number_pruned_is_of_the_density_that_was_meant() -> None:
    # 1 - 0.9 is 0.0999... in binary, and 10 times that is below 1
    mask = above_threshold({"a": torch.arange(10.0)}, 0.9)["a"]
    assert mask.tolist() == [False] + [True] * 9


def test_the_schedules_reach_their_densities_step_by_step() -> None:
    seen: dict[str, list[float]] = {}
    params = {"a": torch.arange(1.0, 1001.0)}
    for schedule in ("exponential", "linear"):
        seen[schedule] = []

        def scores(left: dict[str, Tensor], epoch: int, schedule: str = schedule) -> dict[str, Tensor]:
            seen[schedule].append(float((left["a"] != 0).double().mean()))
            return left

        pruned_in_steps(params, ["a"], scores, density=0.1, epochs=4, schedule=schedule)
    assert seen["exponential"] == pytest.approx([1, 0.1**0.25, 0.1**0.5, 0.1**0.75], abs=2e-3)
    assert seen["linear"] == pytest.approx([1, 0.775, 0.55, 0.325], abs=2e-3)


def test_a_snip_score_is_the_derivative_by_an_explicit_mask() -> None:
    model = victim(norm=True)
    params, buffers = model.initial()
    names, batches = prunable(model), public_batches(Public(), CLASSES, 0)
    masks = {n: torch.ones_like(params[n], requires_grad=True) for n in names}
    model.module.eval()
    total: Any = 0
    for batch in batches:
        masked = params | {n: params[n] * masks[n] for n in names}
        logits = torch.func.functional_call(model.module, (masked, buffers), (batch.inputs,))
        total = total + nn.functional.cross_entropy(logits, batch.labels)
    by_mask = dict(zip(names, torch.autograd.grad(total, list(masks.values())), strict=True))
    whole = sum(float(g.abs().sum()) for g in by_mask.values())
    got = snip_scores(model, params, buffers, batches, names)
    for name in names:
        torch.testing.assert_close(got[name], by_mask[name].abs() / whole)
    assert sum(float(s.sum()) for s in got.values()) == pytest.approx(1)


@pytest.mark.parametrize("bias", [False, True], ids=["weights", "biases too"])
def test_snips_scores_of_a_round_of_the_public_examples_are_those_of_the_public_examples(bias: bool) -> None:
    """Both ways of SNIP meet where the clients' mean update is the gradient on the public examples."""
    model, public = victim(norm=True), Public()
    params, buffers = model.initial()
    [batch] = public_batches(public, CLASSES, 0)
    update = torch.func.grad(lambda p: mean_loss(model, p, buffers, batch))(params)
    later = SNIP(scored_on="first_round", prune_bias=bias)
    masks = later.start(model, public)
    assert all(bool(m.all()) for m in masks.values())
    assert later.strength(0) is not None and later.strength(1) is None and SNIP().strength(0) is None
    stepped = {k: p - 3 * update[k] for k, p in params.items()}
    # FedAvg's update is a gradient times a learning rate
    for factor in (1.0, 0.01):
        scores = later.judge(model, {k: factor * u for k, u in update.items()})
        got = later.adjust(stepped, masks, scores, 0.8)
        expected = SNIP(prune_bias=bias).start(model, public)
        assert got.keys() == expected.keys() and all(torch.equal(got[k], m) for k, m in expected.items())


def test_graps_hessian_gradient_product_equals_finite_differences() -> None:
    model = victim()
    params, buffers = model.initial()
    names, batches, temperature = prunable(model), public_batches(Public(), CLASSES, 0), 2.0

    def gradient(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {n: weights[n].clone().requires_grad_() for n in names}
        model.module.eval()
        total: Any = 0
        for batch in batches:
            logits = torch.func.functional_call(model.module, (weights | own, buffers), (batch.inputs,))
            total = total + nn.functional.cross_entropy(logits / temperature, batch.labels)
        return dict(zip(names, torch.autograd.grad(total, list(own.values())), strict=True))

    g, step = gradient(params), 1e-5
    ahead = gradient(params | {n: params[n] + step * g[n] for n in names})
    behind = gradient(params | {n: params[n] - step * g[n] for n in names})
    product = {n: (ahead[n] - behind[n]) / (2 * step) * params[n] for n in names}
    whole = abs(sum(float(p.sum()) for p in product.values())) + 1e-10
    got = grasp_scores(model, params, buffers, batches, names, temperature)
    for name in names:
        torch.testing.assert_close(got[name], product[name] / whole, rtol=1e-5, atol=1e-7)


def test_synflow_is_conserved_from_layer_to_layer_of_a_linear_network() -> None:
    with seeded(0, "linear"):
        module = nn.Sequential(nn.Flatten(), *(nn.Linear(a, b, bias=False) for a, b in ((9, 7), (7, 5), (5, 3))))
    model = Victim(module=module, input_shape=(1, 3, 3), num_classes=3)
    params, buffers = model.initial()
    names = prunable(model)
    scores = synflow_scores(model, params, buffers, names)
    flow = torch.ones(9, dtype=torch.float64)
    for name in names:
        flow = params[name].double().abs() @ flow
    for name in names:
        assert float(scores[name].sum()) == pytest.approx(float(flow.sum()), rel=1e-12)


def test_synflow_takes_magnitudes_of_batchnorm_too_and_leaves_the_normalisation_out() -> None:
    model = victim(norm=True, activation=nn.ReLU)
    params, buffers = model.initial()
    params["1.weight"], buffers["1.running_mean"] = -params["1.weight"], torch.zeros(4).double()
    names = prunable(model)
    moved = Victim(
        module=model.module,
        input_shape=(1, 6, 6),
        num_classes=CLASSES,
        mean=torch.tensor([0.5]),
        std=torch.tensor([0.1]),
    )
    negative = {k: -v for k, v in params.items()}
    scores = synflow_scores(model, params, buffers, names)
    assert all(float(s.sum()) > 0 for s in scores.values())
    for other in (synflow_scores(moved, params, buffers, names), synflow_scores(model, negative, buffers, names)):
        for name in names:
            torch.testing.assert_close(other[name], scores[name])


def test_synflow_keeps_every_layer_where_snip_and_magnitude_may_lose_one() -> None:
    mask = SynFlow(density=0.02).start(victim(), Public())
    assert all(bool(m.any()) for m in mask.values())


@pytest.mark.parametrize("method", [RandomMask(), SNIP(), GraSP(), SynFlow()], ids=lambda m: type(m).__name__)
def test_a_method_keeps_its_density_and_repeats_itself(method: Pruning) -> None:
    model = victim(norm=True)
    first, again = method.start(model, Public()), method.start(model, Public())
    total = sum(m.numel() for m in first.values())
    assert sum(int(m.sum()) for m in first.values()) == pytest.approx(0.2 * total, abs=1)
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_random_masks_of_other_seeds_differ() -> None:
    one, other = (RandomMask(seed=s).start(victim(), Public())["3.weight"] for s in (0, 1))
    assert not torch.equal(one, other)


def test_erk_densities_equal_those_computed_by_hand() -> None:
    # sum(shape): 12 and 30; prod: 20 and 200; epsilon = 0.25 * 220 / 42 = 1.3095...
    counts = erk_counts({"small": (2, 10), "large": (10, 20)}, 0.25)
    assert counts == {"small": round(55 / 42 * 12), "large": round(55 / 42 * 30)} == {"small": 16, "large": 39}
    # at 0.5 the small layer would keep 31 of 20: it is whole, and the large one keeps 110 - 20
    assert erk_counts({"small": (2, 10), "large": (10, 20)}, 0.5) == {"small": 20, "large": 90}
    assert erk_counts({"small": (2, 10), "large": (10, 20)}, 1.0) == {"small": 20, "large": 200}
    # a convolution counts its kernel's sides: (3 + 2 + 5 + 5) / 150 against (10 + 10) / 100
    conv = erk_counts({"conv": (3, 2, 5, 5), "fc": (10, 10)}, 0.2)
    assert conv == {"conv": round(50 / 35 * 15), "fc": round(50 / 35 * 20)}


def dst_loops(w: np.ndarray, g: np.ndarray, mask: np.ndarray, fewer: int, whole: int) -> np.ndarray:
    """FedDST's readjustment of one layer by loops over sorted lists."""
    kept = np.zeros(w.size, bool)
    for i in sorted((i for i in range(w.size) if mask[i]), key=lambda i: -abs(w[i]))[:fewer]:
        kept[i] = True
    own = kept.copy()
    for i in sorted((i for i in range(w.size) if not kept[i]), key=lambda i: -abs(g[i]))[: whole - fewer]:
        own[i] = True
    return own


def test_a_feddst_client_prunes_by_magnitude_and_grows_by_gradient_as_a_loop_does() -> None:
    method = FedDST(density=0.3, alpha=0.5, rounds=100, interval=5)
    shapes = {"a": (8, 12), "b": (5, 8)}
    whole, fewer = erk_counts(shapes, 0.3), erk_counts(shapes, 0.15)
    params, update, gradient, masks = {}, {}, {}, {}
    for name, shape in shapes.items():
        g = stream(0, name)
        row = torch.zeros(math.prod(shape), dtype=torch.bool)
        row[torch.randperm(len(row), generator=g)[: whole[name]]] = True
        masks[name] = row.view(shape)
        params[name] = torch.randn(shape, generator=g) * masks[name]
        update[name] = torch.randn(shape, generator=g) * masks[name]
        gradient[name] = torch.randn(shape, generator=g)
    told = method.testify(Trained(params, update, masks, gradient, {}), 0.5)
    for name, shape in shapes.items():
        w = params[name] - update[name]
        flat = [t.numpy().ravel() for t in (w, gradient[name], masks[name])]
        own = dst_loops(*flat, fewer[name], whole[name]).reshape(shape)
        assert np.array_equal(told.evidence[name].numpy(), own)
        assert int(own.sum()) == whole[name]
        after = (params[name] - told.update[name]).numpy()
        kept = dst_loops(*flat, fewer[name], fewer[name]).reshape(shape)
        assert np.array_equal(after, np.where(kept, w.numpy(), 0))


def test_feddsts_server_averages_over_those_who_keep_a_weight_and_prunes_to_its_density_again() -> None:
    method = FedDST(density=0.25)
    count = erk_counts({"a": (4, 10)}, 0.25)["a"]
    g = stream(0, "server")
    weights = [torch.randn(4, 10, generator=g) for _ in range(3)]
    own = [torch.rand(4, 10, generator=g) < 0.4 for _ in range(3)]
    sizes = [3.0, 1.0, 2.0]
    server = torch.randn(4, 10, generator=g)
    mean = {"a": sum(n * m * (server - w) for n, m, w in zip(sizes, own, weights, strict=True)) / 6}
    share = {"a": sum(n * m.double() for n, m in zip(sizes, own, strict=True)) / 6}
    after = server - method.combine(mean, share)["a"]
    for i in range(4):
        for j in range(10):
            keep = [k for k in range(3) if own[k][i, j]]
            expected = (
                sum(sizes[k] * float(weights[k][i, j]) for k in keep) / sum(sizes[k] for k in keep)
                if keep
                else float(server[i, j])
            )
            assert float(after[i, j]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    mask = method.adjust({"a": after}, {"a": own[0]}, share, 0.5)["a"]
    assert int(mask.sum()) == count
    held = share["a"] > 0
    assert not (mask & ~held).any()
    assert float(after[mask].abs().min()) >= float(after[held & ~mask].abs().max())


def test_feddst_fills_up_with_the_zeros_that_most_clients_grew() -> None:
    params = torch.tensor([[3.0, 0.0, 0.0, 2.0, 0.0]])
    share = torch.tensor([[1.0, 0.25, 0.75, 0.5, 0.0]], dtype=torch.float64)
    method = FedDST(density=0.6)
    mask = method.adjust({"a": params}, {"a": torch.ones(1, 5, dtype=torch.bool)}, {"a": share}, 0.5)["a"]
    assert mask.tolist() == [[True, False, True, True, False]]


def test_alpha_falls_as_a_cosine_and_readjusting_ends() -> None:
    method = FedDST(alpha=0.5, rounds=400, interval=10)
    assert method.strength(8) is None
    assert method.strength(9) == pytest.approx(0.25 * (1 + math.cos(math.pi * 9 / 200)))
    assert method.strength(99) == pytest.approx(0.25, abs=0.005)
    assert method.strength(199) == pytest.approx(0, abs=1e-4)
    assert method.strength(209) is None


def greedy(gain: list[float], time: list[float], num: float, den: float, room: int | None) -> set[int]:
    """PruneFL's heap."""
    heap = [(-g / t, i) for i, (g, t) in enumerate(zip(gain, time, strict=True))]
    heapq.heapify(heap)
    taken: set[int] = set()
    while heap and (room is None or len(taken) < room):
        ratio, i = heapq.heappop(heap)
        if not -ratio > num / den:
            break
        taken.add(i)
        num, den = num + gain[i], den + time[i]
    return taken


@pytest.mark.parametrize("room", [None, 7, 0])
@pytest.mark.parametrize("num", [0.0, 3.0, 1e4])
def test_prunefl_takes_what_a_heap_takes(num: float, room: int | None) -> None:
    for case in range(20):
        g = stream(0, "greedy", case)
        gain = torch.rand(60, generator=g, dtype=torch.float64) ** 4
        time = torch.rand(60, generator=g, dtype=torch.float64) + 0.01
        got = worthwhile(gain, time, num, 40.0, room)
        assert set(got.tolist()) == greedy(gain.tolist(), time.tolist(), num, 40.0, room)


def test_prunefl_adjusts_as_a_loop_over_single_weights_does() -> None:
    method = PruneFL(constant=2.0, communication=0.01, computation=[0.0, 0.05], max_change=0.3)
    g = stream(0, "adjust")
    shapes = {"a": (6, 7), "a.bias": (6,), "b": (5, 6)}
    params = {n: torch.randn(s, generator=g) for n, s in shapes.items()}
    masks = {n: torch.rand(shapes[n], generator=g) < 0.6 for n in ("a", "b")}
    params |= {n: params[n] * m for n, m in masks.items()}
    evidence = {n: torch.rand(s, generator=g) ** 6 for n, s in shapes.items()}
    num, den, gain, time, place, expected = float(evidence["a.bias"].double().sum()), 2.0, [], [], [], {}
    for name, t in (("a", 0.01), ("b", 0.06)):
        flat, kept = params[name].flatten().tolist(), masks[name].flatten().tolist()
        used = sorted((i for i in range(len(flat)) if kept[i]), key=lambda i: abs(flat[i]))
        candidates = set(used[: int(0.3 * len(used))])
        expected[name] = [kept[i] and i not in candidates for i in range(len(flat))]
        for i, value in enumerate(evidence[name].flatten().double().tolist()):
            if expected[name][i]:
                num, den = num + value, den + t
            else:
                gain.append(value), time.append(t), place.append((name, i))
    for i in greedy(gain, time, num, den, None):
        expected[place[i][0]][place[i][1]] = True
    got = method.adjust(params, masks, evidence, 0.3)
    assert {n: m.flatten().tolist() for n, m in got.items()} == expected
    assert any(not torch.equal(got[n], masks[n]) for n in masks)


def test_prunefls_share_halves_with_its_half_life_and_its_limit_holds() -> None:
    method = PruneFL(interval=50, half_life=99)
    assert method.strength(48) is None
    assert method.strength(49) == pytest.approx(0.3 * 0.5 ** (49 / 99))
    assert method.strength(99) == pytest.approx(0.15)
    limited = PruneFL(density_limit=0.5, computation=0.0)
    params, evidence = {"a": torch.ones(10, 10)}, {"a": torch.rand(10, 10, generator=stream(0))}
    small = {"a": torch.arange(100).view(10, 10) < 40}
    assert int(limited.adjust(params, small, evidence, 0.3)["a"].sum()) == 50


def test_prunefl_adds_up_squared_gradients_and_forgets_what_it_sent() -> None:
    method = PruneFL()
    batch = Batch(torch.zeros(2, 1), torch.zeros(2), torch.ones(2))
    empty = Batch(torch.zeros(2, 1), torch.zeros(2), torch.zeros(2))
    steps = [torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5])]
    seen = method.witness(method.witness({}, {"a": steps[0]}, batch), {"a": steps[1]}, batch)
    seen = method.witness(seen, {"a": torch.tensor([9.0, 9.0])}, empty)
    trained = Trained({}, {}, {}, seen, {"a": torch.tensor([100.0, 0.0])})
    kept, sent = method.testify(trained, None), method.testify(trained, 0.3)
    assert kept.evidence == {} and kept.state["a"].tolist() == [110.0, 4.25]
    assert sent.evidence["a"].tolist() == [110.0, 4.25] and sent.state["a"].tolist() == [0.0, 0.0]


def initial_by_hand(model: Victim, method: PruneFL, data: list[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The initial stage with plain autograd, torch's SGD and a list of densities."""
    stage, names = method.initial, prunable(model)
    own = copy.deepcopy(model.module).train()
    params = dict(own.named_parameters())
    optimizer = torch.optim.SGD(own.parameters(), lr=stage.learning_rate)
    masks = {n: torch.ones_like(params[n], dtype=torch.bool) for n in names}
    sums: dict[str, Tensor] = {n: torch.zeros_like(p) for n, p in params.items()}
    began, densities = None, []
    for r in range(stage.rounds):
        if began is None and r % 10 == 0:
            own.eval()
            right = sum(int((own(b.inputs).argmax(1) == b.labels).sum()) for b in data)
            own.train()
            if right / 24 >= stage.accuracy_factor / CLASSES:
                began = r
        for batch in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(own(batch.inputs), batch.labels).backward()  # type: ignore[no-untyped-call]
            for n, p in params.items():
                assert p.grad is not None
                sums[n] += p.grad**2
            optimizer.step()
            for n, m in masks.items():
                params[n].data[~m] = 0
        if began is not None and r in range(began, stage.rounds, stage.interval):
            masks = method.adjust({n: p.detach() for n, p in params.items()}, masks, sums, method.max_change)
            sums = {n: torch.zeros_like(p) for n, p in params.items()}
            for n, m in masks.items():
                params[n].data[~m] = 0
            densities.append(sum(int(m.sum()) for m in masks.values()))
            last = densities[-stage.patience - 1 :]
            if len(last) > stage.patience and all(
                b * (1 - stage.tolerance) <= a <= b * (1 + stage.tolerance) for b, a in itertools.pairwise(last)
            ):
                break
    return masks, {n: p.detach() for n, p in params.items()}


STAGE = InitialPruning(rounds=25, batches=3, batch_size=8, interval=4, patience=2, accuracy_factor=1.0)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize("tolerance", [0.0, 10.0], ids=["all rounds", "stopped"])
def test_prunefls_initial_stage_is_that_of_plain_autograd_and_torchs_sgd(tolerance: float, norm: bool) -> None:
    stage = dataclasses.replace(STAGE, tolerance=tolerance)
    method = PruneFL(constant=1.0, communication=1e-3, initial=stage, density_limit=0.01)
    model, public = victim(norm=norm), Public()
    chosen = torch.randperm(60, generator=stream(0, "pruning", "initial"))[:24].split(8)
    data = [Batch(public.images(rows), public.labels[rows], torch.ones(8)) for rows in chosen]
    masks, params = initial_by_hand(model, dataclasses.replace(method, density_limit=None), data)
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    begun = method.begin(model, public)
    assert all(torch.equal(begun.masks[n], m) for n, m in masks.items())
    torch.testing.assert_close(begun.params, params)
    kept = sum(int(m.sum()) for m in masks.values())
    assert 0 < kept < sum(m.numel() for m in masks.values())
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())


def test_without_rounds_or_before_anything_is_learnt_nothing_is_pruned() -> None:
    model, public = victim(), Public()
    off = PruneFL().begin(model, public)
    assert off.params == {} and all(bool(m.all()) for m in off.masks.values())
    dull = PruneFL(initial=dataclasses.replace(STAGE, accuracy_factor=3.01)).begin(model, public)
    assert all(bool(m.all()) for m in dull.masks.values())
    assert not torch.equal(dull.params["0.weight"], model.initial()[0]["0.weight"])


def test_a_size_has_settled_after_as_many_small_changes_in_a_row_as_asked_for() -> None:
    assert not has_settled([], 0.1, 1) and not has_settled([0.5], 0.1, 1)
    assert has_settled([0.5, 0.46], 0.1, 1) and not has_settled([0.5, 0.44], 0.1, 1)
    assert not has_settled([0.9, 0.5, 0.5], 0.1, 2) and has_settled([0.9, 0.5, 0.5, 0.5], 0.1, 2)
    assert not has_settled([0.5, 0.5, 0.6], 0.1, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SNIP(density=0.0), "density=0.0 must lie in"),
        (lambda: SNIP(scored_on="private"), "Choose one of: first_round, public"),
        (lambda: SNIP(scored_on="first_round", epochs=3), "set epochs to 1, or take scored_on=public"),
        (lambda: RandomMask(density=1.5), "density=1.5 must lie in"),
        (lambda: SynFlow(epochs=0), "epochs=0"),
        (lambda: GraSP(schedule="cosine"), "Choose one of: exponential, linear"),
        (lambda: GraSP(temperature=0.0), "temperature=0.0"),
        (lambda: FedDST(alpha=2.0), "alpha=2.0"),
        (lambda: FedDST(interval=0), "interval=0"),
        (lambda: FedDST().check_local(FedSGD()), "choose fl=fedavg"),
        (lambda: PruneFL(max_change=1.1), "max_change=1.1"),
        (lambda: PruneFL(computation=-1.0), "computation=-1.0"),
        (lambda: PruneFL(accumulate="never"), "must be interval or round"),
        (lambda: PruneFL(density_limit=0.0), "density_limit=0.0"),
        (lambda: PruneFL(computation=[1.0, 2.0]).start(victim(), Public()), "2 numbers, but the model has 3"),
        (lambda: SNIP().start(victim(), Public(29)), "30 public examples"),
        (lambda: PruneFL(initial=STAGE).check_public("test"), "set public.split=train"),
        (lambda: InitialPruning(rounds=-1), "initial.rounds=-1"),
        (lambda: InitialPruning(patience=0), "initial.patience=0"),
        (lambda: InitialPruning(learning_rate=0.0), "initial.learning_rate=0.0"),
        (
            lambda: PruneFL(initial=InitialPruning(rounds=1)).begin(victim(), Public(199)),
            "trains on 200 public examples",
        ),
    ],
)
def test_settings_out_of_range_are_refused_with_a_sentence(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
