"""Masked-autoencoder pre-training of the tiny backbone on generated images, without labels.

He et al., Masked Autoencoders Are Scalable Vision Learners (arXiv:2111.06377): the encoder
processes a quarter of the patches, and a small decoder reconstructs half of the other patches. The
images are drawn with a seed that neither split of the tiny data set uses. The weights in the
package are the output of `vitdet weights pretrain OUTPUT`.

Notation: B images, S image side, N tokens, V selected tokens, C channels.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vitdet.config import load_config
from vitdet.demo.tiny import PRETRAIN_SEED, draw_scene
from vitdet.models import build_backbone
from vitdet.models.attention import attend
from vitdet.models.detector import PIXEL_MEAN, PIXEL_STD
from vitdet.models.layers import LayerNorm
from vitdet.models.vit import Block, ViT
from vitdet.weights import NOT_PRETRAINED
from vitdet.weights.convert import save_tensors

log = logging.getLogger(__name__)

# fractions of the patches; only half of the masked patches are reconstructed, to save time
VISIBLE, RECONSTRUCTED = (0.25, 0.375)


def run_block(block: nn.Module, x: Tensor) -> Tensor:
    """Apply a block to tokens (B, N, C), with global attention and no relative positions."""
    assert isinstance(block, Block)
    attention = block.attn
    qkv, pattern = attention.qkv(block.norm1(x)), "b n (three h d) -> three b h n d"
    q, k, v = rearrange(qkv, pattern, three=3, h=attention.heads)
    y = attend(q * q.shape[-1] ** -0.5, k, v)
    x = x + attention.proj(rearrange(y, "b h n d -> b n (h d)"))
    return x + block.mlp(block.norm2(x))


class MaskedAutoencoder(nn.Module):
    """A ViT's embedding and blocks as the encoder, and a small decoder for masked patches."""

    def __init__(self, encoder: ViT, decoder_dim: int = 96, decoder_depth: int = 2) -> None:
        super().__init__()
        self.encoder, self.patch = encoder, encoder.stride
        grid, dim = encoder.pos_embed.shape[1], encoder.out_channels
        self.norm = LayerNorm(dim)
        self.into_decoder = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.positions = nn.Parameter(torch.randn(1, grid * grid, decoder_dim) * 0.02)
        self.decoder = nn.ModuleList(
            Block(
                dim=decoder_dim,
                heads=2,
                window=0,
                grid=grid,
                drop_path=0.0,
                conv_after=False,
                mlp_ratio=4.0,
                scaled_rel_pos=False,
                branch=None,
            )
            for _ in range(decoder_depth)
        )
        pixels = nn.Linear(decoder_dim, 3 * self.patch**2)
        self.to_pixels = nn.Sequential(LayerNorm(decoder_dim), pixels)

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean squared error of the reconstructed patches of images (B, 3, S, S).

        Expects normalized images. The target is each patch normalized to mean 0 and variance 1.
        """
        tokens = self.encoder.embed(images).flatten(1, 2)
        count = tokens.shape[1]
        order = torch.rand(tokens.shape[:2], device=tokens.device).argsort(dim=1)
        shown, used = int(count * VISIBLE), int(count * VISIBLE) + int(count * RECONSTRUCTED)
        visible, hidden = order[:, :shown], order[:, shown:used]
        x = take(tokens, visible)
        for block in self.encoder.blocks:
            x = run_block(block, x)
        x = self.into_decoder(self.norm(x))
        masked = self.mask_token.expand(len(x), used - shown, -1).to(x.dtype)
        positions = self.positions.expand(len(x), -1, -1)
        x = torch.cat([x, masked], dim=1) + take(positions, order[:, :used])
        for layer in self.decoder:
            x = run_block(layer, x)
        predicted = self.to_pixels(x[:, shown:]).float()
        pattern = "b c (h p) (w q) -> b (h w) (c p q)"
        target = take(rearrange(images, pattern, p=self.patch, q=self.patch), hidden)
        deviation = (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        target = (target - target.mean(dim=-1, keepdim=True)) / deviation
        return F.mse_loss(predicted, target)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Return the tokens (B, V, C) at `index` (B, V) of tokens (B, N, C)."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def draw(index: int, side: int) -> np.ndarray:
    """Draw scene `index` of PRETRAIN_SEED; pad it to (side, side, 3) uint8 by reflection."""
    image = draw_scene(PRETRAIN_SEED, index).image
    padding = [(0, side - image.shape[0]), (0, side - image.shape[1]), (0, 0)]
    return np.pad(image, padding, mode="symmetric")


def pictures(count: int, side: int) -> Tensor:
    """Draw images (count, 3, side, side) uint8, using all processors."""
    with multiprocessing.get_context("fork").Pool() as pool:
        drawn = pool.map(partial(draw, side=side), range(count), chunksize=64)
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Normalize images (B, 3, S, S); shift or flip them, and transpose them, at random.

    The shift is cyclic. All images are changed in the same way.
    """
    side = images.shape[-1]
    dy, dx, flip, transpose = torch.randint(0, side, (4,), generator=generator).tolist()
    images = images.roll((dy, dx), dims=(2, 3)) if flip % 4 == 0 else images
    images = images.flip(3) if flip % 2 else images
    images = images.transpose(2, 3) if transpose % 2 else images
    mean, std = torch.tensor(PIXEL_MEAN).view(3, 1, 1), torch.tensor(PIXEL_STD).view(3, 1, 1)
    return (images.float() - mean) / std


def pretrain(
    recipe: str,
    output: Path,
    *,
    count: int = 24_000,
    steps: int = 6000,
    batch_size: int = 64,
    lr: float = 1.5e-3,
    seed: int = 0,
) -> None:
    """Pre-train the recipe's backbone on `count` images and write its weights as float16."""
    torch.manual_seed(seed)
    config = load_config(recipe)
    encoder = build_backbone(config.model)
    if not isinstance(encoder, ViT):
        raise ValueError(f"{recipe}: expected a plain ViT, got {config.model.backbone.name}")
    model = MaskedAutoencoder(encoder)
    started = time.perf_counter()
    images = pictures(count, config.data.image_size)
    log.info("%d images drawn in %.0f s", count, time.perf_counter() - started)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for step in range(steps):
        chosen = torch.randint(0, count, (batch_size,), generator=generator)
        batch = augment(images[chosen], generator)
        warmup = min(1.0, (step + 1) / (0.05 * steps))
        optimizer.param_groups[0]["lr"] = lr * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        done = step + 1
        if done % 100 == 0:
            seconds = time.perf_counter() - started
            log.info("step %d/%d  loss %.4f  %.0f s", done, steps, total / 100, seconds)
            total = 0.0
        if done % 1000 == 0 or done == steps:
            export(model.encoder, output)


def export(encoder: ViT, output: Path) -> None:
    """Write the backbone's weights, except NOT_PRETRAINED, with the keys of a detector."""
    weights = {
        f"backbone.{name}": tensor.detach().half()
        for name, tensor in encoder.state_dict().items()
        if not any(part in name for part in NOT_PRETRAINED)
    }
    save_tensors(output, weights, {"format": "pt", "holds": "backbone"})
