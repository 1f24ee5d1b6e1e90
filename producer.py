"""Publish messages to RabbitMQ, and return when the broker has confirmed all of them.

    python producer.py 'Hello World!'       one message for each argument
    python producer.py - < access.log       one message for each line of standard input

Guaranteed: what is reported as published is stored in a queue; what no queue takes is reported as unroutable. After an
outage, what was not confirmed is sent again. Not guaranteed: that a message is stored once only, nor the order.
In a program: `Producer(parse(["-q", "jobs"])).publish([b"one", b"two"])`. The other half of the pair is consumer.py.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import os
import random
import re
import signal
import sys
import time
from typing import Any, Iterator, Sequence

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPChannelError, AMQPConnectionError, AMQPError, ChannelClosedByBroker

URL = "amqp://guest:guest@localhost:5672/%2F"
QUEUE = "hello"
TIMEOUT = 60  # seconds without a confirmation after which to give up; float("inf"): never
BATCH_SIZE = 2000  # lines to send before waiting for their confirmations; a larger batch takes more memory
QUEUE_ARGUMENTS = {
    "x-queue-type": "quorum",
    "x-delivery-limit": 20,  # redeliveries of a message that fails, before it moves to NAME.dead
    "x-delayed-retry-type": "failed",  # RabbitMQ 4.3 and later wait before they deliver it again
    "x-delayed-retry-min": 10_000,  # ms, multiplied by the number of failures
    "x-delayed-retry-max": 300_000,  # ms
    "x-dead-letter-exchange": "",
    "x-dead-letter-strategy": "at-least-once",  # https://www.rabbitmq.com/docs/quorum-queues#dead-lettering
    "x-overflow": "reject-publish",  # required by at-least-once
}
DEAD_QUEUE_ARGUMENTS = {"x-queue-type": "quorum", "x-delivery-limit": 2**31 - 1}  # RabbitMQ 4 drops after 20 by default

# Both files share QUEUE_ARGUMENTS, DEAD_QUEUE_ARGUMENTS, and everything from here down to the class.
log = logging.getLogger(__name__)
ERRORS = (AMQPError, AMQPConnectorException, OSError)  # whatever the broker or the network can cause
OUTAGES = (AMQPConnectionError, AMQPChannelError, AMQPConnectorException, OSError)  # reconnect after one of these
# But not if the text matches this. A connection limit and "NOT_FOUND - home node" are temporary, and do not match.
FINAL = "ACCESS_REFUSED|NOT_ALLOWED(?!.*limit)|NOT_FOUND - no|PRECONDITION_FAILED|RESOURCE_LOCKED|CERTIFICATE_VERIFY"


def connect(last_progress: float, options: argparse.Namespace) -> pika.BlockingConnection:
    """Connect to the first URL. Each of its addresses takes half of --timeout at most, to leave time for the next."""
    parameters, left = copy.copy(options.urls[0]), last_progress + options.timeout - time.monotonic()
    limit = max(1, min(options.timeout / 2, 30))  # seconds; 30, because --timeout may be infinite
    parameters.stack_timeout = min(parameters.stack_timeout, limit, max(1, left))
    # pika's own time limits do not cover a broker that has stopped reading. This one, of the Linux kernel, does.
    parameters.tcp_options = {"TCP_USER_TIMEOUT": int(1000 * limit), **(parameters.tcp_options or {})}
    name = f"{os.path.basename(sys.argv[0])} on {os.uname().nodename}, process {os.getpid()}"
    parameters.client_properties = {"connection_name": name, **(parameters.client_properties or {})}
    return pika.BlockingConnection(parameters)


def declare(connection: pika.BlockingConnection, options: argparse.Namespace) -> BlockingChannel:
    """Declare the exchange and the queue that the options name; return an open channel."""
    channel, exchange, kind, queue = connection.channel(), options.exchange, options.type, options.queue
    if exchange:  # without --type, only check that it exists: a passive declaration ignores the type
        channel.exchange_declare(exchange=exchange, exchange_type=kind or "direct", durable=True, passive=not kind)
    if queue and not queue.endswith(".dead"):  # NAME.dead is declared together with NAME
        arguments = {**QUEUE_ARGUMENTS, "x-dead-letter-routing-key": f"{queue}.dead"}
        try:
            channel.queue_declare(queue=queue, durable=True, arguments=arguments)
            channel.queue_declare(queue=f"{queue}.dead", durable=True, arguments=DEAD_QUEUE_ARGUMENTS)
        except ChannelClosedByBroker as error:
            if error.reply_code not in (403, 406):  # 403: no right to configure it; 406: it has other arguments
                raise
            log.warning("warning: the queue is used as it is: %s", error.reply_text)
            channel = connection.channel()
    return channel


def describe(error: BaseException, options: argparse.Namespace) -> str:
    text = str(error) or repr(error)  # some of pika's errors have no text
    if "ConnectionRefusedError" in text:
        text = "connection refused; start a broker with: docker compose up -d --wait"
    return f"{options.urls[0].host}:{options.urls[0].port}: {text}" if isinstance(error, ERRORS) else text


def raise_or_delay(error: Exception, last_progress: float, options: argparse.Namespace) -> float:
    """Raise the error if it is final, or --timeout is over; else log it, and return the seconds until the next try."""
    text, lasted = describe(error, options), time.monotonic() - last_progress
    if re.search(FINAL, text) or lasted >= options.timeout:
        raise error
    delay: float = min(random.uniform(0.5, 1) * min(0.2 + lasted, 5), options.timeout - lasted)
    log.warning("%s; next try in %.1f s", text, delay, exc_info=options.verbose)
    options.urls = options.urls[1:] + options.urls[:1]  # the next try is at the next URL
    return delay


def parse_urls(text: str) -> list[pika.URLParameters]:
    """The connection parameters of each URL; errors do not repeat the URL, because of its password."""
    with contextlib.suppress(Exception):  # pika raises many types
        if text.startswith(("amqp://", "amqps://")):
            return [pika.URLParameters(url) for url in re.split(r",\s*(?=amqps?://)", text)]
    raise argparse.ArgumentTypeError("expected amqp://USER:PASSWORD@HOST:PORT/VHOST, special characters as %XX")


def parse_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options of the parser, and those that both scripts have."""
    add = parser.add_argument
    add("--url", dest="urls", type=parse_urls, default=os.environ.get("AMQP_URL") or URL, help="URL[,URL]; or AMQP_URL")
    add("-q", "--queue", metavar="NAME", help=f"default without -e: {QUEUE}")
    add("-e", "--exchange", metavar="NAME", help="must exist, unless -t is given")
    add("-t", "--type", choices=["direct", "fanout", "topic", "headers"], help="declare the exchange with this type")
    add("-H", "--header", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    add("--timeout", type=float, default=TIMEOUT, metavar="SECONDS", help="without progress; default: %(default)g")
    add("-v", "--verbose", action="store_true", help="more on stderr")
    options = parser.parse_args(argv)
    if "" in (options.queue, options.exchange):
        parser.error("-q and -e: expected a name")
    if len(os.fsencode(re.sub(r"\.dead$", "", options.queue or ""))) > 250:
        parser.error("-q: the name, or NAME.dead, is longer than AMQP's 255 bytes")
    if not all("=" in text for text in options.header):
        parser.error("-H: expected KEY=VALUE")
    return options


class Producer:
    """Publishes over one connection, which it renews when it breaks. Each thread and each process needs its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        headers = dict(text.split("=", 1) for text in options.header)
        self.properties = {"content_type": options.content_type, "headers": headers, "delivery_mode": 2}
        self.connection: pika.BlockingConnection | None = None

    def publish(self, bodies: Sequence[bytes], routing_key: str | None = None, **properties: Any) -> int:
        """Publish the messages, a few thousand at most; return how many were unroutable. The others are safe.

        The routing key and the properties (those of pika.BasicProperties) apply to all of them. Raises one of ERRORS if
        the error is FINAL, or nothing is confirmed for --timeout; some of the messages may be stored all the same.
        """
        if isinstance(bodies, (bytes, str)):
            raise TypeError("expected a list of messages, not one")
        if "message_id" in properties and len(bodies) > 1:
            raise ValueError("a message_id is for one message only")
        exchange, key = self.options.exchange or "", (self.options.routing_key if routing_key is None else routing_key)
        properties = {**self.properties, "timestamp": int(time.time()), **properties}
        self.unsent: list[dict[str, Any]] = []  # messages, as the arguments of basic_publish
        self.unconfirmed: dict[int, dict[str, Any]] = {}  # messages that were sent, by delivery tag
        self.unroutable: set[str | None] = set()  # message ids
        for body in bodies:
            props = pika.BasicProperties(**{"message_id": os.urandom(16).hex(), **properties})
            self.unsent.append({"exchange": exchange, "routing_key": key, "body": body, "properties": props})
        self.last_progress = time.monotonic()
        while True:
            try:
                connection = self.connection or self.open()
                self.send()
                self.wait(connection)
                return len(self.unroutable)
            except OUTAGES as error:
                self.close()
                delay = raise_or_delay(error, self.last_progress, self.options)
                time.sleep(delay)
            except BaseException:
                self.connection = None  # not closed, because close() would wait for a broker that may be frozen
                raise

    def open(self) -> pika.BlockingConnection:
        """Connect, and declare what is needed."""
        self.connection = connection = connect(self.last_progress, self.options)
        # BlockingChannel.basic_publish waits for each confirmation; that of the private channel inside it does not.
        self.channel = channel = declare(connection, self.options)._impl
        channel.confirm_delivery(ack_nack_callback=self.on_confirm)
        channel.add_on_return_callback(lambda _, method, properties, body: self.unroutable.add(properties.message_id))
        self.errors: list[Exception] = []
        channel.add_on_close_callback(lambda _, reason: self.errors.append(reason))
        self.delivery_tag = 0  # of the last message that was sent on this channel
        return connection

    def send(self) -> None:
        """Send all that is not confirmed (after an outage: again, on a new channel), numbering them as the broker does."""
        messages = [*self.unconfirmed.values(), *self.unsent]
        self.unsent = []
        self.unconfirmed = dict(enumerate(messages, start=self.delivery_tag + 1))  # now, as sending may fail halfway
        self.delivery_tag += len(messages)
        for message in messages:
            self.unroutable.discard(message["properties"].message_id)  # it may find a queue this time
            # Mandatory, because otherwise what no queue takes is dropped, and confirmed.
            self.channel.basic_publish(**message, mandatory=True)

    def wait(self, connection: pika.BlockingConnection) -> None:
        """Return when all is confirmed. Raises one of OUTAGES if the rest has to be sent again, AMQPError after --timeout."""
        began = time.monotonic()
        while self.unconfirmed and self.channel.is_open:
            # A try that begins when --timeout is almost over still has one second.
            left = max(self.last_progress + self.options.timeout, began + 1) - time.monotonic()
            if left <= 0:  # a plain AMQPError is not one of OUTAGES, so `publish` gives up
                raise AMQPError(f"nothing was confirmed for {self.options.timeout:g} s")
            if time.monotonic() - max(self.last_progress, began) >= 5:
                log.warning("waiting for confirmations: is the broker short of memory, disk, or cluster nodes?")
            connection.process_data_events(time_limit=min(left, 5))
        if self.errors:  # the channel was closed; or all is answered, and `send` has to repeat what was rejected
            raise self.errors[0]

    def on_confirm(self, frame: Any) -> None:
        """Take note of an ack or a nack, of one message or of all up to its tag. After a nack, `wait` raises, to resend."""
        last = frame.method.delivery_tag
        tags = [tag for tag in self.unconfirmed if tag <= last] if frame.method.multiple else [last]
        messages = [self.unconfirmed.pop(tag) for tag in tags]
        if isinstance(frame.method, pika.spec.Basic.Ack):
            self.last_progress = time.monotonic()
        else:
            self.unsent += messages
            self.errors.append(AMQPChannelError("messages were rejected: is the queue full?"))
        if self.connection and not self.unconfirmed:
            self.connection.call_later(0, lambda: None)  # ends process_data_events, which a confirmation does not

    def close(self) -> None:
        """Close the connection. The next `publish` opens another."""
        connection, self.connection = self.connection, None
        with contextlib.suppress(*OUTAGES):  # it may be broken
            if connection:
                connection.close()


def read_lines() -> Iterator[list[bytes]]:
    """Yield the lines of standard input as they come: those completed by one read, at most BATCH_SIZE at a time."""
    rest = bytearray()  # of a line that has not ended
    try:
        for data in iter(lambda: os.read(0, 2**20), b""):
            rest += data
            if b"\n" in data:
                lines = bytes(rest).split(b"\n")
                rest = bytearray(lines.pop())
                for start in range(0, len(lines), BATCH_SIZE):
                    yield lines[start : start + BATCH_SIZE]
    except OSError as error:
        raise RuntimeError(f"standard input: {error.strerror}") from error
    if rest:
        yield [bytes(rest)]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-r", "--routing-key", default="", metavar="KEY", help="what the exchange routes by")
    parser.add_argument("--content-type", default="text/plain", metavar="TYPE", help="default: %(default)s")
    parser.add_argument("messages", nargs="*", metavar="MESSAGE", help="- is stdin; without -q and -e: Hello World!")
    options = parse_options(parser, argv)
    if "-" in options.messages and len(options.messages) > 1:
        parser.error("- does not go with other messages")
    if options.exchange and options.queue:
        parser.error("-q does not go with -e: the exchange's bindings select the queues")
    if not options.exchange and (options.type or options.routing_key):
        parser.error("-t and -r need -e")
    if not options.exchange and not options.queue and not options.messages:
        options.messages = ["Hello World!"]
    if not options.exchange:
        options.queue = options.routing_key = options.queue or QUEUE
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if not options.messages:
        log.error("error: nothing to publish: expected messages, or - for standard input")
        return 2
    producer, published, unroutable, stdin = Producer(options), 0, 0, options.messages == ["-"]
    try:
        for bodies in read_lines() if stdin else [[os.fsencode(text) for text in options.messages]]:
            unroutable += producer.publish(bodies)
            published += len(bodies)
            if stdin and os.isatty(2) and not os.isatty(0):
                print(f"{published - unroutable} published", end="\r", file=sys.stderr, flush=True)
        producer.close()
    except (KeyboardInterrupt, Exception) as error:
        code, reason = (130, "interrupted") if isinstance(error, KeyboardInterrupt) else (1, describe(error, options))
        others = f", {unroutable} were unroutable" if unroutable else ""
        log.error("error: %s; %d messages are safe%s", reason, published - unroutable, others, exc_info=options.verbose)
        return code
    if unroutable:
        log.error("error: %d of %d messages were unroutable: no queue is bound for them", unroutable, published)
        return 1
    log.info("%d message%s published", published, "s" * (published != 1))
    return 0


if __name__ == "__main__":
    logging.basicConfig(format=f"{os.path.basename(__file__)}: %(message)s", level=logging.INFO)
    logging.getLogger("pika").setLevel(logging.CRITICAL + 1)  # it logs seven errors for one refused connection
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM does what Ctrl-C does
    sys.exit(main())
