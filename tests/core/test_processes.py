"""Several processes: what torchrun trains is what one trains, and other commands refuse it."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import load_file
from small import public_folder
from torch.testing._internal.distributed.fake_pg import FakeStore

import attack
import eval as evaluate
import train
from nanosdd.errors import InputError

pytestmark = pytest.mark.posix  # torchrun with gloo

ROOT = Path(__file__).parent.parent.parent
BENIGN = "--mode benign --benign rows.jsonl --similarity tfidf --device cpu"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two random models, and 40 benign pairs, some with many times the response of others."""
    monkeypatch.chdir(tmp_path)
    public_folder(tmp_path / "untied")
    public_folder(tmp_path / "tied", tie_word_embeddings=True)
    rng = random.Random(0)
    lines = []
    for i in range(40):
        words = rng.choices(["so", "it", "red"], k=rng.choice([1, 3, 40]))
        lines.append(json.dumps({"prompt": f"how {i}", "response": " ".join(words)}) + "\n")
    Path("rows.jsonl").write_text("".join(lines))
    return tmp_path


def torchrun(*words):
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*command, *words],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | environment,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, flag", [("untied", "--micro-batch=2"), ("tied", "--checkpoint-activations")]
)
def test_two_processes_train_what_one_does(folder, model, flag):
    words = f"{BENIGN} --model {model} --steps 20 --batch-size 6 --lr 1e-3 {flag}".split()
    train.main([*words, "--out", "one"])
    result = torchrun(ROOT / "train.py", *words, "--out", "two")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("two: benign on files") == 1  # the first speaks for both
    logs = []
    for out in ("one", "two"):
        lines = (folder / out / "train_log.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    for one, two in zip(*logs, strict=True):
        # Behind clipping AdamW would not notice a gradient of half the size.
        for key in "loss grad_norm lr response_tokens tokens".split():
            assert two[key] == pytest.approx(one[key], rel=1e-5), (key, one["step"])
    start = load_file(folder / model / "model.safetensors")
    one = load_file("one/model.safetensors")
    two = load_file("two/model.safetensors")
    assert one.keys() == two.keys() == start.keys()
    moved = max((one[name] - start[name]).abs().max() for name in one)
    assert moved > 5e-3 > 500 * max((one[name] - two[name]).abs().max() for name in one)
    names = sorted(path.name for path in Path("one").iterdir())
    assert names == sorted(path.name for path in Path("two").iterdir())
    for name in ("config.json", "samples.txt", "chat.txt"):
        assert Path("one", name).read_text() == Path("two", name).read_text()


FAILS = """
import os
from data.files import Files
from data.worlds import Sources
from nanosdd.device import Compute, join_processes
from nanosdd.errors import InputError, run_script
from train import Settings, train

class Full(Files):
    def save(self, folder, pairs):
        raise InputError("the disk is full")

def main():
    world = Full(0, Sources(benign=("rows.jsonl",), similarity="tfidf"))
    settings = Settings(steps=1, batch_size=2, lr=1e-3)
    train(world, "benign", "tied", "two", settings, join_processes(Compute()))

run_script(main)
"""


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_others(folder):
    """The first fails where the others are on their way to wait for it."""
    Path("fails.py").write_text(FAILS)
    result = torchrun("fails.py")
    assert result.returncode != 0 and "error: the disk is full" in result.stderr.splitlines()
    assert not Path("two/run.json").exists()


def test_a_batch_that_cannot_be_spread_is_refused(folder):
    dist.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
    try:
        with pytest.raises(InputError, match="--batch-size 7 does not divide among 3 processes"):
            train.main(f"{BENIGN} --model tied --batch-size 7 --out x".split())
    finally:
        dist.destroy_process_group()
    assert not Path("x").exists()


@pytest.mark.parametrize(
    "command, words, message",
    [
        (train, f"{BENIGN} --model tied --weights bf16 --out x", "bf16 is for one process"),
        (attack, "", "^attack.py runs in one process.*without torchrun$"),
        (evaluate, "tied", "^eval.py runs in one process.*without torchrun$"),
    ],
)
def test_what_is_for_one_process_refuses_several(folder, monkeypatch, command, words, message):
    before = sorted(folder.rglob("*"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=message):
        command.main(words.split())
    assert sorted(folder.rglob("*")) == before
