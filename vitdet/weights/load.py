"""Loading of weights into a detector.

A file contains a pre-trained backbone or a complete detector. Position embeddings and patch kernels
of a different size are resized.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from vitdet.checkpoint import HEADER
from vitdet.models.attention import Attention
from vitdet.weights.formats import FORMATS
from vitdet.weights.formats.table import known, to_ours
from vitdet.weights.pickles import metadata, read_file
from vitdet.weights.resize import RELATIVE, rescale_relative_positions, resize
from vitdet.weights.unwrap import check_finite, unwrap

LOGITS = "roi_heads.stages.0.logits.weight"
_CLASS_WEIGHTS = "roi_heads.classification.class_weights"
_MASK_HEAD = "roi_heads.mask."
_DETECTOR = ("rpn.", "roi_heads.", "pyramid.")
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """A file's weights under vitdet's names, with metadata."""

    weights: Weights
    layout: str  # key of the format whose `fresh` and `spare` apply
    # whether relative positions are applied to the scaled query; None: unknown
    scaled: bool | None
    class_names: tuple[str, ...] = ()  # empty: unknown
    notes: tuple[str, ...] = ()  # messages about removed prefixes and ignored tensors

    @property
    def whole(self) -> bool:
        """Whether the file contains a complete detector, not only a backbone."""
        return any(name.startswith(_DETECTOR) for name in self.weights)


@dataclass(frozen=True)
class Loaded:
    """Names of the tensors that keep their initial values, and notes for the user."""

    fresh: list[str]
    notes: list[str]


def read_source(path: Path, layout: str) -> Source:
    """Read a file in format `layout`, a key of FORMATS; raises ValueError or FileNotFoundError."""
    table, content = FORMATS[layout], read_file(path)
    try:
        theirs, notes = unwrap(content, table, path)
        weights = to_ours(theirs, table)
        check_finite(weights, path)
    except (ValueError, RuntimeError) as error:
        prefix = "" if str(error).startswith(str(path)) else f"{path}, read as {layout}: "
        raise ValueError(f"{prefix}{next(iter(str(error).splitlines()), 'broken')}") from error
    if not weights:
        found = ", ".join(list(theirs)[:3])
        text = f"contains no tensors that a detector uses; found {found}"
        raise ValueError(f"{path}, read as {layout}: {text}")
    if heads := [name for name in theirs if known(name, table.heads)]:
        notes.append(f"ignored classifier head: {', '.join(heads)}")
    stored = metadata(path)
    origin = stored.get("layout")
    if origin in FORMATS:  # a converted file keeps the conventions of its original format
        scaled = {"true": True, "false": False}.get(stored.get("scaled_rel_pos", ""))
        names = tuple(json.loads(stored.get("class_names", "[]")))
        return Source(weights, origin, scaled, names, tuple(notes))
    if HEADER in stored:  # a registered detector
        content = json.loads(stored[HEADER])
    scaled = _scaled(content) if layout == "vitdet" else table.scaled
    return Source(weights, layout, scaled, _class_names(content), tuple(notes))


def _scaled(content: dict) -> bool | None:
    """Return the setting scaled_rel_pos in a vitdet checkpoint, or None."""
    try:
        return bool(content["config"]["model"]["backbone"]["scaled_rel_pos"])
    except (KeyError, TypeError):
        return None


def _class_names(content: dict) -> tuple[str, ...]:
    """Return the class names in a vitdet or mmdet checkpoint; () if there are none."""
    meta = content.get("meta")
    names = content.get("class_names") or (meta.get("CLASSES") if isinstance(meta, dict) else None)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names)


def load_pretrained(
    detector: nn.Module, path: str | Path, layout: str = "vitdet", class_names: Sequence[str] = ()
) -> Loaded:
    """Load the weights of a file into a detector.

    Names and shapes must match; position embeddings and patch kernels are resized. A backbone's
    file may lack the parameters `Format.fresh` and contain the parameters `Format.spare`. Skips
    class-specific layers if the classes differ, and a mask head missing in the file or detector.

    Args:
        detector: the detector, changed in place.
        path: the file.
        layout: the file's format, a key of FORMATS.
        class_names: the detector's classes; empty: unknown.

    Raises:
        ValueError: tensors do not match; nothing is loaded.
        FileNotFoundError: no such file.
    """
    path, state = Path(path), detector.state_dict()
    weights, notes = fitted(read_source(path, layout), detector, path, class_names)
    with torch.no_grad():
        for name, tensor in weights.items():
            state[name].copy_(tensor)
    return Loaded([name for name in state if name not in weights], notes)


def fitted(
    source: Source, detector: nn.Module, path: Path, class_names: Sequence[str] = ()
) -> tuple[Weights, list[str]]:
    """Return the weights that `load_pretrained` copies, and one line per change or skipped layer.

    The detector may be on the meta device. Raises the errors of `load_pretrained`.
    """
    weights, state, notes = source.weights, detector.state_dict(), list(source.notes)
    attention = (module for module in detector.modules() if isinstance(module, Attention))
    wanted = next((module.scaled_rel_pos for module in attention), None)
    differs = None not in (source.scaled, wanted) and source.scaled != wanted
    if differs and any(map(RELATIVE.fullmatch, weights)):
        weights = rescale_relative_positions(weights, bool(source.scaled), bool(wanted))
        query = f"the {'scaled' if wanted else 'unscaled'} query"
        notes.append(f"relative positions: rescaled for this model, which applies them to {query}")
    skipped: set[str] = set()
    if source.whole:
        layers, why = _other_classes(weights, state, source.class_names, tuple(class_names))
        for name in sorted(layers):
            what = "newly initialized" if name in state else "not loaded"
            notes.append(f"{name}: {what} ({why})")
        mask_head, note = _other_mask_head(weights, state)
        notes += [note] if note else []
        skipped = layers | mask_head
        if not skipped and class_names and not source.class_names:
            notes.append(
                "the file contains no class names, but the same number of classes "
                f"({len(class_names)}): the class-specific layers are loaded"
            )
    weights, lines = _fit(weights, state, source, skipped, path)
    return weights, [*notes, *lines]


def has_mask_head(source: Source) -> bool:
    """Return whether a detector's file contains a mask head."""
    return any(name.startswith(_MASK_HEAD) for name in source.weights)


def _other_mask_head(weights: Weights, state: Weights) -> tuple[set[str], str]:
    """Return the tensor names of a mask head that the file or the detector lacks, and a note."""
    there, here = (
        {name for name in names if name.startswith(_MASK_HEAD)} for names in (weights, state)
    )
    if there and not here:
        return there, f"{_MASK_HEAD}*: not loaded (this detector has no mask head)"
    if here and not there:
        return here, f"{_MASK_HEAD}*: newly initialized (the file has no mask head)"
    return set(), ""


def _other_classes(
    weights: Weights, state: Weights, theirs: tuple[str, ...], ours: tuple[str, ...]
) -> tuple[set[str], str]:
    """Return the layers that are not loaded because classes or losses differ, and the reason."""
    if LOGITS not in weights or LOGITS not in state:
        return set(), ""
    there, here = len(weights[LOGITS]) - 1, len(state[LOGITS]) - 1
    layers = class_layers(state) | class_layers(weights)
    if there != here:
        return layers, f"number of classes: {there} in the file, {here} in this model"
    if theirs and ours and theirs != ours:
        pairs = zip_longest(theirs, ours, fillvalue="")
        first = next(pair for pair in pairs if pair[0] != pair[1])
        return layers, f"classes differ, e.g. {first[0]!r} in the file, {first[1]!r} in this model"
    other_loss = (_CLASS_WEIGHTS in state) != (_CLASS_WEIGHTS in weights)
    return ({_CLASS_WEIGHTS} if other_loss else set()), "a different loss"


def class_layers(weights: Weights) -> set[str]:
    """Return the names of class-specific parameters; a cascade's box deltas are class-agnostic."""
    patterns = ["roi_heads.stages.{}.logits.{}", "roi_heads.mask.logits.{}", _CLASS_WEIGHTS]
    if not any(name.startswith("roi_heads.stages.1.") for name in weights):
        patterns.append("roi_heads.stages.0.deltas.{}")
    return {name for name in weights if known(name, patterns)}


def _fit(
    weights: Weights, state: Weights, source: Source, skipped: set[str], path: Path
) -> tuple[Weights, list[str]]:
    """Return the weights, resized to the detector's shapes, and one line per change of shape."""
    layout = FORMATS[source.layout]
    fitting: Weights = {}
    surplus: list[str] = []
    shapes: list[str] = []
    types: list[str] = []
    resized: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = defaultdict(list)
    for name, tensor in weights.items():
        if name in skipped:
            continue
        if name not in state:
            if source.whole or not known(name, layout.spare):
                surplus.append(name)
            continue
        # for example, a quantized model contains integers
        if tensor.is_floating_point() != state[name].is_floating_point():
            types.append(f"{name} {tensor.dtype}, expected {state[name].dtype}")
            continue
        before, shape = tuple(tensor.shape), tuple(state[name].shape)
        fitted: Tensor | None = tensor
        if before != shape:
            fitted = resize(name, tensor, shape) if tensor.numel() else None
            resized[before, shape].append(name)
        if fitted is None:
            shapes.append(f"{name} {before}, expected {shape}")
        else:
            fitting[name] = fitted
    lacking = [name for name in state if name not in weights and name not in skipped]
    missing = [
        name
        for name in lacking
        if source.whole or (name.startswith("backbone.") and not known(name, layout.fresh))
    ]
    if surplus or missing or shapes or types:
        kinds = {"unexpected tensors": surplus, "missing tensors": missing}
        kinds |= {"wrong shapes": shapes, "wrong types": types}
        problems = [
            f"{what} ({len(names)}): {', '.join(names[:3])}"
            for what, names in kinds.items()
            if names
        ]
        if surplus and source.layout == "vitdet":
            problems.append("is the file in a different format (train.init_format, --format)?")
        kind = "detector" if source.whole else "backbone"
        raise ValueError(f"{path}: does not fit this {kind}: {'; '.join(problems)}")
    return fitting, [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: resized from {before} to "
        f"{after}"
        for (before, after), names in resized.items()
    ]
