"""launch/kubernetes.yaml against what Kubeflow's operator and Kubernetes publish of their resources, field by field."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.helpers.launch import ROOT

operator = pytest.importorskip("kubeflow.training.models", reason="kubeflow-training: `make test-clusters` installs it")
kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate: `make test-clusters` installs it")
PLAIN = {"str": str, "int": int, "bool": bool}


def faults(kind: str, value: Any, where: str) -> list[str]:
    """The fields of an operator's resource that it does not know, lacks, or wants in another type; pods by Kubernetes."""
    if mapping := re.fullmatch(r"dict\(str, (\w+)\)", kind):
        return [fault for name, x in value.items() for fault in faults(mapping[1], x, f"{where}.{name}")]
    if kind in PLAIN:
        return [] if type(value) is PLAIN[kind] else [f"{where}: {value!r} is no {kind}"]
    if kind == "V1PodTemplateSpec":
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "lead-ds"}, **value}
        try:
            kubernetes.validate(pod, kubernetes.latest_version(), strict=True)
        except kubernetes.ValidationError as error:
            return [f"{where}: {error.message}"]
        return []
    if kind == "V1ObjectMeta":
        return faults("V1PodTemplateSpec", {"metadata": value, "spec": {"containers": [{"name": "any"}]}}, where)
    known = getattr(operator, kind)
    kinds = {known.attribute_map[name]: x for name, x in known.openapi_types.items()}
    found = [f"{where}.{name}: not known" for name in value if name not in kinds]
    try:
        known(**{name: value.get(field) for name, field in known.attribute_map.items()})
    except ValueError as error:  # a field that it must have
        found.append(f"{where}: {error}")
    return found + [x for name in value if name in kinds for x in faults(kinds[name], value[name], f"{where}.{name}")]


def read() -> Any:
    return yaml.safe_load((ROOT / "launch" / "kubernetes.yaml").read_text())


def test_the_job_is_one_that_the_operator_knows() -> None:
    job = read()
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert faults("KubeflowOrgV1PyTorchJob", job, "job") == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.nprocPerNode", 8),
        ("spec.cleanPodPolicy", "Running"),
        ("spec.runPolicy.backOffLimit", 3),
        ("spec.runPolicy", None),
        ("spec.pytorchReplicaSpecs.Worker.replicas", "1"),
        ("spec.pytorchReplicaSpecs.Worker.template.spec.volumes.0.emptyDirectory", {}),
        ("spec.pytorchReplicaSpecs.Worker.template.spec.containers.0.env.0.value", 3),
        ("metadata.label", {}),
    ],
)
def test_a_fault_is_found(path: str, value: Any) -> None:
    job = read()
    *parents, last = path.split(".")
    place = job
    for name in parents:
        place = place[int(name) if name.isdigit() else name]
    place[last] = value
    if value is None:
        del place[last]
    assert faults("KubeflowOrgV1PyTorchJob", job, "job"), path
