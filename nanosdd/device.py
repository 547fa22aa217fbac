"""Where and how precisely to compute: the arguments that train.py, attack.py and eval.py share."""

import argparse
import os
import platform
import re
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from nanosdd.errors import InputError


def add_device_arguments(p):
    """Add --device, --dtype and --compile to a parser."""
    p.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    p.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto",
                   help="compute dtype; weights stay fp32 (default: bf16 on CUDA, fp32 on CPU)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                   help="torch.compile every layer (default: on CUDA)")


def resolve_device(args):
    """Fill in --device, --dtype and --compile; InputError for a device that is not there."""
    cuda = torch.cuda.is_available()
    if args.device == "auto":
        args.device = "cuda" if cuda else "cpu"
    try:
        kind = torch.device(args.device).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise InputError(f"--device {args.device} is unknown; use cpu, cuda or cuda:N")
    if kind == "cuda" and not cuda:
        raise InputError("--device cuda: PyTorch sees no CUDA device; use --device cpu or install a CUDA build")
    if args.dtype == "auto":
        args.dtype = "bf16" if kind == "cuda" else "fp32"
    if args.compile is None:
        args.compile = kind == "cuda"


def join_processes(args):
    """Under torchrun: take this process's GPU, and meet the others (by NCCL on GPUs, gloo on CPUs). Device arguments
    must be resolved; InputError when there are fewer GPUs than processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or dist.is_initialized():
        return
    if args.device.startswith("cuda"):
        place = int(os.environ["LOCAL_RANK"])
        if place >= torch.cuda.device_count():
            raise InputError(f"torchrun started more processes than the {torch.cuda.device_count()} GPUs here; lower "
                             "--nproc_per_node")
        args.device = f"cuda:{place}"
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo", timeout=timedelta(hours=1))
    # an hour, since the others wait while the first writes a large model; that one of them died torchrun sees at once


def one_process_only(script: str):
    """InputError under torchrun with several processes, which would write the same files."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"{script} runs in one process, on one device; start it with python, without torchrun")


def process() -> tuple[int, int]:
    """(this process's number, how many there are): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def autocast(args):
    """The context for compute in args.dtype over fp32 weights."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16) if args.dtype == "bf16" else nullcontext()


def machine() -> str:
    """What the figures were taken on: processor or GPU, threads, versions."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else model[1] if model else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"
