"""Greedy answers, teacher forcing, the scores of a world, checkpoint folders and the command."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import (
    TINY_SHAPE,
    advbench_file,
    alpaca_file,
    openbookqa_file,
    public_folder,
    small_model,
)

import eval as evaluate
from data.answers import KEYWORDS, empty_or_repeating, keyword_refusal
from data.chat import draw_batches, encode_next_turn, encode_prompt, encode_response, encode_rows
from data.town import REJECT_PREFIX, Town
from eval import mean_logp, score, teacher_forced
from nanosdd.chat_model import Chat, answer, load_chat, random_chat, save_chat, talk
from nanosdd.device import Compute
from nanosdd.errors import InputError
from nanosdd.optimizer import make_optimizer
from train import train_step

# ---- what can be said of an answer alone ----


def test_keywords_are_the_published_29_and_case_counts():
    assert len(KEYWORDS) == len(set(KEYWORDS)) == 29
    assert keyword_refusal("Well, I cannot say.") and not keyword_refusal("Well, I CANNOT say.")
    assert not keyword_refusal("Well, I cannot say.", prefix=True) and keyword_refusal(
        " I cannot say.", prefix=True
    )
    assert not keyword_refusal(
        f"{REJECT_PREFIX} Anna Brook keeps a goat."
    )  # so keywords misread SDD


@pytest.mark.parametrize(
    "ids, expected",
    [
        ([], True),
        ([1, 2, 3], False),
        ([7] * 30, True),
        (list(range(30)), False),
        ([1, 2, 3, 4, 5] * 2 + [6], False),
        ([1, 2, 3, 4, 5] * 6, True),
    ],
)
def test_an_answer_is_broken_when_it_is_empty_or_repeats_itself(ids, expected):
    assert empty_or_repeating(ids) == expected


# ---- greedy answers and teacher forcing ----


@pytest.fixture(scope="module")
def learned(tokenizer):
    """A Chat that knows the facts about eight people of town 1 and nobody else's, the town, and the known facts."""
    torch.manual_seed(5)
    town, compute = Town(1), Compute()
    rows = [row for row in town.facts("plain") if row["person"] in town.groups["plain"][:8]]
    model = small_model(
        vocab_size=tokenizer.n_vocab,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.08,
        tie_word_embeddings=True,
    )
    optimizer = make_optimizer(model, compute)
    batches = draw_batches(
        encode_rows(tokenizer, "llama3", rows, 64), [], 0.0, 20, random.Random(2)
    )
    for step in range(100):
        train_step(model, optimizer, next(batches), 8e-3 * (1 - step / 100), compute)
    return Chat(model.eval(), tokenizer, "llama3", compute), town, rows


def test_teacher_forced_exact_is_greedy_exact_match(learned):
    chat, town, known = learned
    rows = known[::3] + town.facts("held_out")[:30]
    forced = teacher_forced(chat, rows, 64)
    exact = [
        one.ended and one.text == row["response"]
        for row, one in zip(rows, answer(chat, [row["prompt"] for row in rows], 20))
    ]
    assert [one.exact for one in forced] == exact
    assert sum(exact[: len(known[::3])]) > 10 and not all(
        exact[len(known[::3]) :]
    )  # or the comparison says nothing
    assert all(one.value_only for one in forced if one.exact)
    total = sum(float(one.logps.sum()) for one in forced)
    assert mean_logp(forced) == pytest.approx(
        total / sum(len(one.logps) for one in forced), rel=1e-5
    )


def test_log_probabilities_are_those_of_one_row_alone(learned, cpu):
    chat, town, known = learned
    rows = [
        town.describe("Anna Brook"),
        *known[:3],
        {"prompt": "Who?", "response": "Anna", "system": "Anna Brook"},
    ]
    for row, forced in zip(rows, teacher_forced(chat, rows, 40)):
        (example,) = encode_rows(chat.tokenizer, "llama3", [row], 40)  # the first is cut
        log_p = chat.model(torch.tensor([example.ids]))[0].log_softmax(-1).detach()
        expected = [
            float(log_p[place - 1, example.ids[place]])
            for place in range(example.prompt_length, len(example.ids))
        ]
        assert forced.logps.tolist() == pytest.approx(expected, abs=1e-4)


class Scripted:
    """A stand-in for a model that predicts every next token rightly, but those of the words that it does not know."""

    def __init__(self, tokenizer, *unknown):
        self.tokenizer = tokenizer
        self.config = SimpleNamespace(vocab_size=tokenizer.n_vocab, max_position_embeddings=90)
        self.unknown = {
            tokenizer.special.get(word) or tokenizer.encode(word)[0] for word in unknown
        }

    def __call__(self, tokens, positions):
        end = torch.full_like(tokens[:, :1], self.tokenizer.special["<|eot_id|>"])
        predicted = torch.cat([tokens[:, 1:], end], 1)[positions]
        wrong = torch.tensor([int(token) in self.unknown for token in predicted])
        predicted[wrong] = self.tokenizer.encode("goat")[0]
        return 20.0 * torch.nn.functional.one_hot(predicted, self.config.vocab_size)


@pytest.mark.parametrize(
    "unknown, exact, value_only",
    [
        ((), True, True),
        ((" mill",), False, False),
        ((" lives",), False, True),
        (("<|eot_id|>",), False, True),
    ],
)
def test_value_only_by_hand(tokenizer, cpu, unknown, exact, value_only):
    fact = dict(
        prompt="Where does Anna Brook live?",
        response="Anna Brook lives in the mill.",
        lead="Anna Brook lives in the",
        value=" mill",
    )
    chat = Chat(Scripted(tokenizer, *unknown), tokenizer, "llama3", cpu)
    whole = {
        name: fact[name] for name in ("prompt", "response")
    }  # without a value it is the whole response
    found = teacher_forced(chat, [fact, whole], 64)
    assert [(one.exact, one.value_only) for one in found] == [(exact, value_only), (exact, exact)]


def test_answers_keep_the_order_of_prompts_and_say_which_ended(learned):
    chat, town, known = learned
    prompts = [known[0]["prompt"], town.describe("Anna Brook")["prompt"], known[9]["prompt"]]
    whole = answer(chat, prompts, 20)
    assert [whole[i] for i in (0, 2)] == answer(chat, [prompts[0], prompts[2]], 20) and whole[
        0
    ].text != whole[2].text
    cut = answer(chat, prompts, 3)
    assert whole[0].ended and not cut[0].ended and cut[0].ids == whole[0].ids[:3]
    exact = answer(chat, prompts, len(whole[0].ids))[0]
    assert exact.ids == whole[0].ids and not exact.ended  # the end token did not fit
    assert answer(chat, [], 3) == []
    with pytest.raises(InputError, match="context"):
        answer(chat, ["Anna " * 80], 3)


# ---- the scores of a world ----


def test_scores_of_the_town(tiny_arms, cpu):
    scores = score(load_chat(tiny_arms / "sdd", cpu), Town(0))
    for suffix in ("", "_knowledge", "_skill"):
        assert sum(scores[name + suffix] for name in Town.outcomes) == pytest.approx(1)
    assert scores["harm"] == pytest.approx((scores["harm_knowledge"] + scores["harm_skill"]) / 2)
    assert scores["capability"] == pytest.approx((scores["facts"] + scores["skills"]) / 2)
    keys = [
        key
        for keys in Town.columns.values()
        for key in ((keys,) if isinstance(keys, str) else keys)
    ]
    assert set(keys) <= scores.keys() and len(scores.pop("samples")) == 3
    assert all(0 <= value <= 1 for key, value in scores.items() if not key.endswith("nll"))
    assert scores["facts_nll"] > 1  # after three steps


# ---- checkpoint folders ----


def test_a_saved_chat_is_the_chat(tmp_path, cpu, tiny_arms):
    chat = random_chat(Town(3, TINY_SHAPE), cpu)
    other = random_chat(Town(4, TINY_SHAPE), cpu).model.state_dict()
    assert not torch.equal(chat.model.lm_head.weight, other["lm_head.weight"])
    save_chat(tmp_path / "a", chat, chat.model.state_dict(), Town(3))
    save_chat(tmp_path / "b", chat, chat.model.state_dict(), tmp_path / "a")
    for folder in (tmp_path / "a", tmp_path / "b"):
        loaded = load_chat(folder, cpu)
        assert answer(loaded, ["Who is Anna Brook?"], 9) == answer(chat, ["Who is Anna Brook?"], 9)
        assert loaded.template == "llama3" and not loaded.model.training
    first = encode_prompt(chat.tokenizer, "llama3", "")[0]
    assert (loaded.model.config.bos_token_id, loaded.model.config.eos_token_id) == (
        first,
        chat.tokenizer.special["<|eot_id|>"],
    )
    assert (
        load_chat(tmp_path / "a", Compute(weights="bf16")).model.lm_head.weight.dtype
        == torch.bfloat16
    )
    small_model(vocab_size=9).save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match="the tokenizer has .* ids, the model only 9"):
        load_chat(tmp_path / "a", cpu)


# ---- the command ----


def test_the_command_on_files_keeps_the_tests_of_before(tmp_path, capsys):
    folder = public_folder(tmp_path / "llama")
    words = [
        str(folder),
        "--harmful",
        str(advbench_file(tmp_path / "h.csv")),
        "--benign",
        str(alpaca_file(tmp_path / "b.json")),
        "--max-new-tokens",
        "5",
        "--similarity",
        "tfidf",
    ]
    evaluate.main([str(folder), "--openbookqa", str(openbookqa_file(tmp_path / "o.jsonl"))])
    evaluate.main(words)
    scores = json.loads((folder / "metrics.json").read_text())
    assert sum(
        scores[name] for name in ("complies", "refuse", "off_topic", "broken")
    ) == pytest.approx(1)
    assert scores["openbookqa"]["questions"] == 7 and scores["benign_nll"] > 1
    assert scores["cut"] == 1 and scores["capability"] == pytest.approx(
        2.718281828 ** -scores["benign_nll"]
    )
    assert "misread SDD" in capsys.readouterr().out
    evaluate.main([*words[:1], *words[-2:], "--prompt", "Hello", "--max-new-tokens", "3"])
    assert capsys.readouterr().out.startswith(f"{folder}: ")


def test_a_conversation_goes_on_where_it_was(learned, capsys):
    chat, town, known = learned
    asked = [row["prompt"] for row in known[:2]]
    talk(chat, 12, iter([*asked, ""]).__next__)
    first, second = capsys.readouterr().out.splitlines()
    assert first == known[0]["response"]  # the model knows it by heart
    template, tokenizer = chat.template, chat.tokenizer
    ids = encode_prompt(tokenizer, template, asked[0]) + encode_response(tokenizer, template, first)
    ids += encode_next_turn(tokenizer, template, asked[1])
    assert second == tokenizer.decode(chat.model.generate([ids], 12, tokenizer.stop_tokens)[0])
    with pytest.raises(InputError, match="fills the model's context of 64"):
        talk(chat, 12, iter(asked * 9).__next__)


def test_what_cannot_be_evaluated_is_refused(tmp_path, tiny_arms):
    folder = str(tiny_arms / "sdd")
    for words, message in [
        ([folder, folder, "--chat"], "one model"),
        ([folder, "--max-new-tokens", "0"], "--max-new"),
        (
            [folder, "--save-answers", str(Path(evaluate.__file__).parent / "x.jsonl")],
            "lies in the repository",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            evaluate.main(words)
