"""Checkpoint folders: what is saved loads bit-equal, and what does not fit is named."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import small_model

from model import Llama
from nanosdd.checkpoint import kept_update, read_json, write_text, writing
from nanosdd.errors import InputError


def saved(folder, **changes):
    model = small_model(**changes)
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


def write_shards(folder, tensors, place=""):
    """Replace model.safetensors by an index and two shards, which may lie below the folder."""
    (folder / "model.safetensors").unlink()
    (folder / place).mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    shards = {f"{place}a.safetensors": names[:5], f"{place}b.safetensors": names[5:]}
    shard_of = {}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
        shard_of.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))


@pytest.mark.parametrize("shards", [None, "", "./parts/of it/"])
@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_bit_equal(tmp_path, tied, shards):
    model, tensors = saved(tmp_path, tie_word_embeddings=tied)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    if shards is not None:
        write_shards(tmp_path, tensors, shards)
    loaded = Llama.from_pretrained(tmp_path)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("model.norm.weight", None, "another model: .* Missing key.*model.norm.weight"),
        ("model.layers.0.self_attn.q_proj.bias", torch.zeros(60), "Unexpected key.*q_proj.bias"),
        ("model.norm.weight", torch.ones(47), r"norm.weight: .*\[47\].*\[48\]"),
        ("model.norm.weight", torch.ones(48, dtype=torch.int8), "norm.weight is I8.*quantized"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, name, tensor, message):
    _, tensors = saved(tmp_path)
    tensors[name] = tensor
    if tensor is None:
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        Llama.from_pretrained(tmp_path)


def test_buffers_of_older_files_change_nothing_as_in_transformers(tmp_path):
    """Older files hold inv_freq without the linear scaling that config.json asks for."""
    model, tensors = saved(tmp_path, rope_scaling={"rope_type": "linear", "factor": 4.0})
    for buffer in (
        "model.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.layers.0.self_attn.masked_bias",
        "model.causal_mask",
        "model.embed_tokens.position_ids",
    ):
        tensors[buffer] = (1 / 10000 ** (torch.arange(0, 12, 2) / 12)).half()
    save_file(tensors, tmp_path / "model.safetensors")
    tokens = torch.tensor([[4, 8, 15]])
    assert torch.equal(Llama.from_pretrained(tmp_path)(tokens), model(tokens))


@pytest.mark.posix
@pytest.mark.parametrize("name", ["model.safetensors", "b.safetensors"])
def test_missing_weights_are_named_and_a_pipe_is_not_waited_for(tmp_path, name):
    _, tensors = saved(tmp_path)
    write_shards(tmp_path, tensors)
    if name == "model.safetensors":
        (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match=f"{name} is not a readable .* .No such file"):
        Llama.from_pretrained(tmp_path)
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} is not a readable .* .not an ordinary file"):
        Llama.from_pretrained(tmp_path)


def test_a_peft_adapter_in_the_folder_is_not_left_out_in_silence(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match="adapter_config.json: a PEFT adapter; merge_and_unload"):
        Llama.from_pretrained(tmp_path)


def test_a_tied_head_that_the_file_carries_all_the_same_is_the_embedding(tmp_path):
    model, tensors = saved(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = Llama.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    tensors["lm_head.weight"][3, 5] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="lm_head.weight differs"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly_and_computed_in_what_was_asked(tmp_path, kind):
    model, _ = saved(tmp_path)
    model.save_pretrained(tmp_path, kind)
    assert f'"{kind}"'.replace("torch.", "") in (tmp_path / "config.json").read_text()
    for dtype in (torch.float32, torch.float64, kind):
        loaded = Llama.from_pretrained(tmp_path, dtype=dtype)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor.to(kind).to(dtype)), name
        assert loaded(torch.tensor([[1, 2, 3]])).dtype == dtype


def test_a_loaded_model_no_longer_depends_on_its_file(tmp_path):
    model, _ = saved(tmp_path)
    loaded = Llama.from_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with open(path, "r+b") as file:
        file.seek(-path.stat().st_size // 2, 2)
        file.write(bytes(path.stat().st_size // 2))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_a_broken_index_is_named(tmp_path):
    _, tensors = saved(tmp_path)
    write_shards(tmp_path, tensors)
    index = tmp_path / "model.safetensors.index.json"
    for broken in ({"weight_map": {"model.norm.weight": []}}, {}, []):
        index.write_text(json.dumps(broken))
        with pytest.raises(InputError, match="no weight_map"):
            Llama.from_pretrained(tmp_path)
    outside = ("../a.safetensors", "a/../../b.safetensors", "/tmp/a.safetensors")
    messages = {"gone.safetensors": "gone.safetensors is not a readable", 3: "3 is not a readable"}
    messages |= dict.fromkeys(outside, "leaves the folder")
    for shard, message in messages.items():
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
        with pytest.raises(InputError, match=message):
            Llama.from_pretrained(tmp_path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a/results.json"
    write_text(path, "é \udcff")  # half a character, as a file name may hold
    with open(path, "rb") as reader:
        write_text(path, "new")
        assert reader.read() == "é \\udcff".encode()
    with pytest.raises(ZeroDivisionError), writing(path) as temporary:
        temporary.write_text(str(1 / 0))
    assert list(path.parent.iterdir()) == [path] and path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644


def test_what_bf16_keeps_of_an_update_by_hand():
    # In units of 1/512, bf16 holds every 4th number above 1 and every 2nd below. Of the updates
    # 1, 4, 0, -2 and 2 it keeps 0, 4, 0, -2 and 4: the last goes from 1 to 3, rounded 0 and 4.
    before = torch.nn.Linear(5, 1, bias=False)
    after = torch.nn.Linear(5, 1, bias=False)
    before.weight.data[:] = 1 + torch.tensor([0, 0, 0, 0, 1]) / 512
    after.weight.data[:] = 1 + torch.tensor([1, 4, 0, -2, 3]) / 512
    moved, share, cosine = kept_update(before, after.state_dict(), torch.bfloat16)
    assert moved == 4 / 5 and share == 3 / 4 and cosine == pytest.approx(28 / (25 * 36) ** 0.5)
    assert kept_update(before, before.state_dict(), torch.bfloat16) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"a": 1,\n b}', "not valid JSON .*line 2"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON .*recursion"),
        (b"[" + b"[]," * 2**24, "50,331,649 bytes, more than 33,554,432"),
    ],
    ids=range(4),
)
def test_a_broken_json_file_is_one_clear_line(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=f"config.json.*{message}") as error:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(error.value)


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert read_json(tmp_path / "config.json") == {"a": "é"}
