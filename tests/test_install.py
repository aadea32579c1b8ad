"""requirements.txt alone is enough to run, and says so: no package of the tests slips into run time.

The clean install takes the torch version that is there; if that came from another index than pip's default, set
PIP_EXTRA_INDEX_URL to it.
"""

import ast
import importlib.metadata
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("support", "paper", "demo")
PLACES = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("paper/*.py")]
MODULES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PLACES)


def declared(path: Path) -> set[str]:
    """The packages that a file of requirements names, and those that it includes do."""
    lines = path.read_text().splitlines()
    included = [declared(path.parent / line.removeprefix("-r ")) for line in lines if line.startswith("-r ")]
    return set().union(*included, re.findall(r"^[\w-]+", "\n".join(lines), re.MULTILINE))


def imported(paths) -> set[str]:
    """The packages that files import, at their top or inside a function, but for Python's own and ours."""
    modules = set()
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        modules |= {name.split(".")[0] for name in names}
    ours = {path.stem for path in [*PLACES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("results/**/*.py")]} | {*FOLDERS}
    packages = importlib.metadata.packages_distributions()
    return {packages[module][0].lower().replace("_", "-") for module in modules - ours - sys.stdlib_module_names}


def test_what_is_imported_is_declared_and_what_runs_needs_all_that_is():
    elsewhere = ROOT / "demo" / "with_transformers.py"  # runs in other people's trainers, where those are installed
    runs = {*PLACES, *ROOT.glob("demo/*.py"), *ROOT.glob("results/**/*.py")} - {elsewhere}
    assert imported(runs) - {"matplotlib"} == declared(ROOT / "requirements.txt")  # figures say how to get that one
    assert imported([elsewhere, *ROOT.glob("tests/**/*.py")]) <= declared(ROOT / "tests" / "requirements.txt")


@pytest.mark.slow
def test_every_module_imports_with_requirements_txt_alone(tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    versions = {name: importlib.metadata.version(name) for name in declared(ROOT / "requirements.txt")}
    pinned = [f"{name}=={version.split('+')[0]}" for name, version in versions.items()]  # what is tested here
    (tmp_path / "pinned.txt").write_text("\n".join(pinned))
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "-r",
        ROOT / "requirements.txt",
        "-c",
        tmp_path / "pinned.txt",
    ]
    subprocess.run(install, check=True)
    assert len(MODULES) >= 20
    code = f"import {', '.join(MODULES)}"
    isolated = {"cwd": ROOT, "env": {"PATH": "/usr/bin:/bin"}, "check": True}
    subprocess.run([python, "-c", code], **isolated)
    for script in (["train.py"], ["evaluate.py"], ["-m", "paper.reproduce"], ["-m", "paper.visualize"]):
        subprocess.run([python, *script, "--help"], capture_output=True, **isolated)
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    )
    installed = {line.split("==")[0].lower().replace("_", "-") for line in listed.stdout.splitlines()}
    assert "torch" in installed and not installed & {"transformers", "peft", "accelerate", "datasets", "lm-eval"}
