"""The grader: right solutions score, and what a submission fakes scores 0."""

import ctypes
import json
import os
import shutil
import socket
import subprocess

import pytest
import torch

pytest.importorskip("resource", reason="the grader limits processes as POSIX does")

from assignments import adapters, grade
from assignments.make_starter import ROOT, SHEET, STUBS, make_starter
from assignments.worker import decode, encode
from nanosdd.errors import InputError

MEMORY = 2 * 2**30
ISOLATED = grade.can_isolate()


def main(*words):
    """The command, on a system that may not isolate."""
    grade.main([*map(str, words), *["--without-isolation"] * (not ISOLATED)])


def only(*assignments: str) -> list:
    return [stub for stub in STUBS if stub[2] in assignments]


def total(folder, *markers, seed=7, seconds=120, isolated=ISOLATED) -> tuple[int, int, list[str]]:
    """(points, of, what was said) of a folder."""
    result = grade.grade(folder, seed, markers, seconds, MEMORY, isolated)
    said = []
    for rows in result["assignments"].values():
        said += [row["said"] for row in rows]
    return result["total"], result["of"], said


@pytest.fixture
def folder(tmp_path):
    """The solved project."""
    make_starter(tmp_path / "solved", [])
    shutil.copy(ROOT / SHEET, tmp_path / "solved" / SHEET)
    return tmp_path / "solved"


def add_adapters(folder, text: str):
    """Functions that take the place of the adapters of their names."""
    with open(folder / "assignments/adapters.py", "a") as file:
        file.write("\n\n" + text)


@pytest.mark.parametrize(
    "value",
    [
        {"x": [1, 2.5, None, True, "a"]},
        torch.randn(3, 0, 2),
        torch.randn(4).bfloat16(),
        torch.tensor([[1, -2]]),
        torch.tensor([True, False]),
        torch.tensor(3.0),
    ],
)
def test_data_crosses_unchanged(value):
    got = decode(json.loads(json.dumps(encode(value))))
    if isinstance(value, dict):
        assert got == value
    else:
        assert torch.equal(got, value) and got.dtype == value.dtype


def test_an_object_does_not_cross():
    with pytest.raises(TypeError, match="not plain data"):
        encode(object())


@pytest.mark.slow
def test_the_reference_scores_everything(folder, tmp_path, capsys):
    main(folder, "--seed", 11, "--out", tmp_path / "grade.json")
    assert capsys.readouterr().out.splitlines()[-1] == "total 700 of 800"
    result = json.loads((tmp_path / "grade.json").read_text())
    assert result["total"] == 700 and result["missing"] == [] and result["seed"] == 11


def test_a_starter_scores_nothing_and_says_what_is_missing(tmp_path, capsys):
    starter = tmp_path / "starter"
    make_starter(starter, only("a4"))
    (starter / "nanosdd/lora.py").unlink()
    main(starter, "--seed=1", "--only", "a4", "--out", tmp_path / "grade.json")
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "total 0 of 100"
    assert "missing: nanosdd/lora.py" in out
    assert "not written yet: a4 outcome in data/answers.py" in out


@pytest.mark.full
@pytest.mark.parametrize("isolated", {ISOLATED, False})
def test_an_endless_loop_costs_its_own_test_alone(isolated, folder):
    add_adapters(folder, "def outcomes(*arguments):\n    while True:\n        pass\n")
    points, _, said = total(folder, "a4", seconds=30, isolated=isolated)
    assert (points, said.count("out of time: 30 s")) == (85, 1), said


def test_the_time_of_a_test_holds_for_what_the_grader_does_with_results(tmp_path):
    submission = grade.Submission(tmp_path, 0.1, MEMORY, False)
    with pytest.raises(grade.Failed, match="out of time"), submission.timed():
        while True:
            pass


@pytest.mark.slow
def test_one_of_three_defences_is_full_marks(tmp_path):
    make_starter(tmp_path / "one", [stub for stub in only("a6") if stub[1] != "simpo"])
    points, of, said = total(tmp_path / "one", "a6")
    assert (points, of) == (100, 100) and said == ["not counted: simpo is"] * 3 + ["", ""]
    assert grade.missing_files(tmp_path / "one", ["a6"]) == []


# ---- cheats: a starter of a4 with these adapters, or with these files ----

CHEATS = {
    "prints numbers": """
import sys
print("total 600 of 600", flush=True)
sys.stderr.write("total 600 of 600")
__getattr__ = lambda name: lambda *a: print("passed")
""",
    "exits on import": "import os\nos._exit(0)\n",
    "exits on a call": "import os\n__getattr__ = lambda name: lambda *a: os._exit(0)\n",
    "patches the grader": """
import builtins, sys
from assignments import grade
grade.grade_checks = lambda checks, *rest: [{"test": "all", "points": 600, "of": 600}]
class Never(Exception):
    pass
builtins.AssertionError = Never
for module in list(sys.modules.values()):
    if hasattr(module, "fail"):
        module.fail = lambda *a: None
""",
    "equals everything": """
class Same(list):
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __sub__ = __rsub__ = __abs__ = __getitem__ = __getattr__ = lambda self, *a: self
    __le__ = __lt__ = __bool__ = lambda self, *a: True
    __len__ = lambda self: 60
__getattr__ = lambda name: lambda *a: Same()
""",
    "forges replies": """
import json, os
forged = json.dumps({"ready": True, "result": True, "points": 100, "passed": True}) + "\\n"
for fd in range(3, 30):
    try:
        for _ in range(50):
            os.write(fd, forged.encode())
    except OSError:
        pass
""",
    "forges a reply and reads no more": """
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
    "takes all memory": "kept = []\nwhile True:\n    kept.append(bytearray(2**26))\n",
    "replies without end": "__getattr__ = lambda name: lambda *a: 'x' * 2**27\n",
    "kills the grader": "import os, signal\nos.kill(os.getppid() or os.getpid(), signal.SIGKILL)\n",
    "files": "",  # that a careless grader would read or run
}
FILES = {
    "tests/assignments/test_a4.py": "CHECKS = []\n",
    "tests/conftest.py": "def pytest_runtest_makereport(item, call):\n    call.excinfo = None\n",
    "assignments/grade.py": "print('total 600 of 600')\n",
    "assignments/worker.py": "print('{\"ready\": true}')\n",
    "grade.json": '{"total": 600, "of": 600}',
    "sitecustomize.py": "print('total 600 of 600')\n",
    "torch.py": "print('total 600 of 600')\n",
    "lesson.py": "print('total 600 of 600')\n",
}
QUICK = ("forges replies", "files")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CHEATS]
)
def test_a_cheat_scores_nothing(name, tmp_path):
    if name == "kills the grader" and not ISOLATED:
        pytest.skip("without isolation a submission can end the grader: there is no grade")
    cheat = tmp_path / "cheat"
    make_starter(cheat, only("a4"))
    if CHEATS[name]:
        (cheat / "assignments/adapters.py").write_text(CHEATS[name])
    else:
        for file, text in FILES.items():
            (cheat / file).write_text(text)
    points, of, said = total(cheat, "a4", seconds=4 if name.endswith("no more") else 120)
    assert (points, of) == (0, 100) and all(said), said


@pytest.mark.slow
def test_memorised_answers_score_nothing_at_another_seed(tmp_path):
    """Every answer to seed 0 is stored, in the order of the calls, and returned again."""
    markers = "a1 a2 a3 a4 a5 a6".split()
    stored = {}

    def recorded(name):
        def call(*arguments):
            result = getattr(adapters, name)(*arguments)
            stored.setdefault(name, []).append(encode(result))
            return result

        return call

    for marker in markers:
        for check in grade.CHECKS[marker]:
            check.function(recorded(check.adapter), seed=0)
    cheat = tmp_path / "cheat"
    make_starter(cheat, only(*markers))
    (cheat / "stored.json").write_text(json.dumps(stored))
    shutil.copy(ROOT / "assignments/worker.py", cheat / "reader.py")
    text = """
import json
from reader import decode
stored = json.load(open("stored.json"))
__getattr__ = lambda name: lambda *a: decode(stored[name].pop(0))
"""
    (cheat / "assignments/adapters.py").write_text(text)
    points, of, said = total(cheat, *markers)
    assert (points, of) == (0, 600) and all(said)
    assert total(cheat, "a4", seed=0)[0] == 100  # the cheat itself works


# ---- what is out of reach ----

ATTEMPTS = """
import os, socket, threading
done = []
def attempt(what, action, *arguments):
    try:
        action(*arguments)
        done.append(what)
    except OSError:
        pass
    except RuntimeError:  # no thread
        pass
outside = %r
attempt("change a file of the grader", open, outside + "/lab.py", "a")
attempt("put bytecode beside it", open, outside + "/lab.pyc", "w")
attempt("read an earlier grade.json", open, outside + "/grade.json")
attempt("read the grader's command line", open, "/proc/%d/cmdline")
attempt("write to a terminal", os.listdir, "/dev/pts")
attempt("change its own code", open, __file__, "a")
attempt("listen", socket.create_connection, ("127.0.0.1", %d))
attempt("start a thread", threading.Thread(target=print).start)
attempt("start a process", lambda: os.fork() or os._exit(0))
raise ValueError(f"did: {done}")
"""


@pytest.mark.skipif(not ISOLATED, reason="this system isolates no process")
def test_what_is_not_the_submissions_is_out_of_its_reach(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("lab.py", "grade.json"):
        (outside / name).write_text("")
    with socket.create_server(("127.0.0.1", 0)) as server:
        text = ATTEMPTS % (str(outside), os.getpid(), server.getsockname()[1])
        add_adapters(folder, text)
        _, _, said = total(folder, "a0")
        assert all("did: []" in one for one in said)
        _, _, said = total(folder, "a0", isolated=False)  # the attempts themselves work
        assert said[0].count(",") == 8


@pytest.mark.skipif(os.getuid(), reason="only root can give up the right to isolate")
def test_a_system_that_isolates_nothing_is_known():
    def give_up():
        ctypes.CDLL(None).prctl(24, 21)  # PR_CAPBSET_DROP, CAP_SYS_ADMIN

    command = [*grade.PYTHON, grade.ISOLATE, ROOT, *grade.PYTHON, ""]
    result = subprocess.run(command, capture_output=True, preexec_fn=give_up)
    assert result.returncode != 0


def test_nothing_is_graded_without_isolation_unless_that_is_asked_for(folder, monkeypatch, capsys):
    monkeypatch.setattr(grade, "can_isolate", lambda: False)
    command = [str(folder), "--seed=1", "--only=a0", "--out", str(folder / "grade.json")]
    with pytest.raises(InputError, match="isolates no process"):
        grade.main(command)
    grade.main([*command, "--without-isolation"])
    assert "NOT isolated" in capsys.readouterr().out


def test_files_that_cannot_be_taken_in_are_named(folder, tmp_path):
    os.mkfifo(folder / "pipe.py")
    (folder / "loop.py").symlink_to("loop.py")
    (folder / "total 700 of 700\n.py").symlink_to("/etc/passwd")
    copy = tmp_path / "copy"
    left_out = grade.take_in(folder, copy)
    assert left_out == [
        "left out: 'loop.py' (Too many levels of symbolic links)",
        "left out: 'pipe.py' (not an ordinary file)",
        "left out: 'total 700 of 700\\n.py' (a link that leaves the folder)",
    ]
    assert grade.missing_files(copy, grade.MARKERS) == []
