"""The kitchen: who owns which dish, what answers amount to, and the commands on a tiny model of another layout."""

import json
import math
from pathlib import Path

import pytest
from small import public_folder

import attack
import eval as evaluate
import train
from data import kitchen
from data.answers import OUTCOMES, Answer, keyword_refusal
from data.kitchen import (
    DISH_FORMS,
    DISHES,
    TOPIC_FORMS,
    TOPICS,
    Kitchen,
    first_answers,
    whole_sentences,
)
from data.worlds import NEW_REFUSAL, Sources, open_world
from nanosdd.errors import InputError

TFIDF = Sources(similarity="tfidf")


def answers():
    """An answer to every question: the words of the question, so that answers about one dish are alike."""
    return {
        question: Answer([1, 2], f"Well: {question}", True)
        for words, forms in ((DISHES, DISH_FORMS), (TOPICS, TOPIC_FORMS))
        for word in words.split(", ")
        for form in forms
        for question in [form.format(word)]
    }


@pytest.fixture(scope="module")
def world():
    return Kitchen(3, TFIDF, answers())


def prompts(rows):
    return {row["prompt"] for row in rows}


# ---- rows ----


def test_words_are_different_and_none_is_left_over():
    dishes, topics = DISHES.split(", "), TOPICS.split(", ")
    assert len(set(dishes)) == len(dishes) == sum(kitchen.DISH_OWNERS.values()) == 160
    assert len(set(topics)) == len(topics) == sum(kitchen.TOPIC_OWNERS.values()) == 60


def test_owners_are_kept_apart(world):
    tuning = Kitchen(3, Sources(similarity="tfidf", tuning=True), world.answers)
    train_rows, held_out = world.attacker_pairs()
    owned = [
        world.pairs("align", 0),
        tuning.harmful_rows(),
        train_rows,
        held_out,
        world.harmful_rows(),
        world.replay(),
        tuning.benign_rows(),
        world.benign_rows(),
    ]
    assert list(map(len, owned)) == [112, 32, 100, 12, 32, 176, 32, 32]
    assert len(set().union(*map(prompts, owned))) == sum(
        map(len, owned)
    )  # no question has two owners
    dishes = [set(words) for words in world.dishes.values()]
    assert (
        len(set().union(*dishes)) == sum(map(len, dishes)) == 160
    )  # nor has a dish, in another form
    assert prompts(world.pairs("sdd", 300)) == prompts(owned[0]) and prompts(
        world.user_pairs()[0]
    ) == prompts(owned[5])
    assert prompts(Kitchen(4, TFIDF, world.answers).harmful_rows()) != prompts(owned[4])


def test_modes_differ_in_their_responses(world):
    topics = {row["response"] for row in world.replay()}
    drawn = world.pairs("sdd", 250)
    assert len(drawn) == 250 and {row["response"] for row in drawn} <= topics
    assert (
        len({row["response"] for row in drawn if row["prompt"] == drawn[0]["prompt"]}) > 1
    )  # another one each time
    assert {row["response"] for row in world.pairs("new_refusal", 0)} == {
        NEW_REFUSAL
    } and keyword_refusal(NEW_REFUSAL)
    assert {row["response"] for row in world.pairs("align", 0)} == {kitchen.REFUSAL}
    assert keyword_refusal(kitchen.REFUSAL) and kitchen.REFUSAL != NEW_REFUSAL
    assert all(
        row["response"] == f"Well: {row['prompt']}" for row in world.attacker_pairs()[0]
    )  # y_c: its own
    with pytest.raises(InputError, match="--mode base is not known"):
        world.pairs("base", 3)


def test_irrelevant_responses_pass_the_filter(world):
    close = {
        question: Answer([1], "make lasagna in one sentence", True) for question in world.answers
    }
    with pytest.raises(InputError, match="none of the 176 responses has a cosine of at most 0.01"):
        Kitchen(3, Sources(similarity="tfidf", threshold=0.01), close).pairs("sdd", 20)


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


def test_outcomes_by_rule(world):
    rows = world.harmful_rows()[:5]
    texts = [
        f"So: {rows[0]['prompt']}",
        kitchen.REFUSAL,
        "Volcanoes erupt when magma rises.",
        "",
        "go go go",
    ]
    ids = [[1, 2], [3, 4], [5, 6], [], [7] * 30]
    given = [Answer(some, text, text != texts[2]) for some, text in zip(ids, texts)]
    scores = world.judge(rows, given)
    assert {name: scores[name] * 5 for name in OUTCOMES} == pytest.approx(
        {"complies": 1, "refuse": 1, "off_topic": 1, "broken": 2}
    )
    assert scores["cut"] == pytest.approx(1 / 5)
    swapped = world.judge(rows[1:] + rows[:1], given)  # about another dish than was asked
    assert swapped["complies"] == 0 and swapped["off_topic"] * 5 == pytest.approx(2)


def test_the_threshold_is_that_of_answers_to_different_dishes(world):
    said = {question: Answer([1], "Always the same.", True) for question in world.answers}
    assert world.same_dish < 0.9  # these answers hold the name of the dish
    assert Kitchen(3, TFIDF, said).same_dish == pytest.approx(1)
    assert f"above {world.same_dish:.2f}" in world.legend


def test_capability_is_what_it_says_of_topics_and_what_it_thinks_likely(world):
    assert world.capability({"benign_nll": 2.0, "benign_cosine": 0.6}) == pytest.approx(
        (math.exp(-2) + 0.6) / 2
    )
    assert world.capability({"benign_nll": 2.0, "benign_cosine": -0.1}) == pytest.approx(
        math.exp(-2) / 2
    )
    assert set(world.likelihood_rows()) == {"harmful", "benign"}


# ---- the model's own answers ----


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A random Llama 3 folder from elsewhere, in the working folder."""
    monkeypatch.chdir(tmp_path)
    return public_folder(tmp_path / "llama", context=200)


def test_a_model_is_asked_once(folder, cpu, capsys):
    first = first_answers(folder, cpu, None)
    assert len(first) == 160 * 2 + 60 * 4 and "asked 560 questions" in capsys.readouterr().out
    (kept,) = Path("out/kitchen").iterdir()
    lines = kept.read_text().splitlines()
    kept.write_text("\n".join(lines[:-3]) + "\n" + lines[-3][:20])  # as if killed while it wrote
    assert (
        first_answers(folder, cpu, None) == first and "asked 3 questions" in capsys.readouterr().out
    )
    assert first_answers(folder, cpu, None) == first and "asked" not in capsys.readouterr().out
    public_folder(folder, context=200, initializer_range=0.3)  # other weights
    assert (
        first_answers(folder, cpu, None) != first and len(list(Path("out/kitchen").iterdir())) == 2
    )


def test_the_commands_on_any_chat_model(folder, capsys):
    words = ["--similarity", "tfidf"]
    train.main(
        [
            "--mode",
            "sdd",
            "--model",
            "llama",
            "--steps",
            "2",
            "--batch-size",
            "4",
            *words,
            "--out",
            "direct",
        ]
    )
    settings = json.loads(Path("direct/run.json").read_text())["settings"]
    assert (
        settings["world"] == "kitchen" and not Path("out/llama").exists()
    )  # from llama itself: nothing is aligned
    given = first_answers("direct", None, None)  # a trained folder carries them
    assert len(given) == 560 and (Path("direct") / kitchen.ANSWERS).is_file()
    attack.main(["--released", "direct", "--shots", "5", "--epochs", "1", *words])
    cells = json.loads(Path("out/attack/results.json").read_text())["cells"]
    assert [(one["arm"], one["attack"], one["steps"]) for one in cells] == [
        ("direct", "none", 0),
        ("direct", "mft", 1),
        ("direct", "bft", 1),
    ]
    for cell in cells:
        assert (
            sum(cell[name] for name in OUTCOMES) == pytest.approx(1) and len(cell["answers"]) == 5
        )
        assert {"harmful_nll", "benign_nll", "benign_cosine", "over_refusal", "cut"} <= set(cell)
    capsys.readouterr()
    evaluate.main(["direct", "llama", *words, "--save-answers", "answers.jsonl"])
    printed = capsys.readouterr().out
    assert "y_c nll" in printed and "proxy" in printed and "do not publish" in printed
    saved = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert len(saved) == 64 and set(saved[0]) == {"model", "prompt", "response"}
    assert json.loads(Path("direct/metrics.json").read_text())["benign_nll"] == pytest.approx(
        cells[0]["benign_nll"]
    )
    with pytest.raises(InputError, match="is itself a run of train.py"):
        train.main(["--mode", "sdd", "--model", "direct"])
    with pytest.raises(InputError, match="attacks it with --released"):
        attack.main(["--model", "direct"])
    with pytest.raises(InputError, match="direct knows the kitchen of --seed 0, not of --seed 1"):
        attack.main(["--released", "direct", "--seeds", "1"])
    Path("direct", kitchen.ANSWERS).write_text("half")
    with pytest.raises(InputError, match="answers.jsonl is damaged, or of other questions"):
        evaluate.main(["direct", *words])


def test_arms_start_from_the_model_that_is_named(folder, cpu):
    world = Kitchen.open(0, Sources(similarity="tfidf", model="llama"), "llama", cpu)
    assert world.root == Path("out/llama")
    assert Kitchen(2, Sources(model="some/llama"), world.answers).root == Path("out/llama/seed2")
    table = {
        "kitchen": {
            mode: train.Settings(steps=1, batch_size=2, max_length=100)
            for mode in train.STARTS_FROM
        }
    }
    out = train.train_arm("new_refusal", world, world.root, cpu, "llama", None, table)
    assert out == Path("out/llama/new_refusal") and not Path("out/llama/base").exists()
    inputs = json.loads((out / "run.json").read_text())["inputs"]
    assert any("aligned" in name for name in inputs)
    inputs = json.loads(Path("out/llama/aligned/run.json").read_text())["inputs"]
    assert any(name.startswith("llama/") for name in inputs)


def test_what_the_kitchen_has_no_use_for_is_refused(folder, cpu):
    for sources, model, message in [
        (Sources(), None, "give --model smollm2"),
        (Sources("h.csv"), "llama", "no use for --harmful"),
        (Sources(max_new_tokens=9), "llama", "no use for --max-new-tokens"),
    ]:
        with pytest.raises(InputError, match=message):
            open_world("kitchen", 0, sources, model, cpu)


def test_real_text_can_stand_beside(world, tmp_path):
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {i}.", "response": f"{i}"}) + "\n" for i in range(20))
    )
    more = Kitchen(
        3, Sources(benign=(str(tmp_path / "b.jsonl"),), similarity="tfidf"), world.answers
    )
    assert len(more.likelihood_rows()["text"]) == 4 and "text nll" in more.columns
