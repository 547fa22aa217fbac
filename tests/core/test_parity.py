"""Our Llama beside transformers': its stored logits and texts (golden), and the library itself.

tests/golden/model/make_golden.py made the golden files. Weights are larger than freshly initialised
ones, and rows pass 2,000 positions: at small weights a wrong rotation or norm hides below the
tolerance.
"""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_model import small_model

from data.tokenizer import load_tokenizer
from model import Llama

FOLDER = Path(__file__).parent.parent / "golden" / "model"
GOLDEN = json.loads((FOLDER / "golden.json").read_text())
LINEAR = dict(rope_type="linear", factor=3.0)
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


@torch.no_grad()
@pytest.mark.parametrize("name, golden", GOLDEN["models"].items())
def test_golden_logits_and_greedy_text(name, golden):
    """Logits beyond 2,000 positions, and answers in a batch of unequal prompts."""
    places = GOLDEN["places"]
    model = Llama.from_pretrained(FOLDER / name)
    stored = np.frombuffer(base64.b64decode(golden["logits_fp32_base64"]), "<f4")
    theirs = torch.tensor(stored).view(len(places), -1)
    assert_close(model(torch.tensor([GOLDEN["ids"]]))[0, places], theirs)
    tokenizer = load_tokenizer(FOLDER.parent / "chat" / "tiny_llama3")
    prompts = golden["prompts"]
    answers = model.generate([tokenizer.encode(prompt["text"]) for prompt in prompts], 64)
    assert answers == [prompt["greedy_ids"] for prompt in prompts]
    texts = [tokenizer.decode(answer) for answer in answers]
    assert texts == [prompt["greedy_text"] for prompt in prompts]


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
    "linear, one query a head": dict(rope_parameters=dict(LINEAR, rope_theta=10000.0)),
}
PEER = dict(
    vocab_size=211,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=6,
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
    initializer_range=0.5,
)


def random_peer(transformers, case, tied):
    torch.manual_seed(11)
    config = PEER | CASES[case] | dict(tie_word_embeddings=tied)
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    for name, parameter in peer.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return peer


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_equal_the_peers(transformers, tmp_path, case, tied):
    peer = random_peer(transformers, case, tied).double()
    peer.save_pretrained(tmp_path, max_shard_size="1MB")
    model = Llama.from_pretrained(tmp_path, dtype=torch.float64)
    tokens = torch.randint(0, 211, (2, 2100))
    assert_close(model(tokens), peer(tokens).logits)
    prompts = [tokens[:1, :2050], tokens[:1, 7:16], tokens[:1, 30:160]]
    answers = model.generate([prompt[0].tolist() for prompt in prompts], 64)
    for prompt, answer in zip(prompts, answers):
        whole = peer.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None)
        assert answer == whole[0, prompt.numel() :].tolist()


# --- both ways, bit by bit ---


@pytest.mark.parametrize(
    "dtype, changes",
    [
        (torch.float32, dict(rope_theta=7e4)),
        (torch.float32, dict(rope_scaling=LINEAR)),
        (torch.bfloat16, dict(tie_word_embeddings=True, rope_scaling=LLAMA3)),
    ],
)
def test_what_we_save_loads_bit_equal_there(transformers, tmp_path, dtype, changes):
    model = small_model(eos_token_id=[3, 5], **changes)
    model.save_pretrained(tmp_path, dtype)
    peer, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info  # nothing missing, left over or of another shape
    assert peer.dtype == dtype and peer.config.eos_token_id == [3, 5]
    mine = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(mine, dict(peer.state_dict()), atol=0, rtol=0)
    with torch.no_grad():
        tokens = torch.randint(0, 89, (2, 60))
        assert_close(Llama.from_pretrained(tmp_path)(tokens), peer.float()(tokens).logits)
