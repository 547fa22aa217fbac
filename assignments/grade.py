"""Grade a submission: run the course's tests on it and print a table of points.

    python assignments/grade.py SUBMISSION --seed S
    python assignments/grade.py SUBMISSION --seed S --only a1 a2

SUBMISSION is a starter folder with the bodies written. First its format is checked. Then the tests
run: those of this copy of the project, in this process, which never imports the submission and has
loaded all that it uses before the submission runs. The submission's adapters run in another process
and answer calls; only plain data comes back (assignments/worker.py). So a submission cannot edit,
patch or end the tests, and what it prints is not read: the only way to a point is a right result.
Inputs are drawn from --seed, so results that were memorised for another seed score nothing.

Limits of the other process: time for each test (--seconds), CPU time, address space (--memory),
file size; it works on a copy of the folder. Where `unshare` (Linux) may make namespaces, it has no
network and cannot signal other processes; elsewhere it has both, and the table says so. It always
runs as the user who grades: it can read what that user can read, the solution too, which is public,
and write what that user can write, so that the next run may start from changed files. Grade
strangers' code in a container, or as a user of its own.

These are the public tests. Prints the table, as its last line `total X of Y`, and writes JSON
(--out). The open problem (a7) is graded where it is handed in: five towns, many minutes. a0 earns
points for a complete sheet; a person reads its explanation.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "assignments"
sys.path[:0] = [str(ROOT), str(TESTS)]

from lesson import full_marks  # noqa: E402

from assignments import open_problem  # noqa: E402
from assignments.make_starter import ONE_IS_ENOUGH, STUBS  # noqa: E402
from assignments.worker import decode, encode  # noqa: E402
from nanosdd.errors import escaped  # noqa: E402

MARKERS = ("a0", "a1", "a2", "a3", "a4", "a5", "a6")
OPEN = "a7"  # the open problem
CHECKS = {marker: importlib.import_module(f"test_{marker}").CHECKS for marker in MARKERS}
MOST_BYTES = 2**26  # of one reply
ENDED = "the process ended without a result (killed, out of memory, or os._exit)"
UNSHARE = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]


class Failed(Exception):
    """The submission returned no result: it raised, ended, or ran out of time."""


class Submission:
    """A submission's adapters, in another process: submission.name(...) calls that adapter."""

    def __init__(self, folder: Path, seconds: float, memory: int, namespaces: bool):
        self.folder = folder
        self.seconds = seconds
        self.command = [sys.executable, "-I", str(ROOT / "assignments/worker.py"), str(folder)]
        # Of CPU time, a backstop: one process serves several tests, each with its own deadline.
        self.command += [str(memory), str(int(2 * seconds) + 10)]
        if namespaces:  # with /proc hidden where it can be: it shows the grader's --seed
            hidden = ["--mount-proc"] if can_unshare("--mount-proc") else []
            self.command = UNSHARE + hidden + self.command
        self.process = None
        self.unread = bytearray()
        self.broken = ""
        self.begin()

    def begin(self):
        """Let the time that it has count from now."""
        self.deadline = time.monotonic() + self.seconds

    def start(self):
        """Start the process, unless it runs."""
        if self.process and self.process.poll() is None:
            return
        if self.broken:  # it could not start before
            raise Failed(self.broken)
        folder = str(self.folder)
        path = os.environ.get("PATH", "")
        self.unread = bytearray()
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": path, "OMP_NUM_THREADS": "1", "HOME": folder, "TMPDIR": folder},
            start_new_session=True,
        )
        try:
            first = self.reply()
            if first.get("ready") is not True:
                raise Failed(str(first.get("error", "no adapters")))
        except Failed as error:
            self.broken = str(error)
            raise

    def stop(self):
        """End the process and all that it started."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                pipe.close()
            self.process = None

    def fail(self, why: str):
        """End the process and raise Failed."""
        self.stop()
        raise Failed(why)

    def wait(self, reading=(), writing=()):
        """Wait until a pipe can be read from, or written to; Failed when the time is up."""
        left = self.deadline - time.monotonic()
        if left <= 0 or not any(select.select(reading, writing, [], left)):
            self.fail(f"out of time: {self.seconds:.0f} s")

    def send(self, line: bytes):
        """Write a line to the process, which may not be reading; Failed when it cannot in time."""
        pipe = self.process.stdin.fileno()
        os.set_blocking(pipe, False)
        while line:
            self.wait(writing=[pipe])
            try:
                line = line[os.write(pipe, line) :]
            except BrokenPipeError:
                self.fail(ENDED)

    def reply(self) -> dict:
        """The next line that the process writes; Failed when there is none in time."""
        pipe = self.process.stdout.fileno()
        while b"\n" not in self.unread:
            self.wait(reading=[pipe])
            new = os.read(pipe, 2**20)
            self.unread += new
            if not new:
                self.fail(ENDED)
            if len(self.unread) > MOST_BYTES:
                self.fail("a result is too large")
        line, _, self.unread = self.unread.partition(b"\n")
        found = json.loads(line)
        if not isinstance(found, dict):
            raise Failed("a reply is not what the adapters write")
        return found

    def __getattr__(self, name: str):
        def call(*arguments):
            self.start()
            self.send(json.dumps({"call": name, "args": encode(list(arguments))}).encode() + b"\n")
            found = self.reply()
            if "result" not in found:
                raise Failed(str(found.get("error", "no result")))
            return decode(found["result"])

        return call


def missing_files(folder: Path, markers) -> list[str]:
    """What the format asks for and a submission lacks, and bodies that are not written yet."""
    files = ["assignments/adapters.py"]
    if "a0" in markers:
        files.append("assignments/a0.json")
    files += [file for file, _, of, _ in STUBS if of in markers]
    missing = [f"missing: {file}" for file in dict.fromkeys(files) if not (folder / file).is_file()]
    for marker in markers:
        gaps = []
        bodies = [(file, name) for file, name, of, _ in STUBS if of == marker]
        for file, name in bodies:
            stub = f'NotImplementedError("{marker}: {name}:'
            if (folder / file).is_file() and stub in (folder / file).read_text(errors="replace"):
                gaps.append(f"not written yet: {marker} {name} in {file}")
        if marker not in ONE_IS_ENOUGH or len(gaps) == len(bodies):
            missing += gaps
    return missing


def can_unshare(*more: str) -> bool:
    """Whether the other process can have namespaces of its own, with these further options."""
    if not shutil.which("unshare"):
        return False
    return subprocess.run([*UNSHARE, *more, "true"], capture_output=True).returncode == 0


def grade_checks(checks, submission: Submission, seed: int) -> list[dict]:
    """Run the checks of one assignment: a row for each, {"test", "points", "of", "said"}."""
    rows = []
    for check in checks:
        said = ""
        submission.begin()  # an endless loop costs its own test alone
        try:
            check.function(*(getattr(submission, name) for name in check.adapters), seed=seed)
        except Exception as error:  # a stranger's results can break a test in any way
            said = str(error).strip().split("\n")[0][:300] or type(error).__name__
        points = 0 if said else check.points
        row = {"test": check.name, "points": points, "of": check.points, "said": escaped(said)}
        rows.append(row)
    submission.stop()
    return only_the_best(checks, rows)


def only_the_best(checks, rows: list[dict]) -> list[dict]:
    """The rows of an assignment in which only the choice that earned most counts."""
    earned = dict.fromkeys(full_marks(checks), 0)
    for check, row in zip(checks, rows):
        earned[check.choice] += row["points"]
    best = max(earned, key=earned.get)
    for check, row in zip(checks, rows):
        if check.choice != best:
            row |= {"points": 0, "of": 0, "said": f"not counted: {best} is"}
    return rows


def grade_open(folder: Path, seed: int, memory: int, problem) -> list[dict]:
    """Grade the open problem (a7) on towns drawn from the seed: one row, as of grade_checks, with
    `details`. problem: an open_problem.Problem."""
    namespaces = can_unshare()

    def start(work):
        return Submission(work, problem.cpu_seconds, memory, namespaces)

    return [open_problem.solve(folder, seed, start, problem)]


def grade(folder: Path, seed: int, markers, seconds: float, memory: int, towns: int = 5) -> dict:
    """Grade a folder.

    Returns {"seed", "namespaces", "missing", "assignments": {marker: rows}, "total", "of"}.
    """
    namespaces = can_unshare()
    tested = [marker for marker in markers if marker != OPEN]
    missing = missing_files(folder, tested)
    found = {}
    ignored = shutil.ignore_patterns(".git", "out", "__pycache__")
    with tempfile.TemporaryDirectory() as work:
        for marker in tested:
            copy = Path(work) / marker
            shutil.copytree(folder, copy, symlinks=True, ignore=ignored)
            submission = Submission(copy, seconds, memory, namespaces)
            found[marker] = grade_checks(CHECKS[marker], submission, seed)
    if OPEN in markers:
        found[OPEN] = grade_open(folder, seed, memory, open_problem.Problem(towns))
    rows = list(itertools.chain(*found.values()))
    return {
        "seed": seed,
        "namespaces": namespaces,
        "missing": missing,
        "assignments": found,
        "total": sum(row["points"] for row in rows),
        "of": sum(row["of"] for row in rows),
    }


def text_of(result: dict) -> str:
    """The table of points, and as its last line `total X of Y`."""
    lines = ["These are the public tests; a0 is read by a person too."]
    if result["namespaces"]:
        lines.append("The submission had no network.")
    else:
        lines.append("The submission was not cut off from the network: unshare is not permitted.")
    lines += result["missing"]
    for marker, rows in result["assignments"].items():
        points = sum(row["points"] for row in rows)
        lines += ["", f"{marker}   {points} of {sum(row['of'] for row in rows)}"]
        for row in rows:
            said = textwrap.shorten(row["said"], 110)
            line = f"  {row['points']:>3} of {row['of']:>3}  {row['test']:<24} {said}"
            lines.append(line.rstrip())
    return "\n".join([*lines, "", f"total {result['total']} of {result['of']}"])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("submission", help="folder")
    parser.add_argument(
        "--seed", type=int, required=True, help="of every input; choose a new one each time"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=(*MARKERS, OPEN),
        default=[*MARKERS, OPEN],
        help="grade these assignments (default: all, a7 where it was handed in)",
    )
    parser.add_argument("--towns", type=int, default=5, help="of a7, fewer to try it (default: 5)")
    parser.add_argument("--seconds", type=float, default=60, help="for each test (default: 60)")
    parser.add_argument(
        "--memory", type=float, default=2, help="GB beyond what PyTorch maps (default: 2)"
    )
    parser.add_argument("--out", default="grade.json", help="JSON to write (default: grade.json)")
    args = parser.parse_args(argv)
    folder = Path(args.submission).resolve()
    if not folder.is_dir():
        parser.error(f"{folder} is not a folder")
    result = grade(folder, args.seed, args.only, args.seconds, int(args.memory * 2**30), args.towns)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {args.out}, with every message in full\n{text_of(result)}")


if __name__ == "__main__":
    main()
