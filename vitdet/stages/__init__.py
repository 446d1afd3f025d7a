"""The steps of an experiment as functions, called by the command line and pipeline components.

`train`, `evaluate` and `register` do the same as the commands of these names. The other functions
are the steps of a pipeline run, in this order (`pipeline/graph.py`):

    resolve_configs     one config for each training run: recipe, overrides, sweep, seeds
    start_parent_run    the MLflow run that groups the training runs
    prepare_data        the data set, fetched and verified; configs with its splits and classes
    fetch_weights       the initial weights
    train_recipe        for each training run, in this process; for training in a Kubernetes job:
                        train_argv, check_processes, is_trained, keep_logs, copy_checkpoint
    evaluate_recipe     its metrics and report
    evaluate_champion   the champion's metrics, if unknown for this data and these settings
    gate                whether the detector is better than the champion
    register_recipe     a new version in the model registry, and the new champion, if it is better
    compare             one table of all training runs
    compare_finished    after a failure: the table of what finished, and why the rest did not
    end_parent_run      the end of the MLflow run, with the status of the pipeline run

They exchange results as return values, as files and in a workspace, a folder that all steps share
(`vitdet.stages.workspace`). Their arguments:

    workspace, run_id   path of the workspace; ID of the pipeline run
    name                of a training run, as `resolve_configs` returns it
    settings, configs   folders with NAME.yaml that `resolve_configs` and `prepare_data` write
    data                fingerprint of the data, as `prepare_data` returns it
    checkpoint          file of a detector
    figures, verdict    JSON files that `evaluate_recipe` and `gate` write

A repeated step keeps the results that exist; training resumes from its last checkpoint. The steps
import torch, MLflow and other slow packages when they are called.
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
