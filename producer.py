"""Publish messages to RabbitMQ, and end when the broker has taken responsibility for all of them.

    python producer.py 'Hello World!'       one message for each argument
    python producer.py - < access.log       one message for each line of standard input

Guaranteed: what is reported as published is safe on disk, in a quorum queue or wherever the exchange
routed it. What no queue would receive is reported. An outage is waited for, and what was not confirmed
before it is sent again, under the same message id.
Not guaranteed: that a message comes only once. After an outage some may come twice.

To publish from a program of yours, use `Producer`. The other half of the pair is consumer.py.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import queue
import random
import re
import signal
import sys
import threading
import time
import uuid
from typing import Any, Callable, Iterable, Iterator, NoReturn, Sequence, Tuple

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPChannelError, AMQPConnectionError, ChannelClosedByBroker

URL = "amqp://guest:guest@localhost:5672/%2F"
QUEUE = "hello"
CONNECT_TIMEOUT = 60  # seconds; a service that must not give up wants math.inf, one that must not wait 2
READ_SIZE = 65536  # bytes of standard input; what one read gives is one batch, more is faster and takes more memory
QUEUE_ARGUMENTS = {
    "x-queue-type": "quorum",
    "x-delivery-limit": 20,  # a message that fails is delivered again as many times, then moved to NAME.dead;
    "x-delayed-retry-type": "failed",  # RabbitMQ 4.3 and later wait before each time,
    "x-delayed-retry-min": 1000,  # ms for each failure so far,
    "x-delayed-retry-max": 60000,  # ms at most
    "x-dead-letter-exchange": "",
    "x-dead-letter-strategy": "at-least-once",  # loses nothing on the way, and needs the next line
    "x-overflow": "reject-publish",  # https://www.rabbitmq.com/docs/quorum-queues#dead-lettering
}

# What follows, down to `set_up`, is the same in producer.py and consumer.py.
CONNECTION_ERRORS = (AMQPConnectionError, AMQPChannelError, AMQPConnectorException, OSError)
FINAL = {  # errors that would be the same the next time, and what to do about them; the first that fits counts
    "FAILED - delivery acknowledgement": "",  # passes: a handler took longer than the broker waits
    "FAILED - consumer ack timed out": "",  # the same, later than RabbitMQ 3.10
    "ACCESS_REFUSED": "check user, password and permissions; names that start with amq. are reserved",
    "NOT_ALLOWED": "check the virtual host in the URL, and that the user may use it",
    "NOT_FOUND": "-t TYPE declares an exchange",
    "inequivalent arg": "without -t, the exchange is used as it is",
    "PRECONDITION_FAILED": "the message, or the settings of what has this name, do not fit",
    "RESOURCE_LOCKED": "it belongs to another connection",
    "CERTIFICATE_VERIFY_FAILED": "SSL_CERT_FILE=FILE adds a private CA",
}
log = logging.getLogger(__name__)


class Stop(Exception):
    """Ends the program; the text, if there is one, says what was not done and why."""


def connect(options: argparse.Namespace) -> pika.BlockingConnection:
    for broker in options.url:
        broker.stack_timeout = min(max(options.connect_timeout, 1), broker.stack_timeout)
    return pika.BlockingConnection(options.url)


def declare_queue(connection: pika.BlockingConnection, queue: str) -> BlockingChannel:
    """The queue NAME and NAME.dead exist; what existed with other settings is used as it is. Returns an open channel."""
    name = queue[: -len(".dead")] if queue.endswith(".dead") else queue
    channel, dead = connection.channel(), f"{name}.dead"
    # NAME.dead keeps what it gets, where RabbitMQ 4 would otherwise drop it after 20 deliveries.
    for declared, limit in (name, {}), (dead, {"x-delivery-limit": 2**31 - 1}):
        arguments = {**QUEUE_ARGUMENTS, "x-dead-letter-routing-key": dead, **limit}
        try:
            channel.queue_declare(declared, durable=True, arguments=arguments)
        except ChannelClosedByBroker as error:
            if error.reply_code != 406:
                raise
            log.warning("warning: queue %s is used as it is: %s", declared, error.reply_text)
            return connection.channel()
    return channel


def declare_exchange(channel: BlockingChannel, options: argparse.Namespace) -> None:
    """The exchange exists; without -t it did before."""
    exchange_type = options.type or "direct"  # which a passive declaration ignores
    channel.exchange_declare(options.exchange, exchange_type, passive=not options.type, durable=True)


def backoff(timeout: float) -> Iterator[float]:
    """Seconds to wait before each try, growing to 5, with jitter; no more once `timeout` seconds have passed."""
    deadline, longest = time.monotonic() + timeout, 0.2
    while time.monotonic() < deadline:
        yield min(longest * random.uniform(0.5, 1), deadline - time.monotonic())
        longest = min(2 * longest, 5)


def pause(error: BaseException, delays: Iterator[float], options: argparse.Namespace) -> None:
    """Log the error and wait before the next try; raise Stop if there is none left, or it would be useless."""
    cause = getattr(error.args[0], "exception", error) if error.args else error  # what the socket said
    text = getattr(cause, "reply_text", "") or str(cause) or repr(cause)
    hint = next((hint for word, hint in FINAL.items() if word in text), "")
    delay = None if hint else next(delays, None)
    if isinstance(cause, ConnectionRefusedError):
        hint = "start a broker with: docker compose up -d --wait"
    text = ",".join(f"{broker.host}:{broker.port}" for broker in options.url) + f": {text}" + (hint and f"; {hint}")
    log.debug("", exc_info=error)
    if delay is None:
        raise Stop(text) from error
    log.warning("%s; next try in %.1f s", text, delay)
    time.sleep(delay)


def broker_urls(text: str) -> list[pika.URLParameters]:
    """The connection parameters of each URL. Errors do not repeat the URL, because of the password in it."""
    urls = re.split(",(?=amqps?://)", text)
    form = r"amqps?://([^/?#@:]*:[^/?#@]*@)?(\[[^]/?#@]*\]|[^/?#@:[]*)(:\d+)?(/[^/?#@]{0,255})?(\?[^#@]*)?"
    if not all(re.fullmatch(form, url) for url in urls):
        form = "expected amqp://USER:PASSWORD@HOST:PORT/VHOST, with special characters as %XX (the vhost / is %2F)"
        raise argparse.ArgumentTypeError(form)
    try:
        text.encode()
        brokers = [pika.URLParameters(url) for url in urls]
        for broker in brokers:
            broker.host.encode("idna")
    except Exception as error:  # of many kinds, depending on the option
        raise argparse.ArgumentTypeError(str(error)) from None
    return brokers


def short_string(text: str) -> str:
    if len(text.encode()) > 250:  # AMQP allows 255; `.dead` has to fit
        raise argparse.ArgumentTypeError("longer than 250 bytes")
    return text


def header(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise argparse.ArgumentTypeError("expected KEY=VALUE")
    value.encode()  # raises ValueError for what is not text
    return short_string(key), value


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(re.sub("://.*@(?!HOST)", "://...@", message))  # a URL may be given where none belongs


def common_options() -> Parser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    url = os.environ.get("AMQP_URL") or URL
    add("--url", type=broker_urls, default=url, help="URL[,URL...], tried in order; else AMQP_URL, else localhost")
    add("-q", "--queue", type=short_string, help=f"default: {QUEUE}")
    add("-e", "--exchange", type=short_string, help="has to exist, unless -t is given")
    add("-t", "--type", choices=["direct", "fanout", "topic", "headers"], help="declare the exchange, of this type")
    add("-H", "--header", type=header, action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    wait = "how long an unreachable broker is tried for; default: %(default)g"
    add("--connect-timeout", type=float, default=CONNECT_TIMEOUT, metavar="SECONDS", help=wait)
    add("-v", "--verbose", action="store_true", help="more on stderr")
    return parser


def set_up(options: argparse.Namespace) -> None:
    """One line on stderr for each event; SIGTERM means what Ctrl-C means."""
    level = logging.DEBUG if options.verbose else logging.INFO
    logging.basicConfig(format=f"{os.path.basename(__file__)}: %(message)s", level=level)
    logging.getLogger("pika").setLevel(logging.CRITICAL + 1)  # it has seven errors for one refused connection
    signal.signal(signal.SIGTERM, signal.default_int_handler)


Message = Tuple[str, pika.BasicProperties, bytes]  # routing key, properties, body


class Producer:
    """Publishes over one connection, which it renews when it breaks. Each thread needs a Producer of its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.connection: pika.SelectConnection | None = None
        run = uuid.uuid4()
        self.message_ids = (f"{run}-{number}" for number in itertools.count(1))
        self.safe = 0  # messages, from the first on, that need not be sent again
        self.unroutable = 0  # those of them that no queue would receive
        self.left: dict[int, Message] = {}  # what has to be published and confirmed, by its number

    def message(self, body: bytes, routing_key: str | None = None, **properties: Any) -> Message:
        """A message to publish. It keeps its `message_id` when it is sent again."""
        options = self.options
        defaults: dict[str, Any] = {
            "content_type": options.content_type,
            "headers": options.header,
            "delivery_mode": 2,  # persistent
            "message_id": next(self.message_ids),
            "timestamp": int(time.time()),
        }
        key = options.routing_key if routing_key is None else routing_key
        return key, pika.BasicProperties(**{**defaults, **properties}), body

    def publish(self, messages: Iterable[Message]) -> int:
        """Return when the broker has taken responsibility for all messages but those, whose number is returned,
        which no queue would receive. Without messages, keep the connection alive.

        Raises Stop if the broker refuses, or is away for longer than `connect_timeout`; `safe` tells how far it got.
        """
        self.left = dict(enumerate(messages, self.safe + 1))
        self.returned: set[str] = set()  # message ids
        end, size, delays = self.safe + len(self.left), len(self.left), backoff(self.options.connect_timeout)
        while True:
            left, failure = len(self.left), None
            try:
                failure = self.send(size)
            except CONNECTION_ERRORS as error:
                self.close()
                failure = error
            except Exception:
                self.close()  # what waits to be sent would go out with the next messages
                raise
            self.safe = next(iter(self.left), end + 1) - 1
            if len(self.left) < left:
                delays = backoff(self.options.connect_timeout)
            if not failure and not self.left:
                self.unroutable += len(self.returned)
                return len(self.returned)
            if not failure:
                size *= 2
            elif getattr(failure, "reply_code", 0) == 406 and size > 1:
                size //= 2  # one message is too large: let those before it through
            else:
                pause(failure, delays, self.options)

    def send(self, size: int) -> Exception | None:
        """Publish as many of the messages that are left, and wait for the confirmations; returns an error for nacks."""
        if not self.connection:
            self.open()
        self.wait(lambda: True)  # for heartbeats, and what else has come in
        batch = list(itertools.islice(self.left.items(), size))
        for number, (routing_key, properties, body) in batch:
            self.unconfirmed[next(self.delivery_tags)] = number
            # Mandatory, because otherwise what cannot be routed is dropped, and confirmed.
            self.channel.basic_publish(self.options.exchange or "", routing_key, body, properties, mandatory=True)
        hint = "no confirmation for 10 s: is the broker, and are most of the nodes that have the queue, well?"
        overdue = self.ioloop.call_later(10, lambda: log.warning(hint))
        self.wait(lambda: not self.unconfirmed)
        self.ioloop.remove_timeout(overdue)
        if any(number in self.left for number, _ in batch):
            return AMQPChannelError("messages were rejected: the queue is full, or has lost most of its nodes")
        return None

    def on_confirm(self, frame: Any) -> None:
        """Forget what is acknowledged; what is rejected is left."""
        last = frame.method.delivery_tag
        several = frame.method.multiple and itertools.takewhile(lambda tag: tag <= last, self.unconfirmed)
        for delivery_tag in list(several or [last]):
            number = self.unconfirmed.pop(delivery_tag)
            if isinstance(frame.method, pika.spec.Basic.Ack):
                del self.left[number]

    def open(self) -> None:
        """Declare what is needed, and connect for publishing.

        BlockingConnection could have one message at a time confirmed, which is a fifteenth of the speed; a transaction
        commits what a full queue rejected, see https://github.com/rabbitmq/rabbitmq-server/issues/8966.
        """
        options = self.options
        with connect(options) as blocking:
            if options.exchange:
                declare_exchange(blocking.channel(), options)
            else:
                declare_queue(blocking, options.queue)
        self.unconfirmed: dict[int, int] = {}  # number of the message, by delivery tag
        self.delivery_tags = itertools.count(1)
        self.closed: list[BaseException] = []
        self.ioloop = IOLoop()
        self.ioloop.activate_poller()
        done: list[Any] = []
        pika.SelectConnection.create_connection(options.url, on_done=done.append, custom_ioloop=self.ioloop)
        self.wait(lambda: done)
        if not isinstance(done[0], pika.SelectConnection):
            raise AMQPConnectionError(done[0].exceptions[-1])
        self.connection = connection = done[0]
        connection.add_on_close_callback(lambda connection, reason: self.closed.append(reason))
        connection.add_on_connection_blocked_callback(
            lambda connection, frame: log.warning("the broker blocks publishers: %s", frame.method.reason)
        )
        self.channel = connection.channel(on_open_callback=done.append)
        self.channel.add_on_close_callback(lambda channel, reason: self.closed.append(reason))
        self.channel.add_on_return_callback(
            lambda channel, method, properties, body: self.returned.add(properties.message_id)
        )
        self.wait(lambda: done[1:])
        self.channel.confirm_delivery(ack_nack_callback=self.on_confirm, callback=done.append)
        self.wait(lambda: done[2:])

    def wait(self, condition: Callable[[], object]) -> None:
        """Serve the connection once, and until the condition is true; raises what closed it."""
        self.ioloop.call_later(0, lambda: None)  # the first poll does not block
        while True:
            self.ioloop.poll()
            self.ioloop.process_timeouts()
            if self.closed:
                raise self.closed[0]
            if condition():
                return

    def close(self) -> None:
        if self.connection and self.connection.is_open:
            self.closed.clear()  # of the channel
            self.connection.close()
            with contextlib.suppress(*CONNECTION_ERRORS):  # what was confirmed stays so
                self.wait(lambda: False)
        self.connection = None


def batches(messages: Sequence[str]) -> Iterator[Sequence[bytes]]:
    """The bodies to publish, as they come; nothing when there is nothing for a second."""
    yield []  # to connect, and see an error, before there is input
    if messages != ["-"]:
        yield [os.fsencode(message) for message in messages]
        return
    lines: queue.Queue[Sequence[bytes] | Stop] = queue.Queue(maxsize=2)
    threading.Thread(target=read_lines, args=[lines], daemon=True).start()
    while True:
        try:
            batch = lines.get(timeout=1)
        except queue.Empty:
            batch = []
        if isinstance(batch, Stop):
            raise batch
        yield batch


def read_lines(lines: queue.Queue[Sequence[bytes] | Stop]) -> None:
    """Put the lines of standard input, those that end in one read together, and then a Stop."""
    pieces: list[bytes] = []  # of a line that has not ended; joined once, because there can be many
    try:
        for data in iter(lambda: os.read(0, READ_SIZE), b""):
            *ended, rest = data.split(b"\n")
            if ended:
                ended[0] = b"".join([*pieces, ended[0]])
                pieces = []
                lines.put(ended)
            pieces.append(rest)
        if any(pieces):
            lines.put([b"".join(pieces)])
        lines.put(Stop())
    except OSError as error:
        lines.put(Stop(f"standard input: {error.strerror}"))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common_options()
    parser.add_argument("-r", "--routing-key", type=short_string, help="what the exchange routes by; default: empty")
    parser.add_argument("--content-type", type=short_string, default="text/plain", help="default: %(default)s")
    parser.add_argument("messages", nargs="*", metavar="MESSAGE", help="or - for the lines of standard input")
    options = parser.parse_intermixed_args(argv)
    for mistake, made in {
        "--connect-timeout: at least 0": not options.connect_timeout >= 0,
        "a queue or an exchange has no empty name": "" in (options.queue, options.exchange),
        "-q does not go with -e: the exchange's bindings decide on the queue": options.queue and options.exchange,
        "-t and -r need -e": not options.exchange and (options.type or options.routing_key is not None),
        "- does not go with other messages": "-" in options.messages and len(options.messages) > 1,
        "standard input is closed": options.messages == ["-"] and sys.stdin is None,
    }.items():
        if made:
            parser.error(mistake)
    if not options.exchange:
        options.queue = options.routing_key = options.queue or QUEUE
    options.header = dict(options.header) or None
    options.routing_key = options.routing_key or ""
    options.messages = options.messages or ["Hello World!"]
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    set_up(options)
    producer = Producer(options)
    status, reason = 0, ""
    try:
        for bodies in batches(options.messages):
            producer.publish([producer.message(body) for body in bodies])
    except KeyboardInterrupt:
        status, reason = 130, "interrupted"
    except Stop as stop:
        reason = str(stop)
    safe, unroutable = producer.safe, producer.unroutable
    if unroutable:
        log.error("error: %d of %d messages were unroutable: no queue is bound for them", unroutable, safe)
        status = status or 1
    if reason:
        resume = f", resume with: tail -n +{safe + 1}" if options.messages == ["-"] else ""
        log.error("error: %s; %d messages are safe%s", reason, safe, resume)
        return status or 1
    if not unroutable:
        log.info("%d message%s published", safe, "s" * (safe != 1))
    producer.close()
    return status


if __name__ == "__main__":
    sys.exit(main())
