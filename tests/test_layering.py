"""Imports point one way, and what needs no torch never brings it in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import helixpipe
from helixpipe.parts.kind import KINDS

ROOT = Path(helixpipe.__file__).parent

# package -> the packages of helixpipe that its files may import from
MAY_IMPORT = {
    "data": {"data", "errors", "files"},
    "parts": {"errors", "parts"},
    "schedule": {"errors", "files", "parts", "schedule"},
    "hub": {"errors", "files", "parts", "model", "hub"},
    "predict": {"errors", "files", "mesh", "parts", "hub", "schedule", "predict"},
    "view": {"errors", "parts", "schedule", "predict", "view"},
    "model": {"errors", "parts", "model"},
    "sequence": {"errors", "model", "sequence"},
    "runtime": {"errors", "mesh", "parts", "schedule", "predict", "model", "sequence", "runtime"},
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
    light = [name for folder in ("parts", "schedule", "predict", "view") for name in names(folder)]
    assert "helixpipe.schedule.families.helix" in light
    light += [name for name in names("hub") if name.rsplit(".")[-1] not in ("load", "pickled", "write")]
    assert "helixpipe.hub.folder" in light
    light += [
        "helixpipe.cli",
        "helixpipe.config",
        "helixpipe.config_check",
        "helixpipe.config_text",
        "helixpipe.errors",
        "helixpipe.files",
        "helixpipe",
    ]
    loaded = imported_by(f"import {', '.join(light)}")
    assert "helixpipe" in loaded
    assert not {"torch", "numpy", "tyro"} & loaded


def test_importing_helixpipe_is_light() -> None:
    assert not {"torch", "numpy", "tyro", "rich"} & imported_by("import helixpipe")


def test_preparing_needs_no_torch_and_no_library_before_it_is_used() -> None:
    names_of_data = names("data")
    assert "helixpipe.data.prepare" in names_of_data
    loaded = imported_by(f"import {', '.join(names_of_data)}")
    assert not {"torch", "pyarrow", "zstandard", "tokenizers", "transformers", "jinja2"} & loaded


def test_show_and_check_run_without_torch(tmp_path: Path) -> None:
    file = tmp_path / "schedule.csv"
    code = (
        f"from helixpipe.cli import main; main('show helix --ranks 2 --layers 2 --microbatches 2 --csv {file}'.split())"
    )
    code += f"; main(['check', '{file}'])"
    assert "torch" not in imported_by(code)


def test_a_step_of_a_decoder_loads_no_compiler() -> None:
    """Some harmless calls make torch import its compiler, and sympy with it: more than a second at every rank's start."""
    code = (
        "import torch, helixpipe as hp; shape = hp.ModelShape(layers=1, hidden=8, heads=2, ffn=8, vocabulary=5, "
        "positions='learned', context=4); schedule = hp.build_schedule('1f1b', ranks=1, layers=1, microbatches=1); "
        "tokens = torch.ones(1, 4, dtype=torch.int64); hp.Pipeline(hp.Decoder(shape), schedule).step(tokens, tokens)"
    )
    assert "sympy" not in imported_by(code)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    for file in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                if module.startswith("helixpipe."):
                    assert module.split(".")[1] in MAY_IMPORT[package], f"{file.relative_to(ROOT)} imports {module}"


def names_a_kind(node: ast.AST) -> bool:
    """Whether code decides by the name of a kind of part: a comparison, a case, or a part made by name."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        return any(isinstance(side, ast.Attribute) and side.attr == "kind" for side in sides) and any(
            isinstance(inner, ast.Constant) and inner.value in KINDS for side in sides for inner in ast.walk(side)
        )
    if isinstance(node, ast.MatchValue):
        return isinstance(node.value, ast.Constant) and node.value.value in KINDS
    if isinstance(node, ast.Call):
        return getattr(node.func, "id", "") == "Part" and isinstance(node.args[0], ast.Constant)
    return False


def test_only_the_rooms_of_parts_know_kinds_by_name() -> None:
    """What a part is stands in `parts`, what it computes in `model`; the tape alone calls modules by their kind."""
    told = {
        str(file.relative_to(ROOT))
        for file in sorted(ROOT.rglob("*.py"))
        if file.relative_to(ROOT).parts[0] not in ("parts", "model")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if names_a_kind(node)
    }
    assert told == {"runtime/tape.py"}


def test_every_kind_has_its_two_files() -> None:
    for kind in KINDS:
        assert (ROOT / "parts" / f"{kind}.py").is_file()
        assert (ROOT / "model" / f"{kind}.py").is_file()
