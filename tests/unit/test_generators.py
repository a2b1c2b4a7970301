"""Generators: what is read from files, what is refused, and how one is trained without a client's example."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_problems import problem
from command import SMALL, gia_bench
from command import run as command
from generator_problems import LATENT, Held, config_of, dcgan, saved
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torchvision.transforms.functional import resize

from gia_bench.attacks.ggl import GGL
from gia_bench.attacks.gias import GIAS
from gia_bench.attacks.gifd import GIFD
from gia_bench.conf_path import CONF
from gia_bench.config import public_data
from gia_bench.data.source import Dataset, InMemory
from gia_bench.errors import ConfigError, DataError, IncompatibleError
from gia_bench.generators.app import make_prior
from gia_bench.generators.dcgan import Critic, Dcgan
from gia_bench.generators.generator import Generator
from gia_bench.generators.load import Saved, StateDict, TorchScript
from gia_bench.generators.training import CHECKPOINT, Training, train
from gia_bench.values import Examples

SETTINGS = Training(
    steps=4, batch_size=6, critic_steps=2, critic_channels=(4, 6), learning_rate=1e-3, beta1=0.5, beta2=0.9,
    penalty=10.0, log_every=2,
)  # fmt: skip


def drawn(generator: Generator) -> Tensor:
    latents = torch.randn(5, *generator.latent_shape, generator=torch.Generator().manual_seed(0))
    return generator.images(latents, nn.functional.one_hot(torch.arange(5) % 4, 4).float())


class Mine(nn.Module):
    """A user's generator: unconditional, one number too deep in latents, images in [-1, 1]."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 64))

    def forward(self, latents: Tensor) -> Tensor:
        return self.body(latents).view(-1, 1, 8, 8).tanh()


# --- files


def test_a_saved_generator_reads_back_and_makes_the_same_images(tmp_path: Path) -> None:
    read = saved(tmp_path).load()
    assert torch.equal(drawn(read), drawn(Held(dcgan()).load()))
    assert (read.latent_shape, read.num_classes, read.image_shape()) == ((LATENT,), 4, (1, 8, 8))
    again = saved(tmp_path).load()
    assert again.fingerprint == read.fingerprint
    assert saved(tmp_path, classes=None).load().fingerprint != read.fingerprint


def test_torchscript_and_state_dicts_of_other_classes_are_read_and_scaled_to_unit_range(tmp_path: Path) -> None:
    made = Mine(width=5).eval()
    latents = torch.randn(3, 2, 2)
    torch.save(made.state_dict(), tmp_path / "weights.pt")
    script(made, tmp_path / "script.pt")
    known: dict[str, Any] = {"latent_shape": [2, 2], "output_range": [-1, 1], "num_classes": None}
    sources = (
        TorchScript(path=str(tmp_path / "script.pt"), **known),
        StateDict(path=str(tmp_path / "weights.pt"), network=f"{__name__}.Mine", arguments={"width": 5}, **known),
    )
    for source in sources:
        read = source.load()
        assert read.image_shape() == (1, 8, 8)
        images = read.images(latents, torch.zeros(3, 4))
        torch.testing.assert_close(images, (made(latents) + 1) / 2)
        GGL(generator=source).check_victim(problem(1).victim)
        wide = read.like(torch.zeros(1, dtype=torch.float64))
        assert wide.images(latents.double(), torch.zeros(3, 4)).dtype == torch.float64


@pytest.mark.parametrize("size", [(4, 4), (12, 12)])
def test_images_of_another_size_are_resampled_and_searched_by_every_attack(
    size: tuple[int, int], tmp_path: Path
) -> None:
    """torchvision's resize is the oracle; a gradient passes through it, for one generator and for one per victim."""
    torch.save(dcgan(classes=None).state_dict(), tmp_path / "weights.pt")
    known: dict[str, Any] = {"latent_shape": [LATENT], "output_range": [0, 1], "num_classes": None}
    source = StateDict(
        path=str(tmp_path / "weights.pt"), network="gia_bench.generators.dcgan.Dcgan", image_size=list(size),
        arguments=config_of(dcgan(classes=None)), **known,
    )  # fmt: skip
    latents, classes = torch.randn(3, LATENT), torch.zeros(3, 4)
    made = dataclasses.replace(source, image_size=None).load().images(latents, classes)
    torch.testing.assert_close(source.load().images(latents, classes), resize(made, list(size), antialias=True))
    with torch.autocast("cpu", torch.bfloat16):  # attack.arithmetic.precision=bf16
        assert source.load().images(latents, classes).shape == (3, 1, *size)
    p = problem(2, shape=(1, *size))
    for attack in (GIAS(generator=source, steps=2, tuning_steps=2), GIFD(generator=source, steps=2, restarts=1)):
        found = attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1])
        assert all(r.inputs.shape[-2:] == size and r.failure is None for r in found)
    with pytest.raises(ConfigError, match="give a height and a width"):
        dataclasses.replace(source, image_size=[4]).load()


def script(module: nn.Module, path: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.script(module), path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:900])


def weights(path: Path) -> None:
    torch.save(dcgan().state_dict(), path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (Path.unlink, r"there is no file .*generator\.pt.*gia-bench-prior"),
        (cut, "generator.pt is corrupt"),
        (lambda path: path.write_text("no file of ours"), "generator.pt is corrupt"),
        (weights, "was not written by gia-bench-prior.*StateDict"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(damage: Callable[[Path], Any], says: str, tmp_path: Path) -> None:
    source = saved(tmp_path)
    assert source.path is not None
    damage(Path(source.path))
    with pytest.raises(DataError, match=says) as refused:
        source.load()
    assert "\n" not in str(refused.value)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"format": Trap()}, tmp_path / "generator.pt")
    with pytest.raises(DataError, match="holds more than tensors"):
        Saved(path=str(tmp_path / "generator.pt")).load()
    assert not (tmp_path / "ran").exists()


def test_other_files_than_the_ones_named_are_sentences(tmp_path: Path) -> None:
    known: dict[str, Any] = {"latent_shape": [4], "output_range": [0, 1], "num_classes": None}
    file = str(saved(tmp_path).path)
    with pytest.raises(DataError, match="no TorchScript file"):
        TorchScript(path=file, **known).load()
    with pytest.raises(ConfigError, match=r"generator\.network='no\.such\.Class' cannot be made"):
        StateDict(path=file, network="no.such.Class", **known).load()
    with pytest.raises(ConfigError, match="gives OrderedDict, and no torch module"):
        StateDict(path=file, network="collections.OrderedDict", **known).load()
    with pytest.raises(DataError, match=r"generator\.path: .* is of another model"):
        StateDict(path=file, network=f"{__name__}.Mine", **known).load()
    with pytest.raises(ConfigError, match="output_range"):
        TorchScript(path=scripted(tmp_path), **known | {"output_range": [1, 0]}).load()
    with pytest.raises(ConfigError, match=r"makes no images of latents \[2, 7\].*give its latent_shape"):
        TorchScript(path=scripted(tmp_path), **known | {"latent_shape": [7]}).load().image_shape()


def scripted(folder: Path) -> str:
    script(Mine().eval(), folder / "script.pt")
    return str(folder / "script.pt")


@pytest.mark.parametrize("kind", [GGL, GIAS, GIFD])
def test_without_a_generator_the_way_to_one_is_named(kind: Any) -> None:
    with pytest.raises(ConfigError, match=r"gia-bench-prior.*generator\.path"):
        kind(generator=Saved(path=None)).check_victim(problem(1).victim)


def test_a_generator_of_other_images_or_classes_is_refused_when_the_run_is_composed(tmp_path: Path) -> None:
    small = GGL(generator=saved(tmp_path))
    with pytest.raises(IncompatibleError, match=r"images of shape \[1, 8, 8\] and the model takes \[1, 12, 12\]"):
        small.check_victim(problem(1, shape=(1, 12, 12)).victim)
    with pytest.raises(IncompatibleError, match="one of 4 classes and the model has 6"):
        small.check_victim(problem(1, classes=6).victim)
    GGL(generator=saved(tmp_path, classes=None)).check_victim(problem(1, classes=6).victim)


def test_a_generator_that_cannot_be_tuned_or_cut_is_refused_by_the_attack_that_would(tmp_path: Path) -> None:
    known: dict[str, Any] = {"latent_shape": [4], "output_range": [-1, 1], "num_classes": None}
    source = TorchScript(path=scripted(tmp_path), **known)
    victim = problem(1).victim
    GGL(generator=source).check_victim(victim)
    with pytest.raises(IncompatibleError, match="TorchScript generator cannot be changed"):
        GIAS(generator=source).check_victim(victim)
    for module in (Mine(), source):
        held = Held(module, None, (4,), (-1, 1)) if isinstance(module, nn.Module) else module
        with pytest.raises(IncompatibleError, match="cannot be cut into layers"):
            GIFD(generator=held).check_victim(victim)
    more = dcgan(classes=None)
    more.register_forward_hook(lambda m, x, out: 1 - out)
    with pytest.raises(IncompatibleError, match="do not give its images"):
        GIFD(generator=Held(more, None)).check_victim(victim)


@pytest.mark.parametrize("attack", [GGL, GIAS])
def test_a_torchscript_generator_is_searched_like_its_module(attack: Any, tmp_path: Path) -> None:
    known: dict[str, Any] = {"latent_shape": [4], "output_range": [-1, 1], "num_classes": None}
    torch.manual_seed(0)
    module = Mine().eval()
    script(module, tmp_path / "script.pt")
    p = problem(1)
    short = GGL(generator=TorchScript(path=str(tmp_path / "script.pt"), **known))
    short = dataclasses.replace(short, evolution=dataclasses.replace(short.evolution, generations=3, population=4))
    plain = dataclasses.replace(short, generator=Held(module, None, (4,), (-1, 1)))
    first, second = (a.reconstruct(p.observations[0], p.victim) for a in (short, plain))
    torch.testing.assert_close(first.inputs, second.inputs)


# --- networks


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 16, 16)])
@pytest.mark.parametrize("classes", [None, 10])
def test_a_generator_makes_images_of_its_shape_in_unit_range(shape: tuple[int, int, int], classes: int | None) -> None:
    made = Dcgan(shape=shape, latent_dim=7, channels=(6, 4, 4), num_classes=classes).eval()
    told = None if classes is None else torch.eye(10)[:3]
    images = made(torch.randn(3, 7), told)
    assert images.shape == (3, *shape)
    assert images.min() >= 0 and images.max() <= 1
    alone = made(torch.zeros(1, 7), None if told is None else told[:1])
    both = made(torch.cat([torch.zeros(1, 7), 9 * torch.ones(1, 7)]), None if told is None else told[:2])
    torch.testing.assert_close(alone[0], both[0])
    assert Critic(shape=shape, channels=(4, 4), num_classes=classes)(images, told).shape == (3,)


def test_sizes_that_do_not_fit_are_sentences() -> None:
    known: dict[str, Any] = {"latent_dim": 4, "num_classes": None}
    with pytest.raises(ConfigError, match="3 layers makes square images whose size 4 divides, and these are 30x30"):
        Dcgan(shape=(1, 30, 30), channels=(4, 4, 4), **known)
    with pytest.raises(ConfigError, match="square"):
        Dcgan(shape=(1, 28, 32), channels=(4, 4, 4), **known)
    with pytest.raises(ConfigError, match="channels"):
        Dcgan(shape=(1, 28, 28), channels=(), **known)
    with pytest.raises(ConfigError, match=r"training\.steps=0"):
        dataclasses.replace(SETTINGS, steps=0)


# --- training


@dataclasses.dataclass
class Counted:
    """Examples that remember who was asked for, and may give up after some batches."""

    inner: Examples
    asked: list[int] = dataclasses.field(default_factory=list)
    batches: int | None = None

    @property
    def labels(self) -> Tensor:
        return self.inner.labels

    def __len__(self) -> int:
        return len(self.inner)

    def images(self, indices: Tensor) -> Tensor:
        if self.batches is not None:
            self.batches -= 1
            if self.batches < 0:
                raise TimeoutError("the power is gone")
        self.asked += indices.tolist()
        return self.inner.images(indices)


def pictures() -> InMemory:
    draw = torch.Generator().manual_seed(0)
    return InMemory(torch.rand(40, 1, 8, 8, generator=draw), torch.arange(40) % 4)


def trained(folder: Path, examples: Examples, settings: Training = SETTINGS, identity: str = "same") -> Dcgan:
    generator = dcgan()
    train(
        generator, examples, settings, shape=(1, 8, 8), seed=0, identity=identity, accelerator="cpu", folder=folder,
        checkpoint_every_seconds=0,
    )  # fmt: skip
    return generator


def test_a_training_that_was_killed_ends_where_one_that_was_not_does(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", Counted(pictures()))
    for batches in (1, 4, 5):
        with pytest.raises(TimeoutError):
            trained(tmp_path / "killed", Counted(pictures(), batches=batches))
        rest = Counted(pictures())
        again = trained(tmp_path / "killed", rest)
        assert len(rest.asked) <= (8 - batches + 2) * SETTINGS.batch_size, "it began again"
        for name, tensor in whole.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    assert not (tmp_path / "killed" / CHECKPOINT).exists()
    assert not torch.equal(next(whole.parameters()), next(dcgan().parameters()))
    assert not whole.training


def test_a_checkpoint_of_other_settings_is_not_picked_up(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        trained(tmp_path, Counted(pictures(), batches=5))
    with pytest.raises(DataError, match="with other settings"):
        trained(tmp_path, pictures(), identity="another")
    cut(tmp_path / CHECKPOINT)
    with pytest.raises(DataError, match="is corrupt"):
        trained(tmp_path, pictures())


def test_a_training_that_diverges_says_so(tmp_path: Path) -> None:
    nan = InMemory(torch.full((8, 1, 8, 8), 0.5), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"diverged at step \d.*learning_rate"):
        trained(tmp_path, nan, dataclasses.replace(SETTINGS, steps=60, learning_rate=1e18))


@pytest.mark.parametrize("shown", [0.05, 0.95])
def test_training_moves_the_images_towards_those_that_it_is_shown(shown: float, tmp_path: Path) -> None:
    flat = InMemory(torch.full((40, 1, 8, 8), shown), torch.arange(40) % 4)
    settings = dataclasses.replace(SETTINGS, steps=40, batch_size=16, critic_channels=(8, 8), learning_rate=5e-3)
    latents, classes = torch.randn(200, LATENT), torch.eye(4).repeat(50, 1)
    with torch.no_grad():
        before = dcgan()(latents, classes)
        after = trained(tmp_path, flat, settings)(latents, classes)
    assert (after - shown).abs().mean() < (before - shown).abs().mean() - 0.1


# --- the command


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return compose("prior", overrides=list(overrides))


DIGITS = ("dataset=digits", "generator.latent_dim=4", "generator.channels=[8,6,4]", "training.critic_channels=[4,6]")


def test_the_prior_is_trained_on_examples_that_no_client_holds() -> None:
    few = ("partition.num_clients=8", "partition.samples_per_client=100", "seed=3")
    dataset, public = public_data(composed(*DIGITS, *few, "public.split=train"))
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        from gia_bench.config import build, identify

        choices = dict.fromkeys(("dataset", "model", "fl", "threat", "defense"), "")
        cfg = compose(
            "config", overrides=["dataset=digits", *few, "attack=[]", "metrics.lpips=null", "public.split=train"]
        )
        experiment = build(cfg, identify(cfg, choices))
    clients = torch.cat(list(experiment.data.partition.clients))
    held = {tuple(x.flatten().tolist()) for x in dataset.train.images(clients)}
    shown = public.images(torch.arange(len(public)))
    assert len(public) == len(dataset.train) - 800
    assert torch.equal(shown, experiment.public.images(torch.arange(len(public))))
    doubles = {tuple(x.flatten().tolist()) for x in dataset.train.images(torch.arange(len(dataset.train)))}
    assert len(doubles) == len(dataset.train), "no image twice, or the next line would prove nothing"
    assert not any(tuple(x.flatten().tolist()) in held for x in shown)
    with pytest.raises(IncompatibleError, match="public"):
        public_data(composed(*DIGITS, "public.split=train"))


def test_nothing_but_the_public_examples_is_read(tmp_path: Path) -> None:
    dataset, public = public_data(composed(*DIGITS))
    private = dataclasses.replace(dataset, train=Forbidden(dataset.train.labels))
    counted = Counted(public)
    files = make(private, counted, tmp_path)
    assert 8 * SETTINGS.batch_size <= len(counted.asked) <= 9 * SETTINGS.batch_size  # one is fetched ahead
    assert [f.name for f in files] == ["generator.pt", "samples.png"]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert Saved(path=str(files[0])).load().image_shape() == (1, 16, 16)
    before = files[0].read_bytes()
    with pytest.raises(ConfigError, match=r"is there already.*force=true"):
        make(private, counted, tmp_path)
    assert make(private, counted, tmp_path, force=True) == files
    assert Saved(path=str(files[0])).load().latent_shape == (4,)
    assert torch.load(files[0], weights_only=True)["trained_on"]["dataset"] == "digits"
    assert files[0].read_bytes() == before, "the same settings make the same file"


def make(dataset: Dataset, examples: Examples, output: Path, force: bool = False) -> list[Path]:
    network = {"latent_dim": 4, "channels": [8, 6, 4], "conditional": True}
    return make_prior(
        dataset, examples, network, SETTINGS, split="test", seed=0, accelerator="cpu", checkpoint_every_seconds=60,
        output=output, force=force,
    )  # fmt: skip


class Forbidden:
    """A client's split: labels may be counted, images must not be read."""

    groups = None

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor) -> Tensor:
        raise AssertionError("a client's image was read")


def test_the_command_trains_and_an_attack_runs_with_its_file(tmp_path: Path) -> None:
    small = ("training.steps=3", "training.log_every=1", "training.batch_size=4", "accelerator=cpu")
    done = command("gia-bench-prior", *DIGITS, *small, f"paths.outputs={tmp_path}")
    assert done.status == 0, done.err
    assert "training on 360 public examples of digits, split test" in done.out
    assert "step 3 of 3" in done.out
    file = tmp_path / "generators" / "digits" / "generator.pt"
    assert file.exists() and file.with_name("samples.png").exists()
    assert not file.with_name(CHECKPOINT).exists()
    run = [*SMALL, "attack=[ggl]", "~attack.inverting_gradients_fast", "fl.local.batch_size=1", "fl.rounds=1"]
    short = ["attack.ggl.evolution.generations=2", "attack.ggl.evolution.population=4"]
    words = [w for w in run if not w.startswith(("attack=[inverting", "attack.inverting", "~"))] + short
    refused = gia_bench(tmp_path, *words)
    assert refused.status == 1
    assert "gia-bench-prior" in refused.err
    ran = gia_bench(tmp_path, *words, f"attack.ggl.generator.path={file}")
    assert ran.status == 0, ran.err


def test_a_generator_of_ones_own_is_chosen_on_the_command_line() -> None:
    given = "path:g.pt, latent_shape:[128], output_range:[-1,1], num_classes:null"
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        node = "++attack.ggl.generator={_target_:gia_bench.generators.load.TorchScript, %s}" % given  # noqa: UP031
        cfg = compose("config", overrides=["attack=[ggl]", node])
    source = instantiate(cfg.attack.ggl, _convert_="all").generator
    assert source == TorchScript(path="g.pt", latent_shape=[128], output_range=[-1, 1], num_classes=None)


def test_every_key_of_the_priors_config_is_read() -> None:
    cfg = composed("output=here")
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    assert set(plain) == {
        "paths", "dataset", "partition", "seed", "public", "generator", "training", "accelerator",
        "checkpoint_every_seconds", "output", "force",
    }  # fmt: skip
    assert set(plain["training"]) - {"_target_"} == {f.name for f in dataclasses.fields(Training)}
    assert set(plain["generator"]) == {"latent_dim", "channels", "conditional"}
