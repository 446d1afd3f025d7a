"""Submitting runs: requests sent, and requests rejected beforehand. Annotations are not postponed: kfp reads them."""

import functools
import io
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kfp import compiler, dsl, kubernetes
from kfp.client.client import _extract_pipeline_yaml
from kfp_server_api import V2beta1Run

from pipeline import client, request
from pipeline.cli.submit import check_pool
from pipeline.cli.terminate import job_kind
from pipeline.request import kubeflow_cron, load_package
from tests.helpers.kubeflow import Kubeflow, Run

ROOT = Path(__file__).parents[2]


SEVENTY = ",".join(map(str, range(1, 71)))
check = functools.cache(request.check_recipes)  # each check is a process of 0.2 s


@dsl.component(base_image="python", install_kfp_package=False)
def one(name: str) -> str:
    return name


@dsl.component(base_image="python", install_kfp_package=False)
def last() -> None:
    pass


@dsl.pipeline(name="small")
def small(
    recipes: list[str],
    overrides: list[str],
    nodes: int = 1,
    pool: str = "",
    job_kind: str = "pytorchjob",
    workspace: str = "/data",
    sweep: list[str] = [],  # noqa: B006
    seeds: int = 1,
    fetch: str = "",
) -> None:
    with dsl.ExitHandler(last()), dsl.ParallelFor(recipes) as name:
        done = one(name=name)
        kubernetes.mount_pvc(done, "vitdet-data", "/data")
        with dsl.If(done.output == "tiny"):
            one(name=name)


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "small.yaml"
    compiler.Compiler().compile(small, str(path))
    return path


@pytest.fixture
def submit(cli: Run, package: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return `cli` with the verb submit and the package `small`; equal recipes are checked once."""
    monkeypatch.setattr(
        "pipeline.cli.submit.check_recipes",
        lambda recipes, settings, sweep, *rest: check(
            tuple(recipes), tuple(settings), tuple(sweep), *rest
        ),
    )
    given = ["submit", "--every", 0.01, "--package", package]
    return lambda *words: cli(*given, *words)


def test_a_run_has_the_requested_settings(kubeflow: Kubeflow, submit: Run, package: Path) -> None:
    words = (
        "cascade_mask_rcnn_vitdet_b_coco mask_rcnn_vitdet_b_coco --set optim.lr=2e-4 "
        "--set data.root=/data/coco --nodes 2 --pool h100 --job-kind trainjob "
        "--workspace /data/team --experiment study --service-account default-editor "
        "--pipeline-root s3://bucket/root"
    )
    code, out, said = submit(*words.split(), "--name", "a name")
    assert (code, said) == (0, "")
    assert out == f"run  a name\nid   0000-run-0\nlink {kubeflow.url}/#/runs/details/0000-run-0\n"
    [body] = kubeflow.bodies("POST /runs")
    assert body.pop("description").startswith("submission ")
    # as in kfp.Client
    assert body.pop("pipeline_spec") == _extract_pipeline_yaml(str(package)).to_dict()
    assert body == {
        "display_name": "a name",
        "experiment_id": "0000-exp-0",
        "service_account": "default-editor",
        "runtime_config": {
            "pipeline_root": "s3://bucket/root",
            "parameters": {
                "recipes": ["cascade_mask_rcnn_vitdet_b_coco", "mask_rcnn_vitdet_b_coco"],
                "overrides": ["optim.lr=2e-4", "data.root=/data/coco"],
                "nodes": 2,
                "pool": "h100",
                "job_kind": "trainjob",
                "workspace": "/data/team",
            },
        },
    }
    assert kubeflow.bodies("POST /experiments") == [{"display_name": "study"}]


def test_unset_options_are_left_to_the_pipeline_and_server(kubeflow: Kubeflow, submit: Run) -> None:
    for _ in range(2):
        assert submit("tiny")[0] == 0
    first, second = kubeflow.bodies("POST /runs")[:2]
    assert first["runtime_config"] == {"parameters": {"recipes": ["tiny"], "overrides": []}}
    assert first["service_account"] == "vitdet-pipeline"
    assert first["display_name"].startswith("tiny 20")
    text = (ROOT / "manifests" / "shared" / "accounts.yaml").read_text()
    accounts = [(item["kind"], item["metadata"]["name"]) for item in yaml.safe_load_all(text)]
    assert ("ServiceAccount", "vitdet-pipeline") in accounts
    assert submit("tiny", "--service-account", "")[0] == 0
    assert "service_account" not in kubeflow.bodies("POST /runs")[-1]
    assert first["description"] != second["description"]
    assert kubeflow.bodies("POST /experiments") == [{"display_name": "vitdet"}]  # created once


def test_the_pipeline_is_compiled_for_the_server(
    kubeflow: Kubeflow, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, said = cli("submit", "tiny", "--nodes", 2, "--pool", "h100")
    assert code == 0 and len(said.splitlines()) == 1
    assert "the steps' image 'vitdet' has no registry" in said
    assert "| python -m pipeline ... --job -" in said
    spec = kubeflow.bodies("POST /runs")[0]["pipeline_spec"]["pipeline_spec"]
    assert spec["pipelineInfo"]["name"] == "vitdet" and "comp-train-job" in spec["components"]
    job = (ROOT / "manifests" / "pytorchjob" / "pytorchjob.yaml").read_text()
    job = job.replace("image: vitdet", "image: registry.example.com/vitdet:1")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"kind: Namespace\n---\n{job}# of the overlay\n"))
    code, _, said = cli("submit", "tiny", "--job", "-")
    assert (code, said) == (0, "")
    assert "# of the overlay" in str(kubeflow.bodies("POST /runs")[1]["pipeline_spec"])


def test_the_job_kind_is_read_from_the_file_and_must_be_in_the_file(
    kubeflow: Kubeflow, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = (ROOT / "manifests" / "pytorchjob" / "pytorchjob.yaml").read_text()
    monkeypatch.setattr("sys.stdin", io.StringIO(job))
    said = "--job -: contains no trainjob, only pytorchjob; see --job-kind"
    words = ["submit", "tiny", "--job", "-", "--job-kind", "trainjob"]
    assert cli(*words) == (1, "", f"pipeline: {said}\n")
    assert not kubeflow.bodies("POST /runs")
    job = (ROOT / "tests" / "golden_pipeline" / "jobs.yaml").read_text()
    job = job.replace("kind: PyTorchJob", "kind: Other")
    job = job.replace("trainer: {", "trainer: {image: 'v:1', resourcesPerNode: {}, ")
    monkeypatch.setattr("sys.stdin", io.StringIO(job))
    assert cli("submit", "tiny", "--job", "-")[0] == 0
    (body,) = kubeflow.bodies("POST /runs")
    inputs = body["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
    assert inputs["job_kind"]["defaultValue"] == "trainjob"
    assert inputs["nodes"]["defaultValue"] == 2
    assert job_kind(V2beta1Run(pipeline_spec=body["pipeline_spec"])) == "trainjob"


def test_sweep_seeds_data_and_parallelism_are_sent(kubeflow: Kubeflow, submit: Run) -> None:
    words = ["--sweep", "optim.lr=1e-4,2e-4", "--seeds", 3, "--fetch", "lvis --split val"]
    assert submit("tiny", *words, "--parallel", 4)[0] == 0
    (body,) = kubeflow.bodies("POST /runs")
    assert body["runtime_config"]["parameters"] == {
        "recipes": ["tiny"],
        "overrides": [],
        "sweep": ["optim.lr=1e-4,2e-4"],
        "seeds": 3,
        "fetch": "lvis --split val",
    }
    assert "'iteratorPolicy': {'parallelismLimit': 4}" in str(body["pipeline_spec"])


def test_no_cache_applies_at_any_depth(package: Path, kubeflow: Kubeflow, submit: Run) -> None:
    def cached(spec: dict) -> list[bool]:
        groups = [spec["root"], *spec["components"].values()]
        return [
            task.get("cachingOptions", {}).get("enableCache", False)
            for group in groups
            for task in group.get("dag", {}).get("tasks", {}).values()
        ]

    assert submit("tiny")[0] == submit("tiny", "--no-cache")[0] == 0
    with_cache, without = (
        body["pipeline_spec"]["pipeline_spec"] for body in kubeflow.bodies("POST /runs")
    )
    assert sum(cached(with_cache)) >= 3 and len(with_cache["root"]["dag"]["tasks"]) == 2
    assert not any(cached(without))


def test_a_recipe_file_is_read_again_in_each_run(kubeflow: Kubeflow, cli: Run) -> None:
    assert cli("submit", "tiny")[0] == cli("submit", "/data/mine.yaml", "tiny")[0] == 0
    cached = []
    for body in kubeflow.bodies("POST /runs"):
        components = body["pipeline_spec"]["pipeline_spec"]["components"].values()
        steps = [
            step for part in components for step in part.get("dag", {}).get("tasks", {}).items()
        ]
        cached.append(
            {name for name, task in steps if task.get("cachingOptions", {}).get("enableCache")}
        )
    assert cached[0] - cached[1] == {"configs"} and "train-job" in cached[1]
    assert "data" not in cached[0]  # the data may have changed in place


def test_a_namespace_is_sent_only_to_a_multi_user_server(
    kubeflow: Kubeflow, submit: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert submit("tiny", "--namespace", "team-a")[0] == 0
    kubeflow.users, kubeflow.kept["experiments"] = True, []
    code, _, said = submit("tiny")
    assert code == 1 and "pass your profile's namespace with --namespace" in said
    assert submit("tiny", "--namespace", "team-a")[0] == 0
    experiment = {"display_name": "vitdet", "namespace": "team-a"}
    assert kubeflow.bodies("POST /experiments")[-1] == experiment
    (tmp_path / "namespace").write_text("team-b\n")
    monkeypatch.setattr(client, "POD_NAMESPACE", tmp_path / "namespace")
    kubeflow.kept["experiments"] = []
    assert submit("tiny")[0] == 0
    assert kubeflow.bodies("POST /experiments")[-1]["namespace"] == "team-b"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tinyy"], "tinyy: no such recipe; did you mean 'tiny'?"),
        (["tiny", "--set", "optim.lrr=1"], "optim.lrr: no such setting; did you mean 'lr'?"),
        (["tiny", "--sweep", "optim.lr=1,fast"], "optim.lr: expected a number, got 'fast'"),
        (["tiny", "--sweep", "optim.lr"], "sweep 'optim.lr': expected SECTION.KEY=VALUE,VALUE,..."),
        (
            ["tiny", "--set", "optim.lr=1", "--sweep", "optim.lr=1,2"],
            "optim.lr is set twice; set it only once",
        ),
        (
            ["tiny", "--sweep", "optim.lr=1,2", "--sweep", "optim.steps=1,2,3", "--seeds", 20],
            "120 training runs (recipes x combinations x seeds: 1 x 6 x 20), expected at most 64; submit several pipeline runs",
        ),
        (
            ["tiny", "mask_rcnn_vit_b_coco", "--sweep", f"optim.steps={SEVENTY}", "--seeds", 3],
            "420 training runs (recipes x combinations x seeds: 2 x 70 x 3), expected at most 64",
        ),
        (
            ["tiny", "mask_rcnn_vitdet_b_coco"],
            "mask_rcnn_vitdet_b_coco and tiny cannot be compared",
        ),
        (["tiny", "--fetch", "imagenet"], "fetch: expected coco, lvis or 'convert SOURCE'"),
        (["tiny", "tiny"], "a recipe is given twice: tiny"),
        (["mine.yaml"], "mine.yaml is a relative path; pass a recipe's name"),
        (
            ["tiny", "--set", "tracking.uri=https://me:hunter2@mlflow"],
            "--set tracking.uri: the credentials would be visible in",
        ),
        (
            ["tiny", "--set", "data.root=https://store/data?sig=hunter2"],
            "--set data.root: the credentials would be visible in",
        ),
        (["tiny", "--set", "https://me:hunter2@mlflow"], "https://***@mlflow: the credentials"),
        (
            ["tiny", "--fetch", "convert https://me:hunter2@store --set data.max_pixels=9"],
            "--fetch: the credentials would be visible in",
        ),
        (["tiny", "--workspace", "team-a"], "team-a: expected /data or a folder in it"),
        (["tiny", "--workspace", "/tmp/data"], "/tmp/data: expected /data or a folder in it"),
        (["tiny", "--cron", "0 3 * *"], "schedule '0 3 * *': expected five fields"),
        (["tiny", "--cron", "@daily", "--wait"], "--wait follows one run"),
        (["tiny", "--package", ROOT / "dvc.yaml"], "not a compiled pipeline"),
        (["tiny", "--package", "none.yaml"], "pipeline: none.yaml: no such file"),
        (["tiny", "--package", sys.executable], "not a compiled pipeline"),
        (["tiny", "--token-file", "-", "--cookie-file", "-"], "can read standard input"),
    ],
)
def test_an_invalid_request_is_rejected_in_one_line(
    kubeflow: Kubeflow, submit: Run, words: list, said: str
) -> None:
    code, out, line = submit(*words)
    assert (code, out, len(line.splitlines())) == (1, "", 1)
    assert said in line and "hunter2" not in line
    assert not kubeflow.requests


@pytest.mark.parametrize(
    "words",
    [
        *("--nodes 0", "--nodes two", "--node 2", "--job-kind mpijob", "--timeout 0"),
        "--cron @daily --max-concurrency 11",
    ],
)
def test_an_invalid_option_is_a_usage_error(kubeflow: Kubeflow, submit: Run, words: str) -> None:
    assert submit("tiny", *words.split())[0] == 2
    assert not kubeflow.requests


def test_a_pipeline_with_other_parameters_is_rejected(package: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the pipeline has no parameter color"):
        load_package(package, {"recipes": [], "overrides": [], "color": "red"}, True)
    with pytest.raises(ValueError, match="missing pipeline parameters: overrides, recipes"):
        load_package(package, {}, True)


def test_recipe_files_on_the_cluster_are_checked_there(kubeflow: Kubeflow, submit: Run) -> None:
    code, _, said = submit("/data/recipes/mine.yaml")
    assert code == 0 and said == (
        "pipeline: the first step validates the recipes and settings that are not validated here\n"
    )


def test_the_client_does_not_import_torch() -> None:
    code = (
        "import sys, pipeline.cli\ntry: pipeline.cli.main(['submit', '--help'])\n"
        "except SystemExit: pass\nsys.exit(' '.join({'torch', 'mlflow', 'vitdet'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--token-file" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (
            "0 3 * * 1-5",
            "0 0 3 * * 1-5",
        ),  # Kubeflow would interpret it as "every hour, at minute 3"
        ("*/30 2 4 * * ?", "*/30 2 4 * * ?"),
        ("@daily", "@daily"),
        ("@every 12h", "@every 12h"),
    ],
)
def test_a_schedule_is_interpreted_like_crontab(
    kubeflow: Kubeflow, submit: Run, given: str, sent: str
) -> None:
    assert kubeflow_cron(given) == sent
    code, out, _ = submit("tiny", "--cron", given, "--max-concurrency", 2, "--no-catch-up")
    assert code == 0 and f"link {kubeflow.url}/#/recurringrun/details/0000-rec-0" in out
    [body] = kubeflow.bodies("POST /recurringruns")
    assert body["trigger"] == {"cron_schedule": {"cron": sent}} and body["mode"] == "ENABLE"
    found = (body["max_concurrency"], body["no_catchup"], body["display_name"])
    assert found == ("2", True, "tiny")
    assert not kubeflow.bodies("POST /runs")


@pytest.mark.parametrize("expression", ["", "0 3 * * * * *", "0 3 * * mon;x", "@never", "@every"])
def test_an_invalid_schedule_is_rejected(expression: str) -> None:
    with pytest.raises(ValueError, match="as in a crontab"):
        kubeflow_cron(expression)


def test_a_pool_that_is_not_a_valid_label_value_is_rejected() -> None:
    for good in (None, "", "h200", "a100.spot_1"):
        check_pool(good)
    for bad in ("h200 ", "-x", "a/b", "x" * 64):
        with pytest.raises(ValueError, match="--pool .*expected a label value"):
            check_pool(bad)
