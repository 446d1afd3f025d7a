"""Retry decisions of Kubeflow Pipelines' compiler and of Argo's controller.

Kubeflow Pipelines (by the same rules at tags 2.14.0, 2.15.0, 2.16.1, 2.17.0) compiles a pipeline to an Argo Workflow in
backend/src/v2/compiler/argocompiler. Argo merges the defaults of its ConfigMap into the templates and retries their nodes
in workflow/controller/{operator,dag}.go; its versions are in third_party/argo/VERSION at these tags. Features that
cannot change the number of attempts are omitted (caching, conditions, exit hooks, parallelism, shutdown, deadlines).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field

ARGO = {"2.14": (3, 6, 7), "2.15": (3, 7, 3), "2.16": (3, 7, 3), "2.17": (4, 0, 5)}
# 2.17.0, manifests/kustomize/third-party/argo/base/workflow-controller-configmap-patch.yaml, since commit 2dea6fd468
# (#13485); at 2.14.0, 2.15.0, 2.16.0 and 2.16.1 the ConfigMap has no workflowDefaults.
DEFAULTS_2_17 = """
spec:
  ttlStrategy:
    secondsAfterCompletion: 3600
    secondsAfterSuccess: 3600
    secondsAfterFailure: 3600
  templateDefaults:
    retryStrategy:
      limit: '2'
      retryPolicy: OnError
"""
BACKOFF = ("retry-backoff-duration", "retry-backoff-factor", "retry-backoff-max-duration")
RETRY = ("retry-max-count", *BACKOFF)


@dataclass
class Task:
    """A task of a DAG: its template and arguments."""

    name: str
    template: str
    arguments: dict[str, str] = field(default_factory=dict)


@dataclass
class Template:
    """A DAG, or a pod if it has no tasks."""

    tasks: list[Task] = field(default_factory=list)
    retry: dict | None = None


def seconds(duration: str) -> str:
    """Convert a duration of the compiled pipeline ("30s" -> "30"), as AnyStringPtr(Duration.Seconds) does."""
    return duration.removesuffix("s")


def retry_arguments(task: dict) -> dict[str, str]:
    """Return the arguments of a retryStrategy (container.go, getTaskRetryParametersWithValues)."""
    policy = task.get("retryPolicy")
    if policy is None:
        return {}
    values = (
        str(policy["maxRetryCount"]),
        seconds(policy["backoffDuration"]),
        f"{policy['backoffFactor']:g}",
        seconds(policy["backoffMaxDuration"]),
    )
    return dict(zip(RETRY, values, strict=True))


class Compiler:
    """Compile a pipeline. `templates` are the Workflow's by name; `entrypoint` is the first to run."""

    def __init__(self, pipeline: dict, platform: dict) -> None:
        self.components = pipeline["components"]
        self.executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        self.templates = {
            "system-dag-driver": Template(),
            "system-container-driver": Template(),
        }
        root = [Task("root-driver", "system-dag-driver"), Task("root", "root")]
        self.templates["entrypoint"] = Template(root)
        self.add_dag("root", pipeline["root"]["dag"])

    def add_dag(self, name: str, dag: dict) -> None:
        """Add a DAG template and those of its tasks (dag.go, DAG)."""
        tasks = self.templates[name] = Template()
        for key, task in dag["tasks"].items():
            tasks.tasks += self.compile_task(key, task)

    def compile_task(self, name: str, task: dict, iteration: bool = False) -> list[Task]:
        """Return a task and its driver (dag.go, task and iteratorTask)."""
        component = task["componentRef"]["name"]
        if "parameterIterator" in task and not iteration:
            return self.iterator_task(name, task)
        if "dag" in self.components[component]:
            if component not in self.templates:
                self.add_dag(component, self.components[component]["dag"])
            return [Task(f"{name}-driver", "system-dag-driver"), Task(name, component)]
        return [Task(f"{name}-driver", "system-container-driver"), self.executor_task(name, task)]

    def iterator_task(self, name: str, task: dict) -> list[Task]:
        """Return a loop's task; add its templates (dag.go: iteratorTask, iterationItemTask)."""
        component = task["componentRef"]["name"]
        items = f"{component}-iteration"
        self.templates[items] = Template(self.compile_task("iteration-item", task, iteration=True))
        loop = [Task("iteration-driver", "system-dag-driver"), Task("iteration-iterations", items)]
        self.templates[f"{component}-{name}-iterator"] = Template(loop)
        return [Task(name, f"{component}-{name}-iterator")]

    def executor_task(self, name: str, task: dict) -> Task:
        """Return a pod's task; the numbers of its retryStrategy are inputs of the template.

        container.go, containerExecutorTask and addContainerExecutorTemplate.
        """
        component = self.components[task["componentRef"]["name"]]
        metadata = self.executors.get(component["executorLabel"], {}).get("podMetadata")
        prefix = "retry-" if "retryPolicy" in task else ""
        if metadata is not None:
            count = (len(metadata.get(key, {})) for key in ("annotations", "labels"))
            prefix = f"metadata-{'-'.join(map(str, count))}-{prefix}"
        executor, pod = f"{prefix}system-container-executor", f"{prefix}system-container-impl"
        arguments = retry_arguments(task)
        if executor not in self.templates:
            inputs = {key: f"{{{{inputs.parameters.{key}}}}}" for key in arguments}
            retry = None
            if arguments:
                limit, duration, factor, longest = (inputs[key] for key in RETRY)
                backoff = {"factor": factor, "maxDuration": longest, "duration": duration}
                retry = {"limit": limit, "backoff": backoff}
            self.templates[executor] = Template([Task("executor", pod, inputs)])
            self.templates[pod] = Template(retry=retry)
        return Task(name, executor, arguments)


def substitute(value: object, arguments: dict[str, str]) -> object:
    """Replace {{inputs.parameters.NAME}}."""
    name = r"\{\{inputs\.parameters\.([\w-]+)\}\}"
    return json.loads(re.sub(name, lambda found: arguments[found[1]], json.dumps(value)))


def merge(defaults: object, own: object) -> object:
    """Return a strategic merge of objects without lists; the template's own fields take precedence.

    mergedTemplateDefaultsInto (operator.go) applies it to every template, including DAGs.
    """
    if isinstance(defaults, dict) and isinstance(own, dict):
        both = {key: merge(defaults[key], own[key]) for key in defaults.keys() & own.keys()}
        return {**defaults, **own, **both}
    return own


def failed_reason(pod: dict | None, argo: tuple[int, int, int]) -> str:
    """Return the node's phase for a pod that ended: operator.go, podReconciliation and inferFailedReason.

    `pod` is None if it was removed before the controller saw it end ("pod deleted"). Only the containers `main` and
    `wait` are considered; argoexec's `wait` succeeds by default.
    """
    if pod is None:
        return "Error"
    if pod.get("message"):
        return "Failed"
    ended = {"main": None, "wait": None} | pod["exit_codes"]
    if ended["main"]:
        return "Failed"
    if ended["wait"]:
        return "Error"
    if argo < (4, 0, 0):  # containers without an exit code are skipped
        return "Succeeded"
    return "Succeeded" if ended == {"main": 0, "wait": 0} else "Failed"


def retry_policy(strategy: dict) -> str:
    """Return the effective retry policy (workflow_types.go, RetryPolicyActual)."""
    if strategy.get("retryPolicy"):
        return strategy["retryPolicy"]
    return "Always" if strategy.get("expression") else "OnFailure"


@dataclass
class Run:
    """A workflow run in which one step ends according to `ends` and all others succeed.

    ends(n) is the phase of the step's n-th pod, from 0; each pod runs for `life` seconds. `attempts` counts the pods.
    """

    templates: dict[str, Template]
    defaults: dict
    step: str
    ends: Callable[[int], str]
    life: float = 0.0
    attempts: int = 0
    clock: float = 0.0

    def start(self) -> str:
        """Run the workflow; return its phase."""
        return self.execute(Task("", "entrypoint"), {}, within=False)

    def execute(self, task: Task, arguments: dict[str, str], within: bool) -> str:
        """Run the template as a node, or as several of a retry node: operator.go, executeTemplate."""
        template = self.templates[task.template]
        arguments = {key: substitute(value, arguments) for key, value in task.arguments.items()}
        strategy = template.retry
        if default := self.defaults.get("retryStrategy"):
            strategy = merge(default, strategy or {})
        strategy, first, children = substitute(strategy, arguments), self.clock, 0
        while True:
            phase = self.once(template, arguments, within or task.name == self.step)
            children += 1
            if phase == "Succeeded" or strategy is None:
                return phase
            wait = self.wait(strategy, phase, children, self.clock - first)
            if wait is None:
                return phase
            self.clock += wait

    def once(self, template: Template, arguments: dict[str, str], within: bool) -> str:
        """Run a pod or a DAG; a DAG has the phase of its failed task (dag.go, assessDAGPhase)."""
        for task in template.tasks:
            phase = self.execute(task, arguments, within)
            if phase != "Succeeded":
                return phase
        if template.tasks or not within:
            return "Succeeded"
        self.clock += self.life
        self.attempts += 1
        return self.ends(self.attempts - 1)

    @staticmethod
    def wait(strategy: dict, phase: str, children: int, elapsed: float) -> float | None:
        """Return the seconds until the next attempt, None for no retry: operator.go, processNodeRetries."""
        wait = 0.0
        if backoff := strategy.get("backoff"):
            longest = float(backoff["maxDuration"])
            factor = int(backoff["factor"])
            wait = float(backoff["duration"]) * (factor ** (children - 1) if factor > 0 else 1)
            if elapsed > longest or elapsed + wait > longest:
                return None
        policy = "OnFailure" if phase == "Failed" else "OnError"
        if retry_policy(strategy) not in ("Always", policy):
            return None
        limit = strategy.get("limit")
        return None if limit is not None and children > int(limit) else wait
