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
import functools
import itertools
import logging
import os
import queue
import random
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections import Counter
from typing import Any, Callable, Iterable, Iterator, NoReturn, Sequence, Tuple

import pika
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPChannelError, AMQPConnectionError, ChannelClosedByBroker

URL = "amqp://guest:guest@localhost:5672/%2F"
QUEUE = "hello"
CONNECT_TIMEOUT = 60  # seconds; a service that must not give up wants math.inf, one that must not wait 2
READ_SIZE = 2**19  # bytes of standard input that one read takes at most; more is faster for large lines
BATCH_SIZE = 2000  # messages that are sent before their confirmations are waited for; both sizes take memory
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
FINAL = {  # what to do about errors that end the program, by a word in them; the first that fits counts
    "delivery acknowledgement": "",  # does not end it: a handler took longer than the broker waits
    "connection limit": "",  # does not end it: the broker may still hold the connection that was lost
    "ACCESS_REFUSED": "check user, password and permissions; names that start with amq. are reserved",
    "NOT_ALLOWED": "check the virtual host in the URL, and that the user may use it",
    "NOT_FOUND - no exchange": "-t TYPE declares it",
    "inequivalent arg": "without -t, the exchange is used as it is",
    "FRAME_ERROR": "the headers are too long",
    "PRECONDITION_FAILED": "the message, or the settings of what has this name, do not fit",
    "RESOURCE_LOCKED": "it belongs to another connection",
    "CERTIFICATE_VERIFY_FAILED": "SSL_CERT_FILE=FILE adds a private CA",
}
log = logging.getLogger(__name__)
warn_once = functools.lru_cache(maxsize=None)(log.warning)  # not again at each new connection


class Stop(Exception):
    """Ends the program; the text, if there is one, says what was not done and why."""


def queue_declarations(queue: str | None) -> list[dict[str, Any]]:
    """For `queue_declare`: the queue NAME and its NAME.dead; only the latter if that is asked for."""
    if not queue:
        return []
    dead = queue if queue[1:].endswith(".dead") else f"{queue}.dead"
    arguments = {**QUEUE_ARGUMENTS, "x-dead-letter-routing-key": dead}
    # NAME.dead keeps what it gets, where RabbitMQ 4 would otherwise drop it after 20 deliveries.
    settings = {queue: arguments, dead: {**arguments, "x-delivery-limit": 2**31 - 1}}
    return [{"queue": name, "durable": True, "arguments": settings[name]} for name in settings]


def use_as_it_is(error: ChannelClosedByBroker) -> None:
    """Nothing to do if a queue exists with other settings; other errors are raised."""
    if "inequivalent arg" not in error.reply_text:
        raise error
    warn_once("warning: the queue is used as it is: %s", error.reply_text)


def backoff(timeout: float) -> Iterator[float]:
    """Seconds to wait before each try, growing to 5, with jitter; none once `timeout` has passed since the first."""
    deadline, longest = time.monotonic() + timeout, 0.2
    while time.monotonic() < deadline:
        yield max(0, min(longest * random.uniform(0.5, 1), deadline - time.monotonic()))
        longest = min(2 * longest, 5)


def pause(error: BaseException, delays: Iterator[float], options: argparse.Namespace) -> None:
    """Log the error and wait before the next try; raise Stop if there is none left, or it would be useless."""
    cause = getattr(error.args[0] if error.args else error, "exception", error)  # pika wraps what the socket said
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
    if isinstance(cause, socket.gaierror):
        options.url.append(options.url.pop(0))  # because pika tries none after a name that does not resolve
    time.sleep(delay)


def broker_urls(text: str) -> list[pika.URLParameters]:
    """The connection parameters of each URL. Errors do not repeat the URL, because of the password in it."""
    urls = re.split(",(?=amqps?://)", text)
    form = r"amqps?://([^/?#@:]*:[^/?#@]*@)?(\[[^]/?#@]*\]|[^/?#@:[]*)(:\d+)?(/[^/?#@]{0,255})?(\?[^#@]*)?"
    if not all(re.fullmatch(form, url) for url in urls):
        hint = "expected amqp://USER:PASSWORD@HOST:PORT/VHOST, with special characters as %XX (the vhost / is %2F)"
        raise argparse.ArgumentTypeError(hint)
    try:
        text.encode()
        brokers = [pika.URLParameters(url) for url in urls]
        for broker in brokers:
            broker.host.encode("idna")  # or connecting would raise the error, each time
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
        # Hides the password of a URL that was given where none belongs, but not the form that `broker_urls` shows.
        super().error(re.sub("(?s)://.*@(?!HOST:PORT/VHOST)", "://...@", message))


def common_options() -> Parser:
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, width=110)  # given: finding out takes 3 ms
    parser = Parser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    url = os.environ.get("AMQP_URL") or URL
    add("--url", type=broker_urls, default=url, help="URL[,URL...], tried in order; else AMQP_URL, else localhost")
    add("-q", "--queue", type=short_string, help=f"default without -e: {QUEUE}")
    add("-e", "--exchange", type=short_string, help="has to exist, unless -t is given")
    add("-t", "--type", choices=["direct", "fanout", "topic", "headers"], help="declare the exchange, of this type")
    add("-H", "--header", type=header, action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    how_long = "how long an unreachable broker is tried for; default: %(default)g"
    add("--connect-timeout", type=float, default=CONNECT_TIMEOUT, metavar="SECONDS", help=how_long)
    add("-v", "--verbose", action="store_true", help="more on stderr")
    return parser


def set_up(options: argparse.Namespace) -> None:
    """One line on stderr for each event."""
    level = logging.DEBUG if options.verbose else logging.INFO
    logging.basicConfig(format=f"{os.path.basename(__file__)}: %(message)s", level=level)
    logging.getLogger("pika").setLevel(logging.CRITICAL + 1)  # it has seven errors for one refused connection


Message = Tuple[str, pika.BasicProperties, bytes]  # routing key, properties, body


class Producer:
    """Publishes over one connection, which it renews when it breaks. Each thread needs a Producer of its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.connection: pika.SelectConnection | None = None
        self.properties = {"content_type": options.content_type, "headers": options.header, "delivery_mode": 2}
        run = uuid.uuid4()
        self.message_ids = (f"{run}-{number}" for number in itertools.count(1))
        self.pending: dict[int, Message] = {}  # by number; what leaves is what the broker has confirmed
        self.confirmed = 0  # messages, the unroutable ones too; numbers go on from here
        self.delays = backoff(options.connect_timeout)  # before Stop; begun anew when the broker shows that it is there
        self.unroutable = 0  # confirmed messages that no queue would receive

    @property
    def safe(self) -> int:
        """How many of all the messages given so far, from the first on, need not be sent again."""
        return next(iter(self.pending), self.confirmed + 1) - 1

    def message(self, body: bytes, routing_key: str | None = None, **properties: Any) -> Message:
        """A persistent message to publish, which keeps its `message_id` when it is sent again."""
        own = {"message_id": next(self.message_ids), "timestamp": int(time.time())}
        key = self.options.routing_key if routing_key is None else routing_key
        return key, pika.BasicProperties(**{**self.properties, **own, **properties}), body

    def publish(self, messages: Iterable[Message]) -> int:
        """Publish; return how many messages no queue would receive. The broker has taken responsibility for the others.

        Raises Stop if the broker refuses, or is away for longer than `connect_timeout`. What is not safe is in `pending`
        then: `publish([])` tries it again, `publish(others)` and `pending.clear()` give it up.
        With nothing to publish, it keeps the connection alive, or tries once to renew it.
        """
        self.pending = dict(enumerate(messages, self.confirmed + 1)) or self.pending
        size, unroutable = min(len(self.pending), BATCH_SIZE), self.unroutable
        if size or self.connection:  # else this is one more try in the outage of the last call
            self.delays = backoff(self.options.connect_timeout)
        while True:
            try:
                self.send(size)
            except CONNECTION_ERRORS as error:
                self.close()
                if getattr(error, "reply_code", 0) == 406 and size > 1:
                    size //= 2  # one message is too large: let those before it through
                elif self.pending or not size:  # else it broke after the last confirmation
                    pause(error, self.delays, self.options)
            except BaseException:
                self.connection = None  # and with it what is half sent
                raise
            if not self.pending:
                return self.unroutable - unroutable

    def send(self, size: int) -> None:
        """Publish the first `size` pending messages and wait for the confirmations; raises if some are rejected."""
        if not self.connection:
            self.open()
        self.returned: Counter[str] = Counter()  # message ids
        batch = list(itertools.islice(self.pending.items(), size))
        exchange, publish = self.options.exchange or "", self.channel.basic_publish
        for number, (routing_key, properties, body) in batch:
            self.unconfirmed[next(self.delivery_tags)] = number
            # Mandatory, because otherwise what cannot be routed is dropped, and confirmed.
            publish(exchange=exchange, routing_key=routing_key, body=body, properties=properties, mandatory=True)
        if not batch:
            self.ioloop.call_later(0, lambda: None)  # so that the poll for heartbeats does not block
        self.serve_until(lambda: not self.unconfirmed)
        if any(number in self.pending for number, _ in batch):
            # Raised, for a new connection: a channel that was opened while the queue had no leader may reject for ever,
            # see https://github.com/rabbitmq/rabbitmq-server/blob/v3.10.8/deps/rabbit/src/rabbit_fifo_client.erl
            raise AMQPChannelError("messages were rejected: the queue is full, or has lost most of its nodes")

    def on_confirm(self, frame: Any) -> None:
        """An acknowledged message is not pending any more; a rejected one is."""
        tags = [frame.method.delivery_tag]
        if frame.method.multiple:
            tags = list(itertools.takewhile(lambda tag: tag <= frame.method.delivery_tag, self.unconfirmed))
        for tag in tags:
            number = self.unconfirmed.pop(tag)
            if isinstance(frame.method, pika.spec.Basic.Ack):
                _, properties, _ = self.pending.pop(number)
                self.confirmed += 1
                self.delays = backoff(self.options.connect_timeout)
                if self.returned[properties.message_id]:
                    self.returned[properties.message_id] -= 1
                    self.unroutable += 1

    def on_return(self, channel: Any, method: Any, properties: pika.BasicProperties, body: bytes) -> None:
        """No queue would receive the message; its confirmation follows."""
        self.returned[properties.message_id] += 1

    def open(self) -> None:
        """Connect, and declare what is needed.

        Not a BlockingConnection, which waits for each confirmation, at a fifteenth of the speed; nor a transaction,
        which commits what a full queue rejected, see https://github.com/rabbitmq/rabbitmq-server/issues/8966.
        """
        options = self.options
        self.unconfirmed: dict[int, int] = {}  # number of the message, by delivery tag
        self.delivery_tags = itertools.count(1)
        self.close_reasons: list[BaseException] = []
        self.ioloop = IOLoop()
        self.ioloop.activate_poller()
        create = pika.SelectConnection.create_connection
        connection = self.call(create, "on_done", connection_configs=options.url, custom_ioloop=self.ioloop)
        if not isinstance(connection, pika.SelectConnection):  # but an AMQPConnectionWorkflowFailed
            self.ioloop.close()
            raise connection.exceptions[-1]
        self.connection = connection
        connection.add_on_connection_blocked_callback(
            lambda connection, frame: log.warning("the broker blocks publishers: %s", frame.method.reason)
        )
        self.open_channel(connection)
        if options.exchange:
            # A passive declaration ignores the type.
            exchange = {"exchange": options.exchange, "exchange_type": options.type or "direct", "durable": True}
            self.call(self.channel.exchange_declare, passive=not options.type, **exchange)
        try:
            for declaration in queue_declarations(options.queue):
                self.call(self.channel.queue_declare, **declaration)
        except ChannelClosedByBroker as error:
            use_as_it_is(error)
            self.open_channel(connection)
        self.channel.add_on_return_callback(self.on_return)
        self.call(self.channel.confirm_delivery, ack_nack_callback=self.on_confirm)

    def open_channel(self, connection: pika.SelectConnection) -> None:
        self.channel = connection.channel()
        # This is called when the connection is lost, too.
        self.channel.add_on_close_callback(lambda channel, reason: self.close_reasons.append(reason))
        self.serve_until(lambda: self.channel.is_open)

    def call(self, method: Callable[..., Any], callback: str = "callback", **arguments: Any) -> Any:
        """What the broker answers to a method of the connection or the channel."""
        answers: list[Any] = []
        method(**arguments, **{callback: answers.append})
        self.serve_until(lambda: answers)
        return answers[0]

    def serve_until(self, condition: Callable[[], object]) -> None:
        """Serve the connection, at least once, until the condition is true; raises what closed it."""
        overdue = time.monotonic() + 10
        while True:
            self.ioloop.poll()
            self.ioloop.process_timeouts()
            if self.close_reasons:
                raise self.close_reasons.pop()
            if condition():
                return
            if self.connection and time.monotonic() > overdue:
                log.warning("no answer for 10 s: is the broker, and are most of the nodes that have the queue, well?")
                overdue = float("inf")
                self.delays = backoff(self.options.connect_timeout)  # the broker is there, though it may block us

    def close(self) -> None:
        """Close the connection; wait for the broker's answer, 10 s at most."""
        if self.connection and self.connection.is_open:
            self.connection.close()
            deadline = time.monotonic() + 5  # and a poll takes 5 more at most
            while not self.connection.is_closed and time.monotonic() < deadline:
                self.ioloop.poll()
                self.ioloop.process_timeouts()
        if self.connection:
            self.ioloop.close()
        self.connection = None


def batches(messages: Sequence[str]) -> Iterator[Sequence[bytes]]:
    """The bodies to publish, as they come; an empty batch at first, and while there are none."""
    yield []  # to connect, and see an error, before there is input
    if messages != ["-"]:
        yield [os.fsencode(message) for message in messages]
        return
    lines: queue.Queue[Sequence[bytes] | Stop | None] = queue.Queue(maxsize=2)
    threading.Thread(target=read_lines, args=[lines], daemon=True).start()
    while True:
        try:
            batch = lines.get(timeout=0.2)
        except queue.Empty:
            batch = []
        if batch is None:
            return
        if isinstance(batch, Stop):
            raise batch
        yield batch


def read_lines(lines: queue.Queue[Sequence[bytes] | Stop | None]) -> None:
    """Put the lines of standard input, those that end in one read together, and then None, or the reason to stop."""
    pieces: list[bytes] = []  # of a line that has not ended; joined once, because there can be many
    try:
        for data in iter(lambda: os.read(0, READ_SIZE), b""):
            *ended, rest = data.split(b"\n")
            if ended:
                ended[0] = b"".join([*pieces, ended[0]])
                pieces = []
                for start in range(0, len(ended), BATCH_SIZE):
                    lines.put(ended[start : start + BATCH_SIZE])
            pieces.append(rest)
        if any(pieces):
            lines.put([b"".join(pieces)])
        lines.put(None)
    except OSError as error:
        lines.put(Stop(f"standard input: {error.strerror}"))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common_options()
    parser.add_argument("-r", "--routing-key", type=short_string, help="what the exchange routes by; default: empty")
    parser.add_argument("--content-type", type=short_string, default="text/plain", help="default: %(default)s")
    message = "or - for the lines of standard input; -- goes before those that start with a dash"
    parser.add_argument("messages", nargs="*", metavar="MESSAGE", help=message)
    arguments = list(sys.argv[1:] if argv is None else argv)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_intermixed_args(arguments[:end])  # this method does not know --
    options.messages += arguments[end + 1 :]
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
    for broker in options.url:
        broker.stack_timeout = min(max(options.connect_timeout, 1), broker.stack_timeout)  # of one try
    if not options.exchange:
        options.queue = options.routing_key = options.queue or QUEUE
    options.header = dict(options.header) or None
    options.routing_key = options.routing_key or ""
    options.messages = options.messages or ["Hello World!"]
    return options


def interrupt(*_signal: Any) -> None:
    """Raise KeyboardInterrupt, once."""
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which has Python complain of one that has just come
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    set_up(options)
    for number in signal.SIGINT, signal.SIGTERM:
        if signal.getsignal(number) != signal.SIG_IGN:  # as in a shell's background jobs
            signal.signal(number, interrupt)
    producer = Producer(options)
    status, reason = 0, ""
    try:
        for bodies in batches(options.messages):
            producer.publish([producer.message(body) for body in bodies])
        producer.close()
    except KeyboardInterrupt:
        status, reason = 130, "interrupted"
    except Stop as stop:
        status, reason = 1, str(stop)
    safe, unroutable, confirmed = producer.safe, producer.unroutable, producer.confirmed
    if unroutable:
        log.error("error: %d of %d messages were unroutable: no queue is bound for them", unroutable, confirmed)
        status = status or 1
    if reason:
        resume = f", resume with: tail -n +{safe + 1}" if options.messages == ["-"] else ""
        routed = max(0, safe - unroutable)  # at least; some that are unroutable may come after one that is not safe
        log.error("error: %s; %d messages are safe%s", reason, routed, resume)
    elif not unroutable:
        log.info("%d message%s published", safe, "s" * (safe != 1))
    return status


if __name__ == "__main__":
    sys.exit(main())
