"""Folders as the hub ships them: load, train, save.

True files and config keys, shrunk shapes, tiny vocabularies.
"""

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
# Of each model config.json, in how many files its weights come, files of the tokenizer,
# tokenizer_config.json, the name of its Jinja template, and ours for it.
HUB = json.loads((GOLDEN / "hub.json").read_text())


def hub_folder(folder, name) -> dict[str, torch.Tensor]:
    """Write the folder without our own saving code; returns its tensors."""
    config = HUB[name]["config"]
    files = HUB[name]["weight_files"]
    special = HUB[name]["tokenizer_config"]
    folder.mkdir()

    def write(file, content):
        (folder / file).write_text(json.dumps(content))

    write("config.json", config)
    write("generation_config.json", {"eos_token_id": config["eos_token_id"]})
    write("special_tokens_map.json", {key: special[key] for key in ("bos_token", "eos_token")})
    if template := HUB[name]["jinja"]:
        jinja = (GOLDEN / "chat" / f"{template}.jinja").read_text()
        special = special | {"chat_template": jinja}
    write("tokenizer_config.json", special)
    for file in HUB[name]["tokenizers"]:
        shutil.copy(GOLDEN / file, folder)
    torch.manual_seed(3)
    llama = LlamaConfig.from_dict(config)
    dtype = getattr(torch, config["torch_dtype"])
    tensors = {}
    for key, tensor in Llama(llama).state_dict().items():
        random = torch.randn(tensor.shape) * 0.1 + (tensor.dim() == 1)  # norms around 1
        tensors[key] = random.to(dtype)
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    if name.startswith("Llama-2"):
        for layer in range(2):
            key = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            tensors[key] = rope_frequencies(llama).to(dtype)
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return tensors
    shard_of = {}
    for i, key in enumerate(tensors):
        shard_of[key] = f"model-{i % files + 1:05}-of-{files:05}.safetensors"
    for shard in set(shard_of.values()):
        own = {key: tensors[key] for key in tensors if shard_of[key] == shard}
        save_file(own, folder / shard, metadata={"format": "pt"})
    write("model.safetensors.index.json", {"metadata": {}, "weight_map": shard_of})
    return tensors


def train_one_step(root):
    """Train root/model into root/out."""
    rows = [{"prompt": f"how old is the town {i}", "response": f"it is {i} days"} for i in range(6)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = Sources(pairs=str(root / "pairs.jsonl"), prompts="all", similarity="tfidf")
    settings = Settings(steps=1, batch_size=5, lr=1e-3)
    train(Files(0, sources), "sdd", root / "model", root / "out", settings, Compute())


@pytest.fixture(scope="module", params=HUB)
def trained(request, tmp_path_factory):
    """(name, the folder from the hub, its tensors, the folder that one step of training saved)."""
    root = tmp_path_factory.mktemp("hub")
    tensors = hub_folder(root / "model", request.param)
    train_one_step(root)
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
    came = json.loads((folder / "config.json").read_text())
    written = json.loads((out / "config.json").read_text())
    for key in came.keys() & {"hidden_size", "rope_scaling", "eos_token_id", "rms_norm_eps"}:
        assert written[key] == came[key]
    assert written["rope_theta"] == came.get("rope_theta", 10000.0)
    assert written["torch_dtype"] == "float32"
    assert (out / "chat.txt").read_text() == HUB[name]["template"] + "\n"
    names = {path.name for path in folder.glob("*token*")} | {"generation_config.json"}
    for file in names:
        assert (out / file).read_bytes() == (folder / file).read_bytes()


@torch.no_grad()
def test_what_was_trained_gives_the_same_logits_in_transformers(trained):
    transformers = pytest.importorskip("transformers")
    _, folder, _, out = trained
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.randint(0, 450, (2, 90))
    ours = Llama.from_pretrained(out)(tokens)
    theirs = peer(tokens).logits
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())
    before = transformers.AutoTokenizer.from_pretrained(folder)
    after = transformers.AutoTokenizer.from_pretrained(out)
    text = "the baker's bread, 120 loaves"
    assert after(text).input_ids == before(text).input_ids
    assert after.chat_template == before.chat_template
