"""Starts a training job from a pipeline step and follows it to its end; the only importer of kubernetes.

`components.jobs` knows what the job looks like, `components.following` what its states mean; here are the requests.
What keeps a job from outliving its run: the step deletes it on SIGTERM; the API server deletes it together with the
step's pod (ownerReference); `delete_jobs` deletes those of a run; the operator ends it after its deadline. Trainer
does that to the second. The training operator 1.9 asks for the deadline only when something happens to the job or to a
pod of it, and every 10 hours (its work queue, which was to remind it, is a FakeWorkQueue: pytorchjob_controller.go), so
that a job that hangs may live that much longer. It deletes a PyTorchJob that ended after its time to live; a TrainJob
has none.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from components.ending import stay
from components.following import FAILURE, Follower, Patience
from components.jobs import KINDS, RECIPE, RUN, Kind, Wish, fill, job_name, label, mounts

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TRY = "KFP_RETRY_INDEX"  # "0" in the first pod of a step; older servers do not say (argocompiler/common.go)


def launch(
    *,
    template: str,
    kind: str,
    run_id: str,
    name: str,
    args: list[str],
    nodes: int,
    pool: str,
    image: str,
    workspace: str,
    task_config: dict | None,
    out: Callable[[str], None] = print,
    patience: Patience | None = None,
    finished: Callable[[], bool] = lambda: False,
) -> None:
    """Trains in a job of `nodes` pods and returns when it succeeded; `name` is the recipe, `template` the job's YAML.

    A job of the same run and recipe that is there already is followed, so that a step may be retried; one that has
    failed fails the retried step too, at once and with the same words. task_config: the fields of kfp's dsl.TaskConfig.
    Lines of rank 0's log and of the job's progress go to `out`. finished: whether the training is complete, asked when
    the job is gone or failed. Raises RuntimeError with the cause when the job fails, cannot start, is deleted or may
    not be made; ValueError when template and wishes do not fit.
    """
    shape = KINDS.get(kind.lower())
    if shape is None:
        raise ValueError(f"kind of job: one of {', '.join(KINDS)}, got {kind!r}")
    patience = patience or Patience()
    api, namespace = connect()
    labels = {RUN: label(run_id), RECIPE: label(name)}
    wish = Wish(
        job_name(run_id, name),
        namespace,
        labels,
        image,
        args,
        nodes,
        pool,
        task_config or {},
        own_pod(),
    )
    job = fill(template, shape, wish)
    folders = [folder.rstrip("/") for folder in mounts(shape, job)]
    if folders and not any(
        f"{workspace.rstrip('/')}/".startswith(f"{folder}/") for folder in folders
    ):
        raise ValueError(
            f"the job's pods do not see the workspace {workspace}: their folders are {', '.join(folders)}"
        )
    cluster = Cluster(api, shape, wish.name, namespace, out, patience)
    Follower(cluster, shape, job, out, patience, finished, first=os.environ.get(TRY) == "0").run()


def delete_jobs(run_id: str, namespace: str = "", own: str = "") -> tuple[list[str], list[str]]:
    """Deletes the training jobs of a pipeline run that have not ended; "" is the current namespace.

    own: the kind that the run makes, "" where that is not known.

    Gives the names of those, and a line for each that has ended, how long it and its pods' logs stay; for each that
    is being deleted already; and for a kind of job that may not be listed, as where an account has the rights of one
    operator only. Raises PermissionError when `own` or no kind may be, or a deletion is forbidden; RuntimeError when
    nobody answers.
    """
    api, here = connect()
    objects, deleted, left, hidden = client.CustomObjectsApi(api), [], [], {}
    for word, kind in KINDS.items():
        place = (kind.group, kind.version, namespace or here, kind.plural)
        try:
            found = at_once(
                kind,
                place[2],
                objects.list_namespaced_custom_object,
                place,
                {"label_selector": f"{RUN}={label(run_id)}"},
            )
        except PermissionError as error:
            hidden[word] = error
            left.append(f"{kind.plural} were not looked at: {error}")
            continue
        for job in found.get("items", ()):
            name, going = job["metadata"]["name"], job["metadata"].get("deletionTimestamp")
            if ended := "is being deleted already" if going else stay(kind, job):
                left.append(f"{name}: {ended}")
                continue
            at_once(
                kind,
                place[2],
                objects.delete_namespaced_custom_object,
                (*place, name),
                {"propagation_policy": "Background"},
            )
            deleted.append(name)
    if own.lower() in hidden or len(hidden) == len(KINDS):
        error = hidden.get(own.lower()) or next(iter(hidden.values()))
        raise PermissionError(f"{error}; deleted: {', '.join(deleted)}" if deleted else str(error))
    return deleted, left


def whereabouts(namespace: str) -> str:
    """Which namespace of which cluster `delete_jobs` asks, for a reader.

    Raises ValueError when that cluster has no such namespace, RuntimeError when nobody answers; who may not ask is not
    told so.
    """
    api, _ = connect()
    name = "this pod's cluster" if at_home() else f"the cluster of context {active()['name']}"
    try:
        client.CoreV1Api(api).read_namespace(namespace, _request_timeout=(5, 30))
    except ApiException as error:
        if error.status == 404:
            raise ValueError(
                f"{name} has no namespace {namespace}; give that of the run's pods with --namespace, or "
                "set KUBECONFIG or its current context to the pipeline's cluster"
            ) from error
    except HTTPError as error:
        raise RuntimeError(f"{name} does not answer ({type(error).__name__})") from error
    return f"namespace {namespace} of {name}"


def at_once(
    kind: Kind, namespace: str, call: Callable, given: tuple[str, ...], options: dict[str, str]
) -> dict:
    """The answer to a request that is made once, {} for what is not there.

    Raises PermissionError when it is forbidden, RuntimeError for anything else.
    """
    try:
        return call(*given, _request_timeout=(5, 30), **options)
    except ApiException as error:
        if error.status == 404:  # this kind is not installed, or the job is gone
            return {}
        raised = PermissionError if error.status == 403 else RuntimeError
        raise raised(refusal(kind, namespace, "delete", error)) from error
    except HTTPError as error:
        raise RuntimeError(f"the API server does not answer ({type(error).__name__})") from error


def at_home() -> bool:
    """Whether this is a pod that asks its own cluster."""
    return not os.environ.get("KUBECONFIG") and (ACCOUNT / "namespace").exists()


def active() -> dict:
    """The kubeconfig's current context."""
    return config.list_kube_config_contexts(config_file=os.environ.get("KUBECONFIG"))[1]


def connect() -> tuple[client.ApiClient, str]:
    """A client of the API server and the namespace to work in: the pod's own, else the kubeconfig's.

    Raises RuntimeError when there is neither.
    """
    settings, file = client.Configuration(), os.environ.get("KUBECONFIG")
    try:
        if at_home():
            config.load_incluster_config(client_configuration=settings)
            return client.ApiClient(settings), (ACCOUNT / "namespace").read_text().strip()
        config.load_kube_config(config_file=file, client_configuration=settings)
        return client.ApiClient(settings), active()["context"].get("namespace") or "default"
    except config.ConfigException as error:
        raise RuntimeError(
            f"no cluster: this is no pod with a service account, and no kubeconfig ({error})"
        ) from error


def own_pod() -> dict | None:
    """An ownerReference to the pod that this runs in, by the names that Kubeflow Pipelines 2 gives a step; else None.

    The names are `commonEnvs` of the backend's argocompiler/common.go. Not as its controller, for which Kueue would
    take it, nor blocking its deletion, for which one more right is needed.
    """
    name, uid = os.environ.get("KFP_POD_NAME"), os.environ.get("KFP_POD_UID")
    return {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid} if name and uid else None


def answered(error: ApiException) -> str:
    """What the API server said; nothing for a path that it does not know."""
    try:
        return json.loads(error.body)["message"]
    except (ValueError, KeyError, TypeError):
        return ""


def refusal(kind: Kind, namespace: str, verb: str, error: ApiException) -> str:
    """One line for a request that was turned down: what was tried, why, what to do."""
    message = answered(error)
    what = f"cannot {verb} in namespace {namespace}"
    if error.status in (401, 403):
        return f"{what}: {message or error.reason}; the pipeline's service account needs the Role of manifests/shared"
    if error.status == 404 and not message:
        return f"{what}: the cluster knows no {kind.name} ({kind.group}/{kind.version}); install {kind.operator}"
    return f"{what}: {message or error.reason} (HTTP {error.status})"


class Cluster:
    """The requests about one job, each repeated while the API server is silent or out of order.

    All raise RuntimeError with one line when patience ends or the answer is no.
    """

    def __init__(
        self,
        api: client.ApiClient,
        kind: Kind,
        name: str,
        namespace: str,
        out: Callable[[str], None],
        patience: Patience,
    ) -> None:
        self.kind, self.name, self.namespace, self.out, self.patience = (
            kind,
            name,
            namespace,
            out,
            patience,
        )
        self.objects, self.core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        self.place = (kind.group, kind.version, namespace, kind.plural)
        self.blind = False  # and that was said

    def ask(
        self,
        verb: str,
        call: Callable,
        *given: object,
        but: tuple[int, ...] = (),
        forbidden: float = 0,
        options: dict[str, object] | None = None,
    ) -> dict | None:
        """The answer, None for a status of `but`. forbidden: for how many seconds a refusal is not believed."""
        start, said = time.monotonic(), False
        while True:
            try:
                raw = call(
                    *given, _preload_content=False, _request_timeout=(5, 30), **(options or {})
                ).data
                answer = json.loads(raw)
                if said:
                    self.out("launcher: the API server answers again")
                return answer
            except ApiException as error:
                unknown = error.status == 404 and not answered(
                    error
                )  # an API server that starts knows no kinds yet
                if error.status in but and not unknown:
                    return None
                problem, limit = refusal(self.kind, self.namespace, verb, error), self.patience.api
                if unknown or error.status in (401, 403):
                    limit = forbidden
                elif error.status != 429 and error.status < 500:
                    limit = 0
                cause: Exception = error
            except (HTTPError, ValueError) as error:  # no answer, or half of one
                problem = f"the API server does not answer ({type(error).__name__})"
                limit, cause = self.patience.api, error
            if time.monotonic() - start >= limit:
                raise RuntimeError(problem + (f", for {limit:.0f} s" if limit else "")) from cause
            if not said:
                self.out(f"launcher: {problem}; asking again for {limit:.0f} s")
            said = True
            time.sleep(min(self.patience.look, 2))

    def create(self, job: dict) -> bool:
        """Makes the job; False when there is one of this name."""
        made = self.ask(
            f"create {self.kind.plural}",
            self.objects.create_namespaced_custom_object,
            *self.place,
            job,
            but=(409,),
        )
        return made is not None

    def get(self) -> dict | None:
        """The job, None when there is none."""
        return self.ask(
            f"get {self.kind.plural}",
            self.objects.get_namespaced_custom_object,
            *self.place,
            self.name,
            but=(404,),
            forbidden=self.patience.forbidden,
        )

    def adopt(self, owner: dict) -> None:
        """Makes `owner` the job's only one."""
        change = {
            "metadata": {"ownerReferences": [owner]}
        }  # a merge patch: all that the client sends to these kinds
        self.ask(
            f"patch {self.kind.plural}",
            self.objects.patch_namespaced_custom_object,
            *self.place,
            self.name,
            change,
            but=(404,),
        )

    def mark(self, failure: str, halt: bool) -> None:
        """Writes on the job why it failed; halt: and has the operator take its pods away."""
        change = {
            "metadata": {"annotations": {FAILURE: failure}},
            **({"spec": self.kind.halt} if halt else {}),
        }
        self.ask(
            f"patch {self.kind.plural}",
            self.objects.patch_namespaced_custom_object,
            *self.place,
            self.name,
            change,
            but=(404,),
        )

    def delete(self) -> None:
        """Deletes the job, if it is there, and with it its pods."""
        self.ask(
            f"delete {self.kind.plural}",
            self.objects.delete_namespaced_custom_object,
            *self.place,
            self.name,
            but=(404,),
            options={"propagation_policy": "Background"},
        )

    def pods(self) -> tuple[list[dict], str]:
        """The job's pods, and the version of that list, from which `changes` goes on."""
        found = self.ask(
            "list pods",
            self.core.list_namespaced_pod,
            self.namespace,
            options={"label_selector": self.kind.selector(self.name)},
            forbidden=self.patience.forbidden,
        )
        return found["items"], found["metadata"]["resourceVersion"]

    def changes(self, version: str, seconds: float) -> Iterator[dict]:
        """The job's pods as they change, for this long; sooner over when the connection drops."""
        try:
            lines = self.core.list_namespaced_pod(
                self.namespace,
                label_selector=self.kind.selector(self.name),
                resource_version=version,
                watch=True,
                timeout_seconds=max(1, round(seconds)),
                _preload_content=False,
                _request_timeout=(5, seconds + 10),
            )
            for line in lines:
                event = json.loads(line)
                if event["type"] == "ERROR":  # the version is too old: the next list has a new one
                    return
                yield event["object"]
        except (ApiException, HTTPError, ValueError):
            return  # the next request finds out whether that lasts

    def events(self, selector: str) -> list[dict]:
        """The events that a field selector selects; none when that may not be asked: then less is told."""
        found = self.ask(
            "list events",
            self.core.list_namespaced_event,
            self.namespace,
            but=(401, 403),
            options={"field_selector": selector},
        )
        return found["items"] if found else []

    def log(
        self,
        pod: str,
        since: int | None = None,
        tail: int | None = None,
        previous: bool = False,
        container: str = "",
    ) -> list[str]:
        """Lines of a container's log, "" the training's, each after its time and a space; none when there is none.

        since: of the last so many seconds; tail: the last lines; previous: of the instance before the running one.
        """
        options = {"since_seconds": since, "tail_lines": tail, "previous": previous or None}
        try:
            raw = self.core.read_namespaced_pod_log(
                pod,
                self.namespace,
                container=container or self.kind.container,
                timestamps=True,
                _preload_content=False,
                _request_timeout=(5, 30),
                **{key: value for key, value in options.items() if value is not None},
            )
            return raw.data.decode(errors="replace").splitlines()
        except ApiException as error:
            if error.status in (401, 403) and not self.blind:
                self.out(f"launcher: {refusal(self.kind, self.namespace, 'read logs', error)}")
                self.blind = True
            return []  # or the container has not started, the pod is gone, its node does not answer
        except HTTPError:
            return []
