"""The notebook docs/tour.ipynb: its cells run in order, small, and it is committed as it ran."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from small import public_folder

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs/tour.ipynb").read_text(encoding="utf-8")
NOTEBOOK = json.loads(TEXT)
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SMALL = {  # in the place of the notebook's sizes
    "SIMILARITY": "'tfidf'",
    "ALIGN_STEPS": "2",
    "SDD_STEPS": "2",
    "SHOTS": "3",
    "ATTACK_STEPS": "2",
    "EVERY": "1",
    "QUESTIONS": "2",
    "OWN_STEPS": "2",
}
SHORT_ANSWERS = "from data.kitchen import Kitchen; Kitchen.max_new_tokens = 8"
SHOWS = re.compile(r"(?m)^( {4})?(\w+ = )?(print|train|follow)\(")  # not in a function's body


def small_sources() -> list[str]:
    """The sources of the cells that run without Jupyter, at the small size."""
    sources = []
    for cell in CODE:
        if "install" not in cell["metadata"].get("tags", []):
            sources.append("".join(cell["source"]))
    for name, value in SMALL.items():
        sources[0], found = re.subn(rf"(?m)^{name} = .*", f"{name} = {value}", sources[0])
        assert found == 1, f"the first cell sets no {name}"
    return sources


def output_text(cell) -> str:
    """All that a cell shows as text."""
    parts = []
    for output in cell["outputs"]:
        parts += output.get("text", []) + output.get("data", {}).get("text/plain", [])
    return "".join(parts)


def test_the_cells_run_on_a_tiny_model(tmp_path):
    public_folder(tmp_path / "smollm2", context=512)
    if (ROOT / "docs/effects").is_dir():
        shutil.copytree(ROOT / "docs/effects", tmp_path / "docs/effects")
    file = tmp_path / "tour.py"
    file.write_text("\n".join([SHORT_ANSWERS, *small_sources()]), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "MPLBACKEND": "agg"}
    environment["OMP_NUM_THREADS"] = "1"  # as in conftest.py
    done = subprocess.run(
        [sys.executable, file], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    # Of the study it is committed with what the study says now; else run the last cell again.
    assert done.stdout.endswith(output_text(CODE[-1]))


def test_it_is_short_and_written_plainly():
    assert len(NOTEBOOK["cells"]) <= 25
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    assert TEXT == json.dumps(NOTEBOOK, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def test_it_is_committed_as_it_ran():
    counts = [cell["execution_count"] for cell in CODE]
    assert counts == list(range(1, len(CODE) + 1))  # from the first cell to the last, once
    assert "error" not in [output["output_type"] for cell in CODE for output in cell["outputs"]]
    for cell in CODE:
        text = output_text(cell)
        assert text or not SHOWS.search("".join(cell["source"]))
        assert not re.search("Traceback|/home/|/root/|/tmp/", text)
