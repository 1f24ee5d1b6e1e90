"""Every mistake and every refusal is one line on stderr, at once, and never with the password."""

from __future__ import annotations

import re
import subprocess

import pytest

from broker import Broker
from conftest import SCRIPTS, Run, Start

PASSWORD = "s3cr3t"
USAGE = {
    "a number that is none": ("--timeout x", "--timeout: invalid float value: 'x'"),
    "an empty queue": ("-q=", "-q and -e: expected a name"),
    "an empty exchange": ("-e=", "-q and -e: expected a name"),
    "a queue whose NAME.dead is too long": (f"-q {251 * 'x'}", "longer than AMQP's 255 bytes"),
    "a header without =": ("-e e -H x", "-H: expected KEY=VALUE"),
    "an unknown type": ("-e e -t other", "-t/--type: invalid choice: 'other'"),
    "a type without exchange": ("-t direct", "need -e"),
    "an unknown option": ("--nope", "unrecognized arguments: --nope"),
    "another scheme": (f"--url http://u:{PASSWORD}@h/", "amqp://USER:PASSWORD@HOST:PORT/VHOST"),
    "a user without password": (f"--url amqp://{PASSWORD}@h/", "special characters as %XX"),
    "a port that is none": (f"--url amqp://u:p@h/,amqp://u:{PASSWORD}@h:x/", "special characters as %XX"),
}
USAGE_OF_ONE = {
    "- with other messages": ("producer", "- x", "- does not go with other messages"),
    "a queue and an exchange": ("producer", "-q q -e e", "-q does not go with -e"),
    "count 0": ("consumer", "-c 0", "--count: at least 1"),
    "prefetch 0": ("consumer", "--prefetch 0", "--prefetch: 1 to 65535"),
    "a message": ("consumer", "x", "unrecognized arguments: x"),
}
CASES = [(name, *USAGE[case]) for case in USAGE for name in SCRIPTS] + list(USAGE_OF_ONE.values())
REFUSED = {
    "wrong password": (f"amqp://guest:{PASSWORD}@", "/%2F", "", "ACCESS_REFUSED - Login was refused"),
    "no such vhost": ("amqp://guest:guest@", "/nope", "", "NOT_ALLOWED - vhost nope not found"),
    "no such exchange": ("amqp://guest:guest@", "/%2F", "-e nope", "NOT_FOUND - no exchange 'nope' in vhost '/'"),
    "another type": ("amqp://guest:guest@", "/%2F", "-e amq.topic -t direct", "inequivalent arg 'type' for exchange"),
    "a reserved name": ("amqp://guest:guest@", "/%2F", "-e amq.x -t direct", "contains reserved prefix 'amq.*'"),
}


@pytest.mark.parametrize(
    ("name", "arguments", "says"), CASES, ids=lambda value: str(value).replace(PASSWORD, "...")[:40]
)
def test_bad_usage_is_explained(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], name: str, arguments: str, says: str
) -> None:
    script = request.getfixturevalue(name)

    with pytest.raises(SystemExit) as end:
        script.main(arguments.split())

    assert end.value.code == 2
    usage, *_, line = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ")
    assert says in line
    assert PASSWORD not in line


@pytest.mark.parametrize("option", ["-q", "-e"])
def test_a_forgotten_dash_does_not_publish_hello_world(run: Run, option: str) -> None:
    script = run("producer", option, "jobs", input=b"data", code=2)

    assert script.messages == ["error: nothing to publish: expected messages, or - for standard input"]


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(("login", "vhost", "arguments", "says"), REFUSED.values(), ids=REFUSED)
def test_what_the_broker_refuses_ends_at_once_with_its_words(
    start: Start, broker: Broker, name: str, login: str, vhost: str, arguments: str, says: str
) -> None:
    address = broker.url.split("@")[1].split("/")[0]

    message = ["one"] if name == "producer" else []

    script = start(name, *arguments.split(), *message, url=f"{login}{address}{vhost}", stdin=subprocess.DEVNULL)

    assert script.end() == 1
    (line,) = script.messages
    assert re.match(rf"error: {address}: .*{re.escape(says)}", line)
    assert PASSWORD not in line
