"""Fields that the cluster's version of an operator lacks, without a cluster."""

from __future__ import annotations

import copy

import pytest

from components.launcher.pruned import check_dropped, dropped_fields
from components.launcher.queue import QUEUE
from components.launcher.status import deadline
from components.launcher.templates import KINDS, fill_template
from tests.cluster.test_following import DONE, Record, follow
from tests.cluster.test_launcher import TEMPLATES, filled, request

PATCHES = ("podTemplateOverrides", "runtimePatches")
VOLUME = {"name": "data", "persistentVolumeClaim": {"claimName": "data"}}


def trainjob(**changes: object) -> dict:
    return fill_template(TEMPLATES["trainjob"], KINDS["trainjob"], request(**changes))


def without(job: dict, *fields: str) -> dict:
    spec = {key: value for key, value in job["spec"].items() if key not in fields}
    return {**job, "spec": spec}


def test_fields_added_by_webhooks_and_defaults_are_not_a_loss() -> None:
    sent = {"a": [{"name": "x", "b": 1}], "zero": 0, "none": {}, "quantity": "1000m"}
    received = {"a": [{"name": "injected"}, {"name": "x", "b": "1", "c": 2}], "quantity": "1"}
    assert dropped_fields(sent, received, "spec") == []
    assert dropped_fields(received, sent, "spec") == ["spec.a[0]", "spec.a[1].c"]
    assert dropped_fields({"a": [{"b": 1}]}, {"a": []}, "spec") == ["spec.a[0]"]
    job = trainjob(pool="")
    assert check_dropped(KINDS["trainjob"], job, copy.deepcopy(job)) == ([], "")


def test_the_loss_of_the_deadline_or_labels_is_a_warning() -> None:
    job = trainjob(pool="")
    received = without(job, "activeDeadlineSeconds", *PATCHES)
    warnings, error = check_dropped(KINDS["trainjob"], job, received)
    assert error == "" and warnings == [
        "the cluster's TrainJob has no spec.activeDeadlineSeconds: the job has no deadline, so a forgotten job does "
        "not end by itself; upgrade Kubeflow Trainer to 2.2 or later",
        "the cluster's TrainJob has no spec.podTemplateOverrides or spec.runtimePatches: the pods lack the run's "
        "labels; upgrade Kubeflow Trainer to 2.1 or later",
    ]


@pytest.mark.parametrize("field", PATCHES)
def test_each_version_of_trainer_has_one_of_two_fields_for_pod_settings(field: str) -> None:
    job = trainjob(pool="h200", task={"volumes": [VOLUME]})
    assert check_dropped(KINDS["trainjob"], job, without(job, field)) == ([], "")
    # entries of the template are in only one of the fields
    job["spec"][field].insert(0, {"manager": "user"})
    _, error = check_dropped(KINDS["trainjob"], job, without(job, field))
    assert error.startswith(f"the cluster's TrainJob has no spec.{field} (")
    assert error.endswith("; the job would train differently") and "2.2" in error
    # only the template sets pod settings, and the cluster has neither field
    job["spec"][field][1] = {"metadata": {}}
    error = check_dropped(KINDS["trainjob"], job, without(job, *PATCHES))[1]
    assert f"spec.{field} (" in error


def test_a_queued_trainjob_that_kueue_cannot_start_is_reported() -> None:
    """Kueue 0.17 and later start a TrainJob only with runtimePatches, which Trainer 2.1 lacks."""
    job = trainjob()
    job["metadata"]["labels"][QUEUE] = "pool"
    for received, said in ((without(job, "runtimePatches"), True), (job, False)):
        warnings, error = check_dropped(KINDS["trainjob"], job, received)
        assert not error
        assert [text.partition(";")[0] for text in warnings] == said * [
            "the cluster's TrainJob has no spec.runtimePatches: Kueue 0.17 or later cannot start the job"
        ]


def test_lost_pod_settings_are_an_error_that_names_them() -> None:
    job = trainjob(pool="h200", task={"volumes": [VOLUME], "tolerations": [{"key": "spot"}]})
    _, error = check_dropped(KINDS["trainjob"], job, without(job, *PATCHES))
    assert error == (
        "the cluster's TrainJob has no spec.podTemplateOverrides or spec.runtimePatches, which set nodeSelector, "
        "tolerations, volumes of the pods (upgrade Kubeflow Trainer to 2.1 or later); the job would train differently"
    )


@pytest.mark.parametrize("field", ["pytorchReplicaSpecs", "nprocPerNode"])
def test_a_job_that_would_train_differently_is_deleted(field: str) -> None:
    record = Record((DONE, []))
    record.forgotten = (field,)
    _, error = follow(record)
    assert record.asked == ["create", "delete"]
    assert error == (
        f"PyTorchJob vitdet-tiny-1 was deleted: the cluster's PyTorchJob has no spec.{field} (install the Kubeflow training "
        "operator (v1.9)); the job would train differently"
    )
    assert field in filled()["spec"]


def test_a_job_without_a_deadline_is_described_without_one() -> None:
    job = trainjob()
    assert deadline(job) == "1209600 s" and deadline(without(job, "activeDeadlineSeconds")) == ""
