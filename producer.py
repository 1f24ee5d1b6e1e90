"""Publish messages to RabbitMQ, and return when the broker has taken responsibility for all of them.

    python producer.py 'Hello World!'       one message for each argument
    python producer.py - < access.log       one message for each line of standard input

Guaranteed: what is reported as published is stored in a queue; what no queue takes is reported. An outage is waited
for, and what was not confirmed before is sent again, with the same message id. Not guaranteed: that it comes once only.

In a program: `Producer(parse(["-q", "jobs"])).publish([b"one", b"two"])`. The other half of the pair is consumer.py.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import random
import signal
import sys
import time
import uuid
from typing import Any, Iterator, Sequence

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPChannelError, AMQPConnectionError, ChannelClosedByBroker

URL = "amqp://guest:guest@localhost:5672/%2F"
QUEUE = "hello"
CONNECT_TIMEOUT = 60  # seconds; math.inf for a service that must not give up
BATCH_SIZE = 2000  # lines that are sent before their confirmations are waited for; more take more memory
QUEUE_ARGUMENTS = {
    "x-queue-type": "quorum",
    "x-delivery-limit": 20,  # how often a message that `handle` fails on comes again before it moves to NAME.dead
    "x-delayed-retry-type": "failed",  # RabbitMQ 4.3 and later wait before it comes again
    "x-delayed-retry-min": 1000,  # ms, times how often it has failed
    "x-delayed-retry-max": 60000,  # ms
    "x-dead-letter-exchange": "",
    "x-dead-letter-strategy": "at-least-once",  # https://www.rabbitmq.com/docs/quorum-queues#dead-lettering
    "x-overflow": "reject-publish",  # is required by at-least-once
}
DEAD_QUEUE_ARGUMENTS = {"x-queue-type": "quorum", "x-delivery-limit": 2**31 - 1}  # RabbitMQ 4 drops after 20 by default

# From here to `common_options`, the text is the same in producer.py and consumer.py.
OUTAGES = (AMQPConnectionError, AMQPChannelError, AMQPConnectorException, OSError)
# What the broker, or TLS, says when another try is useless. NOT_FOUND without "no" can be a queue whose node is down.
FINAL = "ACCESS_REFUSED", "NOT_ALLOWED", "NOT_FOUND - no", "PRECONDITION_FAILED", "RESOURCE_LOCKED", "CERTIFICATE"
log = logging.getLogger(__name__)


def declare(connection: pika.BlockingConnection, options: argparse.Namespace) -> BlockingChannel:
    """Declare the exchange and the queue that the options name; return an open channel."""
    channel, exchange, queue = connection.channel(), options.exchange, options.queue
    if exchange:
        kind = options.type or "direct"  # ignored by a passive declaration, which asks whether the exchange exists
        channel.exchange_declare(exchange=exchange, exchange_type=kind, durable=True, passive=not options.type)
    if queue and not queue.endswith(".dead"):  # NAME.dead is declared together with NAME
        arguments = {**QUEUE_ARGUMENTS, "x-dead-letter-routing-key": f"{queue}.dead"}
        try:
            channel.queue_declare(queue=queue, durable=True, arguments=arguments)
            channel.queue_declare(queue=f"{queue}.dead", durable=True, arguments=DEAD_QUEUE_ARGUMENTS)
        except ChannelClosedByBroker as error:
            if error.reply_code not in (403, 406):  # no right to configure it; it has other settings
                raise
            log.warning("warning: the queue is used as it is: %s", error.reply_text)
            channel = connection.channel()
    return channel


def describe(error: BaseException, options: argparse.Namespace) -> str:
    text = str(error) or repr(error)  # some of pika's errors have no text
    if "ConnectionRefusedError" in text:
        text = "connection refused; start a broker with: docker compose up -d --wait"
    return f"{options.urls[0].host}:{options.urls[0].port}: {text}"


def retry_delay(error: BaseException, outage_began: float, options: argparse.Namespace) -> float:
    """Log the error, and return the seconds to the next try; raises the error if there is to be none."""
    lasted, text = time.monotonic() - outage_began, describe(error, options)
    if lasted >= options.connect_timeout or any(words in text for words in FINAL):
        raise error
    delay = random.uniform(0.5, 1) * min(0.5 + lasted, 5)  # random, so that clients do not all come at once
    log.warning("%s; next try in %.1f s", text, delay, exc_info=options.verbose)
    options.urls.append(options.urls.pop(0))  # each try is at the next URL
    return delay


def urls(text: str) -> list[pika.URLParameters]:
    """The connection parameters of each URL; errors do not repeat the URL, because of its password."""
    with contextlib.suppress(Exception):  # pika raises many types
        if text.startswith(("amqp://", "amqps://")):  # no split(","), because a URL can contain commas
            return [pika.URLParameters(url) for url in text.replace(",amqp", " amqp").split()]
    raise argparse.ArgumentTypeError("expected amqp://USER:PASSWORD@HOST:PORT/VHOST, special characters as %XX")


def common_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", dest="urls", type=urls, default=os.environ.get("AMQP_URL") or URL, help="URL[,URL]; or set AMQP_URL")
    add("-q", "--queue", help=f"default without -e: {QUEUE}")
    add("-e", "--exchange", help="must exist, unless -t is given")
    add("-t", "--type", choices=["direct", "fanout", "topic", "headers"], help="declare the exchange, of this type")
    add("-H", "--header", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    add("--connect-timeout", type=float, default=CONNECT_TIMEOUT, metavar="SECONDS", help="default: %(default)g")
    add("-v", "--verbose", action="store_true", help="more on stderr")
    return parser


class Producer:
    """Publishes over one connection, which it renews when it breaks. For use in one thread."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        headers = dict(text.split("=", 1) for text in options.header)
        self.properties = {"content_type": options.content_type, "headers": headers, "delivery_mode": 2}
        self.connection: pika.BlockingConnection | None = None

    def publish(self, bodies: Sequence[bytes], routing_key: str | None = None, **properties: Any) -> int:
        """Publish some thousand messages at most; return how many of them no queue took. The others are safe.

        The properties are for all, so give a message_id to one message only. Raises pika's error if the broker refuses,
        or is away for --connect-timeout.
        """
        exchange, key = self.options.exchange or "", self.options.routing_key if routing_key is None else routing_key
        properties = {**self.properties, "timestamp": int(time.time()), **properties}
        messages = [(pika.BasicProperties(**{"message_id": uuid.uuid4().hex, **properties}), body) for body in bodies]
        self.unconfirmed = dict(enumerate(messages))
        self.returned: set[str] = set()  # ids of messages that no queue took
        outage_began = float("inf")  # there is none
        while self.unconfirmed:
            try:
                connection = self.connection or self.open()
                send = self.channel.basic_publish
                for number, (props, body) in self.unconfirmed.items():  # no confirmation changes it before the wait
                    # Mandatory, because otherwise what no queue takes is dropped, and confirmed.
                    send(exchange=exchange, routing_key=key, body=body, properties=props, mandatory=True)
                    self.in_flight[next(self.delivery_tags)] = number
                while self.in_flight:
                    connection.process_data_events(time_limit=10)
                    if self.in_flight:
                        log.warning("waiting for confirmations: is the broker short of memory, disk, or cluster nodes?")
                        outage_began = float("inf")  # it is slow, but not away
                if self.unconfirmed:  # the broker rejected some, or closed the channel
                    raise self.close_reason or AMQPChannelError("messages were rejected: is the queue full?")
            except OUTAGES as error:
                self.close()
                outage_began = min(outage_began, time.monotonic())
                time.sleep(retry_delay(error, outage_began, self.options))
            except BaseException:
                self.connection = None  # not closed: close() would first send what is in the output buffer
                raise
        return len(self.returned)

    def open(self) -> pika.BlockingConnection:
        """Connect, and declare what is needed."""
        self.connection = pika.BlockingConnection(self.options.urls[0])
        # The channel inside the BlockingChannel: it has the same methods, but does not wait for each confirmation.
        self.channel = declare(self.connection, self.options)._impl
        self.channel.confirm_delivery(ack_nack_callback=self.on_confirm)
        self.channel.add_on_return_callback(lambda *message: self.returned.add(message[2].message_id))
        self.channel.add_on_close_callback(self.on_close)
        self.delivery_tags = itertools.count(1)
        self.in_flight: dict[int, int] = {}  # number of each message that is sent, by delivery tag
        self.close_reason: BaseException | None = None
        self.connection.process_data_events()  # or a refused declaration's event would end the first wait
        return self.connection

    def on_confirm(self, frame: Any) -> None:
        """The broker has taken, or rejected, the message with this delivery tag, or all up to it."""
        last = frame.method.delivery_tag
        tags = [tag for tag in self.in_flight if tag <= last] if frame.method.multiple else [last]
        for tag in tags:
            number = self.in_flight.pop(tag)
            if isinstance(frame.method, pika.spec.Basic.Ack):
                del self.unconfirmed[number]
        self.end_wait()

    def on_close(self, channel: Any, reason: BaseException) -> None:
        self.close_reason = reason
        self.in_flight.clear()
        self.end_wait()

    def end_wait(self) -> None:
        """If nothing is in flight, make process_data_events return. Confirmations alone do not, but a timer does."""
        if self.connection and not self.in_flight:
            self.connection.call_later(0, lambda: None)

    def close(self) -> None:
        with contextlib.suppress(*OUTAGES):  # it may be broken
            if self.connection:
                self.connection.close()
        self.connection = None


def read_lines() -> Iterator[list[bytes]]:
    """The lines of standard input; those that end in one read come together, up to BATCH_SIZE."""
    rest = bytearray()  # of a line that has not ended
    for data in iter(lambda: os.read(0, 2**20), b""):
        rest += data
        if b"\n" in data:
            lines = bytes(rest).split(b"\n")
            rest = bytearray(lines.pop())
            for start in range(0, len(lines), BATCH_SIZE):
                yield lines[start : start + BATCH_SIZE]
    if rest:
        yield [bytes(rest)]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common_options()
    parser.add_argument("-r", "--routing-key", default="", help="what the exchange routes by; default: empty")
    parser.add_argument("--content-type", default="text/plain", help="default: %(default)s")
    parser.add_argument("messages", nargs="*", metavar="MESSAGE", default=["Hello World!"], help="or - for stdin")
    options = parser.parse_args(argv)
    if not all("=" in text for text in options.header):
        parser.error("-H: expected KEY=VALUE")
    if "-" in options.messages and len(options.messages) > 1:
        parser.error("- does not go with other messages")
    if options.exchange and options.queue:
        parser.error("-q does not go with -e: its bindings decide on the queue")
    if not options.exchange and (options.type or options.routing_key):
        parser.error("-t and -r need -e")
    if not options.exchange:
        options.queue = options.routing_key = options.queue or QUEUE
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    producer = Producer(options)
    batches = read_lines() if options.messages == ["-"] else [[os.fsencode(message) for message in options.messages]]
    done = safe = 0
    try:
        for bodies in batches:
            safe += len(bodies) - producer.publish(bodies)
            done += len(bodies)
            if options.messages == ["-"] and os.isatty(2) and not os.isatty(0):
                print(f"{done} published", end="\r", file=sys.stderr, flush=True)
        producer.close()
    except KeyboardInterrupt:
        log.error("error: interrupted; %d messages are safe", safe)
        return 130
    except Exception as error:
        log.error("error: %s; %d messages are safe", describe(error, options), safe, exc_info=options.verbose)
        return 1
    if safe < done:
        log.error("error: %d of %d messages were unroutable: no queue is bound for them", done - safe, done)
        return 1
    log.info("%d message%s published", done, "s" * (done != 1))
    return 0


if __name__ == "__main__":
    logging.basicConfig(format=f"{os.path.basename(__file__)}: %(message)s", level=logging.INFO)
    logging.getLogger("pika").setLevel(logging.CRITICAL + 1)  # it has seven errors for one refused connection
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM does what Ctrl-C does
    sys.exit(main())
