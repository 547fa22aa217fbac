"""Hugging Face checkpoint folders: `config.json`, and one safetensors file or the shards that an index names."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from errors import InputError

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
    """The folder's `config.json`; InputError when the folder or the file is missing."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder; give one that holds config.json and model.safetensors")
    return read_json(Path(folder) / "config.json")


def shard_files(folder) -> list[Path]:
    """The weight files of a folder: `model.safetensors`, or those named by `model.safetensors.index.json`."""
    folder = Path(folder)
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise InputError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json; "
                         "download the safetensors files of the checkpoint")
    names = sorted(set(read_json(index)["weight_map"].values()))
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{index} names {name!r}, which leaves the folder; refused")
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing although the index names it; download it again")
    return [folder / name for name in names]


def read_weights(model, folder, device, dtype, inv_freq):
    """Fill a model built on the meta device, tensor by tensor from the memory-mapped files.

    Every tensor is used or named in an InputError, and so is every shape that does not fit. `rotary_emb.inv_freq`,
    which Llama 2 files carry, must agree with `inv_freq` (D/2,) and is dropped.
    """
    wanted = model.state_dict()
    tied = model.config.tie_word_embeddings
    found, unknown = {}, []
    for path in shard_files(folder):
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys():
                    if name.endswith("rotary_emb.inv_freq"):
                        if not torch.allclose(file.get_tensor(name).float().cpu(), inv_freq, rtol=1e-2):
                            raise InputError(f"{path}: {name} disagrees with rope_theta in config.json; "
                                             "the two belong to different models")
                    elif name not in wanted:
                        unknown.append(name)
                    else:
                        shape = list(file.get_slice(name).get_shape())
                        if shape != list(wanted[name].shape):
                            raise InputError(f"{path}: {name} has shape {shape}, config.json asks for "
                                             f"{list(wanted[name].shape)}; the two belong to different models")
                        found[name] = file.get_tensor(name).to(dtype)
        except SafetensorError as error:
            raise InputError(f"{path} is not a readable safetensors file ({error}); download it again") from None
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


def write_model(folder, config: dict, weights: dict[str, torch.Tensor]):
    """Write `config.json` and the weights; several files and an index above SHARD_BYTES."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]  # one tensor, one name
    config = {**config, "torch_dtype": str(next(iter(weights.values())).dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards, size = [{}], 0
    for name, tensor in weights.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        save_file(shard, folder / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())},
             "weight_map": {tensor: name for name, shard in zip(names, shards) for tensor in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
