"""Every command of README.md runs, and prints what the page shows."""

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
from conftest import TIMEOUT, Run

README = (ROOT / "README.md").read_text()
SECTIONS = dict(re.findall(r"^(##+ .+?)\n(.*?)(?=^##+ |\Z)", README, flags=re.MULTILINE | re.DOTALL))


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], flags=re.MULTILINE | re.DOTALL)


def examples(block: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with the output that follows it."""
    for example in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = example.partition("\n")
        yield command, output


def pattern(output: str) -> str:
    """A regular expression for the output as shown, in which ... is for anything within a line."""
    return re.escape(output).replace(re.escape("..."), ".*")


@pytest.fixture
def shell_environment(broker: Broker, tmp_path: Path) -> dict[str, str]:
    """That of a user who has done what "Start" says: `python` is one with pika, and the broker's URL is known."""
    for name in ("producer.py", "consumer.py"):
        shutil.copy(ROOT / name, tmp_path)
    return {**os.environ, "AMQP_URL": broker.url, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def consumers(broker: Broker) -> int:
    """How many there are, on all queues."""
    return broker.ctl("list_consumers").count("\n")


@pytest.mark.ours
@pytest.mark.parametrize("section", [name for name in SECTIONS if blocks(name, "console")])
def test_the_commands_print_what_is_shown(
    section: str, broker: Broker, shell_environment: dict[str, str], tmp_path: Path
) -> None:
    interrupted = []

    for block in blocks(section, "console"):
        script = ""
        for command, output in examples(block):
            if output.endswith("^C\n"):
                before = consumers(broker)
                process = subprocess.Popen(
                    ["bash", "-c", f"exec {command}"],
                    cwd=tmp_path, env=shell_environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                )  # fmt: skip
                interrupted.append((process, output[: -len("^C\n")]))
                eventually(lambda before=before: consumers(broker) > before)  # type: ignore[misc]
            else:
                script += f"{command}\n"
        expected = "".join(output for _, output in examples(block) if not output.endswith("^C\n"))
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=shell_environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT,
        )  # fmt: skip
        assert re.fullmatch(pattern(expected), done.stdout), done.stdout

    for process, output in interrupted:
        assert process.stdout
        shown = "".join(process.stdout.readline() for _ in output.splitlines())
        process.send_signal(signal.SIGINT)
        assert re.fullmatch(pattern(output), shown + process.communicate(timeout=TIMEOUT)[0])
        assert process.returncode == 0


def bash(script: str, directory: Path, environment: dict[str, str]) -> None:
    subprocess.run(["bash", "-e", "-c", script], cwd=directory, env=environment, timeout=TIMEOUT, check=True)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a user has who has just cloned the repository."""
    for name in ("producer.py", "consumer.py", "requirements.txt", "docker-compose.yml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_the_start_with_docker_works_as_shown(clone: Path) -> None:
    if not engine_answers():
        pytest.skip("no Docker engine answers")
    amqp, management = free_ports(2)
    environment = {
        **os.environ,
        "COMPOSE_PROJECT_NAME": f"pair-start-{amqp}",
        "AMQP_PORT": str(amqp),
        "MANAGEMENT_PORT": str(management),
        "AMQP_URL": f"amqp://guest:guest@localhost:{amqp}/%2F",
    }
    with_docker, _ = blocks("## Start", "sh")

    try:
        bash(f"{with_docker}\npython producer.py --connect-timeout 0", clone, environment)
    finally:
        bash("docker compose down -v -t 1", clone, environment)


def test_the_start_without_docker_works_as_shown(broker: Broker, clone: Path) -> None:
    if not os.environ.get("CI") or os.geteuid() or not isinstance(broker, LocalBroker):
        pytest.skip("installs packages of Debian's, which it does in CI only, and for the local broker only")
    (clone / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    (clone / "sudo").chmod(0o755)
    environment = {**os.environ, "AMQP_URL": broker.url, "PATH": f"{os.environ['PATH']}:{clone}"}
    _, without_docker = blocks("## Start", "sh")

    bash(f"{without_docker}\npython producer.py --connect-timeout 0", clone, environment)


@pytest.mark.ours
def test_the_virtual_host_is_made_as_shown(broker: Broker, shell_environment: dict[str, str], tmp_path: Path) -> None:
    if not isinstance(broker, ContainerBroker):
        pytest.skip("is about the broker in Docker")
    (script,) = blocks("### Virtual hosts", "sh")
    shell_environment.update(COMPOSE_PROJECT_NAME=broker.project, COMPOSE_FILE=str(ROOT / "docker-compose.yml"))
    shell_environment.update(broker.environment, PATH=shell_environment["PATH"])

    bash(script.replace("@localhost/", broker.url.partition("guest:guest")[2][:-3]), tmp_path, shell_environment)


@pytest.mark.ours
def test_the_worker_works_as_shown(shell_environment: dict[str, str], tmp_path: Path) -> None:
    (handle,) = blocks("### A worker", "python")
    consumer = (ROOT / "consumer.py").read_text()
    own, rest = consumer[: consumer.index("\ndef handle(")], consumer[consumer.index("# What follows") :]
    (tmp_path / "worker.py").write_text(f"{own}\n{handle}\n{rest}")
    worker = "python worker.py -e logs -t topic -q audit --drain"

    bash(f"{worker} && python producer.py -e logs -r a.b one two && {worker}", tmp_path, shell_environment)

    rows = sqlite3.connect(tmp_path / "audit.db").execute("SELECT line FROM lines ORDER BY line").fetchall()
    assert rows == [("one",), ("two",)]


@pytest.mark.ours
def test_the_publisher_works_as_shown(run: Run, broker: Broker, queue: str, shell_environment: dict[str, str]) -> None:
    publish, in_a_thread = blocks("### A publisher", "python")
    run("consumer", "-e", "orders", "-t", "topic", "-r", "order.*", "-q", queue, "--drain")
    program = f"{publish}\n{in_a_thread}"

    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=shell_environment, capture_output=True, text=True
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert broker.depth(queue) == 2
