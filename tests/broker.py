"""A RabbitMQ of the tests' own: this repository's docker-compose.yml, or a node of an installed rabbitmq-server."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, Callable, Sequence

import pika

ROOT = Path(__file__).resolve().parent.parent


def eventually(condition: Callable[[], Any], timeout: float = 60, what: str = "") -> Any:
    """The first true value of `condition`, which is asked for every 50 ms; AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout} s: {what or condition}; last value: {value!r}"
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    """TCP ports that were free just now, below those that the system gives to outgoing connections."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            with contextlib.suppress(OSError):  # in use
                server = stack.enter_context(socket.create_server(("127.0.0.1", random.randrange(20000, 32000))))
                ports.append(int(server.getsockname()[1]))
        return ports


def run(command: Sequence[str], **options: Any) -> str:
    """The output of a command; RuntimeError with its errors if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return str(done.stdout)


class Broker:
    """A broker at a URL, which may belong to somebody else: nothing here stops or changes it."""

    ours = False  # may be stopped, and have its settings changed

    def __init__(self, url: str) -> None:
        self.url = url

    def connect(self) -> pika.BlockingConnection:
        return pika.BlockingConnection(pika.URLParameters(self.url))

    def queue(self, name: str) -> Any:
        """What a passive declaration answers: message_count, consumer_count; None if there is no such queue."""
        with self.connect() as connection:
            try:
                return connection.channel().queue_declare(name, passive=True).method
            except pika.exceptions.ChannelClosedByBroker:
                return None

    def depth(self, queue: str) -> int:
        """How many messages are ready in the queue; -1 if there is no such queue."""
        found = self.queue(queue)
        return int(found.message_count) if found else -1

    def take(self, queue: str) -> list[bytes]:
        """The bodies of the messages that are ready in the queue, which is empty afterwards."""
        with self.connect() as connection:
            channel = connection.channel()
            got = iter(lambda: channel.basic_get(queue, auto_ack=True), (None, None, None))
            return [bytes(body) for _, _, body in got if body is not None]

    def version(self) -> tuple[int, ...]:
        """The version of RabbitMQ, such as (4, 3, 6)."""
        with self.connect() as connection:
            properties: Any = connection._impl.server_properties  # public API has no way to it
        return tuple(int(part) for part in properties["version"].split("+")[0].split("."))

    def start(self) -> None:
        """Return when the broker serves clients."""
        self.connect().close()

    def ctl(self, *arguments: str) -> str:
        """The output of rabbitmqctl."""
        raise NotImplementedError

    def remove(self) -> None:
        """Leave no trace."""


class ContainerBroker(Broker):
    """docker-compose.yml, as a project with a name and ports of its own."""

    ours = True

    def __init__(self, compose_file: Path = ROOT / "docker-compose.yml", service: str = "rabbitmq") -> None:
        amqp, management = free_ports(2)
        super().__init__(f"amqp://guest:guest@127.0.0.1:{amqp}/%2F")
        self.management_url = f"http://127.0.0.1:{management}"
        self.service = service
        self.project = f"pair-{uuid.uuid4().hex[:8]}"
        self.command = ["docker", "compose", "-p", self.project, "-f", str(compose_file)]
        self.environment = {**os.environ, "AMQP_PORT": str(amqp), "MANAGEMENT_PORT": str(management)}

    def compose(self, *arguments: str) -> str:
        return run([*self.command, *arguments], env=self.environment)

    def start(self) -> None:
        self.compose("up", "-d", "--wait", self.service)

    def ctl(self, *arguments: str) -> str:
        return self.compose("exec", "-T", self.service, "rabbitmqctl", "-q", *arguments)

    def remove(self) -> None:
        self.compose("down", "-v", "-t", "1")


class LocalBroker(Broker):
    """A node of an installed rabbitmq-server, with its own name, ports and data directory."""

    ours = True

    def __init__(self) -> None:
        amqp, distribution = free_ports(2)
        super().__init__(f"amqp://guest:guest@127.0.0.1:{amqp}/%2F")
        self.home = Path(tempfile.mkdtemp(prefix="pair-"))
        self.node = f"{self.home.name}@localhost"
        settings = f"listeners.tcp.1 = 127.0.0.1:{amqp}\nvm_memory_high_watermark.relative = 0.4\n"
        for name, text in {"rabbitmq.conf": settings, "enabled_plugins": "[].\n", "env.conf": ""}.items():
            (self.home / name).write_text(text)
        self.environment = {
            **os.environ,
            "HOME": str(self.home),
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_PORT": str(amqp),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_CONF_ENV_FILE": str(self.home / "env.conf"),
            "RABBITMQ_CONFIG_FILE": str(self.home / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.home / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.home / "data"),
            "RABBITMQ_LOG_BASE": str(self.home / "log"),
            "ERL_FLAGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }
        self.process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def program(name: str) -> str | None:
        """The path of one of RabbitMQ's programs. Those that Debian has in PATH change to another user."""
        return shutil.which(name, path=f"/usr/lib/rabbitmq/bin:{os.environ['PATH']}")

    def start(self) -> None:
        server = self.program("rabbitmq-server")
        assert server
        with open(self.home / "output", "ab") as output:
            self.process = subprocess.Popen(
                [server], env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        eventually(self.is_serving, timeout=90, what=f"RabbitMQ starts (see {self.home})")

    def is_serving(self) -> bool:
        assert self.is_running(), (self.home / "output").read_text()[-2000:]
        try:
            self.connect().close()
        except (pika.exceptions.AMQPError, OSError):
            return False
        return True

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send it to all processes of the node; if it ends them, wait until they have ended."""
        assert self.process
        os.killpg(self.process.pid, number)
        if number in (signal.SIGTERM, signal.SIGKILL):
            self.process.wait(timeout=60)

    def ctl(self, *arguments: str) -> str:
        program = self.program("rabbitmqctl")
        assert program
        return run([program, "-q", "-n", self.node, *arguments], env=self.environment)

    def remove(self) -> None:
        if self.is_running():
            self.signal(signal.SIGKILL)
        shutil.rmtree(self.home, ignore_errors=True)


def engine_answers() -> bool:
    try:
        return subprocess.run(["docker", "compose", "ps"], cwd=ROOT, capture_output=True).returncode == 0
    except OSError:
        return False


def choose(where: str) -> Broker:
    """The broker that is asked for: docker, local, a URL, or "" for the first of the first two that can be had."""
    if where.startswith("amqp"):
        return Broker(where)
    if where in ("docker", "") and engine_answers():
        return ContainerBroker()
    if where in ("local", "") and LocalBroker.program("rabbitmq-server"):
        return LocalBroker()
    raise LookupError(
        "no RabbitMQ to test with: start a Docker engine, or install rabbitmq-server, or say --broker amqp://..."
    )
