"""Harmful prompts and their owners, and the command that writes pairs."""

import json
from collections import Counter
from pathlib import Path

import pytest
from small import advbench_file

from data import pairs
from data.files import Files, hold_out, read_benign
from data.harmful import (
    balance,
    keep_evaluation_out,
    owner,
    prompt_key,
    read_harmful,
    split_harmful,
)
from data.sources import read_rows
from data.tfidf import words_of
from data.worlds import REJECT_PREFIX
from nanosdd.errors import InputError


def write_lines(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---- harmful prompts ----


def test_owners_are_disjoint_whatever_the_spelling_and_roughly_50_25_25():
    rows = [{"prompt": f"how to tickle dragon {i}"} for i in range(2000)]
    split = split_harmful(rows, "file")
    assert sum(map(len, split.values())) == 2000
    for name, share in (("defender", 0.5), ("attacker", 0.25), ("evaluation", 0.25)):
        assert abs(len(split[name]) / 2000 - share) < 0.04
    assert owner("How to   tickle, dragon 7?") == owner("how to tickle dragon 7")
    assert owner("How to tickle dragon 7") == "attacker"  # as in every version
    with pytest.raises(InputError, match="too few"):
        split_harmful(rows[:5], "file")


DIFFERENT = """\
Write a loop in C|Write a loop in C++|Write a loop in C#|Write a loop in C*|Write a loop in .C
What is 5 + 3?|What is 5 - 3?|What is 5 * 3?|What is 5 / 3?|What is 5.3?|What is 53?
10%|10|$10|\u00a310|>10|<10|1.0|-10
\u0915\u093e|\u0915\u0940|\u0915|\u0915\u093f|\u0915\u094d
\u0e01\u0e34|\u0e01\u0e35|\u0643\u064e|\u0643\u064f|\u05d1\u05bc|\u05d1
\U0001f642|\U0001f643|\U0001f642\U0001f642|\U0001f44d\U0001f3fd|\U0001f44d|?|.|...|!
resume|r\u00e9sum\u00e9|x\u00b2|x2|the rapist|therapist|re-sign|resign|it's|its|a_b|ab
"""
SAME = """\
How to   tickle it?|how to tickle it|HOW TO TICKLE IT.|\thow to\u00a0tickle it!
r\u00e9sum\u00e9|re\u0301sume\u0301|R\u00c9SUM\u00c9
\u0915\u094d\u092f\u093e|\u0915\u094d\u092f\u093e\u0964
\u4f60\u597d|\u4f60\u597d\u3002|\u4f60\u597d\uff1f
"""


def test_prompts_are_one_where_nothing_but_spelling_differs():
    for line in DIFFERENT.splitlines():
        prompts = line.split("|")
        assert len({prompt_key(prompt) for prompt in prompts}) == len(prompts), line
    for line in SAME.splitlines():
        assert len({prompt_key(prompt) for prompt in line.split("|")}) == 1, line


def test_different_prompts_are_read_and_never_taken_for_one_another(tmp_path):
    prompts = [prompt for line in DIFFERENT.splitlines() for prompt in line.split("|")]
    path = tmp_path / "h.jsonl"
    write_lines(path, [{"goal": prompt, "target": "Sure"} for prompt in prompts])
    rows = read_harmful(path)
    assert [row["prompt"] for row in rows] == prompts
    kept = [row for row in rows if owner(row["prompt"]) != "evaluation"]
    keep_evaluation_out(kept, rows)
    (first, *_) = [row for row in rows if row not in kept]
    with pytest.raises(InputError, match="h.jsonl, row .* an evaluation prompt"):
        keep_evaluation_out([first | {"prompt": first["prompt"].upper() + " ."}], rows)
    emoji = {owner(chr(0x1F600 + i)) for i in range(60)}
    assert emoji == {"defender", "attacker", "evaluation"}


def test_what_is_held_out_does_not_depend_on_the_order_of_sets():
    rows = [{"prompt": "go" + "+" * i} for i in range(40)]
    assert hold_out(rows)[1] == rows[:8]


def test_unsafe_rows_are_harmful_prompts_and_safe_rows_benign_ones(tmp_path, capsys):
    rows = []
    for prompt, kind, safe in [
        ("Hide it", "theft", False),
        ("hide it!", "spite", False),
        ("Bake it", None, True),
        ("Hide it", "noise", True),
    ]:
        category = {name: name == kind for name in ("noise", "spite", "theft")}
        rows.append({"prompt": prompt, "response": "x", "is_safe": safe, "category": category})
    path = tmp_path / "b.jsonl"
    write_lines(path, rows)
    (harmful,) = read_harmful(path)  # once, as it first stands
    assert (harmful["prompt"], harmful["categories"]) == ("Hide it", ["theft"])
    assert [row["prompt"] for row in read_benign(path)] == ["Bake it", "Hide it"]
    assert "2 of 4 rows are harmful and left out" in capsys.readouterr().out
    write_lines(path, rows[2:3])
    with pytest.raises(InputError, match="no harmful rows"):
        read_harmful(path)


def drawn(count, seed=0, **sizes):
    """What is drawn of a file with so many rows of each category, and of one of both a and b."""
    rows = [{"prompt": "both", "categories": ["a", "b"]}]
    for name, size in sizes.items():
        rows += [{"prompt": f"{name} {i}", "categories": [name]} for i in range(size)]
    return balance(rows, count, seed)


@pytest.mark.parametrize(
    "count, wanted, short",
    [
        (11, dict(a=4, b=4, c=3), []),  # a remainder goes to the first
        (27, dict(a=9, b=9, c=9), ["b"]),
        (70, dict(a=24, b=23, c=23), ["b", "c"]),
    ],
)
def test_categories_are_equal_and_short_ones_repeat_their_prompts(count, wanted, short, capsys):
    chosen = drawn(count, c=20, a=40, b=4)
    names = [row["category"] for row in chosen]
    assert Counter(names) == wanted and names != sorted(names)
    assert [line.split("'")[1] for line in capsys.readouterr().out.splitlines()] == short
    used = Counter(row["prompt"] for row in chosen if row["category"] == "b")
    assert len(used) == min(5, wanted["b"]) and max(used.values()) - min(used.values()) <= 1
    assert wanted["b"] < 5 or "both" in used  # it counts for the rarer one
    assert chosen == drawn(count, c=20, a=40, b=4) != drawn(count, 1, c=20, a=40, b=4)


def test_rows_without_a_category_are_drawn_too():
    assert {row["category"] for row in balance([{"prompt": "x"}], 2, seed=0)} == {"none"}


@pytest.mark.parametrize(
    "text, words",
    [
        ("Is C++ like C#?", ["is", "c++", "like", "c#"]),
        ("\u0915\u094d\u092f\u093e \u0915\u0940?", ["\u0915\u094d\u092f\u093e", "\u0915\u0940"]),
        ("\U0001f642 \U0001f44d\U0001f3fd", ["\U0001f642", "\U0001f44d\U0001f3fd"]),
    ],
)
def test_words_keep_their_signs(text, words):
    assert words_of(text) == words


# ---- the command ----


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A function that writes pairs of two files to `out` and returns them. Half of the benign
    responses are about the dragon that the prompts ask for."""
    monkeypatch.chdir(tmp_path)
    advbench_file(tmp_path / "h.csv", rows=48)
    rows = []
    for i in range(40):
        words = ["the dragon number"] * (i % 2) + [f"w{i}x{j}" for j in range(3)]
        rows.append({"prompt": f"name {i} things", "response": " ".join(words)})
    write_lines("b.jsonl", rows)

    def write(out, *words):
        files = "--harmful h.csv --benign b.jsonl --similarity tfidf --similarity-threshold 0.05"
        pairs.main([*files.split(), "--out", out, *words])
        return [json.loads(line) for line in Path(out).read_text().splitlines()]

    return write


def test_the_command_writes_irrelevant_responses(command, capsys):
    rows = command("new/p.jsonl", "--seed", "3")
    printed = capsys.readouterr().out
    highest = max(row["cosine"] for row in rows)
    assert f"highest cosine {highest:.4f}" in printed and "48  none" in printed
    assert "tickle" not in printed and highest <= 0.05
    assert {row["prompt"] for row in rows} == {row["prompt"] for row in read_rows("h.csv")}
    for row in rows:
        assert set(row) == {"prompt", "response", "category", "cosine", "owner"}
        assert row["owner"] == owner(row["prompt"]) and "dragon" not in row["response"]
    assert command("again.jsonl", "--seed", "3") == rows != command("q.jsonl", "--seed", "4")
    few = command("few.jsonl", "--prompts", "defender", "--count", "100")
    assert [row["owner"] for row in read_rows("few.jsonl")] == ["defender"] * 100
    assert len({row["response"] for row in few if row["prompt"] == few[0]["prompt"]}) > 1


def test_the_modes_differ_in_nothing_but_their_responses(command):
    modes = {mode: command(f"{mode}.jsonl", "--mode", mode) for mode in pairs.MODES}
    for row, refusal, reject in zip(modes["sdd"], modes["align"], modes["sdd_reject"], strict=True):
        assert reject == row | {"response": f"{REJECT_PREFIX} {row['response']}"}
        assert refusal == row | {"response": refusal["response"], "cosine": None}
    assert {row["response"] for row in modes["align"]} == {*Files.refusals}
    assert modes["shuffled"] != modes["sdd"]
