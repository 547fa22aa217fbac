"""The examples of README.md's section "Change it" run as they stand."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SECTION = (ROOT / "README.md").read_text().partition("\n## Change it\n")[2].partition("\n## ")[0]
EXAMPLES = {}  # by file name, which the first line says as a comment
for number, text in enumerate(re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)):
    named = re.match(r"# (\w+\.py)", text)
    EXAMPLES[named[1] if named else f"example{number}.py"] = text


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tiny_arms, tmp_path):
    shutil.copytree(tiny_arms, tmp_path / "out/seed0")
    for file, text in EXAMPLES.items():  # one may import another
        (tmp_path / file).write_text(text)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, name]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
