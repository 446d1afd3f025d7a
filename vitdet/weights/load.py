"""Loading weights into a detector: all of them, except for declared parameters that keep their
initial values.

A pre-trained backbone fills the backbone. A complete detector fills everything; if its classes
differ, everything except the layers with one row per class. Position embeddings and patch kernels
of a different size are resized.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vitdet.models.attention import Attention
from vitdet.weights.formats import FORMATS
from vitdet.weights.formats.table import known, to_ours
from vitdet.weights.pickles import metadata, read_file
from vitdet.weights.resize import RELATIVE, rescale_relative_positions, resize
from vitdet.weights.unwrap import check_finite, unwrap

LOGITS = "roi_heads.stages.0.logits.weight"
_ODDS = "roi_heads.classification.class_weights"
_MASK_HEAD = "roi_heads.mask."
_DETECTOR = ("rpn.", "roi_heads.", "pyramid.")
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """The weights of a file under vitdet's names, with metadata."""

    weights: Weights
    layout: str  # the format whose declared differences apply
    # whether relative positions are applied to the scaled query; None: unknown
    scaled: bool | None
    class_names: tuple[str, ...] = ()  # empty: unknown
    notes: tuple[str, ...] = ()  # one line for each removed or ignored part

    @property
    def whole(self) -> bool:
        """Whether it is a complete detector, not only a backbone."""
        return any(name.startswith(_DETECTOR) for name in self.weights)


@dataclass(frozen=True)
class Loaded:
    """The parameters that keep their initial values, and notes for the user."""

    fresh: list[str]
    notes: list[str]


def read_source(path: Path, layout: str) -> Source:
    """Read a file of a format in FORMATS. Raises ValueError or FileNotFoundError."""
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
    if origin in FORMATS:  # converted: follows the conventions of the original format
        scaled = {"true": True, "false": False}.get(stored.get("scaled_rel_pos", ""))
        names = tuple(json.loads(stored.get("class_names", "[]")))
        return Source(weights, origin, scaled, names, tuple(notes))
    scaled = _scaled(content) if layout == "vitdet" else table.scaled
    return Source(weights, layout, scaled, _class_names(content), tuple(notes))


def _scaled(content: dict) -> bool | None:
    """Return the setting scaled_rel_pos of a vitdet checkpoint."""
    try:
        return bool(content["config"]["model"]["backbone"]["scaled_rel_pos"])
    except (KeyError, TypeError):
        return None


def _class_names(content: dict) -> tuple[str, ...]:
    """Return the class names in a checkpoint of vitdet or mmdet, if any."""
    meta = content.get("meta")
    names = content.get("class_names") or (meta.get("CLASSES") if isinstance(meta, dict) else None)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names)


def load_pretrained(
    detector: nn.Module, path: str | Path, layout: str = "vitdet", class_names: Sequence[str] = ()
) -> Loaded:
    """Load the weights of a file into a detector.

    Every tensor must match a parameter in shape, after resizing if possible. Every parameter of the
    backbone (of the detector, if the file contains one) must be in the file, except those that the
    format declares as missing and, if the classes differ, the layers with one row per class.

    Args:
        detector: the detector, changed in place.
        path: the file.
        layout: its format, a key of FORMATS.
        class_names: the classes of the detector.

    Raises:
        ValueError: tensors do not match; nothing is loaded.
        FileNotFoundError: no such file.
    """
    path, own = Path(path), detector.state_dict()
    weights, notes = fitted(read_source(path, layout), detector, path, class_names)
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
    return Loaded([name for name in own if name not in weights], notes)


def fitted(
    source: Source, detector: nn.Module, path: Path, class_names: Sequence[str] = ()
) -> tuple[Weights, list[str]]:
    """Return the weights that `load_pretrained` copies, and a line per change and unloaded layer.

    The detector may be on the meta device. Raises the errors of `load_pretrained`.
    """
    weights, own, notes = source.weights, detector.state_dict(), list(source.notes)
    attention = (part for part in detector.modules() if isinstance(part, Attention))
    wanted = next((part.scaled_rel_pos for part in attention), None)
    differs = None not in (source.scaled, wanted) and source.scaled != wanted
    if differs and any(map(RELATIVE.fullmatch, weights)):
        weights = rescale_relative_positions(weights, bool(source.scaled), bool(wanted))
        query = f"the {'scaled' if wanted else 'unscaled'} query"
        notes.append(f"relative positions: rescaled for this model, which applies them to {query}")
    afresh: set[str] = set()
    if source.whole:
        layers, why = _other_classes(weights, own, source.class_names, tuple(class_names))
        for name in sorted(layers):
            what = "newly initialized" if name in own else "not loaded"
            notes.append(f"{name}: {what} ({why})")
        mask_head, note = _other_mask_head(weights, own)
        notes += [note] if note else []
        afresh = layers | mask_head
        if not afresh and class_names and not source.class_names:
            notes.append(
                f"{len(class_names)} classes, as many as in the file, which does not contain their "
                "names: their layers are loaded"
            )
    weights, lines = _fit(weights, own, source, afresh, path)
    return weights, [*notes, *lines]


def has_mask_head(source: Source) -> bool:
    """Return whether the file of a detector has a mask head."""
    return any(name.startswith(_MASK_HEAD) for name in source.weights)


def _other_mask_head(weights: Weights, own: Weights) -> tuple[set[str], str]:
    """Return the names of a mask head that only the file or only the detector has, and a note."""
    there, here = (
        {name for name in names if name.startswith(_MASK_HEAD)} for names in (weights, own)
    )
    if there and not here:
        return there, f"{_MASK_HEAD}*: not loaded (this detector has no mask head)"
    if here and not there:
        return here, f"{_MASK_HEAD}*: newly initialized (the file has no mask head)"
    return set(), ""


def _other_classes(
    weights: Weights, own: Weights, theirs: tuple[str, ...], ours: tuple[str, ...]
) -> tuple[set[str], str]:
    """Return the class-specific layers of either detector that are not loaded, and the reason."""
    if LOGITS not in weights or LOGITS not in own:
        return set(), ""
    there, here = len(weights[LOGITS]) - 1, len(own[LOGITS]) - 1
    layers = class_layers(own) | class_layers(weights)
    if there != here:
        return layers, f"{there} classes in the file, {here} here"
    if theirs and ours and theirs != ours:
        first = next(pair for pair in zip(theirs, ours, strict=True) if pair[0] != pair[1])
        return layers, f"other classes, such as {first[0]!r} in the file and {first[1]!r} here"
    return ({_ODDS} if (_ODDS in own) != (_ODDS in weights) else set()), "a different loss"


def class_layers(weights: Weights) -> set[str]:
    """Return the layers with one row per class; a cascade's box deltas are class-agnostic."""
    patterns = ["roi_heads.stages.{}.logits.{}", "roi_heads.mask.logits.{}", _ODDS]
    if not any(name.startswith("roi_heads.stages.1.") for name in weights):
        patterns.append("roi_heads.stages.0.deltas.{}")
    return {name for name in weights if known(name, patterns)}


def _fit(
    weights: Weights, own: Weights, source: Source, afresh: set[str], path: Path
) -> tuple[Weights, list[str]]:
    """Return the detector's weights in its shapes, and one line per kind of resized tensor."""
    layout = FORMATS[source.layout]
    fitting: Weights = {}
    surplus: list[str] = []
    shapes: list[str] = []
    types: list[str] = []
    resized: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = defaultdict(list)
    for name, tensor in weights.items():
        if name in afresh:
            continue
        if name not in own:
            if source.whole or not known(name, layout.spare):
                surplus.append(name)
            continue
        # e.g. the integers of a quantized model
        if tensor.is_floating_point() != own[name].is_floating_point():
            types.append(f"{name} {tensor.dtype}, expected {own[name].dtype}")
            continue
        before, shape = tuple(tensor.shape), tuple(own[name].shape)
        fitted: Tensor | None = tensor
        if before != shape:
            fitted = resize(name, tensor, shape) if tensor.numel() else None
            resized[before, shape].append(name)
        if fitted is None:
            shapes.append(f"{name} {before}, expected {shape}")
        else:
            fitting[name] = fitted
    lacking = [name for name in own if name not in weights and name not in afresh]
    missing = [
        name
        for name in lacking
        if source.whole or (name.startswith("backbone.") and not known(name, layout.fresh))
    ]
    if surplus or missing or shapes or types:
        kinds = {"unexpected": surplus, "missing": missing}
        kinds |= {"wrong shape:": shapes, "wrong type:": types}
        problems = [
            f"{len(names)} tensors: {what} {', '.join(names[:3])}"
            for what, names in kinds.items()
            if names
        ]
        if surplus and source.layout == "vitdet":
            problems.append("is it in a different format (train.init_format, --format)?")
        kind = "detector" if source.whole else "backbone"
        raise ValueError(f"{path}: does not fit this {kind}: {'; '.join(problems)}")
    return fitting, [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: resized from {before} to "
        f"{after}"
        for (before, after), names in resized.items()
    ]
