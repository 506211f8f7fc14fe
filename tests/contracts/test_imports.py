"""Imports: data flows one way, nothing goes round, and what must answer at once does not load torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import care_mla

PACKAGE = Path(care_mla.__file__).parent
# A step imports from steps to its left and from the base, which imports from itself alone.
BASE = {
    "",
    "errors",
    "facts",
    "configs",
    "export_config",
    "heal_config",
    "report_config",
    "recipe",
    "workspace",
    "console",
    "factors",
    "forms",
    "budget",
    "matching_plan",
    "serving",
    "device",
    "routers",
    "versions",
    "engines",
    "decoupled_options",
    "matching_options",
    "evaluate_config",
    "bench_config",
}
STEPS = [
    *("families", "profiles", "checkpoint", "plan", "calibrate", "decompose", "allocate", "mla", "export"),
    *("heal", "evaluate", "report", "pipeline", "bench", "cli", "__main__"),
]
# These run before anything is loaded, or run on machines without torch.
LIGHT = [
    *(
        "care_mla",
        "care_mla.errors",
        "care_mla.facts",
        "care_mla.forms",
        "care_mla.configs",
        "care_mla.export_config",
        "care_mla.evaluate_config",
        "care_mla.bench_config",
        "care_mla.recipe",
        "care_mla.budget",
        "care_mla.serving",
        "care_mla.engines",
    ),
    *("care_mla.plan", "care_mla.workspace", "care_mla.console", "care_mla.families"),
    *(f"care_mla.cli.{path.stem}" for path in sorted((PACKAGE / "cli").glob("*.py"))),
]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def step_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(body: list[ast.stmt], *, deep: bool) -> set[str]:
    """Our modules that the statements import; `deep` looks into functions and type-checking blocks too."""
    names: set[str] = set()
    stack: list[ast.AST] = list(body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "care_mla":
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in inner if name in MODULES} or {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name in MODULES}
        if deep or not (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(node)):
            stack.extend(ast.iter_child_nodes(node))
    return names


def imports_of(module: str, *, deep: bool) -> set[str]:
    return imported(ast.parse(MODULES[module].read_text(encoding="utf-8")).body, deep=deep)


@pytest.mark.parametrize("module", MODULES)
def test_no_arrow_points_right(module: str) -> None:
    step = step_of(module)
    assert step in BASE or step in STEPS, f"{module}: give its step a place in this test"
    for name in imports_of(module, deep=True):
        other = step_of(name)
        if step in BASE:
            assert other in BASE, f"{module} is at the base, but imports {name}"
        elif other not in BASE:
            assert STEPS.index(other) <= STEPS.index(step), f"{module} imports {name}, to its right"


def test_no_import_goes_round() -> None:
    edges = {module: imports_of(module, deep=False) - {module} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for name in sorted(edges.get(module, ())):
                visit(name, (*path, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_only_the_console_prints() -> None:
    for module, path in MODULES.items():
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert module == "care_mla.console" or not prints, f"{module} prints"


def loaded_after(code: str) -> set[str]:
    """Top-level packages that a fresh Python has loaded after running some code."""
    script = f"{code}\nimport sys\nsys.stderr.write(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_light_modules_load_neither_torch_nor_transformers() -> None:
    loaded = loaded_after("\n".join(f"import {name}" for name in LIGHT))
    assert not loaded & {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "gguf"}


def test_help_loads_nothing_but_the_list_of_commands() -> None:
    loaded = loaded_after("from care_mla.cli.main import main\nassert main(['--help']) == 0")
    assert not loaded & {"torch", "transformers", "tyro", "yaml", "rich"}


def test_reading_a_checkpoint_does_not_load_transformers() -> None:
    assert "transformers" not in loaded_after("import care_mla.checkpoint.source, care_mla.checkpoint.writer")
