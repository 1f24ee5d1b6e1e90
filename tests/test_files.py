"""What holds for the files themselves, and for the tests."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import pytest

from broker import ROOT
from conftest import SCRIPTS


@pytest.mark.parametrize(
    ("first", "last"),
    [("URL = ", "QUEUE = .*?$"), ("QUEUE_ARGUMENTS = ", "}$"), ("# What follows", r"def set_up\(.*?\n\n")],
    ids=["defaults", "arguments", "functions"],
)
def test_what_both_scripts_need_is_the_same_text(first: str, last: str) -> None:
    texts = [
        re.findall(rf"^{first}.*?^{last}", (ROOT / f"{script}.py").read_text(), flags=re.MULTILINE | re.DOTALL)
        for script in SCRIPTS
    ]

    assert len(texts[0]) == 1
    assert texts[0] == texts[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_the_public_names_of_pika_are_used(script: str) -> None:
    nodes = list(ast.walk(ast.parse((ROOT / f"{script}.py").read_text())))

    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {part for node in nodes if isinstance(node, ast.alias) for part in node.name.split(".")}

    assert {name for name in names if name.startswith("_")} <= {"_exit"}  # of os


def test_messages_in_the_readme_are_those_of_the_scripts() -> None:
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("## When something goes wrong") : readme.index("## What happens when")]
    sources = "".join((ROOT / f"{script}.py").read_text() for script in SCRIPTS)
    sources = re.sub(r"%[sd]|%\.1f|\{[^{}]*\}", "...", sources)

    rows = re.findall(r"^\| `(.+?)` \|", table, flags=re.MULTILINE)

    assert len(rows) > 10
    for row in rows:
        if not row[0].isupper():  # what starts so comes from the broker or the system, see test_errors.py
            for part in row.split("..."):
                assert part.strip() in sources, row


def test_what_the_readme_says_of_faults_is_tested() -> None:
    readme = (ROOT / "README.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))

    named = re.findall(r"\| `(test_\w+)` \|$", readme, flags=re.MULTILINE)

    assert len(named) > 20
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_without_a_broker_the_tests_fail_at_once_and_say_how_to_get_one() -> None:
    command = [sys.executable, "-m", "pytest", "--broker", "docker", "tests/test_pair.py"]
    environment = {**os.environ, "DOCKER_HOST": "unix:///no-such-engine"}

    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)

    assert done.returncode == 1
    assert "no RabbitMQ to test with: start a Docker engine, or" in done.stdout
    assert not re.search("passed|skipped", done.stdout)
