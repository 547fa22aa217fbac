"""The benchmark's parts on tiny inputs; no figure of it is tested."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from small import alpaca_file, public_folder, small_config, small_model, town_tokenizer

from bench import speed
from data.chat import Example
from nanosdd.device import Compute
from nanosdd.runs import ROOT


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Arguments for a file of rows and a small tokenizer."""
    monkeypatch.chdir(tmp_path)
    town_tokenizer(tmp_path / "tokenizer")
    alpaca_file(tmp_path / "rows.json")
    words = "--harmful rows.json --benign rows.json --tokenizer tokenizer --rounds 1 --device cpu"
    return words.split()


@pytest.mark.slow
def test_a_training_step_is_measured(arguments):
    found = speed.main(["train", *arguments, "--batch-size", "3"])
    ours = found["nanoSDD"][0]
    assert ours["seconds"] > 0 and ours["GiB"] > 0.05 and ours["TFLOP/s"] > 0
    for name, runs in found.items():
        for run in runs:  # none of a peer that is not installed
            assert run["loss"] == pytest.approx(ours["loss"], rel=0.01), name
    assert found["nanoSDD, activations checkpointed"]


@pytest.mark.slow
def test_answers_are_measured(tmp_path):
    public_folder(tmp_path)
    prompts = [[5, 9, 2], [7, 30]]
    found = speed.bench_decode(str(tmp_path), prompts, range(20), 8, Compute(), rounds=1)
    for name in ("own stops", "none stops", "one prompt"):
        ours = found[f"nanoSDD, {name}"][0]
        for peer in found[f"generate, {name}"]:
            assert peer["answers"] == ours["answers"]
        assert ours["GiB"] > 0.05


@pytest.mark.posix
@pytest.mark.slow
def test_the_script_for_a_gpu_keeps_how_each_part_ended(arguments, tmp_path):
    """A part that fails does not end the others."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    small = {"PARTS": "train decode", "DEVICE": "cpu", "ROUNDS": "x", "PATH": path}
    words = ["bash", ROOT / "bench/gpu.sh", "rows.json", "rows.json", "tokenizer", "gpu.json"]
    subprocess.run(words, env=os.environ | small, check=True, timeout=300, capture_output=True)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == ["train", "decode"] and found["train"]["made"]["machine"]
    for part in found.values():
        assert part["exit_code"] == 2 and "invalid int value" in part["printed"][-1]


def test_rates_count_response_tokens_and_answers_end_at_a_stop_token(tmp_path):
    small_model().save_pretrained(tmp_path)
    examples = [Example([5, 9, 2, 41, 17], 2), Example([8, 3, 1], 1)]
    figures = speed.train_nanosdd(tmp_path, examples, Compute())
    assert figures["tokens/s"] == pytest.approx(5 / figures["seconds"])
    padded = [[6, 7, 2, 0], [8, 9, 9, 9]]
    figures = speed.answer_figures(lambda limit: padded, [2, 0], 4, Compute())
    assert figures["tokens/s"] == pytest.approx(6 / figures["seconds"])


def test_a_missing_package_has_a_row(capsys):
    missing = partial(__import__, "no_such_package")
    assert speed.race({"peer": missing}, 1) == {"peer": []}
    assert capsys.readouterr().out.split() == ["peer", "not", "installed"]


def test_useful_flops_by_hand():
    """A vocabulary of 89, 2 layers of 48 with 6 heads on 2, of 10, and 80 in the MLP; 11 and 3
    tokens are read, 7 and 1 are of responses."""
    layer = 48 * 60 + 2 * 48 * 20 + 60 * 48 + 3 * 48 * 80
    examples = [Example(list(range(12)), 5), Example(list(range(4)), 3)]
    expected = 6 * (2 * layer * 14 + 89 * 48 * 8 + 2 * 60 * (11**2 + 3**2))
    assert speed.useful_flops(small_config(), examples) == expected
