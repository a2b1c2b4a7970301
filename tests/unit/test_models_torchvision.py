from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torchvision import models
from torchvision.models.vision_transformer import EncoderBlock
from torchvision.ops import StochasticDepth

from gia_bench.errors import ConfigError, DataError
from gia_bench.models.build import build_victim
from gia_bench.models.from_torchvision import HardSigmoid, tame, torchvision_classifier
from gia_bench.models.functional import Victim
from gia_bench.values import Batch

SMALL = ["squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small", "mnasnet0_5", "efficientnet_b0", "googlenet"]


def build(name: str, side: int = 40, channels: int = 3, classes: int = 7, **fields: object) -> Victim:
    return build_victim(
        partial(torchvision_classifier, name=name, **fields),  # type: ignore[arg-type]
        input_shape=(channels, side, side),
        num_classes=classes,
        mean=[0.5] * channels,
        std=[0.25] * channels,
    )


@pytest.mark.parametrize("name", SMALL)
def test_a_classifier_is_fit_for_gradient_inversion(name: str) -> None:
    victim = build(name, channels=1)
    assert not any(getattr(part, "inplace", False) for part in victim.module.modules())
    params, buffers = victim.initial()
    draw = torch.Generator().manual_seed(0)
    batch = Batch(torch.rand(2, 1, 40, 40, generator=draw), torch.tensor([0, 6]), torch.ones(2))

    def size(images: Tensor) -> Tensor:
        update = grad(lambda p: victim.objective(p, buffers, batch._replace(inputs=images))[0])(params)
        return torch.stack([g.square().sum() for g in update.values()]).sum().sqrt()

    slope = grad(size)(batch.inputs)
    assert slope.isfinite().all()
    assert slope.count_nonzero() > 0


def test_dropout_and_stochastic_depth_are_off() -> None:
    original = list(models.efficientnet_b0().modules())
    assert any(isinstance(part, StochasticDepth) and part.p > 0 for part in original)
    assert any(isinstance(part, nn.Dropout) and part.p > 0 for part in original)
    random = [m for m in build("efficientnet_b0").module.modules() if isinstance(m, StochasticDepth | nn.Dropout)]
    assert random
    assert all(part.p == 0 for part in random)


def test_attention_gets_a_second_derivative_and_keeps_its_values() -> None:
    block = EncoderBlock(2, 8, 16, 0.0, 0.0)
    tokens = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = block(tokens[0])
    params = dict(tame(block).named_parameters())

    def size(x: Tensor) -> Tensor:
        update = grad(lambda p: functional_call(block, p, (x,)).square().sum())(params)
        return torch.stack([g.square().sum() for g in update.values()]).sum()

    torch.testing.assert_close(block(tokens[0]), expected)
    torch.testing.assert_close(vmap(grad(size))(tokens)[1], grad(size)(tokens[1]), rtol=1e-4, atol=1e-4)


def test_attention_draws_nothing() -> None:
    block = tame(EncoderBlock(2, 8, 16, 0.5, 0.5)).train()
    tokens = torch.randn(2, 5, 8)
    assert torch.equal(block(tokens), block(tokens))


def test_hard_sigmoid_is_torchs() -> None:
    x = torch.linspace(-5, 5, 101)
    torch.testing.assert_close(HardSigmoid()(x), nn.functional.hardsigmoid(x))


@pytest.mark.parametrize(
    ("name", "says"),
    [("resnet19", "resnet18"), ("vit_b16", "vit_b_16"), ("zzz", "alexnet.*wide_resnet50_2")],
)
def test_an_unknown_name_lists_close_ones(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"name='{name}' is not known. Choose one of: .*{says}"):
        build(name)


def test_unknown_options_and_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"options=.*colour.*does not fit squeezenet1_1"):
        build("squeezenet1_1", options={"colour": "red"})
    with pytest.raises(ConfigError, match=r"weights='BEST' is not known. Choose one of: DEFAULT, IMAGENET1K_V1, null"):
        build("squeezenet1_1", weights="BEST")


def test_an_image_that_is_too_small_is_refused_with_the_smallest_that_fits() -> None:
    with pytest.raises(ConfigError, match="from 17x17 pixels, got 8x8"):
        build("squeezenet1_1", side=8)


def cache(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A made-up model in the place where torch keeps the trained one's file."""
    monkeypatch.setenv("TORCH_HOME", str(folder))
    model: nn.Module = models.get_model(name, weights=None)
    weights = models.get_model_weights(name)["DEFAULT"]
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(model.state_dict(), folder / "hub" / "checkpoints" / Path(weights.url).name)
    return model


@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5"])
def test_trained_weights_are_kept_and_the_head_is_new_for_other_classes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = cache(tmp_path, name, monkeypatch).state_dict()
    whole = build(name, classes=1000, weights="DEFAULT").module.state_dict()
    assert all(torch.equal(v, whole[k]) for k, v in original.items())
    other = build(name, classes=7, weights="DEFAULT").module.state_dict()
    changed = {k.rpartition(".")[0] for k, v in original.items() if v.shape != other[k].shape}
    assert len(changed) == 1
    (head,) = changed
    assert all(torch.equal(v, other[k]) for k, v in original.items() if not k.startswith(head))


def test_trained_kernels_see_grayscale_as_three_equal_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = cache(tmp_path, "squeezenet1_1", monkeypatch).eval()
    gray = build("squeezenet1_1", channels=1, classes=1000, weights="DEFAULT")
    images = torch.rand(2, 1, 40, 40)
    scores, _ = gray.logits(*gray.initial(), images, training=False)
    torch.testing.assert_close(scores, original(images.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="3 channels or 1, got 2"):
        build("squeezenet1_1", channels=2, weights="DEFAULT")


def test_trained_weights_that_cannot_be_had_name_what_to_fetch_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(DataError, match=rf"fetch https://\S+squeezenet1_1\S+ and put it into {tmp_path}"):
        build("squeezenet1_1", weights="DEFAULT")


def test_a_corrupt_file_of_trained_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache(tmp_path, "squeezenet1_1", monkeypatch)
    (file,) = (tmp_path / "hub" / "checkpoints").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be had"):
        build("squeezenet1_1", weights="DEFAULT")
