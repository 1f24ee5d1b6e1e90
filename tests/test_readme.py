"""Every command of README.md runs, and prints what the page shows."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest

from broker import ROOT, Broker, eventually
from conftest import TIMEOUT

README = (ROOT / "README.md").read_text()
SECTIONS = dict(re.findall(r"^(##+ .+?)\n(.*?)(?=^##+ |\Z)", README, flags=re.MULTILINE | re.DOTALL))


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], flags=re.MULTILINE | re.DOTALL)


def examples(block: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with the output that follows it."""
    for example in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = example.partition("\n")
        yield command, output


def pattern(output: str) -> str:
    """A regular expression for the output as shown, in which ... is for anything within a line."""
    return re.escape(output).replace(re.escape("..."), ".*")


@pytest.fixture
def shell_environment(broker: Broker, tmp_path: Path) -> dict[str, str]:
    """That of a user who has done what "Start" says: `python` is one with pika, and the broker's URL is known."""
    for name in ("producer.py", "consumer.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    return {**os.environ, "AMQP_URL": broker.url, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def consumers(broker: Broker) -> int:
    """How many there are, on all queues."""
    return broker.ctl("list_consumers").count("\n")


@pytest.mark.ours
@pytest.mark.parametrize("section", [name for name in SECTIONS if blocks(name, "console")])
def test_the_commands_print_what_is_shown(
    section: str, broker: Broker, shell_environment: dict[str, str], tmp_path: Path
) -> None:
    interrupted = []

    for block in blocks(section, "console"):
        script = ""
        for command, output in examples(block):
            if output.endswith("^C\n"):
                before = consumers(broker)
                process = subprocess.Popen(
                    ["bash", "-c", f"exec {command}"],
                    cwd=tmp_path, env=shell_environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                )  # fmt: skip
                interrupted.append((process, output[: -len("^C\n")]))
                eventually(lambda before=before: consumers(broker) > before)  # type: ignore[misc]
            else:
                script += f"{command}\n"
        expected = "".join(output for _, output in examples(block) if not output.endswith("^C\n"))
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=shell_environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT,
        )  # fmt: skip
        assert re.fullmatch(pattern(expected), done.stdout), done.stdout

    for process, output in interrupted:
        assert process.stdout
        shown = "".join(process.stdout.readline() for _ in output.splitlines())
        process.send_signal(signal.SIGINT)
        assert re.fullmatch(pattern(output), shown + process.communicate(timeout=TIMEOUT)[0])
        assert process.returncode == 0
