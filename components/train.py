"""Step `train`: trains in the step's process (`train`) or in a distributed job (`train_job`).

Both components have the same inputs and outputs; `train_job` has the additional input
`task_config`. The fingerprint of the data (`data`) and a digest of the initial weights (`initial`)
are part of the step's cache key. KFP's cache compares parameters by value and artifacts by ID, so
the configs come from the cached step `configs`, not from the step `data`, which is never cached.
"""

from kfp import dsl
from kfp.dsl import Artifact, Input, Model, Output

from components.decorator import component

# Task settings that are passed on to the job's pods. RESOURCES is included because kfp otherwise
# rejects resources on the task, which apply to the launcher's pod only: the job's resources are
# set in its manifest.
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
    """Train in this process. `nodes`, `pool`, `job_kind`, `job` and `image` are not used."""
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
    """Verify the data; train in a job on the cluster, or follow the job of an earlier attempt."""
    from components import run_id
    from components.launcher.launch import launch
    from vitdet import stages

    with stages.recorded(workspace, name, run_id(), "train"):
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
                check_processes=lambda count: stages.check_processes(settings.path, name, count),
                keep_logs=lambda files: stages.keep_logs(
                    settings.path, name, workspace, run_id(), files
                ),
            )
        stages.copy_checkpoint(workspace, name, run_id(), checkpoint.path)
