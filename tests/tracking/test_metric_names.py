"""Names of metrics, with names of classes in them, as MLflow accepts them."""

import pytest

from vitdet.tracking.runs import metric_name, with_metric_names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("box_ap", "box_ap"),
        ("class_ap/traffic light", "class_ap/traffic light"),
        ("class_ap/cup (small), 50%", "class_ap/cup _small__ 50_"),
        ("class_ap/a/b", "class_ap/a_b"),
        ("class_ap/..", "class_ap/_"),
        ("class_ap/", "class_ap/_"),
        ("class_ap/.hidden", "class_ap/_hidden"),
        ("class_ap/straße", "class_ap/straße"),
        ("class_ap/" + "x" * 300, "class_ap/" + "x" * 241),
    ],
)
def test_a_metric_has_a_name_that_mlflow_accepts(name, expected):
    assert metric_name(name) == expected
    mlflow = pytest.importorskip("mlflow.utils.validation")
    mlflow._validate_metric(expected, 1.0, 1, 1)


def test_metrics_of_two_classes_keep_two_names():
    given = {"class_ap/a/b": 1.0, "class_ap/a_b": 2.0, "class_ap/a_b_2": 3.0, "class_ap/a?b": 4.0}
    assert with_metric_names(given) == {
        "class_ap/a_b": 1.0, "class_ap/a_b_2": 2.0, "class_ap/a_b_2_2": 3.0, "class_ap/a_b_3": 4.0
    }  # fmt: skip
    long = with_metric_names({"x" * 300: 1.0, "x" * 301: 2.0})
    assert list(long) == ["x" * 250, "x" * 248 + "_2"]
