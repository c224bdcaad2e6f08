"""The house's shape: five floors, each importing only from below, no circle; and a light front door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1] / "lead_ds"

FLOORS = {
    "errors": 0,
    "kernels": 0,
    "config": 1,
    "relevance": 1,
    "data": 1,
    "report": 1,
    "models": 2,
    "losses": 2,
    "plan": 3,  # counts real modules, as models make them
    "retrieval": 3,
    "prepare": 3,
    "engine": 4,
    "cli": 5,
    "demo": 5,
    "pipeline": 5,
    "doctor": 5,
    "__main__": 6,
}

# A floor's rooms may know each other in this one direction.
SAME_FLOOR = {
    ("relevance", "kernels"),
    ("data", "config"),
    ("report", "config"),
    ("prepare", "retrieval"),  # its atomic files and progress bars
    ("cli", "demo"),
    ("cli", "doctor"),
    ("cli", "pipeline"),
}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "lead_ds" else [f"lead_ds.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("lead_ds.") and name.count(".")}
    return rooms & (FLOORS.keys() | {p.stem for p in ROOT.iterdir()})


def test_every_room_has_a_floor() -> None:
    rooms = {p.stem for p in ROOT.iterdir() if (p.suffix == ".py" or p.is_dir()) and not p.stem.startswith("_")}
    assert rooms <= FLOORS.keys(), f"no floor for {rooms - FLOORS.keys()}"


def test_imports_point_downwards() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = room_of(path)
        if room == "__init__":
            continue
        for other in imports_of(path) - {room}:
            if FLOORS[other] >= FLOORS[room] and (room, other) not in SAME_FLOOR:
                wrong.append(f"{path.relative_to(ROOT)} ({room}) imports {other}")
    assert not wrong, "\n".join(wrong)


def test_kernels_import_nothing_of_the_package() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert imports_of(path) <= {"kernels"}, path


def test_front_door_is_light() -> None:
    code = (
        "import sys, lead_ds, lead_ds.cli.main;"
        "print([m for m in ('deepspeed', 'triton', 'faiss', 'matplotlib', 'transformers', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
