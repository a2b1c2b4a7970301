"""``arithmetic``: a compiled or a less precise step is compared with the plain one before it is used."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from attack_problems import Problem, problem, psnr_db
from torch import Tensor, nn

from gia_bench.attacks import arithmetic as module
from gia_bench.attacks.arithmetic import PLAIN, PRECISIONS, Arithmetic, Compiled
from gia_bench.attacks.distances import Cosine, Euclidean
from gia_bench.attacks.dlg import dlg
from gia_bench.attacks.group import Group
from gia_bench.attacks.inverting_gradients import inverting_gradients
from gia_bench.attacks.optimizers import Variables
from gia_bench.attacks.priors import TotalVariation
from gia_bench.attacks.scene import PixelSpace
from gia_bench.errors import ConfigError
from gia_bench.models.lenet import lenet_zhu

COMPILED, BF16 = Arithmetic(compile=True), Arithmetic(precision="bf16")


def lenet_problem(victims: int, **settings: object) -> Problem:
    shape = (1, 28, 28)
    net = lenet_zhu(shape, 10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in net.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return problem(victims, shape=shape, classes=10, module=net, **settings)  # type: ignore[arg-type]


def cosine_group(p: Problem) -> Group:
    priors = {"tv": TotalVariation(weight=1e-2)}
    return Group.of(p.observations, p.victim, list(p.labels), PixelSpace.of(p.victim, p.images), Cosine(), priors, None)


def joint_group(p: Problem) -> Group:
    """As DLG has it: labels are searched too."""
    nothing: list[Tensor | None] = [None] * len(p.observations)
    return Group.of(p.observations, p.victim, nothing, PixelSpace.of(p.victim, p.images), Euclidean(), {}, None)


def guesses(p: Problem, restarts: int, joint: bool = False) -> Variables:
    generator = torch.Generator().manual_seed(5)
    V, (B, *shape) = len(p.observations), p.images.shape[1:]
    pixels = {"pixels": torch.randn(V, restarts, B, *shape, generator=generator).to(p.images.dtype)}
    if not joint:
        return pixels
    return pixels | {"labels": torch.randn(V, restarts, B, p.victim.num_classes, generator=generator)}


def assert_equal_when_compiled(group: Group, start: Variables) -> None:
    """On guesses other than those that it was proven on."""
    compiled = group.computed(dataclasses.replace(COMPILED, tolerance=1e-4), start)
    assert isinstance(compiled.step, Compiled)
    later = {k: 0.5 * v + 0.1 for k, v in start.items()}
    with torch.no_grad():
        want, got = group.evaluate(later), compiled.evaluate(later)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-6)
    for k, gradient in want[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got[1][k], gradient, rtol=1e-3, atol=1e-4 * scale)


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are made as they are, but run by torch's own kernels: nothing is written in C++, which takes long."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def test_a_compiled_step_in_c_equals_the_plain_one() -> None:
    """Cosine and total variation of a small network; every machine that runs these tests has a compiler."""
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(108, 4))
    p = problem(2, module=module)
    assert_equal_when_compiled(cosine_group(p), guesses(p, 2))


@pytest.mark.usefixtures("no_code")
def test_a_compiled_step_of_dlg_with_joint_labels_equals_the_plain_one_on_lenet() -> None:
    p = lenet_problem(2)
    assert_equal_when_compiled(joint_group(p), guesses(p, 2, joint=True))


@pytest.mark.usefixtures("no_code")
def test_a_compiled_attack_follows_the_plain_one_and_makes_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(2, dtype=torch.float64)
    made = []
    make = Compiled._make
    monkeypatch.setattr(Compiled, "_make", lambda self, *args: made.append(args) or make(self, *args))
    attack = dlg(steps=3)
    plain = attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1])
    found = dataclasses.replace(attack, arithmetic=COMPILED).reconstruct_many(p.observations, p.victim, seeds=[0, 1])
    assert len(made) == 1, "L-BFGS asks for some victims only, which must not be compiled again"
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a.inputs, b.inputs, rtol=1e-5, atol=1e-7)
        assert a.score == pytest.approx(b.score, rel=1e-5)


@pytest.mark.usefixtures("no_code")
def test_batch_norm_in_training_mode_compiles_to_the_same_gradients() -> None:
    p = problem(2, batch=3, norm=nn.BatchNorm2d(4))
    group, start = cosine_group(p), guesses(p, 1)
    with torch.no_grad():
        group.computed(dataclasses.replace(COMPILED, tolerance=1e-4), start)


def test_bf16_is_near_fp32_and_really_another_arithmetic() -> None:
    p = lenet_problem(2)
    group, start = cosine_group(p), guesses(p, 2)
    with torch.no_grad():
        want, got = group.evaluate(start), group.computed(BF16, start).evaluate(start)
    assert got[0].dtype == torch.float32 and got[1]["pixels"].dtype == torch.float32
    error = (got[1]["pixels"] - want[1]["pixels"]).norm() / want[1]["pixels"].norm()
    assert 1e-5 < error < PRECISIONS["bf16"]


@pytest.mark.parametrize("training", [True, False])
def test_bf16_goes_through_batch_norm(training: bool) -> None:
    """Autocast alone does not, under vmap."""
    p = problem(2, batch=3, norm=nn.BatchNorm2d(4))
    p = dataclasses.replace(p, victim=dataclasses.replace(p.victim, training=training))
    group, start = cosine_group(p), guesses(p, 1)
    with torch.no_grad():
        want, got = group.evaluate(start), group.computed(BF16, start).evaluate(start)
    assert 0 < (got[0] - want[0]).abs().max() < 0.05


def test_bf16_rebuilds_what_fp32_rebuilds() -> None:
    p = problem(2)
    attack = inverting_gradients(steps=300)
    plain, found = (
        dataclasses.replace(attack, arithmetic=a).reconstruct_many(p.observations, p.victim, seeds=[0, 1])
        for a in (PLAIN, BF16)
    )
    for a, b, truth in zip(plain, found, p.images, strict=True):
        # measured: 58 and 46 dB; eight bits of a number are enough for an image and not for more
        assert psnr_db(a.inputs, truth) > 50
        assert psnr_db(b.inputs, truth) > 40


class Wrong(nn.Module):
    """A network that is another one under autocast: its scores come in another order."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.inner(x)
        return scores.float().flip(-1) if scores.dtype == torch.bfloat16 else scores


def test_a_step_that_differs_is_refused_with_the_candidate_and_the_way_out() -> None:
    inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Sigmoid(), nn.Linear(16, 4))
    p = problem(2, module=Wrong(inner))
    attack = inverting_gradients(steps=2, arithmetic=BF16)
    with pytest.raises(
        ConfigError, match=r"precision=bf16.*of victim \d, restart 0 is .* away from plain fp32.*tolerance of 0.3; take"
    ):
        attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1])


def test_the_tolerance_is_the_users() -> None:
    p = lenet_problem(1)
    strict = inverting_gradients(steps=1, arithmetic=dataclasses.replace(BF16, tolerance=1e-6))
    with pytest.raises(ConfigError, match=r"tolerance of 1e-06"):
        strict.reconstruct(p.observations[0], p.victim)
    lax = dataclasses.replace(strict, arithmetic=dataclasses.replace(BF16, tolerance=0.9))
    assert lax.reconstruct(p.observations[0], p.victim).failure is None


def test_the_comparison_is_per_candidate_relative_and_leaves_out_what_is_not_finite() -> None:
    loss = torch.tensor([[1.0, 100.0], [1e-3, torch.nan]])
    gradient = torch.tensor([[[1.0, 0.0], [100.0, 0.0]], [[0.0, 1e-3], [torch.nan, 0.0]]])
    exact = (loss, {"pixels": gradient})
    allowed = Arithmetic(compile=True, tolerance=0.01)
    allowed.compare(exact, (loss * 1.009, {"pixels": gradient * 0.991}))
    small = gradient.clone()
    small[1, 0, 0] = 2e-5  # 2% of that candidate alone
    with pytest.raises(ConfigError, match=r"gradient of pixels of victim 1, restart 0 is 0.02 of its size"):
        allowed.compare(exact, (loss, {"pixels": small}))
    broken = loss.clone()
    broken[0, 1] = torch.nan
    with pytest.raises(ConfigError, match=r"loss of victim 0, restart 1 is inf of its size"):
        allowed.compare(exact, (broken, {"pixels": gradient}))


def test_what_cannot_be_had_is_refused_with_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"attack.arithmetic.precision='fp16'.*Choose one of: bf16, fp32, tf32"):
        Arithmetic(precision="fp16")
    with pytest.raises(ConfigError, match=r"attack.arithmetic.tolerance=0: give a number above 0, or null"):
        Arithmetic(tolerance=0)
    p = problem(1)
    tf32 = inverting_gradients(steps=1, arithmetic=Arithmetic(precision="tf32"))
    with pytest.raises(ConfigError, match=r"precision='tf32' is a number format of GPUs, and this attack runs on cpu"):
        tf32.reconstruct(p.observations[0], p.victim)
    double = problem(1, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"precision='bf16' is for float32, and this model is torch.float64"):
        inverting_gradients(steps=1, arithmetic=BF16).reconstruct(double.observations[0], double.victim)


@pytest.fixture
def no_compiler(tmp_path: Path) -> Iterator[None]:
    """A machine without g++: the cache of compiled programs is empty too."""
    from torch._inductor import config as inductor
    from torch._inductor.utils import fresh_cache

    with fresh_cache(dir=str(tmp_path)), inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_error_is_one_clear_sentence() -> None:
    p = problem(1, module=nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))
    attack = inverting_gradients(steps=1, arithmetic=COMPILED)
    with pytest.raises(ConfigError, match=r"attack.arithmetic.compile=true: .*C\+\+ compiler.*or take compile=false"):
        attack.reconstruct(p.observations[0], p.victim)


def test_fp32_on_a_gpu_is_fp32_and_what_was_set_before_comes_back() -> None:
    """The switches exist without a GPU; torch's default lets convolutions use TF32."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn

    def state() -> tuple[bool, bool]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return switches[0].allow_tf32, switches[1].allow_tf32

    before = state()
    for allowed in (False, True):
        with module._tf32(allowed, "cuda"):
            assert state() == (allowed, allowed)
        assert state() == before
    with pytest.raises(ZeroDivisionError), module._tf32(True, "cuda"):
        raise ZeroDivisionError
    assert state() == before
