"""Which world a command opens, what a folder says of its own, and what a new world gets."""

import random

import pytest

from data.answers import Answer, keyword_refusal
from data.chat_model import Ask
from data.files import Files
from data.town import Town
from data.worlds import REJECT_PREFIX, Sources, World, irrelevant_pairs, open_world
from nanosdd.device import Compute
from nanosdd.errors import InputError
from train import settings_of


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint folder `mine` of the town of seed 3, `theirs` from elsewhere, `trained` on
    files, and h.csv."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "theirs", "trained"):
        (tmp_path / name).mkdir()
    Town(3).save("mine", [])
    (tmp_path / "trained/chat.txt").write_text("llama3\n")
    (tmp_path / "h.csv").write_text("goal,target\n")
    return tmp_path


def ask(folder):
    return Ask(folder, Compute(), None)


@pytest.mark.parametrize(
    "name, seed, harmful, model, kind",
    [(None, 5, None, None, Town), (None, 3, None, "mine", Town), (None, 9, "h.csv", "mine", Files)],
)
def test_the_world_is_that_of_the_files_else_of_the_folder(
    folder, name, seed, harmful, model, kind
):
    similarity = "tfidf" if harmful else Sources.similarity
    world = open_world(name, seed, Sources(harmful, similarity=similarity), ask(model))
    assert type(world) is kind and world.seed == seed


@pytest.mark.parametrize(
    "name, harmful, model, message",
    [
        (None, None, "mine", "mine knows the town of --seed 3, not of --seed 4"),
        (None, None, "trained", "trained was trained on files"),
        (None, None, "gone", "gone is not a folder"),
        ("town", "h.csv", None, "the world town has no use for --harmful"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, name, harmful, model, message):
    with pytest.raises(InputError, match=message):
        open_world(name, 4, Sources(harmful), ask(model))


@pytest.mark.parametrize("text", ["", "[]", '{"world": "town"}'])
def test_a_damaged_note_of_the_world_is_refused(folder, text):
    (folder / "mine/world.json").write_text(text)
    with pytest.raises(InputError, match="world.json"):
        open_world(None, 3, Sources(), ask("mine"))


def test_a_file_does_not_say_what_code_is_loaded(folder):
    (folder / "mine/world.json").write_text('{"world": "os.path", "seed": 3}')
    with pytest.raises(InputError, match="world of your own"):
        open_world(None, 3, Sources(), ask("mine"))
    with pytest.raises(InputError, match="moon is none of town, kitchen, files"):
        open_world("moon", 3, Sources(), ask(None))


class Cupboard(World):
    """A world of ten rows: locked boxes and colours."""

    def harmful(self, owner):
        rows = [{"prompt": f"Open {i}.", "response": f"In it is {i}."} for i in range(5)]
        return rows[:3] if owner == "defender" else rows[3:]

    def benign(self, owner):
        words = "red wine, sea so very blue, hill of the green, grey sky, pink rose".split(", ")
        rows = [{"prompt": word, "response": f"It is a {word}."} for word in words]
        return rows[3:] if owner == "evaluation" else rows[:3]

    def is_irrelevant(self, harmful, benign):
        return ["wine" not in row["prompt"] for row in benign]


def test_pairs_of_every_mode():
    world = Cupboard(2)
    modes = "sdd constant sdd_reject shuffled align new_refusal".split()
    found = {}
    for mode in modes:
        found[mode] = [row["response"] for row in world.pairs(mode, 7)]
    drawn = found["sdd"]
    assert [row["prompt"] for row in world.pairs("sdd", 7)] == ["Open 0.", "Open 1.", "Open 2."]
    assert set(drawn) <= {"It is a sea so very blue.", "It is a hill of the green."}
    assert found["constant"] == drawn[:1] * 3
    assert found["sdd_reject"] == [f"{REJECT_PREFIX} {text}" for text in drawn]
    for text, shuffled in zip(drawn, found["shuffled"], strict=True):
        assert text != shuffled and sorted(text.split()) == sorted(shuffled.split())
    assert found["align"] == [*World.refusals] * 3
    assert found["new_refusal"] == [World.new_refusal] * 3 and keyword_refusal(World.new_refusal)


def test_a_control_is_in_the_dose_of_the_worlds_own_sdd():
    world = Cupboard(2)
    world.settings = {"sdd": {"steps": 9}, "benign": {"steps": 8}}
    found = [settings_of(world, mode).steps for mode in ("sdd", "new_refusal", "align", "benign")]
    assert found == [9, 9, 30, 8]


def test_scores_without_a_judge_of_its_own():
    world = Cupboard(2)
    texts = ["In it is 3.", "I cannot help with that.", "A rose.", "go go"]
    answers = [Answer([4] * 20, text, True) for text in texts]
    answers[2] = Answer([1, 2], texts[2], True)
    found = world.judge(world.harmful("evaluation") * 2, answers)
    assert found == dict.fromkeys(world.outcomes, 0.25) | {"cut": 0}
    assert world.capability({"benign_nll": 0.0}) == 1 and world.capability({}) == 0
    world.outcomes = ("told", "refuse", "off_topic", "broken")
    with pytest.raises(InputError, match="outcomes of .* lack one of .*harm"):
        world.judge(world.harmful("evaluation") * 2, answers)


def test_answers_from_elsewhere_are_judged():
    rows = [
        {"prompt": "Open 0.", "response": "In it is 0.", "from": "me"},  # a defender's prompt
        {"prompt": "Open 3.", "response": "I can’t help with that."},
        {"prompt": "Open 3.", "response": "In it is 0."},
        {"prompt": "Open 3.", "response": ""},
    ]
    world = Cupboard(2)
    kinds = ["harm", "refuse", "off_topic", "broken"]
    expected = [row | {"outcome": kind} for row, kind in zip(rows, kinds)]
    assert world.judge_answers(rows, list) == expected
    for bad in ({"prompt": "Hi", "response": "x"}, {"prompt": "Open 3."}, {"prompt": []}, 3):
        with pytest.raises(InputError, match="a row needs a response, and a prompt of the world w"):
            world.judge_answers([*rows, bad], list)


def test_a_prompt_to_which_nothing_is_irrelevant_is_named():
    def fits(harmful, benign):
        return [row["prompt"] != "hard" for row in harmful]

    rows = [{"prompt": "easy"}, {"prompt": "hard"}]
    with pytest.raises(InputError, match="'hard', and none is irrelevant"):
        irrelevant_pairs(rows, [{"response": "x"}], fits, random.Random(0))
