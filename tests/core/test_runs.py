"""What a run depends on, and files of finished parts."""

import json
from pathlib import Path

import pytest
from small import small_model

from nanosdd.folders import new_folder
from nanosdd.runs import Finished, fingerprint, source_files, source_hash, why_stale

# ---- what a run depends on ----


@pytest.mark.parametrize("script", ["train.py", "attack.py", "eval.py"])
def test_the_core_depends_on_the_loss_and_never_on_the_study(script):
    files = source_files(script)
    assert {script, "sdd_loss.py", "model.py", "data/chat.py", "nanosdd/checkpoint.py"} <= set(
        files
    )
    assert not [
        file for file in files if file.split("/")[0] in ("lab", "bench", "assignments", "tests")
    ]
    assert set(fingerprint({}, [], [script])["source"]) == set(files)


def test_an_import_inside_a_function_counts(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(
        "import json\n\n\ndef f():\n    from nanosdd import errors\n    return errors, json\n"
    )
    assert source_files(str(file)) == [str(file), "nanosdd/errors.py"]


def test_what_is_only_said_in_other_words_is_the_same_source(tmp_path):
    def digest(name, text):
        (tmp_path / name).write_text(text)
        return source_hash(str(tmp_path / name))

    code = '"""What it is."""\n\n\ndef f(x):\n    """Says it."""\n    return %s\n'
    said = digest("a.py", code % "x")
    assert (
        digest("b.py", "# why\n" + (code % "x").replace("Says", "Tells").replace("What", "How"))
        == said
    )
    assert digest("c.py", code % "-x") != said


def test_a_fingerprint_holds_files_and_what_is_a_model_of_a_folder(tmp_path):
    small_model().save_pretrained(tmp_path / "llama")
    (tmp_path / "llama/notes.txt").write_text("x")
    (tmp_path / "rows.json").write_text("[]")
    inputs = fingerprint({}, [tmp_path / "llama", str(tmp_path / "rows.json")], [])["inputs"]
    assert [Path(path).name for path in inputs] == ["config.json", "model.safetensors", "rows.json"]
    assert len(set(inputs.values())) == 3


def test_the_reason_for_a_new_run_is_named(tmp_path):
    record = {
        "settings": {"lr": 0.5, "betas": [0.9, 0.99]},
        "inputs": {"a.csv": "12"},
        "source": {"train.py": "34"},
    }
    run = tmp_path / "run"
    assert why_stale(run, record) == "not there yet"
    with new_folder(run) as folder:
        (folder / "model.safetensors").write_text("weights")
        (folder / "run.json").write_text(json.dumps(record))
    assert why_stale(run, record) is None
    assert (
        why_stale(run, record | {"settings": {"lr": 0.25, "betas": [0.9, 0.99]}})
        == "setting lr changed"
    )
    assert (
        why_stale(run, record | {"settings": {"lr": 0.25}}) == "setting betas changed (and 1 more)"
    )
    assert why_stale(run, record | {"inputs": {}}) == "input a.csv changed"
    assert (
        why_stale(run, record | {"source": {"train.py": "34", "new.py": "5"}})
        == "source file new.py changed"
    )
    (run / "metrics.json").write_text("{}")  # of eval.py
    assert why_stale(run, record) is None
    (run / "model.safetensors").write_text("weighty")  # as long as before
    assert why_stale(run, record) == "damaged: model.safetensors is missing or was changed"
    (run / "model.safetensors").unlink()
    assert "damaged" in why_stale(run, record)
    for text in ("", "[]", "{}", '{"settings": 1, "inputs": {}, "source": {}}'):
        (run / "run.json").write_text(text)
        assert why_stale(run, record) == "unreadable"


# ---- a file of finished parts ----


def test_finished_results_are_kept_and_half_a_line_is_not(tmp_path):
    file, record = tmp_path / "new/sdd.jsonl", {"settings": {"seed": 3}}
    finished = Finished(file, record)
    finished.add("mft 10", [{"harm": 0.1 + 0.2}])
    finished.add("bft 10", [])
    assert Finished(file, record).results == {"mft 10": [{"harm": 0.1 + 0.2}], "bft 10": []}
    whole = file.read_text()
    file.write_text(whole + '{"key": "lora 10", "res')
    again = Finished(file, record)
    assert list(again.results) == ["mft 10", "bft 10"] and file.read_text() == whole
    again.add("lora 10", [1])
    assert list(Finished(file, record).results) == ["mft 10", "bft 10", "lora 10"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"settings": {"seed": 4}}\n{"key": "a", "result": 1}\n',
        "[]\n3\n",
        '{"settings": {"seed": 3}}\n{"key": "a"}\n',
    ],
)
def test_results_of_another_fingerprint_or_none_are_ignored(tmp_path, text):
    file, record = tmp_path / "sdd.jsonl", {"settings": {"seed": 3}}
    file.write_text(text)
    assert Finished(file, record).results == {}
    Finished(file, record).add("b", 2)
    assert Finished(file, record).results == {"b": 2}
