"""How near an image is to the truth, one number per image.

Every function takes ``images`` and ``truth`` as [n, C, H, W] with values in [0, 1] and returns [n] in float64. Nothing
is pooled over the batch: a mean of PSNRs is not the PSNR of the mean error.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from gia_bench.errors import GiaBenchError

PSNR_CAP_DB = 100.0
"""PSNR of an exact copy, so that medians and means stay finite (gia_bench choice)."""
SSIM_WINDOW = 11
"""Side of the Gaussian window in pixels (Wang et al. 2004, section III-B)."""


class UnavailableError(GiaBenchError):
    """A metric cannot be computed on these images or this machine. Its records say so; no number stands in for it."""


def mse(images: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error over channels and pixels, in [0, 1]."""
    return (images.double() - truth.double()).square().flatten(1).mean(1)


def psnr_db(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for a peak of 1: ``-10 log10(mse)``, at most ``PSNR_CAP_DB``."""
    return (-10 * mse(images, truth).log10()).clamp(max=PSNR_CAP_DB)


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity in [-1, 1]: 11x11 Gaussian window of sigma 1.5, data range 1, mean over channels.

    Averaged over the positions where the window lies inside the image, as in Wang et al. 2004 and scikit-image;
    torchmetrics' own mean counts the mirrored border too. Raises ``UnavailableError`` for images smaller than that.
    """
    height, width = truth.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise UnavailableError(f"ssim needs images of {SSIM_WINDOW}x{SSIM_WINDOW} or more, these are {height}x{width}")
    _, everywhere = structural_similarity_index_measure(
        images.double(), truth.double(), data_range=1.0, sigma=1.5, return_full_image=True
    )
    border = SSIM_WINDOW // 2
    inside: Tensor = everywhere[..., border : height - border, border : width - border]
    return inside.flatten(1).mean(1)


def unit_range(images: Tensor) -> Tensor:
    """``images`` on the CPU, in float32 and clamped to [0, 1]; NaN stays NaN.

    On the CPU, so that scores do not depend on the device that ran the attack.
    """
    return images.detach().to("cpu", torch.float32).clamp(0, 1)
