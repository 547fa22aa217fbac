"""The Llama packed, cached and decoding. Its logits: test_parity.py."""

import itertools

import pytest
import torch
from small_model import LLAMA3_SCALING, small_config, small_model, token_ids

from model import LlamaConfig
from nanosdd.errors import InputError

# ---- packed rows ----

LENGTHS = [5, 31, 12, 12, 1, 12]


def gradients(model, logits):
    return torch.autograd.grad(logits.logsumexp(-1).square().sum(), list(model.parameters()))


def test_packed_rows_are_what_each_is_alone():
    model = small_model()
    rows = token_ids(sum(LENGTHS), seed=4).split(LENGTHS)
    positions = torch.cat([torch.arange(T) for T in LENGTHS])
    packed = model.lm_head(model.hidden(torch.cat(rows), positions, LENGTHS))
    alone = torch.cat([model(row[None])[0] for row in rows])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    expected = gradients(model, alone)
    torch.testing.assert_close(gradients(model, packed), expected, atol=1e-3, rtol=1e-4)


def test_checkpointed_activations_are_recomputed_and_give_the_same_gradient():
    model = small_model().train()
    tokens = token_ids(2, 9, seed=6)
    calls = []
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    expected = gradients(model, model(tokens))
    model.checkpoint_activations = True
    assert all(map(torch.equal, gradients(model, model(tokens)), expected))
    assert len(calls) == 1 + 2


# ---- the configuration ----

REFUSED = {
    "attention_bias": True,
    "mlp_bias": True,
    "sliding_window": 64,
    "rope_interleaved": True,
    "quantization_config": {"bits": 4},
    "model_type": "mistral",
    "hidden_act": "gelu",
    "rms_norm_eps": None,
    "vocab_size": None,
    "num_key_value_heads": 4,
    "head_dim": 9,
}
REFUSED_ROPE = {
    "yarn": {"rope_type": "yarn", "factor": 2.0},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "low_freq_factor": {"rope_type": "llama3", "factor": 2.0},
}


@pytest.mark.parametrize(
    "message, changes",
    [(key, {key: value}) for key, value in REFUSED.items()]
    + [(message, {"rope_parameters": rope}) for message, rope in REFUSED_ROPE.items()],
)
def test_config_refuses_what_it_would_get_wrong(message, changes):
    with pytest.raises(InputError, match=message):
        LlamaConfig.from_dict(small_config().to_dict() | changes)


LINEAR = {"rope_type": "linear", "factor": 3.0}


@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3_SCALING])
def test_config_survives_saving_and_reads_newer_rope_keys(scaling):
    config = small_config(rope_theta=3.6e9, rope_scaling=scaling, eos_token_id=[4, 9])
    saved = config.to_dict()
    assert LlamaConfig.from_dict(saved) == config
    del saved["rope_theta"], saved["rope_scaling"]
    saved["rope_parameters"] = {"rope_theta": 3.6e9, "rope_type": "default", "type": None} | (
        scaling or {}
    )
    assert LlamaConfig.from_dict(saved) == config


# ---- greedy decoding ----

PROMPTS = [[5, 9, 2], [11] * 17, [1, 2, 3, 4, 5, 6, 7], [80]]


@pytest.fixture
def uncompiled():
    """torch.compile runs functions as they are, without a compiler; see test_compile.py."""
    with torch.compiler.set_stance("force_eager"):
        yield


@torch.no_grad()
def greedy_without_cache(model, prompt, count):
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("compiled, heads", [(False, 1), (False, 2), (False, 6), (True, 2)])
def test_generate_equals_the_loop_without_cache_row_by_row(uncompiled, compiled, heads):
    model = small_model(rope_scaling=LLAMA3_SCALING, num_key_value_heads=heads)
    free = [greedy_without_cache(model, prompt, 24) for prompt in PROMPTS]
    stop = {free[0][5], free[2][9]}
    alone = [list(itertools.takewhile(lambda id: id not in stop, answer)) for answer in free]
    assert len({len(answer) for answer in alone}) > 2  # rows stop at different steps
    assert model.generate(PROMPTS, 24, stop, compiled) == alone


@pytest.mark.parametrize("compiled, sizes", [(False, [4, 3, 2, 1]), (True, [4, 2, 1])])
def test_rows_end_with_the_context_and_are_dropped(uncompiled, compiled, sizes):
    """At once, or compiled when half of them are finished."""
    model = small_model(max_position_embeddings=20)
    seen = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    answers = model.generate(PROMPTS, 50, compiled=compiled)
    assert [len(answer) for answer in answers] == [17, 3, 13, 19]
    assert list(dict.fromkeys(seen[1:])) == sizes  # seen[0]: the packed prompts


def test_generate_without_anything_to_do_or_room_to_do_it():
    model = small_model(max_position_embeddings=20)
    assert model.generate([], 5) == []
    assert model.generate(PROMPTS[:2], 0) == [[], []]
    for prompt in ([], [1] * 20):
        with pytest.raises(InputError, match="context of 20"):
            model.generate([PROMPTS[0], prompt], 5)


def test_bf16_decodes_with_a_bf16_cache_compiled_or_not(uncompiled):
    model = small_model()
    with torch.autocast("cpu", torch.bfloat16):
        answers = model.generate(PROMPTS, 24)
        assert model.generate(PROMPTS, 24, compiled=True) == answers
        _, cache = model.read_prompts(PROMPTS, 24)
    assert {part.dtype for part in cache.keys + cache.values} == {torch.bfloat16}
