"""The weights inside what trainings wrap around them: tables in tables, and prefixes before all names.

DistributedDataParallel and AveragedModel prefix names with `module.`, torch.compile with `_orig_mod.`, Lightning
modules with `model.`; checkpoints keep the weights beside those of the optimizer, and averaged ones beside both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

# Keys under which trainers keep weights, averaged ones first: DINO, DINOv2, timm, YOLO, Lightning, mmengine, fairseq.
KEYS = (
    "teacher",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "weights",
    "params",
)
# Before a name, and after its first pieces where a part of the model was wrapped
PREFIX = re.compile(r"^(?:(?:module|model|ema|_orig_mod)\.)+|(?<=\.)_orig_mod\.")
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel
DEPTH = 4  # of tables in tables


def unwrap(
    content: Mapping, keys: tuple[str, ...], parts: tuple[str, ...], path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a checkpoint by plain names, and a line on each thing that was taken off.

    keys: where the layout's own trainer keeps the weights, looked for before `KEYS`. parts: prefixes of the part that
    the layout describes, such as `encoder.`; if names have one, the other names are left out.
    Raises ValueError if there are no weights, if something else than tensors is among them, or if two names are the
    same without prefixes.
    """
    inside, notes = _innermost(content, keys)
    _check_tensors(inside, content, path)
    plain = {name: PREFIX.sub("", name) for name in inside if name != COUNTER}
    taken = sorted({found[0] for name in plain for found in PREFIX.finditer(name)})
    if len(set(plain.values())) < len(plain):
        raise ValueError(f"{path}: the same names with and without {' and '.join(taken)}")
    if taken:
        notes.append(f"names: without the prefix {' and '.join(taken)}")
    weights = {short: inside[name] for name, short in plain.items()}
    for part in parts:
        chosen = {
            name.removeprefix(part): one for name, one in weights.items() if name.startswith(part)
        }
        if chosen:
            others = len(weights) - len(chosen)
            notes.append(
                f"names: without the prefix {part}{f'; {others} other tensors left out' if others else ''}"
            )
            weights = chosen
    return weights, notes


def check_finite(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError if a tensor has values that are not finite, with its name."""
    broken = [
        f"{name} ({'NaN' if one.isnan().any() else 'infinity'})"
        for name, one in weights.items()
        if one.is_floating_point() and not torch.isfinite(one).all()
    ]
    if broken:
        raise ValueError(
            f"{path}: {len(broken)} tensors with values that are not finite, such as {broken[0]}; "
            "the training that wrote them had diverged, take an earlier checkpoint"
        )


def _innermost(content: Mapping, keys: tuple[str, ...]) -> tuple[Mapping, list[str]]:
    """The table of weights, and a line if it was under other keys than the layout's own."""
    order = (*keys, *(key for key in KEYS if key not in keys))
    found: list[str] = []
    others: list[str] = []
    for _ in range(DEPTH):
        tables = [key for key in order if isinstance(content.get(key), Mapping) and content[key]]
        if not tables:
            break
        found.append(tables[0])
        others += tables[1:]
        content = content[tables[0]]
    if not others and (not found or (len(found) == 1 and found[0] in keys)):
        return content, []
    left = f"; left out: {', '.join(map(repr, others))}" if others else ""
    return content, [f"weights: those under {' in '.join(map(repr, reversed(found)))}{left}"]


def _check_tensors(inside: Mapping, content: Mapping, path: Path) -> None:
    strange = [
        f"{name} ({type(value).__name__})"
        for name, value in inside.items()
        if not isinstance(name, str) or not _is_whole(value)
    ]
    if inside and not strange:
        return
    if inside is content and not any(isinstance(value, Tensor) for value in inside.values()):
        listed = ", ".join(map(str, list(content)[:6])) or "nothing"
        raise ValueError(
            f"{path}: expected tensors by name, or a table of them under a key such as state_dict or "
            f"model; found {listed}"
        )
    raise ValueError(
        f"{path}: {len(strange)} of its weights are no whole tensors, such as {strange[0]}"
    )


def _is_whole(value: object) -> bool:
    """A tensor with a number in the file for each of its elements: no promise of a billion zeros."""
    if not isinstance(value, Tensor) or value.device.type != "cpu" or value.layout != torch.strided:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()
