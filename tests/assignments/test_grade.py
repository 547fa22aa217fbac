"""The grader: right solutions score, and what a submission fakes scores 0."""

import json
import shutil
import sys

import pytest
import test_a0
import test_a1
import test_a2
import test_a3
import test_a4
import test_a5
import test_a6

from assignments import adapters, grade
from assignments.make_starter import ROOT, STUBS, make_starter
from assignments.worker import decode, encode

MEMORY = 2 * 2**30
TESTS = {
    "a0": test_a0,
    "a1": test_a1,
    "a2": test_a2,
    "a3": test_a3,
    "a4": test_a4,
    "a5": test_a5,
    "a6": test_a6,
}


def only(*assignments: str) -> list:
    return [stub for stub in STUBS if stub[2] in assignments]


def total(folder, *markers, seed=7, seconds=60, memory=MEMORY) -> tuple[int, int, list[str]]:
    """(points, of, what was said) of a folder."""
    result = grade.grade(folder, seed, markers, seconds, memory)
    return (
        result["total"],
        result["of"],
        [row["said"] for rows in result["assignments"].values() for row in rows],
    )


def test_data_crosses_unchanged():
    import torch

    value = {
        "x": [1, 2.5, None, True, "a"],
        "t": torch.randn(3, 0, 2),
        "b": torch.randn(4).bfloat16(),
        "i": torch.tensor([[1, -2]]),
        "m": torch.tensor([True, False]),
        "n": torch.tensor(3.0),
    }
    got = decode(json.loads(json.dumps(encode(value))))
    assert got["x"] == value["x"] and got.keys() == value.keys()
    assert all(
        torch.equal(got[name], value[name]) and got[name].dtype == value[name].dtype
        for name in "tbimn"
    )
    with pytest.raises(TypeError, match="not plain data"):
        encode(object())


@pytest.mark.slow
def test_the_reference_scores_everything(tmp_path, capsys):
    make_starter(tmp_path / "solved", [])
    shutil.copy(ROOT / "assignments/a0.json", tmp_path / "solved/assignments/a0.json")
    grade.main([str(tmp_path / "solved"), "--seed", "11", "--out", str(tmp_path / "grade.json")])
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "total 700 of 800" and "public tests" in out
    result = json.loads((tmp_path / "grade.json").read_text())
    assert result["total"] == 700 and result["missing"] == [] and result["seed"] == 11
    assert result["assignments"]["a7"][0]["said"] == "no a7/submission.py"


def test_a_starter_scores_nothing_and_says_what_is_missing(tmp_path, capsys):
    make_starter(tmp_path / "starter", only("a1", "a5"))
    (tmp_path / "starter/nanosdd/split_adamw.py").unlink()
    grade.main(
        [
            str(tmp_path / "starter"),
            "--seed",
            "1",
            "--only",
            "a5",
            "--out",
            str(tmp_path / "grade.json"),
        ]
    )
    out = capsys.readouterr().out
    assert "missing: nanosdd/split_adamw.py" in out and out.splitlines()[-1] == "total 0 of 100"
    assert "not written yet: a1 apply_rope in model.py" in grade.missing_files(
        tmp_path / "starter", ["a1"]
    )


@pytest.mark.slow
def test_parts_of_an_assignment_score_on_their_own(tmp_path):
    make_starter(tmp_path / "part", [stub for stub in only("a3") if stub[1] != "vary_response"])
    assert total(tmp_path / "part", "a3")[:2] == (15, 100)


@pytest.mark.slow
def test_an_endless_loop_costs_its_own_test_alone(tmp_path):
    make_starter(tmp_path / "loop", [])
    with open(tmp_path / "loop/assignments/adapters.py", "a") as file:
        file.write("\n\ndef tfidf_cosines(*arguments):\n    while True:\n        pass\n")
    points, of, said = total(tmp_path / "loop", "a3", seconds=15)
    assert (points, of) == (85, 100) and "out of time: 15 s" in said


@pytest.mark.slow
def test_one_of_three_defences_is_full_marks(tmp_path):
    make_starter(tmp_path / "one", [stub for stub in only("a6") if stub[1] != "simpo"])
    points, of, said = total(tmp_path / "one", "a6")
    assert (points, of) == (100, 100) and said == ["not counted: simpo is"] * 3 + ["", ""]
    assert grade.missing_files(tmp_path / "one", ["a6"]) == []


# ---- cheats: a starter of a3, or of what is named, and something that pretends ----


def replace_adapters(folder, text: str):
    """An adapters.py of its own."""
    (folder / "assignments/adapters.py").write_text(text)


def edited_tests(folder):
    for path in (folder / "tests/assignments").glob("test_a*.py"):
        path.write_text("CHECKS = []\n\ndef test_nothing():\n    pass\n")


def conftest_that_passes_everything(folder):
    text = "def pytest_runtest_makereport(item, call):\n    call.excinfo = None\n"
    for name in (
        "conftest.py",
        "tests/conftest.py",
        "tests/assignments/conftest.py",
        "assignments/conftest.py",
    ):
        (folder / name).write_text(text)


def copied_result(folder):
    result = {
        "total": 600,
        "of": 600,
        "assignments": {"a3": [{"test": "all", "points": 600, "of": 600, "said": ""}]},
    }
    for name in ("grade.json", "assignments/grade.json", "out/grade.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(result))


def printed_numbers(folder):
    replace_adapters(
        folder,
        "import sys\nprint('total 600 of 600', flush=True)\n"
        "sys.stderr.write('total 600 of 600')\n__getattr__ = lambda name: lambda *a: print('passed')\n",
    )


def exit_on_import(folder):
    replace_adapters(folder, "import os\nos._exit(0)\n")


def exit_on_call(folder):
    replace_adapters(folder, "import os\n__getattr__ = lambda name: lambda *a: os._exit(0)\n")


def patched_grader(folder):
    replace_adapters(
        folder,
        """
import builtins, sys
from assignments import grade
grade.grade_checks = lambda checks, *rest: [{"test": c.name, "points": c.points, "of": c.points} for c in checks]
class Never(Exception):
    pass
builtins.AssertionError = Never
for module in list(sys.modules.values()):
    if hasattr(module, "fail"):
        module.fail = lambda *a: None
""",
    )
    (folder / "assignments/grade.py").write_text("print('total 600 of 600')\n")
    (folder / "assignments/worker.py").write_text("print('{\"ready\": true}')\n")


def site_customize(folder):
    for name in (
        "sitecustomize.py",
        "usercustomize.py",
        "torch.py",
        "json.py",
        "pytest.py",
        "lesson.py",
    ):
        (folder / name).write_text(
            "import os\nopen('ran', 'w').close()\nprint('total 600 of 600')\n"
        )


def equal_to_everything(folder):
    replace_adapters(
        folder,
        """
class Same(list):
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __sub__ = __rsub__ = __abs__ = __getitem__ = __getattr__ = lambda self, *a: self
    __le__ = __lt__ = __bool__ = lambda self, *a: True
    __len__ = lambda self: 60
class Tensor(Same, metaclass=type):
    pass
__getattr__ = lambda name: lambda *a: Tensor()
""",
    )


def forged_replies(folder):
    replace_adapters(
        folder,
        """
import json, os
for fd in range(3, 30):
    try:
        for _ in range(50):
            os.write(fd, (json.dumps({"ready": True, "result": True, "points": 100, "passed": True}) + "\\n").encode())
    except OSError:
        pass
""",
    )


def endless_loop(folder):
    replace_adapters(folder, "while True:\n    pass\n")


def forged_reply_and_no_reading(folder):
    """The grader's next call is long, and nobody reads it."""
    replace_adapters(
        folder,
        """
import os
def forge(*arguments):
    for fd in range(3, 30):
        try:
            os.write(fd, b'{"result": 1}\\n')
        except OSError:
            pass
    while True:
        pass
__getattr__ = lambda name: forge
""",
    )


def memory_bomb(folder):
    replace_adapters(folder, "kept = []\nwhile True:\n    kept.append(bytearray(2**26))\n")


def endless_reply(folder):
    replace_adapters(folder, "__getattr__ = lambda name: lambda *a: 'x' * 2**27\n")


def killed_grader(folder):
    replace_adapters(
        folder, "import os, signal\nos.kill(os.getppid() or os.getpid(), signal.SIGKILL)\n"
    )


CHEATS = (
    edited_tests,
    conftest_that_passes_everything,
    copied_result,
    printed_numbers,
    exit_on_import,
    exit_on_call,
    patched_grader,
    site_customize,
    equal_to_everything,
    forged_replies,
    endless_loop,
    forged_reply_and_no_reading,
    memory_bomb,
    endless_reply,
    killed_grader,
)


@pytest.mark.parametrize(
    "cheat",
    [
        pytest.param(
            cheat,
            id=cheat.__name__,
            marks=()
            if cheat in (edited_tests, exit_on_import, forged_replies)
            else pytest.mark.slow,
        )
        for cheat in CHEATS
    ],
)
def test_a_cheat_scores_nothing(cheat, tmp_path):
    if cheat is killed_grader and not grade.can_unshare():
        pytest.skip(
            "needs unshare: without namespaces a submission can end the grader, and there is no grade"
        )
    make_starter(tmp_path / "cheat", only("a3"))
    cheat(tmp_path / "cheat")
    points, of, said = total(
        tmp_path / "cheat",
        "a3",
        seconds=4 if cheat in (endless_loop, forged_reply_and_no_reading) else 60,
    )
    assert (points, of) == (0, 100) and all(said), said


@pytest.mark.slow
def test_memorised_answers_score_nothing_at_another_seed(tmp_path):
    """Every answer to seed 0 is stored, in the order of the calls, and given again."""
    markers = ("a1", "a2", "a3", "a4", "a5", "a6")
    stored = {}
    for marker in markers:
        for check in TESTS[marker].CHECKS:

            def recorded(name):
                def call(*arguments):
                    result = getattr(adapters, name)(*arguments)
                    stored.setdefault(name, []).append(encode(result))
                    return result

                return call

            check.function(*map(recorded, check.adapters), seed=0)
    make_starter(tmp_path / "cheat", only(*markers))
    (tmp_path / "cheat/stored.json").write_text(json.dumps(stored))
    replace_adapters(
        tmp_path / "cheat",
        f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "assignments")!r})
from worker import decode
stored = json.loads((Path(__file__).parent.parent / "stored.json").read_text())
__getattr__ = lambda name: lambda *a: decode(stored[name].pop(0))
""",
    )
    points, of, said = total(tmp_path / "cheat", *markers, seed=7)
    assert (points, of) == (0, 600) and all(said)
    assert total(tmp_path / "cheat", "a1", seed=0)[0] == 100  # the cheat itself works


@pytest.mark.slow
def test_a_changed_grader_is_put_back_and_scores_nothing(tmp_path):
    """A submission that finds the grader's files and writes into them; here the grader is a copy of the project."""
    import subprocess

    make_starter(tmp_path / "grader", [])
    make_starter(tmp_path / "cheat", only("a1"))
    target = tmp_path / "grader/tests/assignments/test_a3.py"
    with open(tmp_path / "cheat/assignments/adapters.py", "a") as file:
        file.write(f"\nopen({str(target)!r}, 'a').write('CHECKS = []')\n")
    result = subprocess.run(
        [
            sys.executable,
            tmp_path / "grader/assignments/grade.py",
            tmp_path / "cheat",
            "--only",
            "a3",
            "--seed",
            "1",
            "--out",
            tmp_path / "grade.json",
        ],
        capture_output=True,
        text=True,
    )
    assert (
        result.stdout.splitlines()[-1] == "total 0 of 100" and "files were changed" in result.stdout
    )
    assert target.read_bytes() == (ROOT / "tests/assignments/test_a3.py").read_bytes()


@pytest.mark.slow
def test_without_namespaces_the_same_points(tmp_path):
    """Where unshare is not permitted: a right submission scores, and one that never ends is ended."""
    make_starter(tmp_path / "solved", [])
    rows = grade.grade_checks(
        test_a3.CHECKS, grade.Submission(tmp_path / "solved", 60, MEMORY, False), seed=5
    )
    assert sum(row["points"] for row in rows) == 100
    endless_loop(tmp_path / "solved")
    rows = grade.grade_checks(
        test_a3.CHECKS, grade.Submission(tmp_path / "solved", 5, MEMORY, False), seed=5
    )
    assert sum(row["points"] for row in rows) == 0 and "out of time" in rows[0]["said"]
