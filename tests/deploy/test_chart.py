"""The Helm chart, rendered by Go's templates."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DEPLOY = Path(__file__).resolve().parent.parent.parent / "deploy"


@pytest.fixture(scope="module")
def chart() -> ModuleType:
    pytest.importorskip("go_template", exc_type=ImportError)
    found = importlib.util.spec_from_file_location("render_chart", DEPLOY / "render_chart.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def by_kind(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in found}


@pytest.mark.parametrize("role", ["coordinator", "site"])
def test_no_container_is_root_or_writes_its_image(chart: ModuleType, role: str) -> None:
    found = chart.manifests({"role": role})
    chart.check(found)
    spec = by_kind(found)["StatefulSet"]["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert not spec["automountServiceAccountToken"]
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        rights = container["securityContext"]
        assert rights["readOnlyRootFilesystem"]
        assert not rights["allowPrivilegeEscalation"]
        assert rights["capabilities"] == {"drop": ["ALL"]}


def test_a_site_takes_no_call_and_makes_one(chart: ModuleType) -> None:
    changes = {"role": "site", "coordinator.address": "203.0.113.7/32"}
    found = by_kind(chart.manifests(changes))
    assert "Service" not in found
    policy = found["NetworkPolicy"]["spec"]
    assert policy["ingress"] == []
    names, out = policy["egress"]
    assert {p["port"] for p in names["ports"]} == {53}
    assert out["ports"] == [{"port": 443, "protocol": "TCP"}]
    assert out["to"] == [{"ipBlock": {"cidr": "203.0.113.7/32"}}]
    through = by_kind(chart.manifests(changes | {"proxy": "http://proxy:3128"}))
    assert through["NetworkPolicy"]["spec"]["egress"][1]["ports"][0]["port"] == 3128


def test_images_are_mounted_read_only_and_a_gpu_is_a_limit(chart: ModuleType) -> None:
    found = by_kind(chart.manifests({"role": "site", "gpu": 1}))
    (client,) = found["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    assert {"name": "data", "mountPath": "/data", "readOnly": True} in client["volumeMounts"]
    assert client["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in client["resources"]["requests"]


def test_a_misspelt_value_is_an_error(chart: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"storage\.sise"):
        chart.manifests({"storage.sise": "1Gi"})
