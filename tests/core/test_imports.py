"""Who may import whom: imports run one way, and reading train.py needs few other lines."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from nanosdd.runs import source_files

ROOT = Path(__file__).parent.parent.parent
PROBE = """
import importlib, sys
from pathlib import Path
root = Path.cwd()
for name in sys.argv[1:]:
    importlib.import_module(name)
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(root):
            print(name, Path(file).relative_to(root))
"""


@pytest.fixture(scope="module")
def loaded():
    """(script, project file that is loaded after its import), for one script after the other in one process."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE, "train", "eval", "attack"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {tuple(line.split()) for line in result.stdout.splitlines()}


def test_the_core_loads_nothing_of_the_study(loaded):
    assert {("train", "train.py"), ("eval", "eval.py"), ("attack", "attack.py")} <= loaded
    assert not [
        file for _, file in loaded if file.split("/")[0] in ("lab", "bench", "assignments", "tests")
    ]


def test_train_needs_few_lines(loaded):
    lines = {
        file: len((ROOT / file).read_text().splitlines())
        for script, file in loaded
        if script == "train"
    }
    assert "attack.py" not in lines and sum(lines.values()) <= 3130, lines


def outside_imports(file):
    """What a file imports that is not of the standard library; of the project's own, as dotted names."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= set(parts) if node.module in ("nanosdd", "data") else {node.module}
    return {
        name if name.startswith(("nanosdd", "data")) else name.split(".")[0]
        for name in names
        if name.split(".")[0] not in sys.stdlib_module_names
    }


def test_the_loss_and_the_model_stand_alone():
    assert outside_imports("sdd_loss.py") == {"torch"}
    assert outside_imports("model.py") == {
        "torch",
        "nanosdd.checkpoint",
        "nanosdd.errors",
        "nanosdd.generate",
    }
    assert set(source_files("model.py")) == {
        "model.py",
        "nanosdd/checkpoint.py",
        "nanosdd/errors.py",
        "nanosdd/generate.py",
    }


def test_shared_parts_do_not_know_the_scripts():
    files = [
        str(file.relative_to(ROOT))
        for folder in ("data", "nanosdd")
        for file in (ROOT / folder).glob("*.py")
    ]
    assert len(files) > 10
    for file in files:
        found = set(source_files(file))
        others = {other for other in found if other.split("/")[0] not in ("data", "nanosdd")}
        use_a_model = found & {"nanosdd/capability.py", "nanosdd/chat_model.py"}
        assert others <= ({"model.py"} if use_a_model else set()), file
