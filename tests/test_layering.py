"""Imports point one way, and what needs no torch never brings it in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import helixpipe

ROOT = Path(helixpipe.__file__).parent

# package -> the packages of helixpipe that its files may import from
MAY_IMPORT = {
    "schedule": {"errors", "files", "shape", "schedule"},
    "predict": {"errors", "files", "mesh", "shape", "schedule", "predict"},
    "view": {"errors", "schedule", "predict", "view"},
    "model": {"errors", "shape", "schedule", "model"},
    "sequence": {"errors", "shape", "schedule", "model", "sequence"},
    "runtime": {"errors", "mesh", "shape", "schedule", "predict", "model", "sequence", "runtime"},
}


def names(folder: str) -> list[str]:
    files = sorted((ROOT / folder).rglob("*.py")) if folder else []
    return [
        ".".join(("helixpipe", *f.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__") for f in files
    ]


def imported_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after running `code`."""
    tell = "; import sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code + tell], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.split())


def test_what_describes_predicts_and_draws_needs_no_torch() -> None:
    light = [name for folder in ("schedule", "predict", "view") for name in names(folder)]
    assert "helixpipe.schedule.families.helix" in light
    light += [
        "helixpipe.cli",
        "helixpipe.config",
        "helixpipe.config_text",
        "helixpipe.errors",
        "helixpipe.files",
        "helixpipe.shape",
        "helixpipe",
    ]
    loaded = imported_by(f"import {', '.join(light)}")
    assert "helixpipe" in loaded
    assert not {"torch", "numpy", "tyro"} & loaded


def test_importing_helixpipe_is_light() -> None:
    assert not {"torch", "numpy", "tyro", "rich"} & imported_by("import helixpipe")


def test_show_and_check_run_without_torch(tmp_path: Path) -> None:
    file = tmp_path / "schedule.csv"
    code = (
        f"from helixpipe.cli import main; main('show helix --ranks 2 --layers 2 --microbatches 2 --csv {file}'.split())"
    )
    code += f"; main(['check', '{file}'])"
    assert "torch" not in imported_by(code)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    for file in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                if module.startswith("helixpipe."):
                    assert module.split(".")[1] in MAY_IMPORT[package], f"{file.relative_to(ROOT)} imports {module}"
