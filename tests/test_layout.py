"""The house: what stands at the top, how long the six files are, who imports whom."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parents[1]
SIX = ("model", "lora", "sstoken", "data", "train", "evaluate")
TOP = {
    *("README.md", "requirements.txt", "LICENSE", "pyproject.toml", *(f"{name}.py" for name in SIX)),
    *("support", "paper", "tests", "demo", "results"),
}
MADE = {"runs", "models", "__pycache__", "explorer.html"}  # by the commands of the README, and ignored by git
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("paper/*.py")])
    if path.name != "__init__.py"
}
# Who may import whom: only what stands further left, or in the same place
ORDER = [
    {name for name in MODULES if name.startswith("support.")},
    {"model", "sstoken"},
    {"lora"},
    {"data"},
    {"paper.objectives", "paper.auto", "paper.frozen", "paper.grading"},
    {"paper.self_evolving"},
    {"paper.baselines", "paper.benchmarks"},
    {"train", "evaluate", "paper.tables"},
    {"paper.curves", "paper.ds2", "paper.visualize", "paper.reproduce"},
]


def lines(name: str) -> list[str]:
    return MODULES[name].read_text(encoding="utf-8").splitlines()


def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imports(name: str) -> set[str]:
    """The project's modules that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys()


def functions(name: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef)}


def length(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def test_the_top_holds_what_a_reader_looks_for_and_nothing_else():
    assert {path.name for path in ROOT.iterdir() if path.name[0] != "."} - MADE == TOP


def test_the_six_can_be_read_in_an_evening():
    sizes = {name: len(lines(name)) for name in SIX}
    assert max(sizes.values()) <= 400, sizes
    assert sum(sizes.values()) <= 1712 and sizes["lora"] + sizes["sstoken"] <= 470, sizes
    text = [line for name in SIX for line in lines(name) if line.strip()]
    assert max(map(len, text)) <= 120
    assert sum(map(len, text)) / len(text) <= 60.83, "packed denser than they were when they were twice as long"


def test_sstoken_needs_torch_alone_and_the_trainer_that_shows_it_is_short():
    nodes = [node for node in ast.walk(tree("sstoken")) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"torch"}
    assert len((ROOT / "demo" / "with_transformers.py").read_text(encoding="utf-8").splitlines()) <= 80


def test_imports_point_one_way_and_never_in_a_circle():
    place = {name: i for i, names in enumerate(ORDER) for name in names}
    assert place.keys() == MODULES.keys(), "a module without a place"
    found = {name: imports(name) for name in MODULES}
    wrong = [f"{name} imports {other}" for name in found for other in found[name] if place[other] > place[name]]
    assert not wrong
    list(TopologicalSorter(found).static_order())  # raises CycleError
    assert found["model"] and found["train"] >= {"model", "lora", "data", "sstoken"}  # so that it sees imports at all


@pytest.mark.parametrize("name", SIX)
def test_no_gradient_is_written_by_hand_in_the_six(name):
    bases = [
        ast.unparse(base) for node in ast.walk(tree(name)) if isinstance(node, ast.ClassDef) for base in node.bases
    ]
    assert not [base for base in bases if base.split(".")[-1] == "Function"]


def test_the_model_file_starts_with_its_subject():
    classes = [node for node in tree("model").body if isinstance(node, ast.ClassDef)]
    assert classes[0].name == "Config" and classes[0].lineno <= 25
    assert classes[1].lineno <= 50


def test_algorithm_1_fits_on_a_screen():
    loop = next(
        n for n in ast.walk(functions("train")["train"]) if isinstance(n, ast.For) and "step" in ast.unparse(n.target)
    )
    assert length(loop) <= 50
    named = " ".join(re.findall(r"# .*Alg\. 1, lines? ([\d, to and]+)", "\n".join(lines("train"))))
    assert set(map(int, re.findall(r"\d+", named))) >= {2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13}
    assert not [node for node in ast.walk(loop) if isinstance(node, ast.If)], "a branch in the loop"


@pytest.mark.parametrize("name", [name for name in MODULES if "main" in functions(name)])
def test_a_script_s_main_is_a_page(name):
    assert length(functions(name)["main"]) <= 60


def test_requirements_name_nothing_new():
    named = set(re.findall(r"^[a-z0-9-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    known = {"torch", "safetensors", "tokenizers", "huggingface-hub", "jinja2", "numpy", "pyarrow", "tqdm"}
    assert named <= known


def test_the_first_group_of_help_has_the_ten_flags_that_a_first_reader_needs():
    parser = train.make_parser()
    first = [action.option_strings[0] for action in parser.groups["to begin with"]._group_actions]
    assert len(first) == 10 and {"--model", "--data", "--rho", "--gamma", "--method", "--out"} <= set(first)
    text = parser.format_help()
    assert text.index("to begin with") < 320 and max(map(text.index, first)) < text.index("--layer")


def readme(folder: str = "") -> str:
    return (ROOT / folder / "README.md").read_text(encoding="utf-8")


def test_the_readmes_are_short_and_say_the_size_of_the_six():
    words = {folder: len(readme(folder).split()) for folder in ("", "support", "paper", "results")}
    assert words[""] <= 1500 and sum(words.values()) <= 7000, words
    assert f"six files, {sum(len(lines(name)) for name in SIX):,} lines" in " ".join(readme().split())


def test_what_stands_around_the_six_is_small():
    sizes = {name: len(lines(name)) for name in MODULES if "." in name}
    assert max(sizes.values()) <= 400
    for folder, most, width in (("support", 3080, 65.9), ("paper", 2300, 63.1)):
        text = [line for name in sizes if name.startswith(folder) for line in lines(name)]
        assert len(text) <= most, f"{folder}/ has {len(text)} lines"
        text = [line for line in text if line.strip()]
        assert sum(map(len, text)) / len(text) <= width, f"{folder}/ is packed denser than it was"
    studies = (ROOT / "results").rglob("*.py")
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in studies) < 735


def test_the_readme_s_loop_is_the_one_that_runs():
    loop = next(n for n in ast.walk(functions("train")["train"]) if isinstance(n, ast.For))
    assert "\n".join(lines("train")[loop.lineno - 1 : loop.end_lineno]) in readme()


def test_each_box_of_the_drawing_is_a_function():
    drawing = (ROOT / "paper" / "step.svg").read_text(encoding="utf-8")
    named = re.findall(r'class="name"[^>]*>([^<]+)<', drawing)
    assert named[0] == "row" and len(named) == 13 and "](paper/step.svg)" in readme()
    known = {name for module in SIX for name in functions(module)} | {"conversations"}  # data's, from support
    assert {name.rpartition(".")[2] for name in named[1:]} <= known


@pytest.mark.parametrize("readme", ["README.md", "paper/README.md", "support/README.md", "results/README.md"])
def test_what_a_readme_links_to_and_names_is_there(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", text):
        path = (ROOT / readme).parent / target if target else ROOT / readme
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"(?m)^#+ (.*)", path.read_text(encoding="utf-8"))
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    tests = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    for name in re.findall(r"`(test_\w+?)(?:_?\.\.\.)?`", text):
        assert f"def {name}" in tests, name
    for path in re.findall(r"python (\S+\.py)|`((?:tests|demo|support|paper)/[\w/]+\.\w+)`", text):
        assert (ROOT / "".join(path)).exists(), path
