"""Measurement: defects that other benches had, see docs/defects.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from made_runs import make_run
from torch import Tensor

from gia_bench.metrics import Lpips, Metrics, evaluate
from gia_bench.metrics import lpips as module
from gia_bench.records.images import load_images, save_images
from gia_bench.report.figures import ReconstructionGrid
from gia_bench.report.results import Results
from gia_bench.values import Reconstruction, Truth


class Elsewhere(Tensor):
    """Behaves as a tensor on a GPU: numpy does not take it, and only ``cpu`` or ``to`` bring it home."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        found = super().__torch_function__(func, types, args, kwargs or {})
        home = name in ("cpu", "to") and isinstance(found, Tensor)
        return found.as_subclass(Tensor).clone() if home else found


def test_what_an_attack_rebuilt_on_another_device_is_scored_and_saved(tmp_path: Path) -> None:
    images, labels = torch.rand(3, 1, 16, 16), torch.arange(3)
    far = Reconstruction(inputs=images.flip(0).as_subclass(Elsewhere), labels=labels.as_subclass(Elsewhere), score=0.0)
    truth = Truth(images.as_subclass(Elsewhere), labels.as_subclass(Elsewhere))
    with pytest.raises(TypeError, match="cuda"):
        far.inputs.numpy()
    scores = evaluate(far, truth, Metrics(names=["mse", "psnr_db", "ssim", "nmi", "label_accuracy"], lpips=None))
    assert scores.of("psnr_db") == [100, 100, 100] and scores.of("label_accuracy") == [1]
    pair = load_images(save_images(tmp_path, 0, 1, "dlg", far, truth, scores))
    assert torch.equal(pair.reconstruction, images) and torch.equal(pair.labels, labels)


def test_a_net_is_loaded_once_for_all_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = torchvision.models.squeezenet1_1(weights=None).features
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, tmp_path / "squeezenet1_1_features.pth")
    loaded: list[Path] = []
    read = module._state_dict
    monkeypatch.setattr(module, "_state_dict", lambda path: loaded.append(path) or read(path))
    metrics = [Metrics(names=["mse"], lpips=Lpips(weights=tmp_path, download=False)) for _ in range(2)]
    truth = Truth(torch.rand(2, 3, 32, 32), torch.arange(2))
    for one in (*metrics, metrics[0]):
        guess = Reconstruction(inputs=truth.inputs.flip(0), labels=None, score=0.0)
        assert None not in evaluate(guess, truth, one).of("lpips_squeeze")
    assert len(loaded) == 1


def test_a_faint_picture_is_drawn_faint(tmp_path: Path) -> None:
    """Nothing is stretched before it is shown: what is drawn are the numbers of the file."""
    [file] = (make_run(tmp_path, "ra", images=True) / "images").glob("*.npz")
    arrays = dict(np.load(file))
    arrays |= {name: arrays[name] / 10 for name in ("truth", "reconstruction")}
    np.savez(file, **arrays)
    axes = ReconstructionGrid().draw(Results.load(tmp_path)).axes
    drawn = np.stack([np.asarray(a.images[0].get_array()) for a in axes])
    np.testing.assert_allclose(drawn, np.concatenate([arrays["truth"], arrays["reconstruction"]])[:, 0], atol=1e-6)
    assert drawn.max() < 0.2 and {a.images[0].get_clim() for a in axes} == {(0.0, 1.0)}
