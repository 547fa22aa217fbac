"""An interrupted run goes on where it was, and ends in the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small import small_model

from nanosdd.device import Compute
from nanosdd.folders import STATE, clear, file_hash
from nanosdd.optimizer import make_optimizer
from nanosdd.resume import Pauses, load_state, save_state

ROOT = Path(__file__).parent.parent.parent


def model_and_optimizer(weights):
    model = small_model(tie_word_embeddings=True).to(
        torch.bfloat16 if weights == "bf16" else torch.float32
    )
    return model, make_optimizer(model, Compute(weights=weights), weight_decay=0.1)


def steps(model, optimizer, numbers):
    for number in numbers:
        tokens = torch.randint(89, (3, 7), generator=torch.Generator().manual_seed(number))
        model(tokens).float().square().mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (number + 1)
        optimizer.step()
        optimizer.zero_grad()


def bits(model, optimizer):
    masters = [
        optimizer.master(p) if hasattr(optimizer, "master") else p.detach()
        for p in model.parameters()
    ]
    return b"".join(master.float().numpy().tobytes() for master in masters)


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_state_holds_all_that_training_needs(tmp_path, weights):
    model, optimizer = model_and_optimizer(weights)
    steps(model, optimizer, range(3))
    save_state(
        tmp_path, model, optimizer, {"record": {"lr": 1}, "step": 3, "log": [{"loss": 0.1 + 0.2}]}
    )
    steps(model, optimizer, range(3, 6))
    again, other = model_and_optimizer(weights)
    assert load_state(tmp_path / "none", again, other) == {} and bits(again, other) != bits(
        model, optimizer
    )
    assert load_state(tmp_path, again, other) == {
        "record": {"lr": 1},
        "step": 3,
        "log": [{"loss": 0.1 + 0.2}],
    }
    steps(again, other, range(3, 6))
    assert bits(again, other) == bits(model, optimizer)


@pytest.mark.parametrize("killed_at", ["before", "half", "whole", "between renames", "after"])
def test_a_save_that_is_killed_leaves_one_state(tmp_path, killed_at):
    model, optimizer = model_and_optimizer("fp32")
    for step in (1, 2):
        steps(model, optimizer, [step])
        save_state(tmp_path / str(step), model, optimizer, {"record": 7, "step": step})
    new = tmp_path / "run"
    (tmp_path / "1").rename(new)
    if killed_at != "before":
        (tmp_path / "2" / STATE).rename(new / f"{STATE}.new")
    if killed_at == "half":
        (new / f"{STATE}.new/state.json").write_text('{"record": 7, "st')
    if killed_at in ("between renames", "after"):
        (new / STATE).rename(new / f"{STATE}.old")
    if killed_at == "after":
        (new / f"{STATE}.new").rename(new / STATE)
    clear(new, 7)
    step = 2 if killed_at in ("between renames", "after") else 1
    assert load_state(new, model, optimizer)["step"] == step and [
        path.name for path in new.iterdir()
    ] == [STATE]


def test_pauses_by_steps_and_by_signal():
    with Pauses(every=3) as pauses:
        assert [pauses.after(step) for step in (1, 2, 3, 4)] == [
            (False, False),
            (False, False),
            (True, False),
            (False, False),
        ]
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # launchers repeat it
        assert pauses.after(5) == (True, True)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert Pauses().after(1) == (False, False)  # five minutes are not over


def command(out, *more):
    return [
        sys.executable,
        ROOT / "train.py",
        "--mode",
        "base",
        "--world",
        "town",
        "--steps",
        "120",
        "--batch-size",
        "8",
        "--out",
        out,
        "--device",
        "cpu",
        *more,
    ]


def started(folder, *words, processes=1):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    ]
    words = words if processes == 1 else [*launcher, *words[1:]]
    return subprocess.Popen(
        words,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)},
    )


def finished(run):
    """(hash of the weights, the log without times) of a run folder."""
    log = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    return file_hash(run / "model.safetensors"), [
        {key: line[key] for key in line if key != "seconds"} for line in log
    ]


def kill_and_go_on(folder, kills, processes=1):
    """Start the command and kill it at a random moment after its first save, so often; then let it end. Returns what
    it printed, and how often it was killed."""
    rng, output, killed, last = random.Random(3), "", 0, None
    while True:
        process = started(folder, *command("killed", "--save-every", "1"), processes=processes)
        while killed < kills and process.poll() is None and saved_at(folder) in (None, last):
            time.sleep(0.01)
        try:
            process.wait(rng.uniform(0, 0.2) if killed < kills else None)
        except subprocess.TimeoutExpired:
            kill_all(folder)
            killed, last = killed + 1, saved_at(folder)
        output += process.communicate()[0]
        if process.returncode == 0:
            return output, killed
        assert process.returncode == -signal.SIGKILL or processes > 1, output


def kill_all(folder):
    """Kill every process that works in a folder: torchrun's, too, which are in sessions of their own."""
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if link.readlink() == folder:
                os.kill(int(link.parent.name), signal.SIGKILL)
        except OSError:  # it ended, or is not ours
            pass


def saved_at(folder):
    """When the last state was written; None without one."""
    try:
        return (folder / ".killed.new" / STATE / "state.json").stat().st_mtime_ns
    except OSError:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.full)])
def test_a_killed_run_ends_in_the_same_bytes(tmp_path, kills):
    assert started(tmp_path, *command("whole")).wait() == 0
    output, killed = kill_and_go_on(tmp_path, kills)
    assert finished(tmp_path / "killed") == finished(tmp_path / "whole")
    assert killed == kills and output.count("goes on after step") == kills
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    process = started(tmp_path, *command("stopped"))
    while not (tmp_path / ".stopped.new").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == 130 and "stopped after step" in output.splitlines()[-1], output
    assert started(tmp_path, *command("whole")).wait() == 0
    assert "goes on after step" in started(tmp_path, *command("stopped")).communicate()[0]
    assert finished(tmp_path / "stopped") == finished(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_go_on_where_they_were(tmp_path):
    assert started(tmp_path, *command("whole"), processes=2).wait() == 0
    output, killed = kill_and_go_on(tmp_path, 1, processes=2)
    assert killed and "goes on after step" in output
    assert finished(tmp_path / "killed") == finished(tmp_path / "whole")
