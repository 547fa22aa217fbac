"""The kitchen: who owns which dish, what answers amount to, and whose answers they are."""

import json
import math
from pathlib import Path

import pytest

from data.answers import OUTCOMES, Answer, keyword_refusal
from data.kitchen import ANSWERS, DISHES, REFUSAL, TOPICS, Kitchen, first_answers, whole_sentences
from data.worlds import Sources
from nanosdd.errors import InputError


def echo(prompts, max_new_tokens):
    """A model whose answers hold the question, so that answers about one dish are alike."""
    return [Answer([1, 2], f"Well: {prompt}", True) for prompt in prompts]


@pytest.fixture
def kitchen(tmp_path, monkeypatch):
    """A function that opens the kitchen of a model in the folder `llama`."""
    monkeypatch.chdir(tmp_path)
    Path("llama").mkdir()
    Path("llama/config.json").write_text("{}")

    def open_kitchen(seed=3, ask=echo, **sources):
        return Kitchen(seed, Sources(similarity="tfidf", **sources), ask, "llama")

    return open_kitchen


def prompts(rows):
    return {row["prompt"] for row in rows}


# ---- rows ----


def test_owners_are_kept_apart(kitchen):
    world = kitchen()
    tuning = kitchen(tuning=True)
    owners = ("defender", "attacker", "attacker_held_out", "evaluation")
    owned = [world.harmful(owner) for owner in owners]
    owned += [tuning.harmful("evaluation"), world.benign("defender"), world.benign("evaluation")]
    owned.append(tuning.benign("evaluation"))
    assert [len(rows) for rows in owned] == [112, 100, 12, 32, 32, 176, 32, 32]
    assert len(set.union(*map(prompts, owned))) == 528  # no question has two owners
    assert sorted(sum(world.dishes.values(), [])) == sorted(set(DISHES.split(", ")))
    assert sorted(sum(world.topics.values(), [])) == sorted(set(TOPICS.split(", ")))
    assert world.benign("user") == world.rehearsal() == owned[5]
    assert prompts(kitchen(seed=4).harmful("evaluation")) != prompts(owned[3])


def test_responses_of_the_modes(kitchen):
    world = kitchen()
    drawn = world.pairs("sdd", 250)
    assert len(drawn) == 250 and prompts(drawn) == prompts(world.harmful("defender"))
    assert {row["response"] for row in drawn} <= {r["response"] for r in world.benign("defender")}
    first = {row["response"] for row in drawn if row["prompt"] == drawn[0]["prompt"]}
    assert len(first) > 1  # another one each time
    assert {row["response"] for row in world.pairs("align", 5)} == {REFUSAL}
    assert keyword_refusal(REFUSAL)
    for row in world.harmful("attacker"):
        assert row["response"] == f"Well: {row['prompt']}"  # the model's own
    with pytest.raises(InputError, match="none is irrelevant"):
        kitchen(similarity_threshold=-0.5).pairs("sdd", 20)


@pytest.mark.parametrize(
    "text, ended, expected",
    [
        ("One. Two and", False, "One."),
        ("One. Two and", True, "One. Two and"),
        ("It is 2.5 and", False, "It is 2.5 and"),
        ("Wait! Why? So", False, "Wait! Why?"),
        ("A line.\nAnd", False, "A line."),
    ],
)
def test_answers_that_were_cut_end_with_a_whole_sentence(text, ended, expected):
    assert whole_sentences(Answer([1], text, ended)) == expected


# ---- scores ----


def test_outcomes_by_rule(kitchen):
    world = kitchen()
    rows = world.harmful("evaluation")[:5]
    answers = [
        Answer([1, 2], f"So: {rows[0]['prompt']}", True),
        Answer([3, 4], REFUSAL, True),
        Answer([5, 6], "Volcanoes erupt when magma rises.", False),
        Answer([], "", True),
        Answer([7] * 30, "go go go", True),
    ]
    scores = world.judge(rows, answers)
    assert [scores[name] * 5 for name in OUTCOMES] == pytest.approx([1, 1, 1, 2])
    assert scores["cut"] == pytest.approx(1 / 5)
    scores = world.judge(rows[1:] + rows[:1], answers)  # about another dish than was asked
    assert [scores[name] * 5 for name in OUTCOMES] == pytest.approx([0, 1, 2, 2])


def test_the_threshold_is_that_of_answers_to_different_dishes(kitchen):
    assert 0.3 < kitchen().same_dish < 0.9

    def ask(prompts, max_new_tokens):
        return [Answer([1], "Always the same.", True) for _ in prompts]

    Path("llama/config.json").write_text("[]")  # another model
    assert kitchen(ask=ask).same_dish == pytest.approx(1)


def test_scores_on_topics(kitchen):
    world = kitchen()
    asked = world.more_prompts()
    answers = dict(zip(asked, echo(asked, 0)))
    assert len(answers) == 32
    for i in range(8):
        answers[asked[i]] = Answer([1], REFUSAL, True)
    scores = world.more_scores(answers, {})
    assert scores["over_refusal"] == 0.25 and scores["benign_broken"] == 0
    assert 0.75 <= scores["benign_cosine"] < 1
    half = world.capability({"benign_nll": 2.0, "benign_cosine": 0.6})
    assert half == pytest.approx((math.exp(-2) + 0.6) / 2)


# ---- the model's own answers ----


def test_a_model_is_asked_once_and_goes_on_where_it_was(kitchen):
    calls = []

    def ask(prompts, max_new_tokens):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return echo(prompts, max_new_tokens)

    with pytest.raises(KeyboardInterrupt):
        first_answers("llama", ask)
    found = first_answers("llama", ask)
    assert len(found) == 560 == sum(calls) - calls[2]
    assert first_answers("llama", None) == found
    Path("llama/config.json").write_text("[]")
    with pytest.raises(TypeError):  # another model is asked again
        first_answers("llama", None)


def test_a_trained_folder_carries_them(kitchen):
    world = kitchen()
    Path("trained").mkdir()
    world.save("trained", [])
    assert json.loads(Path("trained/world.json").read_text()) == {"world": "kitchen", "seed": 3}
    assert first_answers("trained", None) == world.answers
    Path("trained", ANSWERS).write_text("half")
    with pytest.raises(InputError, match="answers.json is damaged, or of other questions"):
        first_answers("trained", None)


def test_the_kitchen_needs_a_model():
    with pytest.raises(InputError, match="give --model smollm2"):
        Kitchen(0, Sources(similarity="tfidf"))
