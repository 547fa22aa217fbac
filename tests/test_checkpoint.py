"""Checkpoint folders: what is saved loads bit-equal, and what does not fit is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import small_model

import checkpoint
from errors import InputError
from model import Llama, rope_frequencies


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_save_and_load_bit_equal(tmp_path, monkeypatch, tied, shard_bytes):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", shard_bytes)
    model = small_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_bytes == 20_000)
    loaded = Llama.from_pretrained(tmp_path)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def saved(folder, **changes):
    model = small_model(**changes)
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("damage, message", [
    (lambda t: t.pop("model.norm.weight"), "lacks 1 tensors.*model.norm.weight"),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(60)}), "no place for.*q_proj.bias"),
    (lambda t: t.update({"model.norm.weight": torch.ones(47)}), r"shape \[47\].*\[48\]"),
    (lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}), "rope_theta")])
def test_tensors_that_do_not_fit_are_named(tmp_path, damage, message):
    _, tensors = saved(tmp_path)
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        Llama.from_pretrained(tmp_path)


def test_inv_freq_of_llama_2_files_is_checked_and_dropped(tmp_path):
    model, tensors = saved(tmp_path)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = rope_frequencies(model.config).half()
    save_file(tensors, tmp_path / "model.safetensors")
    tokens = torch.tensor([[4, 8, 15]])
    assert torch.equal(Llama.from_pretrained(tmp_path)(tokens), model(tokens))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(InputError, match="not a folder"):
        Llama.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match="config.json is not there"):
        Llama.from_pretrained(tmp_path)
    saved(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-9])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        Llama.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="neither model.safetensors nor"):
        Llama.from_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for name, message in (("../other.safetensors", "leaves the folder"), ("gone.safetensors", "is missing")):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(InputError, match=message):
            Llama.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        Llama.from_pretrained(tmp_path)
