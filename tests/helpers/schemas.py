"""Is a Kubernetes object spelled right? The schemas of its kind, strict: a field that they do not know is an error.

Not covered, since no schema says it: rules in CEL, webhooks, defaults. The webhook's rules of a PyTorchJob are in
tests/helpers/manifests.py.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from importlib.resources import files
from pathlib import Path

import jsonschema
from referencing import Registry, Resource

KUBERNETES = "1.32.0"
CORE = (
    "v1",
    "apps/v1",
    "batch/v1",
    "rbac.authorization.k8s.io/v1",
    "networking.k8s.io/v1",
    "scheduling.k8s.io/v1",
    "storage.k8s.io/v1",
)
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": STRINGS,
        "annotations": STRINGS,
    },
}


def closed(**properties: object) -> dict:
    return {"type": "object", "properties": properties, "additionalProperties": False}


TEXT, YES_NO, NUMBER = {"type": "string"}, {"type": "boolean"}, {"type": "integer"}
# From Google's reference: there is no definition to take (tests/crds/README.md).
COMPUTE_CLASS = closed(
    apiVersion=TEXT,
    kind=TEXT,
    metadata=METADATA,
    spec=closed(
        nodePoolAutoCreation=closed(enabled=YES_NO),
        autoscalingPolicy=closed(consolidationDelayMinutes=NUMBER),
        whenUnsatisfiable={"enum": ["DoNotScaleUp", "ScaleUpAnyway"]},
        priorities={
            "type": "array",
            "items": closed(
                gpu=closed(type=TEXT, count=NUMBER, driverVersion=TEXT),
                spot=YES_NO,
                reservations=closed(
                    affinity={"enum": ["Specific", "AnyBestEffort", "None"]},
                    specific={"type": "array", "items": closed(name=TEXT, project=TEXT)},
                ),
            ),
        },
    ),
)
# What these manifests use of Istio's (istio.io/latest/docs/reference/config/networking/virtual-service).
TEXTS = {"type": "array", "items": TEXT}
DESTINATION = closed(host=TEXT, port=closed(number=NUMBER))
VIRTUAL_SERVICE = closed(
    apiVersion=TEXT,
    kind=TEXT,
    metadata=METADATA,
    spec=closed(
        gateways=TEXTS,
        hosts=TEXTS,
        http={
            "type": "array",
            "items": closed(route={"type": "array", "items": closed(destination=DESTINATION)}),
        },
    ),
)


def misspelled(document: dict) -> list[str]:
    """Every violation of the schema of this object's kind, with its path."""
    version, kind = document.get("apiVersion", ""), document.get("kind", "")
    name = f"{kind} {document.get('metadata', {}).get('name')}"
    if version in CORE:
        try:
            errors = core(version, kind).iter_errors(document)
        except FileNotFoundError:
            return [f"{name}: {version} has no such kind"]
        return [
            f"{name}: {'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"
            for error in errors
        ]
    found = definitions().get(f"{version} {kind}")
    if found is None:
        return [f"{name}: no schema of {version} {kind}"]
    problems = [
        f"{name}: {'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"
        for error in found["validator"].iter_errors(document)
    ]
    if found["namespaced"] != ("namespace" in document["metadata"]):
        problems.append(f"{name}: {'needs' if found['namespaced'] else 'has no'} namespace")
    return problems


@cache
def core(version: str, kind: str) -> jsonschema.Draft202012Validator:
    """As kubernetes_validate.validate(strict=True), which reads two megabytes for each object."""
    group = version.split("/")[0].split(".")[0] + "-" if "/" in version else ""
    schema = _packaged(f"{kind.lower()}-{group}{version.split('/')[-1]}.json")
    registry = _packaged("_definitions.json") @ (schema @ Registry())
    return jsonschema.Draft202012Validator(schema.contents, registry=registry)


@cache
def _packaged(name: str) -> Resource:
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{KUBERNETES}-local-strict"
    return Resource.from_contents(json.loads((folder / name).read_text()))


@cache
def definitions() -> dict[str, dict]:
    packed = (Path(__file__).parents[1] / "crds" / "crds.json.gz").read_bytes()
    entries = json.loads(gzip.decompress(packed))
    entries["cloud.google.com/v1 ComputeClass"] = {"namespaced": False, "schema": COMPUTE_CLASS}
    entries["networking.istio.io/v1 VirtualService"] = {
        "namespaced": True,
        "schema": VIRTUAL_SERVICE,
    }
    return {
        key: {
            **entry,
            "validator": jsonschema.Draft202012Validator(strict(entry["schema"], top=True)),
        }
        for key, entry in entries.items()
    }


def strict(node: object, top: bool = False) -> object:
    """OpenAPI of a structural schema as JSON Schema that knows no other fields."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    out = {key: strict(value) for key, value in node.items() if key != "properties"}
    if "properties" in node and isinstance(node["properties"], dict):
        out["properties"] = {
            key: METADATA if key == "metadata" and not value.get("properties") else strict(value)
            for key, value in node["properties"].items()
        }
        if top:
            out["properties"] |= {"apiVersion": TEXT, "kind": TEXT}
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    if node.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
        out.pop("anyOf", None)
    elif node.get("nullable") and isinstance(node.get("type"), str):
        out["type"] = [node["type"], "null"]
    return out
