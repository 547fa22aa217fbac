"""Copy the project for students, with the bodies that belong to the assignments taken out.

    python assignments/make_starter.py OUT              all assignments
    python assignments/make_starter.py OUT --only a3    assignment 3 alone; everything else is solved

The solution is the project itself: STUBS says which bodies belong to which assignment, and each is replaced by `raise
NotImplementedError`. Signature and docstring stay, comments inside the body go. Handouts, adapters and tests are copied
as they are, so handout, stub and solution cannot drift apart.
"""

import argparse
import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUBS = [  # (file, qualified name, assignment, what to write)
    (
        "model.py",
        "RMSNorm.forward",
        "a1",
        "x over its root mean square in fp32, cast, times the weight",
    ),
    ("model.py", "rope_frequencies", "a1", "theta^(-2i/D), slowed as rope_scaling says"),
    ("model.py", "apply_rope", "a1", "turn dimension i together with i + D/2"),
    ("model.py", "Attention.forward", "a1", "grouped queries, RoPE, the cache, packed rows"),
    ("model.py", "Llama.generate", "a1", "greedy answers to prompts of unequal length"),
    (
        "data/chat.py",
        "_encode_parts",
        "a2",
        "ids of texts and special tokens, neighbouring texts joined",
    ),
    ("data/chat.py", "encode_example", "a2", "prompt and response, cut at max_length"),
    ("data/chat.py", "collate", "a2", "pad rows, shift targets, mask all but the response"),
    ("sdd_loss.py", "sdd_loss_reference", "a2", "-log p of the response tokens over global_tokens"),
    ("train.py", "train_step", "a2", "micro-batches that add up, one clip, one step"),
    ("data/tfidf.py", "Tfidf.vector", "a3", "weighted counts at length 1"),
    ("data/tfidf.py", "Tfidf.cosines", "a3", "the cosine of each pair of texts"),
    ("data/pairs.py", "draw_irrelevant", "a3", "random responses until one is irrelevant enough"),
    ("data/worlds.py", "vary_response", "a3", "a response as each of the five modes teaches it"),
    ("attack.py", "fine_tune", "a4", "the attack loop, with a cell for each budget"),
    ("attack.py", "match_tokens", "a4", "benign rows with as many response tokens"),
    ("nanosdd/lora.py", "LoRALinear.forward", "a4", "the frozen layer and its low-rank update"),
    ("nanosdd/lora.py", "LoRALinear.merged", "a4", "the update added to the weight, in fp32"),
    ("data/answers.py", "outcome", "a4", "refuse, broken, complies or off_topic"),
    ("data/town.py", "Town.outcome", "a4", "harm, wrong_recipe, refuse, off_topic or broken"),
    ("nanosdd/split_adamw.py", "split", "a5", "the nearest bf16 and the 16 bits that are left"),
    ("nanosdd/split_adamw.py", "join", "a5", "the fp32 number of two halves"),
    ("nanosdd/split_adamw.py", "round_stochastically", "a5", "one of two neighbours, with mean x"),
    ("nanosdd/split_adamw.py", "_update", "a5", "one AdamW step on the fp32 master"),
    ("lab/defences.py", "booster", "a6", "what flattens the harmful loss in a harmful step"),
    ("lab/defences.py", "deepalign", "a6", "refusals that begin in the middle of a harmful answer"),
    ("lab/defences.py", "simpo", "a6", "a preference for the refusal over the harmful answer"),
]
ASSIGNMENTS = ("a1", "a2", "a3", "a4", "a5", "a6")  # a0 takes no body out
ONE_IS_ENOUGH = ("a6",)  # of its bodies a student chooses one
LEFT_OUT = (
    "grade.json",
    ".ci/",
    ".github/",
    "bench/",
    "tests/",
    "docs/harm.png",
    "docs/mechanism.png",
    "docs/draw_idea.py",
)
KEPT_TESTS = ("tests/conftest.py", "tests/small.py", "tests/assignments/")
NOT_FOR_STUDENTS = (
    "tests/assignments/test_course.py",
    "tests/assignments/test_grade.py",
    "tests/assignments/test_starter.py",
)
SHEET = "assignments/a0.json"  # predictions: students get an empty one


def find_function(source: str, name: str) -> ast.FunctionDef:
    """The node of a function by its qualified name; KeyError where there is none."""
    scope = ast.parse(source).body
    for part in name.split("."):
        node = next((node for node in scope if getattr(node, "name", None) == part), None)
        if node is None:
            raise KeyError(name)
        scope = node.body
    return node


def strip(source: str, name: str, message: str) -> str:
    """The source with one function's body replaced by `raise NotImplementedError(message)`, docstring kept."""
    node, lines = find_function(source, name), source.splitlines(keepends=True)
    first = node.body[0]
    begin = first.lineno - 1  # of the first statement, as an index
    if ast.get_docstring(node, clean=False) is not None:
        begin = first.end_lineno
    else:
        while lines[begin - 1].strip() == "" or lines[begin - 1].lstrip().startswith("#"):
            begin -= 1
    indent = " " * node.body[0].col_offset
    stub = f'{indent}raise NotImplementedError("{message}")\n'
    return "".join(lines[:begin]) + stub + "".join(lines[node.end_lineno :])


def stub_message(assignment: str, name: str, task: str) -> str:
    return f"{assignment}: {name}: {task}"


def stub_table(assignment: str) -> str:
    """The rows of an assignment's handout that say what to write, in Markdown."""
    rows = [
        f"| `{file}` | `{name}` | {task} |" for file, name, of, task in STUBS if of == assignment
    ]
    return "\n".join(["| file | body | what to write |", "|---|---|---|", *rows])


def project_files(root: Path = ROOT) -> list[str]:
    """The tracked files of the project, or all that a fresh copy would have where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0 and listed.stdout:
        return sorted(
            name for name in listed.stdout.split("\0") if name and (root / name).is_file()
        )
    found = (file.relative_to(root) for file in root.rglob("*") if file.is_file())
    return sorted(
        str(file)
        for file in found
        if not any(
            part.startswith(".") or part in ("out", "__pycache__") or part.endswith(".egg-info")
            for part in file.parts
        )
    )


def empty_sheet(sheet: dict) -> dict:
    """A prediction sheet with its questions and without answers."""
    return {
        key: empty_sheet(value)
        if isinstance(value, dict)
        else value
        if key in ("question", "unit")
        else None
        for key, value in sheet.items()
    }


def make_starter(out, stubs=STUBS):
    """Write the starter folder `out`, which must be new or empty. stubs: rows of STUBS to take out."""
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"error: {out} is not empty; name a new folder")
    for name in project_files():
        kept = name.startswith(KEPT_TESTS) and name not in NOT_FOR_STUDENTS
        if kept or not name.startswith(LEFT_OUT):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, out / name)
    for file, name, assignment, task in stubs:
        path = out / file
        path.write_text(strip(path.read_text(), name, stub_message(assignment, name, task)))
    if (out / SHEET).is_file():
        sheet = json.loads((out / SHEET).read_text())
        (out / SHEET).write_text(json.dumps(empty_sheet(sheet), indent=1) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", help="folder to write")
    parser.add_argument(
        "--only",
        choices=("a0", *ASSIGNMENTS, "a7"),
        help="take out this assignment's bodies alone; a0 and a7 have none",
    )
    args = parser.parse_args(argv)
    stubs = [stub for stub in STUBS if args.only in (None, stub[2])]
    make_starter(args.out, stubs)
    first = args.only or ASSIGNMENTS[0]
    print(
        f"{args.out}: {len(stubs)} bodies to write; start with assignments/{first}.md, then\n"
        f"  cd {args.out} && python -m pytest -m {first}"
    )


if __name__ == "__main__":
    sys.exit(main())
