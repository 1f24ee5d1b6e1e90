"""Messages to and from clients in other languages: Node's amqplib, and amqp-tools, which is librabbitmq's (C)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable

import pytest

from broker import Broker, eventually
from broker import run as run_command
from conftest import Run, Start

AMQPLIB = Path.home() / ".cache" / "amqplib-2.3.1"
PUBLISH = """
async ({queue, body, properties}) => {
    channel.sendToQueue(queue, Buffer.from(body, 'latin1'), properties)
    await channel.waitForConfirms()
}"""
GET = """
async ({queue}) => {
    const {properties, content} = await channel.get(queue, {noAck: true})
    console.log(JSON.stringify({...properties, body: content.toString('latin1')}))
}"""
# Of the consumer: what GET prints, under the same names.
HANDLE = """
import json
def handle(method, properties, body):
    print(json.dumps({
        "contentType": properties.content_type, "contentEncoding": properties.content_encoding,
        "headers": properties.headers, "messageId": properties.message_id, "timestamp": properties.timestamp,
        "deliveryMode": properties.delivery_mode, "body": body.decode("latin1"),
    }))
"""
BODY = "a line\rGrüße\0 \x00\xff\x80"  # in Latin-1, which is no UTF-8


def require(there: object, what: str, install: str) -> None:
    """Without it, the test is skipped, but fails where nobody would read that."""
    if not there:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{what} is missing, install it with: {install}")


@pytest.fixture
def node(broker: Broker) -> Callable[..., str]:
    """Run a function in Node, with amqplib's `channel`, and return what it prints."""
    require(shutil.which("node"), "Node.js", "apt-get install nodejs npm")
    require(AMQPLIB.exists(), "Node's amqplib", f"npm install --prefix {AMQPLIB} amqplib@2.3.1")

    def node(function: str, **argument: Any) -> str:
        program = f"""
            (async () => {{
                const connection = await require('amqplib').connect(process.argv[1])
                const channel = await connection.createConfirmChannel()
                await ({function})(JSON.parse(process.argv[2]))
                await connection.close()
            }})()"""
        command = ["node", "-e", program, broker.url, json.dumps(argument)]
        return run_command(command, env={**os.environ, "NODE_PATH": str(AMQPLIB / "node_modules")})

    return node


@pytest.fixture
def amqp_tool(broker: Broker) -> Callable[..., bytes]:
    """Run one of amqp-tools with standard input, and return its output."""

    def amqp_tool(name: str, *arguments: str, input: bytes = b"") -> bytes:
        require(shutil.which(name), name, "apt-get install amqp-tools")
        command = [name, "--url", broker.url, *arguments]
        return subprocess.run(command, check=True, input=input, stdout=subprocess.PIPE, timeout=60).stdout

    return amqp_tool


@pytest.fixture
def declared(run: Run, queue: str) -> str:
    run("consumer", "-q", queue, "--drain")
    return queue


def test_a_message_of_node_comes_as_it_was_sent(run: Run, declared: str, node: Callable[..., str]) -> None:
    headers = {"text": "ä", "number": 3, "yes": True, "nothing": None, "list": [1, "a"], "table": {"x": {"y": "z"}}}
    properties = {
        "contentType": "application/json", "contentEncoding": "gzip", "headers": headers, "messageId": "ä-1",
        "timestamp": 1_700_000_000, "deliveryMode": 2,
    }  # fmt: skip

    node(PUBLISH, queue=declared, body=BODY, properties=properties)

    [line] = run("consumer", "-q", declared, "--drain", handle=HANDLE).bodies
    assert json.loads(line) == {**properties, "body": BODY}


def test_a_message_comes_to_node_as_it_was_sent(run: Run, queue: str, node: Callable[..., str]) -> None:
    options = ["-H", "host=wéb=1", "-H", "empty=", "--content-type", "application/json"]

    run("producer", "-q", queue, *options, "-", input=BODY.encode("latin1"))

    message = json.loads(node(GET, queue=queue))
    assert message["body"] == BODY
    assert message["contentType"] == "application/json"
    assert message["headers"].items() >= {"host": "wéb=1", "empty": ""}.items()
    assert message["deliveryMode"] == 2
    assert message["messageId"]
    assert message["timestamp"]


def test_a_message_of_c_comes_as_it_was_sent(run: Run, declared: str, amqp_tool: Callable[..., bytes]) -> None:
    options = ["-p", "-C", "text/csv", "-E", "gzip", "-H", "host: web1", "-H", "äh: ö"]

    amqp_tool("amqp-publish", "-r", declared, *options, input=BODY.encode("latin1"))

    [line] = run("consumer", "-q", declared, "--drain", handle=HANDLE).bodies
    assert json.loads(line) == {
        "contentType": "text/csv", "contentEncoding": "gzip", "headers": {"host": "web1", "äh": "ö"},
        "messageId": None, "timestamp": None, "deliveryMode": 2, "body": BODY,
    }  # fmt: skip


def test_messages_come_to_c_as_they_were_sent(run: Run, queue: str, amqp_tool: Callable[..., bytes]) -> None:
    run("producer", "-q", queue, "-H", "a=1", "-", input=BODY.encode("latin1") + b"\nsecond")

    assert amqp_tool("amqp-get", "-q", queue) == BODY.encode("latin1")
    assert amqp_tool("amqp-consume", "-q", queue, "-c", "1", "cat") == b"second"


def test_a_message_without_properties_or_text_in_them_is_handled(
    run: Run, declared: str, amqp_tool: Callable[..., bytes]
) -> None:
    no_text = os.fsdecode(b"\xff\xfe")

    amqp_tool("amqp-publish", "-r", declared, "-C", no_text, "-H", f"{no_text}: {no_text}", input=b"one")
    amqp_tool("amqp-publish", "-r", declared, input=b"two")

    consumer = run("consumer", "-q", declared, "--drain", "-v")
    assert consumer.bodies == [b"one", b"two"]
    assert len(consumer.stderr.splitlines()) == 2


def test_a_message_that_cannot_be_decoded_moves_to_dead(
    start: Start, run: Run, queue: str, node: Callable[..., str], broker: Broker
) -> None:
    limit = 'QUEUE_ARGUMENTS.update({"x-delivery-limit": 3, "x-delayed-retry-min": 200})'
    handle = f"{limit}\ndef handle(method, properties, body): print(body.decode(), flush=True)"
    run("consumer", "-q", queue, "--drain", handle=handle)  # declares the queue
    milliseconds = {"sent": {"!": "timestamp", "value": 1_764_078_683_000}}
    for body, headers in ("one", {}), ("bad", milliseconds), ("two", {}):
        node(PUBLISH, queue=queue, body=body, properties={"headers": headers})

    # What is prefetched together with it shares its fate, because it breaks the connection.
    consumer = start("consumer", "-q", queue, "--prefetch", "1", handle=handle)

    eventually(lambda: broker.depth(f"{queue}.dead") == 1)
    eventually(lambda: consumer.bodies == [b"one", b"two"])
    assert consumer.stop() == 0
    assert (broker.depth(queue), broker.depth(f"{queue}.dead")) == (0, 1)
    assert "out of range" in consumer.stderr
