"""AdamW with layer-wise learning-rate decay, the learning-rate schedule, and weight averaging.

Layer-wise learning-rate decay: Clark et al., ELECTRA (arXiv:2003.10555), as in BEiT and
Detectron2's ViTDet. AdamW: arXiv:1711.05101.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitdet.config import OptimConfig
from vitdet.models import Detector
from vitdet.models.layers import LayerNorm2d


def parameter_groups(detector: Detector, settings: OptimConfig) -> list[dict]:
    """Return groups {params, names, lr, lr_scale, weight_decay} of all trainable parameters.

    The learning rate of a backbone parameter is lr * layer_decay ** (n + 1 - layer), where layer is
    the result of the backbone's `layer_of` and n is its `num_layers`. For the other parameters, it
    is lr.
    """
    last, layer_of = detector.backbone.num_layers + 1, detector.backbone.layer_of
    exempt = _undecayed(detector, settings.undecayed)
    groups: dict[tuple[float, float], dict] = defaultdict(lambda: {"params": [], "names": []})
    for name, parameter in detector.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if name in exempt else settings.weight_decay
        part, _, inside = name.partition(".")
        scale = settings.layer_decay ** (last - layer_of(inside)) if part == "backbone" else 1.0
        groups[scale, decay]["params"].append(parameter)
        groups[scale, decay]["names"].append(name)
    return [
        {**group, "lr": settings.lr * scale, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), group in groups.items()
    ]


def _undecayed(detector: nn.Module, which: str) -> set[str]:
    if which == "vectors":
        return {
            name
            for name, parameter in detector.named_parameters()
            if parameter.ndim == 1 or "pos_embed" in name or "rel_pos_" in name
        }
    if which == "nothing":
        return set()
    # LayerNorm2d has weight decay, as in Detectron2
    norms = {
        name
        for name, module in detector.named_modules()
        if (isinstance(module, nn.LayerNorm) and not isinstance(module, LayerNorm2d))
        or (which == "norms" and isinstance(module, nn.modules.batchnorm._BatchNorm))
    }
    tables = ("pos_embed", "relative_position_bias_table")
    return {
        name
        for name, _ in detector.named_parameters()
        if name.rpartition(".")[0] in norms or name.endswith(tables)
    }


def build_optimizer(detector: Detector, settings: OptimConfig) -> torch.optim.AdamW:
    """Create AdamW with the parameter groups."""
    groups = parameter_groups(detector, settings)
    for group in groups:
        del group["names"]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)


def clip_gradients(detector: nn.Module, largest: float) -> Tensor:
    """Clip the gradient norm to `largest` (0: no clipping); return the norm before clipping."""
    parameters = list(detector.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if largest:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


def scaled(settings: OptimConfig, batch_size: int) -> OptimConfig:
    """Return the settings with optim.lr scaled to `batch_size` images if scale_lr is set.

    Linear scaling, as in Goyal et al. (arXiv:1706.02677).
    """
    if not settings.scale_lr:
        return settings
    return replace(settings, lr=settings.lr * batch_size / settings.lr_batch_size)


def rate_note(settings: OptimConfig, batch_size: int) -> str:
    """Return a note if the learning rate is for a different batch size, else ''."""
    expected = settings.lr_batch_size
    if batch_size == expected:
        return ""
    fitting = scaled(replace(settings, scale_lr=True), batch_size).lr
    sizes = f"optim.lr={settings.lr:g} is for a batch size of {expected}, but "
    sizes += f"train.batch_size is {batch_size}"
    if settings.scale_lr:
        return f"{sizes}: optim.scale_lr scales it to {fitting:g}"
    return (
        f"{sizes}: optim.lr is not scaled; set optim.scale_lr=true to scale it to {fitting:g}, or "
        f"optim.lr_batch_size={batch_size} if optim.lr is for this batch size"
    )


def lr_factor(step: int, settings: OptimConfig) -> float:
    """Return the learning-rate factor of a step (0-based): warm-up times step or cosine decay."""
    warmup, first = 1.0, settings.warmup_factor
    if step < settings.warmup_steps:
        warmup = first + (1 - first) * step / settings.warmup_steps
    if settings.schedule == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    drops = sum(step >= round(fraction * settings.steps) for fraction in settings.milestones)
    return warmup * 0.1**drops


def set_lr(optimizer: torch.optim.Optimizer, step: int, settings: OptimConfig) -> float:
    """Set the learning rate of every group for a step; return the rate without layer-wise decay."""
    lr = settings.lr * lr_factor(step, settings)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics of all BatchNorms by name."""
    ends = (".running_mean", ".running_var")
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(ends)}


class WeightAverage:
    """Exponential moving average of the weights and BatchNorm statistics (Polyak).

    decay: the maximum decay; 0 disables averaging. The decay increases to this maximum, so that the
    first steps have little influence.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.source = {**dict(model.named_parameters()), **running_statistics(model)}
        averaged = self.source if decay > 0 else {}
        self.weights = {name: tensor.detach().clone() for name, tensor in averaged.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average after step `step` (0-based)."""
        if self.weights:
            decay = min(self.decay, (1 + step) / (10 + step))
            source = [tensor.detach() for tensor in self.source.values()]
            torch._foreach_lerp_(list(self.weights.values()), source, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the averaged weights within the context; restore the trained weights afterwards."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the model's weights."""
        for name, average in self.weights.items():
            weight = self.source[name]
            trained = weight.detach().clone()
            weight.copy_(average)
            average.copy_(trained)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by name of the parameter or BatchNorm statistic."""
        return self.weights

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the average; raises ValueError if the names differ from the model's."""
        if set(state) != set(self.weights):
            raise ValueError("the stored weight average belongs to a different model")
        for name, average in self.weights.items():
            average.copy_(state[name])
