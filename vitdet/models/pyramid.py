"""Simple feature pyramid: every level is computed from the backbone's last map.

Li et al. (arXiv:2203.16527), section 3; layers as in Detectron2's SimpleFeaturePyramid.
Each deconvolution halves the channels in Detectron2, and keeps them in ViTAE-Transformer/ViTDet.
Notation: B images, C channels of the backbone, D channels of the pyramid.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vitdet.models.layers import NORM_EPS, ConvNorm, Deconv2x2, LayerNorm2d


class SimpleFeaturePyramid(nn.Module):
    """One map (B, C, h, w) of stride `stride` -> p2..p5 at `scales`, and p6 at half p5's scale.

    `self.strides` are the strides of the five levels: 4..64 for stride 16 and scales 4, 2, 1, 1/2.
    With `halve_channels`, each deconvolution halves the channels. `eps` is the epsilon of the
    LayerNorms after the convolutions.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        stride: int,
        scales: Sequence[float],
        halve_channels: bool,
        eps: float,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.strides = [int(stride / scale) for scale in (*scales, scales[-1] / 2)]
        shrink = 2 if halve_channels else 1
        levels = [_level(in_channels, out_channels, scale, shrink, eps) for scale in scales]
        self.levels = nn.ModuleList(levels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (B, C, h, w) to the levels (B, D, ., .), finest first."""
        maps = [level(x) for level in self.levels]
        return [*maps, maps[-1][:, :, ::2, ::2]]


def _level(
    in_channels: int, out_channels: int, scale: float, shrink: int, eps: float
) -> nn.Sequential:
    resample, channels = _resample(in_channels, scale, shrink)
    lateral = ConvNorm(channels, out_channels, 1, norm=True, eps=eps)
    output = ConvNorm(out_channels, out_channels, 3, norm=True, eps=eps)
    return nn.Sequential(*resample, lateral, output)


def _resample(dim: int, scale: float, shrink: int) -> tuple[list[nn.Module], int]:
    """Return the layers that rescale the map, and the number of output channels."""
    inner, last = dim // shrink, dim // shrink**2
    if scale == 4.0:
        norm = LayerNorm2d(inner, eps=NORM_EPS)
        return [Deconv2x2(dim, inner), norm, nn.GELU(), Deconv2x2(inner, last)], last
    if scale == 2.0:
        return [Deconv2x2(dim, inner)], inner
    if scale == 1.0:
        return [], dim
    if scale in (0.5, 0.25):
        return [nn.MaxPool2d(int(1 / scale))], dim
    raise ValueError(f"a pyramid level's scale must be 4, 2, 1, 0.5 or 0.25, got {scale}")
