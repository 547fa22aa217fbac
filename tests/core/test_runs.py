"""Runs: what they depend on, and folders that are finished or go on from where they were killed."""

import json
import os
import runpy
import shutil
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from nanosdd.device import Compute
from nanosdd.errors import InputError, Interrupted
from nanosdd.optimizer import make_optimizer
from nanosdd.runs import (
    Results,
    Run,
    check_finished,
    code_hash,
    difference,
    fingerprint,
    write_text,
)

pytestmark = pytest.mark.posix  # fork, signals, links
RECORD = {"settings": {"steps": 10}, "inputs": {"a.csv": "12"}, "code": {"train.step": "34"}}
OTHER = RECORD | {"settings": {"steps": 20}}


def train(folder, record=RECORD, seconds=0.0, **settings):
    """A training command in small."""
    run = Run(folder, record, **settings)
    if run.finished:
        return
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 7, bias=False))
    optimizer = make_optimizer(model, Compute(), weight_decay=0.1)
    with run:
        saved = run.load_state(model, optimizer)
        losses = saved.get("losses", [])
        for step in range(saved.get("step", 0), record["settings"]["steps"]):
            x = torch.randn(3, 7, generator=torch.Generator().manual_seed(step))
            loss = (model(x) - x).square().mean()
            loss.backward()
            optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if run.should_save(step + 1):
                run.save_state(step + 1, model, optimizer, {"losses": losses})
                time.sleep(seconds)
        write_text(run.folder / "model.txt", repr(model[1].weight.tolist()))
        write_text(run.folder / "losses.json", json.dumps(losses))
        run.finish()


def texts(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def started(folder):
    """Another process that trains, once it has saved a state."""
    process = os.fork()
    if process == 0:
        try:
            train(folder, seconds=0.05, save_every=1)
        except Interrupted as error:
            (folder.parent / "said").write_text(str(error))
        os._exit(0)
    while not list(folder.glob("state/rank0-step*")):
        assert os.waitpid(process, os.WNOHANG) == (0, 0)
        time.sleep(0.001)
    return process


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    """Nothing is lost when the disk is not waited for."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


# ---- killed, and started again ----


def die_after(moment):
    """Kill this process before the so manieth change of the disk."""
    changes = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
    left = moment

    def look(event, arguments):
        nonlocal left
        if event in changes and "/run" in str(arguments[0]):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


@pytest.mark.parametrize("replaces", [False, True])
def test_killed_before_any_change_of_the_disk_it_is_whole_or_not_finished(tmp_path, replaces):
    train(tmp_path / "whole")
    train(tmp_path / "other", record=OTHER)
    status = moment = 1
    while status:
        run = tmp_path / f"run{moment}"
        if replaces:
            shutil.copytree(tmp_path / "other", run)
        process = os.fork()
        if process == 0:
            die_after(moment)
            train(run, save_every=4, fresh=replaces)
            os._exit(0)
        status = os.waitpid(process, 0)[1]
        if (run / "run.json").exists() and status:
            name = "whole" if json.loads((run / "run.json").read_text()) == RECORD else "other"
            written = {key: text for key, text in texts(run).items() if key[0] != "."}
            assert written == texts(tmp_path / name)
            train(run, fresh=True)
        train(run)
        assert texts(run) == texts(tmp_path / "whole") and not (run / "state").exists()
        moment += 1
    assert moment > 30


def test_one_state_is_kept_and_what_was_lost_of_it_is_said(tmp_path):
    model = torch.nn.Linear(7, 5)
    with Run(tmp_path / "run", RECORD) as run:
        for step in (1, 2, 3):
            run.save_state(step, model, torch.optim.AdamW(model.parameters()), {})
    file = tmp_path / "run/state/rank0-step3.safetensors"
    assert set(run.state.iterdir()) == {file, run.state_file}
    whole = file.read_bytes()
    save_file({"0.bias": torch.zeros(9)}, file)
    for damaged in (file.read_bytes(), whole[:-9], b""):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match="is damaged .*--fresh"):
            train(tmp_path / "run")
    train(tmp_path / "run", fresh=True)
    train(tmp_path / "whole")
    assert texts(tmp_path / "run") == texts(tmp_path / "whole")


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(tmp_path, number):
    process = started(tmp_path / "run")
    os.kill(process, getattr(signal, number))
    os.waitpid(process, 0)
    assert "the same command goes on from there" in (tmp_path / "said").read_text()
    with pytest.raises(InputError, match="unfinished run"):
        check_finished(tmp_path / "run")
    train(tmp_path / "run")
    train(tmp_path / "whole")
    assert texts(tmp_path / "run") == texts(tmp_path / "whole")


def test_when_to_save(tmp_path):
    with pytest.raises(KeyboardInterrupt), Run(tmp_path / "run", RECORD, save_every=3) as run:
        assert [run.should_save(step) for step in (1, 2, 3, 4)] == [False, False, True, False]
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # launchers repeat it
        assert run.should_save(5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (tmp_path / "run").exists()  # nothing was saved
    with pytest.raises(Interrupted, match="finished"), Run(tmp_path / "run", RECORD) as run:
        assert not run.should_save(1)  # five minutes are not over
        os.kill(os.getpid(), signal.SIGTERM)
        run.finish()
    check_finished(tmp_path / "run")


# ---- folders ----


def test_another_run_is_refused_with_both_values(tmp_path):
    train(tmp_path / "run")
    with Run(tmp_path / "new", RECORD) as first:
        with pytest.raises(InputError, match="another command is writing"):
            train(tmp_path / "new")
        late = Run(tmp_path / "new", RECORD)
        first.finish()
    late.record = OTHER
    with pytest.raises(InputError, match="another run"), late:
        pass
    with Run(tmp_path / "run", OTHER, fresh=True):  # not saved, and not finished
        pass
    with pytest.raises(InputError, match="steps was 20, is 10"):
        train(tmp_path / "run")


@pytest.mark.parametrize("name", ["run.json", "state/state.json"])
def test_what_does_not_read_as_a_record_of_a_run_is_never_replaced(tmp_path, name):
    file = tmp_path / "run" / name
    for text in ('{"id": 7, "project": "mine"}', "[]", "{"):
        write_text(file, text)
        for fresh in (False, True):
            with pytest.raises(InputError, match=f"{name} is damaged or of another program"):
                train(tmp_path / "run", fresh=fresh)
        assert file.read_text() == text
    file.unlink()
    train(tmp_path / "run")


def test_other_files_are_never_touched(tmp_path):
    run = tmp_path / "run"
    (run / "state").mkdir(parents=True)
    (run / "state/notes.txt").write_text("a")
    train(run)
    (run / "mine.txt").write_text("b")
    train(run, record=OTHER, fresh=True, save_every=3)
    assert (run / "state/notes.txt").read_text() == "a" and (run / "mine.txt").read_text() == "b"


# ---- what a run depends on ----


def test_a_record_holds_settings_model_files_and_code(tmp_path):
    llama = tmp_path / "llama"
    (llama / "tokenizer").mkdir(parents=True)
    for name in ("config.json", "added_tokens.json", "run.json", "rows.json"):
        (llama / name).write_text(name)
    (llama / "model.safetensors.index.json").write_text('{"weight_map": {"a": "tokenizer/b"}}')
    save_file({"a": torch.zeros(2)}, llama / "tokenizer/b")
    os.mkfifo(llama / "chat.bak")  # would be waited for
    inputs = [llama, f"{llama}/rows.json"]
    record = fingerprint({"betas": (0.5, 0.9)}, inputs, [train, Run.finish, Results])
    assert record["settings"] == {"betas": [0.5, 0.9]}
    names = [path.removeprefix(f"{llama}/") for path in record["inputs"]]
    assert names == ["tokenizer/b", "config.json", "added_tokens.json", "rows.json"]
    assert len(set(record["inputs"].values())) == 4
    assert list(record["code"]) == ["test_runs.train", "runs.Run.finish", "runs.Results"]
    assert difference(record, json.loads(json.dumps(record))) is None


def test_only_words_of_code_may_change(tmp_path):
    code = '"""What."""\n\ndef f(x):\n    """Says it."""\n    return x\n'
    found = []
    for text in (code, "# why\n" + code.replace("Says", "Tells"), code.replace("return x", "0")):
        file = tmp_path / str(len(found)) / "script.py"
        write_text(file, text)
        found.append(code_hash(runpy.run_path(str(file))["f"]))
    assert found[0] == found[1] != found[2]


# ---- files of finished parts ----


def test_results_are_kept_by_record_and_damaged_lines_are_not(tmp_path, capsys):
    file = tmp_path / "new/sdd.jsonl"
    results = Results(file, RECORD)
    results.add("mft 10", [{"harm": 0.1 + 0.2}])
    results.add("bft 10", [])
    kept = {"mft 10": [{"harm": 0.1 + 0.2}], "bft 10": []}
    assert Results(file, RECORD).results == kept and capsys.readouterr().out == ""
    whole = file.read_text()
    file.write_text(whole + '\n[]\n3\n{"record": 1}\n' + whole.splitlines()[1][:-5])
    other = Results(file, OTHER)
    assert other.results == {}
    assert "2 results of other settings or code" in (said := capsys.readouterr().out)
    assert "steps was 10, is 20" in said
    other.add("mft 10", 7)
    assert Results(file, OTHER).results == {"mft 10": 7} and Results(file, RECORD).results == kept
    Results(file, RECORD).add("lora 10", 1)
    assert Results(file, RECORD).results == kept | {"lora 10": 1}
    assert file.read_text().startswith(whole)  # nothing is dropped


def test_a_file_of_another_program_gets_no_results(tmp_path):
    (tmp_path / "sdd.jsonl").write_text('{"prompt": "mine"}\n')
    with pytest.raises(InputError, match="sdd.jsonl is of another program; move it"):
        Results(tmp_path / "sdd.jsonl", RECORD)
