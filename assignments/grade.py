"""Grade a submission: run the course's tests on it and print a table of points.

    python assignments/grade.py SUBMISSION --seed S
    python assignments/grade.py SUBMISSION --seed S --only a1 a2

SUBMISSION is a starter folder with the bodies written. First its format is checked. Then the tests run: those of this
copy of the project, in this process, which never imports the submission. Its adapters run in another process and answer
calls; only plain data comes back (assignments/worker.py). So a submission cannot edit, patch or end the tests, and what
it prints is not read: the only way to a point is a right result. Inputs are drawn from --seed, so results that were
memorised for another seed score nothing.

Limits of the other process: time for each test (--seconds), CPU time, address space (--memory), file size; it
works on a copy of the folder. Where `unshare` (Linux) may make namespaces, it has no network and cannot signal other
processes; elsewhere it has both, and the table says so. It always runs as the user who grades and can read what that
user can read, the solution too: it is the public project. Grade strangers' code in a container, or as a user of its
own. If the tests of this copy change while a submission runs, they are put back and the submission scores 0.

These are the public tests. Prints the table, as its last line `total X of Y`, and writes JSON (--out). The open problem
(a7) is graded where it is handed in: five towns, 18 to 28 minutes. a0 earns points for a complete sheet; a person reads
its explanation.
"""

import argparse
import contextlib
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

from assignments.make_starter import ONE_IS_ENOUGH, STUBS  # noqa: E402
from assignments.worker import decode, encode  # noqa: E402
from nanosdd.errors import escaped  # noqa: E402

MARKERS = ("a0", "a1", "a2", "a3", "a4", "a5", "a6")
OPEN = "a7"  # the open problem
OPEN_TIME = (
    "one takes 200 s of one CPU core before the submission runs, then 15 (an attack) to 140 s (a defence); "
    "five 18 to 28 minutes (measured on three towns, AMD EPYC, 2026-11-28)"
)
MOST_BYTES = 2**26  # of one reply
UNSHARE = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]


class Failed(Exception):
    """The submission returned no result: it raised, ended, or ran out of time."""


class Submission:
    """A submission's adapters, in another process: submission.name(...) calls the adapter of that name."""

    def __init__(self, folder: Path, seconds: float, memory: int, namespaces: bool):
        self.folder, self.seconds = folder, seconds
        self.begin()
        hidden = (
            ["--mount-proc"] if namespaces and can_unshare("--mount-proc") else []
        )  # the grader's --seed, too
        self.command = [
            *(UNSHARE + hidden if namespaces else []),
            sys.executable,
            "-I",
            str(ROOT / "assignments/worker.py"),
            str(folder),
            str(memory),
            str(int(seconds) + 1),
        ]
        self.process, self.unread, self.broken = None, bytearray(), ""

    def begin(self):
        """Let the time that it has count from now."""
        self.deadline = time.monotonic() + self.seconds

    def start(self):
        """Start the process, unless it runs."""
        if self.process and self.process.poll() is None:
            return
        if self.broken:  # it could not start before
            raise Failed(self.broken)
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "OMP_NUM_THREADS": "1",
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
        }
        self.unread = bytearray()
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        try:
            first = self.reply()
        except Failed as error:
            self.broken = str(error)
            raise
        if first.get("ready") is not True:
            self.broken = str(first.get("error", "no adapters"))
            raise Failed(self.broken)

    def stop(self):
        """End the process and all that it started."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                pipe.close()
            self.process = None

    def send(self, line: bytes):
        """Write a line to the process, which may not be reading; Failed when it cannot be written in time."""
        pipe = self.process.stdin.fileno()
        os.set_blocking(pipe, False)
        while line:
            left = self.deadline - time.monotonic()
            if left <= 0 or not select.select([], [pipe], [], left)[1]:
                self.stop()
                raise Failed(f"out of time: {self.seconds:.0f} s")
            try:
                line = line[os.write(pipe, line) :]
            except BrokenPipeError:
                self.stop()
                raise Failed("the process ended (killed, out of memory, or os._exit)") from None

    def reply(self) -> dict:
        """The next line that the process writes; Failed when there is none in time."""
        end = self.unread.find(b"\n")
        while end < 0:
            left = self.deadline - time.monotonic()
            ready = left > 0 and select.select([self.process.stdout], [], [], left)[0]
            if not ready:
                self.stop()
                raise Failed(f"out of time: {self.seconds:.0f} s")
            new = os.read(self.process.stdout.fileno(), 2**20)
            end = len(self.unread) + new.find(b"\n") if b"\n" in new else -1
            self.unread += new
            if not new or len(self.unread) > MOST_BYTES:
                self.stop()
                raise Failed(
                    "the process ended without a result (killed, out of memory, or os._exit)"
                    if not new
                    else "a result is too large"
                )
        found = json.loads(bytes(self.unread[:end]))
        del self.unread[: end + 1]
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
    wanted = dict.fromkeys(
        ["assignments/adapters.py", *(file for file, _, of, _ in STUBS if of in markers)]
    )
    missing = [f"missing: {file}" for file in wanted if not (folder / file).is_file()]
    if "a0" in markers and not (folder / "assignments/a0.json").is_file():
        missing.append("missing: assignments/a0.json")
    for marker in markers:
        own = [
            (file, name)
            for file, name, of, _ in STUBS
            if of == marker and (folder / file).is_file()
        ]
        gaps = [
            f"not written yet: {marker} {name} in {file}"
            for file, name in own
            if f'NotImplementedError("{marker}: {name}:'
            in (folder / file).read_text(errors="replace")
        ]
        if marker not in ONE_IS_ENOUGH or len(gaps) == len(own):
            missing += gaps
    return missing


def load_checks() -> dict[str, list]:
    """{marker: its checks}, from the tests of this copy."""
    import importlib

    return {marker: importlib.import_module(f"test_{marker}").CHECKS for marker in MARKERS}


def can_unshare(*more: str) -> bool:
    """Whether the other process can have namespaces of its own, with these further options of unshare."""
    command = [*UNSHARE, *more, "true"]
    return (
        bool(shutil.which("unshare"))
        and subprocess.run(command, capture_output=True).returncode == 0
    )


def grade_checks(checks, submission: Submission, seed: int) -> list[dict]:
    """Run the checks of one assignment: a row for each, {"test", "points", "of", "said"}."""
    rows = []
    for check in checks:
        said = ""
        submission.begin()  # an endless loop costs its own test alone
        try:
            check.function(*(getattr(submission, name) for name in check.adapters), seed=seed)
        except (
            Exception
        ) as error:  # results of strangers can break a test in any way: that is no point
            said = str(error).strip().split("\n")[0][:300] or type(error).__name__
        rows.append(
            {
                "test": check.name,
                "points": 0 if said else check.points,
                "of": check.points,
                "said": escaped(said),
            }
        )
    submission.stop()
    return only_the_best(checks, rows)


def only_the_best(checks, rows: list[dict]) -> list[dict]:
    """The rows of an assignment in which the choice that earned most counts, the first of equals, and no other."""
    earned = {
        choice: sum(row["points"] for check, row in zip(checks, rows) if check.choice == choice)
        for choice in full_marks(checks)
    }
    best = max(earned, key=earned.get)
    return [
        row
        if check.choice == best
        else row | {"points": 0, "of": 0, "said": f"not counted: {best} is"}
        for check, row in zip(checks, rows)
    ]


def grade_open(
    folder: Path, seed: int, towns: int = 5, memory: int = 2**31, problem=None
) -> list[dict]:
    """Grade the open problem (a7) on towns drawn from the seed; one row, as of grade_checks, with `details`.

    problem: an open_problem.Problem, in tests a small one.
    """
    from assignments import open_problem  # imports the lab

    if not (folder / "a7/submission.py").is_file():
        return [
            {
                "test": "open problem",
                "points": 0,
                "of": open_problem.POINTS[-1],
                "said": "no a7/submission.py",
            }
        ]
    problem = problem or open_problem.Problem(towns=towns)
    print(f"a7: {problem.towns} towns; {OPEN_TIME}", flush=True)
    namespaces = can_unshare()
    return [
        open_problem.solve(
            folder,
            seed,
            lambda work: Submission(work, problem.cpu_seconds, memory, namespaces),
            problem,
            lambda line: print(line, flush=True),
        )
    ]


def grade(folder: Path, seed: int, markers, seconds: float, memory: int, towns: int = 5) -> dict:
    """Grade a folder; returns {"seed", "namespaces", "missing", "assignments": {marker: rows}, "total", "of"}."""
    checks, namespaces = load_checks(), can_unshare()
    own = {
        path: path.read_bytes()
        for path in (*TESTS.glob("*.py"), *(ROOT / "assignments").glob("*.py"))
    }
    markers, opened = [marker for marker in markers if marker != OPEN], OPEN in markers
    found = {marker: [] for marker in markers}
    missing = missing_files(folder, markers)
    with tempfile.TemporaryDirectory() as work:
        for marker in markers:
            copy = Path(work) / marker
            shutil.copytree(
                folder,
                copy,
                symlinks=True,
                ignore=shutil.ignore_patterns(".git", "out", "__pycache__"),
            )
            submission = Submission(copy, seconds, memory, namespaces)
            found[marker] = grade_checks(checks[marker], submission, seed)
    if opened:
        found[OPEN] = grade_open(folder, seed, towns, memory)
    changed = [
        path for path, content in own.items() if not path.is_file() or path.read_bytes() != content
    ]
    for path in changed:
        path.write_bytes(own[path])
    if changed:
        for row in (row for rows in found.values() for row in rows):
            row.update(
                points=0, said="the grader's own files were changed while the submission ran"
            )
    every = [row for rows in found.values() for row in rows]
    return {
        "seed": seed,
        "namespaces": namespaces,
        "missing": missing,
        "assignments": found,
        "total": sum(row["points"] for row in every),
        "of": sum(row["of"] for row in every),
    }


def text_of(result: dict) -> str:
    """The table of points, and as its last line `total X of Y`."""
    lines = ["These are the public tests; a0 is read by a person too."]
    lines.append(
        "The submission had no network."
        if result["namespaces"]
        else "The submission was not cut off from the network: unshare is not permitted here."
    )
    lines += result["missing"]
    for marker, rows in result["assignments"].items():
        if rows:
            lines += [
                "",
                f"{marker}   {sum(row['points'] for row in rows)} of {sum(row['of'] for row in rows)}",
            ]
        for row in rows:
            said = textwrap.shorten(row["said"], 110)
            lines.append(
                f"  {row['points']:>3} of {row['of']:>3}  {row['test']:<24} {said}".rstrip()
            )
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
