"""What holds for the files themselves."""

from __future__ import annotations

import ast
import re

import pytest

from broker import ROOT

SCRIPTS = ["producer.py", "consumer.py"]
OWN = ["CONNECT_TIMEOUT", "parse", "main"]  # names that mean something else in each script


def definitions(script: str) -> dict[str, str]:
    """The source of everything that the script defines at its top level, by name, in order."""
    source = (ROOT / script).read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            node_name = ast.unparse(node.targets[0])
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            node_name = node.name
        else:
            continue
        found[node_name] = str(ast.get_source_segment(source, node))
    return found


def test_what_both_scripts_need_is_the_same_text_in_the_same_order() -> None:
    producer, consumer = (definitions(script) for script in SCRIPTS)

    shared = [name for name in producer if name in consumer and name not in OWN]

    assert shared == [name for name in consumer if name in producer and name not in OWN]
    assert {name: producer[name] for name in shared} == {name: consumer[name] for name in shared}
    assert {"QUEUE_ARGUMENTS", "queue_declarations", "pause", "broker_urls", "common_options"} <= set(shared)


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_the_public_names_of_pika_are_used(script: str) -> None:
    tree = ast.parse((ROOT / script).read_text())

    private = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")}

    assert private == {"_exit"} & private  # of os


def test_messages_in_the_readme_are_those_of_the_scripts() -> None:
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("## When something goes wrong") : readme.index("## What happens when")]
    sources = "".join((ROOT / script).read_text() for script in SCRIPTS)
    sources = re.sub(r"%[sd]|%\.1f|\{[^{}]*\}", "...", sources)

    for row in re.findall(r"^\| `(.+?)` \|", table, flags=re.MULTILINE):
        if not row[0].isupper():  # what starts so comes from the broker or the system, see test_errors.py
            for part in row.split("..."):
                assert part.strip() in sources, row


def test_what_the_readme_says_of_faults_is_tested() -> None:
    readme = (ROOT / "README.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))

    named = re.findall(r"\| `(test_\w+)` \|$", readme, flags=re.MULTILINE)

    assert len(named) > 20
    assert [name for name in named if f"def {name}(" not in tests] == []
