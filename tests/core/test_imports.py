"""Who may import whom: imports run one way, from floor to floor."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FOLDERS = "nanosdd data lab bench assignments".split()
SCRIPTS = "model sdd_loss eval train attack".split()
OURS = {*FOLDERS, *SCRIPTS, "tests"}


def modules(folder: str) -> list[str]:
    """The dotted names of a folder's modules."""
    return [f"{folder}.{file.stem}" for file in sorted((ROOT / folder).glob("*.py"))]


def imports(module: str) -> set[str]:
    """What a module imports of the project anywhere in its text, as dotted names."""
    names = set()
    path = ROOT / (module.replace(".", "/") + ".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            if node.module in FOLDERS:  # from nanosdd import runs
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in OURS}


WORLDS = ["data.town", "data.kitchen", "data.files", "data.worlds"]
CORE = {"nanosdd", "data", "model", "sdd_loss"}
BELOW = dict.fromkeys([*modules("nanosdd"), "model", "sdd_loss"], {"nanosdd"})
BELOW |= dict.fromkeys(modules("data"), {"nanosdd", "data"})
BELOW |= {
    "data.chat_model": CORE,
    "eval": CORE,
    "train": CORE | {"eval"},
    "attack": CORE | {"eval", "train"},
}


@pytest.mark.parametrize("module", BELOW)
def test_a_module_imports_only_floors_below(module):
    found = imports(module)
    assert {name.split(".")[0] for name in found} <= BELOW[module]
    assert module not in WORLDS or "data.chat_model" not in found  # a world loads no model
