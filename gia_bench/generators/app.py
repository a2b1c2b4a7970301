"""The command ``gia-bench-prior``: trains a generator on examples that no client holds, and shows what it makes."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchvision.utils import make_grid, save_image

from gia_bench.conf_path import CONF
from gia_bench.config import public_data
from gia_bench.data.source import Dataset
from gia_bench.errors import ConfigError
from gia_bench.generators.dcgan import Dcgan
from gia_bench.generators.load import content_of
from gia_bench.generators.training import Training, train
from gia_bench.records.runs import write_atomic
from gia_bench.seeding import seeded, stream
from gia_bench.values import Examples

log = logging.getLogger(__name__)

GENERATOR, SAMPLES = "generator.pt", "samples.png"
COLUMNS, ROWS = 10, 8


def make_prior(
    dataset: Dataset,
    examples: Examples,
    network: dict[str, Any],
    training: Training,
    *,
    split: str,
    seed: int,
    accelerator: str,
    checkpoint_every_seconds: float,
    output: Path,
    force: bool,
) -> list[Path]:
    """Trains on ``examples`` alone; returns the files written into ``output``: the generator, and a picture of samples.

    network: fields of ``Dcgan`` beside shape and num_classes, with ``conditional``: whether it is told the classes;
    split: of the dataset, for the record. Raises ``ConfigError`` where a generator is there already, unless ``force``.
    """
    files = [output / GENERATOR, output / SAMPLES]
    if files[0].exists() and not force:
        raise ConfigError(
            f"{files[0]} is there already, and runs may have used it; choose another output=..., or replace it with "
            "force=true."
        )
    own = {k: v for k, v in network.items() if k != "conditional"}
    config = {
        **own,
        "shape": list(dataset.shape),
        "num_classes": dataset.num_classes if network["conditional"] else None,
    }
    with seeded(seed, "generator"):
        generator = Dcgan(**config)
    trained_on = {"dataset": dataset.name, "version": dataset.version, "split": split, "num_examples": len(examples)}
    identity = hashlib.sha256(json.dumps([config, repr(training), trained_on, seed]).encode()).hexdigest()
    log.info("training on %d public examples of %s, split %s", len(examples), dataset.name, split)
    began = time.monotonic()
    train(
        generator, examples, training, shape=dataset.shape, seed=seed, identity=identity, accelerator=accelerator,
        folder=output, checkpoint_every_seconds=checkpoint_every_seconds,
    )  # fmt: skip
    log.info("trained in %.0f s", time.monotonic() - began)
    content = io.BytesIO()
    torch.save(content_of(generator, config, trained_on), content)
    write_atomic(files[0], content.getvalue())
    write_atomic(files[1], samples(generator, seed))
    return files


@torch.no_grad()
def samples(generator: Dcgan, seed: int) -> bytes:
    """A PNG of ``ROWS`` x ``COLUMNS`` images of new latents; a column is a class where the generator is told them."""
    generator = generator.cpu().eval()
    latents = torch.randn(ROWS * COLUMNS, generator.latent_dim, generator=stream(seed, "samples"))
    classes: Tensor | None = None
    if generator.num_classes is not None:
        labels = torch.arange(len(latents)) % COLUMNS % generator.num_classes
        classes = torch.nn.functional.one_hot(labels, generator.num_classes).float()
    file = io.BytesIO()
    save_image(make_grid(generator(latents, classes), nrow=COLUMNS, padding=1), file, format="png")
    return file.getvalue()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="prior")
def _hydra_main(cfg: DictConfig) -> None:
    dataset, examples = public_data(cfg)
    network = OmegaConf.to_container(cfg.generator, resolve=True)
    assert isinstance(network, dict)
    files = make_prior(
        dataset, examples, {str(k): v for k, v in network.items()}, instantiate(cfg.training, _convert_="all"),
        split=cfg.public.split, seed=cfg.seed, accelerator=cfg.accelerator, output=Path(cfg.output),
        checkpoint_every_seconds=cfg.checkpoint_every_seconds, force=cfg.force,
    )  # fmt: skip
    for path in files:
        print(path)


def _choices(group: str) -> str:
    """The choices of a config group, for the help."""
    return ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))


OmegaConf.register_new_resolver("gia_bench.choices", _choices, replace=True)


def main() -> None:
    """The console script; a problem the user can mend is one sentence and exit status 1."""
    from gia_bench.app import run_as_command

    run_as_command(_hydra_main, "gia-bench-prior")
