"""Every mistake and every refusal is one line on stderr, which says what to do, and never the password."""

from __future__ import annotations

import functools
import os
import re
import socketserver
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence
from urllib.parse import quote, urlsplit

import pytest

from broker import ROOT, Broker, eventually, free_ports
from conftest import SCRIPTS, Run, Script, Start

PASSWORD = "s3cr3t"
PERSISTENCE = 30  # seconds within which a script that does not try again has ended, however busy the machine is
Fails = Callable[..., None]
RunProgram = Callable[[str], "subprocess.CompletedProcess[str]"]


def assert_fails(script: Script, name: str, code: int, says: str, tries: bool = False) -> None:
    """The script ends with the code and one line that has `says` in it; with `tries`, with lines of its tries before."""
    assert script.end(PERSISTENCE) == code, script.stderr
    *before, line = script.stderr.split("\n")[:-1]
    assert line.startswith(f"{name}.py: error: "), script.stderr
    assert re.search(says, line), script.stderr
    assert bool(before) == tries, script.stderr
    assert all("next try in" in each for each in before), script.stderr
    assert "Traceback" not in script.stderr
    assert PASSWORD not in script.stderr
    assert ":guest" not in script.stderr
    assert script.stdout == b""


@pytest.fixture
def fails(start: Start) -> Fails:
    """Run a script, or both at the same time, which fails as `assert_fails` says."""

    def fails(
        *arguments: str, says: str, code: int = 1, tries: bool = False, names: Sequence[str] = SCRIPTS, **options: Any
    ) -> None:
        options.setdefault("stdin", subprocess.DEVNULL)
        scripts = [(name, start(name, *arguments, **options)) for name in names]
        for name, script in scripts:
            assert_fails(script, name, code, says, tries)

    return fails


LONG = "x" * 251
USAGE = {
    "connect timeout negative": (["--connect-timeout", "-1"], "--connect-timeout: at least 0"),
    "connect timeout not a number": (["--connect-timeout", "nan"], "--connect-timeout: at least 0"),
    "connect timeout not a word": (["--connect-timeout", "x"], "--connect-timeout: .*'x'"),
    "connect timeout empty": (["--connect-timeout", ""], "--connect-timeout: .*''"),
    "header without =": (["-e", "e", "-H", "x"], "-H/--header: expected KEY=VALUE"),
    "header without key": (["-e", "e", "-H", "=x"], "-H/--header: expected KEY=VALUE"),
    "header empty": (["-e", "e", "-H", ""], "-H/--header: expected KEY=VALUE"),
    "header with a key too long": (["-e", "e", "-H", f"{LONG}=x"], "-H/--header: longer than 250 bytes"),
    "header with a key that is not UTF-8": (["-e", "e", "-H", "\udcff=x"], "-H/--header: .*udcff"),
    "header with a value that is not UTF-8": (["-e", "e", "-H", "x=\udcff"], "-H/--header: .*udcff"),
    "type unknown": (["-e", "e", "-t", "other"], "-t/--type: .*other.*direct.*fanout.*topic.*headers"),
    "type without exchange": (["-t", "direct"], "-t.* need -e"),
    "routing key without exchange": (["-r", "x"], "-r.* need -e"),
    "routing key too long": (["-e", "e", "-r", LONG], "-r/--routing-key: longer than 250 bytes"),
    "routing key that is not UTF-8": (["-e", "e", "-r", "\udcff"], "-r/--routing-key: .*udcff"),
    "queue empty": (["-q", ""], "empty name"),
    "queue too long": (["-q", LONG], "-q/--queue: longer than 250 bytes"),
    "queue too long in bytes": (["-q", "é" * 126], "-q/--queue: longer than 250 bytes"),
    "queue that is not UTF-8": (["-q", "\udcff"], "-q/--queue: .*udcff"),
    "exchange empty": (["-e", ""], "empty name"),
    "exchange too long": (["-e", LONG], "-e/--exchange: longer than 250 bytes"),
    "exchange too long in bytes": (["-e", "é" * 126], "-e/--exchange: longer than 250 bytes"),
    "exchange that is not UTF-8": (["-e", "\udcff"], "-e/--exchange: .*udcff"),
    "option unknown": (["--nope"], "unrecognized arguments: --nope"),
    "option ambiguous": (["--co", "1"], "ambiguous option: --co could match --connect-timeout"),
    "option without its value": (["--queue"], "-q/--queue: expected one argument"),
    "option with a value too many": (["--verbose=1"], "-v/--verbose: ignored explicit argument '1'"),
    "password after a mistyped option": ([f"--ur1=amqp://u:{PASSWORD}@h/"], "unrecognized arguments: --ur1="),
    "password in place of a number": (["--connect-timeout", f"amqp://u:{PASSWORD}@HOST/"], "invalid float value"),
    "password in place of another option": (["-t", f"amqp://u:{PASSWORD}@h/"], "-t/--type: invalid choice"),
}
USAGE_OF_ONE = {
    "- with other messages": ("producer", ["-", "x"], "- does not go with other messages"),
    "- twice": ("producer", ["-", "-"], "- does not go with other messages"),
    "- after a message": ("producer", ["x", "-q", "q", "-"], "- does not go with other messages"),
    "queue and exchange": ("producer", ["-q", "q", "-e", "e"], "-q does not go with -e"),
    "content type too long": ("producer", ["--content-type", LONG], "--content-type: longer than 250 bytes"),
    "content type that is not UTF-8": ("producer", ["--content-type", "\udcff"], "--content-type: .*udcff"),
    "an option of the consumer": ("producer", ["--drain"], "unrecognized arguments: --drain"),
    "count 0": ("consumer", ["-c", "0"], "--count: at least 1"),
    "count negative": ("consumer", ["-c", "-1"], "--count: at least 1"),
    "count a word": ("consumer", ["-c", "x"], "-c/--count: .*'x'"),
    "count a fraction": ("consumer", ["-c", "1.5"], "-c/--count: .*'1.5'"),
    "prefetch 0": ("consumer", ["--prefetch", "0"], "--prefetch: 1 to 65535"),
    "prefetch negative": ("consumer", ["--prefetch", "-1"], "--prefetch: 1 to 65535"),
    "prefetch 65536": ("consumer", ["--prefetch", "65536"], "--prefetch: 1 to 65535"),
    "prefetch a word": ("consumer", ["--prefetch", "x"], "--prefetch: .*'x'"),
    "match without header": ("consumer", ["-e", "e", "-t", "headers", "--match", "any"], "--match needs -H"),
    "match unknown": ("consumer", ["-e", "e", "-H", "a=b", "--match", "other"], "--match: .*other.*all.*any"),
    "header without exchange": ("consumer", ["-H", "a=b"], "-H need -e"),
    "header for another type": ("consumer", ["-e", "e", "-t", "topic", "-H", "a=b"], "-H needs .* type headers"),
    "one routing key of two too long": ("consumer", ["-e", "e", "-r", "x", "-r", LONG], "-r/--routing-key: longer"),
    "a message": ("consumer", ["x"], "unrecognized arguments: x"),
    "a URL without --url": ("consumer", [f"amqp://u:{PASSWORD}@h/"], "unrecognized arguments: amqp:"),
    "an option of the producer": ("consumer", ["--content-type=x"], "unrecognized arguments: --content-type=x"),
}


@pytest.mark.parametrize(("arguments", "says"), USAGE.values(), ids=USAGE)
def test_bad_usage_is_explained(fails: Fails, arguments: Sequence[str], says: str) -> None:
    fails(*arguments, says=says, code=2)


@pytest.mark.parametrize(("name", "arguments", "says"), USAGE_OF_ONE.values(), ids=USAGE_OF_ONE)
def test_bad_usage_of_one_script_is_explained(fails: Fails, name: str, arguments: Sequence[str], says: str) -> None:
    fails(*arguments, says=says, code=2, names=[name])


FORM = r"amqp://USER:PASSWORD@HOST:PORT/VHOST, .* %XX"
BAD_URLS = {
    "another scheme": (f"http://u:{PASSWORD}@h/", FORM),
    "a scheme that begins as amqp": (f"amqpx://u:{PASSWORD}@h/", FORM),
    "no scheme": (f"u:{PASSWORD}@h/", FORM),
    "no scheme but slashes": (f"//u:{PASSWORD}@h/", FORM),
    "no slashes": (f"amqp:u:{PASSWORD}@h", FORM),
    "one slash": (f"amqp:/u:{PASSWORD}@h/", FORM),
    "a blank before it": (f" amqp://u:{PASSWORD}@h/", FORM),
    "a port that is a word": (f"amqp://u:{PASSWORD}@h:port/", FORM),
    "a port out of range": (f"amqp://u:{PASSWORD}@h:65536/", "Port out of range"),
    "a negative port": (f"amqp://u:{PASSWORD}@h:-1/", FORM),
    "a user without password": ("amqp://u@h/", FORM),
    "an IPv6 address without brackets": (f"amqp://u:{PASSWORD}@::1/", FORM),
    "an IPv6 address that does not end": (f"amqp://u:{PASSWORD}@[::1/", FORM),
    "two slashes in the path": (f"amqp://u:{PASSWORD}@h/a/b", FORM),
    "two slashes before the vhost": (f"amqp://u:{PASSWORD}@h//", FORM),
    "/ in the password": (f"amqp://u:{PASSWORD}/x@h/", FORM),
    "# in the password": (f"amqp://u:{PASSWORD}#x@h/", FORM),
    "? in the password": (f"amqp://u:{PASSWORD}?x@h/", FORM),
    "[ in the password": (f"amqp://u:{PASSWORD}[x@h/", "Invalid IPv6 URL"),
    "a number and / in the password": (f"amqp://u:12/{PASSWORD}@h", FORM),
    "a number and # in the password": (f"amqp://u:12#{PASSWORD}@h", FORM),
    "a number and ? in the password": (f"amqp://u:12?{PASSWORD}@h", FORM),
    "a number, ? and = in the password": (f"amqp://u:12?{PASSWORD}=@h", FORM),
    "a known option in the password": (f"amqp://u:12?heartbeat={PASSWORD}@h", FORM),
    "a user that is not UTF-8": (f"amqp://\udcff:{PASSWORD}@h/", "surrogates not allowed"),
    "a password that is not UTF-8": (f"amqp://u:{PASSWORD}\udcff@h/", "surrogates not allowed"),
    "a vhost that is not UTF-8": (f"amqp://u:{PASSWORD}@h/\udcff", "surrogates not allowed"),
    "a vhost too long": (f"amqp://u:{PASSWORD}@h/{'v' * 256}", FORM),
    "another scheme in the second URL": (f"amqp://u:{PASSWORD}@h/,http://u:{PASSWORD}@h/", FORM),
    "a bad port in the second URL": (f"amqp://u:{PASSWORD}@h/,amqp://u:{PASSWORD}@h:port/", FORM),
    "an unknown option": (f"amqp://u:{PASSWORD}@h/?nope=1", "nope"),
    "an option twice": (f"amqp://u:{PASSWORD}@h/?heartbeat=1&heartbeat=2", "heartbeat.* 2 values"),
    "a heartbeat that is a word": (f"amqp://u:{PASSWORD}@h/?heartbeat=x", "heartbeat .*'x'"),
    "a negative heartbeat": (f"amqp://u:{PASSWORD}@h/?heartbeat=-1", "heartbeat .*-1"),
    "a host name that cannot be": (f"amqp://u:{PASSWORD}@a..b/", "label empty or too long"),
    "a bad option of the second URL": (f"amqp://u:{PASSWORD}@h/,amqp://u:{PASSWORD}@h/?frame_max=1", "4096"),
    "no socket timeout": (f"amqp://u:{PASSWORD}@h/?socket_timeout=0", "socket_timeout must be > 0"),
    "channel_max 0": (f"amqp://u:{PASSWORD}@h/?channel_max=0", "channel_max"),
    "TCP options that are no dict": (f"amqp://u:{PASSWORD}@h/?tcp_options=1", "tcp_options must be a dict"),
    "TLS options that are garbage": (f"amqps://u:{PASSWORD}@h/?ssl_options=garbage", "malformed"),
    "TLS options that are not closed": (f"amqps://u:{PASSWORD}@h/?ssl_options={{'password':'{PASSWORD}'", "."),
    "TLS options that are no dict": (f"amqps://u:{PASSWORD}@h/?ssl_options=1", "int"),
    "TLS options with a file that is missing": (
        f"amqps://u:{PASSWORD}@h/?ssl_options={{'cafile':'/nope','password':'{PASSWORD}'}}",
        "No such file",
    ),
}


@pytest.mark.parametrize(("url", "says"), BAD_URLS.values(), ids=BAD_URLS)
def test_a_malformed_url_is_explained_and_not_repeated(start: Start, url: str, says: str) -> None:
    option = start("producer", "--url", url, stdin=subprocess.DEVNULL)
    environment = start("consumer", url=url, stdin=subprocess.DEVNULL)

    assert_fails(option, "producer", code=2, says=f"--url: .*{says}")
    assert_fails(environment, "consumer", code=2, says=f"--url: .*{says}")


def test_an_empty_url_is_no_url(fails: Fails) -> None:
    fails("--url", "", says=FORM, code=2)


def with_login(broker: Broker, user: str, password: str, path: str = "/%2F") -> str:
    parts = urlsplit(broker.url)
    return f"amqp://{user}:{quote(password, safe='')}@{parts.hostname}:{parts.port}{path}"


def with_vhost(broker: Broker, vhost: str) -> str:
    return urlsplit(broker.url)._replace(path=f"/{vhost}").geturl()


SPECIAL = f"{PASSWORD}/#?@:%,é "


@pytest.mark.parametrize("password", [PASSWORD, SPECIAL, ""], ids=["plain", "special", "empty"])
@pytest.mark.parametrize("user", ["guest", "no-such-user"])
@pytest.mark.parametrize("verbose", [False, True], ids=["short", "verbose"])
def test_a_wrong_user_or_password_is_refused_at_once(
    broker: Broker, start: Start, user: str, password: str, verbose: bool
) -> None:
    url = with_login(broker, user, password)

    scripts = [(name, start(name, "--url", url, *["-v"] * verbose, input=b"")) for name in SCRIPTS]

    for name, script in scripts:
        if verbose:
            assert script.end(PERSISTENCE) == 1
            assert "Traceback" in script.stderr
            assert PASSWORD not in script.stderr
        else:
            assert_fails(script, name, code=1, says=r"127.0.0.1:\d+: .*\(403\).* check user, password and permissions")


@pytest.mark.parametrize("vhost", ["no-such", "%00", "%2F%2F", "é"])
def test_a_missing_vhost_is_refused_at_once(broker: Broker, fails: Fails, vhost: str) -> None:
    fails(url=with_vhost(broker, vhost), says=r"\(530\).*; check the virtual host in the URL")


NONE, ALL = '<<"^$">>', '<<".*">>'
PERMISSIONS = {
    "stranger": "[]",
    "no-configure": f"[{{{NONE}, {ALL}, {ALL}}}]",
    "no-write": f"[{{{ALL}, {NONE}, {ALL}}}]",
    "no-read": f"[{{{ALL}, {ALL}, {NONE}}}]",
}


@pytest.mark.ours
def test_a_missing_permission_is_refused_at_once(broker: Any, fails: Fails, queue: str, exchange: str) -> None:
    # One call, because each boots a VM.
    users = ", ".join(f'{{<<"{name}">>, {permissions}}}' for name, permissions in PERMISSIONS.items())
    broker.ctl(
        "eval",
        f"""[begin
        ok = rabbit_auth_backend_internal:add_user(User, <<"{SPECIAL}"/utf8>>, <<"tests">>),
        [rabbit_auth_backend_internal:set_permissions(User, <<"/">>, Configure, Write, Read, <<"tests">>)
        || {{Configure, Write, Read}} <- Permissions] end || {{User, Permissions}} <- [{users}]].""",
    )
    with broker.connect() as connection:
        connection.channel().exchange_declare(exchange, "fanout", durable=True)
    url = functools.partial(with_login, broker, password=SPECIAL)

    fails(url=url("stranger"), says=r"\(530\) .*vhost.* refused for user 'stranger'.*; check the virtual host")
    fails("-q", queue, url=url("no-configure"), says=f"{queue}.*user 'no-configure'; check user, password and perm")
    fails("-q", queue, url=url("no-write"), says="user 'no-write'; check user, password and permissions")
    fails("-q", queue, url=url("no-read"), says=f"{queue}.*user 'no-read'; check user, password and permissions")
    fails("-e", exchange, "-t", "fanout", url=url("no-configure"), says="user 'no-configure'; check user")
    fails("-e", exchange, url=url("no-write"), says="user 'no-write'; check user", names=["producer"])
    fails("-e", exchange, url=url("no-read"), says=f"{exchange}.*user 'no-read'; check user", names=["consumer"])
    assert broker.depth(queue) == -1


@pytest.mark.parametrize("arguments", [[], ["-r", "x"]], ids=["without key", "with key"])
def test_an_exchange_that_does_not_exist_is_refused_at_once(
    fails: Fails, exchange: str, arguments: Sequence[str]
) -> None:
    fails("-e", exchange, *arguments, says=f"no exchange '{exchange}' in vhost .*; -t TYPE declares it")


EXCHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "another type": ({"exchange_type": "fanout", "durable": True}, "'type' for exchange"),
    "not durable": ({"exchange_type": "topic"}, "'durable' for exchange"),
}


@pytest.mark.parametrize(("settings", "says"), EXCHANGES.values(), ids=EXCHANGES)
def test_an_exchange_with_other_settings_is_refused_at_once(
    broker: Broker, fails: Fails, exchange: str, settings: dict[str, Any], says: str
) -> None:
    with broker.connect() as connection:
        connection.channel().exchange_declare(exchange, **settings)

    fails("-e", exchange, "-t", "topic", says=f"{says} '{exchange}'.*without -t, the exchange is used as it is")


RESERVED = {
    "queue": (["-q", "amq.x"], "queue name 'amq.x' contains reserved prefix"),
    "exchange": (["-e", "amq.x", "-t", "topic"], "exchange name 'amq.x' contains reserved prefix"),
}


@pytest.mark.parametrize(("arguments", "says"), RESERVED.values(), ids=RESERVED)
def test_a_reserved_name_is_refused_at_once(fails: Fails, arguments: Sequence[str], says: str) -> None:
    fails(*arguments, says=f"{says}.*; .*names that start with amq. are reserved")


def test_headers_that_are_too_long_are_refused_at_once(fails: Fails, queue: str) -> None:
    long = "x" * 100_000

    says = "FRAME_ERROR.*; the headers are too long; 0 messages are safe"
    fails("-q", queue, "-H", f"a={long}", "-H", f"b={long}", "one", says=says, names=["producer"])


def test_the_exclusive_queue_of_another_connection_is_refused_at_once(broker: Broker, fails: Fails, queue: str) -> None:
    with broker.connect() as connection:
        connection.channel().queue_declare(queue, exclusive=True)

        fails("-q", queue, says=f"locked queue '{queue}'.*; it belongs to another connection")


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True


class Mute(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while self.request.recv(1000):
            pass


class Closing(socketserver.BaseRequestHandler):
    """Closes at once."""


class Web(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.recv(1000)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


@pytest.fixture
def unreachable(request: pytest.FixtureRequest, broker: Broker) -> Iterator[str]:
    """A URL, with a password in it, where no broker answers, of the kind that the test's parameter names."""
    kind = request.param
    if kind in (Mute, Closing, Web):
        with Server(("127.0.0.1", 0), kind) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"amqp://u:{PASSWORD}@127.0.0.1:{server.server_address[1]}/"
            server.shutdown()
    else:
        (port,) = free_ports(1)
        yield kind.format(login=f"u:{PASSWORD}", free=port, broker=urlsplit(broker.url).port)


REFUSED = "amqp://{login}@127.0.0.1:{free}/"
UNREACHABLE = {
    "connection refused": (REFUSED, "127.0.0.1.*refused; start a broker with: docker compose up -d --wait"),
    "port 0": ("amqp://{login}@127.0.0.1:0/", "127.0.0.1:0: "),
    "two hosts": ("amqp://{login}@127.0.0.1:1/,amqp://{login}@127.0.0.1:{free}/", r"127.0.0.1:1,127.0.0.1:\d+: .*refu"),
    "name not resolved": ("amqp://{login}@no-such-host.invalid/", "no-such-host.invalid:5672: "),
    "mute": (Mute, "[Tt]imeout|timed out"),
    "closing": (Closing, "127.0.0.1:"),
    "another protocol": (Web, "127.0.0.1:"),
    "plain where TLS is expected": ("amqps://{login}@127.0.0.1:{broker}/", "(?i)ssl"),
}


@pytest.mark.parametrize(("unreachable", "says"), UNREACHABLE.values(), ids=UNREACHABLE, indirect=["unreachable"])
def test_an_unreachable_broker_is_tried_for_the_connect_timeout(fails: Fails, unreachable: str, says: str) -> None:
    fails("--connect-timeout", "0", "--url", unreachable, says=says)
    started = time.monotonic()
    fails("--connect-timeout", "1.1", url=unreachable, says=says, tries=True)
    assert time.monotonic() - started >= 1.1


@pytest.mark.parametrize("unreachable", [REFUSED, Mute, Web], ids=["refused", "mute", "web"], indirect=True)
def test_no_password_is_shown_with_verbose_either(start: Start, unreachable: str) -> None:
    scripts = [start(name, "-v", "--connect-timeout", "0", "--url", unreachable, input=b"") for name in SCRIPTS]

    for script in scripts:
        assert script.end(PERSISTENCE) == 1
        assert "Traceback" in script.stderr
        assert PASSWORD not in script.stderr


@pytest.mark.parametrize("unreachable", [REFUSED, Closing], ids=["refused", "closing"], indirect=True)
def test_the_second_url_serves_when_the_first_does_not(broker: Broker, run: Run, queue: str, unreachable: str) -> None:
    urls = f"{unreachable},{broker.url}"

    producer = run("producer", "-q", queue, "one", url=urls)
    consumer = run("consumer", "-q", queue, "--drain", "--url", urls)

    assert producer.stderr == "producer.py: 1 message published\n"
    assert consumer.stderr == ""
    assert consumer.bodies == [b"one"]


def test_a_host_whose_name_does_not_resolve_does_not_hide_the_others(broker: Broker, run: Run, queue: str) -> None:
    urls = f"amqp://no-such-host.invalid/,{broker.url}"

    producer = run("producer", "-q", queue, "--connect-timeout", "20", "one", url=urls)
    consumer = run("consumer", "-q", queue, "--connect-timeout", "20", "--drain", url=urls)

    assert consumer.bodies == [b"one"]
    assert [script.stderr.count("next try") for script in (producer, consumer)] == [1, 1]


def test_standard_input_that_is_closed_is_bad_usage(fails: Fails, queue: str) -> None:
    close = functools.partial(os.close, 0)

    fails("-q", queue, "-", preexec_fn=close, says="standard input is closed", code=2, names=["producer"])


def test_standard_input_that_cannot_be_read_is_explained(fails: Fails, queue: str, tmp_path: Path) -> None:
    with (tmp_path / "writable").open("wb") as unreadable:
        says = "standard input: Bad file descriptor; 0 messages"
        fails("-q", queue, "-", stdin=unreadable, says=says, names=["producer"])


def test_standard_output_that_is_closed_is_bad_usage_of_the_consumer_alone(
    run: Run, fails: Fails, broker: Broker, queue: str
) -> None:
    close = functools.partial(os.close, 1)

    run("producer", "-q", queue, preexec_fn=close)
    fails("-q", queue, preexec_fn=close, says="standard output is closed", code=2, names=["consumer"])

    assert eventually(lambda: broker.depth(queue) == 1)


@pytest.mark.parametrize(("name", "defaults"), [("producer", ["hello", "60"]), ("consumer", ["hello", "inf", "10"])])
def test_help_is_on_standard_output_and_has_no_password(run: Run, name: str, defaults: list[str]) -> None:
    script = run(name, "-h", url=f"amqp://u:{PASSWORD}@h/")

    assert script.stderr == ""
    for option in "--url", "--queue", "--exchange", "--type", "--routing-key", "--header", "--connect-timeout":
        assert option in script.stdout.decode()
    for default in defaults:
        assert re.search(rf"default[^:]*: {default}\b", script.stdout.decode())
    assert PASSWORD not in script.stdout.decode()


@pytest.fixture
def run_program(python: str, broker: Broker) -> RunProgram:
    def run_program(program: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "AMQP_URL": broker.url}
        command = [python, "-c", program, "--nope"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return run_program


def test_importing_a_script_does_nothing(run_program: RunProgram) -> None:
    done = run_program(
        "import logging, signal, threading\n"
        "before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)\n"
        "import producer, consumer\n"
        "assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))\n"
        "assert not logging.root.handlers\n"
        "assert threading.active_count() == 1\n"
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_main_takes_its_arguments_and_returns_the_exit_code(run_program: RunProgram, queue: str) -> None:
    done = run_program(
        "import producer, consumer\n"
        f"assert producer.main(['-q', '{queue}', 'one', 'two']) == 0\n"
        f"assert consumer.main(['-q', '{queue}', '--drain']) == 0\n"
        "assert producer.main(['-q', 'amq.x']) == 1\n"
        "assert consumer.main(['-q', 'amq.x']) == 1\n"
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout == "one\ntwo\n"
    assert len(done.stderr.splitlines()) == 3


def test_what_no_queue_would_receive_is_not_safe(run_program: RunProgram) -> None:
    done = run_program(
        "import sys, producer\n"
        "def batches(messages):\n"
        "    yield [b'one', b'two']\n"
        "    raise KeyboardInterrupt\n"
        "producer.batches = batches\n"
        "sys.exit(producer.main(['-e', 'amq.topic', '-r', 'nobody']))\n"
    )

    assert done.returncode == 130
    unroutable, last = done.stderr.splitlines()
    assert "error: 2 of 2 messages were unroutable" in unroutable
    assert last.endswith("error: interrupted; 0 messages are safe")


OTHER_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "a classic queue": ({}, "x-queue-type|'durable'|'type'|x-delivery-limit|x-dead-letter"),
    "a classic queue with a limit": ({"x-max-length": 10}, "x-"),
    "a quorum queue with another limit": ({"x-queue-type": "quorum", "x-delivery-limit": 3}, "x-d"),
    "a quorum queue with no arguments": ({"x-queue-type": "quorum"}, "x-d"),
}


@pytest.mark.parametrize(("arguments", "difference"), OTHER_SETTINGS.values(), ids=OTHER_SETTINGS)
def test_a_queue_with_other_settings_is_used_as_it_is(
    broker: Broker, run: Run, queue: str, arguments: dict[str, Any], difference: str
) -> None:
    with broker.connect() as connection:
        connection.channel().queue_declare(queue, durable=True, arguments=arguments)

    producer = run("producer", "-q", queue, "one", "two")
    consumer = run("consumer", "-q", queue, "--drain")

    warning = rf"warning: the queue is used as it is: .*inequivalent arg '.*({difference}).* for queue '{queue}' .*"
    assert re.fullmatch(rf"producer.py: {warning}\nproducer.py: 2 messages published\n", producer.stderr)
    assert re.fullmatch(rf"consumer.py: {warning}\n", consumer.stderr)
    assert consumer.bodies == [b"one", b"two"]
    assert broker.depth(queue) == 0
    with broker.connect() as connection:
        connection.channel().queue_declare(queue, durable=True, arguments=arguments)  # refused if it were changed


def test_a_dead_letter_queue_is_used_by_its_name(broker: Broker, run: Run, queue: str) -> None:
    dead = f"{queue}.dead"

    producer = run("producer", "-q", dead, "one", "two")
    run("producer", "-q", queue, "for another")
    consumer = run("consumer", "-q", dead, "--drain")

    assert (producer.stderr, consumer.stderr) == ("producer.py: 2 messages published\n", "")
    assert consumer.bodies == [b"one", b"two"]
    assert (broker.depth(dead), broker.depth(queue), broker.depth(f"{dead}.dead")) == (0, 1, -1)


def test_a_dead_letter_queue_is_used_by_its_name_if_the_other_has_other_settings(
    broker: Broker, run: Run, queue: str
) -> None:
    with broker.connect() as connection:
        connection.channel().queue_declare(queue, durable=True)

    run("producer", "-q", f"{queue}.dead", "one")

    assert run("consumer", "-q", f"{queue}.dead", "--drain").bodies == [b"one"]
