"""requirements.txt alone is enough to run: no package of the tests slips into run time."""

import importlib.metadata
import re
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLACES = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("paper/*.py")]
MODULES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PLACES)


@pytest.mark.slow
def test_every_module_imports_with_requirements_txt_alone(tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    names = re.findall(r"^[a-z-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    pinned = [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in names]  # what is tested here
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
