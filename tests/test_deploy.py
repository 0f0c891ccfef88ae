"""What `deploy/` uses exists: metrics are exported, commands and keys are the command line's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from aurora_rl.cli.config import load_config
from aurora_rl.cli.config.fleet import engine_groups, learner_placement
from aurora_rl.telemetry.prometheus import METRICS

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "aurora.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ALERTS = [rule for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


def queries() -> Iterator[str]:
    """Every PromQL expression of the dashboard and of the alerts."""
    for panel in PANELS:
        yield from (target["expr"] for target in panel["targets"])
    yield from (annotation["expr"] for annotation in DASHBOARD["annotations"]["list"])
    yield from (
        variable["query"]["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"
    )
    yield from (rule["expr"] for rule in ALERTS)


def test_every_metric_that_is_asked_for_is_exported() -> None:
    series = {f"aurora_{name}": metric.label for name, metric in METRICS.items() if metric.kind != "histogram"}
    for name, metric in METRICS.items():
        if metric.kind == "histogram":
            series |= {f"aurora_{name}_bucket": "le", f"aurora_{name}_sum": "", f"aurora_{name}_count": ""}
    asked: set[str] = set()
    for query in queries():
        names = re.findall(r"\b(?:aurora|process|up)_?\w*(?=\W|$)", re.sub(r'"[^"]*"', "", query))
        asked |= {name for name in names if name.startswith("aurora_")}
        assert names, query
        labels = set(re.findall(r"(\w+)=~?\"", query)) - {"instance", "job"}
        assert labels <= {series[name] for name in names if name in series}, query
    assert asked <= series.keys()
    # Whoever looks at the dashboard sees all that is exported.
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    assert {f"aurora_{name}" for name in METRICS} <= shown


def test_legends_name_labels_that_exist() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            labels = {METRICS[name].label for name in re.findall(r"aurora_(\w+)\{", target["expr"]) if name in METRICS}
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels | {"instance"}, target


def test_every_panel_has_a_query_and_a_place_of_its_own() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["title"] and panel["description"].endswith(".") and panel["targets"], panel["title"]
        assert all(target["expr"] and target["refId"] for target in panel["targets"])
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_prometheus_scrapes_the_default_address() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    http = load_config().http
    assert job["static_configs"] == [{"targets": [f"{http.host}:{http.port}"]}]
    assert job.get("metrics_path", "/metrics") == "/metrics"
    assert all((DEPLOY / file).is_file() for file in config["rule_files"])
    assert all(f'up{{job="{job["job_name"]}"}}' in rule["expr"] for rule in ALERTS if "up{" in rule["expr"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_the_configuration() -> None:
    command = ["promtool", "check", "config", "--lint-fatal", "prometheus.yml"]
    done = subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def called(tmp_path: Path) -> Any:
    """Runs run.sh with an `aurora-rl` that says its arguments."""
    program = tmp_path / "bin" / "aurora-rl"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"

    def call(*arguments: str) -> list[str]:
        command = [str(DEPLOY / "run.sh"), *arguments]
        done = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.splitlines()

    return call


@pytest.mark.parametrize("command", ["serve", "fleet"])
def test_what_starts_again_goes_on_with_its_run(called: Any, tmp_path: Path, command: str) -> None:
    run = tmp_path / "a run"
    assert called(command, str(run), "--config", "c.yaml") == [command, f"run_dir={run}", "--config", "c.yaml"]
    run.mkdir()
    assert called(command, str(run), "engine.slots=4") == [command, f"run_dir={run}", "engine.slots=4"]
    (run / "config.yaml").touch()
    assert called(command, str(run), "--config", "c.yaml") == [command, "--resume", str(run), "--config", "c.yaml"]


def test_the_container_starts_what_exists() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    words: list[str] = []
    for instruction in ("ENTRYPOINT", "CMD"):
        (line,) = re.findall(rf"^{instruction} (\[.*\])$", text, re.M)
        words += json.loads(line)
    assert (DEPLOY / words[0]).is_file() and os.access(DEPLOY / words[0], os.X_OK)
    config = load_config(overrides=words[3:])
    assert f"127.0.0.1:{config.http.port}/health" in text and f"EXPOSE {config.http.port}" in text
    assert re.search(r"^USER (?!root)", text, re.M)
    for line in re.findall(r"^COPY (.+)$", text, re.M):
        assert all((ROOT / source).exists() for source in line.split()[:-1]), line


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = (DEPLOY / "aurora-rl.service").read_text()
    (command,) = re.findall(r"^ExecStart=(\S+)", unit, re.M)
    assert Path(command).name == "run.sh"
    (tmp_path / "aurora-rl.service").write_text(unit.replace(command, "/bin/true"))  # it is not installed here
    verify = ["systemd-analyze", "verify", str(tmp_path / "aurora-rl.service")]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "aurora-rl" not in done.stderr, done.stderr


def test_the_manifests_of_kubernetes_fit_each_other(tmp_path: Path) -> None:
    parts = {part["kind"]: part for part in yaml.safe_load_all((DEPLOY / "kubernetes" / "fleet.yaml").read_text())}
    assert parts.keys() == {"ConfigMap", "PersistentVolumeClaim", "Service", "NetworkPolicy", "RayJob"}
    job = parts["RayJob"]["spec"]
    cluster, submitter = job["rayClusterSpec"], job["submitterPodTemplate"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    pods = [cluster["headGroupSpec"]["template"], *(group["template"] for group in groups.values())]

    # What the image has: the same base, user's folder and version of Ray, and the script that the job runs.
    image = (DEPLOY / "kubernetes" / "Dockerfile").read_text()
    (name,) = re.findall(r"-t (\S+) \.", image)
    (base,) = re.findall(r"^FROM (\S+)$", image, re.M)
    assert f"-t {base} ." in (DEPLOY / "Dockerfile").read_text()
    assert {container["image"] for pod in [*pods, submitter] for container in pod["spec"]["containers"]} == {name}
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    script, command, run, *_, file = job["entrypoint"].split()
    (source,) = re.findall(rf"^COPY (\S+/{script}) /usr/local/bin/$", (DEPLOY / "Dockerfile").read_text(), re.M)
    assert os.access(ROOT / source, os.X_OK) and command == "fleet"

    # Every pod has the run's folder and the configuration.
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        claim = volumes["run"]["persistentVolumeClaim"]["claimName"]
        assert claim == parts["PersistentVolumeClaim"]["metadata"]["name"] and run.startswith(mounts["run"])
        assert volumes["configuration"]["configMap"]["name"] == parts["ConfigMap"]["metadata"]["name"]
        assert file.startswith(mounts["configuration"])

    # Ray has a place for each member, and the service finds the engines.
    (tmp_path / "fleet.yaml").write_text(parts["ConfigMap"]["data"][Path(file).name])
    config = load_config(tmp_path / "fleet.yaml")
    (engines,) = engine_groups(config).values()
    for placement, group, members in (
        (engines, "engines", engines.replicas),
        (learner_placement(config), "learner", 1),
    ):
        pod, resources = groups[group]["template"], json.loads(json.loads(groups[group]["rayStartParams"]["resources"]))
        limits = pod["spec"]["containers"][0]["resources"]["limits"]
        has = {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"]), **resources}
        assert groups[group]["replicas"] == members
        assert all(amount <= has[name] for name, amount in placement.demand.items())
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    service = parts["Service"]["spec"]
    labels = [pod["metadata"]["labels"] for pod in pods]
    found = [service["selector"].items() <= each.items() for each in labels]
    assert found == [False, True, False]
    assert service["ports"][0]["targetPort"] == config.http.port and config.http.host == "0.0.0.0"
    policy = parts["NetworkPolicy"]["spec"]
    chosen = policy["podSelector"]["matchLabels"].items()
    assert all(chosen <= each.items() for each in [*labels, submitter["metadata"]["labels"]])
    assert policy["ingress"][-1] == {"ports": [{"port": config.http.port}]}
