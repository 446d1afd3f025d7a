"""An API server that is down for 20 seconds, and one without the job's custom resource definition."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.launcher.templates import job_name
from tests.cluster.test_cluster_failures import meanwhile
from tests.conftest import ROOT
from tests.helpers.cluster import (
    PIPELINE_RUN,
    Scene,
    kubectl,
    on_cluster,
    scene,
    template,
    wait_until,
)
from tests.helpers.fake_node import free_port

KUBE = ROOT.parent / "shared/kube"
pytestmark = [*on_cluster, pytest.mark.skipif(not (KUBE / "up").exists(), reason="needs ../shared")]


class Server:
    """A control plane for these tests only; `up` starts the parts that are not running."""

    def __init__(self, folder: Path) -> None:
        etcd = free_port()  # etcd also uses the next port
        self.folder = folder
        self.environment = {
            **os.environ,
            "KUBE_TEST_RUN": str(folder),
            "KUBE_TEST_PORT": str(free_port()),
            "KUBE_TEST_ETCD_PORT": str(etcd),
        }

    def up(self) -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # `up` starts daemons
        subprocess.run([KUBE / "up"], env=self.environment, check=True, **quiet)

    def stop_api(self) -> None:
        pid = int((self.folder / "kube-apiserver.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        stat = Path(f"/proc/{pid}/stat")
        wait_until(lambda: not stat.exists() or stat.read_text().split()[2] == "Z")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    with pytest.MonkeyPatch.context() as patch:
        try:
            made.up()
            patch.setenv("KUBECONFIG", str(made.folder / "kubeconfig"))
            yield made
        finally:
            subprocess.run([KUBE / "down"], env=made.environment, check=False)


@pytest.fixture(scope="module")
def alone(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("alone")) as made:
        yield made


def test_an_outage_of_20_s_does_not_interrupt_the_job(server: Server, alone: Scene) -> None:
    def outage() -> None:
        name = f"{job_name(PIPELINE_RUN, 'outage')}-master-0"
        wait_until(lambda: any(line == "line 3" for line in alone.lines))
        server.stop_api()
        time.sleep(20)
        assert alone.node.containers[name].process.poll() is None  # training continues
        server.up()

    with meanwhile(outage):
        script = "for i in $(seq 50); do echo line $i; sleep 1; done"
        alone.launch(template(script=True), [script], "outage")
    assert [line for line in alone.lines if line.startswith("line")] == [
        f"line {number}" for number in range(1, 51)
    ]
    assert any("the API server does not respond" in line for line in alone.lines)
    assert any("the API server is responding again" in line for line in alone.lines)


def served() -> bool:
    path = "/apis/kubeflow.org/v1/namespaces/default/pytorchjobs"
    return subprocess.run(["kubectl", "get", "--raw", path], capture_output=True).returncode == 0


def test_a_missing_definition_is_an_error_that_names_what_to_install(alone: Scene) -> None:
    kubectl("delete crd pytorchjobs.kubeflow.org")
    wait_until(lambda: not served())  # this takes a moment after the deletion
    with pytest.raises(RuntimeError) as raised:
        alone.launch(template(script=True), ["true"], "undefined")
    text = str(raised.value)
    assert "the cluster has no resource PyTorchJob (kubeflow.org/v1); install the Kubeflow" in text
    assert "training operator" in text and "\n" not in text
