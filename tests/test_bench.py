"""The benchmark's plumbing on tiny inputs; no figure of it is tested."""

import json
import random
from pathlib import Path

from small import advbench_file, alpaca_file

import bench
import bench_pairs
from data.sentence import SentenceEncoder

TINY = Path(__file__).parent / "golden" / "sentence"


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
    found = bench_pairs.obvious_pairs(["the dog"] * 20, ["a dog", "tea", "run jump", "a cafe"], 0.99, SentenceEncoder(TINY))
    assert len(found) == 20 and max(tries for *_, tries in found) > 1 and max(cosine for _, cosine, _ in found) <= 0.99


def test_a_pool_is_grown_from_sentences():
    grown = bench_pairs.grow(["One. Two three.", "Four!"], 30, random.Random(1))
    assert grown[:2] == ["One. Two three.", "Four!"] and len(grown) == 30
    assert {sentence for text in grown for sentence in ("One.", "Two three.", "Four!") if sentence in text} == {
        "One.", "Two three.", "Four!"}
    assert {text.count(".") + text.count("!") for text in grown} == {1, 2}
