"""Large messages, memory, TLS, slow handlers, and users who may not do everything."""

from __future__ import annotations

import asyncio
import datetime
import re
import ssl
import threading
from pathlib import Path
from typing import Any, Callable, Iterator
from urllib.parse import quote, urlsplit

import pytest
import trustme

from broker import Broker, eventually
from conftest import SCRIPTS, Run, Start
from long.conftest import Somebody


def test_the_largest_message_arrives_and_one_byte_more_is_refused(
    start: Start, run: Run, broker: Broker, queue: str
) -> None:
    largest = 2**24 if broker.version() >= (4,) else 2**27  # RabbitMQ's defaults
    body = b"0123456789abcde\0" * (largest // 16)
    producer = start("producer", "-q", queue, "-")
    producer.write(b"first\n" + body + b"\n")
    eventually(lambda: broker.depth(queue) == 2)

    producer.write(body + b"x\nafter\n")

    assert producer.end() == 1
    assert producer.stderr.count("\n") == 1
    assert f"message size {largest + 1} is larger than configured max size {largest}" in producer.stderr
    assert producer.stderr.endswith("; 2 messages are safe\n")
    assert run("consumer", "-q", queue, "--drain").bodies == [b"first", body]


def peak_memory(pid: int) -> int:
    """The most kB of memory that a process, which still runs, has had."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_input(start: Start, queue: str) -> None:
    consumer = start("consumer", "-q", queue, "--prefetch", "300")
    few = start("producer", "-q", queue, "-")
    few.write(b"\n" * 1000)
    eventually(lambda: len(consumer.stdout) == 1000)
    before = peak_memory(few.process.pid), peak_memory(consumer.process.pid)

    many = start("producer", "-q", queue, "-", input=b"\n" * 1_000_000)  # which is one read
    eventually(lambda: len(consumer.stdout) > 50_000)

    after = peak_memory(many.process.pid), peak_memory(consumer.process.pid)
    assert after[0] < 1.5 * before[0], (before, after)
    assert after[1] < 1.5 * before[1], (before, after)


SLOW = """
def handle(method, properties, body):
    time.sleep(6 if body == b'slow' and not method.redelivered else 0)
    print(body.decode(), flush=True)
"""


@pytest.fixture
def impatient_broker(own_broker: Broker) -> Iterator[Broker]:
    """The broker waits two seconds for an acknowledgement."""
    setting = (
        "application:set_env(rabbit, consumer_timeout, {}), application:set_env(rabbit, channel_tick_interval, {})."
    )
    own_broker.ctl("eval", setting.format(2000, 1000))
    yield own_broker
    own_broker.ctl("eval", setting.format(1_800_000, 60_000))


def test_a_handler_slower_than_the_broker_allows_is_reported(
    start: Start, run: Run, impatient_broker: Broker, queue: str
) -> None:
    run("producer", "-q", queue, "slow", "1", "2")

    consumer = start("consumer", "-q", queue, handle=SLOW)

    eventually(lambda: {b"slow", b"1", b"2"} <= set(consumer.bodies) and consumer.bodies.count(b"slow") == 2)
    eventually(lambda: impatient_broker.depth(queue) == 0)
    assert consumer.stop() == 0
    assert "took longer than allowed; next try" in consumer.stderr


def test_a_user_who_may_not_configure_can_use_a_queue_that_exists(run: Run, queue: str, somebody: Somebody) -> None:
    run("consumer", "-q", queue, "--drain")  # declares it
    url = somebody(configure="^$")

    producer = run("producer", "-q", queue, "one", url=url)
    consumer = run("consumer", "-q", queue, "--drain", url=url)

    assert consumer.bodies == [b"one"]
    for script in producer, consumer:
        [warning] = [line for line in script.stderr.splitlines() if "published" not in line]
        assert re.search("warning: the queue is used as it is: ACCESS_REFUSED - .*access to queue", warning)


@pytest.mark.parametrize(("name", "missing"), [("producer", "write"), ("consumer", "read")])
def test_a_user_who_may_not_use_the_queue_is_refused_at_once(
    name: str, missing: str, run: Run, queue: str, somebody: Somebody
) -> None:
    run("producer", "-q", queue, "one")

    message = ["two"] if name == "producer" else []

    script = run(name, "-q", queue, *message, url=somebody(**{missing: "^$"}), code=1)

    assert re.search("error: 127.0.0.1:.*ACCESS_REFUSED", script.stderr.splitlines()[-1])
    assert "next try" not in script.stderr
    assert run("consumer", "-q", queue, "--drain").bodies == [b"one"]


class TLSProxy:
    """Terminates TLS in front of the broker."""

    def __init__(self, broker: Broker, context: ssl.SSLContext) -> None:
        parts = urlsplit(broker.url)
        self.target = parts.hostname, parts.port
        self.passed = 0  # bytes to the broker
        self.loop = asyncio.new_event_loop()
        serving = asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=context)
        self.server = self.loop.run_until_complete(serving)
        self.url = f"amqps://guest:guest@localhost:{self.server.sockets[0].getsockname()[1]}/%2F"
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_broker, to_broker = await asyncio.open_connection(*self.target)
        await asyncio.gather(self.forward(reader, to_broker), self.forward(from_broker, writer))

    async def forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while not source.at_eof():
            data = await source.read(65536)
            sink.write(data)
            self.passed += len(data)
        sink.close()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)


@pytest.fixture(scope="session")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls_proxy(broker: Broker, ca: trustme.CA) -> Iterator[Callable[..., TLSProxy]]:
    """Start a proxy with a certificate for the host name."""
    proxies: list[TLSProxy] = []

    def proxy(host: str = "localhost", days: int = 1, demand_certificate: bool = False) -> TLSProxy:
        now = datetime.datetime.now(datetime.timezone.utc)
        after, before = now + datetime.timedelta(days), now - datetime.timedelta(9)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert(host, not_before=before, not_after=after).configure_cert(context)
        if demand_certificate:
            ca.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        proxies.append(TLSProxy(broker, context))
        return proxies[-1]

    yield proxy
    for each in proxies:
        each.stop()


@pytest.fixture
def trust(ca: trustme.CA, tmp_path: Path) -> dict[str, str]:
    """The environment in which the scripts trust the CA."""
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return {"SSL_CERT_FILE": str(tmp_path / "ca.pem")}


def test_messages_pass_over_tls(
    run: Run, queue: str, tls_proxy: Callable[..., TLSProxy], trust: dict[str, str]
) -> None:
    lines = b"".join(b"%d\n" % number for number in range(1000))
    proxy = tls_proxy()

    producer = run("producer", "-q", queue, "-", input=lines, url=proxy.url, env=trust)
    consumer = run("consumer", "-q", queue, "--drain", url=proxy.url, env=trust)

    assert consumer.stdout == lines
    assert producer.messages == ["1000 messages published"]
    assert consumer.stderr == ""
    assert proxy.passed > len(lines)


UNVERIFIED: dict[str, tuple[dict[str, Any], bool, str]] = {
    "unknown CA": ({}, False, "certificate verify failed: unable to get local issuer certificate"),
    "wrong host name": ({"host": "elsewhere"}, True, "certificate is not valid for 'localhost'"),
    "expired": ({"days": -1}, True, "certificate has expired"),
}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(("certificate", "trusted", "reason"), UNVERIFIED.values(), ids=UNVERIFIED)
def test_a_broker_that_cannot_be_verified_gets_no_byte(
    run: Run, name: str, queue: str, tls_proxy: Callable[..., TLSProxy], trust: dict[str, str],
    certificate: dict[str, Any], trusted: bool, reason: str,
) -> None:  # fmt: skip
    proxy = tls_proxy(**certificate)

    message = ["one"] if name == "producer" else []

    script = run(name, "-q", queue, *message, url=proxy.url, env=trust if trusted else {}, code=1)

    assert script.messages[0].startswith("error: localhost:")
    assert reason in script.stderr
    assert script.stderr.count("\n") == 1
    assert proxy.passed == 0


def test_a_client_certificate_opens_the_connection(
    run: Run, queue: str, tls_proxy: Callable[..., TLSProxy], ca: trustme.CA, trust: dict[str, str], tmp_path: Path
) -> None:
    pem = tmp_path / "client.pem"
    ca.issue_cert("client").private_key_and_cert_chain_pem.write_to_path(str(pem))
    options = {"ca_certs": trust["SSL_CERT_FILE"], "certfile": str(pem), "server_hostname": "localhost"}
    url = f"{tls_proxy(demand_certificate=True).url}?ssl_options={quote(str(options))}"

    run("producer", "-q", queue, "one", url=url)

    assert run("consumer", "-q", queue, "--drain", url=url).bodies == [b"one"]
