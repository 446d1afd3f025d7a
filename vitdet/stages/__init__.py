"""The steps of an experiment as functions, called by the command line and pipeline components.

`train`, `evaluate` and `register` do the same as the commands with these names. The steps of a
pipeline run (`pipeline/graph.py`) call the following functions:

    resolve_configs     Write a config for each training run from recipes, overrides, sweep, seeds.
    start_parent_run    Create the MLflow run that groups the training runs.
    prepare_data        Fetch and verify the data set; write configs with its splits and classes.
    fetch_weights       Fetch the initial weights.
    train_recipe        Train in this process. A step that trains in a Kubernetes job calls
                        train_argv, check_processes, is_trained, keep_logs and copy_checkpoint.
    evaluate_recipe     Evaluate the detector; write its metrics and a report.
    evaluate_champion   Evaluate the champion on the same data with the same settings.
    gate                Decide whether the detector is better than the champion.
    register_recipe     Register the detector as a new version, and promote it if it is better.
    compare             Create a table of all training runs.
    compare_finished    After a failure, create a table that also lists failed training runs.
    end_parent_run      End the MLflow run with the status of the pipeline run.

The steps exchange results as return values, as files and in a workspace, a folder that all steps
share (`vitdet.stages.workspace`). Common arguments are:

    workspace, run_id   The path of the workspace, and the pipeline run's ID.
    name                The name of a training run, as `resolve_configs` returns it.
    settings, configs   The folders to which `resolve_configs` and `prepare_data` write NAME.yaml.
    data                The fingerprint of the data, as `prepare_data` returns it.
    checkpoint          The file of a detector.
    figures, verdict    The JSON files that `evaluate_recipe` and `gate` write, respectively.

If a step is repeated, existing data, weights and detectors are reused, and training resumes from
the last checkpoint. Packages that are slow to import, such as torch, are imported on first use.
"""

from vitdet.stages.comparison import (
    compare,
    compare_finished,
    end_parent_run,
    start_parent_run,
)
from vitdet.stages.evaluation import Evaluation, evaluate, evaluate_champion, evaluate_recipe
from vitdet.stages.outcomes import recorded
from vitdet.stages.plan import plan_trainings, resolve_configs
from vitdet.stages.preparation import fetch_weights, fetch_words, prepare_data
from vitdet.stages.registration import gate, register, register_recipe
from vitdet.stages.training import (
    check_processes,
    copy_checkpoint,
    is_trained,
    keep_logs,
    train,
    train_argv,
    train_recipe,
)

__all__ = [
    "Evaluation",
    "check_processes",
    "compare",
    "compare_finished",
    "copy_checkpoint",
    "end_parent_run",
    "evaluate",
    "evaluate_champion",
    "evaluate_recipe",
    "fetch_weights",
    "fetch_words",
    "gate",
    "is_trained",
    "keep_logs",
    "plan_trainings",
    "prepare_data",
    "recorded",
    "register",
    "register_recipe",
    "resolve_configs",
    "start_parent_run",
    "train",
    "train_argv",
    "train_recipe",
]
