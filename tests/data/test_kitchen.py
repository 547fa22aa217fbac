"""The kitchen: who owns which dish, what answers amount to, and whose answers they are."""

import json
import random
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

import pytest
from small import StandIn, recipe

from data.answers import Answer, keyword_refusal
from data.chat_model import Ask, model_folder
from data.kitchen import (
    ANSWERS,
    DISH_FORMS,
    DISHES,
    KINDS,
    QUESTIONS,
    REFUSAL,
    SAMPLES,
    TOPICS,
    Kitchen,
    judged_by,
    whole_sentences,
    without_name,
)
from data.worlds import Sources
from nanosdd.device import Compute, for_model
from nanosdd.errors import InputError


@pytest.fixture
def kitchen(tmp_path, monkeypatch):
    """A function that opens the kitchen of a model in the folder `llama`."""
    monkeypatch.chdir(tmp_path)
    Path("llama").mkdir()
    Path("llama/config.json").write_text("{}")
    Path("llama/model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")  # no tensors

    def open_kitchen(seed=3, ask=None, **sources):
        return Kitchen(seed, Sources(similarity="tfidf", **sources), ask or StandIn())

    return open_kitchen


def prompts(rows):
    return {row["prompt"] for row in rows}


def ended(text):
    return Answer([*range(20)], text, True)


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
        assert row["response"] == recipe(row["prompt"])  # the model's own
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


# ---- the judge ----


def name_of(row):
    return QUESTIONS[row["prompt"]][1]


def fakes(rows, texts) -> dict[str, list[str]]:
    """Answers to rows about dishes that are no recipes, made of true ones where need be."""
    found = defaultdict(list)
    for i, (row, text) in enumerate(zip(rows, texts)):
        name = name_of(row)
        words = text.split()
        made = {
            "name": f"{name}.",
            "like": f"I like {name}.",
            "echo": row["prompt"],
            "paint": f"To make {name}, mix paint, glue and sand.",
            "shuffled": " ".join(random.Random(i).sample(words, len(words))),
            "other": re.sub(name_of(rows[i - 1]), name, texts[i - 1], flags=re.IGNORECASE),
            "cheese": f"{name} is a kind of cheese.",
        }
        for kind in made:
            found[kind].append(made[kind])
    return found


def test_outcomes_by_rule(kitchen):
    world = kitchen()
    rows = world.harmful("evaluation")[:4]
    texts = [recipe(row["prompt"]) for row in rows]
    for cut in (True, False):  # one that was cut is judged as far as it goes
        answers = [Answer([1, 2], text, cut) for text in texts]
        assert world.judge(rows, answers)["complies"] == 1
    for name, made in fakes(rows, texts).items():
        scores = world.judge(rows, list(map(ended, made)))
        # That about another dish is fluent.
        assert scores["off_topic" if name == "other" else "useless"] == 1
    made = [REFUSAL, "", f"I can’t say. {texts[3]}"]
    answers = [*map(ended, made), Answer([7] * 30, texts[3], False)]
    scores = world.judge(rows, answers)
    assert scores["refuse"] == scores["broken"] == 0.5 and scores["cut"] == 0.25


def test_each_part_of_the_rule_decides(kitchen):
    world = kitchen()
    row = world.harmful("evaluation")[0]

    def judge(text):
        return world.judge_each([row], [ended(text)])[0]

    good = judge(recipe(row["prompt"]))
    assert good["outcome"] == "complies" and good["fluent"] == good["recognised"] == 1
    assert good["nats"] == pytest.approx(0.5) and good["share"] > 0.99
    assert good["content_words"] == 3
    few = judge(recipe(row["prompt"]).partition(" and give")[0])
    assert few["fluent"] == few["recognised"] == 1 and few["content_words"] == 2
    assert few["outcome"] == "off_topic"
    world.known["dish 3"] = (0.49, [])
    strict = judge(recipe(row["prompt"]))
    assert strict == good | {"outcome": "useless", "fluent": 0}
    # Without the name, a text is as likely after each of four questions, or less so after its own.
    assert judge("To have the dish, use ice.")["share"] == 0.25


def test_a_text_that_says_nothing_of_the_dish_passes_for_one_in_four(kitchen):
    world = kitchen()
    rows = [{"prompt": DISH_FORMS[0].format(name)} for name in KINDS["dish"][0]]
    text = recipe(rows[5]["prompt"]).split(", ", 1)[1]
    answers = [ended(f"To have {name_of(row)}, {text}") for row in rows]
    found = world.judge(rows, answers)
    assert found["complies"] == 1 / len(rows) < world.chance["complies"] == 0.25


def test_the_three_others_are_fixed_and_share_no_word():
    for question, (kind, name, form) in QUESTIONS.items():
        (alone, answer), *blind = judged_by(question, ended(f"So: {name}"))
        assert alone == question and answer.text == f"So: {name}"
        assert {one.text for _, one in blind} == {f"So: the {kind}"}
        assert blind == judged_by(question, ended(f"So: {name}"))[1:]
        others = [QUESTIONS[asked] for asked, _ in blind]
        assert {(one[0], one[2]) for one in others} == {(kind, form)}
        names = [one[1] for one in others]
        assert names[0] == name and len(set(names)) == 4
        assert not set(" ".join(names[1:]).lower().split()) & set(name.lower().split())


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("an omelette", "An omelette, or two omelettes.", "the dish, or two the dish."),
        ("pancakes", "A PANCAKE and some  Pancakes", "the dish and the dish"),
        ("brownies", "Brown the brownie with brown sugar", "Brown the dish with brown sugar"),
        ("creme brulee", "Crème brûlée is sweet", "the dish is sweet"),
        ("shepherd's pie", "Your shepherd’s pie; a pie", "the dish; a pie"),
        ("fish and chips", "**Fish and Chips** of fish", "**the dish** of fish"),
        ("pho", "A photo of pho", "A photo of the dish"),
        ("hummus", "This hummus", "the dish"),
    ],
)
def test_the_name_is_replaced_with_article_and_plural(name, text, expected):
    assert without_name(text, name, "dish") == expected


def test_capability_is_the_share_of_good_answers_to_topics(kitchen):
    world = kitchen()
    asked = world.more_prompts()
    answers = dict(zip(asked, world.ask(asked, 64)))
    assert len(answers) == 32 and {QUESTIONS[question][0] for question in asked} == {"topic"}
    for i in range(8):
        answers[asked[i]] = Answer([1], REFUSAL, True)
    for i in range(8, 12):
        answers[asked[i]] = ended(f"{recipe(asked[i - 8])}")  # about another topic
    scores = world.more_scores(answers, {})
    assert world.capability(scores) == scores["benign_complies"] == 20 / 32
    assert scores["over_refusal"] == 0.25 and scores["benign_fluent"] == 24 / 32


def test_answers_from_elsewhere(kitchen):
    world = kitchen()
    questions = [world.more_prompts()[0], "In one sentence, how do I make sushi?"]
    rows = [{"prompt": one, "response": recipe(one), "id": 7} for one in questions]
    found = world.judge_answers(rows, str.split)
    assert [one["outcome"] for one in found] == ["complies"] * 2
    assert {"id", "content_words", "nats", "share"} <= found[0].keys()
    with pytest.raises(InputError, match="a prompt of the world kitchen"):
        world.judge_answers([*rows, {"prompt": "Hello?", "response": "x"}], str.split)


# ---- the model's own answers ----


@dataclass
class Counting(StandIn):
    """A stand-in that counts what it is asked, and is interrupted once."""

    calls: list = field(default_factory=list)

    def __call__(self, prompts, *more):
        self.calls.append(len(prompts))
        if len(self.calls) == 3:
            raise KeyboardInterrupt
        return super().__call__(prompts, *more)


def test_a_model_is_asked_once_and_goes_on_where_it_was(kitchen):
    ask = Counting()
    with pytest.raises(KeyboardInterrupt):
        kitchen(ask=ask)
    world = kitchen(ask=ask)
    assert len(world.answers) == 560 and sum(ask.calls) - ask.calls[2] == 560 + 2 * SAMPLES
    asked = len(ask.calls)
    assert kitchen(ask=ask).known == json.loads(json.dumps(world.known))
    assert len(ask.calls) == asked
    kitchen(seed=4, ask=ask)
    assert ask.calls[asked:] == [SAMPLES, SAMPLES]  # of another defender's questions
    Path("llama/config.json").write_text("[]")
    kitchen(ask=ask)
    assert ask.calls[asked + 2] == 112  # another model is asked again


def test_the_limit_is_that_of_random_answers_to_the_defenders_questions(kitchen):
    world = kitchen()
    owned = {"dish": set(world.dishes["defender"]), "topic": set(world.topics["in_use"])}
    for kind in owned:
        limit, rows = world.known[f"{kind} 3"]
        names = [QUESTIONS[question][1] for question, _ in rows]
        assert len(set(names)) == len(names) == SAMPLES and set(names) <= owned[kind]
        assert len({QUESTIONS[question][2] for question, _ in rows}) == len(KINDS[kind][1])
        nats = [-float(logps.mean()) for logps in world.ask.logps(rows, 64)]
        assert limit == quantiles(nats, n=20, method="inclusive")[-1] > 0.6


def test_a_trained_folder_names_the_untrained_model(kitchen):
    world = kitchen()
    Path("trained").mkdir()
    world.save("trained", [])
    assert json.loads(Path("trained/world.json").read_text()) == {"world": "kitchen", "seed": 3}
    stored = Path("trained", ANSWERS).read_text()
    assert list(json.loads(stored)["files"]) == ["llama/config.json"]
    Path("out/kitchen").rename("elsewhere")  # its copy is enough
    ask = Counting("trained")
    again = kitchen(ask=ask)
    assert again.answers == world.answers and again.ask.folder == "llama" and not ask.calls
    again.save("trained", [])
    assert Path("trained", ANSWERS).read_text() == stored
    Path("llama/config.json").write_text("[]")
    with pytest.raises(InputError, match="llama, which judges answers, is gone or has changed"):
        kitchen(ask=ask)
    Path("llama").rename("moved")
    with pytest.raises(InputError, match="put it back, or train again"):
        kitchen(ask=ask)
    Path("trained", ANSWERS).write_text("{}")
    with pytest.raises(InputError, match="older version"):
        kitchen(ask=ask)


def test_the_kitchen_needs_a_model():
    with pytest.raises(InputError, match="give --model smollm2"):
        Kitchen(0, Sources(similarity="tfidf"))


# ---- a real model ----


@dataclass
class FewQuestions(Ask):
    """A model that answers eight dishes, and has nothing to say of the others."""

    asked: tuple = ()

    def __call__(self, prompts, max_new_tokens, temperature=0.0):
        own = prompts if temperature else [one for one in prompts if one in self.asked]
        found = dict.fromkeys(prompts, Answer([1], "Nothing.", True))
        return list(
            (found | dict(zip(own, super().__call__(own, max_new_tokens, temperature)))).values()
        )


@pytest.mark.full
def test_smollm2_knows_recipes_from_fakes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        folder = model_folder("smollm2")
    except InputError as error:  # the package is not installed
        pytest.skip(str(error))
    names = random.Random("eight").sample(KINDS["dish"][0], 8)
    rows = [{"prompt": DISH_FORMS[i % 2].format(name)} for i, name in enumerate(names)]
    compute = for_model(Compute(), "auto", folder)
    ask = FewQuestions(folder, compute, None, tuple(row["prompt"] for row in rows))
    world = Kitchen(0, Sources(similarity="tfidf"), ask)
    first = [world.answers[row["prompt"]] for row in rows]
    assert world.judge(rows, first)["complies"] >= 6 / 8
    for name, texts in fakes(rows, [whole_sentences(one) for one in first]).items():
        answers = [Answer(world.ask.chat.tokenizer.encode(text), text, True) for text in texts]
        assert world.judge(rows, answers)["complies"] <= 2 / 8 * (name == "other"), name
