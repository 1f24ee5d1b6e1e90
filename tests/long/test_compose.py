"""The broker of docker-compose.yml, as a user starts it."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from typing import Iterator

import pytest

from broker import ContainerBroker, engine_answers, eventually
from conftest import Run


@pytest.fixture
def container() -> Iterator[ContainerBroker]:
    """A broker of this test's own, not started."""
    if not engine_answers():
        pytest.skip("no Docker engine answers")
    broker = ContainerBroker()
    yield broker
    broker.remove()


def test_up_wait_returns_when_the_pair_can_run(container: ContainerBroker, run: Run) -> None:
    container.compose("up", "-d", "--wait")

    run("producer", "--connect-timeout", "0", url=container.url)
    assert run("consumer", "--drain", "--connect-timeout", "0", url=container.url).stdout == b"Hello World!\n"


def test_messages_survive_down_and_up(container: ContainerBroker, run: Run) -> None:
    container.start()
    run("producer", "kept", url=container.url)

    container.compose("down")
    container.start()

    assert run("consumer", "--drain", url=container.url).bodies == [b"kept"]


def test_it_listens_on_this_machine_only_and_its_pages_answer(container: ContainerBroker) -> None:
    container.start()

    (details,) = json.loads(container.docker("inspect", container.compose("ps", "-q", "rabbitmq").strip()))
    addresses = [port["HostIp"] for ports in details["NetworkSettings"]["Ports"].values() for port in ports or []]

    assert addresses == ["127.0.0.1", "127.0.0.1"]
    with urllib.request.urlopen(container.management_url) as page:
        assert b"RabbitMQ" in page.read()


def test_user_and_password_come_from_the_environment(container: ContainerBroker, run: Run) -> None:
    container.environment.update(RABBITMQ_USER="ann", RABBITMQ_PASSWORD="t0p")
    container.start()

    run("producer", url=container.url.replace("guest:guest", "ann:t0p"))

    assert "ACCESS_REFUSED" in run("producer", url=container.url, code=1).stderr


def test_it_is_healthy_only_while_clients_are_served(container: ContainerBroker) -> None:
    container.start()
    (details,) = json.loads(container.docker("inspect", container.compose("ps", "-q", "rabbitmq").strip()))
    check = details["Config"]["Healthcheck"]["Test"]

    def is_healthy() -> bool:
        with contextlib.suppress(RuntimeError):
            container.compose("exec", "-T", "rabbitmq", *check[1:])
            return True
        return False

    assert is_healthy()

    container.compose("kill", "-s", "SIGSTOP", "rabbitmq")  # the broker, where a pause would stop the check, too
    assert not is_healthy()
    container.compose("kill", "-s", "SIGCONT", "rabbitmq")
    eventually(is_healthy)

    container.ctl("stop_app")
    assert not is_healthy()
