"""Our Llama beside transformers': its stored logits and texts (golden), and the library itself where it is installed.

tests/golden/model/make_golden.py made the golden files. Weights are larger than freshly initialised ones, and rows pass
2,000 positions: at small weights a wrong rotation or norm hides below the tolerance.
"""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import small_model

from data.tokenizer import load_tokenizer
from model import Llama
from nanosdd.checkpoint import write_model

FOLDER = Path(__file__).parent.parent / "golden" / "model"
GOLDEN = json.loads((FOLDER / "golden.json").read_text())
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=600,
)


def assert_close(ours, theirs):
    """Within 1e-5 of the reference's largest."""
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error < 1e-5, f"logits differ by {error:.1e} of the largest"


# --- golden ---


@pytest.mark.parametrize("name", GOLDEN["models"])
def test_golden_logits_beyond_2000_positions(name):
    model = Llama.from_pretrained(FOLDER / name)
    places = torch.tensor(GOLDEN["places"])
    logits = np.frombuffer(base64.b64decode(GOLDEN["models"][name]["logits_fp32_base64"]), "<f4")
    with torch.no_grad():
        got = model(torch.tensor([GOLDEN["ids"]]), positions=places)[0]
    assert max(places) > 2000
    assert_close(got, torch.tensor(logits).view(len(places), -1))


@pytest.mark.parametrize("name", GOLDEN["models"])
def test_golden_greedy_text_in_a_batch_of_unequal_lengths(name):
    prompts = GOLDEN["models"][name]["prompts"]
    tokenizer = load_tokenizer(FOLDER.parent / "chat" / "tiny_llama3")
    answers = Llama.from_pretrained(FOLDER / name).generate(
        [tokenizer.encode(p["text"]) for p in prompts], 64
    )
    for prompt, answer in zip(prompts, answers):
        assert answer == prompt["greedy_ids"] and len(answer) == 64
        assert tokenizer.decode(answer) == prompt["greedy_text"]


# --- live ---


@pytest.fixture
def transformers():
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


CASES = {  # attention and rotation
    "llama3, grouped": dict(
        num_key_value_heads=2, head_dim=40, rope_parameters=dict(LLAMA3, rope_theta=500000.0)
    ),
    "linear, one query a head": dict(
        rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=10000.0)
    ),
    "plain, grouped": dict(
        num_key_value_heads=3, rope_parameters=dict(rope_type="default", rope_theta=70000.0)
    ),
}


def random_peer(transformers, std, seed=11, **changes):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **dict(
            dict(
                vocab_size=211,
                hidden_size=96,
                intermediate_size=160,
                num_hidden_layers=3,
                num_attention_heads=6,
                rms_norm_eps=1e-5,
                max_position_embeddings=4096,
                initializer_range=std,
            ),
            **changes,
        )
    )
    peer = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in peer.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return peer


@torch.no_grad()
@pytest.mark.parametrize("std, dtype", [(0.1, torch.float32), (0.5, torch.float64)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_peers(transformers, tmp_path, case, tied, std, dtype):
    peer = random_peer(transformers, std, tie_word_embeddings=tied, **CASES[case])
    peer.save_pretrained(tmp_path)
    lengths = [2100, 31]
    tokens = torch.randint(0, 211, (2, 2100))
    real = torch.arange(2100) < torch.tensor(lengths)[:, None]
    ours = Llama.from_pretrained(tmp_path, dtype=dtype)(tokens, positions=real)
    theirs = peer.to(dtype)(tokens, attention_mask=real.long()).logits[real]
    assert ours.dtype == dtype
    assert_close(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_64_greedy_tokens_equal_the_peers(transformers, tmp_path, case):
    peer = random_peer(transformers, 0.1, **CASES[case])
    peer.save_pretrained(tmp_path)
    prompts = [torch.randint(0, 211, (n,)).tolist() for n in (2050, 9, 130)]
    answers = Llama.from_pretrained(tmp_path).generate(prompts, 64)
    for prompt, answer in zip(prompts, answers):
        theirs = peer.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None
        )
        assert answer == theirs[0, len(prompt) :].tolist()


# --- both ways, bit by bit ---


@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
@pytest.mark.parametrize(
    "changes",
    [
        dict(tie_word_embeddings=True, rope_scaling=LLAMA3),
        dict(rope_theta=7e4),
        dict(rope_scaling=dict(rope_type="linear", factor=3.0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_we_save_loads_bit_equal_there(transformers, tmp_path, dtype, changes, shard_bytes):
    model = small_model(eos_token_id=[3, 5], **changes)
    write_model(tmp_path, model.config.to_dict(), model.state_dict(), dtype, shard_bytes)
    peer, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info  # nothing missing, left over or of another shape
    assert peer.dtype == dtype and peer.config.eos_token_id == [3, 5]
    theirs = peer.state_dict()
    assert theirs.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.to(dtype), theirs[name]), name
    with torch.no_grad():
        tokens = torch.randint(0, 89, (2, 60))
        assert_close(Llama.from_pretrained(tmp_path)(tokens), peer.float()(tokens).logits)


@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_it_saves_loads_bit_equal_here(transformers, tmp_path, tied, shard_size):
    peer = random_peer(transformers, 0.1, tie_word_embeddings=tied, **CASES["llama3, grouped"])
    peer.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard_size == "100KB")
    ours = Llama.from_pretrained(tmp_path)
    for name, tensor in peer.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    ours.save_pretrained(tmp_path / "again")
    kept = {
        name: tensor
        for file in tmp_path.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert kept.keys() == again.keys() and all(
        torch.equal(kept[name], again[name]) for name in kept
    )
