"""Every command of README.md runs, and prints what the page shows. Its examples work, and its figures of speech are true."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Iterator

import pytest

from broker import ROOT, Broker, ContainerBroker, LocalBroker, eventually, free_ports
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


def inline(section: str, beginning: str) -> str:
    """The command between backquotes that begins so."""
    return str(re.findall(rf"`({beginning}.*?)`", SECTIONS[section])[0])


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
    (script,) = blocks("Start", "sh")
    environment["PATH"] = f"{os.environ['PATH']}:{directory}"
    if how == "with Docker":
        if not isinstance(broker, ContainerBroker):
            pytest.skip("is about the container")
        amqp, management = map(str, free_ports(2))
        environment["COMPOSE_PROJECT_NAME"] = f"pair-start-{amqp}"
        other_ports = inline("Start", "export AMQP_PORT=").replace("15673", management).replace("5673", amqp)
        script = f"{other_ports}\n{script}"
    else:
        if not os.environ.get("CI") or os.geteuid() or not isinstance(broker, LocalBroker):
            pytest.skip("installs packages of Debian's, which it does in CI only, and for the local broker only")
        (directory / "sudo").write_text('#!/bin/sh\nexec "$@" >/dev/null\n')
        (directory / "sudo").chmod(0o755)
        script = "\n".join([inline("Start", "sudo apt-get"), *script.splitlines()[1:]])
        bash(f"{sys.executable} consumer.py --drain", directory, environment)

    try:
        output = bash(script, directory, environment)
    finally:
        if how == "with Docker":
            bash(f"{other_ports}\ndocker compose down -v -t 1", directory, environment)

    assert output == "Hello World!\n"


def make_worker(handle: str, path: Path) -> None:
    """A copy of consumer.py in which `handle` is another, as a reader makes it."""
    consumer = (ROOT / "consumer.py").read_text()
    before, after = consumer.split("\ndef handle(")[0], consumer[consumer.index("# Both files share") :]
    path.write_text(f"{before}\n{handle}\n\n{after}")


def test_the_worker_works_as_shown(own_broker: Broker, environment: dict[str, str], directory: Path) -> None:
    make_worker(blocks("Make it your own", "python")[0], directory / "worker.py")

    bash("python producer.py -q sqlite one two && python worker.py -q sqlite --drain", directory, environment)

    rows = sqlite3.connect(directory / "orders.db").execute("SELECT text FROM orders ORDER BY text").fetchall()
    assert rows == [("one",), ("two",)]


def test_the_test_of_a_worker_works_as_shown(broker: Broker, environment: dict[str, str], directory: Path) -> None:
    handle, its_test, _ = blocks("Make it your own", "python")
    make_worker(handle, directory / "worker.py")
    shutil.copy(ROOT / ".pytest.ini", directory)
    shutil.copytree(ROOT / "tests", directory / "tests", ignore=shutil.ignore_patterns("long", "test_*", "__pycache__"))
    (directory / "tests" / "test_orders.py").write_text(its_test)
    command = f"{inline('Make it your own', 'pytest --consumer')} --broker {broker.url}"

    assert "1 passed" in bash(command, directory, environment)
    (directory / "worker.py").write_text(
        (directory / "worker.py").read_text().replace("DO NOTHING", "DO UPDATE SET text = '?'")
    )
    assert "1 failed" in bash(f"{command} || true", directory, environment)


def test_the_publisher_works_as_shown(
    run: Run, own_broker: Broker, queue: str, environment: dict[str, str], directory: Path
) -> None:
    (directory / "publisher.py").write_text(blocks("Make it your own", "python")[2])
    with own_broker.connect() as connection:
        connection.channel().exchange_delete("orders")  # and what another section has bound to it

    assert bash("python publisher.py", directory, environment) == "no queue is bound for it\n"
    run("consumer", "-e", "orders", "-t", "topic", "-r", "order.*", "-q", queue, "--drain")
    assert bash("python publisher.py", directory, environment) == "stored\n"
    assert own_broker.depth(queue) == 1
    environment["AMQP_URL"] = "amqp://127.0.0.1:1"
    assert bash("python publisher.py", directory, environment).startswith("not confirmed: ")


class Target(http.server.BaseHTTPRequestHandler):
    """Refuses an order whose text is "bad", fails on the first try of each other, and takes it on the second."""

    seen: ClassVar[dict[str, str]] = {}

    def do_POST(self) -> None:
        key, body = self.headers["Idempotency-Key"], self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.send_response(400 if body == "bad" else 202 if key in self.seen else 500)
        self.end_headers()
        self.seen[key] = body


def test_the_web_application_and_its_worker_work_as_shown(
    own_broker: Broker, environment: dict[str, str], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    application, handle = blocks("In a web application", "python")
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.setenv("AMQP_URL", own_broker.url)
    names: dict[str, Any] = {"__name__": "application"}
    exec(application, names)  # noqa: S102
    make_worker(handle, directory / "worker.py")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Target)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment["TARGET"] = f"http://127.0.0.1:{server.server_port}"

    def post(number: int) -> int:
        body = "bad" if number == 7 else f"text {number}"
        return int(names["app"].test_client().post(f"/orders/{number}", data=body).status_code)

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(post, range(40))) == {202}
    worker = subprocess.Popen([sys.executable, "worker.py", "-q", "orders"], cwd=directory, env=environment)
    eventually(lambda: own_broker.depth("orders.dead") == 1 and len(Target.seen) == 40)
    eventually(lambda: own_broker.queue("orders").message_count == 0)
    worker.send_signal(signal.SIGTERM)

    assert worker.wait(TIMEOUT) == 0
    server.shutdown()
    assert own_broker.take("orders.dead") == [b"bad"]
    assert {key: body for key, body in Target.seen.items() if key != "order-7"} == {
        f"order-{number}": f"text {number}" for number in range(40) if number != 7
    }


def test_dead_letters_are_tried_again_as_shown(
    run: Run, own_broker: Broker, queue: str, environment: dict[str, str], directory: Path
) -> None:
    run("producer", "-q", queue, "-H", "a=1", "--content-type", "text/csv", "one", "two")
    run("consumer", "-q", queue, "--count", "2", handle="def handle(method, properties, body): raise Reject")
    eventually(lambda: own_broker.depth(f"{queue}.dead") == 2)
    (script,) = blocks("When `handle` fails", "python")
    (directory / "retry.py").write_text(script.replace("jobs", queue))

    bash("python retry.py", directory, environment)

    assert own_broker.depth(f"{queue}.dead") == 0
    show = "def handle(method, properties, body): print(body, properties.headers['a'], properties.content_type)"
    consumer = run("consumer", "-q", queue, "--drain", handle=show)
    assert consumer.bodies == [b"b'one' 1 text/csv", b"b'two' 1 text/csv"]


def test_the_image_of_a_worker_is_built_and_runs_as_shown(broker: Broker, directory: Path) -> None:
    inspect = ["docker", "image", "inspect", "python:3-slim"]
    if not isinstance(broker, ContainerBroker) or subprocess.run(inspect, capture_output=True).returncode:
        pytest.skip("is about the container, or there is no python:3-slim")
    (dockerfile,) = blocks("In production", "dockerfile")
    (directory / "Dockerfile").write_text(dockerfile)
    make_worker(blocks("Make it your own", "python")[0], directory / "worker.py")
    image = f"pair-worker-{uuid.uuid4().hex[:8]}"
    start = f"docker run --rm --network none {image} --timeout 0 --url amqp://127.0.0.1:1 2>&1 || true"

    output = bash(
        f"docker build -q -t {image} . >/dev/null && {start} && docker rmi {image} >/dev/null",
        directory,
        {**os.environ},
    )

    assert output.startswith("worker.py: error: 127.0.0.1:1: connection refused")


def test_the_messages_that_are_explained_are_those_of_the_scripts() -> None:
    sources = "".join((ROOT / f"{name}.py").read_text() for name in SCRIPTS)

    rows = re.findall(r"^\| `(.+?)(?: '.*?)?` \|", SECTIONS["When something goes wrong"], flags=re.MULTILINE)

    assert len(rows) > 8
    assert [row for row in rows if row.islower() and row not in sources] == []
