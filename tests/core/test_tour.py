"""The notebook docs/tour.ipynb: its cells run in order, small, and it is committed as it ran."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from small import public_folder

ROOT = Path(__file__).parent.parent.parent
NOTEBOOK = json.loads((ROOT / "docs/tour.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
# In the place of the notebook's sizes.
SMALL = "ALIGN_STEPS 2, SDD_STEPS 2, ATTACK_STEPS 2, EVERY 1, QUESTIONS 2, SIMILARITY 'tfidf'"
SHORT_ANSWERS = "from data.kitchen import Kitchen; Kitchen.max_new_tokens = 8"


def small_sources() -> list[str]:
    """The sources of the cells that run without Jupyter, at the small size."""
    sources = []
    for cell in CODE:
        if "install" not in cell["metadata"].get("tags", []):
            sources.append("".join(cell["source"]))
    for size in SMALL.split(", "):
        name, value = size.split()
        sources[0], found = re.subn(rf"(?m)^{name} = .*", f"{name} = {value}", sources[0])
        assert found == 1, f"the first cell sets no {name}"
    return sources


def test_the_cells_run_on_a_tiny_model(tmp_path):
    public_folder(tmp_path / "smollm2", context=512)
    file = tmp_path / "tour.py"
    file.write_text("\n".join([SHORT_ANSWERS, *small_sources()]), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    environment["OMP_NUM_THREADS"] = "1"  # as in conftest.py
    done = subprocess.run(
        [sys.executable, file], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert "report seeds have not been run" in done.stdout  # there are no effects in this folder


def test_it_is_committed_as_it_ran():
    assert len(NOTEBOOK["cells"]) <= 25
    counts = [cell["execution_count"] for cell in CODE]
    assert counts == list(range(1, len(CODE) + 1))  # from the first cell to the last, once
    shown = json.dumps([cell["outputs"] for cell in CODE])
    assert "harmful" in shown and not re.search("Traceback|reused|/home/|/root/|/tmp/", shown)
