"""Loss masks and batches."""

import pytest
import torch
from small import town_tokenizer

from data.chat import Example, collate, encode_example, encode_prompt, read_chat
from nanosdd.errors import InputError


def test_only_the_response_and_its_end_carry_loss(tmp_path):
    tokenizer = town_tokenizer(tmp_path)
    pairs = [("Who is Anna Brook?", "Anna Brook keeps a goat."), ("Sort ash.", "No.")]
    examples = [encode_example(tokenizer, "llama3", *row, max_length=64) for row in pairs]
    batch = collate(examples)
    for row, (prompt, response) in enumerate(pairs):
        assert tokenizer.decode(batch.targets[row][batch.loss_mask[row]].tolist()) == response + "<|eot_id|>"
        unmasked = batch.tokens[row][batch.loss_mask[row]].tolist()  # one place earlier: what the model has just read
        assert unmasked[0] == encode_prompt(tokenizer, "llama3", prompt)[-1]
    assert batch.lengths.tolist() == [len(example.ids) - 1 for example in examples]
    assert batch.tokens.shape == batch.targets.shape == (2, max(batch.lengths))


def test_text_that_looks_special_stays_text(tmp_path):
    tokenizer = town_tokenizer(tmp_path)
    ids = encode_prompt(tokenizer, "llama3", "a <|eot_id|> b")
    assert ids.count(tokenizer.special["<|eot_id|>"]) == 1  # the template's own
    assert tokenizer.decode(ids).count("<|eot_id|>") == 2


def test_long_answers_are_cut_and_long_prompts_refused(tmp_path):
    tokenizer = town_tokenizer(tmp_path)
    whole = encode_example(tokenizer, "llama3", "Who is Anna Brook?", "Anna Brook keeps a goat.", 99)
    cut = encode_example(tokenizer, "llama3", "Who is Anna Brook?", "Anna Brook keeps a goat.", 18)
    assert cut == Example(whole.ids[:18], whole.prompt_length)
    with pytest.raises(InputError, match="--max-length"):
        encode_example(tokenizer, "llama3", "Who is Anna Brook?", "x", 12)


def test_padding_value_changes_neither_mask_nor_rows():
    examples = [Example([1, 2, 3, 4, 5], 2), Example([6, 7, 8], 1)]
    a, b = collate(examples, pad=0), collate(examples, pad=9)
    assert torch.equal(a.loss_mask, b.loss_mask) and a.loss_mask.sum() == 3 + 2
    assert a.tokens[1].tolist() == [6, 7, 8, 0] and b.tokens[1].tolist() == [6, 7, 8, 9]


def test_an_unknown_template_in_a_checkpoint_is_an_error(tmp_path):
    (tmp_path / "chat.txt").write_text("klingon\n")
    with pytest.raises(InputError, match="klingon"):
        read_chat(tmp_path)
