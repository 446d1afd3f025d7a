"""Loading weights into a detector: exactly, except for declared parameters that keep their
initialization.

A pre-trained backbone fills the backbone. A complete detector fills everything; if its classes
differ, everything except the layers with one row per class. Position embeddings and patch kernels
of another size are resized.
"""

from __future__ import annotations

import json
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


@dataclass(frozen=True)
class Source:
    """The weights of a file under vitdet's names, with metadata."""

    weights: dict[str, Tensor]
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
    """Result of loading weights: the parameters that keep their initialization, and notes for the
    user.
    """

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
        raise ValueError(
            f"{path}, read as {layout}: contains no tensors that a detector uses; found "
            f"{', '.join(list(theirs)[:3])}"
        )
    if heads := [name for name in theirs if known(name, table.heads)]:
        notes.append(f"ignored classifier head: {', '.join(heads)}")
    said = metadata(path)
    if said.get("layout") in FORMATS:  # converted: the differences of the original format apply
        origin = said["layout"]
        scaled = {"true": True, "false": False}.get(said.get("scaled_rel_pos", ""))
        names = tuple(json.loads(said.get("class_names", "[]")))
    else:
        origin, names = layout, _class_names(content)
        scaled = _scaled(content) if layout == "vitdet" else table.scaled
    return Source(weights, origin, scaled, names, tuple(notes))


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
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights that `load_pretrained` copies, and one line per change and per layer that
    is not loaded. The detector may be on the meta device. Raises as `load_pretrained`.
    """
    weights, own = source.weights, detector.state_dict()
    notes = list(source.notes)
    wanted = next(
        (part.scaled_rel_pos for part in detector.modules() if isinstance(part, Attention)), None
    )
    if (
        source.scaled is not None
        and wanted is not None
        and source.scaled != wanted
        and any(map(RELATIVE.fullmatch, weights))
    ):
        weights = rescale_relative_positions(weights, source.scaled, wanted)
        notes.append(
            "relative positions: rescaled for this model, which applies them to the "
            f"{'scaled' if wanted else 'unscaled'} query"
        )
    afresh = (
        _other_classes(weights, own, source.class_names, tuple(class_names)) if source.whole else {}
    )
    notes += [
        f"{name}: {'newly initialized' if name in own else 'not loaded'} ({why})"
        for name, why in afresh.items()
    ]
    if source.whole:
        names, note = _other_mask_head(weights, own)
        afresh |= dict.fromkeys(names, note)
        notes += [note] if note else []
    if source.whole and not afresh and class_names and not source.class_names:
        notes.append(
            f"{len(class_names)} classes, as many as in the file, which does not contain their "
            "names: their layers are loaded"
        )
    weights, lines = _fit(
        {name: tensor for name, tensor in weights.items() if name not in afresh},
        own,
        source,
        set(afresh),
        path,
    )
    return weights, [*notes, *lines]


def has_mask_head(source: Source) -> bool:
    """Return whether the file of a detector has a mask head."""
    return any(name.startswith(_MASK_HEAD) for name in source.weights)


def _other_mask_head(weights: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[set[str], str]:
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
    weights: dict[str, Tensor],
    own: dict[str, Tensor],
    theirs: tuple[str, ...],
    ours: tuple[str, ...],
) -> dict[str, str]:
    """Return the class-specific layers of either detector that are not loaded, with the reason."""
    if LOGITS not in weights or LOGITS not in own:
        return {}
    there, here = len(weights[LOGITS]) - 1, len(own[LOGITS]) - 1
    layers = class_layers(own) | class_layers(weights)
    if there != here:
        return dict.fromkeys(sorted(layers), f"{there} classes in the file, {here} here")
    if theirs and ours and theirs != ours:
        first = next(pair for pair in zip(theirs, ours, strict=True) if pair[0] != pair[1])
        return dict.fromkeys(
            sorted(layers), f"other classes, such as {first[0]!r} in the file and {first[1]!r} here"
        )
    return {_ODDS: "another loss"} if (_ODDS in own) != (_ODDS in weights) else {}


def class_layers(weights: dict[str, Tensor]) -> set[str]:
    """Return the layers with one row per class; a cascade's box deltas are class-agnostic."""
    patterns = ["roi_heads.stages.{}.logits.{}", "roi_heads.mask.logits.{}", _ODDS]
    if not any(name.startswith("roi_heads.stages.1.") for name in weights):
        patterns.append("roi_heads.stages.0.deltas.{}")
    return {name for name in weights if known(name, patterns)}


def _fit(
    weights: dict[str, Tensor], own: dict[str, Tensor], source: Source, afresh: set[str], path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the detector's weights in its shapes, and one line per kind of resized tensor."""
    layout = FORMATS[source.layout]
    fitting: dict[str, Tensor] = {}
    surplus: list[str] = []
    shapes: list[str] = []
    types: list[str] = []
    resized: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name, tensor in weights.items():
        if name not in own:
            if source.whole or not known(name, layout.spare):
                surplus.append(name)
            continue
        # e.g. the integers of a quantized model
        if tensor.is_floating_point() != own[name].is_floating_point():
            types.append(f"{name} {tensor.dtype}, expected {own[name].dtype}")
            continue
        shape = tuple(own[name].shape)
        fitted = (
            tensor
            if tuple(tensor.shape) == shape
            else resize(name, tensor, shape)
            if tensor.numel()
            else None
        )
        if fitted is None:
            shapes.append(f"{name} {tuple(tensor.shape)}, expected {shape}")
            continue
        fitting[name] = fitted
        if fitted is not tensor:
            resized.setdefault((tuple(tensor.shape), shape), []).append(name)
    missing = [
        name
        for name in own
        if name not in weights
        and name not in afresh
        and (source.whole or name.startswith("backbone.") and not known(name, layout.fresh))
    ]
    if surplus or missing or shapes or types:
        hint = (
            "is it of another format (train.init_format, --format)?"
            if surplus and source.layout == "vitdet"
            else ""
        )
        raise ValueError(
            f"{path}: does not fit this {'detector' if source.whole else 'backbone'}: "
            f"{_few('unexpected', surplus)}{_few('missing', missing)}"
            f"{_few('wrong shape:', shapes)}"
            f"{_few('wrong type:', types)}{hint}".rstrip("; ")
        )
    return fitting, [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: resized from {before} to "
        f"{after}"
        for (before, after), names in resized.items()
    ]


def _few(what: str, names: list[str]) -> str:
    return f"{len(names)} tensors: {what} {', '.join(names[:3])}; " if names else ""
