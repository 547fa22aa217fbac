"""Several processes: what torchrun trains is what one process trains, and the other commands refuse it."""

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

ROOT = Path(__file__).parent.parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
BENIGN = ["--mode", "benign", "--benign", "rows.jsonl", "--device", "cpu"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two random models, `untied` and `tied`, and 40 benign pairs, some with many times the response of others."""
    monkeypatch.chdir(tmp_path)
    public_folder(tmp_path / "untied")
    public_folder(tmp_path / "tied", tie_word_embeddings=True)
    rng = random.Random(0)
    rows = [
        {
            "prompt": f"how {i}",
            "response": " ".join(rng.choices(["so", "it", "red"], k=rng.choice([1, 3, 40]))),
        }
        for i in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def torchrun(*words, **environment):
    return subprocess.run(
        [*TORCHRUN, *words],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
        | environment,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, flags", [("untied", ["--micro-batch", "2"]), ("tied", ["--checkpoint-activations"])]
)
def test_two_processes_train_what_one_does(folder, model, flags):
    """In gradient norms as well as weights: AdamW behind clipping would not notice a gradient of half the size."""
    words = [
        *BENIGN,
        "--model",
        model,
        "--steps",
        "20",
        "--batch-size",
        "6",
        "--lr",
        "1e-3",
        "--weight-decay",
        "0.1",
        *flags,
    ]
    train.main([*words, "--out", "one"])
    result = torchrun(ROOT / "train.py", *words, "--out", "two")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("two: training") == 1  # the first process speaks for both
    logs = [
        [json.loads(line) for line in (folder / out / "train_log.jsonl").read_text().splitlines()]
        for out in ("one", "two")
    ]
    for one, two in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "lr", "response_tokens", "tokens"):
            assert two[key] == pytest.approx(one[key], rel=1e-5), (key, one["step"])
    one, two, start = (
        load_file(folder / name / "model.safetensors") for name in ("one", "two", model)
    )
    assert one.keys() == two.keys() == start.keys()
    assert (
        max((one[name] - start[name]).abs().max() for name in one) > 5e-3
    )  # there is something to agree on
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    assert {path.name for path in (folder / "one").iterdir()} == {
        path.name for path in (folder / "two").iterdir()
    }
    for name in ("config.json", "samples.txt", "chat.txt"):
        assert (folder / "one" / name).read_text() == (folder / "two" / name).read_text(), name


@pytest.mark.slow
def test_weights_are_read_by_shares_so_memory_falls_with_the_number_of_processes(folder):
    """Peaks above that of a process that only starts, for 40 million parameters, of which no layer has many."""
    public_folder(
        folder / "wide",
        hidden_size=320,
        intermediate_size=960,
        num_hidden_layers=30,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=80,
    )
    (folder / "step.py").write_text("""
import os
import re
from pathlib import Path
from data.chat import encode_rows
from nanosdd.chat_model import load_chat
from nanosdd.device import Compute, join_processes, rank_and_world_size, shard_over_processes
from nanosdd.optimizer import make_optimizer
from train import train_step

def peak():  # kB
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

compute = join_processes(Compute())
if rank_and_world_size()[1] > 1:  # what FSDP imports is not counted
    import torch.distributed.fsdp
idle = peak()
chat = load_chat("wide", compute, spread=shard_over_processes)
peaks = [peak() - idle]
optimizer = make_optimizer(chat.model, compute)
rows = encode_rows(chat.tokenizer, chat.template, [{"prompt": "how", "response": "so it"}] * 2, 64)
for _ in range(2):
    train_step(chat.model, optimizer, rows, 1e-3, compute)
Path(f"peak{rank_and_world_size()[0]}of{rank_and_world_size()[1]}").write_text(f"{peaks[0]} {peak() - idle}")
os._exit(0)  # as train.py does
""")
    returned = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # what is freed, to the system
    alone = subprocess.run(
        [sys.executable, "step.py"],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | returned | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    both = torchrun("step.py", **returned)
    assert alone.returncode == both.returncode == 0, (alone.stderr + both.stderr)[-3000:]
    found = [(folder / name).read_text().split() for name in ("peak0of1", "peak0of2", "peak1of2")]
    for at in (0, 1):  # after reading, after two steps
        one, *two = (int(peaks[at]) for peaks in found)
        assert one > 150_000 and max(two) <= 0.6 * one, found


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_others(folder):
    """The first fails where the others are on their way to wait for it."""
    (folder / "fails.py").write_text("""
import os
from data.worlds import Sources, open_world
from nanosdd.device import Compute, join_processes
from nanosdd.errors import InputError, run_script
from train import Settings, train

def fail(*words):
    raise InputError("the disk is full")

def main():
    compute, world = join_processes(Compute()), open_world("files", 0, Sources(benign=("rows.jsonl",)))
    if os.environ["RANK"] == "0":
        world.save = fail
    train(world, "benign", "tied", "two", Settings(steps=1, batch_size=2, lr=1e-3), compute)

run_script(main)
""")
    result = torchrun("fails.py")
    assert result.returncode != 0 and "error: the disk is full" in result.stderr.splitlines()
    assert not (folder / "two").exists() and not list(folder.glob(".two*"))


def test_a_batch_that_cannot_be_spread_is_refused(folder):
    dist.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
    try:
        with pytest.raises(InputError, match="--batch-size 7 does not divide among 3 processes"):
            train.main([*BENIGN, "--model", "tied", "--batch-size", "7", "--out", "x"])
    finally:
        dist.destroy_process_group()
    assert not (folder / "x").exists()


@pytest.mark.parametrize(
    "command, words, message",
    [
        (
            train,
            [*BENIGN, "--model", "tied", "--weights", "bf16", "--out", "x"],
            "--weights bf16 is for one process",
        ),
        (attack, [], "^attack.py runs in one process.*without torchrun$"),
        (evaluate, ["tied"], "^eval.py runs in one process.*without torchrun$"),
    ],
)
def test_what_is_for_one_process_refuses_several(folder, monkeypatch, command, words, message):
    before = sorted(folder.rglob("*"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=message):
        command.main(words)
    assert sorted(folder.rglob("*")) == before
