"""The starter: bodies are taken out, all else stays, and each gap fails its own assignment and no
earlier one."""

import importlib
import inspect
import re
import shutil
import subprocess
import sys

import pytest
from lesson import full_marks

from assignments import adapters
from assignments.make_starter import ROOT, STUBS, main, make_starter, strip, stub_table

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


TESTS = {f"a{i}": importlib.import_module(f"test_a{i}") for i in range(7)}


def files_of(folder) -> dict:
    """{name: content} of a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A starter of which nothing is taken out. Copy it to change it."""
    folder = tmp_path_factory.mktemp("project")
    make_starter(folder, [])
    return folder


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
        gap = f'raise NotImplementedError("{assignment}: {name}: {task}")'
        assert files[file].decode().count(gap) == 1
        assert b"assignment" not in files[file]  # the core carries no marks


def test_students_get_nothing_but_the_project_and_no_git_is_needed(tmp_path, project):
    wanted = files_of(project).keys()
    project = shutil.copytree(project, tmp_path / "project")
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


def test_what_went_wrong_stands_above_the_traceback(tmp_path, project):
    folder = shutil.copytree(project, tmp_path / "wrong")
    text = (folder / "model.py").read_text()
    text = text.replace("a * cos - b * sin", "a * cos - 2 * b * sin")  # not a classic mistake
    text = text.replace("attend(q, k, v)", "attend(q, k[1:], v)")
    (folder / "model.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "--tb=short", "-p", "no:randomly"]
    command += ["tests/assignments/test_a1.py", "-k", "rope or llama"]
    printed = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    lesson, crash = printed.split("RuntimeError:")[:2]
    assert "Lesson: not recognised\n\n  expected     dimension i turned together" in lesson
    assert lesson.count("interleaved RoPE") == 1
    assert "fails too" not in lesson
    said = crash[: crash.index("test_a1[rope] fails too and comes first")]
    assert "where this is expected: the logits of packed rows" in said
    assert "attention.py, line" in said


def gap(*_, **__):
    raise NotImplementedError


@pytest.mark.parametrize(
    "stub",
    [pytest.param(stub, marks=pytest.mark.slow if i % 9 else ()) for i, stub in enumerate(STUBS)],
    ids=lambda stub: stub[1],
)
def test_a_gap_fails_its_own_assignment_and_no_earlier_one(stub, monkeypatch):
    file, name, wanted, _ = stub
    function = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        function = getattr(function, part)
    monkeypatch.setattr(inspect.unwrap(function), "__code__", gap.__code__)  # wherever it is bound
    with pytest.raises(NotImplementedError):
        for reached in TESTS:
            for check in TESTS[reached].CHECKS:
                check.run(adapters)
    assert reached == wanted


@pytest.mark.parametrize("assignment", TESTS)
def test_a_handout_says_what_the_stubs_and_the_tests_say(assignment):
    text = (ROOT / f"assignments/{assignment}.md").read_text()
    checks = TESTS[assignment].CHECKS
    if assignment != "a0":
        assert stub_table(assignment) in text
    assert "\n".join(f"| `{check.name}` | {check.points} |" for check in checks) in text
    assert set(full_marks(checks).values()) == {100}
