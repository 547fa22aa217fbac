"""Assignment 2: chat encoding, packed batches, the loss, and a step that accumulates."""

import random

import pytest
import torch
import wrong_a2 as slow
from lesson import Check, compare, generator, random_llama, token_ids

from assignments import adapters

VOCABULARY = """
Who|Tell| me| is| where| Anna| Brook| lives|Anna| in| the| mill|user|assistant|system|Be| brief
""".strip().split("|")
VOCABULARY += ["?\n", "?\n\n"]  # a text may not be cut where these can stand


def words(seed: int) -> list[str]:
    """The vocabulary's words in an order of the seed, so that ids differ."""
    return random.Random(f"words {seed}").sample(VOCABULARY, len(VOCABULARY))


def check_encode_prompt(encode_prompt, seed=0):
    """With a system text, and a prompt that names a special token."""
    for template, prompt, system in (
        ("llama3", "Who is Anna?", None),
        ("llama3", " Tell me where Anna lives.\n", "Be brief"),
        ("llama3", "Who is <|eot_id|> Anna?", None),
        ("plain", "Who is Anna?", None),
        ("plain", "", "Who is Anna Brook?"),
    ):
        arguments = (words(seed), template, prompt, system)
        what = f"the ids of prompt {prompt!r}, system {system!r} in template {template}"
        compare(encode_prompt, arguments, what, slow, "encode_prompt")


def check_encode_example(encode_example, seed=0):
    """What is cut, what is stripped, and what leaves no room."""
    prompt = "Who is Anna?"
    response = "Anna lives in the mill."
    length = len(slow.encode_prompt(words(seed), "llama3", prompt))
    for template, system, text, limit, what in (
        ("llama3", None, response, 99, "the whole pair"),
        ("llama3", None, response, length + 3, "a response that is cut after 3 tokens"),
        ("llama3", None, response, length, "a prompt that leaves no room"),
        ("plain", None, f"\n {response}\n", 99, "template plain, white space around the response"),
        ("llama3", "Be brief", response, 99, "a system text"),
    ):
        arguments = (words(seed), template, prompt, text, limit, system)
        what = f"[ids, prompt_length] at max_length {limit}: {what}"
        compare(encode_example, arguments, what, slow, "encode_example")


def examples(seed: int, *sizes) -> list:
    """Examples of these (tokens, prompt_length)."""
    return [[token_ids(seed + i, n).tolist(), length] for i, (n, length) in enumerate(sizes)]


def check_collate(collate, seed=0):
    """Every field of a batch of four rows."""
    rows = examples(seed, (9, 4), (5, 1), (12, 10), (7, 6))
    what = "rows one after the other, and where in them the response tokens are predicted"
    compare(collate, (rows,), what, slow, "collate")


def check_loss(loss, seed=0):
    """Fewer response tokens than the global batch has, and one of them very unlikely."""
    batch = slow.collate(examples(seed, (9, 4), (5, 1), (12, 10)))
    draw = generator(seed, "hidden")
    hidden = torch.randn(len(batch["tokens"]), 48, generator=draw)
    head = torch.randn(89, 48, generator=draw)
    likely = head[(batch["targets"][3] + 1) % 89]
    hidden[batch["where"][3]] = 9 * likely  # so sure of another token that p underflows in fp32
    arguments = (hidden, head, batch["where"], batch["targets"], 17)
    what = "[sum of -log p(target) over the response tokens / global_tokens, its gradient]"
    compare(loss, arguments, what, slow, "loss", 2e-5)


def check_train_step(train_step, seed=0):
    """Two steps, in parts and whole, with a gradient above norm 1 and below."""
    config, weights = random_llama(seed, num_hidden_layers=1)
    batches = [
        examples(seed, (12, 3), (6, 5), (8, 2), (7, 6), (10, 9)),
        examples(seed + 9, (5, 4), (9, 1), (11, 8)),
    ]
    nan = float("nan")
    for micro_batch, scale, added, what in (
        (2, 1.0, 0.0, "[loss, gradient norm] and weights of two steps of SGD in parts of 2 rows"),
        (0, 1.0, 0.0, "the same in one part"),
        (2, 0.01, 0.002, "the same of a loss / 100, and a before_clip that adds 0.002 to lm_head"),
        (2, nan, 0.0, "Diverged where the loss is NaN"),
    ):
        arguments = (config, weights, batches, 0.3, micro_batch, scale, added)
        compare(train_step, arguments, what, slow, "train_step", 2e-4)


CHECKS = [
    Check(check_encode_prompt, "encode_prompt", 15),
    Check(check_encode_example, "encode_example", 15),
    Check(check_collate, "collate", 25),
    Check(check_loss, "loss", 20),
    Check(check_train_step, "train_step", 25),
]


@pytest.mark.a2
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a2(check):
    check.run(adapters)
