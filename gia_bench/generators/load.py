"""Generators from files: our own, a TorchScript file, or a state dict of a class of yours.

Our own files and state dicts are read as weights only. A TorchScript file holds code, and loading it runs that code:
take one only from where you would take a program. On the command line (the keys are new, hence ++):

    gia-bench 'attack=[ggl]' '++attack.ggl.generator={_target_:gia_bench.generators.load.TorchScript, path:biggan.pt,
        latent_shape:[128], output_range:[-1,1], num_classes:null}'
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from hydra.utils import get_object
from torch import nn

from gia_bench.errors import ConfigError, DataError
from gia_bench.generators.dcgan import Dcgan
from gia_bench.generators.generator import Generator
from gia_bench.models.checkpoint import UNREADABLE, load_checkpoint
from gia_bench.records.archives import whole

FORMAT = "gia_bench generator 1"


@final
@dataclass(frozen=True, kw_only=True)
class Saved:
    """A file of ``gia-bench-prior``; everything else stands in it. path: None has no generator and says so."""

    path: str | None

    def load(self) -> Generator:
        """Raises ``ConfigError`` without a path, and ``DataError`` for a file that is absent, corrupt or not ours."""
        if self.path is None:
            raise ConfigError(
                "generator.path=null: this attack searches the images of a generator, and none is given. Train one "
                "with gia-bench-prior (the same dataset=, partition=, public.split= and seed= as here), and give its "
                "file as attack.<name>.generator.path=..."
            )
        path = _file(self.path)
        content = _read(path)
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            raise DataError(
                f"generator.path: {path} was not written by gia-bench-prior. A TorchScript file is given with "
                "generator._target_=gia_bench.generators.load.TorchScript, a state dict with ...load.StateDict."
            )
        module = Dcgan(**content["config"])
        module.load_state_dict(content["state_dict"])
        return Generator(
            module=module,
            latent_shape=(module.latent_dim,),
            output_range=(0.0, 1.0),
            num_classes=module.num_classes,
            fingerprint=_fingerprint(path),
        )


@final
@dataclass(frozen=True, kw_only=True)
class TorchScript:
    """A file of ``torch.jit.save``: any network, without its source. Loading it RUNS THE CODE in it.

    latent_shape: of one latent, drawn from a standard normal; output_range: lowest and highest pixel; num_classes: of
    the labels [N, num_classes] it takes as its second argument, None: it takes none; image_size: [H, W] of the model's
    images, where it makes others (BigGAN's 128 or 256 pixels), None: it makes these.
    """

    path: str
    latent_shape: Sequence[int]
    output_range: Sequence[float]
    num_classes: int | None
    image_size: Sequence[int] | None = None

    def load(self) -> Generator:
        """Raises ``DataError`` for a file that is absent or not TorchScript."""
        path = _file(self.path)
        try:
            with warnings.catch_warnings():
                # torch advises other formats; a user may have no other
                warnings.simplefilter("ignore", FutureWarning)
                module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
        except UNREADABLE as error:
            raise DataError(
                f"generator.path: {path} is corrupt, or no TorchScript file ({type(error).__name__}); save it again "
                "with torch.jit.save."
            ) from error
        return _generator(module, self, path)


@final
@dataclass(frozen=True, kw_only=True)
class StateDict:
    """Weights of a class of yours. network: its import path (my_package.Generator); arguments: it is made with these;
    the others: see ``TorchScript``.
    """

    path: str
    network: str
    latent_shape: Sequence[int]
    output_range: Sequence[float]
    num_classes: int | None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    image_size: Sequence[int] | None = None

    def load(self) -> Generator:
        """Raises ``ConfigError`` for a class that cannot be made, and ``DataError`` for weights that do not fit it."""
        path = _file(self.path)
        try:
            module = get_object(self.network)(**self.arguments)
        except (ImportError, ValueError, TypeError) as error:
            raise ConfigError(f"generator.network={self.network!r} cannot be made: {error}") from error
        if not isinstance(module, nn.Module):
            raise ConfigError(f"generator.network={self.network!r} gives {type(module).__name__}, and no torch module.")
        try:
            load_checkpoint(module, path)
        except DataError as error:
            raise DataError(str(error).replace("model.checkpoint", "generator.path")) from error
        return _generator(module, self, path)


def content_of(generator: Dcgan, config: Mapping[str, Any], trained_on: Mapping[str, Any]) -> dict[str, Any]:
    """What ``Saved`` reads. config: the arguments of ``Dcgan``; trained_on: plain values, for people."""
    return {
        "format": FORMAT,
        "config": dict(config),
        "state_dict": {k: v.detach().cpu().contiguous() for k, v in generator.state_dict().items()},
        "trained_on": dict(trained_on),
    }


def _generator(module: nn.Module, described: TorchScript | StateDict, path: Path) -> Generator:
    bounds, size = described.output_range, described.image_size
    if len(bounds) != 2:
        raise ConfigError(f"generator.output_range={list(bounds)}: give the lowest value and the highest.")
    return Generator(
        module=module,
        latent_shape=tuple(described.latent_shape),
        output_range=(float(bounds[0]), float(bounds[1])),
        num_classes=described.num_classes,
        fingerprint=_fingerprint(path),
        image_size=None if size is None else tuple(size),  # type: ignore[arg-type]  # its length is checked there
    )


def _file(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"generator.path: there is no file {file}. gia-bench-prior trains one.")
    return file


def _read(path: Path) -> Any:
    if not whole(path):
        raise DataError(
            f"generator.path: {path} is corrupt, or holds more than tensors and plain values; train it again with "
            "gia-bench-prior."
        )
    return torch.load(path, map_location="cpu", weights_only=True)


def _fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
