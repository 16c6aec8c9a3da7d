"""The files of deploy/: what they start can be started, and what they watch is measured."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from swarm.dht.announcement import Announcement
from swarm.health.metrics import registry_of
from swarm.health.state import Seen, state_of
from swarm.net.transport import PeerId
from swarm.server.cell import OnProgress, ShardCell
from swarm.server.metrics import Metrics
from swarm.server.stopping import LEAVE_TIMEOUT
from swarm.spans import Span
from tests.commands import parsed
from tests.fake_engine import FakeEngine
from tests.health_swarm import TINY
from tests.pages import ADDRESS, ROOT, pages

DEPLOY = ROOT / "deploy"
UNIT = (DEPLOY / "swarm-server.service").read_text()
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
OURS = {name: one for name, one in COMPOSE["services"].items() if one["image"] == "swarm"}
ALERTS = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())

NAME = re.compile(r"\b(?:swarm|process)_[a-z0-9_]+\b")
SELECTED = re.compile(r"\b((?:swarm|process)_[a-z0-9_]+)\{([^}]*)\}")
GROUPED = re.compile(r"\b(?:by|without)\s*\(([^)]*)\)")
LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
SCRAPED = {"instance", "job"}
"""Labels that Prometheus adds."""

VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """The labels of every time series that a server or a health page has, by its name or its family's."""

    async def load(on_progress: OnProgress) -> FakeEngine:
        return FakeEngine()

    said = Announcement(peer="p", model_id=TINY.model_id, start=0, end=6, state="serving")
    seen = Seen(
        PeerId("p"), "1", at=0, models=(TINY,), announcements={TINY.model_id: (said,)}, dropped={"x": 1}
    )
    found: dict[str, set[str]] = {}
    for registry in (Metrics(ShardCell(Span(0, 6), load)).registry, registry_of(lambda: state_of(seen))):
        for family in registry.collect():
            for sample in family.samples:
                for name in (sample.name, family.name):
                    found.setdefault(name, set()).update(sample.labels)
    return found


def queries() -> dict[str, str]:
    """Every query of the dashboard and the alerts, by where it stands."""
    panels = {
        f"grafana.json {panel['title']} {target['refId']}": target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    }
    variables = {
        f"grafana.json ${one['name']}": one["query"]["query"]
        for one in DASHBOARD["templating"]["list"]
        if one["type"] == "query"
    }
    rules = {rule["alert"]: rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]}
    return {**panels, **variables, **rules}


@pytest.mark.parametrize("query", queries().values(), ids=queries())
def test_queries_ask_for_what_is_measured(query: str, labels: dict[str, set[str]]) -> None:
    names = set(NAME.findall(query)) or {"up"}
    assert names <= {"up", *labels}
    for name, selector in SELECTED.findall(query):
        assert set(LABEL.findall(selector)) <= labels[name] | SCRAPED, query
    known = SCRAPED.union(*(labels.get(name, ()) for name in names))
    for group in GROUPED.findall(query):
        assert {label.strip() for label in group.split(",")} <= known, query


@pytest.mark.parametrize("page", pages(), ids=str)
def test_pages_name_what_is_measured(page: Any, labels: dict[str, set[str]]) -> None:
    named = {name for name in NAME.findall(page.text) if not name.endswith("_")}
    assert named <= set(labels)


def test_alerts_speak_of_labels_that_are_left() -> None:
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            told = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
            assert told <= {"instance", "model"}
            assert rule["annotations"]["summary"]
            assert rule["annotations"]["description"]


def test_the_panels_lie_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def unit_values(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)


def test_the_service_starts_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    (start,) = unit_values("ExecStart")
    words = shlex.split(start.replace("${STATE_DIRECTORY}", "/var/lib/swarm"))
    assert words[1:3] == ["-m", "swarm.server"]
    parsed("swarm.server", tuple(words[3:]), monkeypatch)


def test_the_service_lets_a_server_leave() -> None:
    (patience,) = unit_values("TimeoutStopSec")
    assert float(patience) > LEAVE_TIMEOUT
    assert unit_values("KillMode") == ["mixed"], "the network's process must outlive the server's farewell"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")
def test_the_service_is_one_for_systemd(tmp_path: Path) -> None:
    """Its program lies elsewhere here, and is checked to be there."""
    copy = tmp_path / "swarm-server.service"
    copy.write_text(UNIT.replace("/opt/swarm/bin/python", f'"{sys.executable}"'))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def with_defaults(text: str) -> str:
    """As Compose fills in what the environment does not have; of addresses there is one."""
    return VARIABLE.sub(lambda found: ADDRESS if found[1] == "SWARM_INITIAL_PEERS" else found[2], text)


@pytest.mark.parametrize("name", OURS)
def test_containers_start_commands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, *arguments = map(with_defaults, OURS[name]["command"])
    parsed(module, tuple(arguments), monkeypatch)


def test_the_image_starts_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
    (words,) = re.findall(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)
    assert json.loads(program) == ["python", "-m"]
    module, *arguments = json.loads(words)
    parsed(module, tuple(arguments), monkeypatch)


def test_containers_may_leave_in_time() -> None:
    for one in OURS.values():
        assert float(one["stop_grace_period"].removesuffix("s")) > LEAVE_TIMEOUT
        assert one["init"], "the first process of a container ignores signals until it asks for them"


def test_containers_keep_what_is_to_last() -> None:
    (declared,) = re.findall(r"^VOLUME (.*)$", DOCKERFILE, re.MULTILINE)
    for one in OURS.values():
        mounted = dict(volume.split(":")[:2] for volume in one["volumes"])
        assert set(mounted) <= set(COMPOSE["volumes"])
        assert set(mounted.values()) <= set(json.loads(declared))


def test_files_that_are_mounted_exist() -> None:
    mounted = [volume.split(":")[0] for one in COMPOSE["services"].values() for volume in one["volumes"]]
    assert all((DEPLOY / path).is_file() for path in mounted if path.startswith("./"))
    loaded = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["rule_files"]
    assert all((DEPLOY / path).is_file() for path in loaded)


def test_ports_agree() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    scraped = {job["job_name"]: job["static_configs"][0]["targets"][0] for job in config["scrape_configs"]}
    assert "--metrics-port=9100" in OURS["server"]["command"]
    assert "--port=8080" in OURS["health"]["command"]
    assert scraped == {"swarm": "127.0.0.1:9100", "swarm-health": "127.0.0.1:8080"}


def test_the_image_is_built_from_all_that_is_installed() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {folder.split("/")[0] for folder in (*tool["package-dir"].values(), "swarm")}
    wanted = {*folders, "constraints.txt", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"}
    assert set(sent_to_the_builder()) == wanted


def sent_to_the_builder() -> Iterator[str]:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    return (line.removeprefix("!") for line in lines if line.startswith("!"))
