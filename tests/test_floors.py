"""The house's shape: rooms on floors, each importing only from below, no exception; and a light front door."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "lead_ds"

FLOORS = (
    ("errors",),
    ("settings",),
    ("io", "kernels", "doctor"),
    ("relevance",),
    ("losses",),
    ("data.collections", "report"),
    ("data.groups", "engine.distributed"),
    ("data.tokens", "data.taught", "engine.records"),
    ("data.reads",),
    ("data.batches", "prepare"),
    ("models",),
    ("retrieval", "teachers"),
    ("config",),
    ("plan", "engine.training", "demo", "pipeline"),
    ("face",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SPLIT = ("data", "engine")  # folders whose parts are rooms of their own


def room_of(module: str) -> str:
    """The room of a dotted module name without the package's own."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] in SPLIT and len(parts) > 1 else parts[0]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Rooms that a file imports from, wherever in it the import stands."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    modules = {name.removeprefix("lead_ds.") for name in names if name.startswith("lead_ds.")}
    return {room_of(module) for module in modules} & FLOOR.keys()


def files() -> list[Path]:
    return [path for path in ROOT.rglob("*.py") if module_of(path) not in ("", *SPLIT)]


def test_every_file_has_a_floor() -> None:
    rooms = {room_of(module_of(path)) for path in files()}
    assert rooms == FLOOR.keys(), f"no floor for {rooms - FLOOR.keys()}, no room {FLOOR.keys() - rooms}"


def test_imports_point_downwards() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} ({room}) imports {other}"
        for path in files()
        for room in [room_of(module_of(path))]
        for other in imports_of(path) - {room}
        if FLOOR[other] >= FLOOR[room]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_files() -> None:
    """Wherever in a file the import stands; those for type checkers alone are never run."""
    known = {module_of(path): path for path in ROOT.rglob("*.py")}
    arrows: dict[str, set[str]] = {}
    for module, path in known.items():
        found: set[str] = set()
        tree = ast.parse(path.read_text("utf-8"))
        checked = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ]
        never = {inner for node in checked for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node not in never and (node.module or "").startswith("lead_ds"):
                base = (node.module or "").removeprefix("lead_ds").lstrip(".")
                found |= {
                    name for name in (f"{base}.{alias.name}".lstrip(".") for alias in node.names) if name in known
                }
                found |= {base} & known.keys()
        arrows[module] = {other for other in found - {module} if not module.startswith(f"{other}.")}
    state: dict[str, int] = {}

    def visit(module: str, trail: list[str]) -> None:
        assert state.get(module) != 1, " -> ".join([*trail[trail.index(module) :], module])
        if module in state:
            return
        state[module] = 1
        for other in arrows[module]:
            visit(other, [*trail, module])
        state[module] = 2

    for module in known:
        visit(module, [])


def test_kernels_import_nothing_of_the_package() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert imports_of(path) <= {"kernels"}, path


MOST_PARAMETERS = 8
# Signatures that other code was promised.
PROMISED = {"attention_kl", "grouped_attention_kl", "interaction_attention", "layer_relevance_kl"}


def commands() -> set[str]:
    """The functions that are commands: each of their parameters is an option of the command line."""
    from lead_ds.cli.main import app

    found = [command.callback for command in app.registered_commands]
    return {f"{function.__module__}.{function.__qualname__}" for function in found if function is not None}


def functions(node: ast.AST, inside: ast.ClassDef | None = None) -> Iterator[tuple[ast.FunctionDef, bool]]:
    """Every function below a node, and whether it takes tensors by place for Triton or autograd."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            jitted = any("triton.jit" in ast.unparse(decorator) for decorator in child.decorator_list)
            yield child, jitted or (inside is not None and any("autograd" in ast.unparse(b) for b in inside.bases))
        yield from functions(child, child if isinstance(child, ast.ClassDef) else inside)


def parameters(function: ast.FunctionDef) -> int:
    """How many a caller sees."""
    taken = function.args
    named = [one.arg for one in (*taken.posonlyargs, *taken.args)]
    named = named[1:] if named[:1] in (["self"], ["cls"]) else named
    return len(named) + len(taken.kwonlyargs) + sum(one is not None for one in (taken.vararg, taken.kwarg))


def test_no_function_takes_more_than_eight_parameters() -> None:
    known = commands()
    wrong = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name} takes {parameters(function)}"
        for path in ROOT.rglob("*.py")
        for function, by_place in functions(ast.parse(path.read_text("utf-8")))
        if parameters(function) > MOST_PARAMETERS and not by_place and function.name not in PROMISED
        if f"lead_ds.{module_of(path)}.{function.name}" not in known
    ]
    assert not wrong, "\n".join(wrong)


def test_class_variables_tell_their_type() -> None:
    # Pydantic evaluates annotations, and on Python 3.10 a plain ClassVar ends the import of the whole package.
    plain = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "ClassVar"
    ]
    assert not plain, "\n".join(plain)


def test_front_door_is_light() -> None:
    code = (
        "import sys, lead_ds, lead_ds.cli.main;"
        "print([m for m in ('deepspeed', 'triton', 'faiss', 'matplotlib', 'transformers', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
