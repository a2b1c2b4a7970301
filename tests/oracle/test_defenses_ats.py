"""ATS: its operations against PIL, its draws and their laws, and the search's scores against naive loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor, nn

from gia_bench.defenses.ats import ATS, TABLE, magnitude, operation, parse
from gia_bench.defenses.ats_search import (
    Ranking,
    Scored,
    accuracy_score,
    one_per_class,
    privacy_scores,
    random_schemes,
    transformed,
)
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.seeding import seeded, stream
from gia_bench.values import Batch

AFFINE, BICUBIC = Image.Transform.AFFINE, Image.Resampling.BICUBIC


def pictures(channels: int, height: int = 28, width: int = 33) -> list[NDArray[np.uint8]]:
    """Noise, a smooth picture of few levels, and one of a single level; [H, W, C] uint8."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, channels))
    rows, columns = np.arange(height)[:, None, None], np.arange(width)[None, :, None]
    smooth = 60 + 100 * np.abs(np.sin(rows / 9 + columns / 7 + np.arange(channels)))
    return [p.astype(np.uint8) for p in (noise, smooth, np.full_like(noise, 77))]


def by_pil(name: str, size: float, sign: int, image: Image.Image, fill: int = 0) -> Image.Image:
    w, h = image.size
    colour = (fill,) * 3 if image.mode == "RGB" else fill

    def rotated() -> Image.Image:
        turned = image.convert("RGBA").rotate(size)
        return Image.composite(turned, Image.new("RGBA", turned.size, (128,) * 4), turned).convert(image.mode)

    ways: dict[str, Callable[[], Image.Image]] = {
        "rotate": rotated,
        "shear_y": lambda: image.transform((w, h), AFFINE, (1, 0, 0, size * sign, 1, 0), BICUBIC, fillcolor=colour),
        "translate_x": lambda: image.transform((w, h), AFFINE, (1, 0, size * w * sign, 0, 1, 0), fillcolor=colour),
        "translate_y": lambda: image.transform((w, h), AFFINE, (1, 0, 0, 0, 1, size * h * sign), fillcolor=colour),
        "color": lambda: ImageEnhance.Color(image).enhance(1 + size * sign),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(1 + size * sign),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(1 + size * sign),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(1 + size * sign),
        "invert": lambda: ImageOps.invert(image),
        "posterize": lambda: ImageOps.posterize(image, int(size)),
        "solarize": lambda: ImageOps.solarize(image, math.ceil(size)),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }
    return ways[name]()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", range(len(TABLE)))
def test_every_operation_is_pils(number: int, channels: int) -> None:
    """Equal pixel for pixel; a shear's cubic, summed in another order, may differ by one level."""
    name, level = TABLE[number]
    for picture in pictures(channels):
        image = Image.fromarray(picture if channels == 3 else picture[..., 0])
        levels = torch.from_numpy(picture).permute(2, 0, 1).float()
        for sign in (-1, 1):
            for fill in (0, 128):
                wanted = np.asarray(by_pil(name, magnitude(name, level), sign, image, fill)).reshape(picture.shape)
                got = operation(number, fill)(levels, torch.tensor(sign)).permute(1, 2, 0).numpy()
                assert np.abs(wanted - got).max() <= (1 if name == "shear_y" else 0)


def test_the_levels_reach_the_magnitudes_of_the_paper() -> None:
    assert len(TABLE) == 50
    assert [magnitude("posterize", n) for n in range(10)] == np.round(np.linspace(8, 4, 10)).tolist()
    assert [magnitude("translate_x", n) for n in range(9)] == np.linspace(0, 150 / 331, 10)[:9].tolist()
    assert magnitude("solarize", 0) == 256 and magnitude("solarize", 4) == pytest.approx(256 * 5 / 9)
    assert (magnitude("rotate", 9), magnitude("color", 9)) == pytest.approx((30, 0.5))


def batch(*shape: int, size: int = 8, channels: int = 3) -> Batch:
    g = stream(0, "images")
    pixels = torch.randint(256, (*shape, channels, size, size), generator=g) / 255
    return Batch(pixels, torch.randint(3, shape, generator=g), torch.ones(shape))


@pytest.mark.parametrize("crop_and_flip", [False, True])
def test_loop_and_vmap_change_images_to_the_same_bits_and_leave_padding_and_labels_alone(crop_and_flip: bool) -> None:
    ats = ATS(policy="3-1-7+43-18-18+9-2-8-6", crop_and_flip=crop_and_flip)
    clients = batch(3, 2, 4)
    clients.mask[1, :, 2:] = 0
    each = [Batch(*(t[c] for t in clients)) for c in range(3)]
    noises = [ats.draw({}, b, stream(0, c)) for c, b in enumerate(each)]
    mapped = torch.vmap(ats.transform)(clients, {k: torch.stack([n[k] for n in noises]) for k in noises[0]})
    for c, alone in enumerate(map(ats.transform, each, noises)):
        assert torch.equal(alone.inputs, mapped.inputs[c]) and torch.equal(alone.labels, clients.labels[c])
        assert alone.inputs.min() >= 0 and alone.inputs.max() <= 1
    assert torch.equal(mapped.inputs[1, :, 2:], clients.inputs[1, :, 2:])
    assert not torch.equal(mapped.inputs[1, :, :2], clients.inputs[1, :, :2])


def test_more_padding_changes_no_number() -> None:
    ats, small = ATS(crop_and_flip=True), batch(1, 3)
    wide = Batch(*(torch.cat([t, torch.zeros_like(t)], 1) for t in small))
    wide = Batch(*(torch.cat([t, torch.zeros_like(t)], 0) for t in wide))
    a, b = (ats.transform(x, ats.draw({}, x, stream(3))).inputs for x in (small, wide))
    assert torch.equal(a, b[:1, :3])


def test_an_image_goes_through_one_sub_policy_in_its_order_with_its_own_signs() -> None:
    ats, images = ATS(policy="3-1-7+43-18-18+11"), batch(1, 60)
    noise = ats.draw({}, images, stream(0))
    changed = ats.transform(images, noise).inputs[0]
    assert set(noise["choice"][0].tolist()) == {0, 1, 2} and set(noise["sign"].unique().tolist()) == {-1, 1}
    for b in range(60):
        image = Image.fromarray((images.inputs[0, b] * 255).round().byte().permute(1, 2, 0).numpy())
        for place, number in enumerate(parse(ats.policy)[int(noise["choice"][0, b])]):
            name, level = TABLE[number]
            image = by_pil(name, magnitude(name, level), int(noise["sign"][0, b, place]), image)
        wanted = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
        torch.testing.assert_close(changed[b], wanted, rtol=0, atol=1e-6)


def test_crop_and_flip_cut_the_padded_image() -> None:
    ats, images = ATS(policy="28", crop_and_flip=True), batch(1, 40)
    noise = ats.draw({}, images, stream(0))
    changed = ats.transform(images, noise).inputs[0]
    assert noise["offset"].min() == 0 and noise["offset"].max() == 8
    for b in range(40):
        top, left = noise["offset"][0, b].tolist()
        cut = nn.functional.pad(images.inputs[0, b], (4,) * 4)[:, top : top + 8, left : left + 8]
        assert torch.equal(changed[b], cut.flip(-1) if noise["flip"][0, b] else cut)


def test_the_identity_keeps_the_bits_of_8_bit_images() -> None:
    images = batch(1, 4)
    assert torch.equal(transformed(ATS(policy="28"), images.inputs[0], stream(0)), images.inputs[0])


@pytest.mark.parametrize("policy", ["50", "3-50-1", "-1", "", "3--1", "a", "3-1-7+"])
def test_a_policy_that_names_no_operation_is_refused(policy: str) -> None:
    with pytest.raises(ConfigError, match="policy"):
        ATS(policy=policy)


def test_wrong_fills_and_images_of_two_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match="fill"):
        ATS(fill=256)
    module = nn.Sequential(nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(IncompatibleError, match="channels"):
        ATS().check_victim(Victim(module=module, input_shape=(2, 2, 2), num_classes=2))


def victim() -> Victim:
    with seeded(0, "model"):
        body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Flatten(), nn.Linear(144, 3))
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.5, 1.5])
    return Victim(module=body, input_shape=(3, 8, 8), num_classes=3, mean=mean, std=std)


def test_the_privacy_score_is_the_trapezoid_of_a_naive_loop() -> None:
    model = victim()
    params, buffers = model.initial()
    images, labels = batch(3).inputs, batch(3).labels
    noise = torch.rand(images.shape, generator=stream(1))
    got = privacy_scores(model, params, buffers, images, labels, noise)
    assert model.mean is not None and model.std is not None
    module = model.module.eval()

    def gradients(x: Tensor, label: Tensor) -> list[Tensor]:
        normalised = (x - model.mean.view(-1, 1, 1)) / model.std.view(-1, 1, 1)  # type: ignore[union-attr]
        loss = nn.functional.cross_entropy(module(normalised[None]), label[None])
        return list(torch.autograd.grad(loss, list(module.parameters())))

    for n in range(3):
        own, area, before = gradients(images[n], labels[n]), 0.0, None
        for i in range(21):
            here = gradients(i / 20 * images[n] + (20 - i) / 20 * noise[n], labels[n])
            cosines = [float((a * b).sum() / (a.norm() * b.norm())) for a, b in zip(here, own, strict=True)]
            now = sum(cosines) / len(cosines)
            area, before = area + (0 if before is None else (before + now) / 2 / 20), now
        assert now == pytest.approx(1, abs=1e-5)  # the end of the line is the image itself
        assert float(got[n]) == pytest.approx(area, abs=1e-5)


def test_the_accuracy_score_is_numpys_and_highest_for_unrelated_jacobians() -> None:
    model = victim()
    params, buffers = model.initial()
    images = batch(5).inputs
    rows = []
    for image in images:
        assert model.mean is not None and model.std is not None
        x = ((image - model.mean.view(-1, 1, 1)) / model.std.view(-1, 1, 1)).requires_grad_()
        (jacobian,) = torch.autograd.grad(model.module.eval()(x[None]).sum(), x)
        rows.append(jacobian.double().flatten().numpy())
    values = np.linalg.eigvals(np.corrcoef(rows)).real + 1e-5
    got = accuracy_score(model, params, buffers, images)
    assert got == pytest.approx(-float((np.log(values) + 1 / values).sum()), rel=1e-4)
    same = accuracy_score(model, params, buffers, images[:1].expand(5, -1, -1, -1))
    assert same < got <= -5 + 1e-6


def test_random_schemes_name_at_most_three_operations_that_exist() -> None:
    schemes = random_schemes(500, stream(0))
    assert len(schemes) == 500
    assert {len(parse(s)[0]) for s in schemes} <= {1, 2, 3}
    assert {i for s in schemes for i in parse(s)[0]} == set(range(50))


def test_the_ranking_keeps_enough_accuracy_and_weighs_privacy_against_its_variance() -> None:
    a = Scored(policy="1", privacy=0.5, variance=0.4, accuracy=-80)
    b = Scored(policy="2", privacy=0.55, variance=0.1, accuracy=-85)
    c = Scored(policy="3", privacy=0.1, variance=0.0, accuracy=-86)
    assert Ranking().sort([a, b, c]) == [b, a]  # 0.7 * 0.55 + 0.3 * 0.1 < 0.7 * 0.5 + 0.3 * 0.4
    assert Ranking(alpha=1, min_accuracy=-100).sort([a, b, c]) == [c, a, b]
    with pytest.raises(ConfigError, match="alpha"):
        Ranking(alpha=1.5)
    assert one_per_class(torch.tensor([2, 2, 0, 1, 0])).tolist() == [0, 2, 3]
