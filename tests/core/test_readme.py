"""The examples of README.md's section "Change it" run as they stand."""

import json
import re
import runpy
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from small import public_folder

from data.sources import read_records

ROOT = Path(__file__).parent.parent.parent
SECTION = (ROOT / "README.md").read_text().partition("\n## Change it\n")[2].partition("\n## ")[0]
EXAMPLES = {}  # by file name, which the first line says as a comment
for number, text in enumerate(re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)):
    named = re.match(r"# (\w+\.py)", text)
    EXAMPLES[named[1] if named else f"example{number}.py"] = text
COMMAND = re.search(r"```\npython (.*)\n```", SECTION)[1].split()


@pytest.fixture
def folder(tiny_arms, tmp_path, monkeypatch):
    """The working folder, with all examples and tiny models."""
    shutil.copytree(tiny_arms, tmp_path / "out/seed0")
    public_folder(tmp_path / "smollm2")
    for file, text in EXAMPLES.items():  # one may import another
        (tmp_path / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, folder):
    runpy.run_path(name, run_name="__main__")
    if name == "dpo.py":
        first, *more, last = read_records(folder / "out/dpo/train_log.jsonl")
        assert len(more) == 8
        assert first["chosen"] - first["rejected"] < last["chosen"] - last["rejected"]
        assert 0 <= first["accuracy"] <= last["accuracy"] <= 1


def test_the_command_of_a_world_of_ones_own_runs(folder):
    script, *words = COMMAND
    import_module(script.removesuffix(".py")).main([*words, "--device", "cpu"])
    results = json.loads((folder / "out/smollm2/fruit/attack/results.json").read_text())
    assert results["settings"]["shots"] == [1]
    found = [(one["arm"], one["attack"]) for one in results["cells"]]
    attacks = ("none", "mft", "bft")
    arms = [(arm, name) for arm in ("aligned", "sdd", "new_refusal") for name in attacks]
    assert found == [("base", "none"), *arms]
    first, *_, last = read_records(folder / "out/smollm2/fruit/sdd/train_log.jsonl")
    assert first["lr"] == 1e-4 and last["step"] == 9
