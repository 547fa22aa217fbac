"""What a run depends on: it is reused only when nothing that made it has changed, and it is still whole.

A run depends on its settings, its input files, and the code that made it: the files that its script imports, directly
or not, and the file of its world. Docstrings and comments do not count.
"""

import ast
import functools
import hashlib
import inspect
import json
import shutil
import subprocess
import time
from pathlib import Path

from nanosdd.device import machine
from nanosdd.folders import file_hash, missing_file, move_aside, write_text

ROOT = Path(__file__).parent.parent
MODEL_FILES = (
    "*.safetensors",
    "config.json",
    "tokenizer*",
    "generation_config.json",
    "chat_template.jinja",
    "chat.txt",
    "world.json",
)


# ---- what a run depends on ----


def source_files(*files: str) -> list[str]:
    """These project files and all that they import, directly or not, as paths from the project's root."""
    found, waiting = set(), set(files)
    while waiting:
        found |= waiting
        waiting = set().union(*(imported_files(file) for file in waiting)) - found
    return sorted(found)


@functools.cache
def imported_files(file: str) -> list[str]:
    """The project files that a project file imports, read from its import statements, those inside functions too."""
    modules = []
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    paths = [module.replace(".", "/") + ".py" for module in modules]
    return [path for path in paths if (ROOT / path).is_file()]


def source_of(thing) -> str:
    """The file that the class of a thing is written in, from the project's root: also of a script that is run."""
    return Path(inspect.getfile(type(thing))).relative_to(ROOT).as_posix()


@functools.cache
def source_hash(file: str) -> str:
    """SHA-256 of a project file's syntax tree without docstrings."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def fingerprint(settings: dict, inputs: list, code: list[str]) -> dict:
    """What a run depends on. inputs: files and model folders; code: project files, each with all that it imports."""
    files = []
    for path in map(Path, inputs):
        files += (
            sorted(file for pattern in MODEL_FILES for file in path.glob(pattern))
            if path.is_dir()
            else [path]
        )
    return {
        "settings": json.loads(json.dumps(settings)),
        "inputs": {str(file): file_hash(file) for file in files},
        "source": {file: source_hash(file) for file in source_files(*code)},
    }


def why_stale(folder, wanted: dict) -> str | None:
    """None when run.json of a run folder records this very fingerprint and all that the run wrote is there, unchanged;
    else the reason, in a few words."""
    file = Path(folder) / "run.json"
    if not file.is_file():
        return "not there yet"
    try:
        found = json.loads(Path(file).read_text())
        if not all(isinstance(found[part], dict) for part in wanted):
            return "unreadable"
    except (ValueError, KeyError, TypeError):
        return "unreadable"
    for part, what in (("settings", "setting"), ("inputs", "input"), ("source", "source file")):
        old, new = found[part], wanted[part]
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if changed:
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            return f"{what} {changed[0]} changed{more}"
    damaged = missing_file(Path(folder))
    return f"damaged: {damaged} is missing or was changed" if damaged else None


# ---- a file of finished parts ----


class Finished:
    """Results by key, kept in a JSON Lines file as they come, so that an interrupted command goes on where it was.

    The first line is the fingerprint that they belong to; results of another fingerprint are not kept. A damaged line
    is left out, so that its part is run again. A file that does not begin like one of these moves to NAME.kept-N.
    """

    def __init__(self, path, record: dict):
        self.path, self.results = Path(path), {}
        if self.path.exists():
            try:
                first, *lines = self.path.read_text(encoding="utf-8").split("\n")
                kept = json.loads(first)
            except (OSError, ValueError, RecursionError):
                kept = None
            if not isinstance(kept, dict):
                print(f"{self.path}: not written by this command, moved to {move_aside(self.path)}")
            for line in lines if kept == record else []:
                try:
                    stored = json.loads(line)
                    self.results[stored["key"]] = stored["result"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
        lines = [json.dumps(record), *(self._line(key) for key in self.results), ""]
        write_text(self.path, "\n".join(lines))

    def add(self, key: str, result):
        """Keep a result, in memory and in the file."""
        self.results[key] = result
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(self._line(key) + "\n")

    def _line(self, key: str) -> str:
        return json.dumps({"key": key, "result": self.results[key]})


def made_by() -> dict:
    """What a result was made by and on: commit, machine, date."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = (
        shutil.which("git")
        and subprocess.run(describe, capture_output=True, text=True, cwd=ROOT).stdout
    )
    return {
        "commit": (commit or "unknown").strip(),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
