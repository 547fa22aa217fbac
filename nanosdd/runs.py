"""Run folders: written whole or not at all, and reused only when nothing that made them has changed."""

import ast
import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from nanosdd.errors import InputError

ROOT = Path(__file__).parent.parent
WEIGHT_FILES = ("*.safetensors", "config.json", "tokenizer*", "generation_config.json", "chat_template.jinja",
                "chat.txt", "town.json")


@contextmanager
def new_folder(path):
    """Yield a temporary folder that becomes `path` when the block ends well, and disappears when it does not.

    An earlier run there is replaced; a folder that is no run (without args.json) is refused, not deleted.
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
    if path.exists() and not (path / "args.json").is_file() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not an earlier run (it has no args.json); choose another --out")


def make_folder(path):
    """Make a folder and those above it; InputError when that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be a folder to write in ({error.strerror}); choose another place") from None


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


def source_hash(name: str) -> str:
    """SHA-256 of a project file; of Python its syntax tree without docstrings, so that what is only said in other words
    is no change."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".py"):
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        text = ast.dump(tree)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(args: dict, inputs: list, sources: list[str]) -> dict:
    """What a run depends on: its arguments, its input files (folders: their weights and tokenizer), its source."""
    files = []
    for path in map(Path, inputs):
        files += sorted(f for pattern in WEIGHT_FILES for f in path.glob(pattern)) if path.is_dir() else [path]
    return {"args": json.loads(json.dumps(args)), "inputs": {str(file): file_hash(file) for file in files},
            "source": {name: source_hash(name) for name in sources}}


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
    for part, what in (("args", "argument"), ("inputs", "input"), ("source", "source file")):
        old, new = found[part], wanted[part]
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if changed:
            return f"{what} {changed[0]} changed" + (f" (and {len(changed) - 1} more)" if len(changed) > 1 else "")
    return None
