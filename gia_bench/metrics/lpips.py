"""Learned perceptual similarity (LPIPS, Zhang et al. 2018), and where its backbone comes from."""

from __future__ import annotations

import functools
import os
import pickle
import urllib.error
import urllib.request
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
import torchvision
from torch import Tensor, nn

from gia_bench.errors import ConfigError, DataError, choices
from gia_bench.metrics.images import UnavailableError
from gia_bench.seeding import seeded


@dataclass(frozen=True)
class _Backbone:
    file: str
    weights: str
    min_size: int


NETS = {
    "alex": _Backbone("alexnet_features.pth", "AlexNet_Weights", 31),
    "squeeze": _Backbone("squeezenet1_1_features.pth", "SqueezeNet1_1_Weights", 17),
    "vgg": _Backbone("vgg16_features.pth", "VGG16_Weights", 16),
}
"""By net: the file name looked for in a folder, torchvision's weights, and the smallest side in pixels it can take."""
CHUNK = 32
TIMEOUT_S = 10.0


@final
@dataclass(frozen=True, kw_only=True)
class Lpips:
    """Which LPIPS nets to compute and where their backbones are; the linear heads are those of the lpips package, v0.1.

    nets: any of alex, squeeze, vgg. The first of these that exists is a net's backbone: ``backbone``, a file or a
    folder with ``squeezenet1_1_features.pth``, ``alexnet_features.pth``, ``vgg16_features.pth`` (state dicts with
    torchvision's names ``features.N.*``); ``weights``, a folder of the same kind (None: ``weights/lpips`` of the data
    root); torchvision's own weights in torch's hub cache, fetched if ``download``. Else the metric is unavailable.
    Raises ``ConfigError`` for an unknown net or a ``backbone`` that does not exist.
    """

    nets: Sequence[str] = ("squeeze",)
    backbone: str | Path | None = None
    weights: str | Path | None = None
    download: bool = True

    def __post_init__(self) -> None:
        for net in self.nets:
            if net not in NETS:
                raise ConfigError(choices("metrics.lpips.nets", net, NETS))
        if self.backbone is None:
            return
        if not Path(self.backbone).exists():
            raise ConfigError(f"metrics.lpips.backbone={self.backbone} does not exist. Give a file, a folder, or null.")
        if Path(self.backbone).is_file() and len(self.nets) > 1:
            raise ConfigError(
                f"metrics.lpips.backbone={self.backbone} is one file, but metrics.lpips.nets names {len(self.nets)}. "
                "Give a folder with one file for each."
            )

    def distance(self, net: str, images: Tensor, truth: Tensor) -> Tensor:
        """LPIPS of every pair in [n, C, H, W] with values in [0, 1]: [n] float64, 0 for equal images.

        Gray images are repeated to three channels. No image is resized: one that is too small for the net, or has
        neither 1 nor 3 channels, or a net without a backbone raises ``UnavailableError``; a corrupt file ``DataError``.
        """
        channels, height, width = truth.shape[1:]
        smallest = NETS[net].min_size
        if min(height, width) < smallest:
            raise UnavailableError(
                f"lpips_{net} needs {smallest}x{smallest} pixels or more, these are {height}x{width}"
            )
        if channels not in (1, 3):
            raise UnavailableError(f"lpips_{net} needs 1 or 3 channels, these images have {channels}")
        network = _network(net, self._locate(net))
        pairs = zip(torch.split(images, CHUNK), torch.split(truth, CHUNK), strict=True)
        with torch.no_grad():
            # normalize=True: the nets want [-1, 1]; in [0, 1] they answer too, with another number
            parts = [network(_rgb(a), _rgb(b), normalize=True).flatten() for a, b in pairs]
        return torch.cat(parts).double() if parts else torch.zeros(0, dtype=torch.float64)

    def _locate(self, net: str) -> Path:
        for place in (self.backbone, self.weights or data_root() / "weights" / "lpips"):
            if place is not None:
                path = Path(place)
                path = path / NETS[net].file if path.is_dir() else path
                if path.is_file():
                    return path
        return self._from_torchvision(net)

    def _from_torchvision(self, net: str) -> Path:
        url: str = getattr(torchvision.models, NETS[net].weights).DEFAULT.url
        cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        if cached.is_file():
            return cached
        wanted = f"{NETS[net].file} in the data root's weights/lpips (or set metrics.lpips.backbone)"
        if not self.download:
            raise UnavailableError(f"lpips_{net} has no backbone: put {wanted}, or metrics.lpips.download=true")
        why = _fetch(url, cached)
        if why:
            raise UnavailableError(f"lpips_{net} has no backbone: {url} cannot be fetched ({why}); put {wanted}")
        return cached


def data_root() -> Path:
    """``GIA_BENCH_DATA``, else ``gia_bench/data`` in the user's cache folder, as in ``conf/paths/default.yaml``."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("GIA_BENCH_DATA") or cache / "gia_bench" / "data")


@functools.cache
def _fetch(url: str, path: Path) -> str | None:
    """Why ``url`` cannot be fetched, or None. Once per process: offline, every attacked round would wait again."""
    try:
        # torch.hub waits without end on a network that drops packets, so ask first
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_S):
            pass
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1], progress=False)
    except (urllib.error.URLError, TimeoutError, OSError, RuntimeError) as problem:
        return str(problem)
    return None


@functools.cache
def _network(net: str, backbone: Path) -> nn.Module:
    import lpips  # type: ignore[import-untyped,unused-ignore]

    with warnings.catch_warnings(), seeded(0, "lpips"):
        # the package still uses torchvision's old argument; seeded: it draws a backbone that is replaced below
        warnings.filterwarnings("ignore", "The parameter 'pretrained' is deprecated", UserWarning)
        warnings.filterwarnings("ignore", "Arguments other than a weight enum", UserWarning)
        network: nn.Module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    trunk: Any = network.net
    stored = _state_dict(backbone)
    # "slice3.6.bias" of the package is "features.6.bias" of torchvision
    wanted = {name: f"features.{name.split('.', 1)[1]}" for name in trunk.state_dict()}
    missing = sorted(set(wanted.values()) - set(stored))
    if missing:
        raise DataError(
            f"{backbone} is not a backbone for lpips_{net}: it has no {missing[0]}. Give torchvision's weights."
        )
    try:
        trunk.load_state_dict({name: stored[key] for name, key in wanted.items()})
    except RuntimeError as problem:
        raise DataError(f"{backbone} does not fit lpips_{net}: {problem}. Give torchvision's weights.") from problem
    return network.requires_grad_(False).eval()


def _state_dict(path: Path) -> dict[str, Tensor]:
    try:
        stored: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise DataError(f"{path} cannot be read as a state dict ({reason}). Delete it or fetch it again.") from problem
    return stored


def _rgb(images: Tensor) -> Tensor:
    return images.float().expand(-1, 3, -1, -1)
