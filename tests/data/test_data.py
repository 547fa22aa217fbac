"""Which tokens carry loss, rows, and packed batches."""

import pytest
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


def test_a_batch_is_packed_with_both_responses_in_order():
    examples = [
        Example([11, 12, 13, 14], 2, Example([11, 12, 15, 16, 17, 18], 2)),
        Example([19, 20], 1, Example([19, 21, 22], 1)),
    ]
    batch = collate(examples)
    assert batch.tokens.tolist() == [11, 12, 13, 19]
    assert batch.positions.tolist() == [0, 1, 2, 0]
    assert batch.lengths == [3, 1] and batch.response_lengths == [2, 1]
    assert batch.targets.tolist() == [13, 14, 20] and batch.where.tolist() == [1, 2, 3]
    rejected = batch.rejected
    assert rejected.tokens.tolist() == [11, 12, 15, 16, 17, 19, 21]
    assert rejected.targets.tolist() == [15, 16, 17, 18, 21, 22]
    assert rejected.where.tolist() == [1, 2, 3, 4, 5, 6] and rejected.rejected is None
    assert collate([*examples, Example([7, 8], 1)]).rejected is None  # not every row has one


def test_a_batch_moves_with_all_its_tensors():
    batch = collate([Example([1, 2, 3], 1, Example([1, 4], 1))])
    moved = batch.to("meta")
    for part in (moved, moved.rejected):
        for name in ("tokens", "positions", "targets", "where"):
            assert getattr(part, name).is_meta and not getattr(batch, name).is_meta
    assert moved.lengths == [2] and moved.rejected.lengths == [1]
