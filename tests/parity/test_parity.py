"""Golden cases pass, and the harness detects a change of any stored value."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import tests.parity.__main__ as parity
from tests.parity import detector, resize, unit
from tests.parity.case import Case
from tests.parity.conftest import disturbed, link, shared_case_holds, write
from tests.parity.conftest import read as read_file
from tests.parity.device import CPU

GOLDEN = Path(__file__).parents[1] / "golden"
SHARED = Path(__file__).parents[3] / "shared" / "reference" / "detectron2" / "golden"
CASES = "maskrcnn_coco unit dynamics test_resize cascade_lvis maskrcnn_coco_resblock".split()
COCO = GOLDEN / "maskrcnn_coco"
INPUTS = ("config.json", "state_dict.npz", "inputs.npz", "ground_truth.json")
RESULTS = ("backbone.npz", "rpn.npz", "detections.npz", "train.npz")
COMPUTE = {name: parity.kind_of(GOLDEN / name).compute for name in CASES}


@cache
def computed(name):
    return COMPUTE[name](GOLDEN / name)


def compute_once(folder, device=CPU):
    """Return the unchanged case's results; a detector's inputs, which are only compared, are this folder's."""
    found = computed(folder.name)
    return replace(found, case=Case.read(folder)) if isinstance(found, detector.Computed) else found


@pytest.fixture
def case(altered):
    """Return case(name, file, content, recompute): the exit code for a copy of a case with one changed file.

    If the file contains results, the copy has no other results. Unless `stops`, the code must come from a comparison, not
    a crash.
    """

    def check(name, file, content, recompute=False, stops=False):
        alone = {*INPUTS, "noise_floor.json"}
        kept = alone if file in (*RESULTS, "results.json", "losses.json") else None
        compute = None if recompute else compute_once
        code, printed = altered(GOLDEN / name, file, content, kept, compute)
        assert ("stopped by" in printed) == stops
        return code

    return check


def read(name, file):
    return read_file(GOLDEN / name / file)


@pytest.mark.parametrize("name", CASES)
def test_the_case_passes(name, capsys):
    assert parity.main([str(GOLDEN / name)]) == 0
    assert f"{name}: all hold" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cascade_coco", "maskrcnn_lvis"])
def test_the_shared_case_passes(name):
    shared_case_holds(SHARED / name)


def test_every_folder_in_golden_is_a_known_case():
    """The documented command, `python -m tests.parity tests/golden/*`, fails for other folders."""
    folders = [path for path in GOLDEN.iterdir() if path.is_dir()]
    assert len(folders) > len(CASES) and all(map(parity.kind_of, folders))


def test_every_case_is_run_and_other_files_are_ignored(capsys, tmp_path):
    assert parity.main([str(GOLDEN / "README.md"), str(GOLDEN / "unit")]) == 0
    assert parity.main([str(tmp_path / "absent"), str(GOLDEN / "unit")]) == 1
    assert parity.main([]) == 2
    assert "unit: all hold" in capsys.readouterr().out


def test_results_are_computed_from_the_inputs_only(tmp_path):
    link(tmp_path, COCO, *INPUTS)
    found = detector.compute(tmp_path)
    assert found.losses == computed("maskrcnn_coco").losses
    assert parity.main([str(tmp_path)]) == 1  # without stored results, the comparison fails


def test_unit_results_are_computed_from_the_inputs_only(tmp_path):
    stored = read("unit", "unit.npz")
    np.savez(tmp_path / "unit.npz", **{name: stored[name] for name in unit.INPUTS})
    assert unit.compute(tmp_path).keys() == computed("unit").keys()
    np.savez(tmp_path / "io.npz", in0=np.zeros((30, 20, 3), np.uint8))
    assert resize.compute(tmp_path)["out0"].shape == (128, 85, 3)


@pytest.mark.parametrize(
    ("file", "array"), [(file, array) for file in RESULTS for array in read(CASES[0], file)]
)
def test_a_change_of_any_stored_array_fails(case, file, array):
    content = read("maskrcnn_coco", file)
    assert case("maskrcnn_coco", file, content | {array: disturbed(content[array])}) == 1


@pytest.mark.parametrize("file", RESULTS)
def test_unknown_nan_and_misshapen_arrays_fail(case, file, tmp_path):
    content = read("maskrcnn_coco", file)
    assert case("maskrcnn_coco", file, content | {"surprise": np.zeros(1)}) == 1
    name = next(name for name, array in content.items() if array.dtype == np.float32)
    for other in (np.full_like(content[name], np.nan), content[name][:-1]):
        write(tmp_path / "maskrcnn_coco" / file, content | {name: other})
        assert parity.main([str(tmp_path / "maskrcnn_coco")]) == 1


@pytest.mark.parametrize("file", [None, *RESULTS, "results.json", "losses.json"])
def test_an_unchanged_copy_passes(case, file):
    assert case("maskrcnn_coco", file, file and read("maskrcnn_coco", file)) == 0


@pytest.mark.parametrize(
    "group", [group for group in read(CASES[0], "losses.json") if group != "params_without_grad"]
)
def test_a_change_in_any_group_of_losses_fails(case, group, tmp_path):
    content = read("maskrcnn_coco", "losses.json")
    name = max(content[group], key=lambda name: abs(content[group][name]))
    content[group][name] *= 1.05
    assert case("maskrcnn_coco", "losses.json", content) == 1
    content[group][name] /= 1.05
    del content[group][name]
    write(tmp_path / "maskrcnn_coco" / "losses.json", content)
    assert parity.main([str(tmp_path / "maskrcnn_coco")]) == 1


@pytest.mark.parametrize(
    "change", [{"params_without_grad": ["backbone.net.pos_embed"]}, {"losses_other": {"a": 1.0}}]
)
def test_changes_of_other_entries_of_losses_fail(case, change):
    assert case("maskrcnn_coco", "losses.json", read("maskrcnn_coco", "losses.json") | change) == 1


@pytest.mark.parametrize(
    "field", ["image", "category", "score", "bbox_xywh", "area", "segmentation", "surprise"]
)
def test_a_change_of_any_field_of_results_fails(case, field):
    content = read("maskrcnn_coco", "results.json")
    row = content[0]
    other = next(c for c in content if c["image"] == 0 and c["area"] < row["area"] / 2)
    changes = {
        "image": 1,
        "category": row["category"] + 1,
        "score": row["score"] + 0.01,
        "area": row["area"] + 50,
        "bbox_xywh": [row["bbox_xywh"][0] + 1, *row["bbox_xywh"][1:]],
        "segmentation": other["segmentation"],
    }
    content[0] = row | {field: changes.get(field, 1)}
    assert case("maskrcnn_coco", "results.json", content) == 1


def test_a_missing_result_fails(case):
    assert case("maskrcnn_coco", "results.json", read("maskrcnn_coco", "results.json")[:-1]) == 1


@pytest.mark.parametrize("name", ["classes", "boxes", "polygons", "height", "out_width"])
def test_a_change_of_any_part_of_the_ground_truth_fails(case, name):
    content = read("maskrcnn_coco", "ground_truth.json")
    value = content[0][name]
    if name == "polygons":
        value[0][0] = [coordinate * 0.9 for coordinate in value[0][0]]
    elif name == "boxes":
        value[0][0] += 1
    elif name == "classes":
        value[0] = (value[0] + 1) % 5
    else:
        content[0][name] = value + 20
    assert case("maskrcnn_coco", "ground_truth.json", content) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"n_params": 1},
        {"n_gt": [10, 8]},
        {"images": [[200, 256], [256, 180]]},
        {"outputs": [[1, 1], [1, 1]]},
    ],
)
def test_a_config_that_contradicts_the_inputs_fails(case, change):
    assert case("maskrcnn_coco", "config.json", read("maskrcnn_coco", "config.json") | change) == 1


@pytest.mark.parametrize(
    "name", ["p2", "scores", "boxes", "mask_probs", "losses_rel", "grad_norm_rel_max"]
)
def test_a_noise_floor_above_rounding_fails(case, name):
    content = read("maskrcnn_coco", "noise_floor.json")
    change = {"loss_cls": 1.0} if name == "losses_rel" else 1.0
    assert case("maskrcnn_coco", "noise_floor.json", content | {name: change}) == 1


@pytest.mark.parametrize(
    "name",
    [
        "backbone.net.pos_embed",
        "backbone.net.blocks.0.attn.rel_pos_h",
        "backbone.simfp_4.1.norm.bias",
        "proposal_generator.rpn_head.conv.conv1.weight",
        "roi_heads.box_head.fc1.weight",
        "roi_heads.mask_head.predictor.bias",
    ],
)
def test_a_change_of_any_weight_fails(case, name):
    content = read("maskrcnn_coco", "state_dict.npz")
    content[name] *= 1.05
    assert case("maskrcnn_coco", "state_dict.npz", content, recompute=True) == 1


@pytest.mark.parametrize("name", ["image0", "gt_boxes1", "gt_classes0", "gt_masks1"])
def test_a_change_of_any_input_fails(case, name):
    content = read("maskrcnn_coco", "inputs.npz")
    changes = {"gt_boxes1": disturbed, "gt_classes0": lambda x: (x + 1) % 5}
    content[name] = changes.get(name, lambda x: x[::-1])(content[name])
    assert case("maskrcnn_coco", "inputs.npz", content, recompute=True) == 1


def test_an_unknown_weight_stops_the_case(case):
    content = read("maskrcnn_coco", "state_dict.npz") | {"roi_heads.extra.weight": np.zeros(1)}
    assert case("maskrcnn_coco", "state_dict.npz", content, recompute=True, stops=True) == 1


@pytest.mark.parametrize("array", read("unit", "unit.npz"))
def test_a_change_of_any_array_of_unit_fails(case, array):
    content = read("unit", "unit.npz")
    is_input = array in unit.INPUTS
    change = 0.3 + 1.1 * content[array] if is_input else disturbed(content[array])
    assert case("unit", "unit.npz", content | {array: change}, recompute=is_input) == 1


@pytest.mark.parametrize("array", read("test_resize", "io.npz"))
def test_a_change_of_any_array_of_resize_fails(case, array):
    content = read("test_resize", "io.npz")
    content[array] = disturbed(content[array])
    assert case("test_resize", "io.npz", content, recompute=array[0] == "i") == 1


@pytest.mark.parametrize(("name", "file"), [("unit", "unit.npz"), ("test_resize", "io.npz")])
def test_an_unknown_array_of_unit_or_resize_fails(case, name, file):
    assert case(name, file, read(name, file) | {"surprise": np.zeros(1)}) == 1


def test_a_case_with_two_empty_images_passes(tmp_path):
    """The stored results are our own: the test shows that such a case can be read, run and compared."""
    inputs, truth = read("maskrcnn_coco", "inputs.npz"), read("maskrcnn_coco", "ground_truth.json")
    config = read("maskrcnn_coco", "config.json")
    for name in ("images", "outputs", "n_gt"):
        del config[name]
    empty = {"height": 96, "width": 64, "out_height": 48, "out_width": 32}
    empty |= {"classes": [], "polygons": [], "boxes": []}
    kept = {name: array for name, array in inputs.items() if name.endswith("0")}
    kept |= {
        "image1": inputs["image1"][:96, :64],
        "image2": inputs["image0"][:96, :64],
        "gt_boxes2": np.zeros((0, 4), np.float32),
        "gt_classes2": np.zeros(0, np.int64),
    }
    write(tmp_path / "inputs.npz", kept)
    write(tmp_path / "ground_truth.json", [truth[0], empty, empty])
    write(tmp_path / "config.json", config)
    link(tmp_path, COCO, "state_dict.npz")
    found = detector.compute(tmp_path)
    write(tmp_path / "losses.json", found.losses | {"params_without_grad": []})
    boxes = {f"eval_proposals{i}": part.boxes for i, part in enumerate(found.proposals["eval"])}
    write(tmp_path / "rpn.npz", boxes)
    sampled = {k: v for k, v in found.training.items() if not k.startswith("mask_targets")}
    write(tmp_path / "train.npz", sampled)
    assert parity.main([str(tmp_path)]) == 0


def test_a_case_without_losses_or_ground_truth_passes(tmp_path):
    """A case for inference: test-time files only, and a config without training settings."""
    folder = tmp_path / "inference"
    folder.mkdir()
    files = ("state_dict.npz", "noise_floor.json", "backbone.npz", "detections.npz", "results.json")
    link(folder, COCO, *files)
    rpn = read("maskrcnn_coco", "rpn.npz")
    write(folder / "rpn.npz", {n: a for n, a in rpn.items() if not n.startswith("train")})
    inputs = read("maskrcnn_coco", "inputs.npz")
    write(folder / "inputs.npz", {n: a for n, a in inputs.items() if n.startswith("image")})
    config = read("maskrcnn_coco", "config.json")
    for name in ("rpn_batch", "roi_batch"):
        del config[name]
    write(folder / "config.json", config)
    assert parity.main([str(folder)]) == 0
    truth = read("maskrcnn_coco", "ground_truth.json")
    sizes = ("height", "width", "out_height", "out_width")
    write(folder / "ground_truth.json", [{name: row[name] for name in sizes} for row in truth])
    del config["outputs"]
    write(folder / "config.json", config)
    assert parity.main([str(folder)]) == 0  # a ground truth with sizes only
    content = read("maskrcnn_coco", "detections.npz")
    (folder / "detections.npz").unlink()
    write(folder / "detections.npz", content | {"post_boxes1": content["post_boxes1"] + 1})
    assert parity.main([str(folder)]) == 1


@pytest.mark.parametrize("file", ["train.npz", "losses.json"])
def test_stored_training_results_without_ground_truth_fail(tmp_path, capsys, file):
    link(tmp_path, COCO, "state_dict.npz", "config.json", file)
    inputs = read("maskrcnn_coco", "inputs.npz")
    write(tmp_path / "inputs.npz", {n: a for n, a in inputs.items() if n.startswith("image")})
    assert parity.main([str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "stopped by" not in said and "not compared" in said


def test_losses_are_compared_without_polygons(tmp_path):
    link(tmp_path, COCO, "state_dict.npz", "config.json", "inputs.npz")
    losses = read("maskrcnn_coco", "losses.json")
    kept = {name: value for name, value in losses.items() if "polygon" not in name}
    write(tmp_path / "losses.json", kept)
    assert parity.main([str(tmp_path)]) == 0
    kept["losses_bitmask"]["loss_mask"] *= 1.001
    write(tmp_path / "losses.json", kept)
    assert parity.main([str(tmp_path)]) == 1


def test_a_ground_truth_without_an_entry_for_each_image_fails(tmp_path, capsys):
    link(tmp_path, COCO, "state_dict.npz", "config.json", "inputs.npz")
    write(tmp_path / "ground_truth.json", read("maskrcnn_coco", "ground_truth.json")[:1])
    assert parity.main([str(tmp_path)]) == 1
    assert "expected 2 entries, one per image, got 1" in capsys.readouterr().out
