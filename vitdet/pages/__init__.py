"""Self-contained HTML pages, rendered from jinja2 templates that extend `base.html`.

A page loads no other files: images are data URIs, and the content security policy forbids requests.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image


def render(template: str, values: Mapping[str, object]) -> str:
    """Render a template with escaped values; `template` is its path in the vitdet package."""
    return _environment().get_template(template).render(values)


def data_uri(image: Image.Image, quality: int) -> str:
    """Encode an image as JPEG and return it as a data URI."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1]),
        autoescape=True,
        finalize=_encodable,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(decimal=_decimal, count=_count, path=_path)
    return environment


def _encodable(value: object) -> object:
    """Escape lone surrogates, which names can contain but UTF-8 cannot encode."""
    return value.encode("utf-8", "backslashreplace").decode() if type(value) is str else value


def _decimal(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _count(value: int, noun: str = "") -> str:
    """Format a count with its noun, e.g. 1,234 objects or 1 object."""
    return f"{value:,}" + (f" {noun}{'' if value == 1 else 's'}" if noun else "")


def _path(values: Sequence[float], width: float, height: float) -> str:
    """Return the points of an SVG polyline: evenly spaced values from 0 (bottom) to 1 (top)."""
    step = width / max(len(values) - 1, 1)
    return " ".join(f"{i * step:.1f},{height * (1 - value):.1f}" for i, value in enumerate(values))
