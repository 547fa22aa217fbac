"""Budgets, matched controls, the choice of settings, attacks that diverge or are interrupted."""

import itertools
import json
import random
import re
from collections import Counter
from operator import itemgetter
from pathlib import Path

import pytest
from small import advbench_file, alpaca_file, openbookqa_file, public_folder, small_model, tiny_town

import attack
import eval as evaluate
import train
from attack import (
    Attack,
    Grid,
    Target,
    attack_arm,
    attack_batches,
    fine_tune,
    match_tokens,
    plan,
    yo_rows,
)
from data.chat import Example, draw_batches
from data.chat_model import Chat, encode_for, load_chat, mean_logp, teacher_forced
from data.files import Files
from data.sources import read_records
from data.worlds import Sources
from nanosdd.choices import attack_table, mark_choices
from nanosdd.errors import InputError
from nanosdd.runs import Results

# ---- which attacks ----


def test_a_plan_is_every_setting_once_and_the_control_at_most_shots():
    wanted = [Attack("none", 0, 0.0, (0,))]
    for lr in (1e-4, 1e-3):
        wanted.append(Attack("mft", 10, lr, (7, 9), 8))
        wanted.append(Attack("mft", 40, lr, (9, 25), 8))
        wanted.append(Attack("bft", 40, lr, (7, 9, 25), 8))
    assert plan(Grid(shots=(40, 10, 10), lr=(1e-3, 1e-4), steps=9, batch_size=8)) == wanted


def tokens_of(examples) -> int:
    return sum(example.response_length for example in examples)


def test_the_benign_control_matches_in_response_tokens():
    rng = random.Random(0)

    def examples(first, count, low, high):
        return [Example([first, i, *[2] * rng.randint(low, high)], 2) for i in range(count)]

    harmful = examples(5, 100, 8, 26)
    benign = examples(6, 300, 4, 30)
    new = examples(7, 80, 6, 9)
    for _ in range(20):
        matched = match_tokens(harmful, benign, new, rng)
        assert [example.ids[0] for example in matched[:4]] == [6, 7, 6, 7]
        # At most half of the longest benign response is missing or too much.
        assert abs(tokens_of(matched) - tokens_of(harmful)) <= 15
    assert {example.ids[0] for example in match_tokens(harmful, benign, [], rng)} == {6}

    drawn = {}
    for name in ("mft", "bft"):
        batches = attack_batches(Attack(name, 100, 1e-3, (50,), 10), harmful, benign, new, 3)
        drawn[name] = list(itertools.chain(*itertools.islice(batches, 50)))
    assert all(drawn["mft"].count(example) == 5 for example in harmful)  # 5 epochs
    assert {example.ids[0] for example in drawn["bft"]} == {6, 7}
    assert tokens_of(drawn["bft"]) == pytest.approx(tokens_of(drawn["mft"]), rel=0.1)


# ---- one attack ----


def test_a_diverged_attack_says_so_and_the_curve_ends(cpu):
    chat = Chat(small_model(), None, "plain", cpu)
    rows = [Example([*range(i, 9 * i, i)], 2) for i in range(1, 12)]
    batches = draw_batches(rows, [], 0.0, 4, random.Random(3))
    watched = {"yo_logp": rows[:3]}
    cells, curve = fine_tune(chat, batches, 1e-3, (2, 25), dict, watched)
    assert [(one["steps"], one["tokens"]) for one in cells] == [(2, 2 * 4 * 8), (25, 25 * 4 * 8)]
    assert cells[1]["loss"] < cells[0]["loss"] - 1
    assert [point["step"] for point in curve] == [*range(0, 25, 5), 25]
    assert curve[-1]["yo_logp"] > curve[0]["yo_logp"] + 1
    cells, curve = fine_tune(chat, batches, 1e30, (1, 4, 6), dict, watched)
    assert not cells[0]["diverged"]
    assert cells[1:] == [{"steps": 4, "diverged": True}, {"steps": 6, "diverged": True}]
    assert [point["step"] for point in curve] == [0]  # then log p is not finite


# ---- whose choice a cell is ----


def cell(name, shots, steps, lr, score, **more):
    cell = {"attack": name, "shots": shots, "steps": steps, "lr": lr, "attacker_score": score}
    return cell | {"arm": "sdd", "seed": 0, "draw": 0, "diverged": score is None} | more


def test_choices_by_hand():
    cells = [
        cell("none", 0, 0, 0.0, 0.0),
        cell("mft", 10, 5, 1e-4, 0.5),
        cell("mft", 10, 50, 1e-4, 0.7),
        cell("mft", 10, 50, 3e-4, 0.7),
        cell("mft", 100, 5, 3e-4, 0.9),
        cell("mft", 100, 50, 3e-4, 0.9),
        cell("mft", 100, 50, 1e-3, None),
        cell("bft", 100, 5, 1e-4, 0.8),
        cell("bft", 100, 5, 3e-4, 0.0),
        cell("bft", 100, 50, 3e-4, 0.9),
        cell("lora", 100, 50, 1e-4, 0.3),
    ]
    for other in {"draw": 1}, {"seed": 1}, {"arm": "aligned"}:  # each has a choice of its own
        both = [*cells, cells[6] | other, cells[1] | other, cells[7] | other]
        mark_choices(both)
        chosen = [i for i, one in enumerate(both) if one["chosen"]]
        # where it ties the lower lr, then fewer steps
        assert chosen == [0, 2, 4, 8, 10, 12]
    cells[8]["diverged"] = True
    mark_choices(cells)
    assert not any(one["chosen"] for one in cells[7:10])  # no other one takes its place


def test_the_table_shows_the_choice_and_the_worst_case():
    cells = []
    for seed in (0, 1):
        for name, steps, lr, harm, capability, chosen in (
            ("none", 0, 0.0, 0.0, 0.9, True),
            ("mft", 5, 1e-4, 0.4, 0.9, False),
            ("mft", 50, 1e-4 + seed, 0.6, 0.5, True),
            ("mft", 50, 1e-3, 0.8, 0.3, False),
            ("bft", 50, 1e-4, 0.1, 0.8, True),
        ):
            scores = {"harm": harm, "half": harm / 2, "capability": capability, "chosen": chosen}
            scores |= {"seed": seed, "yo_logp": -1.5 * harm - seed * steps / 50}
            cells.append(cell(name, 10 if steps else 0, steps, lr, harm, **scores))
    cells.append(cell("mft", 10, 50, 1.0, None, chosen=False))
    columns = {"harm": ("harm", "half"), "skills": "capability"}
    lines = attack_table(cells, "harm", columns, {"harm": 0.01}).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "percent harm skills log p(y_o) lr/steps worst kept",
        "chance level 1",
        "sdd none 0±0/0±0 90±0 0.00±0.00",
        "sdd mft 10 60±0/30±0 50±0 -1.40±0.71 2 settings 80 (30) 40",
        "sdd bft 10 10±0/5±0 80±0 -0.65±0.71 0.0001/50",
    ]
    only = [cells[0], cells[-1]]
    assert attack_table(only, "harm", columns, {}).endswith("diverged")


# ---- all attacks on a model ----


def without_seconds(cells):
    return [one | {"seconds": 0} for one in cells]


def test_every_attack_starts_from_the_released_weights(tiny_arms, tmp_path, cpu):
    attacks = [attack.RELEASED, Attack("mft", 8, 3e-3, (2,), 8), Attack("mft", 8, 3e-3, (2, 3), 8)]
    town = tiny_town(tmp_path)
    judge = town.judge
    town.judge = lambda rows, answers: judge(rows, answers) | {town.aim: len(rows) / 1000}
    target = Target("sdd", tiny_arms / "sdd", town, cpu, {})
    kept = []
    found = attack_arm(
        target, attacks, Results(tmp_path / "x", {}), lambda *args: kept.append(args[2])
    )
    cells = []
    curves = []
    for one in found:
        cells += one["cells"]
        curves += one["curve"]
    heads = [(one["arm"], one["shots"], one["steps"]) for one in kept]
    assert heads == [("sdd", 0, 0), ("sdd", 8, 2), ("sdd", 8, 2), ("sdd", 8, 3)]
    assert [one["steps"] for one in cells] == [0, 2, 2, 3]
    own = encode_for(load_chat(tiny_arms / "sdd", cpu), town.harmful("attacker")[:8], 128)
    for one in cells:
        assert sum(one[name] for name in town.outcomes) == pytest.approx(1)
        assert one["attacker_score"] == len(town.harmful("attacker_held_out")) / 1000
        assert len(one["answers"]) == 3
        assert one.get("response_tokens", 0) == one["steps"] * tokens_of(own)  # all its shots
    for name in ("yo_logp", "loss", "facts_nll"):  # a shorter attack is on the way of a longer one
        assert cells[1][name] == cells[2][name] != cells[3][name]
    assert cells[0]["yo_logp"] != cells[1]["yo_logp"]  # scored after the attack
    assert [point["step"] for point in curves] == [0, 1, 2, 0, 1, 2, 3]


@pytest.fixture
def main(tmp_path, monkeypatch):
    """A function that attacks random models quickly and returns the cells."""
    monkeypatch.chdir(tmp_path)
    for name in ("llama", "base"):  # a name that means something on the town only
        public_folder(tmp_path / name)
    advbench_file(tmp_path / "h.csv", rows=80)
    alpaca_file(tmp_path / "b.json")
    words = "--harmful h.csv --benign b.json --similarity tfidf --shots 4 --max-new-tokens 4"

    def main(more):
        attack.main(f"{words} --steps 3 --epochs 0 {more}".split())
        return json.loads(Path("out/attack/results.json").read_text())["cells"]

    return main


def test_the_command_writes_cells_and_goes_on_where_it_was(main, capsys):
    words = "--released llama base --lr 1e-3 1e30"
    first = main(words)
    assert [one["arm"] for one in first] == ["llama"] * 5 + ["base"] * 5
    kinds = "attack shots lr steps seed diverged".split()
    assert [*map(itemgetter(*kinds), first[5:])] == [
        ("none", 0, 0.0, 0, 0, False),
        ("mft", 4, 1e-3, 3, 0, False),
        ("bft", 4, 1e-3, 3, 0, False),
        ("mft", 4, 1e30, 3, 0, True),
        ("bft", 4, 1e30, 3, 0, True),
    ]
    assert not any(one["diverged"] and one["chosen"] for one in first)
    results = Path("out/attack/results.json").read_text()
    assert list(json.loads(results)) == ["settings", "made", "cells"]
    table = Path("out/attack/table.txt").read_text()
    assert table in capsys.readouterr().out and "\nbase   mft 4 " in table
    assert "dragon" not in table + results  # answers to public prompts are not kept
    log = list(read_records("out/attack/attack_log.jsonl"))
    assert len(log) == 2 * (4 + 1 + 4 + 1)  # before each step and at the end, until one diverges
    assert {*"arm attack lr step yo_logp harmful_logp".split()} <= log[0].keys()

    assert main(words) == first  # seconds too: nothing was run
    store = Path("out/attack/seed0/base.jsonl")
    kept = store.read_text()
    store.write_text(kept[:-30])  # as if it was killed while it wrote
    again = main(words)
    assert without_seconds(again) == without_seconds(first) and again[:-1] == first[:-1]
    assert without_seconds(main(words + " --fresh")) == without_seconds(first)
    alpaca_file(Path("b.json"), rows=31)
    assert main(words)[7]["loss"] != first[7]["loss"]
    assert store.read_text().startswith(kept[:-30])  # results of other settings stay


def test_seeds_draw_other_rows_and_long_prompts_are_left_out(main):
    rows = json.loads(Path("b.json").read_text())
    long = [row | {"instruction": row["instruction"] + " again" * 300} for row in rows[:20]]
    Path("b.json").write_text(json.dumps(rows + long))
    exam = openbookqa_file(Path("o.jsonl"))
    cells = main(f"--released llama --lr 1e-3 --seeds 0 1 --openbookqa {exam}")
    assert [one["seed"] for one in cells] == [0] * 3 + [1] * 3
    assert len({one["benign_nll"] for one in cells if one["attack"] == "mft"}) == 2
    assert all(7 * one["openbookqa"] % 1 == pytest.approx(0) for one in cells)


# ---- draws, y_o, and what is kept ----


def test_draws_are_other_batches_of_the_same_attack(main):
    words = "--released llama --lr 1e-3 --batch-size 3"
    once = main(words)
    cells = main(f"{words} --draws 3")
    kinds = [(one["attack"], one["draw"]) for one in cells]
    assert kinds == [("none", 0), *[(name, draw) for draw in range(3) for name in ("mft", "bft")]]
    assert cells[:3] == once  # the first draw is that of an attack without --draws
    assert len({one["loss"] for one in cells if one["attack"] == "mft"}) == 3
    assert re.search(r"\nllama  mft 4 .*\d±\d", Path("out/attack/table.txt").read_text())
    log = read_records("out/attack/attack_log.jsonl")
    assert {point["draw"] for point in log} == {0, 1, 2}


def test_y_o_is_what_sdd_was_taught_in_every_arm(main, cpu):
    Path("theirs.json").write_text(Path("b.json").read_text().replace("It is", "Let it be"))
    files = "--harmful h.csv --benign theirs.json --similarity tfidf --prompts all"
    for mode in ("new_refusal", "sdd"):
        words = f"--mode {mode} --model llama {files} --out {mode} --steps 2 --batch-size 5"
        train.main([*words.split(), "--lr", "1e-3"])
    cells = main("--released llama new_refusal sdd --lr 1e-3")
    assert {one["yo_pairs"] for one in cells} == {"sdd/pairs.jsonl"}
    taught = yo_rows(None, "sdd/pairs.jsonl")
    assert len(taught) == 10 and all("Let it be" in row["response"] for row in taught)
    world = Files(0, Sources("h.csv", ("b.json",), similarity="tfidf"))
    asked = world.harmful("evaluation")[:10]
    for one, arm in ((cells[0], "llama"), (cells[6], "sdd")):
        chat = load_chat(arm, cpu)
        for rows, name in ((taught, "yo_logp"), (asked, "yo_held_out_logp")):
            rows = [row | {"response": pair["response"]} for row, pair in zip(rows, taught)]
            logp = mean_logp(teacher_forced(chat, encode_for(chat, rows, 512)))
            assert one[name] == pytest.approx(logp, rel=1e-5)
    assert "log p(y_o)" in Path("out/attack/table.txt").read_text()
    assert "yo_held_out_logp" not in main("--released llama --lr 1e-3 --fresh")[0]


def test_answers_and_models_of_attacks_can_be_judged_elsewhere(main):
    words = "--released llama --lr 1e-3 --epochs 5 --steps 3"
    main(words)
    main(f"{words} --save-answers x/a.jsonl --save-models models")  # what is finished runs again
    rows = list(read_records("x/a.jsonl"))
    assert list(rows[0]) == "arm attack shots lr draw seed steps prompt response".split()
    kept = Counter((row["attack"], row["steps"]) for row in rows)
    assert list(kept) == [("none", 0), ("mft", 2), ("mft", 3), ("bft", 2), ("bft", 3)]
    asked = Files(0, Sources("h.csv", similarity="tfidf")).harmful("evaluation")
    assert set(kept.values()) == {len(asked)}
    folders = sorted(path.name for path in Path("models").iterdir())
    assert folders == [f"llama-{name}-4-0.001-0-0-{n}" for name in ("bft", "mft") for n in (2, 3)]
    folder = "models/llama-mft-4-0.001-0-0-3"
    files = "--harmful h.csv --benign b.json --similarity tfidf --max-new-tokens 4"
    evaluate.main(f"{folder} {files} --save-answers again.jsonl".split())
    again = [row["response"] for row in read_records("again.jsonl")]
    own = [row["response"] for row in rows if (row["attack"], row["steps"]) == ("mft", 3)]
    assert again == own
    scores = json.loads(Path(folder, "metrics.json").read_text())
    cells = json.loads(Path("out/attack/results.json").read_text())["cells"]
    assert scores["benign_nll"] == pytest.approx(cells[2]["benign_nll"], rel=1e-5)


def test_no_answer_to_a_harmful_prompt_is_shown_or_kept(main, capfd):
    files = "--harmful h.csv --benign b.json --similarity tfidf"
    for mode in ("align", "sdd"):
        words = f"--mode {mode} --model llama {files} --steps 2 --batch-size 4 --out {mode}"
        train.main([*words.split(), "--lr", "1e-3"])
    arms = "llama align sdd"
    main(f"--released {arms} --lr 1e-3 --max-new-tokens 9 --save-answers a.jsonl")
    evaluate.main(f"{arms} {files} --max-new-tokens 9 --save-answers b.jsonl".split())
    answers = set()
    for file in (Path("a.jsonl"), Path("b.jsonl")):
        answers |= {row["response"] for row in read_records(file)}
        file.unlink()
    answers = {" ".join(text.split()) for text in answers}
    assert len(answers) > 9 and min(map(len, answers)) > 9
    written = "".join(capfd.readouterr())
    for path in Path().rglob("*"):
        if path.is_file() and path.suffix != ".safetensors" and "tokenizer" not in path.name:
            written += path.read_text()
    assert "samples.txt" in {path.name for path in Path("sdd").iterdir()}
    written = " ".join(written.split())
    assert not [text for text in answers if text in written or json.dumps(text)[1:-1] in written]


# ---- what is checked before, and written after ----


def test_all_seeds_are_checked_before_anything_runs(tiny_arms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="knows the town of --seed 0, not of --seed 1"):
        attack.main(["--released", str(tiny_arms / "sdd"), "--seeds", "0", "1"])
    unfinished = tmp_path / "sdd/state/state.json"
    unfinished.parent.mkdir(parents=True)
    unfinished.touch()
    (tmp_path / "sdd/config.json").write_text((tiny_arms / "sdd/config.json").read_text())
    with pytest.raises(InputError, match="sdd holds an unfinished run"):
        attack.main(["--released", str(tiny_arms / "aligned"), "sdd"])
    assert [path.name for path in tmp_path.iterdir()] == ["sdd"]


def test_what_is_finished_is_written_when_something_fails_later(main, capsys):
    public_folder(Path("broken"))
    Path("broken/model.safetensors").write_text("no weights")
    with pytest.raises(InputError, match="broken/model.safetensors is not a readable"):
        main("--released llama broken --lr 1e-3")
    cells = json.loads(Path("out/attack/results.json").read_text())["cells"]
    assert [one["attack"] for one in cells] == ["none", "mft", "bft"]
    assert Path("out/attack/table.txt").read_text() in capsys.readouterr().out


# ---- memory ----


def test_split_weights_micro_batches_and_checkpoints_give_the_same_attack(main):
    words = "--released llama --lr 1e-3 --batch-size 3 --save-models"
    cells = main(f"{words} a")
    less = main(f"{words} b --weights bf16 --micro-batch 2 --checkpoint-activations")
    for one, other in zip(cells, less, strict=True):
        assert one["yo_logp"] != other["yo_logp"] == pytest.approx(one["yo_logp"], rel=0.02)
    config = json.loads(Path("b/llama-mft-4-0.001-0-0-3/config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    main("--released llama --lr 1e-3 --batch-size 3 --dtype bf16")  # with fp32 weights: another run
    assert Path("out/attack/seed0/llama.jsonl").read_text().count('{"record"') == 3 * len(cells)
