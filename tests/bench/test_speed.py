"""The benchmark's parts on tiny inputs; no figure of it is tested."""

import json
import os
import subprocess
from functools import partial

import pytest
from small import advbench_file, alpaca_file, small_config, small_model, town_tokenizer

from bench import jobs, speed
from data.chat import Example
from nanosdd.device import Compute
from nanosdd.errors import InputError
from nanosdd.runs import ROOT


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Arguments for files in public layouts and a small tokenizer, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    town_tokenizer(tmp_path / "tokenizer")
    alpaca_file(tmp_path / "b.json")
    advbench_file(tmp_path / "h.csv")
    return ["--benign", "b.json", "--tokenizer", "tokenizer", "--rounds", "1", "--device", "cpu"]


@pytest.mark.slow
def test_training_is_measured_and_losses_compared(arguments, tmp_path, capsys):
    speed.main(["train", *arguments, "--harmful", "h.csv", "--batches", "2", "--batch-size", "3"])
    assert "Losses, step by step, differ by at most" in capsys.readouterr().out
    runs = json.loads((tmp_path / "out/bench.json").read_text())["train"]["runs"]
    ours = runs["nanoSDD"][0]  # 2 batches to warm up, 2 timed
    assert ours["seconds"] > 0 and ours["peak_bytes"] > 2**20 and len(ours["losses"]) == 4
    assert runs["nanoSDD, bf16"][0]["losses"] == pytest.approx(ours["losses"], rel=0.02)
    for name, others in runs.items():  # peers too, where they are installed
        if "bf16" in name:
            continue
        assert all(run["losses"] == pytest.approx(ours["losses"], abs=1e-4) for run in others), name
    assert len(runs["nanoSDD, activations checkpointed"]) == 1


@pytest.mark.slow
def test_decoding_is_measured_and_leaves_other_figures(arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/bench.json").write_text('{"train": 4}')
    speed.main(["decode", *arguments, "--prompts", "7", "--new-tokens", "6", "--stop-share", "0.2"])
    found = json.loads((tmp_path / "out/bench.json").read_text())
    answers = found["decode"]["runs"]["nanoSDD"][0]["answers"]
    assert found["train"] == 4 and len(answers) == 7 and max(map(len, answers)) <= 6


@pytest.mark.slow
def test_the_script_for_a_gpu_measures_on_a_cpu_too(arguments, tmp_path):
    """Each part is kept with how it ended; one that fails does not end the others."""
    small = {"PARTS": "train one", "DEVICE": "cpu", "SHAPE": "small", "ROUNDS": "1", "ROWS": "0"}
    words = ["bash", ROOT / "bench/gpu.sh", "h.csv", "b.json", "tokenizer", "gpu.json"]
    subprocess.run(words, env=os.environ | small, check=True, timeout=300, capture_output=True)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert (
        list(found) == ["train", "one"]
        and "--batch-size must be 1" in found["train"]["printed"][-1]
    )
    assert found["train"]["exit_code"] == 2 and found["one"]["exit_code"] == 0
    assert (
        "a copy on this machine" in "".join(found["one"]["printed"])
        and found["one"]["made"]["machine"]
    )


def test_a_job_runs_in_this_process_too(tmp_path):
    small_model().save_pretrained(tmp_path)
    batches = [[Example([5, 9, 2, 41, 17], 2)], [Example([8, 3, 1], 1)]]
    losses = jobs.train_nanosdd(tmp_path, batches, Compute())["losses"]
    assert (
        len(losses) == 4 and losses[2] < losses[0] and losses[3] < losses[1]
    )  # the second time it knows them
    answers = jobs.decode_nanosdd(tmp_path, [[5, 9, 2], [3]], list(range(44)), 8, Compute())[
        "answers"
    ]
    assert all(token > 43 for answer in answers for token in answer)


def test_the_table_and_the_row_of_a_missing_package(capsys):
    found = speed.take_turns({"peer": partial(__import__, "no_such_package")}, 1)
    assert found == {"peer": []} and "No module named 'no_such_package'" in capsys.readouterr().out
    found["ours"] = [{"seconds": 2.0, "peak_bytes": 2**30}, {"seconds": 4.0, "peak_bytes": 2**31}]

    def rows(base):
        table = speed.comparison(found, base, lambda run: 60, "runs", lambda runs: str(len(runs)))
        return [line.split() for line in table.splitlines()[1:]]

    assert rows("peer") == [
        ["peer", "not", "installed"],
        ["ours", "22.5", "15.0", "30.0", "3.00", "1.50", "-", "2"],
    ]
    found["peer"] = [{"seconds": 12.0, "peak_bytes": 2**30}]
    assert [row[-2] for row in rows("peer")] == ["1.00", "4.00"]


def test_an_error_of_a_job_is_raised_here():
    with pytest.raises(InputError, match="nowhere"):
        speed.in_fresh_process(partial(jobs.decode_nanosdd, "nowhere", [[1]], [], 3, Compute()))


@pytest.mark.parametrize(
    "command, message",
    [
        (["train", "--harmful", "h", "--batch-size", "0"], "--batch-size must be 1"),
        (["decode", "--rounds", "0"], "--rounds must be 1"),
        (["decode", "--stop-share", "2"], "--stop-share 2.0"),
    ],
)
def test_values_out_of_range_are_named(command, message):
    with pytest.raises(InputError, match=message):
        speed.main([*command, "--benign", "b", "--tokenizer", "t"])


def test_useful_flops_by_hand():
    config = small_config()  # vocabulary 89, 2 layers x 48, 6 heads on 2, of 10, and 80 in the MLP
    layer = 48 * 60 + 2 * 48 * 20 + 60 * 48 + 3 * 48 * 80
    examples = [
        Example(list(range(12)), 5),
        Example(list(range(4)), 3),
    ]  # 11 and 3 tokens read, 7 and 1 of responses
    assert speed.useful_flops(config, examples) == 6 * (
        2 * layer * 14 + 89 * 48 * 8 + 2 * 60 * (11**2 + 3**2)
    )


def test_scripts_are_timed_in_an_emptied_folder(tmp_path):
    (tmp_path / "one.py").write_text(
        "import sys; open(sys.argv[1], 'x').close()"
    )  # fails where the file is already
    (tmp_path / "two.py").write_text("import os; os.rename('made', 'kept')")
    for _ in range(2):
        seconds = speed.time_scripts(
            [[tmp_path / "one.py", "made"], [tmp_path / "two.py"]], tmp_path / "town"
        )
    assert list(seconds) == ["one.py", "two.py"] and min(seconds.values()) > 0
    with pytest.raises(InputError, match="two.py failed"):
        speed.time_scripts([[tmp_path / "two.py"]], tmp_path / "town")


def test_where_the_towns_time_goes(tmp_path):
    """The seconds of an attack count from its start: those of its last score are all of it."""
    for path, text in [
        ("seed0/sdd/train_log.jsonl", '{"seconds": 40.0}\n{"seconds": 2.0}\n'),
        (
            "attack/results.json",
            json.dumps(
                {
                    "cells": [
                        dict(arm="sdd", attack="mft", shots=7, lr=0.1, seconds=3.0),
                        dict(arm="sdd", attack="mft", shots=7, lr=0.1, seconds=17.0),
                        dict(arm="sdd", attack="mft", shots=9, lr=0.1, seconds=6.5),
                        dict(arm="aligned", attack="mft", shots=9, lr=0.1, diverged=True),
                    ]
                }
            ),
        ),
    ]:
        (tmp_path / "out" / path).parent.mkdir(parents=True)
        (tmp_path / "out" / path).write_text(text)
    assert speed.where_time_goes(tmp_path) == {"steps of sdd": 42.0, "3 attacks, 4 scores": 23.5}
