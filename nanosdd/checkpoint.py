"""Hugging Face checkpoint folders: `config.json`, and one safetensors file or the shards that an index names."""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanosdd.errors import InputError

SHARD_BYTES = 5 * 10**9  # a larger model is saved in several files, as the hub does


def read_json(path):
    """The JSON value of a file; InputError with the line number when it is not there or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path} is not there; give a folder that holds it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); fetch or write it again") from None


def read_config(folder) -> dict:
    """The folder's `config.json`; InputError when the folder or the file is missing or holds no keys."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder; give one that holds config.json and model.safetensors")
    config = read_json(Path(folder) / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{Path(folder) / 'config.json'} is not a JSON object; download it again")
    return config


@contextmanager
def open_weights(path, device="cpu"):
    """A safetensors file, memory-mapped; InputError when it is not one."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path} is not a readable safetensors file ({error}); download it again") from None


def find_tensors(folder) -> dict[str, Path]:
    """The file of each tensor in a folder: `model.safetensors`, or the shards of `model.safetensors.index.json`.

    InputError when the index names a file elsewhere or a missing one, or is not exactly what the shards hold.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        with open_weights(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not index.is_file():
        raise InputError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json; "
                         "download the safetensors files of the checkpoint")
    content = read_json(index)
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise InputError(f"{index} has no weight_map from tensors to files; download it again")
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard:
            raise InputError(f"{index} names {shard!r}, which leaves the folder; refused")
        if not (folder / shard).is_file():
            raise InputError(f"{folder / shard} is missing although the index names it; download it again")
        with open_weights(folder / shard) as file:
            differing = set(file.keys()) ^ {name for name in shard_of if shard_of[name] == shard}
        if differing:  # missing in the shard, or in two shards: which one counts would be a guess
            raise InputError(f"{folder / shard} and {index.name} disagree about {min(differing)}; download both again")
    return {name: folder / shard for name, shard in shard_of.items()}


def read_weights(model, folder, device, dtype, inv_freq):
    """Fill a model built on the meta device with copies in `dtype`, tensor by tensor from the memory-mapped files.

    Every tensor is used or named in an InputError, and so is every shape that does not fit. `rotary_emb.inv_freq`,
    which Llama 2 files carry, must agree with `inv_freq` (D/2,) and is dropped.
    """
    wanted = model.state_dict()
    tied = model.config.tie_word_embeddings
    found, unknown = {}, []
    for name, path in find_tensors(folder).items():
        with open_weights(path, device) as file:  # anew each time: what has been read need not stay mapped
            part = file.get_slice(name)
            if name.endswith("rotary_emb.inv_freq"):
                theirs = file.get_tensor(name).float().cpu()
                if theirs.shape != inv_freq.shape or not torch.allclose(theirs, inv_freq, rtol=1e-2, atol=1e-7):
                    raise InputError(f"{path}: {name} disagrees with rope_theta in config.json; "
                                     "the two belong to different models")
            elif name not in wanted:
                unknown.append(name)
            elif list(part.get_shape()) != list(wanted[name].shape):
                raise InputError(f"{path}: {name} has shape {list(part.get_shape())}, config.json asks for "
                                 f"{list(wanted[name].shape)}; the two belong to different models")
            elif part.get_dtype() not in ("BF16", "F16", "F32", "F64"):
                raise InputError(f"{path}: {name} is {part.get_dtype()}; use a checkpoint that is not quantized")
            else:
                found[name] = file.get_tensor(name).to(dtype, copy=True)
    if unknown:
        raise InputError(f"{folder} holds {len(unknown)} tensors that this Llama has no place for: "
                         f"{', '.join(unknown[:4])}; is it another architecture?")
    if tied:  # some files carry the tied head all the same: then it must be the embedding
        head, embedding = found.pop("lm_head.weight", None), found.get("model.embed_tokens.weight")
        if head is not None and embedding is not None and not torch.equal(head, embedding):
            raise InputError(f"{folder}: lm_head.weight differs from the embedding although config.json ties them")
    missing = [name for name in wanted if name not in found and not (tied and name == "lm_head.weight")]
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} tensors that config.json asks for: {', '.join(missing[:4])}")
    model.load_state_dict(found, assign=True, strict=False)


def write_model(folder, config: dict, weights: dict[str, torch.Tensor], dtype=None):
    """Write `config.json` and the weights in `dtype` (default: their own); shards and an index above SHARD_BYTES.

    Weights that were there before go: a model.safetensors left behind would be read instead of new shards.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if config["tie_word_embeddings"]:
        weights = {name: weights[name] for name in weights if name != "lm_head.weight"}  # one tensor, one name
    dtype = dtype or next(iter(weights.values())).dtype
    shards, size = [[]], 0
    for name, tensor in weights.items():
        nbytes = tensor.numel() * dtype.itemsize
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    config = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, shards):  # converted and copied from the device one shard at a time
        save_file({name: weights[name].detach().to("cpu", dtype).contiguous() for name in names}, folder / file,
                  metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes it private
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(tensor.numel() for tensor in weights.values()) * dtype.itemsize},
                 "weight_map": {name: file for file, names in zip(files, shards) for name in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@torch.no_grad()
def kept_update(before, after: dict[str, torch.Tensor], dtype) -> tuple[float, float, float]:
    """What training changed in a model, `before`, whose weights by name are now `after`, and what is left of it when
    both are rounded to `dtype`: (share of all weights that changed, share of those that rounding still tells apart,
    cosine).

    Rounding never turns a change round. The cosine is that of round(after) - round(before) with after - before, over
    all weights.
    """
    total = changed = kept = dot = norm = kept_norm = 0
    for name, old in before.named_parameters():
        for old, new in zip(*(whole.cpu().float().flatten().split(2**22) for whole in (old, after[name]))):
            update, rounded = new - old, new.to(dtype).float() - old.to(dtype).float()
            total += update.numel()
            changed, kept = changed + int(update.count_nonzero()), kept + int(rounded.count_nonzero())
            dot += float((update * rounded).sum(dtype=torch.float64))
            norm += float(update.square().sum(dtype=torch.float64))
            kept_norm += float(rounded.square().sum(dtype=torch.float64))
    return changed / total, kept / max(1, changed), dot / max((norm * kept_norm) ** 0.5, 1e-300)
