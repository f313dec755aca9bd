"""A room imports only from floors below it, and the front door stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "mlakit"

FLOORS = [
    {"__main__"},
    {"cli"},
    {"api"},
    {"serving", "engines", "comparison"},
    {"conversion.apply", "conversion.verify", "healing", "baselines", "theorem"},
    {"evaluation"},
    {"generation", "conversion", "benching"},
    {"reporting", "data", "inspection"},
    {"nn"},
    {"ops"},
    {"checkpoint", "families", "account", "engines.targets"},
    {"spec", "errors"},
]


def room_of(module: str) -> str:
    """The longest floor name that is ``module`` or one of its parents."""
    names = {name for floor in FLOORS for name in floor}
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        candidate = ".".join(parts[:length])
        if candidate in names:
            return candidate
    pytest.fail(f"{module} is in no room; add it to a floor")


def floor_of(module: str) -> int:
    room = room_of(module)
    return next(index for index, floor in enumerate(FLOORS) if room in floor)


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            found.append((name, path))
    return found


def imported(path: Path) -> set[str]:
    """Names below ``mlakit.`` that a file imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            if node.module == "mlakit" or (SOURCE.parent / node.module.replace(".", "/")).is_dir():
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    below = {name.removeprefix("mlakit.") for name in names if name.startswith("mlakit.")}
    return {name for name in below if _is_module(name)}


def _is_module(name: str) -> bool:
    path = SOURCE.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


@pytest.mark.parametrize("name,path", modules(), ids=lambda value: str(value))
def test_imports_go_down(name: str, path: Path) -> None:
    own = floor_of(name)
    for other in imported(path):
        same_room = room_of(other) == room_of(name) or other.split(".")[0] == name.split(".")[0]
        assert same_room or floor_of(other) > own, f"{name} may not import {other}"


@pytest.mark.parametrize("package,forbidden", [("ops", "transformers"), ("spec", "torch")])
def test_rooms_that_stay_light(package: str, forbidden: str) -> None:
    for name, path in modules():
        if name.split(".")[0] == package:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    found.append(node.module or "")
                assert not any(f.split(".")[0] == forbidden for f in found), f"{name}: {found}"


@pytest.mark.parametrize(
    "statement", ["import mlakit", "import mlakit.cli", "import mlakit.account, mlakit.families"]
)
def test_front_door_is_cheap(statement: str) -> None:
    code = f"import sys; {statement}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_of_every_verb_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from mlakit.cli import app\n"
        "runner = CliRunner()\n"
        "for verb in [None, *(c.name for c in app.registered_commands)]:\n"
        "    result = runner.invoke(app, ([verb] if verb else []) + ['--help'])\n"
        "    assert result.exit_code == 0, (verb, result.output)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
