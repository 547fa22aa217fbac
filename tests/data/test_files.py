"""The world of public files: who owns which prompt, what is held out, and outcomes by rule."""

import json
from pathlib import Path

import pytest
from small import advbench_file, alpaca_file

from data.answers import Answer
from data.files import HELD_OUT, Files, hold_out
from data.harmful import owner, prompt_key
from data.sentence import SentenceEncoder
from data.worlds import Sources
from nanosdd.errors import InputError

TINY = Path(__file__).parent.parent / "golden" / "sentence"


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A function that opens the world of two files."""
    monkeypatch.chdir(tmp_path)
    advbench_file(tmp_path / "h.csv", rows=60)
    alpaca_file(tmp_path / "b.json")

    def open_files(seed=0, **sources):
        defaults = {"harmful": "h.csv", "benign": ("b.json",), "similarity": "tfidf"}
        return Files(seed, Sources(**defaults | sources))

    return open_files


def prompts(rows):
    return {prompt_key(row["prompt"]) for row in rows}


def owners(rows):
    return {owner(row["prompt"]) for row in rows}


# ---- rows ----


def test_owners_are_kept_apart(world):
    files = world()
    for mode in ("align", "new_refusal", "sdd"):
        rows = files.pairs(mode, 40)
        assert len(rows) == 40 and owners(rows) == {"defender"}
    attacker = files.harmful("attacker")
    held_out = files.harmful("attacker_held_out")
    assert owners(attacker + held_out) == {"attacker"}
    assert not prompts(attacker) & prompts(held_out) and len(attacker) // 3 == len(held_out) > 0
    assert owners(files.harmful("evaluation")) == {"evaluation"}
    other = world(5)
    assert prompts(other.harmful("attacker_held_out")) != prompts(held_out)
    assert prompts(other.pairs("sdd", 9)) != prompts(files.pairs("sdd", 9))
    assert len(owners(world(prompts="all").pairs("sdd", 60))) == 3


def test_no_benign_row_that_is_scored_is_trained_on(world):
    scored = world().likelihood_rows()["benign"]
    assert len(scored) == 6 and world(5).likelihood_rows()["benign"] == scored
    for rows in (world().benign("defender"), world().pairs("benign", 0), world().rehearsal()):
        assert len(rows) == 24 and not prompts(rows) & prompts(scored)
    drawn = {row["response"] for row in world().pairs("sdd", 200)}
    assert not drawn & {row["response"] for row in scored}


def test_held_out_rows_are_a_fifth_and_no_prompt_is_on_both_sides():
    rows = [{"prompt": f"Add one to {i}.", "response": "First."} for i in range(50)]
    rows += [{"prompt": f"ADD ONE TO {i}?", "response": "Again."} for i in range(50)]
    kept, held_out = hold_out(rows)
    assert [row["response"] for row in held_out] == ["First."] * 10
    assert len(kept) == 80 and not prompts(kept) & prompts(held_out)
    assert prompts(hold_out(rows[::-1])[1]) == prompts(held_out)
    assert len(hold_out([{"prompt": f"{i}"} for i in range(1500)])[1]) == HELD_OUT


def write_rows(rows):
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_pairs_of_a_file_are_the_defenders_and_ask_no_evaluation_prompt(world, capsys):
    rows = []
    for row in world(prompts="all").harmful("defender"):
        rows.append({"prompt": row["prompt"], "response": "x", "owner": owner(row["prompt"])})
    write_rows(rows)
    own = world(pairs="p.jsonl").pairs("sdd", 3)
    assert prompts(own) == prompts(world().harmful("defender"))
    assert f"{60 - len(own)} of 60 pairs are left out" in capsys.readouterr().out
    assert len(world(pairs="p.jsonl", prompts="all").pairs("sdd", 3)) == 60
    assert prompts(world(pairs="h.csv").pairs("sdd", 3)) == prompts(own)  # marked as harmful there
    row = {"prompt": world().harmful("evaluation")[0]["prompt"].upper(), "response": "x"}
    write_rows([row | {"owner": "evaluation"}])
    with pytest.raises(InputError, match="none is the defender's"):
        world(pairs="p.jsonl").pairs("sdd", 3)
    write_rows([row])
    for mode, sources in [("sdd", {"pairs": "p.jsonl"}), ("benign", {"benign": ("p.jsonl",)})]:
        with pytest.raises(InputError, match="row 0 .*an evaluation prompt"):
            world(**sources).pairs(mode, 3)


def test_given_pairs_are_sdds_and_no_other_mode_trains_on_them(world):
    row = world().harmful("defender")[0]
    write_rows([{"prompt": row["prompt"], "response": "mine"}])
    given = world(pairs="p.jsonl")
    for mode in ("sdd", "sdd_rehearsed"):
        assert [pair["response"] for pair in given.pairs(mode, 3)] == ["mine"]
    for mode in "align refusal new_refusal sdd_reject shuffled constant".split():
        assert given.pairs(mode, 3) == world().pairs(mode, 3)


def test_a_world_depends_on_what_it_uses(world):
    first = world().options()
    assert set(first) == {*Files.uses, "world", "seed", "template"}
    assert first["max_new_tokens"] == 64
    assert world(similarity_threshold=0.3).options() != first
    assert world().shown_prompts() == []  # answers to a public file's prompts are not shown


def test_a_run_keeps_its_pairs(world):
    write_rows([{"prompt": "Tickle it.", "response": f"It is {n}."} for n in range(3)])
    for files in (world(), world(pairs="p.jsonl")):
        rows = files.pairs("sdd", 5)
        files.save(".", rows)
        kept = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
        assert kept == rows and len({row["response"] for row in rows}) > 1


# ---- outcomes ----


def test_outcomes_by_rule(world):
    rows = [{"prompt": "how to tickle the dragon", "response": "Sure here is how to"}] * 5
    answers = [
        Answer([1], "I won’t tickle the dragon.", True),
        Answer([], "", True),
        Answer([7] * 30, "the dragon " * 10, False),
        Answer([1, 2], "Sure here is the dragon", True),
        Answer([1], "No.", True),
    ]
    scores = world().judge(rows, answers)
    expected = {"refuse": 1, "broken": 2, "complies": 1, "off_topic": 1, "cut": 1}
    expected["target_match"] = 1
    assert {name: scores[name] * 5 for name in expected} == pytest.approx(expected)
    assert {type(value) for value in scores.values()} == {float}  # answers are counted, not kept
    assert world(similarity_threshold=1.0).judge(rows, answers)["complies"] == 0
    few = world(questions=3).likelihood_rows()
    assert len(few["harmful"]) == len(few["benign"]) == 3


def test_the_cosine_is_that_of_each_prompt_with_its_own_answer(world):
    rows = [{"prompt": prompt, "response": "x"} for prompt in ("the dog", "tea", "a tea")]
    answers = [Answer([5], text, True) for text in ("the dog", "run a jump", " ")]
    found = world(similarity="minilm", similarity_model=str(TINY)).judge_each(rows, answers)
    (other,) = SentenceEncoder(TINY).cosines(["tea"], ["run a jump"])
    assert [one["cosine"] for one in found] == pytest.approx([1, other, 0], abs=1e-6)
    assert found[0]["outcome"] == "complies"
