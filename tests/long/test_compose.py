"""The broker of docker-compose.yml, as a user starts it."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from typing import Iterator

import pytest

from broker import Broker, ContainerBroker, eventually
from broker import run as run_command
from conftest import Run


@pytest.fixture
def container(session_broker: Broker) -> Iterator[ContainerBroker]:
    """A broker of this test's own, just started."""
    if not isinstance(session_broker, ContainerBroker):
        pytest.skip("is about the container")
    broker = ContainerBroker()
    broker.environment.update(RABBITMQ_USER="ann", RABBITMQ_PASSWORD="t0p")
    broker.url = broker.url.replace("guest:guest", "ann:t0p")
    broker.start()
    yield broker
    broker.remove()


def test_the_pair_can_run_when_up_returns_and_messages_survive_down(container: ContainerBroker, run: Run) -> None:
    run("producer", "kept", "--timeout", "0", url=container.url)

    container.compose("down")
    container.start()

    assert run("consumer", "--drain", "--timeout", "0", url=container.url).bodies == [b"kept"]


def test_it_serves_this_machine_only_and_is_healthy_while_it_does(container: ContainerBroker) -> None:
    (details,) = json.loads(run_command(["docker", "inspect", container.compose("ps", "-q", "rabbitmq").strip()]))
    addresses = [port["HostIp"] for ports in details["NetworkSettings"]["Ports"].values() for port in ports or []]

    def is_healthy() -> bool:
        with contextlib.suppress(RuntimeError):
            container.compose("exec", "-T", "rabbitmq", *details["Config"]["Healthcheck"]["Test"][1:])
            return True
        return False

    assert addresses == ["127.0.0.1", "127.0.0.1"]
    with urllib.request.urlopen(container.management_url) as page:
        assert b"RabbitMQ" in page.read()
    assert is_healthy()
    container.compose("kill", "-s", "SIGSTOP", "rabbitmq")  # the broker, where a pause would stop the check, too
    assert not is_healthy()
    container.compose("kill", "-s", "SIGCONT", "rabbitmq")
    eventually(is_healthy)
    container.ctl("stop_app")
    assert not is_healthy()
