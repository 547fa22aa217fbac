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
from nanosdd.errors import InputError
from nanosdd.runs import ROOT


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Arguments for a file of rows and a small tokenizer, in a folder with earlier figures."""
    monkeypatch.chdir(tmp_path)
    town_tokenizer(tmp_path / "tokenizer")
    alpaca_file(tmp_path / "rows.json")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/bench.json").write_text('{"decode": 4}')
    words = "--harmful rows.json --benign rows.json --tokenizer tokenizer --rounds 1 --device cpu"
    return words.split()


@pytest.mark.slow
def test_a_training_step_is_measured_and_leaves_other_figures(arguments, tmp_path):
    speed.main(["train", *arguments, "--batch-size", "3"])
    found = json.loads((tmp_path / "out/bench.json").read_text())
    ours = found["train"]["nanoSDD"][0]
    assert found["decode"] == 4 and ours["seconds"] > 0 and ours["GiB"] > 0.05 and ours["MFU"] > 0
    for name in set(found["train"]) - {"machine", "settings"}:
        for run in found["train"][name]:  # none of a peer that is not installed
            assert run["loss"] == pytest.approx(ours["loss"], rel=0.01), name
    assert found["train"]["nanoSDD, activations checkpointed"]


@pytest.mark.slow
def test_answers_are_measured(tmp_path):
    public_folder(tmp_path)
    prompts = [[5, 9, 2], [7, 30]]
    found = speed.bench_decode(str(tmp_path), prompts, range(20), 8, Compute(), rounds=1)
    assert list(found) == ["own stops", "none stops", "one prompt"]
    for runs in found.values():
        ours = runs["nanoSDD, fp32"][0]
        for peer in runs["generate, fp32"]:
            assert peer["answers"] == ours["answers"]
        assert ours["GiB"] > 0.05


@pytest.mark.posix
@pytest.mark.slow
def test_the_script_for_a_gpu_keeps_how_each_part_ended(arguments, tmp_path):
    """A part that fails does not end the others."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    small = {"PARTS": "train decode", "DEVICE": "cpu", "ROUNDS": "0", "PATH": path}
    words = ["bash", ROOT / "bench/gpu.sh", "rows.json", "rows.json", "tokenizer", "gpu.json"]
    subprocess.run(words, env=os.environ | small, check=True, timeout=300, capture_output=True)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == ["train", "decode"] and found["train"]["made"]["machine"]
    for part in found.values():
        assert part["exit_code"] == 2 and "must be 1 or more" in part["printed"][-1]


def test_rates_count_response_tokens_and_answers_end_at_a_stop_token(tmp_path):
    small_model().save_pretrained(tmp_path)
    examples = [Example([5, 9, 2, 41, 17], 2), Example([8, 3, 1], 1)]
    figures = speed.train_nanosdd(tmp_path, examples, {"fp32": 3.0}, Compute())
    assert figures["tokens/s"] == pytest.approx(5 / figures["seconds"])
    assert figures["MFU"] == 3.0 / figures["seconds"]
    shares = [figures[name] for name in speed.PARTS]
    assert min(shares) > 0 and sum(shares) < 1
    padded = [[6, 7, 2, 0], [8, 9, 9, 9]]
    figures = speed.answer_figures(lambda limit: padded, [2, 0], 4, Compute())
    assert figures["tokens/s"] == pytest.approx(6 / figures["seconds"])


def test_a_missing_package_has_a_row_and_an_error_is_raised_here(capsys):
    missing = partial(__import__, "no_such_package")
    assert speed.race({"peer": missing}, 1) == {"peer": []}
    assert capsys.readouterr().out.split() == ["peer", "not", "installed"]
    with pytest.raises(InputError, match="nowhere"):
        speed.race({"ours": partial(speed.decode_nanosdd, "nowhere", [[1]], [], 3, Compute())}, 1)


def test_useful_flops_by_hand():
    """A vocabulary of 89, 2 layers of 48 with 6 heads on 2, of 10, and 80 in the MLP; 11 and 3
    tokens are read, 7 and 1 are of responses."""
    layer = 48 * 60 + 2 * 48 * 20 + 60 * 48 + 3 * 48 * 80
    examples = [Example(list(range(12)), 5), Example(list(range(4)), 3)]
    expected = 6 * (2 * layer * 14 + 89 * 48 * 8 + 2 * 60 * (11**2 + 3**2))
    assert speed.useful_flops(small_config(), examples) == expected
