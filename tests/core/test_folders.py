"""Folders and files that commands write: whole or not at all, and nothing foreign is lost."""

import json
import shutil

import pytest

from nanosdd.errors import InputError, Interrupted
from nanosdd.folders import (
    STATE,
    beside,
    check_folder,
    check_out,
    missing_file,
    new_folder,
    recover_from_kill,
    write_results,
    write_text,
)


def write_run(path, text="x", record=None):
    with new_folder(path, record) as folder:
        (folder / "weights").write_text(text)
        (folder / "run.json").write_text("{}")


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep/run"
    with pytest.raises(ZeroDivisionError):
        with new_folder(out) as folder:
            (folder / "run.json").write_text("{}")
            raise ZeroDivisionError
    assert not list((tmp_path / "deep").iterdir())
    with new_folder(out) as folder:
        (folder / "run.json").write_text("{}")
        (folder / "old").write_text("x")
        assert not out.exists()
    assert out.stat().st_mode & 0o777 == 0o755
    with pytest.raises(ZeroDivisionError):
        with new_folder(out):
            raise ZeroDivisionError
    assert (out / "old").is_file()  # the earlier run stays until the new one is whole
    write_run(out)
    assert names(out.parent) == ["run", "run/run.json", "run/weights"]
    assert missing_file(out) is None and json.loads((out / "run.json").read_text())[
        "wrote"
    ].keys() == {"weights"}


def test_what_a_run_did_not_write_is_kept(tmp_path, capsys):
    out = tmp_path / "run"
    write_run(out)
    (out / "notes/deep").mkdir(parents=True)
    (out / "notes/deep/a.txt").write_text("two years of work")
    (out / "metrics.json").write_text('{"script": "eval.py"}')
    write_run(out, "y")
    assert names(tmp_path) == [
        "run",
        "run.kept-1",
        "run.kept-1/metrics.json",
        "run.kept-1/notes",
        "run.kept-1/notes/deep",
        "run.kept-1/notes/deep/a.txt",
        "run.kept-1/run.json",
        "run.kept-1/weights",
        "run/run.json",
        "run/weights",
    ]
    assert "it is now" in capsys.readouterr().out
    (out / "metrics.json").write_text('{"script": "eval.py"}')
    write_run(out)
    assert (
        not capsys.readouterr().out and not (tmp_path / "run.kept-2").exists()
    )  # all of it is ours
    (out / "weights").write_text("edited by hand")
    write_run(out, "z")
    assert (tmp_path / "run.kept-2/weights").read_text() == "edited by hand"
    assert (out / "weights").read_text() == "z"
    (out / "run.json").write_text(
        "{}"
    )  # of an earlier version, without a list: all may be anybody's
    write_run(out, "w")
    assert (tmp_path / "run.kept-3/weights").read_text() == "z"
    (out / "metrics.json").write_text("{}")  # of another tool
    write_run(out)
    assert (tmp_path / "run.kept-4/metrics.json").read_text() == "{}"


@pytest.mark.parametrize("killed_at", ["strangers", "first rename", "second rename", "deleting"])
def test_a_command_killed_while_it_replaces_a_run_loses_nothing(tmp_path, killed_at, capsys):
    out, new, old = tmp_path / "run", tmp_path / ".run.new", tmp_path / ".run.old"
    write_run(out, "before")
    write_run(tmp_path / "other", "after")
    (tmp_path / "other").rename(new)  # finished, and not yet in its place
    (new / STATE).mkdir()
    if killed_at in ("second rename", "deleting"):
        out.rename(old)
    if killed_at == "deleting":
        new.rename(out)
        (old / "weights").unlink()
    recover_from_kill(out)
    assert missing_file(out) is None and (out / "weights").read_text() == "after"
    assert not new.exists() and not old.exists() and capsys.readouterr().out
    recover_from_kill(out)
    assert not capsys.readouterr().out


def test_a_killed_command_leaves_the_earlier_run_in_its_place(tmp_path, capsys):
    out = tmp_path / "run"
    write_run(out, "before")
    out.rename(tmp_path / ".run.old")  # and .run.new is not there, or not whole
    (tmp_path / ".run.new").mkdir()
    (tmp_path / ".run.new/weights").write_text("half")
    recover_from_kill(out)
    assert (out / "weights").read_text() == "before" and "put back" in capsys.readouterr().out
    write_run(out, "after")
    assert "left unfinished is removed" in capsys.readouterr().out
    assert (
        names(tmp_path) == ["run", "run/run.json", "run/weights"]
        and (out / "weights").read_text() == "after"
    )


def test_an_error_after_a_save_keeps_what_was_saved(tmp_path):
    out, state = tmp_path / "run", tmp_path / ".run.new" / STATE
    for error in (KeyboardInterrupt, OSError):
        with pytest.raises(error):
            with new_folder(out, {"lr": 1}):
                state.mkdir(exist_ok=True)
                (state / "state.json").write_text('{"record": {"lr": 1}, "step": 3}')
                raise error
        assert (state / "state.json").is_file()


def test_a_finished_run_found_at_the_start_takes_its_place_first(tmp_path):
    write_run(tmp_path / "other", "killed after its last step")
    (tmp_path / "other").rename(tmp_path / ".run.new")
    with new_folder(tmp_path / "run") as folder:
        assert (tmp_path / "run/weights").read_text() == "killed after its last step" and not any(
            folder.iterdir()
        )
        with pytest.raises(InputError, match="another command is writing"):
            new_folder(tmp_path / "run").__enter__()  # the lock is on the new folder
        (folder / "run.json").write_text("{}")
    assert names(tmp_path) == ["run", "run/run.json"]


@pytest.mark.parametrize("record, kept", [({"lr": 1}, True), ({"lr": 2}, False), (None, False)])
def test_a_state_waits_for_the_same_run(tmp_path, record, kept):
    out, state = tmp_path / "run", tmp_path / ".run.new" / STATE
    with pytest.raises(Interrupted):
        with new_folder(out, {"lr": 1}):
            state.mkdir()
            (state / "state.json").write_text('{"record": {"lr": 1}, "step": 3}')
            raise Interrupted
    with new_folder(out, record) as folder:
        assert (folder / STATE / "state.json").is_file() == kept
        (folder / "run.json").write_text("{}")
    assert names(tmp_path) == ["run", "run/run.json"]


def test_a_second_command_is_kept_out(tmp_path):
    with new_folder(tmp_path / "run") as folder:
        for other in (
            new_folder(tmp_path / "run").__enter__,
            lambda: recover_from_kill(tmp_path / "run"),
        ):
            with pytest.raises(InputError, match="another command is writing"):
                other()
        (folder / "run.json").write_text("{}")
    write_run(tmp_path / "run")


def test_what_is_no_run_is_never_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").mkdir()
    check_out(tmp_path / "thesis")  # empty, as good as missing
    check_out(tmp_path / "new/er")
    (tmp_path / "thesis/thesis.tex").write_text("two years of work")
    with pytest.raises(InputError, match="not an earlier run"):
        with new_folder(tmp_path / "thesis"):
            pass
    assert (tmp_path / "thesis/thesis.tex").read_text() == "two years of work"
    with pytest.raises(InputError, match="thesis.tex is a file"):
        check_out(tmp_path / "thesis/thesis.tex/run")
    (tmp_path / "link").symlink_to("thesis")
    (tmp_path / "nowhere").symlink_to("gone")
    for out, message in [
        (".", "the folder that you are in"),
        ("", "the folder that you are in"),
        ("..", "you are in"),
        ("link", "symbolic link"),
        ("nowhere", "symbolic link"),
        ("thesis", "the folder of --model"),
        ("thesis/a", "inside"),
        ("thesis/../thesis", "the folder of --model"),
    ]:
        with pytest.raises(InputError, match=message):
            check_out(out, tmp_path / "thesis")


def test_write_text_leaves_the_old_file_when_it_fails(tmp_path):
    write_text(tmp_path / "a/results.json", "old")
    with pytest.raises(TypeError):
        write_text(tmp_path / "a/results.json", 3)
    assert names(tmp_path / "a") == ["results.json"]
    assert (tmp_path / "a/results.json").read_text() == "old"
    with pytest.raises(InputError, match="cannot be a folder"):
        write_text(tmp_path / "a/results.json/x", "new")


def test_results_find_another_place(tmp_path, capsys):
    assert write_results(tmp_path / "a", {"x": ("1", "1")}) == tmp_path / "a"
    write_results(tmp_path / "a", {"x": ("2", "2")})  # what is there holds no 2
    assert (
        tmp_path / "a/x.kept-1"
    ).read_text() == "1" and "not written by this command" in capsys.readouterr().out
    (tmp_path / "b").write_text("a file")
    with pytest.raises(InputError, match="is a file"):
        check_folder(tmp_path / "b")
    other = write_results(tmp_path / "b", {"x": ("1", "1"), "y": ("2", "2")})
    assert names(other) == ["x", "y"] and f"go to {other} instead" in capsys.readouterr().out
    shutil.rmtree(other)


def test_names_beside_a_path(tmp_path):
    assert beside(tmp_path / "run", "new") == tmp_path / ".run.new"
