"""Matches: their AP equals that of the evaluation, for any image weights; round trip through a file."""

import json
from collections import Counter

import msgspec
import numpy as np
import pytest

from tests.helpers.random_results import random_set
from vitdet.evaluation import coco, lvis
from vitdet.evaluation.bootstrap import WeightedAP
from vitdet.evaluation.matches import Matches, load_matches, save_matches
from vitdet.evaluation.results import Truth, read_truth


def ap_of(matches: Matches) -> np.ndarray:
    """Return the mean AP, followed by the AP of each class."""
    return WeightedAP(matches)(np.ones(len(matches.image_ids), int))[0]


def assert_same_ap(comparison) -> None:
    mean, *by_class = ap_of(comparison.matches)
    expected = [comparison.ap(chosen=[place]) for place in range(len(by_class))]
    expected = [np.nan if ap is None else ap for ap in expected]
    np.testing.assert_allclose(by_class, expected, rtol=0, atol=1e-9)
    ap = comparison.ap()
    np.testing.assert_allclose(mean, np.nan if ap is None else ap, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rules", [coco, lvis])
def test_ap_of_random_matches_equals_that_of_the_evaluation(rules, seed):
    truth, results = random_set(seed, 20 + 10 * seed, 1 + 2 * seed, rules is lvis)
    for image_ids in (None, sorted(truth.images)[::2]):
        for comparison in rules.compare(truth, results, image_ids=image_ids).values():
            assert comparison.matches.matched.any() and comparison.matches.ignored.any()
            assert_same_ap(comparison)


def test_ap_of_the_lvis_example_equals_that_of_the_evaluation(examples):
    results = json.loads((examples / "lvis_fake100_results.json").read_text())
    truth = read_truth(examples / "lvis_val_100.json", lvis=True)
    for comparison in lvis.compare_file(truth, results, ["bbox", "segm"]).values():
        assert_same_ap(comparison)


def test_detections_of_objects_without_an_outline_are_ignored():
    truth, results = random_set(5)
    bare = [
        annotation if number % 3 else msgspec.structs.replace(annotation, segmentation=None)
        for number, annotation in enumerate(truth.objects)
    ]
    truth = Truth(truth.path, truth.images, truth.categories, bare)
    comparison = coco.compare(truth, results)["segm"]
    assert_same_ap(comparison)
    ignored = comparison.matches.ignored.sum(0)
    assert len(comparison.objects) < len([item for item in bare if not item.iscrowd])
    assert (np.diff(ignored) <= 0).all() and ignored[0] > ignored[-1]


def test_without_objects_or_results_there_are_no_matches():
    truth, results = random_set(0)
    nothing = Truth(truth.path, truth.images, truth.categories, [])
    matches = coco.compare(nothing, results, ["bbox"])["bbox"].matches
    assert np.isnan(ap_of(matches)).all()
    assert len(matches.score) == len(results) and not matches.matched.any()
    assert len(matches.object_image) == 0 and len(matches.image_ids) == len(truth.images)
    matches = coco.compare(truth, [], ["bbox"])["bbox"].matches
    assert ap_of(matches)[0] == 0 and len(matches.score) == 0


def test_only_the_best_detections_up_to_the_limit_are_used():
    truth, results = random_set(0, images=2, categories=1)
    results = [result for result in results if result["image_id"] == results[0]["image_id"]] * 12
    comparison = coco.compare(truth, results, ["bbox"])["bbox"]
    assert len(comparison.matches.score) == 100
    assert (comparison.matches.score >= np.sort([item["score"] for item in results])[-100]).all()
    assert_same_ap(comparison)


def test_matches_contain_the_object_of_each_true_positive():
    truth, results = random_set(3)
    comparison = coco.compare(truth, results, ["bbox"])["bbox"]
    matches = comparison.matches
    true = matches.found >= 0
    assert (true == matches.matched[:, 0]).all()
    found = matches.found[true]
    assert len(np.unique(found)) == len(found)  # each object is matched once
    assert (matches.object_image[found] == matches.image[true]).all()
    assert (matches.object_category[found] == matches.category[true]).all()


def test_image_weights_equal_copies_of_images():
    truth, results = random_set(4, images=12)
    # distinct scores, because ties could be ordered differently between images
    results = [result | {"score": 1 / (2 + place)} for place, result in enumerate(results)]
    matches = coco.compare(truth, results, ["bbox"])["bbox"].matches
    drawn = np.random.default_rng(0).integers(0, 12, 12)
    images, objects, copies = {}, [], []
    for number, place in enumerate(drawn):
        old = int(matches.image_ids[place])
        new = 1000 * int(place) + number
        images[new] = truth.images[old] | {"id": new}
        for annotation in truth.objects:
            if annotation.image_id == old:
                objects.append(msgspec.structs.replace(annotation, image_id=new))
        copies += [result | {"image_id": new} for result in results if result["image_id"] == old]
    resampled = Truth(truth.path, dict(sorted(images.items())), truth.categories, objects)
    expected = coco.compare(resampled, copies, ["bbox"])["bbox"]
    counts = Counter(drawn.tolist())
    weights = np.array([counts[place] for place in range(12)])
    mean, *by_class = WeightedAP(matches)(weights)[0]
    np.testing.assert_allclose(by_class, ap_of(expected.matches)[1:], rtol=0, atol=1e-9)
    assert mean == pytest.approx(expected.ap(), abs=1e-9)


def test_a_file_contains_box_and_mask_matches(tmp_path):
    truth, results = random_set(1)
    matches = {kind: found.matches for kind, found in coco.compare(truth, results).items()}
    path = tmp_path / "new" / "matches.npz"
    save_matches(path, matches)
    loaded = load_matches(path)
    assert list(loaded) == ["bbox", "segm"]
    for kind, stored in loaded.items():
        for name, value in vars(matches[kind]).items():
            got = getattr(stored, name)
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(got, value)
                assert got.dtype == value.dtype
            else:
                assert got == value
    save_matches(tmp_path / "again.npz", loaded)
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"bbox.score": np.zeros((2, 3))},
        {"bbox.image": np.array([10**6])},
        {"bbox.matched": np.array([[1] * 10])},
        {"bbox.object_image": np.array([-1])},
        {"bbox.found": None},
        {"other": np.array(3)},
        {"bbox.class_names": np.array([{}], object)},
    ],
    ids=str,
)
def test_invalid_matches_are_refused_in_one_line(tmp_path, change):
    truth, results = random_set(1, images=3)
    path = tmp_path / "matches.npz"
    save_matches(path, {"bbox": coco.compare(truth, results, ["bbox"])["bbox"].matches})
    with np.load(path) as file:
        columns = {
            name: value for name, value in (dict(file) | change).items() if value is not None
        }
    np.savez(path, **columns)
    with pytest.raises(ValueError, match=r"matches\.npz: not readable as a matches file") as caught:
        load_matches(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"[1, 2]", b"\x80\x04N."])
def test_other_files_are_not_accepted_as_matches(tmp_path, content):
    path = tmp_path / "matches.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not readable as a matches file"):
        load_matches(path)
    with pytest.raises(FileNotFoundError, match="no such matches file"):
        load_matches(tmp_path / "other.npz")
