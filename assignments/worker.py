"""The grader's other process: runs a submission's adapters, answers calls, one JSON object a line.

    python -I worker.py SUBMISSION MEMORY_BYTES CPU_SECONDS      (started by grade.py)

It reads {"call": name, "args": [...]} and writes {"result": ...} or {"error": "..."}. Only plain
data crosses: numbers, strings, lists, dicts and tensors. What a submission prints goes where stderr
goes: nowhere.
"""

import base64
import importlib
import json
import math
import os
import sys

import torch

NAMES = ("float32", "float64", "bfloat16", "int16", "int32", "int64", "bool")
DTYPES = {name: getattr(torch, name) for name in NAMES}


def encode(value):
    """A value for JSON: tensors as dtype, shape and bytes. TypeError for what is no plain data."""
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        value = value.detach().contiguous()
        name = str(value.dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise TypeError(f"a tensor of {name} is not plain data")
        raw = bytes(value.view(-1).view(torch.uint8).tolist()) if value.numel() else b""
        return {"tensor": [name, list(value.shape), base64.b64encode(raw).decode()]}
    if isinstance(value, (list, tuple)):
        return [encode(one) for one in value]
    if isinstance(value, dict):
        return {"dict": [[str(key), encode(one)] for key, one in value.items()]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a result of type {type(value).__name__} is not plain data")


def decode(value):
    """The inverse of `encode`; an exception for what it cannot have written."""
    if isinstance(value, list):
        return [decode(one) for one in value]
    if isinstance(value, dict) and "tensor" in value:
        name, shape, text = value["tensor"]
        raw = bytearray(base64.b64decode(text)) or bytearray(8)  # an empty buffer is refused
        flat = torch.frombuffer(raw, dtype=DTYPES[name])
        return flat[: math.prod(shape)].reshape(shape)
    if isinstance(value, dict):
        return {key: decode(one) for key, one in value["dict"]}
    return value


def serve(calls, replies):
    """Answer calls until there are no more."""
    for line in calls:
        call = json.loads(line)
        try:
            adapters = importlib.import_module("assignments.adapters")
            result = getattr(adapters, call["call"])(*decode(call["args"]))
            reply = {"result": encode(result)}
        except BaseException as error:  # a submission may raise anything, SystemExit too
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(reply), file=replies, flush=True)


def address_space() -> int:
    """Bytes that this process has mapped; 0 where /proc does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def main():
    import resource  # POSIX alone has it

    folder = sys.argv[1]
    memory = int(sys.argv[2])
    seconds = int(sys.argv[3])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    memory += address_space()  # PyTorch's CUDA build maps several GB before anything runs
    limits = {"AS": memory, "CPU": seconds, "FSIZE": 2**24, "NOFILE": 64, "CORE": 0}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.path.insert(0, folder)
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
