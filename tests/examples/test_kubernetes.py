"""examples/kubernetes.yaml is consistent: pods, addresses and secrets belong to the parties of its configuration."""

from __future__ import annotations

from pathlib import Path

import yaml

from mpc_fl.apps.runs.placement import party_of
from mpc_fl.config.config import parse_config, party_names

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_kubernetes_manifest_is_consistent() -> None:
    documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))
    service, shared, job = documents
    assert [document["kind"] for document in documents] == ["Service", "ConfigMap", "Job"]
    config = parse_config(yaml.safe_load(shared["data"]["federation.yaml"]), "federation.yaml")
    names, spec = party_names(config), job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}

    # One pod per party, found under its stable name and port.
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == len(names)
    assert spec["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    host, port = f"{job['metadata']['name']}-{{}}.{pod['subdomain']}", service["spec"]["ports"][0]["port"]
    assert config.federation.addresses == {name: f"{host.format(k)}:{port}" for k, name in enumerate(names)}
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert (
        container["ports"][0]["containerPort"] == port
        and f"--set site.listen=0.0.0.0:{port}" in container["command"][2]
    )

    # Each container mounts the directory of its own index, with its own identity alone.
    assert mounts["identities"]["subPathExpr"] == "$(JOB_COMPLETION_INDEX)"
    files: dict[str, set[str]] = {}
    for source in volumes["identities"]["projected"]["sources"]:
        for item in source["secret"]["items"]:
            index, file = item["path"].split("/")
            assert source["secret"]["name"] == f"identity-{names[int(index)]}" and item["key"] == file
            files.setdefault(index, set()).add(file)
    for index, name in enumerate(names):
        assert files[str(index)] == {f"{name}.key", f"{name}.crt", "federation.crt", "federation.crl"}
        assert party_of(config, None, None, {"JOB_COMPLETION_INDEX": str(index)}) == name
    assert mounts.keys() == volumes.keys()
    assert volumes["federation"]["configMap"]["name"] == shared["metadata"]["name"]
