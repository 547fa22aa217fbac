"""The commands as a user meets them: bad input, exit codes, and the real public files where they are at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from make_llama import make
from small import advbench_file, alpaca_file, public_folder

import attack
from lab import attacks as attacker
import eval as evaluate
from nanosdd import runs
import train
from data.chat import read_chat
from data.harmful import read_harmful, split_harmful
from data.sources import read_rows
from nanosdd.errors import InputError

ROOT = Path(__file__).parent.parent.parent


def run_command(*words, cwd):
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize("words, problem, fix", [
    (["train.py", "--mode", "align", "--model", "nowhere", "--harmful", "h.csv", "--out", "o"], "nowhere", "check"),
    (["-m", "data.pairs", "--harmful", "gone.csv", "--out", "p.jsonl", "--mode", "align"], "gone.csv", "give"),
    (["eval.py", "nowhere"], "nowhere is not a folder", "give one")])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, words, problem, fix):
    advbench_file(tmp_path / "h.csv")
    result = run_command(*[ROOT / words[0] if words[0].endswith(".py") else words[0], *words[1:]], cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and problem in result.stderr and fix in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h.csv"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    public_folder(tmp_path / "llama")
    advbench_file(tmp_path / "h.csv")
    alpaca_file(tmp_path / "b.json")
    return tmp_path


SDD = ["--mode", "sdd", "--model", "llama", "--harmful", "h.csv", "--benign", "b.json", "--out", "out/x",
       "--steps", "1", "--similarity", "tfidf"]


@pytest.mark.parametrize("change, message", [
    ({"--model": "gone"}, "gone is not there"), ({"--harmful": "gone.csv"}, "gone.csv is not there"),
    ({"--benign": "gone.json"}, "gone.json is not there"), ({"--device": "cuda"}, "no CUDA device"),
    ({"--device": "toaster"}, "toaster is unknown"), ({"--lr": "0"}, "--lr"), ({"--out": "llama"}, "--out"),
    ({"--steps": "0"}, "--steps"), ({"--benign-replay": "1.5"}, "--benign-replay"), ({"--harmful": None}, "--harmful"),
    ({"--benign": None}, "--benign"), ({"--model": None}, "--model"), ({"--mode": "base"}, "--mode"),
    ({"--max-length": "9"}, "--max-length"), ({"--micro-batch": "-1"}, "--micro-batch"),
    ({"--lr": "nan"}, "--lr"), ({"--weight-decay": "-1"}, "--weight-decay"), ({"--device": "mps"}, "mps is unknown"),
    ({"--out": "h.csv/x"}, "h.csv is a file"), ({"--harmful": "b.json"}, "evaluation prompt")])
def test_train_refuses(files, monkeypatch, change, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = list(SDD)
    for flag, value in change.items():
        if flag in words:
            at = words.index(flag)
            words[at:at + 2] = [] if value is None else [flag, value]
        else:
            words += [flag, value]
    if change == {"--harmful": "b.json"}:
        alpaca_file(files / "b.json", rows=6)
    with pytest.raises(InputError, match=message) as error:
        train.main(words)
    assert "\n" not in str(error.value)
    assert not (files / "out").exists()


def test_a_crash_leaves_nothing_half_written(files, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(SDD)
    assert not list((files / "out").iterdir())


def test_a_folder_that_is_no_run_is_never_replaced(files):
    (files / "out/x").mkdir(parents=True)
    (files / "out/x/thesis.tex").write_text("two years of work")
    with pytest.raises(InputError, match="not an earlier run"):
        train.main(SDD)
    assert (files / "out/x/thesis.tex").read_text() == "two years of work"


def test_a_checkpoint_that_does_not_match_its_config(files):
    config = json.loads((files / "llama/config.json").read_text())
    (files / "llama/config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(InputError, match=r"shape \[\d+, 48\].*64"):
        train.main(SDD)
    (files / "llama/config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(InputError, match="vocab|shape"):
        train.main(SDD)


@pytest.mark.parametrize("words, message", [
    (["--model", "gone"], "gone is not a folder"), (["--model", "llama"], "no model of the town"),
    (["--harmful", "h.csv"], "--model"), (["--shots", "0"], "--shots"), (["--preset", "qi-full"], "go with --harmful"),
    (["--shots", "500"], "--shots 500 is more"), (["--lr", "nan"], "--lr"), (["--out", "h.csv"], "is a file"),
    (["--model", "llama", "llama/../llama", "--harmful", "h.csv"], "same name"), (["--benign", "b.json"], "--benign"),
    (["--model", "llama", "--harmful", "h.csv"], "--shots 100 is more than the")])
def test_attack_refuses(files, words, message):
    with pytest.raises(InputError, match=message):
        attack.main(words)
    assert not (files / "out").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seed": 0, "phrasing": "loud"}'])
def test_a_malformed_town_or_record_is_named(files, text):
    (files / "llama/town.json").write_text(text)
    for command in (lambda: evaluate.main(["llama"]), lambda: attack.main(["--model", "llama"]),
                    lambda: train.main(["--mode", "sdd", "--model", "llama", "--out", "out/x"])):
        with pytest.raises(InputError, match="town.json|phrasing"):
            command()
    (files / "args.json").write_text(text)
    assert runs.why_stale(files / "args.json", {"args": {}, "inputs": {}, "source": {}}) == "unreadable"


def test_pairs_that_ask_an_evaluation_prompt_are_refused(files):
    evaluation = split_harmful(read_harmful("h.csv"), "h.csv")["evaluation"][0]["prompt"]
    (files / "pairs.jsonl").write_text(json.dumps({"prompt": evaluation.upper(), "response": "x"}) + "\n")
    with pytest.raises(InputError, match="row 0 .*: an evaluation prompt"):
        train.main([*SDD, "--pairs", "pairs.jsonl"])


def test_eval_refuses_a_prompt_longer_than_the_context(files):
    with pytest.raises(InputError, match="context"):
        evaluate.main(["llama", "--prompt", "word " * 200])


def test_training_attack_and_evaluation_use_the_template_of_the_checkpoint(files, monkeypatch):
    used = set()

    def spy(encode):
        def encode_and_note(tokenizer, chat, *rest):
            used.add(chat)
            return encode(tokenizer, chat, *rest)
        return encode_and_note

    for module, name in ((train, "encode_example"), (attacker, "encode_example"),
                         (evaluate, "encode_prompt")):
        monkeypatch.setattr(module, name, spy(getattr(module, name)))
    assert read_chat("llama") == "llama3"  # what the folder itself calls for
    train.main([*SDD, "--chat", "plain"])
    assert (files / "out/x/chat.txt").read_text() == "plain\n"
    commands = [(evaluate, ["out/x", "--harmful", "h.csv", "--max-new-tokens", "2"]),
                (evaluate, ["out/x", "--prompt", "hi"]),
                (attack, ["--model", "out/x", "--harmful", "h.csv", "--shots", "3", "--max-new-tokens", "2",
                          "--steps", "2"]),
                (train, ["--mode", "benign", "--model", "out/x", "--benign", "b.json", "--steps", "1", "--out", "y"])]
    for module, words in commands:
        assert used == {"plain"}
        used.clear()
        with pytest.raises(InputError, match="--chat llama3: .*trained with plain"):
            module.main([*words, "--chat", "llama3"])
        assert not used
        module.main(words)
    assert used == {"plain"} and read_chat("y") == "plain"


def test_write_text_leaves_the_old_file_when_it_fails(tmp_path):
    runs.write_text(tmp_path / "a/results.json", "old")
    with pytest.raises(TypeError):
        runs.write_text(tmp_path / "a/results.json", 3)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["results.json"]
    assert (tmp_path / "a/results.json").read_text() == "old"


REAL = os.environ.get("NANOSDD_REAL_DATA")


@pytest.mark.skipif(not REAL, reason="NANOSDD_REAL_DATA is not set: the folder with AdvBench, Alpaca and tokenizers")
def test_the_three_commands_on_real_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    harmful, benign = f"{REAL}/advbench/harmful_behaviors.csv", f"{REAL}/alpaca/alpaca_en_demo.json"
    make(tmp_path / "llama", f"{REAL}/tokenizers/llama3")
    train.main(["--mode", "sdd", "--model", "llama", "--harmful", harmful, "--benign", benign, "--steps", "2",
                "--batch-size", "4", "--out", "out/real", "--similarity", "tfidf"])
    attack.main(["--model", "out/real", "--harmful", harmful, "--shots", "10", "--max-new-tokens", "4", "--steps", "0"])
    evaluate.main(["out/real", "--harmful", harmful, "--max-new-tokens", "4"])
    rows = read_rows(harmful)
    assert len(rows) == 520 and len(read_rows(benign)) == 999
    evaluation = split_harmful(rows, harmful)["evaluation"]
    assert json.loads((tmp_path / "out/real/metrics.json").read_text())["prompts"] == len(evaluation)
    cells = json.loads((tmp_path / "out/attack/results.json").read_text())["cells"]
    assert [c["attack"] for c in cells] == ["none", "mft"]
    assert "percent of answers" in capsys.readouterr().out
