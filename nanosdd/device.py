"""Where and how to compute: one device, or one process for each GPU under torchrun (FSDP2)."""

import argparse
import os
import platform
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from nanosdd.checkpoint import read_config
from nanosdd.errors import InputError
from nanosdd.llama_config import LlamaConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Compute:
    """How a model computes; none of it changes what is computed, rounding aside."""

    device: str = "cpu"  # "cpu", "cuda", "cuda:N" or "mps"
    dtype: str = "fp32"  # of compute; bf16 is autocast over the weights
    compile: bool = False  # torch.compile every layer
    weights: str = "fp32"  # how training holds them; bf16: split, see nanosdd/split_adamw.py
    micro_batch: int = 0  # rows at once in training, 0: the whole batch
    checkpoint_activations: bool = False  # recompute layers in the backward pass
    save_every: int = 0  # steps between two saved states of a run; 0: about five minutes

    def autocast(self):
        """The context in which the model computes in `dtype`."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.dtype == "bf16")


def add_compute_arguments(p, training: bool = False):
    """Add --device, --dtype and --compile to a parser, and what else Compute has for training."""
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or mps (default: cuda, cpu)")
    p.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="of compute, weights stay fp32 (default: bf16 on CUDA and on a CPU that gains by it)",
    )
    p.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile every layer (default: on CUDA)",
    )
    if not training:
        return
    p.add_argument(
        "--micro-batch",
        type=int,
        default=0,
        help="rows at once; the rest accumulates; the same update (default: the whole batch)",
    )
    p.add_argument(
        "--weights",
        choices=list(DTYPES),
        default="fp32",
        help="how weights are held; bf16: split, which loses no update but rounds the weights that "
        "it begins with (default: fp32)",
    )
    p.add_argument(
        "--checkpoint-activations",
        action="store_true",
        help="recompute layers in the backward pass: far less memory, about a third more time",
    )


def resolve_compute(device: str, dtype: str, compile: bool | None = None, **training) -> Compute:
    """The Compute that these arguments ask for; training: its other fields.

    InputError for a device that is not there.
    """
    seen = ["cpu"]
    if torch.backends.mps.is_available():
        seen.append("mps")
    if torch.cuda.is_available():
        seen += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device == "auto":
        device = "cuda" if "cuda" in seen else "cpu"
    if device not in seen:
        raise InputError(f"--device {device} is not there: PyTorch sees {', '.join(seen)}")
    on_cuda = device.startswith("cuda")
    if training.get("weights") == "bf16":
        if dtype == "fp32":
            raise InputError("--weights bf16 computes in bf16; leave --dtype fp32 out")
        dtype = "bf16"
    if dtype == "auto":
        has_bf16 = on_cuda and torch.cuda.get_device_capability(device)[0] >= 8
        dtype = "bf16" if has_bf16 else "fp32"
    if compile is None:
        compile = on_cuda
    if min(training.get("micro_batch", 0), training.get("save_every", 0)) < 0:
        raise InputError("--micro-batch and --save-every must be 0 or more")
    return Compute(device, dtype, compile, **training)


def for_model(compute: Compute, dtype: str, folder) -> Compute:
    """The same Compute, in bf16 where `dtype` is "auto" and the model in a folder gains by it.

    It does on a CPU with bf16 arithmetic, when it is wide. InputError for a broken config.json.
    """
    wide = LlamaConfig.from_dict(read_config(folder)).hidden_size >= 512
    if wide and dtype == "auto" and compute.device == "cpu" and "bf16" in cpu_text():
        compute = replace(compute, dtype="bf16")
        if rank_and_world_size()[0] == 0:
            print(f"{folder}: computed in bf16, the faster on this CPU (--dtype fp32 for fp32)")
    return compute


def cpu_text() -> str:
    """The text of /proc/cpuinfo, "" where there is none."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


def machine() -> str:
    """What figures were measured on: processor or GPU, threads, versions."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        found = re.search(r"model name\s*: (.*)", cpu_text())
        name = found[1] if found else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


# ---- several processes ----


def join_processes(compute: Compute) -> Compute:
    """Under torchrun: take this process's GPU and meet the others; else change nothing.

    InputError for split weights.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return compute
    if compute.weights == "bf16":
        raise InputError("--weights bf16 is for one process; several spread fp32 weights")
    backend = "gloo"
    if compute.device.startswith("cuda"):
        backend = "cpu:gloo,cuda:nccl"
        compute = replace(compute, device=f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(compute.device)
    # An hour, since the others wait while rank 0 writes a model; torchrun sees it when one dies.
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    return compute


def leave_processes(finished: bool):
    """End the group of processes, if there is one. finished: and then this process, at once."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()
        if finished:  # in a shutdown of the interpreter a thread of gloo sometimes aborts it
            sys.stdout.flush()
            os._exit(0)


def one_process_only(script: str):
    """InputError under torchrun with several processes, which would write the same files."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"{script} runs in one process; start it with python, without torchrun")


def rank_and_world_size() -> tuple[int, int]:
    """(this process's rank, how many processes there are): (0, 1) without torchrun."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


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


def sum_over_processes(value) -> float:
    """The sum of a number or a tensor of one over all processes."""
    total = torch.tensor(float(value))
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total)


def shard_over_processes(model):
    """Spread weights, gradients and moments over the processes, if there are several (FSDP2)."""
    if rank_and_world_size()[1] == 1 or hasattr(model, "reshard"):  # alone, or spread already
        return
    from torch.distributed import fsdp  # slow to import

    for part in (*model.model.layers, model):
        fsdp.fully_shard(part)
        part.set_gradient_divide_factor(1.0)  # a sum, since each loss is a share of the mean
        part.set_force_sum_reduction_for_comms(True)  # the way that gloo can, too
    fsdp.register_fsdp_forward_method(model, "run_layers")


def whole_weights(model, optimizer) -> dict[str, torch.Tensor]:
    """Every weight on the CPU by its name in the checkpoint: gathered if it is sharded, fp32 if it
    is split. Every process has to call this; rank 0 gets the weights, others {}."""
    weights = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        weight = parameter.detach()
        if hasattr(optimizer, "master"):
            weight = optimizer.master(parameter)
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        if rank_and_world_size()[0] == 0:
            weights[name] = weight.cpu()
    return weights
