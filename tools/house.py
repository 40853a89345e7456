"""Count the house: files, lines, imports and import circles of every part of the repository.

``make house`` prints a line a part. A room is a Python file; an arrow says that one room imports
another of the same part; a circle is a set of rooms that can all be reached from one another.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PARTS = {
    **{path.parent.name: path.parent for path in sorted(REPO.glob("packages/*/pyproject.toml"))},
    "shared_core": REPO / "shared" / "shared_core",
    "tools": REPO / "tools",
    "tests": REPO / "tests",
}


def rooms(folder: Path) -> dict[str, Path]:
    """Dotted module name -> file of every room in a part."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        for alias in node.names:  # a submodule, or else a name inside the module
            yield f"{node.module}.{alias.name}"
            yield node.module


def arrows(modules: Mapping[str, Path], *, at_import: bool = False) -> dict[str, set[str]]:
    """Room -> rooms of the same part that it imports.

    Args:
        at_import: only what the module imports when it is imported, not what its functions do.
    """
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside: set[int] = set()
        if at_import:
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    inside |= {id(child) for child in ast.walk(node)}
        wanted: set[str] = set()
        for node in ast.walk(tree):
            if id(node) not in inside:
                names = list(_imported(node))
                if isinstance(node, ast.ImportFrom):
                    names = [
                        full if full in modules else base
                        for full, base in zip(names[::2], names[1::2], strict=True)
                    ]
                wanted |= {one for one in names if one in modules}
        # A package's own __init__ only re-exports: what it names is no arrow of its own.
        found[name] = set() if path.name == "__init__.py" else wanted - {name}
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of rooms that reach one another, sorted. Source: Tarjan 1972."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            group = []
            while not group or group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return sorted(found)


def count(folder: Path) -> dict[str, object]:
    """``files``, ``lines``, ``arrows``, ``circles`` (lists of rooms), ``over_400`` of a part."""
    modules = rooms(folder)
    lines = {name: path.read_text("utf-8").count("\n") for name, path in modules.items()}
    graph = arrows(modules)
    return {
        "files": len(modules),
        "lines": sum(lines.values()),
        "arrows": sum(map(len, graph.values())),
        "circles": circles(graph),
        "over_400": sorted(name for name, number in lines.items() if number > 400),
    }


def main(argv: list[str] | None = None) -> int:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    counted = {name: count(folder) for name, folder in PARTS.items()}
    if args.json:
        print(json.dumps(counted, indent=2))
        return 0
    print(f"{'part':18}{'files':>7}{'lines':>8}{'arrows':>8}{'circles':>9}")
    for name, one in counted.items():
        numbers = one["files"], one["lines"], one["arrows"], len(one["circles"])
        print(f"{name:18}{numbers[0]:>7}{numbers[1]:>8}{numbers[2]:>8}{numbers[3]:>9}")
        for group in one["circles"]:
            print(f"    circle: {' <-> '.join(group)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
