"""Every test that docs/performance.md names as a gate is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_gates_named_in_the_docs_exist():
    text = (ROOT / "docs" / "performance.md").read_text().split("## Gates")[1].split("\n## ")[0]
    named, missing, path = 0, [], Path()
    for words in re.findall(r"`([^` ]+)`", text):
        name = words
        if words.startswith("tests/"):
            file, _, name = words.partition("::")
            path = ROOT / file
            assert path.is_file(), words
        if name.startswith("test_"):
            named += 1
            functions = {
                node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
            }
            missing += [] if name in functions else [words]
    assert missing == []
    assert named == 12
