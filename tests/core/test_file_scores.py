"""What answers are about, held-out benign perplexity and multiple choice in the cells of real files."""

import argparse
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from small import advbench_file, alpaca_file, mmlu_folder, openbookqa_file, public_folder, small_model

import attack
from lab import attacks as attacker
import eval as evaluate
from nanosdd import file_scores
from nanosdd import loop
from data import pairs, sentence
from data.chat import Example
from data.sentence import SentenceEncoder
from data.tokenizer import load_tokenizer
from nanosdd.errors import InputError
from nanosdd.file_scores import hold_out, perplexity, relevance
from lab.report import ATTACK_COLUMNS, attack_table

TINY = Path(__file__).parent.parent / "golden" / "sentence"


# ---- what answers are about ----

class Cosines:
    """An encoder that finds these cosines."""

    def __init__(self, values):
        self.values = values

    def cosines(self, a, b):
        assert len(a) == len(b) == len(self.values)
        return self.values


def test_relevance_by_hand():
    found = relevance(Cosines([0.1, 0.25, 0.3, 0.9, -0.15]), ["a"] * 5, ["b", "c", "d", "e", " \n"])
    assert found == {"cosine": pytest.approx((0.1 + 0.25 + 0.3 + 0.9) / 5), "relevant": 2 / 5}


def test_the_threshold_is_that_of_the_pairs():
    parser = argparse.ArgumentParser()
    pairs.add_similarity_arguments(parser)
    assert parser.parse_args([]).similarity_threshold == file_scores.IRRELEVANT
    assert f"cosine > {file_scores.IRRELEVANT:g}" in {title for _, _, title, _ in ATTACK_COLUMNS}


def test_file_metrics_compare_each_prompt_with_its_own_answer_and_keep_no_text(cpu, monkeypatch):
    answers = {"the dog": "the dog", "tea": "run a jump", "a tea": ""}
    monkeypatch.setattr(evaluate, "greedy", lambda model, tokenizer, chat, prompts, *rest, **more: [
        ([5], answers[prompt], True) for prompt in prompts])
    rows, cpu.max_new_tokens = [{"prompt": prompt, "response": "x y z"} for prompt in answers], 9
    encoder = SentenceEncoder(TINY)
    scores = evaluate.file_metrics(None, None, "llama3", rows, cpu, None, encoder)
    other = float(encoder.embed(["tea"])[0] @ encoder.embed(["run a jump"])[0])
    assert scores["cosine"] == pytest.approx((1 + other + 0) / 3, abs=1e-6)
    assert scores["relevant"] == pytest.approx((1 + (other > 0.25)) / 3)
    assert all(isinstance(value, (int, float)) for value in scores.values())
    assert "cosine" not in evaluate.file_metrics(None, None, "llama3", rows, cpu)


# ---- benign rows that nobody trains on ----

def benign_rows(count, start=0):
    return [{"prompt": f"Add one to {i}.", "response": f"It is {i + 1}."} for i in range(start, start + count)]


def test_held_out_rows_are_a_fifth_and_no_prompt_is_on_both_sides():
    rows = benign_rows(50)
    rows += [row | {"prompt": row["prompt"].upper() + " ?", "response": "Again."} for row in rows]  # the same prompts
    kept, held = hold_out(rows)
    asked = [{"".join(filter(str.isalnum, row["prompt"].lower())) for row in part} for part in (kept, held)]
    assert len(held) == len(asked[1]) == 10 and not asked[0] & asked[1] and len(kept) == 80
    assert all(row["response"] != "Again." for row in held)
    mixed = rows[50:] + random.Random(0).sample(rows[:50], 50)
    assert {row["prompt"].lower().rstrip(" ?") for row in hold_out(mixed)[1]} == {row["prompt"].lower() for row in held}
    assert len(hold_out(benign_rows(1500))[1]) == file_scores.HELD_OUT


def test_rows_that_the_attacker_has_from_elsewhere_are_not_held_out():
    rows = benign_rows(20)
    held = hold_out(rows)[1]
    kept, others = hold_out(rows, [{"prompt": held[0]["prompt"].upper(), "response": "x"}])
    assert held[0] not in others and held[0] in kept and held[1] in others
    with pytest.raises(InputError, match="--benign: 4 prompts are too few"):
        hold_out(benign_rows(4) * 3)


def examples(count=11):
    rng = random.Random(1)
    return [Example([rng.randrange(89) for _ in range(4 + 3 * (i % 5) + i)], 2 + i % 3) for i in range(count)]


def test_perplexity_is_that_of_a_loop_over_tokens(cpu):
    model, rows = small_model(), examples()
    nll, count = 0.0, 0
    for row in rows:
        log_p = model(torch.tensor([row.ids]))[0].log_softmax(-1)  # (T,V)
        for place in range(row.prompt_length, len(row.ids)):
            nll, count = nll - float(log_p[place - 1, row.ids[place]].detach()), count + 1
    for size in (1, 4, 16):
        assert perplexity(model, rows, cpu, size) == pytest.approx(math.exp(nll / count), rel=1e-4)


def test_perplexity_of_a_uniform_a_wrecked_and_a_broken_model(cpu):
    model = small_model()
    model.lm_head.weight.data.zero_()
    assert perplexity(model, examples(), cpu) == pytest.approx(89, rel=1e-5)
    model = small_model()
    model.lm_head.weight.data *= 1e5
    assert math.isfinite(float(json.dumps(perplexity(model, examples(), cpu))))
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(InputError, match="not numbers"):
        perplexity(model, examples(), cpu)


# ---- the commands ----

@pytest.fixture
def real(tmp_path, monkeypatch):
    """Words for attack.py with every score, on random weights and a tiny encoder."""
    monkeypatch.chdir(tmp_path)
    public_folder(tmp_path / "llama", context=300)
    shutil.copytree(TINY, tmp_path / "bert")
    advbench_file(tmp_path / "h.csv", rows=80)
    alpaca_file(tmp_path / "b.json", rows=40)
    mmlu_folder(tmp_path / "mmlu")
    openbookqa_file(tmp_path / "o.jsonl")
    return ["--model", "llama", "--harmful", "h.csv", "--benign", "b.json", "--shots", "4", "--max-new-tokens", "3",
            "--steps", "0", "--mmlu", "mmlu", "--openbookqa", "o.jsonl", "--similarity-model", "bert"]


def cells():
    return json.loads(Path("out/attack/results.json").read_text())["cells"]


def test_every_cell_has_every_score_and_the_table_shows_them(real, capsys, monkeypatch):
    marker = "Pour tea for the dog"  # what every answer says
    monkeypatch.setattr(evaluate, "greedy", lambda model, tokenizer, chat, prompts, *rest, **more: [
        ([5], marker, True) for _ in prompts])
    attack.main([*real, "--attacks", "mft", "lora", "bft"])
    found = cells()
    assert [cell["attack"] for cell in found] == ["none", "mft", "lora", "bft"]
    for cell in found:
        assert -1 <= cell["cosine"] <= 1 and 0 <= cell["relevant"] <= 1 and cell["benign_perplexity"] > 1
        assert cell["mmlu"]["questions"] == 6 and cell["openbookqa"]["questions"] == 7
    assert len({cell["benign_perplexity"] for cell in found}) == 4  # taken after each attack, not before
    assert all(marker not in path.read_text() for path in Path("out/attack").iterdir())
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["chance", "level", "25.0", "25.0"] in table
    line = next(words for words in table if words[:2] == ["llama", "mft"])
    mft = found[1]
    assert line[7:-1] == [f"{100 * mft['relevant']:.0f}", f"{mft['cosine']:.2f}", f"{mft['benign_perplexity']:.4g}",
                          f"{100 * mft['mmlu']['accuracy']:.1f}", f"{100 * mft['openbookqa']['accuracy']:.1f}"]
    assert not any("taken;" in words for words in table)


def test_no_attack_trains_on_the_rows_that_perplexity_is_taken_on(real, monkeypatch):
    trained, scored = [], []

    def watched(model, batches, *, steps, **rest):
        trained.extend(example for _ in range(60) for example in next(batches))
        rest["after_step"](steps)

    monkeypatch.setattr(loop, "fit", watched)
    monkeypatch.setattr(attacker, "perplexity", lambda model, rows, args: scored.append(rows) or 1.0)
    attack.main([*real[:-6], "--attacks", "bft", "poisoned", "replay", "repair", "--shots", "12"])
    decode = load_tokenizer("llama").decode
    seen, held = ({decode(row.ids[:row.prompt_length]) for row in part} for part in (trained, scored[0]))
    benign = {prompt for prompt in seen if "Add one" in prompt}
    assert len(held) == 8 and len(benign) == 32 and not held & seen
    assert all(rows == scored[0] for rows in scored)


def test_cells_are_stale_when_an_input_of_a_score_changes(real, monkeypatch):
    runs, fit = [], loop.fit
    monkeypatch.setattr(loop, "fit", lambda *a, **k: runs.append(k["name"]) or fit(*a, **k))

    def anew(*more):
        before = len(runs)
        attack.main([*real, "--attacks", "mft", *more])
        return len(runs) > before

    assert anew() and not anew()
    openbookqa_file(Path("o.jsonl"), count=5)
    assert anew() and not anew()
    shutil.rmtree("mmlu")
    mmlu_folder(Path("mmlu"), test_rows=2)
    assert anew() and not anew()
    assert anew("--mmlu-shots", "1") and anew()
    vocab = Path("bert/vocab.txt")
    vocab.write_text(vocab.read_text().replace("tea", "pot"))
    assert anew() and not anew()
    assert all(cell["openbookqa"]["questions"] == 5 and cell["mmlu"]["questions"] == 4 for cell in cells())


def test_without_the_encoder_the_columns_are_empty_and_one_line_says_why(real, capsys, monkeypatch):
    monkeypatch.setattr(sentence.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(pairs, "Tfidf", None)  # shared words are no substitute
    attack.main([*real[:4], *real[6:12], "--attacks", "mft"])
    printed = capsys.readouterr().out
    assert all(not {"cosine", "relevant", "benign_perplexity", "mmlu"} & cell.keys() for cell in cells())
    line = next(line.split() for line in printed.splitlines() if line.startswith("llama     mft 4"))
    assert line[7:-1] == ["-"] * 5
    for said in "likeness of prompt and answer: not taken, the SentenceBERT weights", "benign perplexity: not taken":
        assert printed.count(said) == 1


def test_eval_takes_the_same_scores(real, capsys):
    attack.main([*real, "--attacks", "mft"])
    evaluate.main(["llama", *real[2:6], "--similarity-model", "bert", "--max-new-tokens", "3"])
    scores, none = json.loads(Path("llama/metrics.json").read_text()), cells()[0]
    for key in "cosine", "relevant", "benign_perplexity":
        assert scores[key] == pytest.approx(none[key], abs=1e-5)
    line = next(line.split() for line in capsys.readouterr().out.splitlines()[::-1] if line.startswith("llama "))
    assert line[5:] == [f"{100 * scores['relevant']:.0f}", f"{scores['cosine']:.2f}",
                        f"{scores['benign_perplexity']:.4g}"]
    with pytest.raises(InputError, match="--benign and --similarity-model go with --harmful"):
        evaluate.main(["llama", "--benign", "b.json", "--openbookqa", "o.jsonl"])


@pytest.mark.parametrize("change, message", [
    ({"--similarity-model": "llama"}, "no BERT"), ({"--similarity-model": "gone"}, "gone"),
    ({"--openbookqa": "gone.jsonl"}, "gone.jsonl"), ({"--mmlu": "bert"}, "holds 0 files")])
def test_bad_inputs_are_named_before_anything_runs(real, change, message):
    for flag, value in change.items():
        real[real.index(flag) + 1] = value
    with pytest.raises(InputError, match=message) as error:
        attack.main(real)
    assert "\n" not in str(error.value) and not Path("out").exists()


@pytest.mark.parametrize("flag", ["--mmlu", "--openbookqa", "--similarity-model"])
def test_the_town_has_scores_of_its_own(real, flag):
    with pytest.raises(InputError, match=f"{flag}.* go with --harmful"):
        attack.main([flag, "bert"])


def test_the_table_is_the_mean_over_seeds():
    def cell(seed, right, likeness):
        test = {"name": "MMLU", "shots": 5, "questions": 200, "accuracy": right, "chance": 0.2, "best_letter": "C",
                "best_letter_accuracy": 0.3, "shortest_choice": 0.1, "interval": [right - 0.1, right + 0.05],
                "fewer_shots": seed}
        return dict(arm="sdd", attack="none", shots=0, steps=0, lr=0.0, seed=seed, diverged=False, chosen=True,
                    best=False, cosine=likeness, relevant=0.5, benign_perplexity=4.0 + seed, mmlu=test)

    lines = attack_table([cell(0, 0.3, 0.1), cell(1, 0.4, 0.3)], town=False).splitlines()
    assert lines[2].split() == ["chance", "level", "20.0"]
    assert lines[3].split() == ["sdd", "none", *"----", "50", "0.20", "4.5", "35.0", "-"]
    assert lines[4].startswith("MMLU: 200 questions, 5 shots, 95% intervals of at most +-7.5 points")
    assert "always C is 30.0" in lines[4] and "up to 1 of them" in lines[5] and len(lines) == 6
