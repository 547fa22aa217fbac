"""The starter: bodies are taken out, all else stays, and each gap fails its own assignment and no
earlier one."""

import ast
import importlib
import re
import subprocess
import sys

import pytest
from lesson import full_marks

from assignments.make_starter import (
    ASSIGNMENTS,
    ROOT,
    STUBS,
    find_function,
    main,
    make_starter,
    strip,
    stub_message,
    stub_table,
)

SOURCE = '''class A:
    def f(self, x):
        """Say it.

        Twice."""
        # how
        y = x  # why
        return y

    def g(self,
          x=1):
        return x


def f(x): # of the module
    return 2
'''
STRIPPED = '''class A:
    def f(self, x):
        """Say it.

        Twice."""
        raise NotImplementedError("a1: f")

    def g(self,
          x=1):
        raise NotImplementedError("a1: g")


def f(x): # of the module
    raise NotImplementedError("a2: f")
'''


def test_strip_keeps_signature_and_docstring_and_drops_comments():
    got = strip(SOURCE, "A.f", "a1: f")
    got = strip(got, "A.g", "a1: g")
    assert strip(got, "f", "a2: f") == STRIPPED
    with pytest.raises(KeyError):
        strip(SOURCE, "A.h", "")


def files_of(folder) -> dict:
    """{name: content} of a folder."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def test_the_starter_holds_what_a_student_needs(tmp_path):
    main([str(tmp_path / "all")])
    files = files_of(tmp_path / "all")
    wanted = {"model.py", "assignments/adapters.py", "assignments/a1.md", "pyproject.toml"}
    wanted |= {"tests/assignments/test_a1.py", "tests/conftest.py", "docs/idea.svg", "lab/study.py"}
    wanted.add("data/chat_templates.json")  # which recognise.py reads
    assert wanted <= files.keys()
    assert not re.search("test_course|test_grade|core/|out/|pycache|jsonl", " ".join(files))
    assert b'"prediction": null' in files["assignments/a0.json"]
    for file, name, assignment, task in STUBS:
        body = find_function(files[file].decode(), name).body
        assert stub_message(assignment, name, task) in ast.unparse(body[-1])
        assert len(body) <= 2
        assert b"assignment" not in files[file]  # the core carries no marks


def test_students_get_nothing_but_the_project_and_no_git_is_needed(tmp_path):
    project = tmp_path / "project"
    make_starter(project, [])
    wanted = files_of(project).keys()
    for name in (".git/config", "venv/lib/site.py", "old/model.py", "harmful_behaviors.csv"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("")
    for name in ("model.safetensors", "notes.md", "data/rows.csv", "assignments/grade.json"):
        (project / name).write_text("")
    command = [sys.executable, project / "assignments/make_starter.py", tmp_path / "starter"]
    first, again = (
        subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True) for _ in range(2)
    )
    assert first.returncode == 0 and files_of(tmp_path / "starter").keys() == wanted
    assert again.returncode == 2 and again.stderr.startswith("error: ")
    assert again.stderr.endswith("is not empty; name a new folder\n")


@pytest.mark.parametrize("only", ["a0", "a3"])
def test_only_leaves_everything_else_solved(only, tmp_path):
    main([str(tmp_path / "one"), "--only", only])
    files = files_of(tmp_path / "one")
    changed = {file for file in files if files[file] != (ROOT / file).read_bytes()}
    own = {file for file, _, assignment, _ in STUBS if assignment == only}
    assert changed == own | {"assignments/a0.json"}


def run_tests(folder, *arguments) -> str:
    """What pytest prints in a folder."""
    command = [sys.executable, "-m", "pytest", "-rf", "-p", "no:randomly", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stdout
    return result.stdout


def test_what_went_wrong_stands_above_the_traceback(tmp_path):
    make_starter(tmp_path / "wrong", [])
    model = tmp_path / "wrong/model.py"
    text = model.read_text()
    text = text.replace("a * cos - b * sin", "a * cos - 2 * b * sin")  # not a classic mistake
    text = text.replace("attend(q, k, v)", "attend(q, k[1:], v)")
    model.write_text(text)
    printed = run_tests(tmp_path / "wrong", "--tb=short", "tests/assignments/test_a1.py")
    lesson, crash = printed.split("RuntimeError:")[:2]
    assert "Lesson: not recognised\n\n  expected     dimension i turned together" in lesson
    assert lesson.count("interleaved RoPE") == 1
    assert "fails too" not in lesson
    said = crash[: crash.index("test_a1[rope] fails too and comes first")]
    assert "where this is expected: the logits of packed rows" in said
    assert "attention.py, line" in said


def gaps() -> list:
    """A pytest parameter for each stub: one by default, a few with --slow, all with --full."""
    marks = {"simpo": (), "apply_rope": pytest.mark.slow, "World.pairs": pytest.mark.slow}
    found = []
    for stub in STUBS:
        name = stub[1]
        found.append(pytest.param(stub, id=name, marks=marks.get(name, pytest.mark.full)))
    return found


@pytest.mark.parametrize("stub", gaps())
def test_a_gap_fails_its_own_assignment_and_no_earlier_one(stub, tmp_path):
    make_starter(tmp_path / "gap", [stub])
    files = [f"tests/assignments/test_{assignment}.py" for assignment in ASSIGNMENTS]
    printed = run_tests(tmp_path / "gap", "--tb=no", *files)
    failed = re.findall(r"^FAILED \S*/test_(a\d)\.py", printed, re.M)
    assert min(failed) == stub[2]


@pytest.mark.parametrize("assignment", ["a0", *ASSIGNMENTS])
def test_a_handout_says_what_the_stubs_and_the_tests_say(assignment):
    text = (ROOT / f"assignments/{assignment}.md").read_text()
    checks = importlib.import_module(f"test_{assignment}").CHECKS
    if assignment != "a0":
        assert stub_table(assignment) in text
    assert "\n".join(f"| `{check.name}` | {check.points} |" for check in checks) in text
    assert set(full_marks(checks).values()) == {100}
    parts = ("**You will understand**", "## Background", "(1)", "**Deliverable**", "\n| 100 | ")
    for part in (*parts, "<details><summary>Hint", f"pytest -m {assignment}"):
        assert part in text, part
    assert len(text.split()) < 1000  # two pages
    assert max(map(len, text.splitlines())) <= 100
