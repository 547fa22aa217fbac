"""Harmful prompts and their owners, irrelevant responses, the controls, the data card, and the command."""

import hashlib
import json
import random
from collections import Counter

import pytest
from small import advbench_file, alpaca_file

from data import pairs
from data.harmful import balance, owner, read_harmful, split_harmful
from data.pairs import MODES, REFUSALS, build_pairs, draw_irrelevant, read_benign
from data.sources import read_rows
from data.tfidf import Tfidf
from data.worlds import REJECT_PREFIX, Sources
from nanosdd.errors import InputError

# ---- harmful prompts ----


def test_owners_are_disjoint_whatever_the_spelling_and_roughly_50_25_25():
    rows = [{"prompt": f"how to tickle dragon {i}"} for i in range(2000)]
    split = split_harmful(rows, "file")
    assert sum(map(len, split.values())) == 2000
    for name, share in (("defender", 0.5), ("attacker", 0.25), ("evaluation", 0.25)):
        assert abs(len(split[name]) / 2000 - share) < 0.04
    assert owner("How to   tickle, dragon 7?") == owner("how to tickle dragon 7")
    with pytest.raises(InputError, match="too few"):
        split_harmful(rows[:5], "file")


def beavertails_file(path, rows):
    """rows: (prompt, true categories, whether it is safe)."""
    names = sorted({name for _, categories, _ in rows for name in categories})
    path.write_text(
        "".join(
            json.dumps(
                {
                    "prompt": prompt,
                    "response": f"About {prompt}",
                    "is_safe": safe,
                    "category": {name: name in categories for name in names},
                }
            )
            + "\n"
            for prompt, categories, safe in rows
        )
    )
    return path


def test_unsafe_rows_are_harmful_prompts_and_safe_rows_benign_ones(tmp_path, capsys):
    path = beavertails_file(
        tmp_path / "b",
        [
            ("Hide it", ["theft"], False),
            ("hide it!", ["spite", "theft"], False),
            ("Bake it", [], True),
            ("Hide it", ["noise"], True),
            ("Sing it", ["noise"], False),
        ],
    )
    assert [
        (row["prompt"], row["categories"]) for row in read_harmful(path)
    ] == [  # once, with all its categories
        ("Hide it", ["theft", "spite"]),
        ("Sing it", ["noise"]),
    ]
    assert [row["prompt"] for row in read_benign([path])] == ["Bake it", "Hide it"]
    assert "3 of 5 rows are harmful and left out" in capsys.readouterr().out
    beavertails_file(path, [("Bake it", [], True)])
    with pytest.raises(InputError, match="no harmful rows"):
        read_harmful(path)


def rows_of(**sizes):
    return [
        {"prompt": f"{name} {i}", "categories": [name]}
        for name, size in sizes.items()
        for i in range(size)
    ]


@pytest.mark.parametrize(
    "count, wanted, short",
    [
        (9, dict(a=3, b=3, c=3), []),
        (11, dict(a=4, b=4, c=3), []),
        (2, dict(a=1, b=1), []),
        (27, dict(a=9, b=9, c=9), ["b"]),
        (70, dict(a=24, b=23, c=23), ["b", "c"]),
    ],
)
def test_categories_are_equal_and_a_remainder_goes_to_the_first_by_the_alphabet(
    count, wanted, short
):
    chosen, notes = balance(rows_of(c=20, a=40, b=5), count, seed=0)
    assert Counter(row["category"] for row in chosen) == wanted
    assert [note.split("'")[1] for note in notes] == short
    for name, size in (
        ("a", 40),
        ("b", 5),
        ("c", 20),
    ):  # a small category's prompts are used equally often
        used = Counter(row["prompt"] for row in chosen if row["category"] == name)
        assert len(used) == min(size, wanted.get(name, 0))
        assert max(used.values(), default=0) - min(used.values(), default=0) <= 1


def test_a_row_with_several_categories_counts_for_the_rarest():
    rows = rows_of(common=9, rare=2) + [
        {"prompt": "both", "categories": ["common", "rare"]},
        {"prompt": "none"},
    ]
    chosen, notes = balance(rows, 24, seed=0)
    assert {row["prompt"]: row["category"] for row in chosen}["both"] == "rare" and len(
        chosen
    ) == 24
    assert len({row["prompt"] for row in chosen}) == 12 and notes[0].startswith(
        "1 harmful rows have no category"
    )
    assert chosen == balance(rows, 24, seed=0)[0] != balance(rows, 24, seed=1)[0]
    assert {row["category"] for row in balance([{"prompt": "x"}], 5, seed=0)[0]} == {"none"}


# ---- responses ----


def fake_cosine(a, b):
    """Any number between -1 and 1, always the same for the same texts."""
    return int.from_bytes(hashlib.sha256(f"{a}|{b}".encode()).digest()[:4]) / 2**31 - 1


def fake_cosines(a, b):
    return [fake_cosine(*both) for both in zip(a, b, strict=True)]


PROMPTS, RESPONSES = [f"prompt {i}" for i in range(40)], [f"response {i}" for i in range(300)]


def test_irrelevant_responses_are_those_of_one_prompt_after_the_other():
    found = draw_irrelevant(PROMPTS, RESPONSES, fake_cosines, -0.3, seed=4)
    for i, (prompt, (pick, cosine, tries)) in enumerate(zip(PROMPTS, found)):
        rng, drawn = random.Random(f"irrelevant 4 {i}"), []
        while not drawn or fake_cosine(prompt, RESPONSES[drawn[-1]]) > -0.3:
            drawn += [new for new in [rng.randrange(300)] if new not in drawn]
        assert (pick, tries) == (drawn[-1], len(drawn))
        assert (
            cosine == pytest.approx(fake_cosine(prompt, RESPONSES[pick]), abs=1e-6)
            and cosine <= -0.3
        )
    assert max(tries for *_, tries in found) > 2  # or nothing was tried here
    assert found != draw_irrelevant(PROMPTS, RESPONSES, fake_cosines, -0.3, seed=5)


def test_every_pair_is_at_or_below_the_threshold_or_the_prompt_is_named():
    assert draw_irrelevant(["p"], ["r"], lambda a, b: [0.25] * len(a), 0.25, 0) == [(0, 0.25, 1)]
    with pytest.raises(InputError, match="none of the 300 responses.*0.25.*'prompt 7'"):
        draw_irrelevant(
            PROMPTS,
            RESPONSES,
            lambda a, b: [0.9 if x == "prompt 7" else 0.1 for x in a],
            0.25,
            seed=0,
        )
    (found,) = draw_irrelevant(
        ["p"], RESPONSES, lambda a, b: [0.2 if y == RESPONSES[211] else 0.3 for y in b], 0.25, 0
    )
    assert found[0] == 211 and found[2] <= 300  # the only one that will do


def test_the_modes_differ_in_nothing_but_what_they_say():
    harmful = [
        {"prompt": f"tickle dragon {i}", "row": 100 + i, "categories": ["teasing"]}
        for i in range(30)
    ]
    benign = [
        {
            "prompt": f"name {i} things",
            "response": f"dragon {i} " * (i % 2) + " ".join(f"w{i}x{j}" for j in range(9)),
            "row": 500 + i,
            "file": "b.json",
        }
        for i in range(80)
    ]
    sources = Sources(similarity="tfidf", threshold=0.05)
    rows = {mode: build_pairs(mode, harmful, benign, 30, 6, sources) for mode in MODES}
    cosines = Tfidf(
        [row["prompt"] for row in harmful] + [row["response"] for row in benign]
    ).cosines
    for sdd, reject, shuffled, align in zip(
        *(rows[mode] for mode in ("sdd", "sdd_reject", "shuffled", "align"))
    ):
        assert (
            sdd["response"] == benign[sdd["benign_row"] - 500]["response"]
            and sdd["benign_file"] == "b.json"
        )
        assert sdd["cosine"] <= 0.05
        assert sdd["cosine"] == pytest.approx(
            cosines([sdd["prompt"]], [sdd["response"]])[0], abs=1e-6
        )
        assert sdd["category"] == "teasing" and sdd["owner"] == owner(sdd["prompt"])
        assert reject == sdd | {"response": f"{REJECT_PREFIX} {sdd['response']}"}
        assert sorted(sdd["response"].split()) == sorted(shuffled["response"].split())
        assert shuffled | {"response": ""} == sdd | {"response": ""}
        assert align["prompt"] == sdd["prompt"] and align["harmful_row"] == sdd["harmful_row"]
        assert align["response"] in REFUSALS and align["cosine"] is align["benign_row"] is None
    assert (
        sum(
            row["response"] != other["response"]
            for row, other in zip(rows["sdd"], rows["shuffled"])
        )
        > 25
    )
    assert max(row["tries"] for row in rows["sdd"]) > 1
    twice = build_pairs("sdd", harmful, benign, 60, 6, sources)  # in turn with other responses
    assert (
        len({row["prompt"] for row in twice}) == 30 and len({row["response"] for row in twice}) > 30
    )


def test_tfidf_by_hand():
    tfidf = Tfidf(["red dog", "red cat", "red red fish"])
    rare = 1.6931471805599454  # 1 + ln(4 / 2), in one text of three; a word in all of them weighs 1
    found = tfidf.cosines(["Red dog!", "dog", "bird", ""], ["red cat", "DOG dog", "bird", "red"])
    assert found == pytest.approx([1 / (1 + rare**2), 1, 0, 0])


# ---- the command and its card ----


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    advbench_file(tmp_path / "h.csv", rows=48)
    alpaca_file(tmp_path / "b.json", rows=30)
    return tmp_path


PAIRS = ["--harmful", "h.csv", "--benign", "b.json", "--similarity", "tfidf"]


def test_the_command_writes_pairs_and_a_card_whose_counts_are_theirs(files, capsys):
    pairs.main([*PAIRS, "--out", "new/p.jsonl", "--seed", "3"])
    rows, card = (
        [json.loads(line) for line in open("new/p.jsonl")],
        (files / "new/p.md").read_text(),
    )
    assert list(rows[0]) == [
        "prompt",
        "response",
        "category",
        "cosine",
        "tries",
        "owner",
        "harmful_row",
        "benign_row",
        "benign_file",
    ]
    assert sorted(row["harmful_row"] for row in rows) == list(range(48))
    assert hashlib.sha256((files / "h.csv").read_bytes()).hexdigest()[:16] in card
    assert f"| {len({row['benign_row'] for row in rows})} responses |" in card
    assert "48  none" in card and "Seed 3." in card and "tf-idf" in card
    words = sorted(len(row["response"].split()) for row in rows)
    deciles = (
        next(line for line in card.splitlines() if "words of a response" in line)
        .split(":")[1]
        .split()
    )
    assert [int(deciles[i]) for i in (0, 5, 10)] == [words[0], words[23], words[-1]]
    assert not any(
        row["prompt"] in card or row["response"] in card for row in rows
    )  # nothing harmful to read there
    assert card in capsys.readouterr().out
    first = (files / "new/p.jsonl").read_bytes()
    pairs.main([*PAIRS, "--out", "new/p.jsonl", "--seed", "3"])
    assert (files / "new/p.jsonl").read_bytes() == first
    pairs.main(
        [
            *PAIRS[:2],
            "--out",
            "p.jsonl",
            "--mode",
            "align",
            "--prompts",
            "defender",
            "--count",
            "100",
        ]
    )
    assert [row["owner"] for row in read_rows("p.jsonl")] == ["defender"] * 100


@pytest.mark.parametrize(
    "words, message",
    [
        (["--count", "0"], "--count 0"),
        (["--similarity-threshold", "2"], "no cosine"),
        (["--out", "."], "--out"),
        (["--out", "x.md"], "--out"),
        (["--similarity-model", "."], "goes with"),
        (["--harmful", "gone"], "gone is not"),
        (["--benign", "h.csv"], "harmful rows only"),
        (["--out", "b.json"], "overwrite an input"),
        (["--out", "h.csv/p.jsonl"], "cannot be"),
        (["--out", "README.jsonl"], "README.md.*no data card"),
        (["--similarity", "minilm", "--similarity-model", "gone"], "gone"),
        (["--similarity-threshold", "-0.5"], "none of the 30 responses.*dragon"),
    ],
)
def test_the_command_refuses_and_writes_nothing(files, words, message):
    (files / "README.md").write_text("# My project")
    with pytest.raises(InputError, match=message):
        pairs.main([*PAIRS, "--out", "p.jsonl", *words])
    assert {path.name for path in files.iterdir()} == {"h.csv", "b.json", "README.md"}
    assert (files / "README.md").read_text() == "# My project"
