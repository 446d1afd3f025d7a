"""Evaluating a results file: output, errors, and its benchmark."""

import json

import msgspec
import numpy as np
import pytest

from tests.helpers.random_results import SIDE, random_set
from vitdet.cli import main
from vitdet.cli.bench.evaluation import measure
from vitdet.evaluation.bootstrap import WeightedAP
from vitdet.evaluation.evaluator import evaluate_results
from vitdet.evaluation.matches import load_matches
from vitdet.evaluation.run_lengths import areas


@pytest.fixture
def files(tmp_path):
    """Write a results file and an annotation file."""
    truth, results = random_set(3, images=6, categories=3)
    annotations = tmp_path / "truth.json"
    tree = {
        "images": list(truth.images.values()),
        "annotations": [msgspec.to_builtins(annotation) for annotation in truth.objects],
        "categories": list(truth.categories.values()),
    }
    annotations.write_text(json.dumps(tree))
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path / "results.json", annotations


def run(*words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code


def test_evaluate_results_prints_a_table_and_writes_the_metrics(files, tmp_path, capsys):
    results, annotations = files
    output, plots = tmp_path / "new" / "m.json", tmp_path / "plots"
    words = ("--results", results, "--annotations", annotations, "--output", output)
    assert run("evaluate", *words, "--plots", plots) == 0
    lines = capsys.readouterr().out.splitlines()
    metrics = json.loads(output.read_text())
    assert [line.split()[0] for line in lines] == ["ap", "box", "mask"]
    assert lines[1].split()[1] == format(metrics["box_ap"], ".1f")
    assert len(metrics) == 33 and 0 < metrics["mask_ap"] < 100
    assert (metrics["images"], metrics["objects"] > 0, metrics["detections"] > 0) == (6, 1, 1)
    for kind, name in (("box_ap", "class_ap"), ("mask_ap", "class_mask_ap")):
        classes = [value for key, value in metrics.items() if key.startswith(f"{name}/class ")]
        assert sum(classes) / len(classes) == pytest.approx(metrics[kind])
    matches = load_matches(plots / "matches.npz")
    mean = WeightedAP(matches["segm"])(np.ones(6, int))[0, 0]
    assert mean == pytest.approx(metrics["mask_ap"], abs=1e-9)
    rows = json.loads((plots / "classes.json").read_text())
    assert {row["class"] for row in rows} <= {"class 0", "class 1", "class 2"}
    assert json.loads((plots / "curve.json").read_text())
    assert "SHA-256" in (plots / "report.html").read_text()


@pytest.mark.parametrize(("lost", "kept"), [("bbox", "mask"), ("segmentation", "box")])
def test_results_with_only_boxes_or_masks_are_scored(files, capsys, lost, kept):
    results, annotations = files
    both = evaluate_results(results, annotations)
    items = json.loads(results.read_text())
    items = [{key: item[key] for key in item if key != lost} for item in items]
    results.write_text(json.dumps(items))
    alone = evaluate_results(results, annotations)
    assert alone == {key: value for key, value in both.items() if key.startswith(kept)}
    assert run("evaluate", "--results", results, "--annotations", annotations) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ap", kept]


def test_masks_may_be_polygons_or_run_lengths(files):
    results, annotations = files
    items = json.loads(results.read_text())
    expected = evaluate_results(results, annotations)
    x, y = 10.0, 20.0
    shapes = [
        [[x, y, x + 30, y, x + 30, y + 40, x, y + 40]],
        {"size": [SIDE, SIDE], "counts": [10 * SIDE + 20, *[40, 110] * 29, 40, SIDE * 110 + 90]},
    ]
    assert sum(shapes[1]["counts"]) == SIDE * SIDE
    figures = []
    for shape in shapes:
        results.write_text(json.dumps(items + [{**items[0], "segmentation": shape}]))
        figures.append(evaluate_results(results, annotations))
    assert figures[0] == figures[1] != expected


BROKEN = {"size": [SIDE, SIDE], "counts": "abc"}
SHORT = {"size": [SIDE, SIDE], "counts": [SIDE * SIDE - 1]}
NO_RUNS = {"size": [SIDE, SIDE], "counts": "ää"}
OTHER_SIZE = {"size": [5, 5], "counts": "i0"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 7}, "contains no image 7, for which there are results .unknown images: 1"),
        ({"image_id": None}, "contains no image None"),
        ({"image_id": [7]}, "image_id: expected a number for each result"),
        (
            {"category_id": 4},
            "contains no category 4, for which there are results .unknown categories: 1",
        ),
        ({"score": "0.5"}, "result 2: score must be a finite number, got '0.5'"),
        ({"score": float("nan")}, "result 2: score must be a finite number, got nan"),
        ({"bbox": [1, 2, 3]}, "result 2: bbox must be 4 finite numbers x, y, .*, got .1, 2, 3."),
        ({"bbox": [1, 2, 3, float("inf")]}, "result 2: bbox must be 4 finite"),
        ({"segmentation": BROKEN}, "category \\d+: invalid .* .RLE whose counts"),
        ({"segmentation": SHORT}, "invalid .* .RLE whose counts do not add up to its size"),
        ({"segmentation": OTHER_SIZE}, "invalid .* .RLE whose size differs from the image size"),
        ({"segmentation": NO_RUNS}, "invalid .* .RLE whose counts are not run lengths"),
        ({"segmentation": 3}, "invalid segmentation .segmentation that is neither"),
        *(({key: ...}, f"result 2: {key} is missing") for key in ("image_id", "score", "bbox")),
    ],
    ids=str,
)
def test_an_invalid_result_is_named_in_one_line(files, change, message):
    results, annotations = files
    items = json.loads(results.read_text())
    items[1] = {key: value for key, value in (items[1] | change).items() if value is not ...}
    results.write_text(json.dumps(items))
    with pytest.raises(ValueError, match=message) as caught:
        evaluate_results(results, annotations)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(results))
    if "segmentation" in change:
        ids = f"image {items[1]['image_id']}, category {items[1]['category_id']}"
        assert f": result for {ids}: " in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "list of results is empty"),
        ("{}", "expected a list of results, got dict"),
        ("[{", "not readable as JSON"),
        ("\xff", "not readable as JSON"),
        ("[3]", "expected a bbox and/or"),
        ('[{"image_id": 1}]', "expected a bbox and/or"),
        ('[{"bbox": [1, 2, 3, 4]}, 5]', "result 2: expected a JSON object, got int"),
    ],
    ids=str,
)
def test_other_files_are_not_accepted_as_results(files, text, message):
    results, annotations = files
    results.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as caught:
        evaluate_results(results, annotations)
    assert str(caught.value).startswith(str(results))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["images"].clear(), "most objects: annotation of an unknown image"),
        (lambda tree: tree["annotations"][0].pop("bbox"), "annotation 1 .*: annotation without"),
        (lambda tree: tree["annotations"][0].update(segmentation=SHORT), "RLE whose counts do not"),
        (lambda tree: tree.update(images=3), "'images' is not a list: got 3"),
        (lambda tree: tree["annotations"].clear(), "contains no objects"),
        (lambda tree: tree.pop("categories"), "no 'categories' in the file"),
    ],
)
def test_invalid_annotations_are_refused_in_one_line(files, change, message):
    results, annotations = files
    tree = json.loads(annotations.read_text())
    change(tree)
    annotations.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=message) as caught:
        evaluate_results(results, annotations)
    assert "\n" not in str(caught.value) and "truth.json" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected a CHECKPOINT, or --results FILE"),
        (("--results", "r.json"), "must be given together"),
        (("model.pt", "--dataset", "lvis"), "cannot be combined with CHECKPOINT"),
        (("--results", "r.json", "--annotations", "a.json"), "r.json: no such results file"),
    ],
)
def test_incompatible_arguments_are_refused(words, message, capsys):
    assert run("evaluate", *words) == 1
    assert message in capsys.readouterr().err


def test_run_lengths_are_measured_in_blocks(monkeypatch):
    # the first code has pixels 3 to 6 of 9; the second code is one pixel short
    monkeypatch.setattr("vitdet.evaluation.run_lengths.AT_ONCE", 2)
    sizes, sound = areas([b"243", b"242", b"9", b"054", b"24O"], [9] * 5)
    assert sizes[[0, 2, 3]].tolist() == [4, 0, 5]
    assert sound.tolist() == [True, False, True, True, False]


def test_the_benchmark_also_compares_the_metrics(tmp_path, capsys):
    words = ("--images", 12, "--detections", 30, "--output", tmp_path / "bench.json")
    assert run("bench", "evaluate", *words) == 0
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert figures["largest_difference"] < 1e-9
    assert set(figures["cpu_seconds"]) == {"vitdet", "pycocotools"}
    assert 0 < figures["box_ap"] < 100
    assert "12 images x 30 detections" in capsys.readouterr().out
    with pytest.raises(ValueError, match="at least 1"):
        measure(images=0)


@pytest.mark.parametrize("broken", [[], [4.0, 4.0, 9.0, 9.0], [1.0, 2.0, 3.0]])
def test_invalid_parts_of_an_outline_are_dropped(files, broken):
    results, annotations = files
    square = [4.0, 4.0, 20.0, 4.0, 20.0, 20.0, 4.0, 20.0]
    found = [item | {"segmentation": [square]} for item in json.loads(results.read_text())]
    metrics = []
    for shape in ([square], [broken, square], [square, broken]):
        results.write_text(json.dumps([item | {"segmentation": shape} for item in found]))
        metrics.append(evaluate_results(results, annotations))
    assert metrics[0] == metrics[1] == metrics[2]
