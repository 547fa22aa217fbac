"""Grade a submission: run the course's tests on it and print a table of points.

    python assignments/grade.py SUBMISSION --seed S
    python assignments/grade.py SUBMISSION --seed S --only a1 a2

SUBMISSION is a starter folder with the bodies written. *.py and *.json count, at its top and one
folder deep, and a7/writeup.md; they are copied first. Then the tests run: those of this copy of the
project, in this process, which never imports the submission. The submission's adapters run in
another process and answer calls; only plain data of limited size comes back
(assignments/worker.py). So a submission cannot edit, patch or end the tests, and what it prints is
not read: the only way to a point is a right result. Inputs are drawn from --seed, so results that
were memorised for another seed score nothing.

The other process is isolated (assignments/isolate.py): it sees this Python, the system's libraries
and the copy, all read-only, and nothing else: no other file, terminal, network or process. It has
one process and one thread, and limits of time for each test, the grader's comparison included
(--seconds), of CPU time, memory (--memory) and file size. That takes Linux 5.12, and root or user
namespaces. Elsewhere nothing is graded, unless --without-isolation is given: then a submission can
read, change and start all that you can. Do that with your own code, or in a container that holds
nothing else and is thrown away.

These are the public tests. Prints the table, as its last line `total X of Y`, and writes JSON
(--out), which holds the seed. The open problem (a7) is graded where it is handed in: five towns,
many minutes. a0 earns points for a complete sheet; a person reads its explanation.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "assignments"
sys.path[:0] = [str(ROOT), str(TESTS)]

from lesson import full_marks  # noqa: E402

from assignments import isolate, open_problem  # noqa: E402
from assignments.make_starter import ONE_IS_ENOUGH, STUBS  # noqa: E402
from assignments.worker import decode, encode  # noqa: E402
from nanosdd.checkpoint import read_object, why_unreadable  # noqa: E402
from nanosdd.errors import InputError, Interrupted, escaped, run_script  # noqa: E402
from nanosdd.runs import check_folder, write_text  # noqa: E402

MARKERS = ("a0", "a1", "a2", "a3", "a4", "a5", "a6")
OPEN = "a7"  # the open problem
CHECKS = {marker: importlib.import_module(f"test_{marker}").CHECKS for marker in MARKERS}
COUNTED = ("*.py", "*.json", "*/*.py", "*/*.json", open_problem.WRITE_UP)  # of a submission
MOST_BYTES = 2**24  # of one reply
ENDED = "the process ended without a result (killed, out of memory, or os._exit)"
# Read before any submission runs.
ISOLATE = (ROOT / "assignments/isolate.py").read_text(encoding="utf-8")
WORKER = (ROOT / "assignments/worker.py").read_text(encoding="utf-8")
PYTHON = [sys.executable, "-I", "-c"]


class Failed(Exception):
    """The submission returned no result: it raised, ended, or ran out of time."""


class OutOfTime(Failed):
    """It took too long."""


class Submission:
    """A submission's adapters, in another process: submission.name(...) calls that adapter."""

    def __init__(self, folder: Path, seconds: float, memory: int, isolated: bool):
        self.seconds = seconds
        place = str(folder)
        self.scratch = place
        self.command = []
        if isolated:
            self.command = [*PYTHON, ISOLATE, place]
            place = isolate.FOLDER
            self.scratch = isolate.SCRATCH
        # Of CPU time, a backstop: one process serves several tests, each with its own deadline.
        self.command += [*PYTHON, WORKER, place, str(memory), str(int(2 * seconds) + 10)]
        self.process = None

    @contextlib.contextmanager
    def timed(self):
        """Raise Failed in a block that takes too long, by its own code or the submission's."""

        def out_of_time(*_):
            raise OutOfTime(f"out of time: {self.seconds:.0f} s")

        signal.signal(signal.SIGALRM, out_of_time)
        signal.setitimer(signal.ITIMER_REAL, self.seconds, 1)  # again, where a test catches Failed
        try:
            yield
        except OutOfTime:
            self.stop()
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def start(self):
        """Start the process, unless it runs."""
        if self.process and self.process.poll() is None:
            return
        environment = {"PATH": os.environ.get("PATH", ""), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment | {"HOME": self.scratch, "TMPDIR": self.scratch},
            start_new_session=True,
        )

    def stop(self):
        """End the process; isolated, it ends with all that it started."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):  # a call that was not read
                    pipe.close()
            self.process = None

    def fail(self, why: str):
        """End the process and raise Failed."""
        self.stop()
        raise Failed(why)

    def answer(self, call: dict) -> dict:
        """Write a call to the process, and return the line that it writes; Failed if it is gone."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(call).encode() + b"\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline(MOST_BYTES)
        if len(line) == MOST_BYTES:
            self.fail("a result is too large")
        if not line.endswith(b"\n"):
            self.fail(ENDED)
        found = json.loads(line)
        if not isinstance(found, dict):
            raise Failed("a reply is not what the adapters write")
        return found

    def __getattr__(self, name: str):
        def call(*arguments):
            self.start()
            found = self.answer({"call": name, "args": encode(list(arguments))})
            if "result" not in found:
                raise Failed(str(found.get("error", "no result")))
            return decode(found["result"])

        return call


def take_in(folder: Path, copy: Path) -> list[str]:
    """Copy the files that count, and return a line for each that cannot be copied."""
    left_out = []
    for path in sorted(itertools.chain(*map(folder.glob, COUNTED))):
        reason = why_unreadable(path, 2**24)
        if not reason and not path.resolve().is_relative_to(folder):
            reason = "a link that leaves the folder"
        name = path.relative_to(folder)
        if reason:
            left_out.append(f"left out: {str(name)!r} ({reason})")
        else:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(path.read_bytes())
    return left_out


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


def can_isolate() -> bool:
    """Whether the system lets a process be isolated."""
    command = [*PYTHON, ISOLATE, str(ROOT), *PYTHON, ""]
    return subprocess.run(command, capture_output=True).returncode == 0


def grade_checks(checks, submission: Submission, seed: int) -> list[dict]:
    """Run the checks of one assignment: a row for each, {"test", "points", "of", "said"}."""
    rows = []
    for check in checks:
        said = ""
        try:
            with submission.timed():  # an endless loop costs its own test alone
                check.run(submission, seed)
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


def grade_open(folder: Path, seed: int, memory: int, isolated: bool, problem) -> list[dict]:
    """Grade the open problem (a7) on towns drawn from the seed: one row, as of grade_checks, with
    `details`. problem: an open_problem.Problem."""

    def start(work):
        return Submission(work, problem.cpu_seconds, memory, isolated)

    return [open_problem.solve(folder, seed, start, problem)]


def grade(
    folder: Path, seed: int, markers, seconds: float, memory: int, isolated: bool, towns: int = 5
) -> dict:
    """Grade a folder.

    Returns {"seed", "isolated", "missing", "assignments": {marker: rows}, "total", "of"}.
    """
    tested = [marker for marker in markers if marker != OPEN]
    found = {}
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work) / "submission"
        copy.mkdir()
        missing = take_in(folder.resolve(), copy) + missing_files(copy, tested)
        for marker in tested:
            submission = Submission(copy, seconds, memory, isolated)
            found[marker] = grade_checks(CHECKS[marker], submission, seed)
        if OPEN in markers:
            found[OPEN] = grade_open(copy, seed, memory, isolated, open_problem.Problem(towns))
    rows = list(itertools.chain(*found.values()))
    return {
        "seed": seed,
        "isolated": isolated,
        "missing": missing,
        "assignments": found,
        "total": sum(row["points"] for row in rows),
        "of": sum(row["of"] for row in rows),
    }


def text_of(result: dict) -> str:
    """The table of points, and as its last line `total X of Y`."""
    lines = ["These are the public tests; a0 is read by a person too."]
    if result["isolated"]:
        lines.append("The submission was isolated: it saw its own files and no network.")
    else:
        lines.append("The submission was NOT isolated: it could change all that the grader can.")
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
    parser.add_argument(
        "--without-isolation", action="store_true", help="grade code that you trust with all files"
    )
    parser.add_argument("--out", default="grade.json", help="JSON to write (default: grade.json)")
    args = parser.parse_args(argv)
    folder = Path(args.submission)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give a starter with the bodies written")
    if not (0 < args.seconds < 1e6 and 0 < args.memory < 1e6 and 0 < args.towns):
        raise InputError("--seconds, --memory and --towns must be above 0, and not without limit")
    if Path(args.out).exists() and "isolated" not in read_object(args.out):
        raise InputError(f"{args.out} holds no grades; name a new file")
    check_folder(Path(args.out).parent)
    if not hasattr(signal, "SIGALRM"):
        raise InputError("this system has no timer that ends a test (SIGALRM); grade on Linux")
    isolated = not args.without_isolation
    if isolated and not can_isolate():
        raise InputError(
            "this system isolates no process (that takes Linux 5.12, and root or user namespaces); "
            "grade your own code, or in a container of its own, with --without-isolation"
        )
    memory = int(args.memory * 2**30)
    try:
        result = grade(folder, args.seed, args.only, args.seconds, memory, isolated, args.towns)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing is written, the same command begins anew") from None
    try:
        write_text(args.out, json.dumps(result, indent=1) + "\n")
    finally:
        print(f"{args.out}: every message in full\n{text_of(result)}")


if __name__ == "__main__":
    run_script(main)
