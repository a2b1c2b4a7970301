"""Automatic transformation search (ATS): clients train on images that a searched policy has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, final

import torch
from torch import Tensor
from torch.func import vmap

from gia_bench.defenses import augmentations as ops
from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.checks import check
from gia_bench.defenses.per_example import per_example
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.values import Batch, Noise, Params, Shared, State, Update

Policy: TypeAlias = tuple[tuple[int, ...], ...]
"""Sub-policies, each a sequence of operation ids that are applied in order."""

PADDING = 4
"""Pixels around the image out of which crops are cut: RandomCrop(32, padding=4) for CIFAR."""

TABLE: tuple[tuple[str, int], ...] = (
    ("invert", 7), ("contrast", 6), ("rotate", 2), ("translate_x", 9), ("sharpness", 1),
    ("sharpness", 3), ("shear_y", 2), ("translate_y", 2), ("autocontrast", 5), ("equalize", 2),
    ("shear_y", 5), ("posterize", 5), ("color", 3), ("brightness", 5), ("sharpness", 9),
    ("brightness", 9), ("equalize", 5), ("equalize", 1), ("contrast", 7), ("sharpness", 5),
    ("color", 5), ("translate_x", 5), ("equalize", 7), ("autocontrast", 8), ("translate_y", 3),
    ("sharpness", 6), ("brightness", 6), ("color", 8), ("solarize", 0), ("invert", 0),
    ("equalize", 0), ("autocontrast", 0), ("equalize", 8), ("equalize", 4), ("color", 5),
    ("equalize", 5), ("autocontrast", 4), ("solarize", 4), ("brightness", 3), ("color", 0),
    ("solarize", 1), ("autocontrast", 0), ("translate_y", 3), ("translate_y", 3), ("autocontrast", 1),
    ("solarize", 1), ("equalize", 5), ("invert", 0), ("translate_y", 3), ("autocontrast", 1),
)  # fmt: skip
"""The operation and its level (0..9) behind every id. The reference's probabilities are used nowhere."""

RANGES: dict[str, tuple[float, float]] = {
    "shear_y": (0, 0.3), "translate_x": (0, 150 / 331), "translate_y": (0, 150 / 331),
    "rotate": (0, 30), "color": (0, 0.5), "posterize": (8, 4), "solarize": (256, 0), "contrast": (0, 0.5),
    "sharpness": (0, 0.5), "brightness": (0, 0.5), "autocontrast": (0, 0), "equalize": (0, 0), "invert": (0, 0),
}  # fmt: skip
"""Magnitudes at level 0 and level 9, linear in between; posterize rounds to whole bits."""

UNCOVERING = ("shear_y", "translate_x", "translate_y")


@final
@dataclass(frozen=True, kw_only=True)
class ATS(Defense):
    """Each image is changed by one sub-policy, drawn anew every time it is used (Gao et al., CVPR 2021).

    policy: ids of ``TABLE``, "-" between operations and "+" between sub-policies; "3-1-7+43-18-18" is the paper's best
    for CIFAR-100 with ResNet20-4, others come from ``ats_search``. crop_and_flip: whether a random crop of the image
    padded with 4 black pixels and a random mirroring come first, as in the reference's training; false by default
    (gia_bench choice), since a moved picture measures badly against the private one without hiding it, and the control
    without a defense has no such moves. fill: level in 0..255 of what shears and translations uncover: 0 in the
    reference's code, 128 in AutoAugment's; a rotation's corners are always 128.

    Operations are PIL's on 8-bit levels, so images are rounded to 1/255 first. Those that go either way (color,
    contrast, brightness, sharpness, shears, translations) draw their sign; rotations have one direction, as in the
    reference. On images of one channel ``color`` changes nothing. In a ``Chain`` it belongs before MixUp and InstaHide.

    An attack is measured against the private images; the reference measures against the transformed ones. Accuracy is
    that on unchanged test images. Raises ``ConfigError`` for an id that does not exist (the reference's search draws
    50, which has no operation) and ``IncompatibleError`` for images of neither one nor three channels.
    """

    policy: str = "3-1-7+43-18-18"
    crop_and_flip: bool = False
    fill: int = 0

    def __post_init__(self) -> None:
        parse(self.policy)
        check("defense ats: fill", self.fill, lambda f: 0 <= f <= 255, "lie in [0, 255]; it is a level of grey")

    def check_victim(self, victim: Victim) -> None:
        """Needs grey or RGB images."""
        if victim.input_shape[0] not in (1, 3):
            raise IncompatibleError(
                f"defense ats changes pictures of 1 or 3 channels, and these have {victim.input_shape[0]}; choose "
                "another defense."
            )

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """``choice`` [S, B]: the sub-policy; ``sign`` [S, B, L]: +1 or -1 for each of its at most L operations;
        ``offset`` [S, B, 2] and ``flip`` [S, B]: the crop's corner (row, column) and the mirroring, if wanted."""
        policy = parse(self.policy)
        longest = max(len(ids) for ids in policy)

        def of(count: int) -> Noise:
            noise = {
                "choice": torch.randint(len(policy), (count,), generator=generator),
                "sign": torch.randint(2, (count, longest), generator=generator) * 2 - 1,
            }
            if self.crop_and_flip:
                noise["offset"] = torch.randint(2 * PADDING + 1, (count, 2), generator=generator)
                noise["flip"] = torch.randint(2, (count,), generator=generator)
            return noise

        return per_example(batch.mask, of, {"choice": 0, "sign": 1, "offset": PADDING, "flip": 0})

    def transform(self, batch: Batch, noise: Noise) -> Batch:
        """The changed images; labels and padding stay."""
        changed: Tensor = vmap(vmap(self._changed))(batch.inputs, noise)
        real = batch.mask[..., None, None, None] > 0
        return batch._replace(inputs=torch.where(real, changed, batch.inputs))

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The update itself: that of the changed images, which an attacker would rebuild."""
        return update, state

    def _changed(self, image: Tensor, noise: Noise) -> Tensor:
        """One image [C, H, W] in [0, 1]; all sub-policies are computed and one taken: ``vmap`` cannot branch."""
        levels = (image * 255).round().clamp(0, 255)
        if self.crop_and_flip:
            levels = _cropped(levels, noise["offset"], noise["flip"])
        results = [apply(levels, ids, noise["sign"], self.fill) for ids in parse(self.policy)]
        taken = results[0]
        for i, result in enumerate(results[1:], 1):
            taken = torch.where(noise["choice"] == i, result, taken)
        return taken / 255


def parse(policy: str) -> Policy:
    """The ids of "3-1-7+43-18-18". Raises ``ConfigError`` for what is not of this form."""
    try:
        parsed = tuple(tuple(int(i) for i in part.split("-")) for part in str(policy).split("+"))
    except ValueError as error:
        raise ConfigError(
            f"defense ats: policy={policy!r} is not understood; give ids with '-' between operations and '+' between "
            "sub-policies, as in 3-1-7+43-18-18."
        ) from error
    unknown = sorted({i for ids in parsed for i in ids if not 0 <= i < len(TABLE)})
    if unknown:
        raise ConfigError(
            f"defense ats: policy={policy!r} names operation {', '.join(map(str, unknown))}, but they are numbered 0 "
            f"to {len(TABLE) - 1}; leave it out or take another one."
        )
    return parsed


def magnitude(name: str, level: int) -> float:
    """What an operation gets at a level 0..9."""
    low, high = RANGES[name]
    value = low + level * ((high - low) / 9)
    return round(value) if name == "posterize" else value


def operation(number: int, fill: int = 0) -> Callable[[Tensor, Tensor], Tensor]:
    """The operation behind an id: (levels [C, H, W], sign) -> levels."""
    name, level = TABLE[number]
    plain: ops.Operation = getattr(ops, name)
    made = partial(plain, fill=float(fill)) if name in UNCOVERING else plain  # type: ignore[call-arg]
    size = magnitude(name, level)
    return lambda levels, sign: made(levels, size, sign)


def apply(levels: Tensor, ids: Sequence[int], signs: Tensor, fill: int = 0) -> Tensor:
    """One sub-policy: levels [C, H, W], signs [at least len(ids)]."""
    for place, number in enumerate(ids):
        levels = operation(number, fill)(levels, signs[place])
    return levels


def _cropped(levels: Tensor, offset: Tensor, flip: Tensor) -> Tensor:
    """The part of the padded image that begins at ``offset`` (row, column), mirrored if ``flip``."""
    H, W = levels.shape[-2:]
    row = torch.arange(H, device=levels.device)[:, None] + offset[0] - PADDING
    column = torch.arange(W, device=levels.device)[None] + offset[1] - PADDING
    cut = ops.nearest(levels, row, column, 0.0)
    return torch.where(flip > 0, cut.flip(-1), cut)
