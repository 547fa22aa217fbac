"""Folders as the hub ships them (true files and config keys, shrunk shapes, tiny vocabularies): load, train, save."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.files import Files
from data.tokenizer import load_tokenizer
from data.worlds import Sources
from model import Llama, LlamaConfig, rope_frequencies
from nanosdd.device import Compute
from train import Settings, train

GOLDEN = Path(__file__).parent.parent / "golden"
LLAMA3 = dict(
    architectures=["LlamaForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=452,
    eos_token_id=[453, 451],
    hidden_act="silu",
    initializer_range=0.02,
    max_position_embeddings=131072,
    mlp_bias=False,
    model_type="llama",
    num_hidden_layers=2,
    pretraining_tp=1,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    torch_dtype="bfloat16",
    use_cache=True,
    vocab_size=456,
)
SCALING = dict(
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
    rope_type="llama3",
)
SPECIAL3 = dict(
    bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", tokenizer_class="PreTrainedTokenizerFast"
)
HUB = {  # config.json, number of files, tokenizer files, tokenizer_config.json, Jinja template, our name for it
    "Llama-2-7b-chat-hf": (
        dict(
            architectures=["LlamaForCausalLM"],
            bos_token_id=1,
            eos_token_id=2,
            hidden_act="silu",
            hidden_size=36,
            initializer_range=0.02,
            intermediate_size=44,
            max_position_embeddings=4096,
            model_type="llama",
            num_attention_heads=3,
            num_hidden_layers=2,
            num_key_value_heads=3,
            pretraining_tp=1,
            rms_norm_eps=1e-5,
            rope_scaling=None,
            tie_word_embeddings=False,
            torch_dtype="float16",
            transformers_version="4.32.0.dev0",
            use_cache=True,
            vocab_size=450,
        ),
        2,
        [
            "tokenizer/tiny_llama2_json/tokenizer.json",
            "tokenizer/tiny_sentencepiece/tokenizer.model",
        ],
        dict(
            add_bos_token=True,
            add_eos_token=False,
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            legacy=False,
            tokenizer_class="LlamaTokenizer",
        ),
        "llama2",
        "llama2",
    ),
    "Meta-Llama-3.1-8B-Instruct": (
        dict(
            LLAMA3,
            hidden_size=32,
            intermediate_size=56,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_scaling=dict(SCALING, factor=8.0),
            tie_word_embeddings=False,
            transformers_version="4.42.3",
        ),
        4,
        ["chat/tiny_llama3/tokenizer.json"],
        SPECIAL3,
        "llama31",
        "llama31",
    ),
    "Llama-3.2-1B-Instruct": (
        dict(
            LLAMA3,
            head_dim=10,
            hidden_size=32,
            intermediate_size=72,
            num_attention_heads=4,
            num_key_value_heads=1,
            rope_scaling=dict(SCALING, factor=32.0),
            tie_word_embeddings=True,
            transformers_version="4.45.0.dev0",
        ),
        1,
        ["chat/tiny_llama3/tokenizer.json"],
        SPECIAL3,
        "llama32",
        "llama31",
    ),
    "SmolLM2-135M": (
        dict(
            architectures=["LlamaForCausalLM"],
            attention_bias=False,
            attention_dropout=0.0,
            bos_token_id=0,
            eos_token_id=0,
            hidden_act="silu",
            hidden_size=36,
            initializer_range=0.041666666666666664,
            intermediate_size=60,
            is_llama_config=True,
            max_position_embeddings=8192,
            mlp_bias=False,
            model_type="llama",
            num_attention_heads=9,
            num_hidden_layers=2,
            num_key_value_heads=3,
            pretraining_tp=1,
            rms_norm_eps=1e-5,
            rope_interleaved=False,
            rope_scaling=None,
            rope_theta=100000,
            tie_word_embeddings=True,
            torch_dtype="bfloat16",
            transformers_version="4.40.1",
            use_cache=True,
            vocab_size=451,
        ),
        1,
        ["tokenizer/tiny_smollm2/tokenizer.json"],
        dict(
            bos_token="<|endoftext|>",
            eos_token="<|endoftext|>",
            unk_token="<|endoftext|>",
            tokenizer_class="GPT2Tokenizer",
        ),
        None,
        "plain",
    ),
}


def hub_folder(folder, name) -> dict[str, torch.Tensor]:
    """Write the folder without our own saving code; returns its tensors."""
    config, files, tokenizers, tokenizer_config, template, _ = HUB[name]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(
        json.dumps(
            {key: config[key] for key in ("bos_token_id", "eos_token_id", "transformers_version")}
        )
    )
    if template:
        tokenizer_config = tokenizer_config | {
            "chat_template": (GOLDEN / "chat" / f"{template}.jinja").read_text()
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "special_tokens_map.json").write_text(
        json.dumps(
            {
                key: value
                for key, value in tokenizer_config.items()
                if key.endswith("_token") and isinstance(value, str)
            }
        )
    )
    for file in tokenizers:
        shutil.copy(GOLDEN / file, folder)
    torch.manual_seed(3)
    llama = LlamaConfig.from_dict(config)
    tensors = {
        key: torch.randn(tensor.shape) * 0.1 + (tensor.dim() == 1)  # norms around 1
        for key, tensor in Llama(llama).state_dict().items()
    }
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    if name.startswith("Llama-2"):
        for layer in range(2):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = rope_frequencies(llama)
    tensors = {
        key: tensor.to(getattr(torch, config["torch_dtype"])) for key, tensor in tensors.items()
    }
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return tensors
    shard_of = {
        key: f"model-{i % files + 1:05}-of-{files:05}.safetensors" for i, key in enumerate(tensors)
    }
    for shard in set(shard_of.values()):
        save_file(
            {key: tensors[key] for key in tensors if shard_of[key] == shard},
            folder / shard,
            metadata={"format": "pt"},
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": shard_of})
    )
    return tensors


@pytest.fixture(scope="module", params=HUB)
def trained(request, tmp_path_factory):
    """(name, the folder from the hub, its tensors, the folder that one step of training saved)."""
    root = tmp_path_factory.mktemp("hub")
    tensors = hub_folder(root / "model", request.param)
    rows = [{"prompt": f"how old is the town {i}", "response": f"it is {i} days"} for i in range(6)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    world = Files.open(0, Sources(pairs=str(root / "pairs.jsonl"), prompts="all"))
    train(
        world,
        "sdd",
        root / "model",
        root / "out",
        Settings(steps=1, batch_size=5, lr=1e-3),
        Compute(),
    )
    return request.param, root / "model", tensors, root / "out"


def test_it_loads_as_it_came(trained):
    _, folder, tensors, _ = trained
    loaded = Llama.from_pretrained(folder)
    weights = dict(loaded.named_parameters())  # a tied head is no parameter of its own
    assert weights.keys() == {key for key in tensors if "inv_freq" not in key}
    assert all(torch.equal(weights[key].detach(), tensors[key].float()) for key in weights)
    assert loaded.config.vocab_size == load_tokenizer(folder).n_vocab


def test_a_step_moves_every_tensor_and_is_saved_with_older_keys(trained):
    name, folder, tensors, out = trained
    saved = load_file(out / "model.safetensors")
    assert saved.keys() == {key for key in tensors if "inv_freq" not in key}
    for key, tensor in saved.items():
        assert tensor.dtype == torch.float32 and not torch.equal(tensor, tensors[key].float()), key
    came, written = (json.loads((place / "config.json").read_text()) for place in (folder, out))
    for key in (
        "hidden_size",
        "rope_scaling",
        "tie_word_embeddings",
        "eos_token_id",
        "vocab_size",
        "rms_norm_eps",
    ):
        assert written[key] == came[key]
    assert (
        written["rope_theta"] == came.get("rope_theta", 10000.0)
        and written["torch_dtype"] == "float32"
    )
    assert (out / "chat.txt").read_text() == HUB[name][-1] + "\n"
    for file in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    ):
        assert (out / file).read_bytes() == (folder / file).read_bytes()
    assert (out / "tokenizer.model").is_file() == name.startswith("Llama-2")


@torch.no_grad()
def test_what_was_trained_gives_the_same_logits_in_transformers(trained):
    transformers = pytest.importorskip("transformers")
    _, folder, _, out = trained
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.randint(0, 450, (2, 90))
    ours, theirs = Llama.from_pretrained(out)(tokens), peer(tokens).logits
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())
    before, after = (transformers.AutoTokenizer.from_pretrained(place) for place in (folder, out))
    text = "the baker's bread, 120 loaves"
    assert (
        after(text).input_ids == before(text).input_ids
        and after.chat_template == before.chat_template
    )
