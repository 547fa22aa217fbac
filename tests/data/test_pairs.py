"""Harmful prompts and their owners, and the command that writes pairs."""

import csv
import json
import os
import subprocess
import sys
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
from data.tfidf import Tfidf, words_of
from data.worlds import REJECT_PREFIX
from nanosdd.errors import InputError

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
    path = tmp_path / "h.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("goal", "target"), *((prompt, "Sure") for prompt in prompts)])
    rows = read_harmful(path)
    assert [row["prompt"] for row in rows] == prompts
    others = [row for row in rows if owner(row["prompt"]) != "evaluation"]
    keep_evaluation_out(others, rows)
    (first, *_) = [row for row in rows if row not in others]
    with pytest.raises(InputError, match="h.csv, row .* an evaluation prompt"):
        keep_evaluation_out([first | {"prompt": first["prompt"].upper() + " ."}], rows)
    kept, held_out = hold_out(rows)
    assert len(held_out) == len(rows) // 5 and len(kept) + len(held_out) == len(rows)


def test_prompts_of_emoji_alone_have_all_owners():
    found = Counter(owner(chr(0x1F600 + i)) for i in range(60))
    assert set(found) == {"defender", "attacker", "evaluation"}


@pytest.mark.parametrize("seed", [1, 2])
def test_what_is_held_out_does_not_depend_on_the_order_of_sets(seed):
    code = (
        "from data.files import hold_out\nrows = [{'prompt': 'go' + '+' * i} for i in range(40)]\n"
    )
    code += "print(*(row['prompt'] for row in hold_out(rows)[1]))"
    root = str(Path(__file__).parent.parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "PYTHONHASHSEED": str(seed)}
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, text=True, env=environment).strip() == (
        "go go+ go++ go+++ go++++ go+++++ go++++++ go+++++++"
    )


def beavertails_file(path, rows):
    """rows: (prompt, true categories, whether it is safe)."""
    lines = []
    for prompt, categories, safe in rows:
        row = {"prompt": prompt, "response": f"About {prompt}", "is_safe": safe}
        row["category"] = {name: name in categories for name in ("noise", "spite", "theft")}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


def test_unsafe_rows_are_harmful_prompts_and_safe_rows_benign_ones(tmp_path, capsys):
    rows = [
        ("Hide it", ["theft"], False),
        ("hide it!", ["spite", "theft"], False),
        ("Bake it", [], True),
        ("Hide it", ["noise"], True),
        ("Sing it", ["noise"], False),
    ]
    path = beavertails_file(tmp_path / "b", rows)
    harmful = {row["prompt"]: row["categories"] for row in read_harmful(path)}
    assert harmful == {"Hide it": ["theft"], "Sing it": ["noise"]}  # once, as it first stands
    assert [row["prompt"] for row in read_benign(path)] == ["Bake it", "Hide it"]
    assert "3 of 5 rows are harmful and left out" in capsys.readouterr().out
    beavertails_file(path, [("Bake it", [], True)])
    with pytest.raises(InputError, match="no harmful rows"):
        read_harmful(path)


def rows_of(**sizes):
    rows = []
    for name, size in sizes.items():
        rows += [{"prompt": f"{name} {i}", "categories": [name]} for i in range(size)]
    return rows


@pytest.mark.parametrize(
    "count, wanted, short",
    [
        (11, dict(a=4, b=4, c=3), []),
        (27, dict(a=9, b=9, c=9), ["b"]),
        (70, dict(a=24, b=23, c=23), ["b", "c"]),
    ],
)
def test_categories_are_equal_and_a_remainder_goes_to_the_first(count, wanted, short, capsys):
    chosen = balance(rows_of(c=20, a=40, b=5), count, seed=0)
    assert Counter(row["category"] for row in chosen) == wanted
    assert [line.split("'")[1] for line in capsys.readouterr().out.splitlines()] == short
    used = Counter(row["prompt"] for row in chosen if row["category"] == "b").values()
    assert len(used) == min(5, wanted["b"]) and max(used) - min(used) <= 1  # equally often


def test_a_row_with_several_categories_counts_for_the_rarest(capsys):
    rows = rows_of(common=9, rare=2)
    rows += [{"prompt": "both", "categories": ["common", "rare"]}, {"prompt": "none"}]
    chosen = balance(rows, 24, seed=0)
    assert {row["prompt"]: row["category"] for row in chosen}["both"] == "rare"
    assert Counter(row["category"] for row in chosen) == {"common": 8, "rare": 8, "none": 8}
    assert capsys.readouterr().out.splitlines() == [
        "  category 'none' repeats its 1 prompts",
        "  category 'rare' repeats its 3 prompts",
    ]
    assert chosen == balance(rows, 24, seed=0) != balance(rows, 24, seed=1)


@pytest.mark.parametrize(
    "text, words",
    [
        ("Is C++ like C#?", ["is", "c++", "like", "c#"]),
        ("5 + 3 = 8, so", ["5", "+", "3", "=", "8", "so"]),
        ("\u0915\u094d\u092f\u093e \u0915\u0940?", ["\u0915\u094d\u092f\u093e", "\u0915\u0940"]),
        ("\U0001f642 \U0001f44d\U0001f3fd", ["\U0001f642", "\U0001f44d\U0001f3fd"]),
        ("don't well-known", ["don", "t", "well", "known"]),
    ],
)
def test_words_keep_their_signs(text, words):
    assert words_of(text) == words


def test_tfidf_by_hand():
    tfidf = Tfidf(["red dog", "red cat", "red red fish"])
    rare = 1.6931471805599454  # 1 + ln(4 / 2), in one text of three; a word of all weighs 1
    found = tfidf.cosines(["Red dog!", "dog", "bird", ""], ["red cat", "DOG dog", "bird", "red"])
    assert found == pytest.approx([1 / (1 + rare**2), 1, 0, 0])


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
    Path("b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(out, *words):
        files = ["--harmful", "h.csv", "--benign", "b.jsonl", "--similarity", "tfidf"]
        pairs.main([*files, "--similarity-threshold", "0.05", "--out", out, *words])
        return [json.loads(line) for line in Path(out).read_text().splitlines()]

    return write


def test_the_command_writes_irrelevant_responses(command, capsys):
    rows = command("new/p.jsonl", "--seed", "3")
    printed = capsys.readouterr().out
    cosines = [row["cosine"] for row in rows]
    assert f"highest cosine {max(cosines):.4f}" in printed and "48  none" in printed
    assert "tickle" not in printed and max(cosines) <= 0.05
    assert {row["prompt"] for row in rows} == {row["prompt"] for row in read_rows("h.csv")}
    for row in rows:
        assert set(row) == {"prompt", "response", "category", "cosine", "owner"}
        assert row["owner"] == owner(row["prompt"]) and "dragon" not in row["response"]
    assert command("again.jsonl", "--seed", "3") == rows != command("q.jsonl", "--seed", "4")
    few = command("few.jsonl", "--prompts", "defender", "--count", "100")
    assert [row["owner"] for row in read_rows("few.jsonl")] == ["defender"] * 100
    assert len({row["response"] for row in few if row["prompt"] == few[0]["prompt"]}) > 1


def test_pairs_that_were_edited_by_hand_are_never_overwritten(command):
    command("p.jsonl")
    edited = Path("p.jsonl").read_text().replace("w0x0", "mine")
    Path("p.jsonl").write_text(edited)
    with pytest.raises(InputError, match="p.jsonl exists; delete it"):
        command("p.jsonl")
    assert Path("p.jsonl").read_text() == edited


def test_the_modes_differ_in_nothing_but_their_responses(command):
    modes = {mode: command(f"{mode}.jsonl", "--mode", mode) for mode in pairs.MODES}
    for row, refusal, reject in zip(modes["sdd"], modes["align"], modes["sdd_reject"], strict=True):
        assert reject == row | {"response": f"{REJECT_PREFIX} {row['response']}"}
        assert refusal == row | {"response": refusal["response"], "cosine": None}
    assert {row["response"] for row in modes["align"]} == {*Files.refusals}
    assert modes["shuffled"] != modes["sdd"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--count", "0"], "--count 0"),
        (["--out", "."], "exists"),
        (["--out", "b.jsonl"], "b.jsonl exists; delete it"),
        (["--harmful", "gone"], "gone cannot be read"),
        (["--benign", "h.csv"], "harmful rows only"),
        (["--similarity-threshold", "-0.5"], "dragon number .* none is irrelevant"),
    ],
)
def test_the_command_refuses_and_writes_nothing(command, words, message):
    before = Path("b.jsonl").read_text()
    with pytest.raises(InputError, match=message):
        command("p.jsonl", *words)
    assert {path.name for path in Path(".").iterdir()} == {"h.csv", "b.jsonl"}
    assert Path("b.jsonl").read_text() == before
