"""A RabbitMQ of one's own: started, stopped, killed, frozen and asked, as a container or as a local node."""

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
from urllib.parse import urlsplit

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
    """TCP ports of this machine that were free just now, and that no outgoing connection is given meanwhile."""
    sockets: list[socket.socket] = []
    while len(sockets) < count:
        with contextlib.suppress(OSError):  # in use
            sockets.append(socket.create_server(("127.0.0.1", random.randrange(20000, 32000))))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def run(command: Sequence[str], **options: Any) -> str:
    """The output of a command; RuntimeError with its errors if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return str(done.stdout)


def peak_memory(pid: int) -> int:
    """The most kB of memory that a process, which still runs, has had.

    Not the ru_maxrss of wait4(), which is at least that of the process that started it. Linux only.
    """
    return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0])


class Broker:
    """A broker at a URL, which may belong to somebody else: nothing here stops or changes it."""

    ours = False  # may be stopped, and have its settings changed

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url = url if parts.port else parts._replace(netloc=f"{parts.netloc}:5672").geturl()

    def connect(self) -> pika.BlockingConnection:
        return pika.BlockingConnection(pika.URLParameters(self.url))

    def depth(self, queue: str) -> int:
        """How many messages are ready in the queue; -1 if there is no such queue."""
        connection = self.connect()
        try:
            return int(connection.channel().queue_declare(queue, passive=True).method.message_count)
        except pika.exceptions.ChannelClosedByBroker:
            return -1
        finally:
            connection.close()

    def version(self) -> tuple[int, ...]:
        """The version of RabbitMQ, such as (4, 3, 6)."""
        connection = self.connect()
        try:
            properties: Any = connection._impl.server_properties  # public API has no way to it
            return tuple(int(part) for part in properties["version"].split("+")[0].split("."))
        finally:
            connection.close()

    def start(self) -> None:
        """Return when the broker serves clients."""
        self.connect().close()

    def ctl(self, *arguments: str) -> str:
        """The output of rabbitmqctl."""
        raise NotImplementedError

    def remove(self) -> None:
        """Leave no trace."""


class ContainerBroker(Broker):
    """The repository's docker-compose.yml, as a project of its own."""

    ours = True

    def __init__(self, compose_file: Path = ROOT / "docker-compose.yml", service: str = "rabbitmq") -> None:
        amqp, management = free_ports(2)
        super().__init__(f"amqp://guest:guest@127.0.0.1:{amqp}/%2F")
        self.management_url = f"http://127.0.0.1:{management}"
        self.service = service
        self.project = f"pair-{uuid.uuid4().hex[:8]}"
        self.command = ["docker", "compose", "-p", self.project, "-f", str(compose_file)]
        self.environment = {**os.environ, "AMQP_PORT": str(amqp), "MANAGEMENT_PORT": str(management)}

    def docker(self, *arguments: str) -> str:
        return run(["docker", *arguments], env=self.environment)

    def compose(self, *arguments: str) -> str:
        return run([*self.command, *arguments], env=self.environment)

    def start(self) -> None:
        """Return when the broker serves clients."""
        self.compose("up", "-d", "--wait", self.service)

    def stop(self) -> None:
        """In order, as `docker compose stop` does."""
        self.compose("stop", self.service)

    def kill(self) -> None:
        self.compose("kill", "-s", "SIGKILL", self.service)

    def freeze(self) -> None:
        self.compose("pause", self.service)

    def thaw(self) -> None:
        self.compose("unpause", self.service)

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
        (self.home / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{amqp}\nvm_memory_high_watermark.relative = 0.4\n"
        )
        (self.home / "enabled_plugins").write_text("[].\n")
        (self.home / "env.conf").write_text("")
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
        """The path of one of RabbitMQ's programs: Debian's own in PATH change to another user."""
        return shutil.which(name, path=f"/usr/lib/rabbitmq/bin:{os.environ['PATH']}")

    def start(self) -> None:
        """Return when the broker serves clients."""
        server = self.program("rabbitmq-server")
        assert server
        with open(self.home / "output", "ab") as output:
            self.process = subprocess.Popen(
                [server], env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        eventually(self.is_serving, timeout=90, what=f"RabbitMQ starts (see {self.home})")

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def is_serving(self) -> bool:
        assert self.is_running(), (self.home / "output").read_text()[-2000:]
        try:
            self.connect().close()
        except (pika.exceptions.AMQPError, OSError):
            return False
        return True

    def stop(self) -> None:
        """In order, as a service manager does."""
        assert self.process
        self.signal(signal.SIGTERM)
        self.process.wait(timeout=60)

    def kill(self) -> None:
        assert self.process
        self.signal(signal.SIGKILL)
        self.process.wait(timeout=60)

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        assert self.process
        os.killpg(self.process.pid, number)

    def ctl(self, *arguments: str) -> str:
        program = self.program("rabbitmqctl")
        assert program
        return run([program, "-q", "-n", self.node, *arguments], env=self.environment)

    def remove(self) -> None:
        if self.is_running():
            self.kill()
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
