"""The pipeline graph.

recipes -> configs -> data, weights, announce -> for each training run: train -> evaluate ->
champion (if its AP on this data is unknown) -> gate -> register; then compare and an exit handler.

The cluster's pipeline and the local one differ only in the arguments of `build`. Recipes,
overrides, sweep, seeds and fetch describe the experiment; nodes, pool, job_kind and workspace
describe the cluster. The experiment does not depend on the cluster.

Step `configs` resolves the settings that do not depend on the data; step `data` resolves the other
settings and is never cached, as the data may change in place. The data's fingerprint is an input of
the training runs, which are cached. The cache compares artifacts by ID, so the training step has no
artifact of `data` as input. It checks the fingerprint and reads splits and classes from the data.

ParallelFor's parallelism, a constant of the compiled pipeline, limits concurrent training runs.
The backend (2.14.0 to 2.17.0: argocompiler/dag.go, iteratorTask) sets it as `parallelism` of the
Argo template whose children are the iterations, so Argo counts iterations, not pods (argo-workflows
v3.6.7 to v4.0.5, operator.go: checkParallelism). A failed iteration does not stop the other
iterations (dag.go: assessDAGPhase waits for every node; template.failFast is not set). `compare`,
however, depends on the loop (`depends: X.Succeeded`) and is then omitted: the exit handler creates
the table of the finished training runs from the workspace, as it cannot use other steps' outputs.
`ignore_upstream_failure` is no alternative: the backend compiles it to an exit hook, which
iteratorTask does not pass on. When a run is retried, the backend repeats `compare`, but not an exit
handler that has succeeded.

Workarounds for kfp 2.17:

* The local runner skips an If on an output that is not named `Output`, and compares values other
  than strings incorrectly, so `gate` returns one string.
* In a ParallelFor, the local runner replaces every output parameter of a step outside the loop with
  the value of the loop's item, so the fingerprint is part of the item.
* The local runner does not support container components or CreatePVC, so every step is a Python
  component. With `set_retry` it sleeps between attempts, so local runs have no retries.
* On a cluster, a task that depends on a skipped If does not run (Argo: `depends: X.Succeeded`), and
  outputs of an If require dsl.OneOf and an Else, whose step would be an additional pod. The If
  around `evaluate_champion` is therefore in a nested pipeline, `champion`, which always succeeds.
  The result of `evaluate_champion` is passed through the registry and the workspace.
"""

from collections.abc import Callable
from pathlib import Path

from kfp import compiler, dsl, kubernetes
from kfp.dsl import Artifact, Input, Metrics, Model, PipelineTask
from kfp.dsl.base_component import BaseComponent

from components import IMAGE, RUN_ID
from components.cleanup import clean_up
from components.compare import announce, compare
from components.config import configs
from components.data import data
from components.evaluate import evaluate, evaluate_champion
from components.gate import gate
from components.register import register
from components.train import train_job
from components.weights import weights
from pipeline.job_manifests import (
    GPU,
    Accelerators,
    Shape,
    accelerators,
    job_image,
    job_shape,
    queue_labels,
    training_jobs,
)
from pipeline.request import MOUNT

MANIFESTS = Path(__file__).parents[1] / "manifests"
JOBS = (MANIFESTS / "pytorchjob" / "pytorchjob.yaml", MANIFESTS / "trainjob" / "trainjob.yaml")
CLAIM = "vitdet-data"
# Key of the Secret -> environment variable. MLflow's own variables are not used, as the MLflow
# plugin of Kubeflow Pipelines sets them (vitdet/tracking/address.py).
SECRET = {
    "MLFLOW_TRACKING_URI": "VITDET_MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME": "VITDET_MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD": "VITDET_MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_UI_URL": "MLFLOW_UI_URL",  # optional: MLflow's URL in a browser, for links
}
# Longer than any training run. Argo counts from the start of the first attempt; after this time
# there are no more retries and the running attempt is terminated (argo-workflows, operator.go:
# processNodeRetries). kfp's default is one hour. The launcher (components/launcher/follower.py)
# does not repeat a training run that a retry cannot fix. Whether Argo retries after nonzero exit
# codes and deleted pods is a setting of the cluster that a compiled pipeline cannot contain:
# manifests/pipelines.
MAX_RETRY_TIME = "1296000s"
# Annotations that keep autoscalers from evicting the launcher to free or replace its node.
DO_NOT_DISRUPT = {
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}

# (task, size) -> the task with the cluster's settings; see `cluster_settings`
Configure = Callable[[PipelineTask, str], PipelineTask]


def build(
    train: BaseComponent,
    job: str = "",
    image: str = "",
    configure: Configure = lambda task, size: task,
    parallel: int = 1,
    shape: Shape = Shape(),  # noqa: B008 - immutable
) -> BaseComponent:
    """Build the pipeline.

    Args:
        train: The component that trains.
        job, image: YAML of the training jobs that `train` may start, and their image.
        configure: Applies the cluster's settings to each task; by default, no settings.
        parallel: Maximum number of concurrent training runs, including evaluation; 0: no limit.
        shape: Defaults of the parameters nodes and job_kind.
    """

    @dsl.pipeline(name="champion")
    def champion(
        known: str,
        checkpoint: Input[Model],
        figures: Input[Metrics],
        name: str,
        resolved: Input[Artifact],
        workspace: str,
    ) -> None:
        with dsl.If(known == "unknown", name="unknown"):
            inputs = {"name": name, "resolved": resolved, "workspace": workspace}
            task = evaluate_champion(checkpoint=checkpoint, figures=figures, **inputs)
            configure(task, "gpu").set_caching_options(False)

    @dsl.pipeline(
        name="vitdet",
        description="Trains and compares recipes, and registers the models that beat the champion.",
    )
    def vitdet(
        recipes: list[str] = ["tiny"],  # noqa: B006
        overrides: list[str] = [],  # noqa: B006
        sweep: list[str] = [],  # noqa: B006
        seeds: int = 1,
        fetch: str = "",
        workspace: str = MOUNT,
        nodes: int = shape.nodes,
        pool: str = "",
        job_kind: str = shape.kind,
    ) -> None:
        """Train, evaluate and compare recipes.

        Args:
            recipes: Names of recipes (`tiny` is a demo that generates its data), or absolute paths
                of YAML files on the shared volume. All are trained on the same data and compared.
            overrides: Settings that override the recipes, each as SECTION.KEY=VALUE.
            sweep: Settings to vary, each as SECTION.KEY=VALUE,VALUE. Trains every combination.
            seeds: Number of training runs of each recipe and combination, with consecutive seeds.
                The table of results shows the mean and standard deviation.
            fetch: Data to download or convert to the shared volume first: `coco`, `lvis` or
                `convert SOURCE`, with options of `vitdet data`. Empty: the data already exists.
            workspace: Folder on the shared volume for data, weights and training runs.
            nodes: Number of nodes of each training run.
            pool: Node pool for training (node label vitdet/pool). Empty: as in the job's manifest.
            job_kind: Kind of the training job, `pytorchjob` or `trainjob`.
        """
        end = configure(
            clean_up(recipes=recipes, overrides=overrides, workspace=workspace, job_kind=job_kind),
            "small",
        )
        with dsl.ExitHandler(end, name="experiment"):
            plan = {"sweep": sweep, "seeds": seeds, "workspace": workspace}
            config = configure(configs(recipes=recipes, overrides=overrides, **plan), "once")
            settings = config.outputs["settings"]
            dataset = configure(data(settings=settings, workspace=workspace, fetch=fetch), "data")
            resolved = dataset.outputs["resolved"]
            initial = configure(weights(settings=settings, workspace=workspace), "data")
            parent = configure(announce(settings=settings, workspace=workspace), "small")
            # never cached: these steps depend on state outside KFP
            for task in (dataset, initial, parent, end):
                task.set_caching_options(False)
            with dsl.ParallelFor(
                dataset.outputs["Output"], name="recipe", parallelism=parallel
            ) as item:
                name, fingerprint = item.training, item.data
                trained = configure(
                    train(
                        name=name,
                        settings=settings,
                        data=fingerprint,
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
                checkpoint = trained.outputs["checkpoint"]
                inputs = {"name": name, "resolved": resolved, "workspace": workspace}
                measured = configure(
                    evaluate(checkpoint=checkpoint, data=fingerprint, **inputs), "gpu"
                )
                known, figures = measured.outputs["Output"], measured.outputs["figures"]
                best = champion(known=known, checkpoint=checkpoint, figures=figures, **inputs)
                judged = configure(gate(figures=figures, **inputs), "small").after(best)
                with dsl.If(judged.outputs["Output"] == "passed", name="better"):
                    registered = configure(
                        register(checkpoint=checkpoint, figures=figures, **inputs), "model"
                    )
            verdicts = dsl.Collected(judged.outputs["verdict"])
            table = configure(
                compare(verdicts=verdicts, resolved=resolved, workspace=workspace), "small"
            )
            # never cached: the registry and MLflow may have changed
            for task in (measured, best, judged, registered, table):
                task.set_caching_options(False)

    return vitdet


def compile_pipeline(file: Path, job: str = "", parallel: int = 1) -> Path:
    """Write the cluster's pipeline; the output is deterministic.

    job: YAML of the training jobs, as printed by `kubectl kustomize`; by default the jobs in
    manifests/. parallel: see `build`. The steps run in the image of the jobs unless the
    environment variable VITDET_IMAGE is set. Raises the errors of `training_jobs`, `job_image`,
    `accelerators` and `queue_labels`.
    """
    text = job or "\n---\n".join(path.read_text() for path in JOBS)
    jobs = training_jobs(text)
    image = IMAGE or job_image(jobs)
    configure = cluster_settings(accelerators(text), image, queue_labels(jobs))
    pipeline = build(train_job, jobs, image, configure, parallel, job_shape(jobs))
    compiler.Compiler().compile(pipeline, str(file))
    return file


def cluster_settings(needs: Accelerators, image: str, queue: dict[str, str]) -> Configure:
    """Return a function that sets a task's image, volume, MLflow secret, run ID and resources.

    Evaluation uses a GPU if the jobs train on GPUs, and waits in the jobs' Kueue queue.
    """
    # size -> (CPU request, memory request, memory limit, retries)
    sizes = {
        "once": ("100m", "512Mi", "2Gi", 0),
        "small": ("100m", "512Mi", "2Gi", 3),
        "data": ("500m", "2Gi", "24Gi", 2),
        "launcher": ("100m", "1Gi", "4Gi", 10),
        "gpu": ("1", "4Gi", "24Gi", 2),
        "model": ("500m", "2Gi", "16Gi", 2),
    }

    def configure(task: PipelineTask, size: str) -> PipelineTask:
        processor, memory, memory_limit, retries = sizes[size]
        task.set_container_image(image)
        task.set_env_variable("VITDET_IMAGE", image)  # steps and jobs log the image to MLflow
        task.set_cpu_request(processor).set_memory_request(memory).set_memory_limit(memory_limit)
        if retries:
            task.set_retry(
                retries,
                backoff_duration="30s",
                # a retry of a failed training run fails immediately: with exponential back-off,
                # the step would take hours to fail
                backoff_factor=1 if size == "launcher" else 2,
                backoff_max_duration=MAX_RETRY_TIME,
            )
        # Pod Security `restricted` requires runAsNonRoot; user and group are the image's. KFP sets
        # the other required fields.
        kubernetes.set_security_context(
            task, run_as_user=1000, run_as_group=1000, run_as_non_root=True
        )
        kubernetes.mount_pvc(task, CLAIM, MOUNT)
        kubernetes.use_secret_as_env(task, "vitdet-mlflow", SECRET, optional=True)
        # The run ID is read from the pod's label: an argument would change each run's cache key.
        kubernetes.use_field_path_as_env(task, RUN_ID, "metadata.labels['pipeline/runid']")
        for key, value in DO_NOT_DISRUPT.items() if size == "launcher" else ():
            kubernetes.add_pod_annotation(task, key, value)
        kubernetes.add_pod_label(task, "app.kubernetes.io/name", "vitdet")
        component = "step-download" if size == "data" else "step"
        kubernetes.add_pod_label(task, "app.kubernetes.io/component", component)
        if size == "gpu":
            for key, value in queue.items():
                kubernetes.add_pod_label(task, key, value)
            kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit="4Gi")
            if needs.gpus:
                task.set_accelerator_type(GPU).set_accelerator_limit(1)
                # on GKE a pod must select the node pool to be scheduled on its nodes
                for key, value in needs.selector.items():
                    kubernetes.add_node_selector(task, key, value)
            keys = ("key", "operator", "value", "effect", "tolerationSeconds")
            for toleration in needs.tolerations:
                kubernetes.add_toleration(task, *(toleration.get(key) for key in keys))
        return task

    return configure
