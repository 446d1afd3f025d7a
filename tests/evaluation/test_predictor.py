"""Inputs in every supported form, boxes in image pixels, and drawn detections."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import nn

from tests.helpers.small import CLASSES, SIDE, small_detector
from vitdet import visualize
from vitdet.data.masks import paste
from vitdet.data.transforms import resize_and_pad
from vitdet.predictor import Predictor, read_image, to_image
from vitdet.types import Detections
from vitdet.visualize import _shrunk, class_color, draw, legible_scale

NAMES = ("cat", "dog", "bird")


class BrightSpot(nn.Module):
    """A detector that finds pixels brighter than 128, and the whole image with a lower score."""

    def forward(self, images, targets=None, sizes=None):
        results = []
        for image, (height, width) in zip(images, sizes.tolist(), strict=True):
            y, x = torch.nonzero(image.float().mean(0) > 128, as_tuple=True)
            bright = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            results.append(found([bright, [0, 0, width, height]], [1, 0], ()))
        return results


def spot(height=40, width=80, box=(8, 10, 28, 30)):
    """Return a black picture with one white box (x0, y0, x1, y1)."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return pixels


def found(boxes, labels=None, names=NAMES):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.zeros(len(boxes), dtype=torch.int64) if labels is None else torch.tensor(labels)
    scores = torch.linspace(0.9, 0.3, len(boxes))
    return Detections(boxes, scores, labels, torch.ones(len(boxes), 28, 28), names)


@pytest.fixture
def predictor():
    return Predictor(BrightSpot(), NAMES, 64)


def test_every_input_form_gives_equal_detections(predictor, tmp_path):
    pixels = spot()
    path = tmp_path / "spot.png"
    Image.fromarray(pixels).save(path)
    # a width of 80 on a canvas of 64: sides are exact to one canvas pixel, or 1.25 image pixels
    expected = predictor(pixels)
    box = torch.tensor([[8.0, 10.0, 28.0, 30.0]])
    torch.testing.assert_close(expected.boxes, box, atol=1.3, rtol=0)
    assert expected.names == ["dog"]
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = [path, str(path), Image.open(path), tensor, np.asfortranarray(pixels)]
    for image in forms:
        assert torch.equal(predictor(image).boxes, expected.boxes)
    for detections in predictor(forms):
        assert torch.equal(detections.boxes, expected.boxes)
    assert predictor([]) == []


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16", "YCbCr"])
def test_images_of_any_mode_are_accepted(predictor, mode):
    gray = Image.fromarray(spot()[:, :, 0])
    sixteen = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    image = sixteen if mode == "I;16" else gray.convert("RGB").convert(mode)
    assert image.mode == mode
    torch.testing.assert_close(predictor(image).boxes, predictor(spot()).boxes)


def test_sixteen_bit_values_are_scaled_and_not_clipped():
    image = Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16))
    assert np.asarray(read_image(image))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_boxes_are_pixels_of_the_upright_image(predictor, tmp_path):
    upright = spot(80, 40, (5, 50, 25, 70))
    stored = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise for display
    path = tmp_path / "turned.jpg"
    stored.save(path, quality=100, exif=exif)
    assert read_image(path).size == (40, 80)
    torch.testing.assert_close(predictor(path).boxes, predictor(upright).boxes, atol=1.3, rtol=0)
    torch.testing.assert_close(predictor(Image.open(path)).boxes, predictor(path).boxes)


def test_the_threshold_is_the_lowest_returned_score(predictor):
    image = spot()
    scores = predictor(image, 0).scores
    assert len(scores) == 2
    assert len(predictor(image)) == 1
    assert len(predictor(image, float(scores[1]))) == 2
    assert predictor(image, 0.95).boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"\(H, W, 3\) of uint8, got \(4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"\(3, H, W\) of uint8, got \(4, 4, 3\)"),
        (torch.zeros(3, 4, 4), "float32"),
        (7, "got int"),
    ],
)
def test_other_types_and_shapes_are_refused_in_one_line(predictor, image, message):
    with pytest.raises(ValueError, match=message) as caught:
        predictor(image)
    assert "\n" not in str(caught.value)


def test_an_invalid_file_is_named_in_one_line(predictor, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.jpg"):
        predictor(tmp_path / "absent.jpg")
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 50).save(whole)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:800])
    for path in (text, cut):
        with pytest.raises(ValueError, match=path.name) as caught:
            predictor(path)
        assert "\n" not in str(caught.value)


def test_each_axis_is_rescaled_by_its_own_factor():
    # 333 x 500 on a canvas of 1024 has 681.98 -> 682 rows, so the two scale factors differ
    canvas = found([[0, 0, 1024, 682], [100, 100, 200, 300]])
    boxes = to_image(canvas, (682, 1024), (333, 500)).boxes
    x, y = 100 * 500 / 1024, 100 * 333 / 682
    expected = torch.tensor([[0.0, 0.0, 500.0, 333.0], [x, y, 2 * x, 3 * y]])
    torch.testing.assert_close(boxes, expected)


def test_boxes_are_clipped_and_empty_boxes_are_dropped():
    boxes = [[-5, -5, 20, 20], [10, 10, 10, 30], [90, 10, 130, 30], [101, 10, 120, 30]]
    kept = to_image(found(boxes, [0, 1, 2, 0]), (100, 100), (50, 50))
    assert kept.boxes.tolist() == [[0, 0, 10, 10], [45, 5, 50, 15]]
    assert kept.labels.tolist() == [0, 2]
    assert len(kept.scores) == len(kept.masks) == 2


def test_predictions_have_no_gradient_and_lie_in_the_image():
    detector = small_detector()
    predictor = Predictor(detector, [f"class {i}" for i in range(CLASSES)], SIDE)
    detector.eval()
    found = predictor(np.asarray(Image.effect_noise((90, 60), 80).convert("RGB")), 0.0)
    assert len(found) and not found.boxes.requires_grad
    assert found.masks.shape[1:] == (28, 28)
    assert float(found.boxes[:, 2].max()) <= 90 and float(found.boxes[:, 3].max()) <= 60


def test_a_checkpoint_is_loaded_with_its_class_names(trained):
    predictor = Predictor.load(trained / "model.pt")
    assert predictor.image_size == 128
    assert not predictor.detector.training
    assert "disc" in predictor.class_names
    with pytest.raises(FileNotFoundError):
        Predictor.load(trained / "absent.pt")


def test_a_picture_is_resized_as_in_training(trained, tmp_path):
    content = torch.load(trained / "model.pt", weights_only=True)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 300, 3), np.uint8)
    for antialias in (True, False):
        content["config"]["data"]["antialias"] = antialias
        torch.save(content, tmp_path / "model.pt")
        predictor = Predictor.load(tmp_path / "model.pt")
        seen = []
        predictor.detector.register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(given[0][0].cpu().numpy())
        )
        predictor(pixels)
        assert np.array_equal(seen[0], resize_and_pad(pixels, 128, antialias)[0])


def test_drawing_no_detections_returns_the_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(draw(pixels, found([]), scale=1)), pixels)


def test_small_pictures_are_enlarged_for_drawing():
    assert draw(spot(100, 128), found([[5, 5, 20, 20]])).size == (768, 600)
    assert draw(spot(480, 1000), found([[5, 5, 20, 20]])).size == (1000, 480)
    assert draw(spot(100, 128), found([]), scale=1.5).size == (192, 150)
    assert legible_scale((640, 480)) == 1
    assert legible_scale((1, 3)) == 256


def test_drawing_colors_only_the_object_in_its_class_color():
    gray = np.full((400, 400, 3), 90, np.uint8)
    drawn = np.asarray(draw(gray, found([[50, 100, 150, 200]], [2]), scale=1)).astype(int)
    mixed = 0.58 * 90 + 0.42 * np.array(class_color(2))
    assert np.abs(drawn[170, 100] - mixed).max() <= 2
    assert np.abs(drawn[150, 51] - class_color(2)).max() <= 15  # the left side of the box
    assert (drawn[250:] == 90).all() and (drawn[:, 250:] == 90).all()
    assert (gray == 90).all()


CORNERS = [[0, 0, 30, 30], [380, 0, 400, 20], [0, 380, 20, 400], [380, 380, 400, 400]]


@pytest.mark.parametrize("box", [*CORNERS, [0, 0, 400, 400]])
def test_the_label_is_complete_at_any_position(box):
    black = np.zeros((400, 400, 3), np.uint8)
    named = Detections.draw(found([box], [1], ("", "a fairly long class name", "")), black)
    tag = (np.asarray(named) == class_color(1)).all(2)
    rows = tag.sum(1)
    assert rows.max() > 150  # a row with the label's background


def test_labels_of_neighbors_do_not_overlap():
    black = np.zeros((600, 800, 3), np.uint8)
    both = found([[300, 300, 340, 340], [302, 302, 338, 338]], [0, 1])
    for index in (0, 1):
        alone, beside = (
            (np.asarray(draw(black, shown, scale=1)) == class_color(index)).all(2).sum()
            for shown in (both[index : index + 1], both)
        )
        assert beside > 0.8 * alone


def test_colors_of_many_classes_differ():
    colors = np.array([class_color(label) for label in range(80)])
    assert len({tuple(color) for color in colors.tolist()}) == 80
    first = colors[:8].astype(int)
    apart = np.abs(first[:, None] - first[None]).sum(2) + 1000 * np.eye(8, dtype=int)
    assert apart.min() > 60


def test_masks_at_the_edge_and_outside_are_drawn():
    boxes = [[-20, -20, 10, 10], [90, 50, 130, 90], [0, 0, 100, 1], [200, 200, 220, 220]]
    boxes.append([5, 5, 5.2, 5.2])
    assert draw(spot(60, 100, (0, 0, 5, 5)), found(boxes), scale=1).size == (100, 60)
    unnamed = found([[10, 10, 50, 50]], names=())
    assert draw(spot(60, 100), unnamed).size == (800, 480)


@pytest.mark.parametrize("size", [(1, 1), (7, 31), (90, 61)])
def test_outlines_have_the_width_of_pillow_s_filter(size):
    shape = Image.fromarray((np.random.default_rng(0).random(size) > 0.04).astype(np.uint8) * 255)
    for width in (1, 2, 3, 10):
        expected = shape.filter(ImageFilter.MinFilter(2 * width + 1))
        assert _shrunk(shape, width).tobytes() == expected.tobytes()


def test_a_large_picture_is_drawn_object_by_object(monkeypatch):
    shapes = []

    def watched(masks, boxes, size):
        shapes.append((len(masks), *size))
        return paste(masks, boxes, size)

    monkeypatch.setattr(visualize, "paste", watched)
    draw(Image.new("RGB", (900, 700)), found([[5, 5, 300, 400]] * 40))
    assert shapes == [(1, 700, 900)] * 40
