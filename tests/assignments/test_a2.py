"""Assignment 2: chat encoding, the response mask, the masked loss, and a step that accumulates."""

import random

import pytest
import torch
import wrong_a2 as slow
from lesson import Check, compare, generator, random_llama, token_ids
from wrong_a2 import WRONG

from assignments import adapters

VOCABULARY = [
    "Who",
    "Tell",
    " me",
    " is",
    " where",
    " Anna",
    " Brook",
    " lives",
    "Anna",
    " in",
    " the",
    " mill",
    "?\n",
    "?\n\n",
    "user",
    "assistant",
    "system",
    "Be",
    " brief",
]


def words(seed: int) -> list[str]:
    """The vocabulary's words in an order of the seed, so that ids differ."""
    return random.Random(f"words {seed}").sample(VOCABULARY, len(VOCABULARY))


def check_encode_prompt(encode_prompt, seed=0):
    for template, prompt, system in (
        ("llama3", "Who is Anna?", None),
        ("llama3", " Tell me where Anna lives.\n", "Be brief"),
        ("llama3", "Who is <|eot_id|> Anna?", None),
        ("plain", "Who is Anna?", None),
        ("plain", "", "Who is Anna Brook?"),
    ):
        arguments = (words(seed), template, prompt, system)
        compare(
            encode_prompt,
            arguments,
            slow.encode_prompt(*arguments),
            f"the ids of prompt {prompt!r}, system {system!r} in template {template}",
            WRONG,
            "encode_prompt",
        )


def check_encode_example(encode_example, seed=0):
    prompt, response = "Who is Anna?", "Anna lives in the mill."
    length = len(slow.encode_prompt(words(seed), "llama3", prompt))
    for limit, what in (
        (99, "the whole pair"),
        (length + 3, "a response that is cut after 3 tokens"),
        (length, "a prompt that leaves no room"),
    ):
        arguments = (words(seed), "llama3", prompt, response, limit)
        compare(
            encode_example,
            arguments,
            slow.encode_example(*arguments),
            f"[ids, prompt_length] at max_length {limit}: {what}",
            WRONG,
            "encode_example",
        )
    for template, system in (("plain", None), ("llama3", "Be brief")):
        arguments = (words(seed), template, prompt, f"\n {response}\n", 99, system)
        compare(
            encode_example,
            arguments,
            slow.encode_example(*arguments),
            f"[ids, prompt_length] in template "
            f"{template} with system {system!r} and white space around the response",
            WRONG,
            "encode_example",
        )


def examples(seed: int, *sizes) -> list:
    """Examples of these (tokens, prompt_length)."""
    return [[token_ids(seed + i, n).tolist(), length] for i, (n, length) in enumerate(sizes)]


def what_counts(made):
    """The lengths and the mask first, which say what counts; then 0 for what nobody reads: tokens past a row's length,
    targets without loss."""
    tokens, lengths, mask = made["tokens"], made["lengths"], made["loss_mask"]
    found = {name: made[name] for name in ("lengths", "loss_mask", "tokens", "targets")}
    if tokens.shape == mask.shape == made["targets"].shape and len(lengths) == len(tokens):
        found["tokens"] = tokens * (torch.arange(tokens.shape[1]) < lengths[:, None])
        found["targets"] = made["targets"] * mask.bool()
    return found


def check_collate(collate, seed=0):
    rows = examples(seed, (9, 4), (5, 1), (12, 10), (7, 6))
    arguments = (rows, rows[0][0][5])  # rows may hold the id that pads them
    compare(
        collate,
        arguments,
        slow.collate(*arguments),
        "rows padded on the right, targets one place on, and the "
        "mask true where the target is a response token",
        WRONG,
        "collate",
        view=what_counts,
    )


def check_loss(loss, seed=0):
    batch = slow.collate(examples(seed, (9, 4), (5, 1), (12, 10)), 3)
    logits = 2 * torch.randn(3, 11, 89, generator=generator(seed, "logits"))
    logits[1, 2, (batch["targets"][1, 2] + 1) % 89] += 200  # exp(-200) is 0 in fp32
    arguments = (logits, batch["targets"], batch["loss_mask"], 17)
    compare(
        loss,
        arguments,
        slow.loss(*arguments),
        "[sum of -log p(target) over the mask / global_tokens, its gradient]",
        WRONG,
        "loss",
        1e-5,
    )


def check_train_step(train_step, seed=0):
    config, weights = random_llama(seed, num_hidden_layers=1)
    batches = [
        examples(seed, (12, 3), (6, 5), (8, 2), (7, 6), (10, 9)),
        examples(seed + 9, (5, 4), (9, 1), (11, 8)),
    ]
    for micro_batch in (2, 0):
        arguments = (config, weights, batches, 0.3, micro_batch)
        compare(
            train_step,
            arguments,
            slow.train_step(*arguments),
            "loss, gradient norm and weights of two steps of "
            f"SGD in {'parts of 2 rows' if micro_batch else 'one part'}",
            WRONG,
            "train_step",
            2e-4,
        )
    arguments = (config, weights, batches, 0.3, 2, 0.01, 0.002)
    compare(
        train_step,
        arguments,
        slow.train_step(*arguments),
        "the same with a loss of 1/100, whose gradient has a "
        "norm below 1, and a before_clip that adds 0.002 to the gradient of lm_head",
        WRONG,
        "train_step",
        2e-4,
    )
    arguments = (config, weights, batches, 0.3, 2, float("nan"))
    compare(
        train_step, arguments, "Diverged", "Diverged where the loss is NaN", WRONG, "train_step"
    )


CHECKS = [
    Check(check_encode_prompt, ("encode_prompt",), 15),
    Check(check_encode_example, ("encode_example",), 15),
    Check(check_collate, ("collate",), 25),
    Check(check_loss, ("loss",), 20),
    Check(check_train_step, ("train_step",), 25),
]


@pytest.mark.a2
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a2(check):
    check.function(*(getattr(adapters, name) for name in check.adapters))
