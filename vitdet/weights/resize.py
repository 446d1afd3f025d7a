"""Resizing of position embeddings and patch kernels to another image or patch size.

Notation: C channels, d channels per attention head, P patch size, K tokens per axis.
"""

from __future__ import annotations

import re

from torch import Tensor
from torch.nn import functional as F

RELATIVE = re.compile(r"backbone\.blocks\.\d+\.attn\.rel_pos_[hw]")


def resize(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Resize a tensor to `shape`; return None if impossible. name: the tensor's name in vitdet."""
    if name == "backbone.pos_embed" and tensor.dim() == 4 and tensor.shape[3] == shape[3]:
        return resize_grid(tensor, (shape[1], shape[2]))
    if RELATIVE.fullmatch(name) and tensor.dim() == 2 and tensor.shape[1] == shape[1]:
        return resize_table(tensor, shape[0])
    is_kernel = name == "backbone.patch_embed.proj.weight" and tensor.dim() == 4
    if is_kernel and tensor.shape[:2] == shape[:2]:
        return resize_kernel(tensor, shape[2])
    return None


def resize_grid(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize absolute positions (1, h, w, C) to (1, *grid, C), bicubically without antialiasing.

    Detectron2 does so in every forward pass, ViTAE-Transformer/ViTDet when loading weights.
    """
    return _bicubic(pos_embed.float().permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1).contiguous()


def resize_table(table: Tensor, rows: int) -> Tensor:
    """Resize relative positions (2 K - 1, d) to (rows, d), linearly (Detectron2's get_rel_pos)."""
    return F.interpolate(table.float().T[None], size=rows, mode="linear")[0].T.contiguous()


def resize_kernel(kernel: Tensor, patch: int) -> Tensor:
    """Resize a patch embedding (C, 3, P, P) to (C, 3, patch, patch) bicubically.

    MAE's ViT-H has 14 x 14 pixel patches, ViTDet's ViT-H has 16 x 16. The authors of ViTDet used
    bicubic interpolation, according to R. Hu in facebookresearch/long_seq_mae, issue 2.
    """
    return _bicubic(kernel.float(), (patch, patch))


def rescale_relative_positions(
    weights: dict[str, Tensor], scaled: bool, wanted: bool
) -> dict[str, Tensor]:
    """Rescale relative positions R if weights and model apply R to differently scaled queries.

    scaled: whether the weights require R to be applied to the scaled query q d^-0.5 instead of q.
    wanted: whether the model does so. The logits do not change: (q d^-0.5) . R = q . (d^-0.5 R).
    """
    if scaled == wanted:
        return weights
    power = -0.5 if scaled else 0.5
    tables = {name: table for name, table in weights.items() if RELATIVE.fullmatch(name)}
    return weights | {name: table * table.shape[1] ** power for name, table in tables.items()}


def _bicubic(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bicubic", align_corners=False)
