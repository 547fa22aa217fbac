"""The benchmark's plumbing on tiny inputs; no figure of it is tested."""

import json
import random
from pathlib import Path

import pytest
import torch
from small import advbench_file, alpaca_file, small_config, small_model, town_tokenizer

from bench import speed as bench
from bench import pairs as bench_pairs
from data.chat import Example
from data.sentence import SentenceEncoder
from nanosdd.errors import InputError

TINY = Path(__file__).parent.parent / "golden" / "sentence"


def test_pairs_are_the_same_both_ways(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bench.main(["pairs", "--harmful", str(advbench_file(tmp_path / "h.csv")), "--pairs", "60", "--responses", "45",
                "--benign", str(alpaca_file(tmp_path / "b.json")), "--similarity-model", str(TINY),
                "--similarity-threshold", "0.97"])
    printed = capsys.readouterr().out
    assert "60 of 60 pairs are the same both ways" in printed and "the obvious way" in printed
    rows = json.loads((tmp_path / "out/bench.json").read_text())["pairs"]["runs"]
    assert [round(row["pairs_per_second"] * row["seconds"]) for row in rows] == [60, 60, 60]


def test_the_obvious_way_draws_again():
    pool = ["a dog", "tea", "run jump", "a cafe"]
    found = bench_pairs.obvious_pairs(["the dog"] * 20, pool, 0.99, SentenceEncoder(TINY))
    assert len(found) == 20 and max(tries for *_, tries in found) > 1 and max(cosine for _, cosine, _ in found) <= 0.99


def test_a_pool_is_grown_from_sentences():
    grown = bench_pairs.grow(["One. Two three.", "Four!"], 30, random.Random(1))
    assert grown[:2] == ["One. Two three.", "Four!"] and len(grown) == 30
    assert {sentence for text in grown for sentence in ("One.", "Two three.", "Four!") if sentence in text} == {
        "One.", "Two three.", "Four!"}
    assert {text.count(".") + text.count("!") for text in grown} == {1, 2}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Arguments for files in a public layout, a small tokenizer and a small shape, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(bench.SHAPES, "small", dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                                                    num_attention_heads=4, num_key_value_heads=2,
                                                    tie_word_embeddings=True))
    (tmp_path / "tokenizer").mkdir()
    town_tokenizer(tmp_path / "tokenizer")
    return ["--harmful", str(advbench_file(tmp_path / "h.csv")), "--benign", str(alpaca_file(tmp_path / "b.json")),
            "--tokenizer", str(tmp_path / "tokenizer"), "--rounds", "2", "--device", "cpu"]


def test_training_is_measured_and_everybodys_losses_compared(tiny, capsys, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda package: None)  # no peers, even where there are
    bench.main(["train", *tiny, "--batches", "3", "--batch-size", "5"])
    printed = capsys.readouterr().out
    assert printed.count("not installed") == 3 and "differ by at most" in printed
    found = json.loads(Path("out/bench.json").read_text())["train"]
    assert found["response_tokens"] < found["tokens"]
    ours, again = found["runs"]["nanoSDD"], found["runs"]["nanoSDD, activations checkpointed"]
    assert len(ours) == len(again) == 2 and all(run["seconds"] > 0 and run["peak_bytes"] > 2**20 for run in ours)
    assert len(ours[0]["losses"]) == 6  # 3 batches to warm up, 3 timed
    assert ours[0]["losses"] == pytest.approx(again[1]["losses"], abs=1e-5)


def test_decoding_is_measured(tiny, capsys, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda package: None)
    bench.main(["decode", *tiny, "--prompts", "7", "--new-tokens", "6", "--stop-share", "0.2"])
    printed = capsys.readouterr().out
    assert printed.count("not installed") == 3 and "7 of 7" in printed and "1 of 1" in printed
    assert set(json.loads(Path("out/bench.json").read_text())["decode"]["runs"]) > {"nanoSDD", "nanoSDD, one prompt"}


def test_a_run_that_fails_is_one_line(tiny, monkeypatch):
    args = bench.parser().parse_args(["decode", *tiny, "--dtype", "fp32"])
    with pytest.raises(InputError, match="decode_nanosdd: .*nowhere"):
        bench.measure(dict(run="decode_nanosdd", folder="nowhere"), args)


@pytest.mark.parametrize("command, message", [
    (["train"], "--harmful and --benign and --tokenizer"), (["decode", "--benign", "b"], "--tokenizer"),
    (["town", "--rounds", "0"], "--rounds"),
    (["decode", "--benign", "b", "--tokenizer", "t", "--stop-share", "2"], "2.0")])
def test_what_is_missing_is_named(command, message):
    with pytest.raises(InputError, match=message):
        bench.main(command)


def test_useful_flops_by_hand():
    config = small_config(vocab_size=89, hidden_size=48, intermediate_size=80)  # 2 layers, 6 heads on 2, of 10
    layer = 48 * 60 + 2 * 48 * 20 + 60 * 48 + 3 * 48 * 80
    rows = [Example(list(range(12)), 5), Example(list(range(4)), 3)]  # 11 and 3 tokens read, 7 and 1 of responses
    expected = 6 * 2 * layer * 14 + 6 * 89 * 48 * 8 + 6 * 2 * 60 * (11**2 + 3**2)
    assert bench.useful_flops(config, [rows[:1], rows[1:]]) == expected


def test_answers_may_part_at_ties_only():
    model, prompts = small_model(), [[5, 9, 2], [3], [8]]
    with torch.no_grad():
        logits = model(torch.tensor([[5, 9, 2, 40]]))[0, -1]
    same, gap = bench.same_answers(model, prompts, [[40, 1], [6], [7]], [[40, 2], [6], [7]])
    assert same == 2 and gap == pytest.approx(abs(float(logits[1] - logits[2])))
    assert bench.same_answers(model, prompts, [[40], [6], [7]], [[40, 2], [6], [7]])[1] == float("inf")


def test_the_towns_time_and_where_it_goes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = []

    def run(command, cwd, **_):
        commands.append([Path(part).name for part in command[1:]])
        folder = Path(cwd) / "out" / ("attack" if "attack.py" in commands[-1] else "seed0/sdd")
        folder.mkdir(parents=True)  # fails where an earlier round's is left
        (folder / "train_log.jsonl").write_text('{"seconds": 40.0}\n{"seconds": 2.0}\n')
        (folder / "results.json").write_text('{"cells": [{"seconds": 17.0}, {"diverged": true}]}')
        return bench.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(bench.subprocess, "run", run)
    bench.main(["town", "--rounds", "2", "--device", "cpu"])
    assert commands == [["train.py", "--mode", "sdd"], ["attack.py"]] * 2
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["the", "steps", "of", "sdd", "42"] in lines
    assert ["attacks", "and", "scores", "of", "2", "cells", "17"] in lines
