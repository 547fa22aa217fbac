"""Hugging Face checkpoint folders: config.json, and one safetensors file or an index of several."""

import json
import os
import re
import stat
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanosdd.errors import InputError

MOST_BYTES = 2**30  # of a data file that is read as a whole
MOST_JSON = 2**25  # of a file beside the weights: parsed, it may take 25 times that
# What is computed from config.json, and older files hold all the same.
BUFFER = re.compile(r"\brotary_emb\.|masked_bias$|causal_mask$|position_ids$")


# ---- files ----


def why_unreadable(path, limit: int = MOST_BYTES) -> str | None:
    """None when `path` is an ordinary file of at most `limit` bytes that may be read; else why."""
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            return "Is a directory"
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, a device read without end
            return "not an ordinary file"
        if found.st_size > limit:
            return f"{found.st_size:,} bytes, more than {limit:,}"
        open(path, "rb").close()
    except OSError as error:
        return error.strerror
    except ValueError as error:  # a NUL in the path
        return str(error)
    return None


def check_readable(path, limit: int = MOST_BYTES):
    """InputError for a file that is not there, or may not or should not be read."""
    if reason := why_unreadable(path, limit):
        raise InputError(f"{path} cannot be read ({reason}); check the path and its permissions")


def read_json(path):
    """The JSON value of a file; InputError when it cannot be read or is not JSON."""
    check_readable(path, MOST_JSON)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested too deeply
        raise InputError(f"{path} is not valid JSON ({error}); fetch or write it again") from None


def read_object(path) -> dict:
    """The JSON object of a file; {} where there is no file or no object in it."""
    found = read_json(path) if Path(path).is_file() else {}
    return found if isinstance(found, dict) else {}


@contextmanager
def writing(path):
    """Yield a temporary path beside `path`, to be written and renamed when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    try:
        yield temporary
        with open(temporary, "rb+") as file:  # or after a power cut it might be empty
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # safetensors makes it private
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text: str):
    """Write a UTF-8 file: readers see the old text or the new one, never half."""
    with writing(path) as temporary:
        # a file name may hold what UTF-8 cannot
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


# ---- config.json ----


def read_config(folder) -> dict:
    """The folder's `config.json`; InputError when it is missing or not a JSON object."""
    if not Path(folder).is_dir():
        raise InputError(
            f"{folder} is not a folder; give one that holds config.json and model.safetensors"
        )
    if (Path(folder) / "adapter_config.json").exists():
        raise InputError(
            f"{folder}/adapter_config.json: a PEFT adapter; merge_and_unload it, and save the model"
        )
    config = read_json(Path(folder) / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder}/config.json is not a JSON object; download it again")
    return config


# ---- reading weights ----


@contextmanager
def open_weights(path, device="cpu"):
    """A safetensors file, memory-mapped; InputError when it is not there or not one."""
    try:
        if reason := why_unreadable(path, 2**60):
            raise OSError(reason)
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is not a readable safetensors file ({error}); download it again"
        ) from None


def find_tensors(folder) -> dict[str, Path]:
    """The file of each tensor: model.safetensors, or the shards that an index names."""
    shards = ["model.safetensors"]
    index = Path(folder) / "model.safetensors.index.json"
    if index.is_file() and not (Path(folder) / "model.safetensors").is_file():
        try:
            shards = sorted(set(read_json(index)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{index} has no weight_map of tensors; download it again") from None
    elif not (Path(folder) / shards[0]).exists() and any(Path(folder).glob("*.bin")):
        raise InputError(f"{folder} has no safetensors, and .bin is never opened: save it as these")
    files = {}
    for shard in shards:
        place = Path(str(shard))
        if place.is_absolute() or ".." in place.parts:
            raise InputError(f"{index} names '{shard}', which leaves the folder; refused")
        path = Path(folder) / place
        with open_weights(path) as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def read_weights(model, folder, device, dtype):
    """Load a folder's weights, as copies in `dtype`, into a model built on the meta device.

    One tensor at a time; of a model that is sharded each process reads its own rows. InputError for
    a tensor that is missing, has no place in the model, or has another shape, and for quantized
    weights. Buffers of older files are dropped, as in transformers: config.json decides.
    """
    wanted = model.state_dict()
    tied = model.config.tie_word_embeddings
    found = {}
    for name, path in find_tensors(folder).items():
        if not BUFFER.search(name):
            with open_weights(path, device) as file:  # anew: what was read is unmapped again
                found[name] = read_tensor(file, path, name, wanted.get(name), dtype)
    if tied:  # some files hold the head all the same
        found.setdefault("lm_head.weight", found.get("model.embed_tokens.weight"))
    try:
        model.load_state_dict(found, assign=True)
    except RuntimeError as error:  # it names what is missing, left over or of another shape
        words = " ".join(str(error).split())
        raise InputError(f"{folder}: config.json is of another model: {words:.300}") from None
    embedding = local(model.model.embed_tokens.weight)
    if tied and not torch.equal(local(model.lm_head.weight), embedding):
        raise InputError(f"{folder}: lm_head.weight differs, and config.json ties it")


def read_tensor(file, path, name: str, wanted: torch.Tensor, dtype) -> torch.Tensor:
    """A tensor of an open file in `dtype`, sharded like `wanted`."""
    part = file.get_slice(name)
    if part.get_dtype() not in ("BF16", "F16", "F32", "F64"):
        raise InputError(
            f"{path}: {name} is {part.get_dtype()}; use a checkpoint that is not quantized"
        )
    tensor = part[:].to(dtype, copy=True)
    if not tensor.isfinite().all():  # such a model answers nothing, which looks like a defence
        raise InputError(f"{path}: {name} holds NaN or infinite numbers; train or fetch it again")
    if hasattr(wanted, "placements"):
        from torch.distributed.tensor import distribute_tensor  # slow to import

        # src_data_rank=None: each process keeps its rows of what it read, and sends nothing.
        mesh = wanted.device_mesh
        tensor = distribute_tensor(tensor, mesh, wanted.placements, src_data_rank=None)
    return tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds: its shard under FSDP, else all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# ---- writing weights ----


def save_tensors(tensors: dict[str, torch.Tensor], path):
    """Write a safetensors file; InputError when that fails, as on a full disk."""
    try:
        with writing(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    except SafetensorError as error:
        raise InputError(f"{path} cannot be written ({error}); is the disk full?") from None


def write_model(folder, config: dict, weights: dict[str, torch.Tensor], dtype=None):
    """Write config.json, then model.safetensors, in `dtype` (default: that of the weights)."""
    dtype = dtype or next(iter(weights.values())).dtype
    config = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    write_text(Path(folder) / "config.json", json.dumps(config, indent=2) + "\n")
    tensors = {}
    for name, weight in weights.items():
        if name != "lm_head.weight" or not config["tie_word_embeddings"]:  # one tensor, one name
            tensors[name] = weight.detach().to("cpu", dtype).contiguous()
    save_tensors(tensors, Path(folder) / "model.safetensors")


@torch.no_grad()
def kept_update(before, after: dict[str, torch.Tensor], dtype) -> tuple[float, float, float]:
    """How much of a training update is left when weights are rounded to `dtype`.

    before: the model; after: the trained weights by name. Returns the share of all weights that
    changed, the share of these that still differ once rounded, and the cosine of
    round(after) - round(before) with after - before.
    """
    sums = torch.zeros(6, dtype=torch.float64)
    for name, weight in before.named_parameters():
        old = weight.cpu().float().flatten()
        new = after[name].cpu().float().flatten()
        update = new - old
        rounded = new.to(dtype).float() - old.to(dtype).float()
        counts = [len(old), update.count_nonzero(), rounded.count_nonzero()]
        products = [update @ rounded, update @ update, rounded @ rounded]
        sums += torch.tensor(counts + products, dtype=torch.float64)
    total, changed, kept, both, update, rounded = sums.tolist()
    cosine = both / max(1e-300, (update * rounded) ** 0.5)
    return changed / total, kept / max(1, changed), cosine
