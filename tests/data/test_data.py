"""Rows, and packed batches. Which tokens carry loss: test_train.py, and assignment 2's tests."""

from dataclasses import replace

import pytest
import torch

from data.chat import Example, collate, encode_example, encode_rows


def test_rows_may_have_a_system_prompt_and_a_rejected_response(tokenizer):
    def encode(response, system=None, max_length=64):
        return encode_example(tokenizer, "llama3", "Sort ash.", response, max_length, system)

    row = {"prompt": "Sort ash.", "response": "No."}
    both = row | {"system": "Anna", "rejected": "Anna Brook keeps a goat."}
    rows = [row, row | {"system": "Anna Brook", "rejected": None}, both]
    plain, with_system, last = encode_rows(tokenizer, "llama3", rows, 64)
    assert plain == encode("No.") and with_system == encode("No.", "Anna Brook")
    assert plain.ids != with_system.ids
    assert last.ids == encode("No.", "Anna").ids
    assert last.rejected == encode("Anna Brook keeps a goat.", "Anna")
    room = last.prompt_length + 3
    (cut,) = encode_rows(tokenizer, "llama3", [both], room)
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
