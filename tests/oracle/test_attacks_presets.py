"""What each paper's preset minimises, written out once more by hand, and what it does to real leaks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from attack_problems import Problem, problem, psnr_db
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from gia_bench.attacks.cpl import cpl
from gia_bench.attacks.graddefense import dga
from gia_bench.attacks.group import Group
from gia_bench.attacks.initial import Patterned
from gia_bench.attacks.inverting_gradients import inverting_gradients
from gia_bench.attacks.matching import GradientMatching
from gia_bench.attacks.optimizers import Adam
from gia_bench.attacks.scene import PixelSpace
from gia_bench.attacks.sgi import sgi
from gia_bench.conf_path import CONF
from gia_bench.values import Batch

Tensors = list[Tensor]


def cosine(dummy: Tensors, observed: Tensors) -> Tensor:
    x, y = (torch.cat([t.flatten() for t in u]) for u in (dummy, observed))
    angle: Tensor = x @ y / (x.norm() * y.norm())
    return 1 - angle


def squares(dummy: Tensors, observed: Tensors) -> Tensor:
    return torch.stack([(a - b).square().sum() for a, b in zip(dummy, observed, strict=True)]).sum()


def sent(distance: Callable[[Tensors, Tensors], Tensor], dummy: Tensors, observed: Tensors) -> Tensor:
    kept = [y != 0 for y in observed]
    return distance(
        [x[m] for x, m in zip(dummy, kept, strict=True)], [y[m] for y, m in zip(observed, kept, strict=True)]
    )


def variation(z: Tensor) -> Tensor:
    return (z[..., 1:] - z[..., :-1]).abs().mean() + (z[..., 1:, :] - z[..., :-1, :]).abs().mean()


def bordered(z: Tensor) -> Tensor:
    """Breaching's scale: the last row and column differ from zeros."""
    right, below = torch.zeros_like(z[..., :1]), torch.zeros_like(z[..., :1, :])
    across, down = torch.cat([z, right], -1).diff(dim=-1), torch.cat([z, below], -2).diff(dim=-2)
    return (across.abs().sum() + down.abs().sum()) / z.numel() + 2e-8


def statistics(z: Tensor, p: Problem) -> Tensor:
    """Of the only BatchNorm layer, behind the first convolution; it is the first, so it counts ten times."""
    x = p.victim.module.get_submodule("0")(z).transpose(0, 1).flatten(1)
    assert isinstance(x, Tensor)
    running = p.observations[0].buffers
    mean, variance = x.mean(1) - running["1.running_mean"], x.var(1, correction=0) - running["1.running_var"]
    apart: Tensor = mean.norm() + variance.norm()
    return 10 * apart


BY_HAND: dict[str, Callable[[Tensors, Tensors, Tensor, Problem], Tensor]] = {
    "cpl": lambda d, o, z, p: squares(d, o),
    "dga": lambda d, o, z, p: squares(d, o),
    "dga_muted": lambda d, o, z, p: squares(d[:-2], o[:-2]),
    "gia": lambda d, o, z, p: cosine(d, o) + 1e-4 * variation(z),
    "gia_muted": lambda d, o, z, p: cosine(d[:-2], o[:-2]) + 1e-4 * variation(z),
    "sgi": lambda d, o, z, p: sent(cosine, d, o) + 1e-4 * variation(z),
    "inverting_gradients_dgp_paper": lambda d, o, z, p: cosine(d, o) + 0.2 * bordered(z),
    "gradinversion": lambda d, o, z, p: (
        1e-4 * squares(d, o) / 2 + 1e-4 * bordered(z) + 1e-6 * z.square().mean() / 2 + 0.1 * statistics(z, p)
    ),
    "gradinversion_dgp_paper": lambda d, o, z, p: (
        1e-4 * squares(d, o) / 2 + 1e-4 * bordered(z) + 1e-6 * z.square().mean() / 2 + 0.01 * statistics(z, p)
    ),
}


def pruned(p: Problem, keep: float) -> Problem:
    """The same victims, of whose updates only the largest entries of each tensor were sent."""

    def top(t: Tensor) -> Tensor:
        return t * (t.abs() >= t.abs().flatten().kthvalue(max(int((1 - keep) * t.numel()), 1)).values)

    seen = [dataclasses.replace(o, update={k: top(v) for k, v in o.update.items()}) for o in p.observations]
    return dataclasses.replace(p, observations=seen)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_preset_minimises_what_its_paper_says(name: str) -> None:
    attack = instantiate(OmegaConf.load(CONF / "attack" / f"{name}.yaml"), _convert_="all")
    assert isinstance(attack, GradientMatching)
    p = pruned(problem(1, batch=2, norm=nn.BatchNorm2d(4), normalised=True, dtype=torch.float64), keep=0.6)
    o, y = p.observations[0], p.labels[0]
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    space = PixelSpace.of(p.victim, p.images)
    group = Group.of([o], p.victim, [y], space, attack.distance, attack.priors, None)
    found, gradient = group.evaluate({"pixels": z[None, None]})

    params = {k: v.detach().clone().requires_grad_() for k, v in o.params.items()}
    z.requires_grad_()
    loss = p.victim.objective(params, o.buffers, Batch(z * 0.25 + 0.4, y, torch.ones(2, dtype=torch.float64)))[0]
    dummy = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    expected = BY_HAND[name](list(dummy), [o.update[k] for k in params], z, p)
    torch.testing.assert_close(found[0, 0], expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient["pixels"][0, 0], torch.autograd.grad(expected, z)[0], rtol=1e-8, atol=1e-12)


def test_sgi_beats_inverting_gradients_on_pruned_updates_and_equals_it_on_whole_ones() -> None:
    p = problem(4, shape=(1, 16, 16), width=12)
    masked = sgi(steps=150)
    plain = inverting_gradients(steps=150)
    few = pruned(p, keep=0.2)
    quality = [
        torch.stack([
            psnr_db(r.inputs, x)[0]
            for r, x in zip(a.reconstruct_many(few.observations, p.victim, seeds=range(4)), p.images, strict=True)
        ])
        for a in (masked, plain)
    ]  # fmt: skip
    assert quality[0].median() > quality[1].median()
    # in double precision: signs of the smallest slopes would hang on the order in which numbers are added
    p = problem(1, shape=(1, 16, 16), width=12, dtype=torch.float64)
    whole = [dataclasses.replace(a, steps=3).reconstruct(p.observations[0], p.victim) for a in (masked, plain)]
    torch.testing.assert_close(whole[0].inputs, whole[1].inputs)


def test_the_deep_gradient_attack_needs_the_label_and_finds_the_image_without_the_last_layer_too() -> None:
    p = problem(4, shape=(1, 16, 16), width=12)
    shown = [dataclasses.replace(o, labels=y) for o, y in zip(p.observations, p.labels, strict=True)]
    muted = instantiate(OmegaConf.load(CONF / "attack" / "dga_muted.yaml"), _convert_="all")
    noisy = [dataclasses.replace(o, update={**o.update, "5.weight": o.update["5.weight"] * 0}) for o in shown]
    for attack, seen in ((dga(steps=30), shown), (dataclasses.replace(muted, steps=30), noisy)):
        found = attack.reconstruct_many(seen, p.victim, seeds=range(4))
        assert sum(psnr_db(r.inputs, x)[0] > 30 for r, x in zip(found, p.images, strict=True)) >= 2


def test_cpl_starts_from_tiles_and_reads_the_label() -> None:
    p = problem(1, shape=(1, 16, 16))
    assert cpl().initial == Patterned(width=16)
    still = cpl(initial=Patterned(width=4), steps=1, optimizer=Adam(lr=1e-20))
    found = still.reconstruct(p.observations[0], p.victim)
    torch.testing.assert_close(found.inputs, found.inputs[..., :4, :4].repeat(1, 1, 4, 4))
    assert torch.equal(found.labels, p.labels[0])  # type: ignore[arg-type]
