"""Run folders: written whole or not at all, and reused only when nothing that made them has changed.

A run depends on its settings, its input files, and the code that made it: the files that its script imports, directly
or not, and the file of its world. Docstrings and comments do not count.
"""

import ast
import functools
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from nanosdd.device import machine
from nanosdd.errors import InputError

ROOT = Path(__file__).parent.parent
MODEL_FILES = ("*.safetensors", "config.json", "tokenizer*", "generation_config.json", "chat_template.jinja",
               "chat.txt", "world.json")


@contextmanager
def new_folder(path):
    """Yield a temporary folder that becomes `path` when the block ends well, and disappears when it does not.

    An earlier run there is replaced; a folder that is no run (without run.json) is refused, not deleted.
    """
    path = Path(path)
    check_out(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_out(path):
    """InputError when `path` may not be replaced by a run."""
    path = Path(path)
    blocked = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)
    if blocked:
        raise InputError(f"{path} cannot be a folder, since {blocked} is a file; choose another --out")
    if path.exists() and not (path / "run.json").is_file() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not an earlier run (it has no run.json); choose another --out")


def check_folder(path):
    """InputError when `path` is a file where a folder is wanted."""
    if Path(path).exists() and not Path(path).is_dir():
        raise InputError(f"--out {path} is a file; give a folder")


def make_folder(path):
    """Make a folder and its parents where they are missing; InputError when that is not possible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be a folder ({error.strerror}); choose another place") from None


def write_text(path, text: str):
    """Write a file under a temporary name, then rename it: readers see the old text or the new one, never half."""
    path = Path(path)
    make_folder(path.parent)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def file_hash(path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """The project file that the class of a thing is written in."""
    return type(thing).__module__.replace(".", "/") + ".py"


@functools.cache
def source_hash(file: str) -> str:
    """SHA-256 of a project file's syntax tree without docstrings."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def fingerprint(settings: dict, inputs: list, code: list[str]) -> dict:
    """What a run depends on. inputs: files and model folders; code: project files, each with all that it imports."""
    files = []
    for path in map(Path, inputs):
        files += sorted(file for pattern in MODEL_FILES for file in path.glob(pattern)) if path.is_dir() else [path]
    return {"settings": json.loads(json.dumps(settings)), "inputs": {str(file): file_hash(file) for file in files},
            "source": {file: source_hash(file) for file in source_files(*code)}}


def why_stale(file, wanted: dict) -> str | None:
    """None when the JSON in `file` records this very fingerprint; else the reason it does not, in a few words."""
    if not Path(file).is_file():
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
    return None


# ---- a file of finished parts ----

class Finished:
    """Results by key, kept in a JSON Lines file as they come, so that an interrupted command goes on where it was.

    The first line is the fingerprint that they belong to; a file of another fingerprint is started anew.
    """

    def __init__(self, path, record: dict):
        self.path, self.results = Path(path), {}
        if self.path.is_file():
            first, *lines = self.path.read_text(encoding="utf-8").split("\n")
            try:
                if json.loads(first) == record:
                    for line in lines[:-1]:  # what follows the last newline is half a line
                        stored = json.loads(line)
                        self.results[stored["key"]] = stored["result"]
            except (ValueError, KeyError, TypeError):
                self.results = {}
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
    commit = shutil.which("git") and subprocess.run(describe, capture_output=True, text=True, cwd=ROOT).stdout
    return {"commit": (commit or "unknown").strip(), "machine": machine(), "date": time.strftime("%Y-%m-%d")}
