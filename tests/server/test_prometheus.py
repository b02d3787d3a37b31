"""The alerts and the dashboard in `deployments`, in real Prometheus with live traffic."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import yaml

from moa_ray.server import ServerSettings
from tests.commands import ROOT, tool
from tests.conftest import until
from tests.http import free_port
from tests.server.local import metric_kinds, serving

PROMETHEUS = ROOT / "deployments" / "prometheus"
DASHBOARD = ROOT / "deployments" / "grafana" / "moa-ray.json"
PRICE = {"prompt": 1, "completion": 2}
RULES = {"policy": {"quorum": 1, "retries": 1}, "gate": {"kind": "random", "k": 1}}


def expressions() -> list[str]:
    """What the dashboard asks, for all models and a minute."""
    board = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    return [expr.replace("$model", ".*").replace("$__rate_interval", "1m") for expr in asked]


def test_what_alerts_and_dashboard_ask_for_is_a_metric_of_ours(tmp_path: Path) -> None:
    kinds = metric_kinds(ServerSettings(records=tmp_path / "r"))
    ours = kinds.keys() | {f"{name}_bucket" for name, kind in kinds.items() if kind == "histogram"}
    asked = set(re.findall(r"moa_ray_\w+", (PROMETHEUS / "alerts.yml").read_text() + " ".join(expressions())))
    assert asked and asked <= ours


def test_alerts_fire_when_they_should() -> None:
    done = subprocess.run(
        [tool("promtool"), "test", "rules", "alerts.test.yml"], cwd=PROMETHEUS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rules = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"][0]["rules"]
    tested = (PROMETHEUS / "alerts.test.yml").read_text()
    assert [rule["alert"] for rule in rules if f"alertname: {rule['alert']}" not in tested] == []


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[str]:
    """Prometheus with our alerts, told to scrape `target` each second; its URL."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / "alerts.yml")]
    config["scrape_configs"] = config["scrape_configs"][:1]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [tool("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    with subprocess.Popen(command) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)


def query(url: str, expr: str) -> list[Any]:
    try:
        answer = httpx2.get(f"{url}/api/v1/query", params={"query": expr}).json()
    except httpx2.TransportError:  # not up yet
        return []
    assert answer["status"] == "success", f"{expr}: {answer}"
    found: list[Any] = answer["data"]["result"]
    return found


def test_every_panel_has_something_to_show_of_live_traffic(tmp_path: Path) -> None:
    settings = ServerSettings(records=tmp_path / "r")
    faults = [{"agent": "a1", "first": 2, "times": 1}]
    with (
        serving(2, settings=settings, spec=RULES, faults=faults, price=PRICE, ttft_s=0.05, itl_s=0.001) as served,
        prometheus(tmp_path, served.url.removeprefix("http://")) as url,
    ):
        body = {"model": "panel", "messages": [{"role": "user", "content": "why?"}]}

        def asked() -> bool:
            httpx2.post(f"{served.url}/v1/chat/completions", json=body)
            time.sleep(0.2)
            return all(query(url, expr) for expr in expressions() if "gate_failures" not in expr and "5.." not in expr)

        until(asked, within_s=60)
        alerts = httpx2.get(f"{url}/api/v1/rules").json()["data"]["groups"][0]["rules"]
        assert len(alerts) >= 9 and {alert["health"] for alert in alerts} == {"ok"}
        for expr in expressions():
            query(url, expr)
