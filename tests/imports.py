"""The order of imports: one list, what the sources really import, and both as a table.

`make imports` prints the table; test_imports.py holds the rules. A room is a folder of the package
or one of its single modules. A module may import its own room and the floors below, so two rooms on
one floor do not know each other.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The one place where the order is written down. The lowest floor comes first.
ORDER = [
    ["errors", "formatting", "scripts", "kernels"],
    ["filesystem"],
    ["files", "fields", "cli"],
    ["config", "known_hashes"],
    ["backends"],
    ["ops"],
    ["model"],
    ["expansion"],
    ["text", "checkpoints"],
    ["inference"],
    ["conversion", "training"],
    ["api"],
    ["generate", "evaluate", "prepare", "report", "push", "testing"],
    ["train", "convert"],
    ["__main__"],
]
FLOORS = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}

PACKAGE = {
    ".".join(["llamapro", *file.relative_to(ROOT / "llamapro").with_suffix("").parts]): file
    for file in sorted((ROOT / "llamapro").rglob("*.py"))
    if file.name != "__init__.py"
}
# The folder kernels/ is installed as llamapro.kernels.
KERNELS = {
    f"llamapro.kernels.{file.stem}": file
    for file in sorted((ROOT / "kernels").glob("*.py"))
    if file.name != "__init__.py"
}
# train.py and convert.py are imported, by experiments and tests, as modules of llamapro.scripts.
SCRIPTS = {f"llamapro.scripts.{name}": ROOT / f"{name}.py" for name in ("train", "convert")}
MODULES = PACKAGE | KERNELS | SCRIPTS


def room(module: str) -> str:
    """The room of a module: `llamapro.text.corpus` is in `text`, `llamapro.ops` in `ops`."""
    return module.removeprefix("llamapro.").removeprefix("scripts.").partition(".")[0]


def is_module(name: str) -> bool:
    """Whether a dotted name is one of our modules or folders."""
    return name in MODULES or any(module.startswith(f"{name}.") for module in MODULES)


def walk(node: ast.AST, is_deferred: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Yields every node below, and whether importing the file leaves it aside.

    Importing a file runs neither the bodies of functions nor what stands under TYPE_CHECKING.
    """
    for child in ast.iter_child_nodes(node):
        yield child, is_deferred
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_for_mypy = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        yield from walk(child, is_deferred or is_function or is_for_mypy)


@functools.cache
def nodes(file: Path) -> list[tuple[ast.AST, bool]]:
    """All of `walk` for a file, which is read once."""
    return list(walk(ast.parse(file.read_text(encoding="utf-8"))))


@functools.cache
def imports(file: Path) -> list[tuple[str, bool]]:
    """Lists (full module name, is deferred); `from a import b` is a.b where that is a module."""
    found = []
    for node, is_deferred in nodes(file):
        if isinstance(node, ast.Import):
            found += [(alias.name, is_deferred) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file.name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.append((full if full in MODULES else node.module, is_deferred))
    return found


@functools.cache
def graph() -> dict[str, set[str]]:
    """The modules that each module imports, inside functions too."""
    return {
        module: {name for name, _ in imports(file) if name in MODULES and name != module}
        for module, file in MODULES.items()
    }


def arrows(edges: dict[str, set[str]]) -> set[tuple[str, str]]:
    """The pairs of different rooms of which the first imports the second."""
    pairs = {(room(module), room(name)) for module, names in edges.items() for name in names}
    return {(above, below) for above, below in pairs if above != below}


def upward(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that do not point to a lower floor or stay in their room."""
    return [
        (module, name)
        for module, names in sorted(edges.items())
        for name in sorted(names)
        if room(module) != room(name) and FLOORS[room(module)] <= FLOORS[room(name)]
    ]


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that reach each other, by the transitive closure of the imports."""
    reached = {module: set(names) for module, names in edges.items()}
    for middle in edges:
        for module in edges:
            if middle in reached[module]:
                reached[module] |= reached[middle]
    groups = {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in edges
    }
    return sorted(list(group) for group in groups if group)


def height(name: str, rooms: set[tuple[str, str]]) -> int:
    """The number of rooms on the longest way down from a room, itself included."""
    below = [low for high, low in rooms if high == name and FLOORS[low] < FLOORS[name]]
    return 1 + max((height(low, rooms) for low in below), default=0)


def main() -> None:
    """Prints every floor with its rooms, from the top, and the counts."""
    edges = graph()
    rooms = arrows(edges)
    for floor, names in reversed(list(enumerate(ORDER))):
        for name in names:
            modules = sum(room(module) == name for module in MODULES)
            below = sorted((low for high, low in rooms if high == name), key=FLOORS.__getitem__)
            print(f"{floor:2}  {name:12} {modules:3}  {' '.join(below)}")
    up, rings = upward(edges), circles(edges)
    floors = max(height(name, rooms) for name in FLOORS)
    print(f"\n{len(FLOORS)} rooms, {len(MODULES)} modules, {floors} floors, {len(rooms)} arrows")
    print(f"{len(up)} arrows up, {len(rings)} circles")
    for module, name in up:
        print(f"  up: {module} -> {name}")
    for ring in rings:
        print(f"  circle: {' '.join(ring)}")


if __name__ == "__main__":
    main()
