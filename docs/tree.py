"""Writes the tree of ``docs/architecture.md`` from the first lines of the modules.

Run: python docs/tree.py
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "dilated_attention_pytorch"
PAGE = Path(__file__).parent / "architecture.md"
BEGIN, END = "<!-- tree -->\n", "<!-- /tree -->\n"


def tree() -> str:
    """A table of all modules, folders in the order in which they may import each other."""
    rows = ["| file | what it is |", "|---|---|"]
    for path in sorted(ROOT.rglob("*.py"), key=lambda p: (len(p.relative_to(ROOT).parts) > 1, p)):
        said = ast.get_docstring(ast.parse(path.read_text()))
        if said and path.name != "__init__.py":
            first = re.sub(r":\w+:(?=`)", "", said.splitlines()[0])
            first = first.replace("``", "`").replace("|", "\\|")
            rows.append(f"| `{path.relative_to(ROOT)}` | {first} |")
    return "\n".join(rows) + "\n"


def page() -> str:
    """The page with its tree as it is now."""
    before, rest = PAGE.read_text().split(BEGIN)
    return before + BEGIN + "\n" + tree() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page())
