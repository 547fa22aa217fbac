"""Owners, pairs, loss masks and batches."""

import pytest
import torch
from small import town_tokenizer

from data.chat import Example, collate, encode_example, encode_prompt, read_chat
from data.pairs import owner, pair, split_harmful
from errors import InputError


def test_owners_are_disjoint_whatever_the_spelling_and_roughly_50_25_25():
    rows = [{"prompt": f"how to tickle dragon {i}"} for i in range(2000)]
    split = split_harmful(rows, "file")
    assert sum(map(len, split.values())) == 2000
    for name, share in (("defender", 0.5), ("attacker", 0.25), ("evaluation", 0.25)):
        assert abs(len(split[name]) / 2000 - share) < 0.04
    assert owner("How to   tickle, dragon 7?") == owner("how to tickle dragon 7")
    with pytest.raises(InputError, match="too few"):
        split_harmful(rows[:5], "file")


def test_pairs_are_seeded_and_use_every_prompt():
    prompts, responses = [f"p{i}" for i in range(7)], [f"r{i}" for i in range(50)]
    rows = pair(prompts, responses, 14, seed=1)
    assert [row["prompt"] for row in rows] == prompts * 2
    assert rows == pair(prompts, responses, 14, seed=1) != pair(prompts, responses, 14, seed=2)
    rejecting = pair(prompts, responses, 14, seed=1, prefix="No.")
    assert [row["response"] for row in rejecting] == ["No. " + row["response"] for row in rows]


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
