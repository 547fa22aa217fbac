"""SmolLM2's GGUF file as a Hugging Face folder: a made-up file, and the real one where it is."""

import random
from pathlib import Path

import pytest
import torch
from small import small_config

from data.chat import encode_prompt, read_chat
from data.smollm2 import HEADS, NOTE, OUTER, TENSORS, find_gguf, read_gguf, unpermute, write_folder
from data.tokenizer import load_tokenizer
from data.tokenizer_json import byte_letters
from model import Llama, apply_rope, rope_tables
from nanosdd.errors import InputError

TEMPLATE = Path(__file__).parent.parent / "golden/chat/smollm2.jinja"


def shape_of(part: str) -> tuple:
    """The shape of a tensor of a layer: 2 heads of 6 on 1, 20 in the middle of the MLP."""
    if "norm" in part:
        return (12,)
    if "ffn" in part:
        return (12, 20) if part == "ffn_down" else (20, 12)
    return (6 if part in ("attn_k", "attn_v") else 12, 12)


def made_up() -> tuple[dict, dict]:
    """Fields and tensors of a tiny model in SmolLM2's layout, of 2 layers."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = list(byte_letters())
    merges = ["Ġ t", "h e", "Ġt he"]
    tokens = special + letters + [merge.replace(" ", "") for merge in merges]
    fields = {
        "llama.block_count": 2,
        "llama.context_length": 190,
        "llama.embedding_length": 12,
        "llama.feed_forward_length": 20,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.rope.freq_base": 1000.0,
        "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE.read_text(),
    }
    shapes = {"token_embd.weight": (len(tokens), 12), "output_norm.weight": (12,)}
    for part in TENSORS:
        for i in range(2):
            shapes[f"blk.{i}.{part}.weight"] = shape_of(part)
    return fields, {name: torch.randn(shape) for name, shape in shapes.items()}


def test_a_folder_that_loads(tmp_path):
    fields, tensors = made_up()
    (tmp_path / "README.md").write_text(NOTE)  # left by a killed command
    write_folder(fields, tensors, tmp_path)
    model = Llama.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    state = model.state_dict()
    for theirs, ours in OUTER.items():
        assert torch.equal(state[ours], tensors[theirs])
    for part, ours in TENSORS.items():
        weight = state[f"model.layers.1.{ours}.weight"]
        if part in HEADS:  # the rows of q and k are put back: 0, 2, 4, 1, 3, 5
            weight = weight.view(-1, 2, 3, 12).transpose(1, 2).reshape(weight.shape)
        assert torch.equal(weight, tensors[f"blk.1.{part}.weight"])
    assert model.config.rms_norm_eps == 1e-5 and model.config.rope_theta == 1000.0
    assert tokenizer.encode(" the") == [261] and tokenizer.stop_tokens == [2, 0]
    assert read_chat(tmp_path) == "smollm2"
    assert (tmp_path / "run.json").is_file()


def test_q_and_k_rotate_halves_as_the_file_rotates_neighbours():
    config = small_config()
    H = config.num_attention_heads
    D = config.head_dim
    T = 5
    weight = torch.randn(H * D, 48)  # the rows of the file
    x = torch.randn(T, 48)
    cos, sin = rope_tables(config, torch.arange(T))
    ours = apply_rope((x @ unpermute(weight, H).T).view(T, H, D), cos, sin)
    pairs = (x @ weight.T).view(T, H, D // 2, 2)
    a, b = pairs.unbind(-1)
    theirs = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)  # (T,H,D/2,2)
    torch.testing.assert_close(ours, torch.cat((theirs[..., 0], theirs[..., 1]), dim=-1))


def test_another_model_or_a_folder_with_other_files_is_refused(tmp_path):
    fields, tensors = made_up()
    out = tmp_path / "out"
    with pytest.raises(InputError, match="another model"):
        write_folder(fields | {"tokenizer.ggml.pre": "llama-bpe"}, tensors, out)
    with pytest.raises(InputError, match="does not have"):
        write_folder(fields, tensors | {"blk.0.attn_q.bias": torch.ones(12)}, out)
    assert not out.exists()
    out.mkdir()
    for name in ("config.json", "notes.txt"):
        (out / name).write_text("somebody's own")
        with pytest.raises(InputError, match=f"{name} is none of this command's files"):
            write_folder(fields, tensors, out)
        (out / "README.md").write_text(NOTE)  # now the folder is ours, but for the notes


# ---- the real file, and peers, where they are installed ----


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    try:
        path = find_gguf()
    except InputError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("smollm2")
    write_folder(*read_gguf(path), folder)
    return folder


@pytest.mark.slow
def test_the_real_model_answers(real):
    model = Llama.from_pretrained(real)
    tokenizer = load_tokenizer(real)
    prompt = encode_prompt(tokenizer, read_chat(real), "What is the capital of France?")
    ids = model.generate([prompt], 16, tokenizer.stop_tokens)[0]
    assert tokenizer.decode(ids) == "The capital of France is Paris."


@pytest.mark.slow
def test_the_real_tokenizer_equals_its_peer(real):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(real / "tokenizer.json"))
    ours = load_tokenizer(real)
    rng = random.Random(4)
    pieces = [*"aeiou tnrs_Z\n\t é😀", " the", " 12", "3.5", "東京", "don't", "==", " \u00a0"]
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 30)))
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.mark.slow
def test_the_real_model_equals_transformers(real):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)
    peer = transformers.AutoTokenizer.from_pretrained(real)
    ours = Llama.from_pretrained(real)
    tokenizer = load_tokenizer(real)
    for text in ("What is the capital of France?", "Write a poem about\ntwo goats."):
        prompt = encode_prompt(tokenizer, "smollm2", text)
        turns = [{"role": "user", "content": text}]
        rendered = peer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert prompt == peer.encode(rendered, add_special_tokens=False)
        ids = torch.tensor([prompt])
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
