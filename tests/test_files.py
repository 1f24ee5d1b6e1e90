"""What the two files promise about themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType


def shared(path: Path) -> str:
    """The text that both scripts have, from the comment that says so to the first class after it."""
    text = path.read_text()
    begin = text.index("# Both files share")
    return text[begin : text.index("\nclass ", begin)]


def test_what_both_scripts_need_is_the_same_text(paths: dict[str, Path]) -> None:
    assert "def parse_options" in shared(paths["producer"])
    assert shared(paths["producer"]) == shared(paths["consumer"])


def test_both_scripts_declare_the_same_queue(producer: ModuleType, consumer: ModuleType) -> None:
    # RabbitMQ would refuse the second declaration otherwise.
    assert producer.QUEUE_ARGUMENTS == consumer.QUEUE_ARGUMENTS
    assert producer.DEAD_QUEUE_ARGUMENTS == consumer.DEAD_QUEUE_ARGUMENTS


def test_an_import_changes_nothing_in_the_program(paths: dict[str, Path], tmp_path: Path) -> None:
    program = """
import importlib, logging, os, signal, sys, pika
def state():
    loggers = [logging.getLogger(name) for name in (None, "pika", *names)]
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return [(log.level, log.handlers[:]) for log in loggers], signals, sys.stdout, sys.stdout.write, sys.excepthook
names = []
for path in sys.argv[1:]:
    directory, name = os.path.split(path)
    sys.path.insert(0, directory)
    names.append(name[:-3])
before = state()
scripts = [importlib.import_module(name) for name in names]
assert state() == before
for script in scripts:
    assert script.main(["--timeout", "0", "--url", "amqp://127.0.0.1:1"]) in (1, 2)
assert state() == before
"""
    command = [sys.executable, "-c", program, *map(str, paths.values())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
