"""Greedy answers, teacher forcing, the scores of a world, checkpoint folders and the command."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from small import (
    advbench_file,
    alpaca_file,
    mmlu_folder,
    openbookqa_file,
    public_folder,
    small_model,
    tiny_town,
)

import eval as evaluate
from data.answers import Answer
from data.chat import draw_batches, encode_next_turn, encode_prompt, encode_response, encode_rows
from data.chat_model import (
    Ask,
    Chat,
    Forced,
    answer,
    load_chat,
    mean_logp,
    new_chat,
    save_chat,
    talk,
    teacher_forced,
)
from data.sources import read_records
from data.town import Town
from nanosdd.device import Compute
from nanosdd.errors import InputError
from nanosdd.optimizer import make_optimizer
from train import train_step

# ---- greedy answers and teacher forcing ----

TOWN = Town(1)
KNOWN = TOWN.facts("plain")[:40]


@pytest.fixture(scope="module")
def learned(tokenizer):
    """A Chat that knows the facts about eight people and nobody else's."""
    torch.manual_seed(5)
    compute = Compute()
    changes = {"rms_norm_eps": 1e-5, "initializer_range": 0.08, "tie_word_embeddings": True}
    model = small_model(vocab_size=tokenizer.n_vocab, max_position_embeddings=64, **changes)
    optimizer = make_optimizer(model, compute)
    examples = encode_rows(tokenizer, "llama3", KNOWN, 64)
    batches = draw_batches(examples, [], 0.0, 20, random.Random(2))
    for step in range(100):
        train_step(model, optimizer, next(batches), 8e-3 * (1 - step / 100), compute)
    return Chat(model.eval(), tokenizer, "llama3", compute)


def test_teacher_forcing_is_the_plain_forward_and_exact_is_a_greedy_match(learned):
    rows = KNOWN[::3] + TOWN.facts("held_out")[:30] + [KNOWN[0] | {"system": "Anna Brook"}]
    examples = encode_rows(learned.tokenizer, "llama3", rows, 64)
    forced = teacher_forced(learned, examples)
    for example, one in zip(examples, forced, strict=True):
        log_p = learned.model(torch.tensor([example.ids]))[0].log_softmax(-1).detach()  # (T,V)
        expected = []
        for place in range(example.prompt_length, len(example.ids)):
            expected.append(float(log_p[place - 1, example.ids[place]]))
        assert one.logps.tolist() == pytest.approx(expected, abs=1e-4)
    answers = answer(learned, [row["prompt"] for row in rows[:-1]], 20)
    exact = [one.text == row["response"] and one.ended for row, one in zip(rows, answers)]
    assert [one.exact for one in forced[:-1]] == exact
    assert 10 < sum(exact) < 40  # or the comparison says nothing
    total = sum(float(one.logps.sum()) for one in forced)
    tokens = sum(example.response_length for example in examples)
    assert mean_logp(forced) == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("wrong, value_only", [(None, 1), (1, 1), (5, 0), (-1, 1)])
def test_value_only_by_hand(tokenizer, wrong, value_only):
    """The value is the sixth of eight tokens, before the full stop and the end."""
    row = {"response": "Anna Brook lives in the mill.", "lead": "Anna Brook lives in the"}
    hits = torch.ones(8, dtype=torch.bool)
    if wrong is not None:
        hits[wrong] = False
    forced = Forced(hits, torch.zeros(8))
    assert forced.exact == (wrong is None)
    assert evaluate.value_right(tokenizer, row | {"value": " mill"}, forced) == value_only
    assert evaluate.value_right(tokenizer, row, forced) == forced.exact


def test_answers_keep_the_order_of_prompts_and_say_which_ended(learned):
    prompts = [KNOWN[0]["prompt"], "Describe Anna Brook.", KNOWN[9]["prompt"]]
    whole = answer(learned, [*prompts, prompts[0]], 20)
    assert whole[3] == whole[0] != whole[2]
    assert [whole[2], whole[0]] == answer(learned, [prompts[2], prompts[0]], 20)
    cut = answer(learned, prompts, 3)[0]
    assert whole[0].ended and not cut.ended and cut.ids == whole[0].ids[:3]
    exact = answer(learned, prompts, len(whole[0].ids))[0]
    assert exact.ids == whole[0].ids and not exact.ended  # the end token did not fit
    assert answer(learned, [], 3) == []
    with pytest.raises(InputError, match="context"):
        answer(learned, ["Anna " * 80], 3)


# ---- what a world asks a model ----


def test_likelihoods_of_answers_count_the_end_only_where_there_was_one(tmp_path, cpu):
    ask = Ask(public_folder(tmp_path / "llama"), cpu, None)
    for text in ("Anna Brook lives in the mill.", "Anna Brook likes", "", "Anna " * 90):
        pair = {"prompt": "Who is Anna Brook?", "response": text}
        examples = encode_rows(ask.chat.tokenizer, "llama3", [pair], 60)
        expected = teacher_forced(ask.chat, examples)[0].logps.tolist()
        rows = [(pair["prompt"], Answer([], text, ended)) for ended in (True, False)]
        whole, cut = [logps.tolist() for logps in ask.logps(rows, 60)]
        assert whole == pytest.approx(expected, abs=1e-4)
        assert cut == pytest.approx(expected[:-1] or expected, abs=1e-4)  # never nothing at all


def test_random_answers_are_draws_of_the_softmax(tmp_path, cpu):
    ask = Ask(public_folder(tmp_path / "llama"), cpu, None)
    model = ask.chat.model
    # The same logits whatever the prompt, and of three tokens alone.
    model.model.embed_tokens.weight.data[:] = model.model.embed_tokens.weight[5].clone()
    with torch.no_grad():
        ids = model(torch.tensor([[1]]))[0, 0].topk(3).indices
        rows = model.lm_head.weight[ids]
        model.lm_head.weight.zero_()[ids] = rows
        p = (model(torch.tensor([[1]]))[0, 0] / 0.7).softmax(-1)
    prompts = [f"Anna {'Brook ' * (i % 9)}{'mill ' * (i // 9)}" for i in range(450)]
    drawn = ask(prompts, 1, temperature=0.7)
    assert drawn == ask(prompts, 1, temperature=0.7)  # the same ones each time
    for i in ids.tolist():
        share = sum(one.ids == [i] for one in drawn) / 450
        assert share == pytest.approx(float(p[i]), abs=4 * float(p[i] * (1 - p[i]) / 450) ** 0.5)
    assert {one.ids[0] for one in ask(prompts[:5], 1)} == {int(ids[0])}  # nothing is left behind


def test_a_conversation_goes_on_where_it_was(learned, capsys):
    asked = [row["prompt"] for row in KNOWN[:2]]
    talk(learned, 12, iter([*asked, ""]).__next__)
    first, second = capsys.readouterr().out.splitlines()
    assert first == KNOWN[0]["response"]  # the model knows it by heart
    tokenizer = learned.tokenizer
    ids = encode_prompt(tokenizer, "llama3", asked[0]) + encode_response(tokenizer, "llama3", first)
    ids += encode_next_turn(tokenizer, "llama3", asked[1])
    (reply,) = learned.model.generate([ids], 12, tokenizer.stop_tokens)
    assert second == tokenizer.decode(reply)


# ---- scores and folders ----


def test_scores_of_the_town(tiny_arms, cpu, tmp_path):
    town = tiny_town(tmp_path)
    chat = load_chat(tiny_arms / "sdd", cpu)
    prompts = evaluate.scored_prompts(town)
    scores = evaluate.score(chat, town, dict(zip(prompts, answer(chat, prompts, 9))))
    rows = town.facts("held_out")
    forced = teacher_forced(chat, encode_rows(chat.tokenizer, chat.template, rows, 128))
    assert scores["facts_nll"] == pytest.approx(-mean_logp(forced)) and scores["facts_nll"] > 1
    assert scores["capability"] == pytest.approx((scores["facts"] + scores["skills"]) / 2)
    for keys in town.columns.values():
        for key in keys:
            assert 0 <= scores[key] <= 1


def test_a_saved_chat_is_the_chat(tmp_path, cpu):
    chat = new_chat(tiny_town(None, seed=3), cpu)
    other = new_chat(tiny_town(None, seed=4), cpu)
    assert not torch.equal(chat.model.lm_head.weight, other.model.lm_head.weight)
    save_chat(tmp_path, chat, chat.model.state_dict())
    loaded = load_chat(tmp_path, cpu)
    assert answer(loaded, ["Who is Anna Brook?"], 9) == answer(chat, ["Who is Anna Brook?"], 9)
    assert loaded.template == "llama3" and not loaded.model.training
    assert loaded.tokenizer.files == chat.tokenizer.files
    config = loaded.model.config
    assert config.bos_token_id == encode_prompt(chat.tokenizer, "llama3", "")[0]
    assert config.eos_token_id == chat.tokenizer.special["<|eot_id|>"]
    small_model(vocab_size=9).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the tokenizer has .* ids, the model only 9"):
        load_chat(tmp_path, cpu)


# ---- the command ----


def test_the_command_adds_scores_to_what_was_measured_before(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    public_folder(tmp_path / "llama", context=512)
    mmlu_folder(tmp_path / "mmlu")
    openbookqa_file(tmp_path / "o.jsonl")
    advbench_file(tmp_path / "h.csv")
    alpaca_file(tmp_path / "b.json")
    xstest = Path(__file__).parent.parent / "fixtures/sources/xstest.csv"
    words = "llama --mmlu mmlu --mmlu-shots 1 --openbookqa o.jsonl --xstest".split()
    evaluate.main([*words, str(xstest)])
    assert "OpenBookQA" in capsys.readouterr().out
    words = "llama --harmful h.csv --benign b.json --similarity tfidf --max-new-tokens 5"
    evaluate.main(f"{words} --save-answers answers.jsonl".split())
    assert "misread SDD" in capsys.readouterr().out
    scores = json.loads(Path("llama/metrics.json").read_text())
    assert scores["openbookqa"]["questions"] == 7 and scores["mmlu"]["questions"] == 6
    assert "xstest_unsafe" in scores and scores["cut"] == 1
    shares = [scores[name] for name in ("complies", "refuse", "off_topic", "broken")]
    assert sum(shares) == pytest.approx(1)
    assert scores["capability"] == pytest.approx(2.718281828 ** -scores["benign_nll"])
    saved = read_records("answers.jsonl")
    assert {tuple(row) for row in saved} == {("model", "prompt", "response")}
    evaluate.main("llama --prompt Hello --max-new-tokens 3".split())
    assert capsys.readouterr().out.startswith("llama: ")
    inside = Path(evaluate.__file__).parent / "x.jsonl"
    for file, message in (("answers.jsonl", "exists"), (inside, "lies in the repository")):
        with pytest.raises(InputError, match=message):
            evaluate.main([*words.split(), "--save-answers", str(file)])


def test_scores_that_cannot_be_saved_are_printed_and_the_error_comes_last(
    tiny_arms, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        shutil.copytree(tiny_arms / "sdd", tmp_path / name)
    Path("one/metrics.json").mkdir()  # nothing can take its place
    with pytest.raises(OSError, match="metrics.json"):
        evaluate.main(["one", "two"])
    printed = capsys.readouterr().out
    assert "\none " in printed and "\ntwo " in printed
    assert json.loads(Path("two/metrics.json").read_text())["facts_nll"] > 0


def test_beside_exams_a_world_is_scored_where_a_flag_asks_for_it(
    tiny_arms, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_arms / "sdd", tmp_path / "sdd")
    exam = openbookqa_file(tmp_path / "o.jsonl")
    evaluate.main(["sdd", "--openbookqa", str(exam)])
    assert "facts" not in capsys.readouterr().out
    evaluate.main(["sdd", "--openbookqa", str(exam), "--save-answers", "answers.jsonl"])
    assert "facts" in capsys.readouterr().out and Path("answers.jsonl").read_text()
