"""Every command of README.md runs, and prints what the page shows. Its examples work, and its figures of speech are true."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest

from broker import ROOT, Broker, ContainerBroker, LocalBroker, engine_answers, eventually, free_ports
from conftest import SCRIPTS, TIMEOUT, Run

README = (ROOT / "README.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", README, flags=re.MULTILINE | re.DOTALL))


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], flags=re.MULTILINE | re.DOTALL)


def examples(block: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with the output that follows it."""
    for example in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = example.partition("\n")
        yield command, output


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """What a user has who has just cloned the repository."""
    for name in ("producer.py", "consumer.py", "requirements.txt", "docker-compose.yml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture
def environment(broker: Broker) -> dict[str, str]:
    """That of a user who has done what "Start" says: `python` is one with pika, and the broker's URL is known."""
    return {**os.environ, "AMQP_URL": broker.url, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def bash(script: str, directory: Path, environment: dict[str, str]) -> str:
    """What the script prints; it has to end with 0."""
    command = ["bash", "-c", script]
    done = subprocess.run(command, cwd=directory, env=environment, timeout=TIMEOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("section", [name for name in SECTIONS if blocks(name, "console")])
def test_the_commands_print_what_is_shown(
    section: str, own_broker: Broker, environment: dict[str, str], directory: Path
) -> None:
    bash("python consumer.py --drain", directory, environment)  # of what other sections left
    interrupted = []

    for block in blocks(section, "console"):
        script = expected = ""
        for command, output in examples(block):
            if output.endswith("^C\n"):
                consumers = own_broker.ctl("list_consumers").count("\n")
                process = subprocess.Popen(
                    ["bash", "-c", f"exec {command} 2>&1"],
                    cwd=directory, env=environment, stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                interrupted.append((process, output[: -len("^C\n")]))
                eventually(lambda: own_broker.ctl("list_consumers").count("\n") > consumers)  # noqa: B023
            else:
                script += f"{command}\n"
                expected += output
        assert bash(f"exec 2>&1\n{script}\ntrue", directory, environment) == expected

    for process, output in interrupted:
        assert process.stdout
        shown = "".join(process.stdout.readline() for _ in output.splitlines())
        process.send_signal(signal.SIGINT)
        assert shown + process.communicate(timeout=TIMEOUT)[0] == output
        assert process.returncode == 0


@pytest.mark.parametrize("how", ["with Docker", "without Docker"])
def test_the_start_works_as_shown(how: str, broker: Broker, environment: dict[str, str], directory: Path) -> None:
    with_docker, without_docker = blocks("Start", "sh")
    environment["PATH"] = f"{os.environ['PATH']}:{directory}"
    if how == "with Docker":
        if not engine_answers():
            pytest.skip("no Docker engine answers")
        amqp, management = map(str, free_ports(2))
        environment.update(COMPOSE_PROJECT_NAME=f"pair-start-{amqp}", AMQP_PORT=amqp, MANAGEMENT_PORT=management)
        environment.update(AMQP_URL=f"amqp://localhost:{amqp}/%2F")
    else:
        if not os.environ.get("CI") or os.geteuid() or not isinstance(broker, LocalBroker):
            pytest.skip("installs packages of Debian's, which it does in CI only, and for the local broker only")
        (directory / "sudo").write_text('#!/bin/sh\nexec "$@" >/dev/null\n')
        (directory / "sudo").chmod(0o755)
        bash(f"{sys.executable} consumer.py --drain", directory, environment)

    try:
        output = bash(with_docker if how == "with Docker" else without_docker, directory, environment)
    finally:
        if how == "with Docker":
            bash("docker compose down -v -t 1", directory, environment)

    assert output == "Hello World!\n"


def test_the_virtual_host_is_made_as_shown(broker: Broker, environment: dict[str, str], directory: Path) -> None:
    if not isinstance(broker, ContainerBroker):
        pytest.skip("is about the broker in Docker")
    (script,) = blocks("Recipes", "sh")
    address = broker.url.split("@")[1].split("/")[0]
    environment.update(AMQP_PORT=broker.environment["AMQP_PORT"], COMPOSE_PROJECT_NAME=broker.project)

    bash("set -e\n" + script.replace("@localhost/", f"@{address}/"), directory, environment)


def test_the_worker_works_as_shown(own_broker: Broker, environment: dict[str, str], directory: Path) -> None:
    handle, _ = blocks("Make it your own", "python")
    consumer = (directory / "consumer.py").read_text()
    before, after = consumer.split("\ndef handle(")[0], consumer[consumer.index("# From here to") :]
    (directory / "worker.py").write_text(f"{before}\n{handle}\n\n{after}")

    bash("python producer.py -q sqlite one two && python worker.py -q sqlite --drain", directory, environment)

    rows = sqlite3.connect(directory / "orders.db").execute("SELECT text FROM orders ORDER BY text").fetchall()
    assert rows == [("one",), ("two",)]


def test_the_publisher_works_as_shown(
    run: Run, own_broker: Broker, queue: str, environment: dict[str, str], directory: Path
) -> None:
    _, publisher = blocks("Make it your own", "python")
    (directory / "publisher.py").write_text(publisher)
    run("consumer", "-e", "orders", "-t", "topic", "-r", "order.*", "-q", queue, "--drain")

    assert bash("python publisher.py", directory, environment) == ""

    assert own_broker.depth(queue) == 1


def test_the_messages_that_are_explained_are_those_of_the_scripts() -> None:
    sources = "".join((ROOT / f"{name}.py").read_text() for name in SCRIPTS)

    rows = re.findall(r"^\| `(.+?)(?: '.*?)?` \|", SECTIONS["When something goes wrong"], flags=re.MULTILINE)

    assert len(rows) > 10
    assert [row for row in rows if row.islower() and row not in sources] == []
