"""Hugging Face checkpoint folders: `config.json`, and one safetensors file or the shards that an index names."""

import json
import math
import os
import stat
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanosdd.errors import InputError

MOST_BYTES = 2**30  # of a file that is read as a whole; weights are not
SHARD_BYTES = 5 * 10**9  # a larger model is saved in several files, as on the hub


def why_unreadable(path, limit: int = MOST_BYTES) -> str | None:
    """None when `path` is an ordinary file of at most `limit` bytes that may be read; else the reason, in words."""
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            return "Is a directory"
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, a device read without end
            return "not an ordinary file"
        if found.st_size > limit:
            return f"{found.st_size:,} bytes, more than {limit:,}"
        with open(path, "rb"):
            return None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        return getattr(error, "strerror", None) or str(error)


def read_json(path):
    """The JSON value of a file; InputError when it cannot be read or is not JSON."""
    if reason := why_unreadable(path):
        raise InputError(f"{path} cannot be read ({reason}); check the path and its permissions")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested too deeply
        raise InputError(f"{path} is not valid JSON ({error}); fetch or write it again") from None


def read_config(folder) -> dict:
    """The folder's `config.json`; InputError when it is missing or not a JSON object."""
    if not Path(folder).is_dir():
        raise InputError(
            f"{folder} is not a folder; give one that holds config.json and model.safetensors"
        )
    config = read_json(Path(folder) / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{Path(folder) / 'config.json'} is not a JSON object; download it again")
    return config


RANGES = {  # of the numbers in a Llama's config.json
    **{
        key: (int, 1, most)
        for key, most in (
            ("vocab_size", 2**24),
            ("hidden_size", 2**17),
            ("intermediate_size", 2**20),
            ("num_hidden_layers", 1000),
            ("num_attention_heads", 4096),
            ("num_key_value_heads", 4096),
            ("head_dim", 4096),
            ("max_position_embeddings", 2**24),
        )
    },
    "rms_norm_eps": (float, 0, 1),
    "rope_theta": (float, 1e-3, 1e12),
    "initializer_range": (float, 0, 100),
}
ROPE = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "rope_theta",
)


def check_ranges(config: dict):
    """InputError for a value of config.json that no Llama can have: of another type, out of range, or not a number."""

    def check(name, value, kind, least, most):
        known = (int, float) if kind is float else (int,)
        if value is not None and not (type(value) in known and least <= value <= most):
            what = "an integer" if kind is int else "a number"
            raise InputError(
                f"config.json: {name} is {value!r:.40}; it has to be {what} from {least:g} to {most:g}"
            )

    for key, (kind, least, most) in RANGES.items():
        check(key, config.get(key), kind, least, most)
    for part in ("rope_scaling", "rope_parameters"):
        rope = config.get(part)
        if rope is not None and not isinstance(rope, dict):
            raise InputError(f"config.json: {part} is {rope!r:.40}; it has to be an object")
        for key in ROPE:
            check(f"{part}.{key}", (rope or {}).get(key), float, 1e-3, 1e12)
        if (
            rope
            and rope.get("low_freq_factor") is not None
            and rope["low_freq_factor"] == rope.get("high_freq_factor")
        ):
            raise InputError(
                f"config.json: low_freq_factor and high_freq_factor of {part} are equal; fetch it again"
            )
    if (tied := config.get("tie_word_embeddings")) not in (None, True, False):
        raise InputError(
            f"config.json: tie_word_embeddings is {tied!r:.40}, neither true nor false"
        )
    for key in ("bos_token_id", "eos_token_id"):
        ids = config.get(key)
        if not all(
            i is None or type(i) is int and 0 <= i < 2**31
            for i in (ids if type(ids) is list else [ids])
        ):
            raise InputError(
                f"config.json: {key} is {ids!r:.40}; it has to be a token id or a list of them"
            )


@contextmanager
def open_weights(path, device="cpu"):
    """A safetensors file, memory-mapped; InputError when it is not there or not one."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is not a readable safetensors file ({error}); download it again"
        ) from None


def find_tensors(folder) -> dict[str, Path]:
    """The file that holds each tensor: `model.safetensors`, or a shard in `model.safetensors.index.json`. InputError
    when the index names a file that is missing or outside the folder, or disagrees with a shard."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        with open_weights(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not index.is_file():
        raise InputError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json; "
            "download the safetensors files of the checkpoint"
        )
    content = read_json(index)
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not all(
        isinstance(shard, str) for shard in shard_of.values()
    ):
        raise InputError(f"{index} has no weight_map from tensors to files; download it again")
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard:
            raise InputError(f"{index} names {shard!r}, which leaves the folder; refused")
        with open_weights(folder / shard) as file:
            differing = set(file.keys()) ^ {name for name in shard_of if shard_of[name] == shard}
        if differing:  # missing in the shard, or in two shards: which one counts would be a guess
            raise InputError(
                f"{folder / shard} and {index.name} disagree about {min(differing)}; download both again"
            )
    return {name: folder / shard for name, shard in shard_of.items()}


def read_weights(model, folder, device, dtype, inv_freq):
    """Load a folder's weights into a model built on the meta device, as copies in `dtype`, one tensor at a time.

    Of a model that is spread over processes (device.shard_over_processes) each reads its own rows only. InputError for
    a tensor that is missing, has no place in the model, or has another shape, and for quantized weights.
    `rotary_emb.inv_freq`, which Llama 2 files hold, must agree with `inv_freq` (D/2,) and is dropped.
    """
    wanted, tied = model.state_dict(), model.config.tie_word_embeddings
    files, found = find_tensors(folder), {}
    unknown = [
        name for name in files if name not in wanted and not name.endswith("rotary_emb.inv_freq")
    ]
    if unknown:
        raise InputError(
            f"{folder} holds {len(unknown)} tensors that this Llama has no place for: "
            f"{', '.join(unknown[:4])}; is it another architecture?"
        )
    missing = [
        name for name in wanted if name not in files and not (tied and name == "lm_head.weight")
    ]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} tensors that config.json asks for: {', '.join(missing[:4])}"
        )
    for name, path in files.items():
        with open_weights(
            path, device
        ) as file:  # opened for each tensor, so that what was read is unmapped again
            part = file.get_slice(name)
            if name.endswith("rotary_emb.inv_freq"):
                theirs = file.get_tensor(name).float().cpu()
                if theirs.shape != inv_freq.shape or not torch.allclose(
                    theirs, inv_freq, rtol=1e-2, atol=1e-7
                ):
                    raise InputError(
                        f"{path}: {name} disagrees with rope_theta in config.json; "
                        "the two belong to different models"
                    )
            elif list(part.get_shape()) != list(wanted[name].shape):
                raise InputError(
                    f"{path}: {name} has shape {list(part.get_shape())}, config.json asks for "
                    f"{list(wanted[name].shape)}; the two belong to different models"
                )
            elif part.get_dtype() not in ("BF16", "F16", "F32", "F64"):
                raise InputError(
                    f"{path}: {name} is {part.get_dtype()}; use a checkpoint that is not quantized"
                )
            else:
                own = own_rows(wanted[name])
                tensor = (
                    part[own].to(dtype, copy=True)
                    if own
                    else file.get_tensor(name).to(dtype, copy=True)
                )
                if (
                    not tensor.isfinite().all()
                ):  # such a model answers nothing, which would look like a defence
                    raise InputError(
                        f"{path}: {name} holds NaN or infinite numbers; train or fetch it again"
                    )
                found[name] = as_shard(tensor, wanted[name]) if own else tensor
    if tied:
        embedding = found["model.embed_tokens.weight"]
        head = found.setdefault("lm_head.weight", embedding)  # some files hold it all the same
        if head is not embedding and not torch.equal(
            *(local(tensor) for tensor in (head, embedding))
        ):
            raise InputError(
                f"{folder}: lm_head.weight differs from the embedding although config.json ties them"
            )
    model.load_state_dict(found, assign=True)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds: of FSDP its shard, else all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def own_rows(wanted: torch.Tensor) -> slice | None:
    """The rows of a tensor that this process holds, as FSDP2 deals them out; None where it holds all."""
    if not hasattr(wanted, "to_local"):
        return None
    mesh = wanted.device_mesh
    first = min(len(wanted), mesh.get_local_rank() * math.ceil(len(wanted) / mesh.size()))
    return slice(first, first + len(wanted.to_local()))


def as_shard(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """These rows as this process's shard of a tensor like `wanted`."""
    return type(wanted).from_local(
        rows,
        wanted.device_mesh,
        wanted.placements,
        run_check=False,
        shape=wanted.shape,
        stride=wanted.stride(),
    )


def save_tensors(tensors: dict[str, torch.Tensor], path):
    """Write a safetensors file; InputError when that fails, as on a full disk."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise InputError(f"{path} cannot be written ({error}); is the disk full?") from None
    Path(path).chmod(0o644)  # safetensors makes it private


def write_model(
    folder, config: dict, weights: dict[str, torch.Tensor], dtype=None, shard_bytes=SHARD_BYTES
):
    """Write `config.json` and the weights in `dtype` (default: their own), in shards of at most shard_bytes.

    Older weights in the folder are deleted: an old model.safetensors would be read instead of new shards.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if config["tie_word_embeddings"]:
        weights = {
            name: weights[name] for name in weights if name != "lm_head.weight"
        }  # one tensor, one name
    dtype = dtype or next(iter(weights.values())).dtype
    shards, room, total = [], 0, 0
    for name, tensor in weights.items():
        size = tensor.numel() * dtype.itemsize
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room, total = room - size, total + size
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    config = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, names in zip(files, shards) for name in names},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file, names in zip(
        files, shards
    ):  # converted and copied from the device one shard at a time
        save_tensors(
            {name: weights[name].detach().to("cpu", dtype).contiguous() for name in names},
            folder / file,
        )


@torch.no_grad()
def kept_update(before, after: dict[str, torch.Tensor], dtype) -> tuple[float, float, float]:
    """How much of a training update is left when the weights before and after it are rounded to `dtype`.

    before: the model; after: the trained weights by name. Returns the share of all weights that changed, the share of
    these that still differ once rounded, and the cosine of round(after) - round(before) with after - before.
    """
    total = changed = kept = 0
    products = torch.zeros(
        2, 2, dtype=torch.float64
    )  # of the update and the rounded one, each with each
    for name, weight in before.named_parameters():
        for old, new in zip(
            *(whole.cpu().float().flatten().split(2**22) for whole in (weight, after[name]))
        ):
            pair = torch.stack((new - old, new.to(dtype).float() - old.to(dtype).float()))
            total += len(old)
            changed, kept = (
                changed + int(pair[0].count_nonzero()),
                kept + int(pair[1].count_nonzero()),
            )
            products += pair.double() @ pair.double().T
    norms = float(products.diag().prod().sqrt())
    return changed / total, kept / max(1, changed), float(products[0, 1]) / max(norms, 1e-300)
