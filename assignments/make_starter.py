"""Copy the project for students, with the bodies that belong to the assignments taken out.

    python assignments/make_starter.py OUT              all assignments
    python assignments/make_starter.py OUT --only a3    assignment 3 alone; all else is solved

The solution is the project itself: STUBS says which bodies belong to which assignment, and each is
replaced by `raise NotImplementedError`. Signature and docstring stay, comments inside the body go.
Handouts, adapters and tests are copied as they are, so handout, stub and solution cannot drift
apart.
"""

import argparse
import ast
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanosdd.errors import InputError, run_script  # noqa: E402

STUBS = [  # (file, qualified name, assignment, what to write)
    ("model.py", "RMSNorm.forward", "a1", "x over its root mean square in fp32, cast, weighted"),
    ("model.py", "apply_rope", "a1", "turn dimension i together with i + D/2"),
    ("model.py", "Attention.forward", "a1", "heads, RoPE on q and k, attend, project"),
    ("nanosdd/attention.py", "PackedRows.row_by_row", "a1", "causal attention within each row"),
    ("nanosdd/attention.py", "KVCache.read_token", "a1", "keep k and v, attend to what is visible"),
    ("model.py", "Llama.generate", "a1", "greedy answers to prompts of unequal length"),
    ("data/chat.py", "_encode", "a2", "ids of texts and special tokens, neighbouring texts joined"),
    ("data/chat.py", "encode_example", "a2", "prompt and response, cut at max_length"),
    ("data/chat.py", "collate", "a2", "packed rows, and where their targets are predicted"),
    ("sdd_loss.py", "sdd_loss", "a2", "-log p of the response tokens over global_tokens"),
    ("train.py", "train_step", "a2", "micro-batches that add up, one clip, one step"),
    ("data/tfidf.py", "Tfidf.vector", "a3", "weighted counts at length 1"),
    ("data/tfidf.py", "Tfidf.cosines", "a3", "the cosine of each pair of texts"),
    ("data/worlds.py", "irrelevant_pairs", "a3", "random responses until each is irrelevant"),
    ("data/worlds.py", "World.pairs", "a3", "the pairs of every mode"),
    ("attack.py", "fine_tune", "a4", "the attack loop, with a cell for each budget"),
    ("attack.py", "match_tokens", "a4", "benign rows with as many response tokens"),
    ("nanosdd/lora.py", "LoRALinear.forward", "a4", "the frozen layer and its low-rank update"),
    ("nanosdd/lora.py", "LoRALinear.merged", "a4", "the update added to the weight, in fp32"),
    ("data/answers.py", "outcome", "a4", "refuse, broken, complies or off_topic"),
    ("data/town.py", "Town.outcome", "a4", "harm, wrong_recipe, refuse, off_topic or broken"),
    ("nanosdd/split_adamw.py", "split", "a5", "the nearest bf16 and the 16 bits that are left"),
    ("nanosdd/split_adamw.py", "join", "a5", "the fp32 number of two halves"),
    ("nanosdd/split_adamw.py", "round_stochastically", "a5", "one of two neighbours, with mean x"),
    ("nanosdd/split_adamw.py", "SplitAdamW.update", "a5", "one AdamW step on the fp32 master"),
    ("lab/defences.py", "booster", "a6", "what flattens the harmful loss in a harmful step"),
    ("lab/defences.py", "deepalign", "a6", "refusals that begin in the middle of a harmful answer"),
    ("lab/defences.py", "simpo", "a6", "a preference for the refusal over the harmful answer"),
]
ASSIGNMENTS = ("a1", "a2", "a3", "a4", "a5", "a6")  # a0 takes no body out
ONE_IS_ENOUGH = ("a6",)  # of its bodies a student chooses one
PROJECT = """
README.md LICENSE CITATION.cff CONTRIBUTING.md CHANGELOG.md pyproject.toml requirements.txt
.gitignore model.py sdd_loss.py train.py attack.py eval.py
assignments/*.py assignments/*.md assignments/a0.json bench/*.py bench/*.sh data/*.py
data/chat_templates.json docs/*.md docs/*.svg docs/tuning/*.json lab/*.py nanosdd/*.py tests/*.py
tests/assignments/conftest.py tests/assignments/lesson.py tests/assignments/wrong_a?.py
tests/assignments/test_a?.py tests/assignments/test_open.py tests/assignments/test_theory.py
""".split()  # what students get; nothing else is copied
SHEET = "assignments/a0.json"  # predictions: students get an empty one


def find_function(source: str, name: str) -> ast.FunctionDef:
    """The node of a function by its qualified name; KeyError where there is none."""
    node = ast.parse(source)
    for part in name.split("."):
        named = {getattr(child, "name", None): child for child in node.body}
        node = named[part]
    return node


def strip(source: str, name: str, message: str) -> str:
    """The source with one function's body replaced by `raise NotImplementedError(message)`."""
    node = find_function(source, name)
    lines = source.splitlines(keepends=True)
    first = node.body[0]
    begin = first.lineno - 1
    if ast.get_docstring(node):
        begin = first.end_lineno
    stub = f'{" " * first.col_offset}raise NotImplementedError("{message}")\n'
    return "".join([*lines[:begin], stub, *lines[node.end_lineno :]])


def stub_message(assignment: str, name: str, task: str) -> str:
    return f"{assignment}: {name}: {task}"


def stub_table(assignment: str) -> str:
    """The rows of an assignment's handout that say what to write, in Markdown."""
    rows = ["| file | body | what to write |", "|---|---|---|"]
    for file, name, of, task in STUBS:
        if of == assignment:
            rows.append(f"| `{file}` | `{name}` | {task} |")
    return "\n".join(rows)


def project_files() -> list[str]:
    """The files of the project that students get."""
    found = []
    for pattern in PROJECT:
        for path in sorted(ROOT.glob(pattern)):
            if not path.is_symlink():
                found.append(str(path.relative_to(ROOT)))
    return found


def make_starter(out, stubs=STUBS):
    """Write the starter folder `out`, new or empty. stubs: rows of STUBS to take out."""
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; name a new folder")
    for name in project_files():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, out / name)
    for file, name, assignment, task in stubs:
        source = (out / file).read_text(encoding="utf-8")
        gap = strip(source, name, stub_message(assignment, name, task))
        (out / file).write_text(gap, encoding="utf-8")
    sheet = json.loads((ROOT / SHEET).read_text(encoding="utf-8"))
    for entry in sheet.values():
        for answer in {"prediction", "found", "answer"} & entry.keys():
            entry[answer] = None
    (out / SHEET).write_text(json.dumps(sheet, indent=1) + "\n")


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("out", help="folder to write")
    p.add_argument(
        "--only",
        choices=("a0", *ASSIGNMENTS, "a7"),
        help="take out this assignment's bodies alone; a0 and a7 have none",
    )
    args = p.parse_args(argv)
    stubs = [stub for stub in STUBS if args.only in (None, stub[2])]
    make_starter(args.out, stubs)
    first = args.only or ASSIGNMENTS[0]
    print(
        f"{args.out}: {len(stubs)} bodies to write; start with assignments/{first}.md, then\n"
        f"  cd {args.out} && python -m pytest -m {first}"
    )


if __name__ == "__main__":
    run_script(main)
