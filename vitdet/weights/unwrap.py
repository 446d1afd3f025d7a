"""Extraction of the state dict from a checkpoint, and removal of prefixes from parameter names.

DistributedDataParallel and AveragedModel prefix names with `module.`, torch.compile with
`_orig_mod.`; Lightning modules often add `model.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vitdet.weights.formats.table import Format, known

# Keys under which DINO, DINOv2, timm, YOLO, Lightning, mmengine and fairseq store weights; keys of
# averaged weights come first.
KEYS = """
teacher state_dict_ema model_ema ema_state_dict ema
state_dict model_state_dict model_state model module weights params
""".split()
# Prefixes of names; if only a submodule was compiled, _orig_mod. is inside the name
PREFIX = re.compile(r"^(?:(?:module|model|ema|_orig_mod)\.)+|(?<=\.)_orig_mod\.")
COUNTER = "n_averaged"  # step counter of torch.optim.swa_utils.AveragedModel
DEPTH = 4  # maximum depth of nested dictionaries


def unwrap(content: Mapping, layout: Format, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return a checkpoint's tensors by name without prefixes, and notes about what was removed.

    The keys of the format's trainer (`layout.wrappers`) take precedence over `KEYS`. If names begin
    with one of `layout.parts`, such as `encoder.`, only the tensors with this prefix and the
    classifier heads (`layout.heads`) are returned. Raises ValueError if weights are missing,
    entries are not tensors, or two names become equal.
    """
    inside, notes = _innermost(content, layout.wrappers)
    _check_tensors(inside, content, path)
    plain = {name: PREFIX.sub("", name) for name in inside}
    plain = {name: short for name, short in plain.items() if short != COUNTER}
    prefixes = {found[0] for name in plain for found in PREFIX.finditer(name)}
    removed = f"prefix{'es' if len(prefixes) > 1 else ''} {' and '.join(sorted(prefixes))}"
    if len(set(plain.values())) < len(plain):
        raise ValueError(f"{path}: contains names that differ only by the {removed}")
    if prefixes:
        notes.append(f"names: removed the {removed}")
    weights = {short: inside[name] for name, short in plain.items()}
    for part in layout.parts:
        names = [name for name in weights if name.startswith(part)]
        if names:
            # names of classifier heads may lack this prefix; the caller reports ignored heads
            rest = {name: x for name, x in weights.items() if not name.startswith(part)}
            heads = {name: x for name, x in rest.items() if known(name, layout.heads)}
            others = len(rest) - len(heads)
            ignored = f"; other tensors ignored: {others}" if others else ""
            notes.append(f"names: removed the prefix {part}{ignored}")
            weights = heads | {name.removeprefix(part): weights[name] for name in names}
    return weights, notes


def check_finite(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError, with the name of a tensor, if tensors contain NaN or infinite values."""
    floats = {name: x for name, x in weights.items() if x.is_floating_point()}
    broken = [name for name, x in floats.items() if not torch.isfinite(x).all()]
    if broken:
        raise ValueError(
            f"{path}: tensors with NaN or infinite values ({len(broken)}): {broken[0]}; "
            "use an earlier checkpoint"
        )


def _innermost(content: Mapping, keys: tuple[str, ...]) -> tuple[Mapping, list[str]]:
    """Return the weights, and a note if their key is unusual or other dicts are ignored."""
    order = (*keys, *(key for key in KEYS if key not in keys))
    found: list[str] = []
    others: list[str] = []
    for _ in range(DEPTH):
        inside = [key for key in order if _contains_tensors(content.get(key))]
        if not inside:
            break
        found.append(inside[0])
        others += inside[1:]
        content = content[inside[0]]
    if not others and (not found or (len(found) == 1 and found[0] in keys)):
        return content, []
    ignored = f"; ignored: {', '.join(map(repr, others))}" if others else ""
    return content, [f"weights: read from {' in '.join(map(repr, reversed(found)))}{ignored}"]


def _contains_tensors(value: object, depth: int = DEPTH) -> bool:
    """Return whether a value is a dict that contains a tensor, possibly in nested dicts."""
    return isinstance(value, Mapping) and any(
        isinstance(item, Tensor) or (depth > 1 and _contains_tensors(item, depth - 1))
        for item in value.values()
    )


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
            f"{path}: expected tensors by name, or a dict of them under a key such as state_dict "
            f"or model; found {listed}"
        )
    few = ", ".join(strange[:3])
    raise ValueError(f"{path}: entries that are not complete tensors ({len(strange)}): {few}")


def _is_whole(value: object) -> bool:
    """Return whether a value is a dense tensor whose storage contains all of its elements."""
    if not isinstance(value, Tensor) or value.device.type != "cpu" or value.layout != torch.strided:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()
