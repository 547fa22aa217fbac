"""Where and how to compute: one device, or one process for each GPU under torchrun (PyTorch's FSDP2)."""

import argparse
import ctypes
import os
import platform
import re
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from nanosdd.checkpoint import read_config
from nanosdd.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Compute:
    """How a model computes; none of it changes what is computed, rounding aside."""

    device: str = "cpu"  # "cpu", "cuda", "cuda:N" or "mps"
    dtype: str = "fp32"  # of compute; bf16 is autocast over the weights
    compile: bool = False  # torch.compile every layer
    weights: str = (
        "fp32"  # how training holds weights; "bf16": split weights, see nanosdd/split_adamw.py
    )
    micro_batch: int = 0  # rows at once in training, 0: the whole batch
    checkpoint_activations: bool = False  # recompute layers in the backward pass
    save_every: int = 0  # steps between two saved states of a training run; 0: about five minutes

    def autocast(self):
        """The context in which the model computes in `dtype`."""
        if self.dtype == "bf16":
            return torch.autocast(torch.device(self.device).type, torch.bfloat16)
        return nullcontext()


def add_compute_arguments(p, training: bool = False):
    """Add --device, --dtype and --compile to a parser; for training also --micro-batch, --weights,
    --checkpoint-activations and --save-every."""
    p.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:N, or mps, which is untested (default: cuda where there is one)",
    )
    p.add_argument(
        "--dtype",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="compute dtype; weights stay fp32 (default: bf16 on CUDA, and for chat models on a CPU that "
        "has it; else fp32)",
    )
    p.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile every layer (default: on CUDA)",
    )
    if training:
        p.add_argument(
            "--micro-batch",
            type=int,
            default=0,
            metavar="ROWS",
            help="rows at once, the rest accumulates; the same update (default: the whole batch)",
        )
        p.add_argument(
            "--weights",
            choices=list(DTYPES),
            default="fp32",
            help="how weights are held; bf16: split, with every fp32 bit of an update kept (default: fp32)",
        )
        p.add_argument(
            "--checkpoint-activations",
            action="store_true",
            help="recompute layers in the backward pass: far less memory, about a third more time",
        )
        p.add_argument(
            "--save-every",
            type=int,
            default=0,
            metavar="STEPS",
            help="keep the state to go on from, should the run be interrupted (default: every 5 minutes)",
        )


def resolve_compute(device: str, dtype: str, compile: bool | None, **training) -> Compute:
    """The Compute that these arguments ask for; training: its other fields. InputError for a device that is not there."""
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    try:
        kind, number = torch.device(device).type, torch.device(device).index
    except RuntimeError:
        kind = None
    seen = ", ".join(["cpu", *(f"cuda:{i}" for i in range(gpus)), *["mps"] * mps])
    if kind not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {device} is unknown; PyTorch sees {seen}")
    if kind == "cpu" and device != "cpu":
        raise InputError(f"--device {device}: a CPU has no number; use cpu")
    if kind == "cuda" and (number or 0) >= gpus or kind == "mps" and not mps:
        raise InputError(
            f"--device {device} is not there: PyTorch sees {seen}; choose one of them, or install its "
            "build for this device"
        )
    able = has_bf16(kind, torch.cuda.get_device_capability(device) if kind == "cuda" else None)
    if training.get("weights") == "bf16":
        if dtype == "fp32":
            raise InputError(
                "--weights bf16 computes in bf16, since nothing finer is held; leave --dtype out"
            )
        dtype = "bf16"
    if dtype == "bf16" and not able:
        raise InputError(
            f"bf16 on {device}: it has no bf16 arithmetic; use --dtype fp32, without --weights bf16"
        )
    if kind == "cuda" and not able:
        print(
            f"{device} has no bf16 arithmetic (compute capability below 8.0): fp32, which is slower"
        )
    if kind == "mps":
        if compile:
            raise InputError("--compile on mps is not supported; leave it out")
        print("mps is untested: fp32, uncompiled")
    if dtype == "auto":
        dtype = "bf16" if kind == "cuda" and able else "fp32"
    for name in ("micro_batch", "save_every"):
        if training.get(name, 0) < 0:
            raise InputError(f"--{name.replace('_', '-')} {training[name]} must be 0 or more")
    return Compute(device, dtype, kind == "cuda" if compile is None else compile, **training)


def for_model(compute: Compute, dtype: str, folder) -> Compute:
    """The same Compute, or in bf16 where `dtype` is "auto" and that is faster on this CPU for the model in a folder;
    InputError where its config.json cannot be read."""
    config = read_config(folder)
    if (
        dtype != "auto"
        or compute.device != "cpu"
        or compute.dtype != "fp32"
        or not pays_in_bf16(cpu_text(), config)
    ):
        return compute
    if not rank_and_world_size()[0]:
        print(
            f"{folder}: computed in bf16, which this CPU does about twice as fast as fp32 (--dtype fp32 for fp32)"
        )
    return replace(compute, dtype="bf16")


def pays_in_bf16(cpuinfo: str, config: dict) -> bool:
    """Whether /proc/cpuinfo names bf16 instructions (x86 or ARM), and the model is wide enough to gain by them."""
    width = config.get("hidden_size")
    return (
        bool(set(cpuinfo.split()) & {"avx512_bf16", "amx_bf16", "bf16"})
        and isinstance(width, int)
        and width >= 512
    )


def cpu_text() -> str:
    """The text of /proc/cpuinfo, "" where there is none."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


def has_bf16(kind: str, capability: tuple[int, int] | None) -> bool:
    """Whether a device of this kind computes in bf16, fast on a GPU; capability: a GPU's compute capability."""
    return kind == "cpu" or kind == "cuda" and capability >= (8, 0)


def return_freed_memory():
    """Have the C library of Linux (glibc) give freed blocks back to the system, also large ones: the peak of a training
    step on a CPU is a tenth lower."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(
            -1, 10**8
        )  # M_TRIM_THRESHOLD; given once, glibc no longer raises it by itself


def machine() -> str:
    """What figures were measured on: processor or GPU, threads, versions."""
    found = re.search(r"model name\s*: (.*)", cpu_text())
    name = found[1] if found else platform.processor()
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


# ---- several processes ----


def join_processes(compute: Compute) -> Compute:
    """Under torchrun: take this process's GPU and meet the others (NCCL on GPUs, gloo on CPUs); else change nothing.

    InputError when there are fewer GPUs than processes, or split weights, which are for one process.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or dist.is_initialized():
        return compute
    if compute.weights == "bf16":
        raise InputError(
            "--weights bf16 is for one process; several spread fp32 weights over their GPUs"
        )
    cuda = compute.device.startswith("cuda")
    if cuda:
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"torchrun started more processes than the {torch.cuda.device_count()} GPUs here; lower "
                "--nproc_per_node"
            )
        compute = replace(compute, device=f"cuda:{local_rank}")
        torch.cuda.set_device(local_rank)
    # An hour, since the others wait while rank 0 writes a large model; torchrun sees at once when one of them dies.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1))
    return compute


def one_process_only(script: str):
    """InputError under torchrun with several processes, which would write the same files."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(
            f"{script} runs in one process, on one device; start it with python, without torchrun"
        )


def rank_and_world_size() -> tuple[int, int]:
    """(this process's rank, how many processes there are): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier():
    """Wait for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def first_process_first():
    """Let the first process run the block before the others, for what it writes and they read."""
    rank = rank_and_world_size()[0]
    if rank:
        barrier()
    yield
    if not rank:
        barrier()


def is_sharded(model) -> bool:
    """Whether `shard_over_processes` made the model an FSDPModule."""
    return hasattr(model, "reshard")


def shard_over_processes(model):
    """Spread weights, gradients and moments over the processes, if there are several; layers are gathered to compute."""
    if rank_and_world_size()[1] > 1 and not is_sharded(model):
        from torch.distributed.fsdp import (
            fully_shard,
            register_fsdp_forward_method,
        )  # slow to import

        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
        register_fsdp_forward_method(model, "hidden")


def whole_weights(model, optimizer) -> dict[str, torch.Tensor]:
    """Every weight by its name in the checkpoint: gathered where it is sharded, fp32 where it is split.

    Every process has to call this; rank 0 gets the weights (gathered and split ones as copies on the CPU), others {}.
    """
    weights, rank = {}, rank_and_world_size()[0]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        weight = parameter.detach()
        if hasattr(optimizer, "master"):
            weight = optimizer.master(parameter).cpu()
        elif hasattr(parameter, "full_tensor"):
            weight = weight.full_tensor()
            weight = (
                weight.cpu() if rank == 0 else None
            )  # one copy on the machine, not one for each process
        weights[name] = weight
    return weights if rank == 0 else {}
