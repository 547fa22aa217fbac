"""Which tokens carry loss, rows, and packed batches."""

from dataclasses import replace

import pytest
import torch
from small import town_tokenizer

from data.chat import Example, collate, encode_example, encode_prompt, encode_rows
from nanosdd.errors import InputError


@pytest.fixture
def encode(tmp_path):
    """A function that encodes one prompt with a response; encode.tokenizer is its tokenizer."""
    tokenizer = town_tokenizer(tmp_path)

    def encode(response, system=None, max_length=64):
        return encode_example(tokenizer, "llama3", "Sort ash.", response, max_length, system)

    encode.tokenizer = tokenizer
    return encode


def test_only_the_response_and_its_end_carry_loss(encode):
    decode = encode.tokenizer.decode
    responses = ["Anna Brook keeps a goat.", "No."]
    batch = collate([encode(response) for response in responses])
    targets = batch.targets.split(batch.response_lengths)
    where = batch.where.split(batch.response_lengths)
    prompt = encode_prompt(encode.tokenizer, "llama3", "Sort ash.")
    for row, response in enumerate(responses):
        assert decode(targets[row].tolist()) == response + "<|eot_id|>"
        read = batch.tokens[where[row]].tolist()  # predicts the next token
        assert read == [prompt[-1], *targets[row][:-1].tolist()]


def test_long_responses_are_cut_and_long_prompts_refused(encode):
    whole = encode("Anna Brook keeps a goat.")
    room = whole.prompt_length + 3
    cut = encode("Anna Brook keeps a goat.", max_length=room)
    assert cut == Example(whole.ids[:room], whole.prompt_length)
    with pytest.raises(InputError, match="--max-length"):
        encode("x", max_length=whole.prompt_length)


def test_rows_may_have_a_system_prompt_and_a_rejected_response(encode):
    row = {"prompt": "Sort ash.", "response": "No."}
    both = row | {"system": "Anna", "rejected": "Anna Brook keeps a goat."}
    rows = [row, row | {"system": "Anna Brook", "rejected": None}, both]
    plain, with_system, last = encode_rows(encode.tokenizer, "llama3", rows, 64)
    assert plain == encode("No.") and with_system == encode("No.", "Anna Brook")
    assert plain.ids != with_system.ids
    assert last.ids == encode("No.", "Anna").ids
    assert last.rejected == encode("Anna Brook keeps a goat.", "Anna")
    room = last.prompt_length + 3
    (cut,) = encode_rows(encode.tokenizer, "llama3", [both], room)
    assert cut.rejected == encode("Anna Brook keeps a goat.", "Anna", room)


@pytest.fixture
def batch():
    return collate(
        [
            Example([11, 12, 13, 14], 2, Example([11, 12, 15, 16, 17, 18], 2)),
            Example([19, 20], 1, Example([19, 21, 22], 1)),
        ]
    )


def test_a_batch_is_packed_with_both_responses_in_order(batch):
    assert batch.tokens.tolist() == [11, 12, 13, 19]
    assert batch.positions.tolist() == [0, 1, 2, 0]
    assert batch.lengths == [3, 1] and batch.response_lengths == [2, 1]
    assert batch.targets.tolist() == [13, 14, 20] and batch.where.tolist() == [1, 2, 3]
    assert batch.rejected.targets.tolist() == [15, 16, 17, 18, 21, 22]
    one = Example([7, 8], 1)
    assert collate([replace(one, rejected=one), one]).rejected is None  # not every row has one


def test_a_batch_moves_with_all_its_tensors(batch):
    moved = batch.to("meta")
    assert moved.lengths == [3, 1]
    for part in (moved, moved.rejected):
        assert all(x.is_meta for x in vars(part).values() if isinstance(x, torch.Tensor))
