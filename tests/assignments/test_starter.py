"""The starter: bodies are taken out, all else stays, and each gap fails its own assignment and no earlier one."""

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


def test_strip_keeps_signature_and_docstring_and_drops_comments():
    source = '''class A:
    def f(self, x):
        """Say it.

        Twice."""
        # how
        y = x  # why
        return y

    def g(self,
          x=1):

        # nothing is kept of this
        return x


def f(x): # of the module
    return 2
'''
    got = strip(strip(strip(source, "A.f", "a1: f"), "A.g", "a1: g"), "f", "a2: f")
    assert (
        got
        == '''class A:
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
    )
    with pytest.raises(KeyError):
        strip(source, "A.h", "")


@pytest.mark.parametrize("file, name, assignment, task", STUBS, ids=[name for _, name, *_ in STUBS])
def test_every_stub_is_a_body_of_the_project(file, name, assignment, task):
    source, message = (ROOT / file).read_text(), stub_message(assignment, name, task)
    node = find_function(source, name)
    got = strip(source, name, message)
    new = find_function(got, name)
    assert ast.dump(new.args) == ast.dump(node.args) and ast.get_docstring(
        new
    ) == ast.get_docstring(node)
    assert isinstance(new.body[-1], ast.Raise) and len(new.body) <= 2 and assignment in ASSIGNMENTS
    assert max(len(line) for line in got.splitlines() if message in line) <= 120
    assert "assignment" not in source  # the core carries no marks


def test_the_starter_holds_what_a_student_needs(tmp_path, capsys):
    main([str(tmp_path / "all")])
    assert "27 bodies" in capsys.readouterr().out
    names = {
        str(path.relative_to(tmp_path / "all"))
        for path in (tmp_path / "all").rglob("*")
        if path.is_file()
    }
    assert {
        "model.py",
        "assignments/adapters.py",
        "assignments/a1.md",
        "tests/assignments/test_a1.py",
        "tests/conftest.py",
        "pyproject.toml",
        "requirements.txt",
    } <= names
    assert not any(
        "test_course" in name or "test_grade" in name or ".git/" in name or "core/" in name
        for name in names
    )
    assert '"prediction": null' in (tmp_path / "all/assignments/a0.json").read_text()
    with pytest.raises(SystemExit, match="not empty"):
        main([str(tmp_path / "all")])
    for file, name, assignment, task in STUBS:
        assert stub_message(assignment, name, task) in (tmp_path / "all" / file).read_text()


def test_assignment_0_takes_nothing_out(tmp_path):
    main([str(tmp_path / "zero"), "--only", "a0"])
    assert all(
        (ROOT / file).read_text() == (tmp_path / "zero" / file).read_text() for file, *_ in STUBS
    )


def test_only_leaves_everything_else_solved(tmp_path):
    main([str(tmp_path / "one"), "--only", "a3"])
    own = {file for file, _, assignment, _ in STUBS if assignment == "a3"}
    for file in {file for file, *_ in STUBS}:
        assert ((ROOT / file).read_text() == (tmp_path / "one" / file).read_text()) == (
            file not in own
        ), file


def test_what_went_wrong_stands_above_the_traceback(tmp_path):
    make_starter(tmp_path / "wrong", [])
    model = tmp_path / "wrong/model.py"
    text = model.read_text().replace(
        "slowed = freq /", "slowed = 2 * freq /", 1
    )  # not a classic mistake
    model.write_text(
        text.replace(
            "cos, sin = cos.to(x.dtype), sin.to(x.dtype)", "cos = cos[1:].repeat(1, 3, 1, 1)", 1
        )
    )
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            "-m",
            "a1",
            "tests/assignments/test_a1.py",
        ],
        cwd=tmp_path / "wrong",
        capture_output=True,
        text=True,
    )
    lesson, crash = result.stdout.split("RuntimeError:")[:2]
    assert "Lesson: not recognised\n\n  expected     theta^(-2i/D)" in lesson
    assert lesson.count("the wrong pairs are slowed") == 1 and "fails too" not in lesson
    said = crash[: crash.index("test_a1[rope_frequencies] fails too and comes first")]
    assert (
        "where this is expected: dimension i turned together with i + D/2" in said
        and "model.py, line" in said
    )


def failed_assignments(folder) -> set[str]:
    """The assignments of whose tests one fails, in a folder."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rf",
            "--tb=no",
            "-p",
            "no:cacheprovider",
            "tests/assignments",
            "-m",
            "a0 or a1 or a2 or a3 or a4 or a5 or a6",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert result.returncode in (0, 1), result.stdout
    return set(re.findall(r"^FAILED \S*/test_(a\d)\.py", result.stdout, re.M))


@pytest.mark.slow
def test_the_solved_starter_passes_every_assignment(tmp_path):
    make_starter(tmp_path / "solved", [])
    assert failed_assignments(tmp_path / "solved") == {"a0"}  # its sheet is empty


@pytest.mark.parametrize(
    "stub",
    [
        pytest.param(
            stub,
            id=stub[1],
            marks=()
            if stub[1] == "apply_rope"
            else pytest.mark.slow
            if stub[1] in ("collate", "vary_response", "Town.outcome", "_update")
            else pytest.mark.full,
        )
        for stub in STUBS
    ],
)
def test_a_gap_fails_its_own_assignment_and_no_earlier_one(stub, tmp_path):
    make_starter(tmp_path / "gap", [stub])
    failed = failed_assignments(tmp_path / "gap") - {"a0"}
    assert min(failed) == stub[2]


@pytest.mark.parametrize("assignment", ["a0", *ASSIGNMENTS])
def test_a_handout_says_what_the_stubs_and_the_tests_say(assignment):
    text = (ROOT / f"assignments/{assignment}.md").read_text()
    checks = importlib.import_module(f"test_{assignment}").CHECKS
    assert assignment == "a0" or stub_table(assignment) in text
    assert "\n".join(f"| `{check.name}` | {check.points} |" for check in checks) in text
    assert (
        "\n| 100 | " in text
        and set(full_marks(checks).values()) == {100}
        and f"pytest -m {assignment}" in text
    )
    for part in (
        "**You will understand**",
        "## Background",
        "(1)",
        "**Deliverable**",
        "<details><summary>Hint",
    ):
        assert part in text, part
    assert len(text.split()) < 1000  # two pages


INTERLEAVED = """    turned = torch.empty_like(x)
    a, b = x[..., ::2], x[..., 1::2]
    turned[..., ::2], turned[..., 1::2] = a * cos - b * sin, b * cos + a * sin
    return turned
"""


@pytest.mark.slow
def test_a_student_reads_the_cause_above_the_traceback(tmp_path):
    """A wrong body in a starter, and what pytest prints."""
    make_starter(tmp_path / "try", [stub for stub in STUBS if stub[1] == "apply_rope"])
    path = tmp_path / "try/model.py"
    path.write_text(
        re.sub(r'    raise NotImplementedError\("a1.*\n', lambda _: INTERLEAVED, path.read_text())
    )
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "a1", "-k", "rope"],
        cwd=tmp_path / "try",
        capture_output=True,
        text=True,
    ).stdout
    cause, traceback = (
        out.index("Lesson: interleaved RoPE"),
        out.index("tests/assignments/test_a1.py:"),
    )
    assert cause < traceback and "expected     dimension i turned together with i + D/2" in out
    assert re.search(r"^FAILED \S*test_a1\[rope\] - Lesson: interleaved", out, re.M), out
    assert "1 failed, 1 passed" in out  # the frequencies are right
