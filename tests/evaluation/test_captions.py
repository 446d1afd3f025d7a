"""Names of classes in drawn pictures, in scripts that Pillow's default font lacks."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vitdet import visualize
from vitdet.types import Detections


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Search for fonts and warn again in each test."""
    visualize._font_with.cache_clear()
    visualize._warn_once.cache_clear()
    yield
    visualize._font_with.cache_clear()


def drawn(name: str) -> np.ndarray:
    box = torch.tensor([[10.0, 40.0, 90.0, 90.0]])
    found = Detections(box, torch.tensor([0.9]), torch.tensor([0]), None, (name,))
    return np.asarray(found.draw(np.zeros((100, 200, 3), np.uint8)))


@pytest.mark.parametrize("names", [("Bär", "Bör"), ("кот", "кит"), ("γάτα", "γάτη")])
def test_names_are_drawn_with_the_font_of_matplotlib(
    names: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(visualize, "FONTS", ())
    first, second = map(drawn, names)
    assert not np.array_equal(first, second) and not caplog.text
    # the default font draws a box for each letter that is not ASCII
    monkeypatch.setattr(visualize, "_font_with", lambda characters: "")
    assert np.array_equal(*map(drawn, names))


def test_the_characters_that_a_font_lacks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(visualize, "FONTS", ())
    (font,) = visualize._installed_fonts()
    assert visualize._lacking(font, "éкλ猫") == "猫"


def test_decomposed_names_are_drawn_like_composed_ones() -> None:
    name = "고양이 é"
    assert np.array_equal(drawn(name), drawn(unicodedata.normalize("NFD", name)))


def test_a_missing_font_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(visualize, "FONTS", ("no such font.ttf",))
    monkeypatch.setattr(visualize, "find_spec", lambda name: None)
    drawn("猫")
    drawn("犬")
    (line,) = caplog.messages
    assert "fonts-dejavu-core" in line and "fonts-wqy-microhei" in line


def test_the_installed_font_with_most_characters_is_chosen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fonts = [SimpleNamespace(path="first"), SimpleNamespace(path="second")]
    monkeypatch.setattr(visualize, "_installed_fonts", lambda: iter(fonts))
    lacking = {"é": ["é", ""], "猫": ["猫", "猫"]}
    for text, (first, second) in lacking.items():
        results = iter([first, second])
        monkeypatch.setattr(visualize, "_lacking", lambda font, text, found=results: next(found))
        assert visualize._font_with(text) == ("second" if text == "é" else "first")
    assert len(caplog.messages) == 1
    assert not isinstance(visualize.caption_font(16, "cat 0.9").path, str)  # Pillow's own font
