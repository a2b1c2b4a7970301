"""WGAN-GP (Gulrajani et al. 2017) as a Lightning module: a generator from public examples."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import lightning as L
import torch
from torch import Tensor, nn

from gia_bench.errors import ConfigError, DataError
from gia_bench.generators.dcgan import Critic, Dcgan
from gia_bench.records.archives import whole
from gia_bench.seeding import seeded, stream
from gia_bench.values import Examples

log = logging.getLogger(__name__)

CHECKPOINT = "training.ckpt"


@final
@dataclass(frozen=True, kw_only=True)
class Training:
    """How a generator is trained.

    steps: of the generator; batch_size: examples per step; critic_steps: of the critic before each step of the
    generator; critic_channels: of its convolutions; learning_rate: of both, falling to 0 in a straight line; beta1,
    beta2: Adam's; penalty: weight of the gradient penalty; log_every: generator steps between two lines of the log.
    """

    steps: int
    batch_size: int
    critic_steps: int
    critic_channels: Sequence[int]
    learning_rate: float
    beta1: float
    beta2: float
    penalty: float
    log_every: int

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "critic_steps", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name}={getattr(self, name)}: give at least 1.")
        if self.learning_rate <= 0:
            raise ConfigError(f"training.learning_rate={self.learning_rate}: give a number above 0.")
        if self.penalty < 0:
            raise ConfigError(f"training.penalty={self.penalty}: give at least 0.")


@final
@dataclass(frozen=True, kw_only=True)
class Batches:
    """Random batches (images [n, C, H, W] in [0, 1], labels [n]) from batch ``start`` on, without end."""

    examples: Examples
    size: int
    seed: int
    start: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        index = self.start
        while True:
            rows = torch.randint(len(self.examples), (self.size,), generator=stream(self.seed, "batch", index))
            yield self.examples.images(rows), self.examples.labels[rows]
            index += 1


@final
class WassersteinGan(L.LightningModule):
    """One training step is one step of the critic, and after every ``critic_steps`` of them one of the generator.

    Random numbers come from streams named by the number of the batch, so that a resumed training draws the same.
    """

    batches: Tensor

    def __init__(self, generator: Dcgan, critic: Critic, settings: Training, seed: int, identity: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic, self.settings = generator, critic, settings
        self.seed, self.identity = seed, identity
        self.register_buffer("batches", torch.tensor(0))
        self._began = time.monotonic()

    def configure_optimizers(self) -> Any:
        s = self.settings
        adam = partial(torch.optim.Adam, lr=s.learning_rate, betas=(s.beta1, s.beta2))
        optimizers = [adam(self.critic.parameters()), adam(self.generator.parameters())]
        lengths = (s.steps * s.critic_steps, s.steps)
        falling = [
            torch.optim.lr_scheduler.LinearLR(o, 1.0, 1e-3, total_iters=n)
            for o, n in zip(optimizers, lengths, strict=True)
        ]
        return optimizers, falling

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["identity"] = self.identity

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        number, every = int(self.batches), self.settings.critic_steps
        self.batches += 1
        of_critic, of_generator = self.optimizers()  # type: ignore[attr-defined]
        critic_rate, generator_rate = self.lr_schedulers()  # type: ignore[misc]
        classes = self._classes(labels)
        with torch.no_grad():
            made = self.generator(self._latents(len(images), number, "critic"), classes)

        def critics_loss() -> Tensor:
            gap: Tensor = self.critic(images, classes).mean() - self.critic(made, classes).mean()
            if (number + 1) % (every * self.settings.log_every) == 0:
                self._report((number + 1) // every, gap.detach())
            return self.settings.penalty * self._steepness(images, made, classes, number) - gap

        def generators_loss() -> Tensor:
            forged = self.generator(self._latents(len(images), number, "generator"), classes)
            loss: Tensor = -self.critic(forged, classes).mean()
            return loss

        self._step(of_critic, critics_loss)
        critic_rate.step()
        if (number + 1) % every == 0:
            self._step(of_generator, generators_loss)
            generator_rate.step()

    def _step(self, optimizer: Any, loss: Callable[[], Tensor]) -> None:
        self.toggle_optimizer(optimizer)  # what the other one moves gets no gradient
        optimizer.zero_grad()
        self.manual_backward(loss())
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def _steepness(self, real: Tensor, made: Tensor, classes: Tensor | None, number: int) -> Tensor:
        """How far the critic's slope is from 1 between real and made images: mean (|slope| - 1)^2."""
        share = torch.rand(len(real), 1, 1, 1, generator=stream(self.seed, "share", number)).to(real)
        between = (share * real + (1 - share) * made).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between, classes).sum(), between, create_graph=True)
        return ((slope.flatten(1).square().sum(1) + 1e-12).sqrt() - 1).square().mean()

    def _latents(self, count: int, number: int, whom: str) -> Tensor:
        drawn = torch.randn(count, self.generator.latent_dim, generator=stream(self.seed, "latents", whom, number))
        return drawn.to(self.device)

    def _classes(self, labels: Tensor) -> Tensor | None:
        if self.generator.num_classes is None:
            return None
        return nn.functional.one_hot(labels, self.generator.num_classes).to(self.batches.device, torch.float32)

    def _report(self, step: int, gap: Tensor) -> None:
        if not torch.isfinite(gap):
            raise ConfigError(
                f"The training diverged at step {step}: the critic gives NaN. Lower training.learning_rate "
                f"({self.settings.learning_rate:g} here)."
            )
        seconds = time.monotonic() - self._began
        log.info("step %d of %d, critic's gap %.3f, %.0f s", step, self.settings.steps, float(gap), seconds)


@final
class Keeper(L.Callback):
    """Writes the whole training to ``path`` every ``seconds``; a kill leaves the old file or the new one.

    Lightning's ModelCheckpoint looks at no clock where a module steps its optimizers itself.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self._last < self.seconds:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        trainer.save_checkpoint(beside)
        beside.replace(self.path)
        self._last = time.monotonic()


def train(
    generator: Dcgan,
    examples: Examples,
    settings: Training,
    *,
    shape: Sequence[int],
    seed: int,
    identity: str,
    accelerator: str,
    folder: Path,
    checkpoint_every_seconds: float,
) -> None:
    """Trains ``generator`` in place, going on from ``folder``'s checkpoint where a killed training left one.

    identity: of everything that the result depends on. Raises ``DataError`` for a checkpoint that is corrupt or of
    another identity, and ``ConfigError`` for a training that diverges.
    """
    with seeded(seed, "critic"):
        critic = Critic(shape=shape, channels=settings.critic_channels, num_classes=generator.num_classes)
    module = WassersteinGan(generator, critic, settings, seed, identity)
    checkpoint = folder / CHECKPOINT
    start = _batches_done(checkpoint, identity) if checkpoint.exists() else 0
    if start:
        log.info("going on from step %d", start // settings.critic_steps)
    _quiet()
    trainer = L.Trainer(
        # every batch is one optimizer step of the critic, and after critic_steps of them one of the generator
        accelerator=accelerator, devices=1, max_steps=settings.steps * (settings.critic_steps + 1), max_epochs=-1,
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[Keeper(checkpoint, checkpoint_every_seconds)],
    )  # fmt: skip
    module.train()
    trainer.fit(
        module,
        Batches(examples=examples, size=settings.batch_size, seed=seed, start=start),
        ckpt_path=checkpoint if start else None,
        weights_only=True,
    )
    generator.eval()
    checkpoint.unlink(missing_ok=True)


def _quiet() -> None:
    """Lightning's greetings and its own deprecated calls are not news to the user."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*", category=FutureWarning)


def _batches_done(checkpoint: Path, identity: str) -> int:
    if not whole(checkpoint):
        raise DataError(f"The checkpoint {checkpoint} is corrupt; delete it to start again from the first step.")
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if content["identity"] != identity:
        raise DataError(
            f"The checkpoint {checkpoint} is of a training with other settings; delete it, or choose another output."
        )
    return int(content["state_dict"]["batches"])
