"""Harmful prompts and their owners, irrelevant responses, the controls, the data card, and the command."""

import hashlib
import json
import random
import re
from collections import Counter

import pytest
from small import advbench_file, alpaca_file, public_folder

import train
from data import pairs
from data.harmful import balance, keep_evaluation_out, owner, read_harmful, split_harmful
from data.pairs import MODES, REFUSALS, arrange, draw_irrelevant, draw_same_topic, town_pairs
from data.tfidf import Tfidf
from data.town import REJECT_PREFIX, Town
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
    path.write_text("".join(json.dumps({"prompt": prompt, "response": f"About {prompt}", "is_safe": safe, "category": {
        name: name in categories for name in names}}) + "\n" for prompt, categories, safe in rows))
    return path


def test_only_unsafe_rows_count_each_prompt_once_with_all_its_categories(tmp_path):
    path = beavertails_file(tmp_path / "b", [
        ("Hide it", ["theft"], False), ("hide it!", ["spite", "theft"], False), ("Bake it", [], True),
        ("Hide it", ["noise"], True), ("Sing it", ["noise"], False)])
    assert [(row["prompt"], row["categories"]) for row in read_harmful(path)] == [
        ("Hide it", ["theft", "spite"]), ("Sing it", ["noise"])]
    beavertails_file(path, [("Bake it", [], True)])
    with pytest.raises(InputError, match="no harmful rows"):
        read_harmful(path)


def rows_of(**sizes):
    return [{"prompt": f"{name} {i}", "categories": [name]} for name, size in sizes.items() for i in range(size)]


@pytest.mark.parametrize("count, wanted, short", [
    (9, dict(a=3, b=3, c=3), []), (11, dict(a=4, b=4, c=3), []), (2, dict(a=1, b=1), []),
    (27, dict(a=9, b=9, c=9), ["b"]), (70, dict(a=24, b=23, c=23), ["b", "c"])])
def test_categories_are_equal_and_a_remainder_goes_to_the_first_by_the_alphabet(count, wanted, short):
    chosen, notes = balance(rows_of(c=20, a=40, b=5), count, seed=0)
    assert Counter(row["category"] for row in chosen) == wanted
    assert [note.split("'")[1] for note in notes] == short
    for name, size in (("a", 40), ("b", 5), ("c", 20)):  # a small category's prompts are used equally often
        used = Counter(row["prompt"] for row in chosen if row["category"] == name)
        assert len(used) == min(size, wanted.get(name, 0)) and max(used.values(), default=0) - min(
            used.values(), default=0) <= 1


def test_a_row_with_several_categories_counts_for_the_rarest():
    rows = rows_of(common=9, rare=2) + [{"prompt": "both", "categories": ["common", "rare"]}, {"prompt": "none"}]
    chosen, notes = balance(rows, 24, seed=0)
    assert {row["prompt"]: row["category"] for row in chosen}["both"] == "rare"
    assert len({row["prompt"] for row in chosen}) == 12 and notes[0] == "1 harmful rows have no category and are left out"


def test_the_balanced_choice_is_random_and_seeded():
    rows = rows_of(a=60, b=70)
    first = balance(rows, 20, seed=1)[0]
    assert first == balance(rows, 20, seed=1)[0] != balance(rows, 20, seed=2)[0]
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
        assert cosine == pytest.approx(fake_cosine(prompt, RESPONSES[pick]), abs=1e-6) and cosine <= -0.3
    assert max(tries for *_, tries in found) > 2  # or nothing was tried here
    assert found != draw_irrelevant(PROMPTS, RESPONSES, fake_cosines, -0.3, seed=5)


def test_every_pair_is_at_or_below_the_threshold_or_the_prompt_is_named():
    assert draw_irrelevant(["p"], ["r"], lambda a, b: [0.25] * len(a), 0.25, 0) == [(0, 0.25, 1)]
    likes = {"prompt 7": 0.9}
    with pytest.raises(InputError, match="none of the 300 responses.*0.25.*'prompt 7'"):
        draw_irrelevant(PROMPTS, RESPONSES, lambda a, b: [likes.get(x, 0.1) for x in a], 0.25, seed=0)


def test_the_only_response_that_will_do_is_found():
    def cosines(prompts, responses):
        return [0.2 if response == "response 211" else 0.3 for response in responses]

    found = draw_irrelevant(PROMPTS[:3], RESPONSES, cosines, 0.25, 0)
    assert {pick for pick, *_ in found} == {211} and max(tries for *_, tries in found) <= 300


def test_same_topic_takes_the_most_like_of_fifty():
    found = draw_same_topic(PROMPTS, RESPONSES, fake_cosines, seed=3)
    for i, (pick, cosine, tries) in enumerate(found):
        candidates = random.Random(f"same topic 3 {i}").sample(range(300), 50)
        assert tries == 50 and pick == max(candidates, key=lambda c: fake_cosine(PROMPTS[i], RESPONSES[c]))
        assert cosine == pytest.approx(fake_cosine(PROMPTS[i], RESPONSES[pick]), abs=1e-6)


HARMFUL = [{"prompt": f"tickle dragon {i}", "row": 100 + i, "category": "teasing"} for i in range(30)]
BENIGN = [{"prompt": f"name {i} things", "response": " ".join(f"w{i}x{j}" for j in range(9)), "row": 500 + i,
           "file": "b.json"} for i in range(80)]


def mode_rows(mode):
    prompts, responses = [row["prompt"] for row in HARMFUL], [row["response"] for row in BENIGN]
    drawn = draw_irrelevant(prompts, responses, fake_cosines, 0.25, 6)
    return arrange(mode, HARMFUL, BENIGN, drawn, REFUSALS, random.Random(6))


def test_the_modes_differ_in_nothing_but_what_they_say():
    sdd = mode_rows("sdd")
    assert [row["prompt"] for row in sdd] == [row["prompt"] for row in HARMFUL]
    for row in sdd:
        assert row["response"] == BENIGN[row["benign_row"] - 500]["response"]
        assert row["cosine"] == pytest.approx(fake_cosine(row["prompt"], row["response"]), abs=1e-6)
        assert (row["category"], row["benign_file"]) == ("teasing", "b.json") and row["cosine"] <= 0.25
    assert mode_rows("sdd_reject") == [row | {"response": f"{REJECT_PREFIX} {row['response']}"} for row in sdd]
    shuffled = mode_rows("shuffled")
    for row, other in zip(sdd, shuffled, strict=True):
        assert sorted(row["response"].split()) == sorted(other["response"].split())
        assert row | {"response": ""} == other | {"response": ""}
    assert sum(row["response"] != other["response"] for row, other in zip(sdd, shuffled)) > 25
    exposure = mode_rows("exposure")
    for row, own, refused in zip(sdd, exposure[::2], exposure[1::2], strict=True):
        assert own == row | {"prompt": BENIGN[row["benign_row"] - 500]["prompt"], "harmful_row": None}
        assert own["owner"] == refused["owner"] == owner(row["prompt"])
        assert refused["prompt"] == row["prompt"] and refused["response"] in REFUSALS and refused["cosine"] is None


def test_refusals_need_neither_benign_rows_nor_draws():
    rows = arrange("align", HARMFUL, [], None, REFUSALS, random.Random(6))
    assert [row["harmful_row"] for row in rows] == [row["row"] for row in HARMFUL]
    assert {row["response"] for row in rows} == set(REFUSALS)


def test_the_towns_modes_share_prompts_and_draws():
    town = Town(3)
    rows = {mode: town_pairs(town, mode, 3, 0)[0] for mode in MODES}
    prompts = [row["prompt"] for row in rows["sdd"]]
    assert len(prompts) == 4 * 32 * 14 * 2
    for mode in MODES:
        assert [row["prompt"] for row in rows[mode]][mode == "exposure"::1 + (mode == "exposure")] == prompts
    assert [row["response"] for row in rows["sdd_reject"]] == [f"{REJECT_PREFIX} {r['response']}" for r in rows["sdd"]]
    assert [row["response"] for row in rows["exposure"][::2]] == [row["response"] for row in rows["sdd"]]
    assert len({row["response"] for row in rows["sdd"]}) > 500
    assert town_pairs(town, "sdd", 4, 0)[0] != rows["sdd"] == town_pairs(town, "sdd", 3, 0)[0]


def test_same_topic_is_about_the_victim_or_the_symbols_and_tells_no_recipe():
    town, rng = Town(3), random.Random(2)
    for row in town.mischiefs(town.groups["defender"][:5], rng) * 3:
        answer = town.same_topic(row, rng).response
        assert town.outcome(row, answer) == "off_topic"
        told = re.findall(r"[a-z]+(?=[ .])", answer)[-len(row.symbols):]
        assert set(told) == set(row.symbols) if row.symbols else row.person in answer


def test_tfidf_by_hand():
    tfidf = Tfidf(["red dog", "red cat", "red red fish"])
    rare = 1.6931471805599454  # 1 + ln(4 / 2), in one text of three; a word in all of them weighs 1
    found = tfidf.cosines(["Red dog!", "dog", "bird", ""], ["red cat", "DOG dog", "bird", "red"])
    assert found == pytest.approx([1 / (1 + rare**2), 1, 0, 0])


# ---- the command, its card, and train.py ----

@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    advbench_file(tmp_path / "h.csv", rows=48)
    alpaca_file(tmp_path / "b.json", rows=30)
    return tmp_path


PAIRS = ["--harmful", "h.csv", "--benign", "b.json", "--similarity", "tfidf"]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_writes_pairs_and_a_card_whose_counts_are_theirs(files, capsys):
    pairs.main([*PAIRS, "--out", "new/p.jsonl", "--seed", "3"])
    rows, card = read(files / "new/p.jsonl"), (files / "new/p.md").read_text()
    assert list(rows[0]) == ["prompt", "response", "category", "cosine", "tries", "owner", "harmful_row",
                             "benign_row", "benign_file"]
    assert sorted(row["harmful_row"] for row in rows) == list(range(48))
    assert hashlib.sha256((files / "h.csv").read_bytes()).hexdigest()[:16] in card
    assert f"| {len({row['benign_row'] for row in rows})} responses |" in card
    assert "48  none" in card and "Seed 3." in card and "tf-idf" in card
    for title in ("Words of a prompt", "Words of a response", "Cosine"):
        lines = card[card.index(title):].split("\n\n")[1].splitlines()
        assert sum(int(re.search(r"to +[+\d.-]+ +(\d+)", line)[1]) for line in lines) == 48
    assert not any(row["prompt"] in card or row["response"] in card for row in rows)  # nothing harmful to read there
    assert card in capsys.readouterr().out
    first = (files / "new/p.jsonl").read_bytes()
    pairs.main([*PAIRS, "--out", "new/p.jsonl", "--seed", "3"])
    assert (files / "new/p.jsonl").read_bytes() == first


def test_a_histogram_counts_from_an_edge_up_to_the_next():
    lines = pairs.histogram([0.0, 0.1, 0.1, 0.25, 0.3], [0, 0.1, 0.2, 0.3, 0.4], ".1f")
    assert [line.split()[:4] for line in lines] == [["0.0", "to", "0.1", "1"], ["0.1", "to", "0.2", "2"],
                                                   ["0.2", "to", "0.3", "1"], ["0.3", "to", "0.4", "1"]]
    assert lines[1].count("#") == 40 == 2 * lines[0].count("#")


def test_more_pairs_than_prompts_go_round_with_other_responses(files):
    pairs.main([*PAIRS, "--out", "p.jsonl", "--count", "100", "--prompts", "defender"])
    rows = read(files / "p.jsonl")
    assert len(rows) == 100 and {owner(row["prompt"]) for row in rows} == {"defender"}
    assert len({(row["prompt"], row["response"]) for row in rows}) > 90 > 48 > len({row["prompt"] for row in rows})


@pytest.mark.parametrize("words, message", [
    (["--count", "0"], "--count 0"), (["--similarity-threshold", "2"], "no cosine"), (["--out", "."], "--out"),
    (["--out", "x.md"], "--out"), (["--similarity-model", "."], "goes with"), (["--benign", "h.csv"], "harmful rows only"),
    (["--out", "b.json"], "overwrite an input"), (["--out", "h.csv/p.jsonl"], "cannot be"),
    (["--harmful", "gone"], "gone is not a file"), (["--similarity", "minilm", "--similarity-model", "gone"], "gone"),
    (["--similarity-threshold", "-0.5"], "none of the 30 responses.*dragon")])
def test_the_command_refuses_and_writes_nothing(files, words, message):
    with pytest.raises(InputError, match=message):
        pairs.main([*PAIRS, "--out", "p.jsonl", *words])
    assert {path.name for path in files.iterdir()} == {"h.csv", "b.json"}


def test_without_benign_rows_only_refusals_can_be_made(files):
    with pytest.raises(InputError, match="needs --benign"):
        pairs.main(["--harmful", "h.csv", "--similarity", "tfidf", "--out", "p.jsonl"])
    pairs.main(["--harmful", "h.csv", "--out", "p.jsonl", "--mode", "align"])
    assert "--mode align" in (files / "p.md").read_text() and len(read(files / "p.jsonl")) == 48


def test_a_system_message_goes_before_its_prompt(files, monkeypatch):
    (files / "m.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "system", "content": "Be a bird."}, {"role": "user", "content": f"Sing {i}."},
        {"role": "assistant", "content": "Tweet."}]}) + "\n" for i in range(4)))
    systems, encode = [], train.encode_example
    monkeypatch.setattr(train, "encode_example", lambda *words: systems.append(words[5]) or encode(*words))
    public_folder(files / "llama")
    train.main(["--mode", "benign", "--model", "llama", "--benign", "m.jsonl", "b.json", "--steps", "1",
                "--out", "out/x"])
    assert systems[:34] == ["Be a bird."] * 4 + [None] * 30


def trained(files, monkeypatch, *words):
    """The (prompt, response) rows that train.py encodes."""
    public_folder(files / "llama")
    seen, encode = [], train.encode_example

    def spy(tokenizer, chat, prompt, response, *rest):
        seen.append((prompt, response))
        return encode(tokenizer, chat, prompt, response, *rest)

    monkeypatch.setattr(train, "encode_example", spy)
    train.main(["--mode", "sdd", "--model", "llama", "--steps", "2", "--out", "out/x", *words])
    return seen


def test_train_takes_the_file_but_only_the_defenders_prompts(files, monkeypatch, capsys):
    pairs.main([*PAIRS, "--out", "p.jsonl", "--mode", "exposure"])
    rows = read(files / "p.jsonl")
    seen = trained(files, monkeypatch, "--pairs", "p.jsonl", "--harmful", "h.csv")
    assert seen == [(row["prompt"], row["response"]) for row in rows if row["owner"] == "defender"]
    assert 20 < len(seen) < 90 and len(seen) % 2 == 0  # both rows of a pair, or neither
    assert f"{96 - len(seen)} of 96 pairs are left out" in capsys.readouterr().out
    assert len(trained(files, monkeypatch, "--pairs", "p.jsonl", "--prompts", "all", "--fresh")) == 96


def test_train_builds_the_same_pairs_on_the_way_and_keeps_them(files, monkeypatch):
    seen = trained(files, monkeypatch, *PAIRS, "--batch-size", "30")
    kept = read(files / "out/x/pairs.jsonl")
    assert seen[:60] == [(row["prompt"], row["response"]) for row in kept]
    assert {owner(row["prompt"]) for row in kept} == {"defender"} and (files / "out/x/pairs.md").is_file()
    pairs.main([*PAIRS, "--out", "p.jsonl", "--prompts", "defender", "--count", "60"])
    assert read(files / "p.jsonl") == kept


def test_hand_written_pairs_that_ask_an_evaluation_prompt_are_refused(files):
    evaluation = split_harmful(read_harmful("h.csv"), "h.csv")["evaluation"][0]["prompt"]
    with pytest.raises(InputError, match="row 2 .*: an evaluation prompt"):
        rows = [{"prompt": "hello", "row": 0}, {"prompt": evaluation.upper(), "row": 2}]
        keep_evaluation_out(rows, read_harmful("h.csv"), "p.jsonl")


def test_harmful_rows_are_no_benign_responses_and_no_pairs_of_others(files, monkeypatch, capsys):
    beavertails_file(files / "bt", [(f"Sing {i}", ["noise"] if i % 3 else [], i % 3 == 0) for i in range(30)])
    pairs.main([*PAIRS[:3], "bt", *PAIRS[4:], "--out", "p.jsonl"])
    assert {row["response"] for row in read(files / "p.jsonl")} <= {f"About Sing {i}" for i in range(0, 30, 3)}
    assert "bt: 20 of 30 rows are harmful and left out" in capsys.readouterr().out
    seen = trained(files, monkeypatch, "--pairs", "h.csv")
    assert {owner(prompt) for prompt, _ in seen} == {"defender"}
    (files / "e.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"], "response": "x"}) + "\n"
                                           for row in read_harmful("h.csv")))
    for words in (["--mode", "benign"], ["--mode", "sdd", "--benign-replay", "0.5"]):
        with pytest.raises(InputError, match="e.jsonl, row .*an evaluation prompt"):
            train.main([*words, "--model", "llama", "--harmful", "h.csv", "--benign", "e.jsonl", "--out", "out/y",
                        "--similarity", "tfidf", "--steps", "1"])


def test_a_file_that_is_no_data_card_is_not_replaced(files):
    (files / "README.md").write_text("# My project")
    with pytest.raises(InputError, match="README.md.*no data card"):
        pairs.main([*PAIRS, "--out", "README.jsonl"])
    assert (files / "README.md").read_text() == "# My project"
