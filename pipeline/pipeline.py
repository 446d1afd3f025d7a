"""The graph: recipes -> configs -> data, weights -> per recipe train -> evaluate -> gate -> register; one table at the
end, and an exit handler.

The cluster's pipeline and the local one differ in what `build` is given. Experiments are described by recipes and
overrides, the cluster by nodes, pool, job_kind and workspace; neither knows the other.

Around kfp 2.17: its local runner skips an If on an output that is not called `Output`, and one that is no string is
compared wrongly, so `gate` returns one string. It calls container components and CreatePVC not at all, so every step is
a Python component. `set_retry` really sleeps there, so local runs have none.
"""

import re
from collections.abc import Callable
from pathlib import Path

import yaml
from kfp import compiler, dsl, kubernetes
from kfp.dsl import PipelineTask
from kfp.dsl.base_component import BaseComponent

from components import IMAGE, RUN_ID
from components.cleanup import clean_up
from components.compare import announce, compare
from components.config import configs
from components.data import data
from components.evaluate import evaluate
from components.gate import gate
from components.register import register
from components.train import train_job
from components.weights import weights
from pipeline.accelerators import GPU, Accelerators, accelerators

MANIFESTS = Path(__file__).parents[1] / "manifests"
JOBS = (MANIFESTS / "pytorchjob" / "pytorchjob.yaml", MANIFESTS / "trainjob" / "trainjob.yaml")
KINDS = {"PyTorchJob": "pytorchjob", "TrainJob": "trainjob"}
CLAIM, MOUNT = "vitdet-data", "/data"
SECRET = {
    "MLFLOW_TRACKING_URI": "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME": "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD": "MLFLOW_TRACKING_PASSWORD",
}
# Longer than any training. Argo counts this from the start of the first try: when it is over it tries no more, and ends
# the try that runs (argo-workflows, operator.go: processNodeRetries); kfp's default is an hour. What no retry mends,
# the launcher knows (components/following.py); a pod that is deleted without a trace Argo does not retry.
TRYING = "1296000s"

Dress = Callable[
    [PipelineTask, str], PipelineTask
]  # (task, its size) -> the task with what the cluster has to know


def build(
    train: BaseComponent, job: str = "", image: str = "", dress: Dress = lambda task, size: task
) -> BaseComponent:
    """The pipeline with this way to train; `job` is the YAML text of the jobs that it may start in this image."""

    @dsl.pipeline(
        name="vitdet",
        description="Trains recipes, compares them, registers what beats the champion.",
    )
    def vitdet(
        recipes: list[str],
        overrides: list[str] = [],  # noqa: B006
        workspace: str = MOUNT,
        nodes: int = 1,
        pool: str = "",
        job_kind: str = "pytorchjob",
    ) -> None:
        end = dress(
            clean_up(recipes=recipes, overrides=overrides, workspace=workspace, job_kind=job_kind),
            "small",
        )
        with dsl.ExitHandler(end, name="experiment"):
            config = dress(
                configs(recipes=recipes, overrides=overrides, workspace=workspace), "once"
            )
            resolved = config.outputs["resolved"]
            dataset = dress(data(resolved=resolved, workspace=workspace), "data")
            initial = dress(weights(resolved=resolved, workspace=workspace), "data")
            parent = dress(announce(resolved=resolved, workspace=workspace), "small")
            for task in (initial, parent, end):  # what they do outside of KFP's sight is done again
                task.set_caching_options(False)
            with dsl.ParallelFor(config.outputs["Output"], name="recipe") as name:
                trained = dress(
                    train(
                        name=name,
                        resolved=resolved,
                        manifest=dataset.outputs["manifest"],
                        data=dataset.outputs["Output"],
                        initial=initial.output,
                        workspace=workspace,
                        nodes=nodes,
                        pool=pool,
                        job_kind=job_kind,
                        job=job,
                        image=image,
                    ),
                    "launcher",
                ).after(parent)
                measured = dress(
                    evaluate(
                        checkpoint=trained.outputs["checkpoint"],
                        name=name,
                        resolved=resolved,
                        manifest=dataset.outputs["manifest"],
                        workspace=workspace,
                    ),
                    "gpu",
                )
                judged = dress(
                    gate(
                        figures=measured.outputs["figures"],
                        name=name,
                        resolved=resolved,
                        workspace=workspace,
                    ),
                    "small",
                )
                with dsl.If(judged.outputs["Output"] == "passed", name="better"):
                    registered = dress(
                        register(
                            checkpoint=trained.outputs["checkpoint"],
                            figures=measured.outputs["figures"],
                            name=name,
                            resolved=resolved,
                            workspace=workspace,
                        ),
                        "model",
                    )
            table = dress(
                compare(
                    verdicts=dsl.Collected(judged.outputs["verdict"]),
                    resolved=resolved,
                    workspace=workspace,
                ),
                "small",
            )
            for task in (
                measured,
                judged,
                registered,
                table,
            ):  # the registry and MLflow change without KFP's knowledge
                task.set_caching_options(False)

    return vitdet


def compile_pipeline(file: Path, job: str = "") -> Path:
    """Writes the cluster's pipeline; the same bytes each time.

    job: YAML text with the training jobs, as `kubectl kustomize` prints it; else those of manifests/. The steps run in
    its image, unless the environment's VITDET_IMAGE names another. Raises ValueError when it holds no job, or a
    TrainJob without its runtime.
    """
    text = job or "\n---\n".join(path.read_text() for path in JOBS)
    jobs = only_jobs(text)
    image = IMAGE or image_of(jobs)
    compiler.Compiler().compile(
        build(train_job, jobs, image, cluster(accelerators(text), image)), str(file)
    )
    return file


def kinds(text: str) -> set[str]:
    """The values of job_kind that the jobs of a YAML stream serve. Raises as `only_jobs` does."""
    return {KINDS[job["kind"]] for job in yaml.safe_load_all(only_jobs(text))}


def only_jobs(text: str) -> str:
    """The documents of a YAML stream that are training jobs, as text: a dict would turn 4 into 4.0.

    Raises ValueError when there is none, or two of a kind, or when it is no YAML.
    """
    parts = [part.strip("\n") for part in re.split(r"^---\s*$", text, flags=re.MULTILINE)]
    found: dict[str, str] = {}
    for part in parts:
        try:
            document = yaml.safe_load(part)
        except yaml.YAMLError as error:
            raise ValueError(
                f"the job's file: not readable as YAML: {' '.join(str(error).split())}"
            ) from error
        kind = document.get("kind") if isinstance(document, dict) else None
        if kind in KINDS:
            if not isinstance(document.get("spec"), dict):
                raise ValueError(f"the job's file: its {kind} has no spec")
            if kind in found:
                raise ValueError(f"two documents of kind {kind}: which one is the training job?")
            found[kind] = part
    if not found:
        raise ValueError(
            f"no {' or '.join(KINDS)} among the {len(parts)} documents; give the output of "
            "`kubectl kustomize manifests/overlays/NAME`"
        )
    return "\n---\n".join(found[kind] for kind in KINDS if kind in found) + "\n"


def cluster(needs: Accelerators, image: str) -> Dress:
    """What pods need: image, volume, MLflow's secret, the run's id, resources, retries; and to evaluate a GPU where
    jobs train on GPUs.
    """
    # name: (processor, memory, memory at most, retries)
    sizes = {
        "once": ("100m", "512Mi", "2Gi", 0),
        "small": ("100m", "512Mi", "2Gi", 3),
        "data": ("500m", "2Gi", "24Gi", 2),
        "launcher": ("100m", "1Gi", "4Gi", 2),
        "gpu": ("1", "4Gi", "24Gi", 2),
        "model": ("500m", "2Gi", "16Gi", 2),
    }

    def dress(task: PipelineTask, size: str) -> PipelineTask:
        processor, memory, most, retries = sizes[size]
        task.set_container_image(image)
        task.set_cpu_request(processor).set_memory_request(memory).set_memory_limit(most)
        if retries:
            task.set_retry(
                retries, backoff_duration="30s", backoff_factor=2, backoff_max_duration=TRYING
            )
        # The image's own user, said, since Pod Security `restricted` believes no image; KFP adds the rest of it.
        kubernetes.set_security_context(
            task, run_as_user=1000, run_as_group=1000, run_as_non_root=True
        )
        kubernetes.mount_pvc(task, CLAIM, MOUNT)
        kubernetes.use_secret_as_env(task, "vitdet-mlflow", SECRET, optional=True)
        # The label, for a placeholder as an argument would be another value in each run, and no step ever cached.
        kubernetes.use_field_path_as_env(task, RUN_ID, "metadata.labels['pipeline/runid']")
        if size == "gpu":
            kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit="4Gi")
            if needs.gpus:
                task.set_accelerator_type(GPU).set_accelerator_limit(1)
                for (
                    key,
                    value,
                ) in (
                    needs.selector.items()
                ):  # GKE lets a pod onto nodes only if it selects their pool
                    kubernetes.add_node_selector(task, key, value)
            for one in needs.tolerations:
                kubernetes.add_toleration(
                    task,
                    one.get("key"),
                    one.get("operator"),
                    one.get("value"),
                    one.get("effect"),
                    one.get("tolerationSeconds"),
                )
        return task

    return dress


def image_of(jobs: str) -> str:
    """The image of the jobs. Raises ValueError when they name different ones, or none."""
    found = set()
    for job in yaml.safe_load_all(jobs):
        replicas = job["spec"].get("pytorchReplicaSpecs", {}).values()
        found |= {one["template"]["spec"]["containers"][0].get("image", "") for one in replicas}
        found |= {job["spec"].get("trainer", {}).get("image", "")} - {""}
    if len(found) != 1 or "" in found:
        raise ValueError(
            f"the training jobs must name one image, they name {', '.join(sorted(found)) or 'none'}; "
            "set it in the manifests, or for all steps in VITDET_IMAGE"
        )
    return found.pop()
