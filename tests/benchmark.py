"""How fast the pair is, beside pika as one would use it first: python tests/benchmark.py [--quick] [--broker ...]

Each contestant is a process of its own, its start counted, with messages that are persistent, in a quorum queue. The
contestants take turns, in as many rounds as are asked for; a figure is the median, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import deque
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import pika

from broker import ROOT, Broker, choose

Command = Sequence[str]
Figures = Dict[str, List[float]]  # of each contestant, one a round


# Runs a command and says how many kB it had at most. A small process of its own, because no child has less than its
# parent had when it was started.
MEMORY = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
"""


class Benchmark:
    def __init__(self, broker: Broker, rounds: int, directory: Path) -> None:
        self.url, self.rounds, self.directory = broker.url, rounds, directory
        self.environment = {**os.environ, "AMQP_URL": broker.url}

    def pika(self, name: str, queue: str, *arguments: object) -> Command:
        return [sys.executable, str(ROOT / "tests" / "baselines.py"), name, self.url, queue, *map(str, arguments)]

    def script(self, name: str, queue: str, *arguments: object) -> Command:
        messages = [] if name == "consumer" or arguments else ["Hello World!"]
        return [sys.executable, str(ROOT / f"{name}.py"), "-q", queue, *map(str, arguments), *messages]

    def lines(self, count: int, size: int) -> Path:
        """A file of so many numbered lines of so many bytes."""
        path = self.directory / f"{count}x{size}"
        if not path.exists():
            with path.open("wb") as file:
                file.writelines((b"%0*d\n" % (size, number)) if size else b"\n" for number in range(count))
        return path

    def seconds(self, command: Command, stdin: Path = Path(os.devnull)) -> float:
        """How long the command takes. If it fails, so does the benchmark."""
        start = time.perf_counter()
        with stdin.open("rb") as source:
            done = subprocess.run(
                command, stdin=source, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=self.environment
            )
        if done.returncode:
            sys.exit(f"{command}: {done.stderr.decode()}")
        return time.perf_counter() - start

    def measure(self, contestants: dict[str, Callable[[str], Any]]) -> dict[str, list[Any]]:
        """What each contestant returns for a queue of its own, round by round."""
        found: dict[str, list[Any]] = {name: [] for name in contestants}
        order = deque(contestants)
        for _ in range(self.rounds):
            for name in order:
                queue = f"benchmark-{uuid.uuid4().hex}"
                found[name].append(contestants[name](queue))
                with pika.BlockingConnection(pika.URLParameters(self.url)) as connection:
                    channel = connection.channel()
                    channel.queue_delete(queue)
                    channel.queue_delete(f"{queue}.dead")
            order.rotate()  # because the broker still tidies up after the one before
        return found

    def publishing(self, count: int, size: int) -> Figures:
        """Messages a second. The one that waits for each confirmation publishes a tenth, because it takes so long."""

        def rate(count: int, command: Command) -> float:
            return count / self.seconds(command, stdin=self.lines(count, size))

        return self.measure({
            "ours": lambda queue: rate(count, self.script("producer", queue, "-")),
            "pika, unconfirmed": lambda queue: rate(count, self.pika("publish", queue)),
            "pika, each message confirmed": lambda queue: rate(count // 10, self.pika("publish_confirmed", queue)),
        })  # fmt: skip

    def consuming(self, count: int, size: int, prefetch: int) -> Figures:
        """Messages a second, of a queue that held them all before."""

        def rate(queue: str, command: Command) -> float:
            self.seconds(self.script("producer", queue, "-"), stdin=self.lines(count, size))
            return count / self.seconds(command)

        arguments = "--prefetch", prefetch, "-c", count
        return self.measure({
            "ours": lambda queue: rate(queue, self.script("consumer", queue, *arguments)),
            "pika, acknowledged automatically": lambda queue: rate(queue, self.pika("consume", queue, count, 0)),
            "pika, each message acknowledged": lambda queue: rate(queue, self.pika("consume", queue, count, prefetch)),
        })  # fmt: skip

    def failing(self, count: int) -> Figures:
        """Messages that are handled each second, while each hundredth always fails, and while none does."""

        def rate(queue: str, every: int) -> float:
            good = count - (count // every if every else 0)
            handle = self.directory / f"handle-{every}.py"
            handle.write_text(f"""
handled = 0
def handle(method, properties, body):
    global handled
    assert not {every} or int(body) % {every}
    handled += 1
    if handled == {good}:
        sys.exit()
""")
            self.seconds(self.script("producer", queue, "-"), stdin=self.lines(count, 100))
            with_handle, consumer = str(ROOT / "tests" / "with_handle.py"), str(ROOT / "consumer.py")
            return good / self.seconds([sys.executable, with_handle, consumer, str(handle), "-q", queue])

        return self.measure({"ours": lambda queue: rate(queue, 100), "ours, none fails": lambda queue: rate(queue, 0)})

    def one_message(self) -> Figures:
        """Milliseconds, to a queue that exists."""

        def milliseconds(command: Command) -> float:
            self.seconds(command)
            return 1000 * statistics.median(self.seconds(command) for _ in range(5))

        return self.measure({
            "ours": lambda queue: milliseconds(self.script("producer", queue)),
            "pika, the shortest script": lambda queue: milliseconds(self.pika("hello", queue)),
        })  # fmt: skip

    def latency(self, count: int) -> Figures:
        """Median milliseconds from writing a line to the producer to reading it from the consumer, 100 lines a second."""

        def median(producer: Command, consumer: Command) -> float:
            found = []
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            with subprocess.Popen(producer, env=self.environment, **pipes) as writer:
                with subprocess.Popen(consumer, env=self.environment, **pipes) as reader:
                    assert writer.stdin and reader.stdout
                    for number in range(-10, count):
                        start = time.perf_counter()
                        writer.stdin.write(b"%d\n" % number)
                        writer.stdin.flush()
                        assert reader.stdout.readline() == b"%d\n" % number
                        if number >= 0:  # the others waited for both to start
                            found.append(1000 * (time.perf_counter() - start))
                        time.sleep(max(0.0, start + 0.01 - time.perf_counter()))
                    reader.kill()
                writer.stdin.close()
            return statistics.median(found)

        return self.measure({
            "ours": lambda queue: median(self.script("producer", queue, "-"), self.script("consumer", queue)),
            "pika, confirmed, a callback": lambda queue: median(
                self.pika("publish_confirmed", queue), self.pika("consume_callback", queue)
            ),
        })  # fmt: skip

    def memory(self, count: int, size: int) -> Figures:
        """The most MB that each script has, for so many lines."""
        queue, found = f"benchmark-{uuid.uuid4().hex}", {}
        for name, arguments in {"producer": ["-"], "consumer": ["--drain", "--prefetch", "100"]}.items():
            command = [sys.executable, "-c", MEMORY, *self.script(name, queue, *arguments)]
            with self.lines(count, size).open("rb") as source:
                done = subprocess.run(
                    command, stdin=source, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=self.environment
                )
            found[f"{name}.py"] = [int(done.stderr.split()[-1]) / 1024]
        return found


def table(title: str, unit: str, found: Figures) -> None:
    """A row for each contestant, with the ratio of our figure to it."""
    for name, values in found.items():
        median, ratio = (
            statistics.median(values),
            statistics.median(found.get("ours", values)) / statistics.median(values),
        )
        spread = f"{median:,.1f} ({min(values):,.1f}-{max(values):,.1f}) {unit}"
        print(f"| {title} | {name} | {spread} | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the messages, for a first idea")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--broker", default="", metavar="docker|local|URL", help="default: docker, else local")
    options = parser.parse_args()
    many, large = (10_000, 500) if options.quick else (100_000, 2000)
    broker = choose(options.broker)
    try:
        broker.start()
        with tempfile.TemporaryDirectory() as directory:
            benchmark = Benchmark(broker, options.rounds, Path(directory))
            print("| what | who | median (lowest-highest) | ours to it |\n|---|---|---|---|")
            for count, size in (many, 100), (large, 100_000):
                what = f"{count:,} of {size:,} bytes"
                table(f"publish {what}", "/s", benchmark.publishing(count, size))
                table(f"consume {what}, prefetch 100", "/s", benchmark.consuming(count, size, 100))
            table(f"consume {many:,} of 100 bytes, prefetch 10", "/s", benchmark.consuming(many, 100, 10))
            table(f"handle {many // 10:,}, 1 % of which fail", "/s", benchmark.failing(many // 10))
            table("publish one", "ms", benchmark.one_message())
            table("latency", "ms", benchmark.latency(500))
            for size in 100, 0:
                table(f"memory, {10 * many:,} lines of {size} bytes", "MB", benchmark.memory(10 * many, size))
        machine = f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"
        print(f"\n{machine}, pika {pika.__version__}, RabbitMQ {'.'.join(map(str, broker.version()))}")
    finally:
        broker.remove()


if __name__ == "__main__":
    main()
