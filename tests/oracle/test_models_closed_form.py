"""The networks of R-GAP and APRIL against slices, torch's own attention, and numbers counted by hand."""

from __future__ import annotations

import torch
from torch import nn

from gia_bench.models.cnn6 import cnn6
from gia_bench.models.vit import VisionTransformer, vit_april


def test_patches_equal_slices_and_come_back_together() -> None:
    net = vit_april((2, 9, 6), 4, dim=32)
    assert isinstance(net, VisionTransformer)
    x = torch.rand(3, 2, 9, 6)
    cut = net.patches(x)
    assert cut.shape == (3, 3 * 2, 32)
    padded = torch.zeros(3, 2, 12, 8)
    padded[:, :, :9, :6] = x
    for row in range(3):
        for column in range(2):
            here = padded[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            torch.testing.assert_close(cut[:, 2 * row + column], here.flatten(1))
    torch.testing.assert_close(net.assemble(cut, (9, 6)), x)


def test_the_transformers_attention_equals_torchs() -> None:
    net = vit_april((1, 8, 8), 4, dim=68)
    ours = net.encoders[0][0]  # type: ignore[index, union-attr]
    torchs = nn.MultiheadAttention(68, 4, batch_first=True)
    with torch.no_grad():
        torchs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        torchs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
        torchs.out_proj.load_state_dict(ours.out.state_dict())
    z = torch.rand(2, 5, 68)
    torch.testing.assert_close(ours(z), torchs(z, z, z, need_weights=False)[0], rtol=1e-5, atol=1e-6)


def test_parameters_are_those_counted_by_hand() -> None:
    net = cnn6((3, 32, 32), 10)
    convolutions = 3 * 12 * 16 + 9 * (12 * 36 + 36 * 36 + 36 * 36 + 36 * 64 + 64 * 128)
    assert sum(p.numel() for p in net.parameters()) == convolutions + 3200 * 10
    net, d = vit_april((3, 32, 32), 10), 192
    encoder = 4 * (d * d + d) + 2 * d + (d * 384 + 384) + (384 * d + d)
    assert sum(p.numel() for p in net.parameters()) == 48 * d + d + d + 65 * d + 2 * encoder + d * 10 + 10
