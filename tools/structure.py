"""Measure the tree of `fastdit/`: circles of imports, the longest chain of them, flat modules, long files, lines.

    python tools/structure.py

Imports are read, not executed. A circle counts wherever its imports stand, also inside functions; the chain counts what
is imported on loading.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastdit"
#: folders that use the library; their lines are not the library's
TOOLS = ("search", "train", "tiny", "emoji", "evaluate", "cli")


@dataclass(frozen=True)
class Structure:
    """What the tree is like.

    Attributes:
        circles: Sets of modules that import each other, in whatever scope.
        chain: The longest way from module to module by imports at module scope.
        flat: Modules directly in the package.
        longest: (lines, file) of the longest file.
        lines: Of all files outside of the tools.
    """

    circles: list[list[str]]
    chain: list[str]
    flat: list[str]
    longest: tuple[int, str]
    lines: int


def measure() -> Structure:
    """The structure of the checkout."""
    files = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    counts = {name: len(path.read_text().splitlines()) for name, path in files.items()}
    anywhere = {name: _imports(name, path, files, False) for name, path in files.items()}
    loading = {name: _imports(name, path, files, True) for name, path in files.items()}
    longest = max(files, key=counts.__getitem__)
    return Structure(
        [sorted(group) for group in _components(anywhere) if len(group) > 1],
        _longest_chain(loading),
        sorted(path.name for path in PACKAGE.glob("*.py")),
        (counts[longest], str(files[longest].relative_to(ROOT))),
        sum(n for name, n in counts.items() if name.split(".")[1:2] not in [[t] for t in TOOLS]),
    )


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(name: str, path: Path, known: dict[str, Path], loading: bool) -> set[str]:
    """Modules of the package that a file imports; packages are those whose own code is needed."""
    found = set()
    for node in _statements(ast.parse(path.read_text()), loading):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                # A name with an underscore is a compiled module, which needs none of the package's code.
                if inner in known or not alias.name.startswith("_"):
                    found.add(inner if inner in known else node.module)
    return {other for other in found if other in known and other != name}


def _statements(tree: ast.AST, loading: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if typing or (loading and inside):
            continue
        yield child
        yield from _statements(child, loading)


def _components(graph: dict[str, set[str]]) -> list[set[str]]:
    """Strongly connected components."""
    reach = {name: _reachable(graph, name) for name in graph}
    groups: list[set[str]] = []
    for name in graph:
        group = {other for other in reach[name] if name in reach[other]} | {name}
        if group not in groups:
            groups.append(group)
    return groups


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen, waiting = set(), [start]
    while waiting:
        for other in graph[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
    return seen


def _longest_chain(graph: dict[str, set[str]]) -> list[str]:
    known: dict[str, list[str]] = {}

    def chain(name: str, above: tuple[str, ...]) -> list[str]:
        if name not in known:
            others = [chain(o, (*above, name)) for o in sorted(graph[name]) if o not in above]
            known[name] = [name, *max(others, key=len, default=[])]
        return known[name]

    return max((chain(name, ()) for name in graph), key=len)


def main() -> None:
    """Print it."""
    found = measure()
    print(f"circles: {len(found.circles)}")
    for circle in found.circles:
        print("  " + " <-> ".join(circle))
    print(f"longest chain: {len(found.chain)}")
    print("  " + " -> ".join(found.chain))
    print(f"flat modules: {len(found.flat)}")
    print(f"longest file: {found.longest[1]}, {found.longest[0]} lines")
    print(f"lines outside of {', '.join(TOOLS)}: {found.lines}")


if __name__ == "__main__":
    main()
