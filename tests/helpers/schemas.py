"""Validate Kubernetes objects against the strict schemas of their kinds: unknown fields are errors.

CEL rules, webhooks and defaults are not part of schemas and are not covered. The webhooks' rules are in
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
GROUPS = ("rbac.authorization", "networking", "scheduling", "storage")
CORE = ("v1", "apps/v1", "batch/v1", *(f"{group}.k8s.io/v1" for group in GROUPS))


def closed(**properties: object) -> dict:
    return {"type": "object", "properties": properties, "additionalProperties": False}


TEXT, YES_NO, NUMBER = {"type": "string"}, {"type": "boolean"}, {"type": "integer"}
TEXTS = {"type": "array", "items": TEXT}
STRINGS = {"type": "object", "additionalProperties": TEXT}
METADATA = closed(name=TEXT, namespace=TEXT, labels=STRINGS, annotations=STRINGS)
OBJECT = {"apiVersion": TEXT, "kind": TEXT, "metadata": METADATA}
# From Google's reference, as no definition is published (tests/crds/README.md).
COMPUTE_CLASS = closed(
    **OBJECT,
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
# The fields of Istio's VirtualService that the manifests use
DESTINATION = closed(host=TEXT, port=closed(number=NUMBER))
ROUTE = {"type": "array", "items": closed(destination=DESTINATION)}
HTTP = {"type": "array", "items": closed(route=ROUTE)}
VIRTUAL_SERVICE = closed(**OBJECT, spec=closed(gateways=TEXTS, hosts=TEXTS, http=HTTP))


def misspelled(document: dict) -> list[str]:
    """Return every violation of the object's schema, with its path."""
    version, kind = document.get("apiVersion", ""), document.get("kind", "")
    name = f"{kind} {document.get('metadata', {}).get('name')}"
    if version in CORE:
        try:
            return violations(name, core(version, kind), document)
        except FileNotFoundError:
            return [f"{name}: {version} has no such kind"]
    found = definitions().get(f"{version} {kind}")
    if found is None:
        return [f"{name}: no schema of {version} {kind}"]
    problems = violations(name, found["validator"], document)
    if found["namespaced"] != ("namespace" in document["metadata"]):
        problems.append(f"{name}: {'needs' if found['namespaced'] else 'has no'} namespace")
    return problems


def violations(name: str, schema: jsonschema.Draft202012Validator, document: dict) -> list[str]:
    return [
        f"{name}: {'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"
        for error in schema.iter_errors(document)
    ]


@cache
def core(version: str, kind: str) -> jsonschema.Draft202012Validator:
    """Return a strict validator as kubernetes_validate does, but read its 2 MB only once."""
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
    ours = {"namespaced": True, "schema": VIRTUAL_SERVICE}
    entries["networking.istio.io/v1 VirtualService"] = ours
    entries["cloud.google.com/v1 ComputeClass"] = {"namespaced": False, "schema": COMPUTE_CLASS}
    for entry in entries.values():
        schema = strict(entry["schema"], top=True)
        entry["validator"] = jsonschema.Draft202012Validator(schema)
    return entries


def strict(node: object, top: bool = False) -> object:
    """Convert a structural OpenAPI schema to a JSON Schema that rejects unknown fields."""
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
