"""Restarts that show one image at several places, and the mean of what they agree on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gia_bench.attacks.forces import Course, GroupConsistency
from gia_bench.attacks.optimizers import Moment
from gia_bench.attacks.registration import Registration, Translation, Unregistered, moved, shift, to_the_middle
from gia_bench.errors import ConfigError

SIZE = 24
COURSE = Course(Moment(0, 10, 1.0), 0.1, (0,))
PLACES = [[(0, 0), (3, -2), (1, 4)], [(-4, 1), (2, 2), (0, -3)]]
"""Two images, three restarts each: how far the window on the image was moved down and to the right."""


def scenes(count: int, seed: int = 0) -> Tensor:
    """Images larger than what is seen of them, with detail at all scales: [count, 2, 40, 40]."""
    draw = torch.Generator().manual_seed(seed)
    fine = torch.rand(count, 2, 40, 40, generator=draw, dtype=torch.float64)
    coarse = torch.nn.functional.interpolate(
        torch.rand(count, 2, 10, 10, generator=draw, dtype=torch.float64), (40, 40), mode="bilinear"
    )
    return 0.3 * fine + coarse


def seen(scene: Tensor, down: int, right: int) -> Tensor:
    return scene[:, 8 + down : 8 + down + SIZE, 8 + right : 8 + right + SIZE]


def copies(places: list[list[tuple[int, int]]] = PLACES) -> Tensor:
    """[1, T, B, 2, 24, 24]: restart t shows image b at ``places[b][t]``."""
    images = scenes(len(places))
    rows = [[seen(images[b], *places[b][t]) for b in range(len(places))] for t in range(len(places[0]))]
    return torch.stack([torch.stack(row) for row in rows])[None]


def test_shifted_copies_of_an_image_are_registered_to_its_middle_place() -> None:
    mean = Translation(max_shift=0.4).mean(copies())
    assert mean.shape == (1, 1, 2, 2, SIZE, SIZE)
    for b, places in enumerate(PLACES):
        down, right = (sorted(p[axis] for p in places)[1] for axis in (0, 1))
        expected = seen(scenes(2)[b], down, right)
        torch.testing.assert_close(mean[0, 0, b, :, 7:-7, 7:-7], expected[:, 7:-7, 7:-7])
        plain = Unregistered().mean(copies())[0, 0, b]
        assert float((plain - expected)[:, 7:-7, 7:-7].abs().mean()) > 0.05


def test_the_shift_is_that_of_the_best_of_all_translations_tried_one_by_one() -> None:
    first, second = seen(scenes(1)[0], 2, -3), seen(scenes(1)[0], -1, 1)
    noisy = [
        x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        for i, x in enumerate((first, second))
    ]
    inner = slice(6, -6)
    tried = {
        (down, right): float((noisy[0].roll((down, right), (1, 2)) - noisy[1])[:, inner, inner].square().sum())
        for down in range(-6, 7)
        for right in range(-6, 7)
    }
    best = min(tried, key=lambda where: tried[where])
    assert tuple(shift(noisy[0], noisy[1], 0.25).tolist()) == best == (3, -4)


def test_moving_repeats_the_border() -> None:
    image = scenes(1)[0]
    H, W = image.shape[-2:]
    for down, right in [(0, 0), (2, -3), (-1, 5)]:
        found = moved(image, torch.tensor([down, right]))
        for y, x in [(0, 0), (0, W - 1), (H - 1, 0), (17, 20)]:
            source = image[:, min(max(y - down, 0), H - 1), min(max(x - right, 0), W - 1)]
            assert torch.equal(found[:, y, x], source)


def test_one_restart_that_matches_nothing_does_not_move_the_others() -> None:
    pixels = copies([[(1, 2)] * 5])
    pixels[0, 3] = torch.rand(2, SIZE, SIZE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    still = to_the_middle(pixels, 0.25)[0, [0, 1, 2, 4], 0]
    assert still.tolist() == [[0, 0]] * 4


def test_victims_and_images_are_registered_each_for_itself() -> None:
    pixels = torch.cat([copies(), copies([[(0, 0), (1, 1), (2, 2)], [(3, 0), (0, 3), (-3, 0)]])])
    registration = Translation(max_shift=0.25)
    together = registration.mean(pixels)
    for v in range(2):
        for b in range(2):
            alone = registration.mean(pixels[v : v + 1, :, b : b + 1])
            assert torch.equal(together[v : v + 1, :, b : b + 1], alone)


@pytest.mark.parametrize("registration", [Unregistered(), Translation(max_shift=0.0)])
def test_without_registration_the_pull_is_to_the_plain_mean_bit_for_bit(registration: Registration) -> None:
    pixels = copies().float()
    away = pixels - pixels.mean(1, keepdim=True)
    plain = 0.3 / SIZE**2 * away / away.square().sum((2, 3, 4, 5), keepdim=True).sqrt()
    assert torch.equal(GroupConsistency(weight=0.3, start=0, registration=registration)(pixels, COURSE), plain)
    assert torch.equal(GroupConsistency(weight=0.3, start=0)(pixels, COURSE), plain)


def test_the_pull_of_registered_restarts_is_to_the_registered_mean() -> None:
    pixels, registration = copies(), Translation(max_shift=0.25)
    away = pixels - registration.mean(pixels)
    pull = GroupConsistency(weight=1.0, start=0, registration=registration)(pixels, COURSE)
    for t in range(3):
        torch.testing.assert_close(pull[0, t], away[0, t] / away[0, t].norm() / SIZE**2)
    lone = pixels[:, :1]
    assert GroupConsistency(weight=1.0, start=0, registration=registration)(lone, COURSE).abs().sum() == 0


def test_images_without_any_contrast_are_their_own_mean() -> None:
    flat = torch.full((1, 3, 2, 1, 8, 8), 0.4)
    torch.testing.assert_close(Translation(max_shift=0.25).mean(flat), flat[:, :1])


def test_an_impossible_shift_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"registration.max_shift=0.6: give a number in \[0, 0.5\]"):
        Translation(max_shift=0.6)
