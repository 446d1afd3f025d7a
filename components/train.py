"""Step `train`: in this process (`train`), or as a distributed job of the cluster (`train_job`).

Both take the same and give the same, so that a pipeline differs in this one word. `data` is the fingerprint of the data, `initial` a digest of the weights:
a step whose inputs are those of an earlier one may be taken from KFP's cache, which compares parameters by value and
artifacts by their id. So the configs are those of the step `configs`, itself cached, and not those of `data`.
"""

from kfp import dsl
from kfp.dsl import Artifact, Input, Model, Output

from components.decorator import component

# What is set on the task reaches the job's pods. Resources are named because kfp refuses to set any else: those of the
# task are the launcher's own, those of the job stand in its manifest.
PASSED_ON = [
    dsl.TaskConfigField.KUBERNETES_AFFINITY,
    dsl.TaskConfigField.KUBERNETES_NODE_SELECTOR,
    dsl.TaskConfigField.KUBERNETES_TOLERATIONS,
    dsl.TaskConfigPassthrough(field=dsl.TaskConfigField.ENV, apply_to_task=True),
    dsl.TaskConfigPassthrough(field=dsl.TaskConfigField.KUBERNETES_VOLUMES, apply_to_task=True),
    dsl.TaskConfigPassthrough(field=dsl.TaskConfigField.RESOURCES, apply_to_task=True),
]


@component
def train(
    name: str,
    settings: Input[Artifact],
    data: str,
    initial: str,
    workspace: str,
    nodes: int,
    pool: str,
    job_kind: str,
    job: str,
    image: str,
    checkpoint: Output[Model],
) -> None:
    """Trains here. Nodes, pool, kind and job are the cluster's and unused."""
    from components import run_id
    from vitdet import stages

    stages.train_recipe(settings.path, name, data, workspace, run_id(), checkpoint.path)


@component(task_config_passthroughs=PASSED_ON)
def train_job(
    name: str,
    settings: Input[Artifact],
    data: str,
    initial: str,
    workspace: str,
    nodes: int,
    pool: str,
    job_kind: str,
    job: str,
    image: str,
    checkpoint: Output[Model],
    task_config: dsl.TaskConfig,
) -> None:
    """Trains in a job of the cluster, once the data has proved to be what it was; follows a job that is there."""
    from components import run_id
    from components.launcher.launch import launch
    from vitdet import stages

    argv = stages.train_argv(settings.path, name, data, workspace, run_id())
    if not stages.is_trained(workspace, name, run_id()):
        launch(
            template=job,
            kind=job_kind,
            run_id=run_id(),
            name=name,
            args=argv,
            nodes=nodes,
            pool=pool,
            image=image,
            workspace=workspace,
            task_config={**vars(task_config), "resources": None},
            finished=lambda: stages.is_trained(workspace, name, run_id()),
        )
    stages.copy_checkpoint(workspace, name, run_id(), checkpoint.path)
