"""Loss masks, rows and batches."""

import pytest
import torch
from small import town_tokenizer

from data.chat import Example, collate, encode_example, encode_prompt, encode_rows, read_chat
from nanosdd.errors import InputError


def test_only_the_response_and_its_end_carry_loss(tmp_path):
    tokenizer = town_tokenizer(tmp_path)
    pairs = [("Who is Anna Brook?", "Anna Brook keeps a goat."), ("Sort ash.", "No.")]
    examples = [encode_example(tokenizer, "llama3", *row, max_length=64) for row in pairs]
    batch = collate(examples)
    for row, (prompt, response) in enumerate(pairs):
        assert (
            tokenizer.decode(batch.targets[row][batch.loss_mask[row]].tolist())
            == response + "<|eot_id|>"
        )
        first = batch.tokens[row][batch.loss_mask[row]][
            0
        ]  # the last token of the prompt predicts the first target
        assert first == encode_prompt(tokenizer, "llama3", prompt)[-1]
    assert batch.lengths.tolist() == [len(example.ids) - 1 for example in examples]
    assert batch.tokens.shape == batch.targets.shape == (2, max(batch.lengths))


def test_text_that_looks_special_stays_text(tmp_path):
    tokenizer = town_tokenizer(tmp_path)
    ids = encode_prompt(tokenizer, "llama3", "a <|eot_id|> b")
    assert ids.count(tokenizer.special["<|eot_id|>"]) == 1  # the template's own
    assert tokenizer.decode(ids).count("<|eot_id|>") == 2


def test_long_responses_are_cut_and_long_prompts_refused(tmp_path):
    tokenizer = town_tokenizer(tmp_path)
    whole = encode_example(
        tokenizer, "llama3", "Who is Anna Brook?", "Anna Brook keeps a goat.", 99
    )
    cut = encode_example(tokenizer, "llama3", "Who is Anna Brook?", "Anna Brook keeps a goat.", 18)
    assert cut == Example(whole.ids[:18], whole.prompt_length)
    with pytest.raises(InputError, match="--max-length"):
        encode_example(tokenizer, "llama3", "Who is Anna Brook?", "x", 12)


def test_rows_may_have_a_system_prompt_and_a_rejected_response(tmp_path):
    tokenizer = town_tokenizer(tmp_path)
    rows = [
        {"prompt": "Sort ash.", "response": "No."},
        {"prompt": "Sort ash.", "response": "No.", "system": "Anna Brook", "rejected": None},
        {
            "prompt": "Sort ash.",
            "response": "Yes.",
            "system": "Anna",
            "rejected": "Anna Brook keeps a goat.",
        },
    ]

    def pair(response, *system, max_length=64):
        return encode_example(tokenizer, "llama3", "Sort ash.", response, max_length, *system)

    plain, with_system, both = encode_rows(tokenizer, "llama3", rows, 64)
    assert (
        plain == pair("No.")
        and with_system == pair("No.", "Anna Brook")
        and plain.ids != with_system.ids
    )
    assert both.ids == pair("Yes.", "Anna").ids and both.rejected == pair(
        "Anna Brook keeps a goat.", "Anna"
    )
    room = both.prompt_length + 3
    cut = encode_rows(tokenizer, "llama3", rows[2:], room)[0].rejected
    assert (
        cut == pair("Anna Brook keeps a goat.", "Anna", max_length=room)
        and cut.response_length == 3
    )
    with pytest.raises(InputError, match="--max-length"):
        encode_rows(tokenizer, "llama3", rows, both.prompt_length)


def test_a_batch_of_preference_pairs_holds_both_responses_in_order():
    examples = [
        Example([1, 2, 3, 4], 2, Example([1, 2, 5, 6, 7, 8], 2)),
        Example([9, 10], 1, Example([9, 11, 12], 1)),
    ]
    batch = collate(examples, pad=77)
    assert batch.tokens.tolist() == [[1, 2, 3], [9, 10, 77]]
    assert batch.rejected.tokens.tolist() == [[1, 2, 5, 6, 7], [9, 11, 12, 77, 77]]
    assert [t[m].tolist() for t, m in zip(batch.rejected.targets, batch.rejected.loss_mask)] == [
        [5, 6, 7, 8],
        [11, 12],
    ]
    assert batch.rejected.lengths.tolist() == [5, 2] and batch.rejected.rejected is None
    assert collate([*examples, Example([1, 2], 1)]).rejected is None  # not every example has one


def test_a_batch_moves_with_all_its_tensors():
    batch = collate([Example([1, 2, 3], 1, Example([1, 4], 1))])
    moved = batch.to("meta")
    for old, new in (batch, moved), (batch.rejected, moved.rejected):
        for name in ("tokens", "targets", "loss_mask", "lengths"):
            assert (
                getattr(new, name).is_meta and getattr(new, name).shape == getattr(old, name).shape
            )
            assert not getattr(old, name).is_meta
    assert collate([Example([1, 2], 1)]).to("meta").rejected is None


def test_padding_value_changes_neither_mask_nor_rows():
    examples = [Example([1, 2, 3, 4, 5], 2), Example([6, 7, 8], 1)]
    a, b = collate(examples, pad=0), collate(examples, pad=9)
    assert torch.equal(a.loss_mask, b.loss_mask) and a.loss_mask.sum() == 3 + 2
    assert a.tokens[1].tolist() == [6, 7, 8, 0] and b.tokens[1].tolist() == [6, 7, 8, 9]


def test_an_unknown_template_in_a_checkpoint_is_an_error(tmp_path):
    (tmp_path / "chat.txt").write_text("klingon\n")
    with pytest.raises(InputError, match="klingon"):
        read_chat(tmp_path)
