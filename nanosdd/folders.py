"""Folders and files that commands write: whole or not at all, and nothing that a command did not write is lost.

A run is written beside its place, in .NAME.new, which is renamed when it is finished; a lock on that folder keeps a
second command out. What a killed command left is found by the next one that writes to the same place:

    .NAME.new unfinished    removed, unless it saved a state: then the run goes on from there (nanosdd/resume.py)
    .NAME.new finished      takes its place
    .NAME.old               an earlier run on its way out: put back where NAME is missing, else deleted

The file run.json of a run lists what it wrote, with sizes and hashes. A run that is replaced is deleted only when
nothing else is in its folder; else the folder moves to NAME.kept-N.
"""

import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from nanosdd.errors import InputError
from nanosdd.progress import Progress

STATE = "state"  # of a run that was interrupted, in .NAME.new
STATES = (
    STATE,
    f"{STATE}.new",
    f"{STATE}.old",
)  # the last two while one takes the place of another
HASH_BYTES = 2**28  # of a file at once
EVALUATED = '"script": "eval.py"'  # in the metrics.json of eval.py, which is not in the list


@contextmanager
def new_folder(path, record: dict | None = None):
    """Yield a folder that becomes `path` when the block ends well, and disappears when it does not.

    The block writes run.json, a JSON object, which gets a list of what was written. Where it saved a state, or was
    finished, the folder stays after an error, and the next call with the same `record` finds its part STATE again. An
    earlier run at `path` is replaced; InputError for anything else there, and while another command writes to it.
    """
    path = Path(path)
    check_out(path)
    new = beside(path, "new")
    while True:
        with lock(new):
            if recover(path):
                continue  # the locked folder is now at `path`
            clear(new, record)
            try:
                yield new
                list_files(new)
                shutil.rmtree(new / STATE, ignore_errors=True)
                replace(new, path)
            except BaseException:
                if missing_file(new) is not None and not any(
                    read_record(new / name) for name in STATES
                ):
                    shutil.rmtree(new, ignore_errors=True)
                raise
            return


def beside(path, what: str) -> Path:
    """.NAME.WHAT beside a path."""
    path = Path(path)
    return path.parent / f".{path.name}.{what}"


@contextmanager
def lock(folder: Path):
    """Hold a folder, which is made where it is missing, against other commands; InputError when one has it."""
    while True:
        make_folder(folder)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise InputError(
                f"another command is writing {folder}; wait for it, or choose another --out"
            ) from None
        if folder.is_dir() and os.fstat(handle).st_ino == folder.stat().st_ino:
            break
        os.close(handle)  # the other command finished between the two lines, and renamed it
    try:
        yield
    finally:
        os.close(handle)


def recover(path: Path) -> bool:
    """Put right what a killed command left at a path, whose lock the caller holds; returns whether a finished run was
    moved there, and with it the locked folder."""
    new, old = beside(path, "new"), beside(path, "old")
    if missing_file(new) is None:
        print(f"{path}: an earlier command was killed after its last step; its run takes its place")
        shutil.rmtree(new / STATE, ignore_errors=True)
        replace(new, path)
        return True
    if old.is_dir() and not path.exists():
        print(f"{path}: an earlier command was killed while it replaced this run; it is put back")
        old.rename(path)
    elif old.is_dir():
        print(f"{path}: what an earlier command left behind is removed")
        shutil.rmtree(old)
    return False


def recover_from_kill(path):
    """Put right what a killed command left at a path; InputError while another command is writing there."""
    new = beside(path, "new")
    if new.exists() or beside(path, "old").exists():
        with lock(new):
            if not recover(Path(path)) and not any(new.iterdir()):
                new.rmdir()


def clear(new: Path, record: dict | None):
    """Empty the folder that an interrupted command left, but for a state with this record."""
    for name in STATES[1:]:  # killed while it saved
        if not (new / STATE).exists() and read_record(new / name):
            (new / name).rename(new / STATE)
    keep = record is not None and read_record(new / STATE) == record
    left = [part for part in new.iterdir() if not (keep and part.name == STATE)]
    if left:
        print(f"{new}: what an earlier command left unfinished is removed")
    for part in left:
        shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()


def read_record(state: Path) -> dict | None:
    """The record of the run that saved a state; None where there is none that can be read."""
    try:
        return json.loads((state / "state.json").read_text(encoding="utf-8"))["record"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def replace(new: Path, path: Path):
    """Rename a finished folder to `path`. An earlier run there is deleted after that, or, where somebody added or
    changed a file, moved to NAME.kept-N."""
    old = beside(path, "old")
    if old.exists():
        shutil.rmtree(old)
    if path.exists() and not untouched(path):
        print(f"{path}: files were added to this run or changed; it is now {move_aside(path)}")
    elif path.exists():
        path.rename(old)
    new.rename(path)
    flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def untouched(folder: Path) -> bool:
    """Whether a run folder holds what the run wrote, as it wrote it, and nothing else but eval.py's metrics.json."""
    metrics = folder / "metrics.json"
    own = {*written(folder), "run.json"}
    if metrics.is_file() and EVALUATED in metrics.read_text(encoding="utf-8", errors="replace"):
        own.add("metrics.json")
    files = [file for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()]
    return (
        missing_file(folder) is None
        and {str(file.relative_to(folder)) for file in files} <= own
        and not any(file.is_symlink() for file in files)
    )


def move_aside(path: Path) -> Path:
    """Rename what stands at a path to the first free NAME.kept-N beside it; returns that."""
    return path.rename(
        next(
            kept
            for number in itertools.count(1)
            if not (kept := path.parent / f"{path.name}.kept-{number}").exists()
        )
    )


def list_files(folder: Path):
    """Flush every file of a run to the disk, and list them with sizes and hashes in its run.json."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.relative_to(folder).parts[0] not in ("run.json", *STATES)
    ]
    for file in files:
        flush(file)
    record["wrote"] = {
        str(file.relative_to(folder)): [file.stat().st_size, file_hash(file)] for file in files
    }
    folder.chmod(0o755)
    write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")


def written(folder: Path) -> dict:
    """{file: [size, hash]} that a run lists; {} where there is no list."""
    try:
        wrote = json.loads((folder / "run.json").read_text(encoding="utf-8"))["wrote"]
        return wrote if isinstance(wrote, dict) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def missing_file(folder: Path) -> str | None:
    """None when a run folder is whole; else the name of a file that is missing or was changed, "run.json" where it has
    no list."""
    wrote = written(folder)
    if not wrote:
        return "run.json"
    for name, listed in wrote.items():
        file = folder / name
        if not file.is_file() or [file.stat().st_size, file_hash(file)] != listed:
            return name
    return None


# ---- places to write to ----


def check_out(path, model=None):
    """InputError when `path` may not be replaced by a run: it is no earlier run, holds the working folder, is a
    symbolic link, or is inside or around the folder `model`, from which the run starts."""
    text, path = str(path), Path(path)
    real = path.resolve()
    if path.is_symlink():
        raise InputError(f"--out {path} is a symbolic link; name the folder that it leads to")
    if not text.strip() or Path.cwd().is_relative_to(real):
        raise InputError(f"--out {text!r} holds the folder that you are in; name a new folder")
    if model and (
        Path(model).resolve().is_relative_to(real) or real.is_relative_to(Path(model).resolve())
    ):
        raise InputError(
            f"--out {path} is the folder of --model {model}, around it or inside; choose another, to keep "
            "the model it starts from"
        )
    blocked = next(
        (parent for parent in path.parents if parent.exists() and not parent.is_dir()), None
    )
    if blocked:
        raise InputError(
            f"{path} cannot be a folder, since {blocked} is a file; choose another --out"
        )
    if (
        path.exists()
        and not (path / "run.json").is_file()
        and (not path.is_dir() or any(path.iterdir()))
    ):
        raise InputError(
            f"{path} exists and is not an earlier run (it has no run.json); choose another --out"
        )
    check_writable(next(parent for parent in real.parents if parent.exists()))


def check_folder(path):
    """InputError when files cannot be written into the folder `path`, which is made where it is missing."""
    if Path(path).exists() and not Path(path).is_dir():
        raise InputError(f"--out {path} is a file; give a folder")
    make_folder(path)
    check_writable(path)


def check_writable(folder):
    """InputError when no file can be made in an existing folder; better known before hours of work than after."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"nothing can be written into {folder} ({error.strerror}); choose another --out"
        ) from None


def make_folder(path):
    """Make a folder and its parents where they are missing; InputError when that is not possible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path} cannot be a folder ({error.strerror}); choose another place"
        ) from None


def write_text(path, text: str):
    """Write a file under a temporary name, then rename it: readers see the old text or the new one, never half."""
    path = Path(path)
    make_folder(path.parent)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_own(path, text: str, mark: str):
    """Write a file as write_text; what stands there already without the text `mark` is not ours and moves aside."""
    path = Path(path)
    if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace"):
        print(f"{path}: not written by this command, moved to {move_aside(path)}")
    write_text(path, text)


def write_results(folder, texts: dict[str, tuple[str, str]]) -> Path:
    """Write files {name: (text, mark)} into a folder, or, when that fails, into a new one for temporary files; returns
    the folder. mark: as in write_own."""
    try:
        for name, (text, mark) in texts.items():
            write_own(Path(folder) / name, text, mark)
        return Path(folder)
    except (OSError, InputError) as error:
        other = Path(tempfile.mkdtemp(prefix="nanosdd-"))
        print(f"{folder}: {error}; the results go to {other} instead")
        for name, (text, _) in texts.items():
            write_text(other / name, text)
        return other


def flush(path):
    """Have the disk hold what was written to a file, or renamed in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_hash(path) -> str:
    """SHA-256 of a file, in hex."""
    digest, parts = hashlib.sha256(), max(1, math.ceil(os.path.getsize(path) / HASH_BYTES))
    with open(path, "rb") as file:
        for _ in Progress(range(parts), desc=f"checks {Path(path).name}", disable=parts == 1):
            digest.update(file.read(HASH_BYTES))
    return digest.hexdigest()
