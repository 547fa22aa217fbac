"""Runs: what a run depends on, the folder that it writes, and files of finished parts.

A run is finished when its run.json says what made it: run.json is written last, and removed first
when the run is replaced. Every file is written under a temporary name and renamed, and only files
whose names we write are touched. So a run that is killed at any moment is not finished, and goes on
from what lies in its folder:

    state/state.json                the record; once a state was saved, its step and the loop's own
    state/rankR-stepS.safetensors   weights and optimizer state of a rank: its shards under FSDP

The position in the data is not saved: batches are drawn from a seed, and drawn again up to there.
"""

import ast
import hashlib
import inspect
import json
import os
import signal
import subprocess
import tempfile
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nanosdd.checkpoint import find_tensors, local, save_tensors, write_text
from nanosdd.device import barrier, machine, rank_and_world_size, sum_over_processes
from nanosdd.errors import InputError, Interrupted

ROOT = Path(__file__).resolve().parent.parent
# Of a model folder, beside the weights.
MODEL_FILES = ("*config.json", "tokenizer*", "added_tokens.json", "chat*", "world.json")
CHANGES = {
    "settings": "{} was {}, is {}",
    "inputs": "input {} changed",
    "code": "code of {} changed",
}
SAVE_SECONDS = 300
DAMAGED = (ValueError, LookupError, TypeError, AttributeError)  # what reading a damaged file raises


# ---- what a run depends on ----


def fingerprint(settings: dict, inputs: list, code: list) -> dict:
    """The record of a run: its settings, and hashes of its input files and of its code.

    inputs: files and model folders; code: functions, classes or modules.
    """
    files = []
    for path in map(Path, inputs):
        if path.is_dir():
            files += sorted(set(find_tensors(path).values()))
            for pattern in MODEL_FILES:
                files += sorted(filter(Path.is_file, path.glob(pattern)))
        else:
            files.append(path)
    return {
        "settings": json.loads(json.dumps(settings)),
        "inputs": {file.as_posix(): file_hash(file) for file in files},
        "code": {code_name(thing): code_hash(thing) for thing in code},
    }


def file_hash(path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_hash(value) -> str:
    """SHA-256 of what JSON can hold, in hex."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def code_name(thing) -> str:
    """FILE.NAME of a function or class, FILE of a module, also of one that is run as __main__."""
    stem = Path(inspect.getsourcefile(thing)).stem
    if inspect.ismodule(thing):
        return stem
    return f"{stem}.{thing.__qualname__}"


def code_hash(thing) -> str:
    """SHA-256 of the code of a function, class or module, without comments and docstrings."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                del node.body[0]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


def difference(old: dict, new: dict) -> str | None:
    """The first difference of two records in words; None if they are equal."""
    for part, words in CHANGES.items():
        for name in sorted({*old[part], *new[part]}):
            before = old[part].get(name)
            after = new[part].get(name)
            if before != after:
                return words.format(name, before, after)
    return None


def made_by() -> dict:
    """What a result was made by and on: commit, machine, date."""
    commit = ""
    with suppress(OSError):  # no git
        # Not the repository that this folder may lie in, nor the one of a hook.
        words = ["git", f"--git-dir={ROOT}/.git", f"--work-tree={ROOT}"]
        words += ["describe", "--always", "--dirty"]
        commit = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    date = time.strftime("%Y-%m-%d")
    return {"commit": commit or "unknown", "machine": machine(), "date": date}


# ---- the folder of a run ----


def check_folder(path):
    """InputError when no file can be written into a folder, or to where it is to be made."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"nothing can be written into {folder} ({error.strerror}); choose another place"
        ) from None


def check_new(path):
    """InputError when there is a file already, or none can be written."""
    if os.path.lexists(path):
        raise InputError(f"{path} exists; delete it, or name a new file")
    check_folder(Path(path).parent)


def lock(folder: Path) -> int | None:
    """Keep other commands out of a folder until the handle is closed; None where that is not
    possible."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(f"another command is writing {folder}; wait, or change --out") from None
    return handle


def check_finished(folder):
    """InputError when the run in a folder is not finished."""
    folder = Path(folder)
    if (folder / "state/state.json").exists() and not (folder / "run.json").exists():
        raise InputError(f"{folder} holds an unfinished run; run its command again to finish it")


class Run:
    """A run that writes a folder; within `with run:` no other command writes there.

    save_every: steps between two saved states, 0: about five minutes; fresh: replace the run in the
    folder. InputError when the folder cannot be written, or holds another run or other files.
    Every rank makes one, and rank 0 writes.
    """

    def __init__(self, folder, record: dict, save_every: int = 0, fresh: bool = False):
        self.folder = Path(folder)
        self.run_file = self.folder / "run.json"
        self.state = self.folder / "state"
        self.state_file = self.state / "state.json"
        self.record = record
        self.save_every = save_every
        self.fresh = fresh
        self.asked_to_stop = False
        self.rank = rank_and_world_size()[0]
        self._check()

    def _check(self):
        """Find out whether the run is finished, or what was saved of it."""
        self.finished = False
        self.saved = {}
        place = Path(os.path.realpath(self.folder))  # a loop of links is no error yet
        needed = (".", *self.record["inputs"])
        inside = any(Path(path).resolve().is_relative_to(place) for path in needed)
        if self.folder.is_symlink() or inside:
            raise InputError(
                f"--out {self.folder} is a link, or holds this folder or an input; name a new one"
            )
        check_folder(self.folder)
        file = self.run_file if self.run_file.exists() else self.state_file
        if not file.exists():
            # Only state/ is there when a run was killed at its start.
            if self.folder.exists() and set(self.folder.iterdir()) - {self.state}:
                raise InputError(f"{self.folder} exists and is not a run; choose another --out")
            return
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            change = difference(saved, self.record)
        except DAMAGED:
            raise InputError(
                f"{file} is damaged or of another program; delete it, or choose another --out"
            ) from None
        if self.fresh:
            return
        if change:
            raise InputError(
                f"{self.folder} holds another run: {change}; "
                "--fresh replaces it (train.py), another --out keeps both"
            )
        self.saved = saved
        self.finished = file == self.run_file

    def __enter__(self):
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.folder)
            self._check()  # again, since another command may have been here meanwhile
            if "step" not in self.saved:
                write_text(self.state_file, json.dumps(self.record))
            self.run_file.unlink(missing_ok=True)
        barrier()
        self.handlers = {}
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP under nohup
                self.handlers[number] = signal.signal(number, self._ask_to_stop)
        self.saved_at = time.monotonic()
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, RuntimeError):  # most often PyTorch's out of memory
            batch = f"batches of {self.record['settings'].get('batch_size')} rows"
            error.add_note(f"in {batch}; try a smaller --micro-batch")
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.rank == 0:
            if [*self.folder.rglob("*")] == [self.state, self.state_file]:  # nothing was saved
                self._remove_state()
                self.folder.rmdir()
            if self.lock is not None:
                os.close(self.lock)

    def _ask_to_stop(self, number, frame):
        if self.asked_to_stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked_to_stop = True
        with suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this step; Ctrl-C again: at once, and it is lost\n")

    def load_state(self, model, optimizer) -> dict:
        """Put a saved state in place; returns its content with "step", {} when none was saved."""
        if "step" not in self.saved:
            return {}
        file = self._rank_file(self.saved["step"])
        # A step at lr 0 without gradients makes the optimizer's state, to be filled.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        model.zero_grad()
        try:
            tensors = load_file(file)
            for name, tensor in state_tensors(model, optimizer).items():
                tensor.copy_(tensors[name])
        except (OSError, SafetensorError, RuntimeError, *DAMAGED) as error:
            raise InputError(f"{file} is damaged ({error}); --fresh starts over") from None
        return self.saved

    def should_save(self, step: int) -> bool:
        """Whether a state is due after so many steps, or a stop was asked for, on any rank."""
        due = time.monotonic() - self.saved_at > SAVE_SECONDS
        if self.save_every:
            due = step % self.save_every == 0
        return sum_over_processes(due or self.asked_to_stop) > 0

    def save_state(self, step: int, model, optimizer, content: dict):
        """Keep what to go on from after so many steps; Interrupted when a stop was asked for."""
        save_tensors(state_tensors(model, optimizer), self._rank_file(step))
        barrier()
        if self.rank == 0:
            state = self.record | content | {"step": step}
            write_text(self.state_file, json.dumps(state))
            self._remove("*rank*-step*", but=f"-step{step}.")
        self.saved_at = time.monotonic()
        self._stop_if_asked(
            f"stopped after step {step}; the same command goes on from there (without --fresh)"
        )

    def finish(self):
        """Call this when all files are written; Interrupted when a stop was asked for meanwhile."""
        if self.rank == 0:
            write_text(self.run_file, json.dumps(self.record, indent=1) + "\n")
            self._remove_state()
        self._stop_if_asked("finished, and stopped before what comes next")

    def _stop_if_asked(self, what: str):
        """Interrupted on every rank when one was asked to stop; the ranks wait for each other."""
        if sum_over_processes(self.asked_to_stop) > 0:
            raise Interrupted(f"{self.folder}: {what}")

    def _rank_file(self, step: int) -> Path:
        return self.state / f"rank{self.rank}-step{step}.safetensors"

    def _remove_state(self):
        self._remove("*state.json*")
        self._remove("*rank*-step*")
        with suppress(OSError):  # somebody's own files are in it
            self.state.rmdir()

    def _remove(self, pattern: str, but: str = "nothing"):
        """Remove files of the state, also those under temporary names."""
        for file in self.state.glob(pattern):
            if but not in file.name:
                file.unlink()


def state_tensors(model, optimizer) -> dict[str, torch.Tensor]:
    """Weights and optimizer state by name, as this rank holds them."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = local(parameter.detach())
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name} {key}"] = local(value)
    return tensors


# ---- a file of finished parts ----


class Results:
    """Results by key in a JSON Lines file, which grows as they come: a command goes on from there.

    A line holds the record that its result depends on. Lines of other records stay in the file and
    are ignored, and so are damaged lines.
    """

    def __init__(self, path, record: dict):
        self.path = Path(path)
        self.record = record
        self.results = {}
        text = ""
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8", errors="replace")
        if text and '{"record": ' not in text[:20]:
            raise InputError(f"{path} is of another program; move it, or choose another --out")
        changes = []
        for line in text.split("\n"):
            with suppress(*DAMAGED):
                found = json.loads(line)
                change = difference(found["record"], record)
                if change:
                    changes.append(change)
                else:
                    self.results[found["key"]] = found["result"]
        if changes:
            others = f"{len(changes)} results of other settings or code stay there"
            print(f"{path}: {others}: {changes[-1]}")

    def add(self, key: str, result):
        """Keep a result, in memory and in the file."""
        self.results[key] = result
        line = json.dumps({"record": self.record, "key": key, "result": result})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"\n{line}")  # the last line may be cut short
