"""Go on where a training run was: its state is saved now and then, and found again by the same command.

A state is a folder with rankR.safetensors of each process (its weights and the optimizer's moments; of FSDP its own
shards) and state.json (the step, the log, what else the loop keeps, and the record of the run that it belongs to). The
position in the data is not saved: batches are drawn from a seed, and the first `step` of them are drawn again. No other
generator is in use.
"""

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from nanosdd.checkpoint import local, save_tensors
from nanosdd.device import barrier, rank_and_world_size
from nanosdd.folders import STATE, flush, make_folder

SECONDS = 300  # between two states, where --save-every does not say


def save_state(folder: Path, model, optimizer, content: dict):
    """Write a state whole into a folder, then drop the one before. content: what JSON can hold, with "record" and
    "step"."""
    rank, state, new = rank_and_world_size()[0], folder / STATE, folder / f"{STATE}.new"
    if rank == 0:
        shutil.rmtree(new, ignore_errors=True)
        make_folder(new)
    barrier()
    file = new / f"rank{rank}.safetensors"
    save_tensors(tensors_of(model, optimizer), file)
    flush(file)
    barrier()
    if rank == 0:
        (new / "state.json").write_text(json.dumps(content))
        flush(new / "state.json")
        old = folder / f"{STATE}.old"
        shutil.rmtree(old, ignore_errors=True)
        if state.exists():
            state.rename(old)
        new.rename(state)
        flush(folder)
        shutil.rmtree(old, ignore_errors=True)
    barrier()  # or a process that ends here would have torchrun end the others before they are done


def load_state(folder: Path, model, optimizer) -> dict:
    """Put weights and moments of a folder's state in place; returns its content, {} where there is no state."""
    state = folder / STATE
    if not (state / "state.json").is_file():
        return {}
    tensors = load_file(state / f"rank{rank_and_world_size()[0]}.safetensors")
    for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        local(parameter.detach()).copy_(tensors[f"{i}"])
        found = {
            name.split(".")[1]: tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{i}.")
        }
        for name, tensor in found.items():
            if name == "step":
                split = hasattr(optimizer, "master")  # SplitAdamW counts with an int
                value = int(tensor) if split else tensor.to(parameter.device)
            else:
                value = torch.empty_like(parameter.detach())
                local(value).copy_(tensor)
            optimizer.state[parameter][name] = value
    return json.loads((state / "state.json").read_text(encoding="utf-8"))


def tensors_of(model, optimizer) -> dict[str, torch.Tensor]:
    """Weights as "I" and moments as "I.NAME", on the CPU; I counts the optimizer's parameters."""
    tensors = {}
    for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        tensors[f"{i}"] = local(parameter.detach()).cpu().contiguous()
        for name, value in optimizer.state[parameter].items():
            value = local(value) if isinstance(value, torch.Tensor) else torch.tensor(value)
            tensors[f"{i}.{name}"] = value.cpu().contiguous()
    return tensors


class Pauses:
    """Says after each step whether to save, and whether to stop: Ctrl-C and SIGTERM only ask for it.

    every: steps between two states; 0: about five minutes. All processes of a run get the same answers.
    """

    def __init__(self, every: int = 0):
        self.every, self.last, self.asked = every, time.monotonic(), False

    def __enter__(self):
        self.handlers = {
            number: signal.signal(number, self._ask)
            for number in (signal.SIGINT, signal.SIGTERM)
            if signal.getsignal(number) is not signal.SIG_IGN
        }  # as of a job in the background
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if self.asked and number == signal.SIGINT:  # for the second time; launchers repeat SIGTERM
            raise KeyboardInterrupt
        self.asked = True
        with suppress(OSError):  # the terminal may be gone
            os.write(
                2,
                b"\nstopping after this step; Ctrl-C once more: at once, what was not saved is lost\n",
            )

    def after(self, step: int) -> tuple[bool, bool]:
        """(save, stop) after so many steps."""
        due = step % self.every == 0 if self.every else time.monotonic() - self.last > SECONDS
        answers = torch.tensor([due or self.asked, self.asked], dtype=torch.int32)
        if rank_and_world_size()[1] > 1:
            answers = answers.cuda() if dist.get_backend() == "nccl" else answers
            dist.all_reduce(answers, op=dist.ReduceOp.MAX)
        save, stop = map(bool, answers.tolist())
        return save, stop

    def saved(self):
        """Say that a state has just been saved."""
        self.last = time.monotonic()
