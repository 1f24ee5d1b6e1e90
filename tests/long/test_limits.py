"""Large messages, memory, and TLS."""

from __future__ import annotations

import contextlib
import datetime
import select
import socket
import ssl
import threading
from pathlib import Path
from typing import Callable, Iterator
from urllib.parse import quote, urlsplit

import pytest
import trustme

from broker import Broker, eventually, peak_memory
from conftest import Run, Start

LARGEST = 1_000_000  # bytes; what the broker is told to take


@pytest.fixture
def small_messages_only(broker: Broker) -> Iterator[None]:
    """The broker takes messages of up to LARGEST bytes."""
    key = (
        "persistent_term:{}(max_message_size"
        if broker.version() >= (4,)
        else "application:{}_env(rabbit, max_message_size"
    )
    put, get = key.format("put" if "term" in key else "set"), key.format("get")
    before = broker.ctl("eval", f"{get}).").strip("{}ok,\n ")
    broker.ctl("eval", f"{put}, {LARGEST}).")
    yield
    broker.ctl("eval", f"{put}, {before}).")


@pytest.mark.ours
@pytest.mark.usefixtures("small_messages_only")
@pytest.mark.parametrize("before", [0, 1, 2, 7])
def test_the_largest_message_arrives_and_one_byte_more_is_refused_by_name(run: Run, queue: str, before: int) -> None:
    lines = [b"line %d" % number for number in range(before)] + [b"a" * LARGEST]

    producer = run("producer", "-q", queue, "-", input=b"\n".join([*lines, b"b" * (LARGEST + 1), b"after"]), code=1)

    assert producer.stderr.count("\n") == 1
    assert f"message size {LARGEST + 1} is larger than configured max size {LARGEST}" in producer.stderr
    assert f"{before + 1} messages are safe, resume with: tail -n +{before + 2}" in producer.stderr
    assert run("consumer", "-q", queue, "--drain").bodies == lines


def test_a_message_of_many_frames_comes_back(run: Run, queue: str, broker: Broker) -> None:
    megabytes = 15 if broker.version() >= (4,) else 30
    lines = b"first\n" + b"0123456789abcde\0" * (megabytes << 16) + b"\nlast\n"

    run("producer", "-q", queue, "-", input=lines)

    assert run("consumer", "-q", queue, "--drain").stdout == lines


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_input(start: Start, queue: str, broker: Broker) -> None:
    peaks = []
    for count in 10_000, 200_000:
        producer = start("producer", "-q", queue, "-")
        producer.write(b"".join(b"line %d\n" % number for number in range(count)))
        eventually(lambda count=count: broker.depth(queue) == count)  # type: ignore[misc]
        consumer = start("consumer", "-q", queue, "--prefetch", "300")
        eventually(lambda consumer=consumer, count=count: consumer.stdout.count(b"\n") == count)  # type: ignore[misc]
        peaks.append(tuple(peak_memory(script.process.pid) for script in (producer, consumer)))
        assert producer.end() == 0
        assert consumer.terminate() == 0

    for few, many in zip(*peaks):
        assert many < 1.3 * few, peaks


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_lines_that_one_read_gives(start: Start, queue: str, broker: Broker) -> None:
    peaks = []
    for count in 1000, 100_000:
        producer = start("producer", "-q", queue, "-")
        producer.write(b"\n" * count)
        eventually(lambda count=count: broker.depth(queue) >= count)  # type: ignore[misc]
        peaks.append(peak_memory(producer.process.pid))
        assert producer.end() == 0

    assert peaks[1] < 1.5 * peaks[0], peaks


class TLSProxy:
    """Terminates TLS in front of the broker, for one connection after the other."""

    def __init__(self, broker: Broker, context: ssl.SSLContext) -> None:
        target = urlsplit(broker.url)
        assert target.hostname
        self.target, self.context = (target.hostname, target.port or 5672), context
        self.passed = 0  # bytes to the broker
        self.tries = 0
        self.server = socket.create_server(("127.0.0.1", 0))
        userinfo = target.netloc.rpartition("@")[0]
        netloc = f"{userinfo}@localhost:{self.server.getsockname()[1]}"
        self.url = target._replace(scheme="amqps", netloc=netloc, query="").geturl()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                plain = self.server.accept()[0]
            except OSError:
                return  # closed
            self.tries += 1
            client = self.context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
            try:
                client.do_handshake()
                self.pass_on(client)
            except OSError:  # is the script's to say; let it read the alert, which a reset would overtake
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(client, socket.SHUT_WR)
                    while socket.socket.recv(client, 65536):
                        pass
            client.close()

    def pass_on(self, client: ssl.SSLSocket) -> None:
        broker = socket.create_connection(self.target)
        for each in client, broker:
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            ready = [client] if client.pending() else select.select([client, broker], [], [])[0]
            for source, sink in (client, broker), (broker, client):
                if source in ready:
                    data = source.recv(65536)
                    if not data:
                        return
                    sink.sendall(data)
                    self.passed += len(data) if sink is broker else 0


Proxy = Callable[..., TLSProxy]


@pytest.fixture(scope="session")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def proxy(broker: Broker, ca: trustme.CA) -> Iterator[Proxy]:
    """Start a TLS proxy with a certificate for the host name."""
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
        each.server.close()


@pytest.fixture
def trust(ca: trustme.CA, tmp_path: Path) -> dict[str, str]:
    """The environment in which the scripts trust the CA."""
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return {"SSL_CERT_FILE": str(tmp_path / "ca.pem")}


def test_messages_pass_over_tls(run: Run, queue: str, proxy: Proxy, trust: dict[str, str]) -> None:
    lines = b"".join(b"%d\n" % number for number in range(1000))
    tls = proxy()

    producer = run("producer", "-q", queue, "-", input=lines, url=tls.url, env=trust)
    consumer = run("consumer", "-q", queue, "--drain", url=tls.url, env=trust)

    assert consumer.stdout == lines
    assert producer.stderr == "producer.py: 1000 messages published\n"
    assert consumer.stderr == ""
    assert tls.tries >= 2


UNVERIFIED = {
    "unknown CA": ({}, False, "certificate verify failed: unable to get local issuer certificate"),
    "wrong host name": ({"host": "elsewhere"}, True, "certificate is not valid for 'localhost'"),
    "expired": ({"days": -1}, True, "certificate has expired"),
}


@pytest.mark.parametrize("name", ["producer", "consumer"])
@pytest.mark.parametrize(("certificate", "trusted", "reason"), UNVERIFIED.values(), ids=UNVERIFIED)
def test_a_broker_that_cannot_be_verified_gets_no_byte(
    run: Run, name: str, queue: str, proxy: Proxy, trust: dict[str, str],
    certificate: dict[str, str], trusted: bool, reason: str,
) -> None:  # fmt: skip
    tls = proxy(**certificate)

    script = run(name, "-q", queue, url=tls.url, env=trust if trusted else {}, code=1)

    assert script.stderr.startswith(f"{name}.py: error: localhost:")
    assert reason in script.stderr
    assert script.stderr.count("\n") == 1
    assert (tls.tries, tls.passed) == (1, 0)


@pytest.mark.parametrize("name", ["producer", "consumer"])
def test_a_demanded_client_certificate_that_is_missing_is_named(
    run: Run, name: str, queue: str, proxy: Proxy, trust: dict[str, str]
) -> None:
    tls = proxy(demand_certificate=True)

    script = run(name, "-q", queue, "--connect-timeout", "1", url=tls.url, env=trust, code=1)

    assert "certificate required" in script.stderr.splitlines()[-1]
    assert tls.passed == 0


def test_a_client_certificate_opens_the_connection(
    run: Run, queue: str, proxy: Proxy, ca: trustme.CA, trust: dict[str, str], tmp_path: Path
) -> None:
    pem = tmp_path / "client.pem"
    ca.issue_cert("client").private_key_and_cert_chain_pem.write_to_path(str(pem))
    options = {"ca_certs": trust["SSL_CERT_FILE"], "certfile": str(pem), "server_hostname": "localhost"}
    url = f"{proxy(demand_certificate=True).url}?ssl_options={quote(str(options))}"

    run("producer", "-q", queue, "one", url=url)

    assert run("consumer", "-q", queue, "--drain", url=url).bodies == [b"one"]
