"""Which module of ours imports which, read from their text."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vlcache_triton"


def modules() -> dict[str, Path]:
    """Ours by their full names, links followed once: `vlcache_triton.kernels.decode`."""
    found = {}
    for top, name in ((PACKAGE, PACKAGE), ("kernels", f"{PACKAGE}.kernels")):
        found |= _below(ROOT / top, name)
    return found | _below(ROOT / "integrations", f"{PACKAGE}.integrations")


def _below(folder: Path, name: str) -> dict[str, Path]:
    links = {folder / "kernels", folder / "integrations"}
    found = {}
    for file in sorted(folder.rglob("*.py")):
        if not links & {*file.parents}:
            parts = (name, *file.relative_to(folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imports(name: str, files: dict[str, Path], homes: dict[str, str]) -> set[str]:
    """Modules of ours that a module imports, wherever in its text; for checkers of types, too.

    homes: the module of each name that the package offers lazily.
    """
    package = name if files[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(files[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                offered = homes.get(alias.name) if base == PACKAGE else None
                found.add(PACKAGE + offered if offered else whole if whole in files else base)
    return {x for x in found if x in files} - {name}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules each of which leads to all others (Kosaraju)."""
    order: list[str] = []
    seen: set[str] = set()

    def walk(name: str, edges: dict[str, set[str]], into: list[str]) -> None:
        seen.add(name)
        for other in sorted(edges.get(name, ())):
            if other not in seen:
                walk(other, edges, into)
        into.append(name)

    for name in sorted(graph):
        if name not in seen:
            walk(name, graph, order)
    back: dict[str, set[str]] = {name: set() for name in graph}
    for name, others in graph.items():
        for other in others:
            back[other].add(name)
    seen.clear()
    groups = []
    for name in reversed(order):
        if name not in seen:
            group: list[str] = []
            walk(name, back, group)
            groups.append(set(group))
    return [group for group in groups if len(group) > 1]
