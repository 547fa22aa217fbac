"""Several processes: what torchrun trains is what one process trains, and the other commands refuse it."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small import public_folder, small_model, town_tokenizer

import attack
import eval as evaluate
import train
from lab import tune
from nanosdd.errors import InputError

ROOT = Path(__file__).parent.parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two random models, `untied` and `tied`, and 40 benign pairs, some with many times the response of others."""
    monkeypatch.chdir(tmp_path)
    public_folder(tmp_path / "untied")
    tokenizer = town_tokenizer(tmp_path / "tied")
    small_model(vocab_size=tokenizer.n_vocab, max_position_embeddings=128, tie_word_embeddings=True
                ).save_pretrained(tmp_path / "tied")
    rng = random.Random(0)
    rows = [{"prompt": f"how {i}", "response": " ".join(rng.choices(["so", "it", "red"], k=rng.choice([1, 3, 40])))}
            for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("model, flags", [("untied", ["--micro-batch", "2"]), ("tied", ["--checkpoint-activations"])])
def test_two_processes_train_what_one_does(folder, model, flags):
    """In gradient norms as well as weights: AdamW behind clipping would not notice a gradient of half the size."""
    command = ["--mode", "benign", "--model", model, "--benign", "rows.jsonl", "--steps", "20", "--batch-size", "6",
               "--lr", "1e-3", "--weight-decay", "0.1", "--device", "cpu", *flags]
    train.main([*command, "--out", "one"])
    result = subprocess.run([*TORCHRUN, ROOT / "train.py", *command, "--out", "two"], capture_output=True, text=True,
                            timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("two: trained and saved") == 1  # the first process speaks for both
    logs = [[json.loads(line) for line in (folder / out / "train_log.jsonl").read_text().splitlines()]
            for out in ("one", "two")]
    for one, two in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "lr", "response_tokens", "tokens"):
            assert two[key] == pytest.approx(one[key], rel=1e-5), (key, one["step"])
    one, two, start = (load_file(folder / name / "model.safetensors") for name in ("one", "two", model))
    assert one.keys() == two.keys() == start.keys()
    assert max((one[name] - start[name]).abs().max() for name in one) > 5e-3  # there is something to agree on
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    assert sorted(path.name for path in (folder / "one").iterdir()) == sorted(
        path.name for path in (folder / "two").iterdir())
    for name in ("config.json", "samples.txt", "args.json", "chat.txt"):
        assert (folder / "one" / name).read_text() == (folder / "two" / name).read_text(), name


def test_an_error_in_one_process_ends_the_others(folder):
    """The first fails where the others are on their way to wait for it."""
    (folder / "fails.py").write_text(
        "import os, train\nfrom nanosdd.errors import InputError, run_script\n\n\ndef fail(*args):\n"
        "    raise InputError('the disk is full')\n\n\nif os.environ['RANK'] == '0':\n    train.write_model = fail\n"
        "run_script(train.main)\n")
    result = subprocess.run([*TORCHRUN, "fails.py", "--mode", "benign", "--model", "tied", "--benign", "rows.jsonl",
                             "--steps", "1", "--batch-size", "2", "--device", "cpu", "--out", "two"],
                            capture_output=True, text=True, timeout=240, env=os.environ | {
                                "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)})
    assert result.returncode != 0 and "error: the disk is full" in result.stderr.splitlines()
    assert not (folder / "two").exists() and not list(folder.glob(".two*"))


@pytest.mark.parametrize("flags, message", [
    (["--batch-size", "7"], "--batch-size 7 does not divide among 3 processes"),
    (["--batch-size", "6", "--weights", "bf16"], "--weights bf16 is for one process")])
def test_what_cannot_be_spread_is_refused(folder, monkeypatch, flags, message):
    monkeypatch.setattr(train, "process", lambda: (0, 3))
    with pytest.raises(InputError, match=message):
        train.main(["--mode", "benign", "--model", "tied", "--benign", "rows.jsonl", "--out", "x", *flags])
    assert not (folder / "x").exists()


@pytest.mark.parametrize("command, words", [
    (attack, []), (evaluate, ["tied"]), (tune, []), (attack, ["--model", "tied", "--harmful", "rows.jsonl"])])
def test_the_other_commands_refuse_several_processes(folder, monkeypatch, command, words):
    before = sorted(folder.rglob("*"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=f"^{command.__name__.split('.')[-1]}.py runs in one process.*without torchrun$"):
        command.main(words)
    assert sorted(folder.rglob("*")) == before
