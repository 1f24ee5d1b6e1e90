"""Handle the messages of a RabbitMQ queue, one after the other, until told to stop.

    python consumer.py                      write each message to standard output, one a line
    python consumer.py --drain > messages   the same, until the queue is empty

Guaranteed: a message is acknowledged after `handle` returned; whatever breaks before, it comes again. One
that `handle` fails on comes again later, and is moved to the queue NAME.dead in the end. The connection stays
alive while `handle` works, for as long as the broker allows (30 minutes). An outage is waited for.
Not guaranteed: that a message comes only once, nor the order of those that come again. A private queue (-e
without -q) misses what is sent during an outage, and loses what `handle` fails on twice.

To make it yours, replace `handle`. The other half of the pair is producer.py.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import math
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from collections import deque
from queue import SimpleQueue
from typing import Any, Callable, Deque, Iterator, NoReturn, Sequence, Tuple

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPChannelError, AMQPConnectionError, ChannelClosedByBroker, ConsumerCancelled

URL = "amqp://guest:guest@localhost:5672/%2F"
QUEUE = "hello"
CONNECT_TIMEOUT = math.inf  # seconds; a service that is restarted by something else may want less
PREFETCH = 10  # 1 for jobs of minutes, because all must be done within 30 minutes; 100 to 300 for the highest rate
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
Delivery = Tuple[pika.spec.Basic.Deliver, pika.BasicProperties, bytes]
Outcome = Tuple[Delivery, bool]  # True: handled, False: failed
Job = Tuple[Deque[Delivery], Deque[Outcome], threading.Lock]  # what waits, what came of it, released when done


def handle(method: pika.spec.Basic.Deliver, properties: pika.BasicProperties, body: bytes) -> None:
    """Return when the message is done with. An exception has it delivered again later; Stop ends the program."""
    write(body + b"\n")


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


failures: list[Stop] = []  # of standard output; kept, because `handle` may catch what `print` raises


def writing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but it raises Stop if standard output cannot be written, in silence if nobody reads on."""

    def wrapper(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # because Python flushes again when it exits
            failures.append(Stop("" if isinstance(error, BrokenPipeError) else f"standard output: {error.strerror}"))
            raise failures[0] from error

    return wrapper


@writing
def write(data: bytes = b"") -> None:
    """Standard output has what was printed, and the data; or else raises Stop."""
    sys.stdout.flush()
    while data:  # a pipe may take a part
        data = data[os.write(1, data) :]
    if failures:
        raise failures[0]


def identity(delivery: Delivery) -> tuple[Any, ...]:
    """What a message has in common with itself when it comes again, and with no other."""
    method, properties, body = delivery
    counts = "x-delivery-count", "x-acquired-count"  # the broker's
    headers = {key: value for key, value in (properties.headers or {}).items() if key not in counts}
    return method.exchange, method.routing_key, {**vars(properties), "headers": headers}, body


class Consumer:
    """Has `handle` work in a thread of its own, and serves the connection meanwhile."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pid = os.getpid()
        self.queue = options.queue
        self.remaining = options.count or sys.maxsize  # messages still to be handled
        self.delays = backoff(options.connect_timeout)
        self.settled: Sequence[Outcome] = []  # the last; their acknowledgement may not have arrived
        # Identities of messages that were handled, but perhaps not acknowledged, when a connection broke.
        self.unacknowledged: deque[tuple[Any, ...]] = deque(maxlen=2 * options.prefetch)
        self.losses = 0  # of the connection
        self.suspects = 0  # messages to be taken one by one after that, because pika may be unable to decode one
        self.jobs: SimpleQueue[Job | None] = SimpleQueue()  # None ends the worker
        self.stopping = self.interruptible = False
        self.stopped_at = math.inf  # when the first signal came
        self.error: BaseException | None = None  # what `handle` ended the program with

    def stop(self, *_signal: Any) -> None:
        """Stop after the message in hand; at once, if told again more than half a second later."""
        now = time.monotonic()
        # Not sooner, because `timeout` and others signal a process and then, again, the group that it is in.
        if now > self.stopped_at + 0.5 or os.getpid() != self.pid:  # or in a process that `handle` has forked
            os._exit(130)  # everything else would wait for `handle`
        self.stopping, self.stopped_at = True, min(now, self.stopped_at)
        if self.interruptible:
            self.interruptible = False
            raise KeyboardInterrupt

    def run(self) -> None:
        """Consume until told to stop; raises Stop if the broker refuses, or is away for `connect_timeout`."""
        threading.Thread(target=self.work).start()
        try:
            self.interruptible = True  # while it waits for a broker; elsewhere, it would leave pika in a bad state
            while self.remaining and not self.stopping:
                try:
                    with pika.BlockingConnection(self.options.url) as connection:
                        self.interruptible = False
                        self.consume(self.declare(connection))
                        break
                except CONNECTION_ERRORS as error:
                    self.interruptible = True
                    if not self.stopping:
                        pause(error, self.delays, self.options)
        finally:
            self.interruptible = False  # a message may still be in hand
            self.jobs.put(None)
        if self.error:
            raise self.error

    def declare(self, connection: pika.BlockingConnection) -> BlockingChannel:
        """Declare the queue; return an open channel."""
        channel = connection.channel()
        try:
            for declaration in queue_declarations(self.options.queue):
                channel.queue_declare(**declaration)
        except ChannelClosedByBroker as error:
            use_as_it_is(error)
            channel = connection.channel()
        if not self.options.queue:
            if self.queue:
                log.warning("warning: what was sent during the outage is missed, because the queue was private")
            self.queue = channel.queue_declare(queue="", exclusive=True).method.queue
        return channel

    def bind(self, channel: BlockingChannel) -> None:
        """Bind the queue to the exchange, if there is one, as the options say."""
        options = self.options
        if options.exchange:
            # A passive declaration ignores the type.
            exchange = {"exchange": options.exchange, "exchange_type": options.type or "direct", "durable": True}
            channel.exchange_declare(passive=not options.type, **exchange)
            arguments = {"x-match": options.match or "all", **dict(options.header)} if options.header else None
            # By default all messages, as far as the type allows it; without -t, that is not known.
            default = {"topic": ["#"], None: ["", "#"]}.get(options.type, [""])
            for routing_key in options.routing_key or default:
                channel.queue_bind(
                    queue=self.queue, exchange=options.exchange, routing_key=routing_key, arguments=arguments
                )

    def consume(self, channel: BlockingChannel) -> None:
        """Have messages handled until told to stop, then give back the others."""
        waiting: deque[Delivery] = deque()  # for the worker
        outcomes: deque[Outcome] = deque()  # of its work
        done = threading.Lock()
        done.acquire()  # until the worker releases it
        started = bind_at = time.monotonic()
        self.prefetch_count = 0  # messages that the broker may send ahead; 0 while it is to send none
        try:
            while True:
                if time.monotonic() >= bind_at:
                    self.bind(channel)  # again and again, because the broker does not tell when an exchange is deleted
                    bind_at = time.monotonic() + 10
                if not self.prefetch_count and not waiting:
                    self.prefetch_count = self.allowed()
                    channel.basic_qos(prefetch_count=self.prefetch_count)
                self.receive(channel, waiting, timeout=0 if waiting else 0.2)
                self.delays = backoff(self.options.connect_timeout)  # all is well
                # RabbitMQ 4.3 holds back what a lost connection had in hand, uncounted, a second for each time.
                idle = not waiting and time.monotonic() - started >= 2 * self.losses
                self.jobs.put((waiting, outcomes, done))
                while not done.acquire(timeout=0.1):
                    self.receive(channel, waiting, timeout=0)
                    self.settle(channel, waiting, outcomes)
                drained = idle and not (waiting or outcomes) and self.is_drained(channel)
                if self.stopping or not self.remaining or drained:
                    break
                self.settle(channel, waiting, outcomes)
            self.cancel(channel, waiting)
            self.settle(channel, waiting, outcomes)
            channel.basic_nack(delivery_tag=0, multiple=True, requeue=True)
        finally:
            waiting.clear()  # the broker delivers these again, perhaps to others
            self.losses, self.suspects = self.losses + 1, self.options.prefetch  # if there is another connection

    def allowed(self) -> int:
        """How many messages the broker may send ahead now; a change takes effect with a new `consume` only."""
        return min(1 if self.suspects else self.options.prefetch, self.remaining)

    def receive(self, channel: BlockingChannel, waiting: deque[Delivery], timeout: float) -> bool:
        """Serve the connection until messages arrive, for `timeout` seconds at most; whether any did."""
        if not self.prefetch_count:  # nothing can arrive, but there are heartbeats
            channel.connection.process_data_events(time_limit=timeout)
            return False
        messages: Iterator[Any] = channel.consume(queue=self.queue, inactivity_timeout=timeout)
        message = next(messages, None)
        if message is None:
            raise ConsumerCancelled("consumer cancelled: queue deleted, or handler slower than allowed")
        if message[0] is None:  # the time is over
            return False
        waiting.append(message)
        waiting.extend(itertools.islice(messages, channel.get_waiting_message_count()))
        return True

    def cancel(self, channel: BlockingChannel, waiting: deque[Delivery]) -> None:
        """Have the broker send no more."""
        if self.prefetch_count:
            # Receive what is on its way: pika rejects what arrives during a cancel, and that counts as a failure.
            while self.receive(channel, waiting, timeout=0.05):
                pass
            channel.cancel()
            self.prefetch_count = 0

    def is_drained(self, channel: BlockingChannel) -> bool:
        """The queue was to be emptied, and is. Asks twice, because the first answer can overtake messages."""
        if not self.options.drain:
            return False
        ready = [channel.queue_declare(queue=self.queue, passive=True).method.message_count for _ in range(2)]
        return not any(ready) and not channel.get_waiting_message_count()

    def work(self) -> None:
        """Handle what is waiting, as long as there is something. Runs in a thread of its own, the worker."""
        half = (self.options.prefetch + 1) // 2  # is acknowledged while the broker sends the other
        previous: deque[Outcome] = deque()  # outcomes of the connection before
        for waiting, outcomes, done in iter(self.jobs.get, None):
            if outcomes is not previous:  # there is a new connection, and what was not acknowledged comes again
                lost = [*self.settled, *previous]
                self.unacknowledged.extend(identity(delivery) for delivery, success in lost if success)
                self.settled, previous = [], outcomes
            while self.remaining and not self.stopping and len(outcomes) < half:
                try:
                    outcomes.append(self.attempt(waiting.popleft()))
                except IndexError:
                    break  # none is waiting
                except BaseException as error:  # Stop, SystemExit, KeyboardInterrupt
                    self.error, self.stopping = error, True
            done.release()

    def attempt(self, delivery: Delivery) -> Outcome:
        """Have one message handled; raises only what is to end the program."""
        method, properties, body = delivery
        place = (method.exchange, method.routing_key, properties.headers, properties.message_id, method.redelivered)
        log.debug("exchange %r, routing key %r, headers %s, message id %s, redelivered %s", *place)
        if method.redelivered and properties.message_id and identity(delivery) in self.unacknowledged:
            self.unacknowledged.remove(identity(delivery))
            return delivery, True  # handled and counted before the connection broke
        success = True
        try:
            handle(method, properties, body)
        except (Stop, SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # such as asyncio's CancelledError
            success = False
            log.error("error: message %r failed: %.500r", properties.message_id, error)
            log.debug("", exc_info=error)
            if method.redelivered and "x-delivery-count" not in (properties.headers or {}):
                time.sleep(1)  # a classic queue has neither limit nor delay
        write()  # what `handle` printed has to be out before the message is acknowledged
        self.remaining -= 1  # before `settle` looks at it
        return delivery, success

    def settle(self, channel: BlockingChannel, waiting: deque[Delivery], outcomes: deque[Outcome]) -> None:
        """Acknowledge what was handled, all with one frame; reject what failed."""
        settled = [outcomes.popleft() for _ in range(len(outcomes))]
        if not settled:
            return
        self.settled = settled
        self.suspects = max(0, self.suspects - len(settled))
        if self.prefetch_count != self.allowed():  # before the broker sends another for each that is settled
            self.cancel(channel, waiting)
        for (method, _, _), success in settled:
            if not success:
                # Not basic_nack, which RabbitMQ 4.3 does not count. A private queue has no limit: drop the second time.
                requeue = bool(self.options.queue) or not method.redelivered
                channel.basic_reject(delivery_tag=method.delivery_tag, requeue=requeue)
        handled = [method.delivery_tag for (method, _, _), success in settled if success]
        if handled:
            channel.basic_ack(delivery_tag=handled[-1], multiple=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common_options()
    add = parser.add_argument
    keys = "binding of the queue to the exchange; repeatable; default: all messages, if direct those without a key"
    add("-r", "--routing-key", type=short_string, action="append", help=keys)
    add("--match", choices=["all", "any"], help="how many of the headers have to match; default: all")
    add("-c", "--count", type=int, metavar="N", help="stop after N messages")
    add("--drain", action="store_true", help="stop when the queue is empty")
    add("--prefetch", type=int, default=PREFETCH, metavar="N", help="messages taken in advance; default: %(default)s")
    options = parser.parse_args(argv)
    for mistake, made in {
        "--connect-timeout: at least 0": not options.connect_timeout >= 0,
        "a queue or an exchange has no empty name": "" in (options.queue, options.exchange),
        "-t, -r and -H need -e": not options.exchange and (options.type or options.routing_key or options.header),
        "-H needs an exchange of type headers": options.header and options.type not in (None, "headers"),
        "--match needs -H": options.match and not options.header,
        "--count: at least 1": options.count is not None and options.count < 1,
        "--prefetch: 1 to 65535": not 1 <= options.prefetch <= 65535,
        "standard output is closed": sys.stdout is None,
    }.items():
        if made:
            parser.error(mistake)
    for broker in options.url:
        broker.stack_timeout = min(max(options.connect_timeout, 1), broker.stack_timeout)  # of one try
    if not options.exchange:
        options.queue = options.queue or QUEUE
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    set_up(options)
    for name in "write", "flush":  # which `print` uses
        setattr(sys.stdout, name, writing(getattr(sys.stdout, name)))
    consumer = Consumer(options)
    for number in signal.SIGINT, signal.SIGTERM:
        if signal.getsignal(number) != signal.SIG_IGN:  # as in a shell's background jobs
            signal.signal(number, consumer.stop)
    try:
        consumer.run()
    except KeyboardInterrupt:
        pass  # told to stop while it had no connection
    except Stop as stop:
        if str(stop):
            log.error("error: %s", stop)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
