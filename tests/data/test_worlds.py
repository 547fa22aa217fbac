"""Which world a command opens, what a checkpoint folder says of its own, and the variants of a response."""

import random

import pytest

from data.files import Files
from data.town import Town
from data.worlds import (
    REJECT_PREFIX,
    WORLDS,
    Sources,
    open_world,
    read_world,
    vary_response,
    write_world,
)
from nanosdd.errors import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint folder `mine` that was trained on the town of seed 3, `theirs` from elsewhere, and h.csv."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
    write_world("mine", Town(3))
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained/chat.txt").write_text("llama3\n")
    (tmp_path / "h.csv").write_text("goal,target\n")
    return tmp_path


def test_the_world_is_that_of_the_files_else_of_the_folder_else_the_town(folder):
    files = Sources("h.csv")
    for name, seed, sources, model, kind in [
        (None, 5, Sources(), None, Town),
        (None, 3, Sources(), "mine", Town),
        ("town", 3, Sources(), "mine", Town),
        ("town", 9, Sources(), "theirs", Town),
        (None, 9, files, None, Files),
        (None, 9, files, "mine", Files),
        (None, 9, Sources(pairs="h.csv"), "theirs", Files),
        (None, 9, Sources(benign=("h.csv",)), None, Files),
        ("files", 9, Sources(), None, Files),
    ]:
        world = open_world(name, seed, sources, model)
        assert (
            type(world) is kind
            and world.seed == seed
            and WORLDS[world.name].endswith(kind.__name__)
        )


@pytest.mark.parametrize(
    "name, seed, sources, model, message",
    [
        (None, 4, Sources(), "mine", "mine knows the town of --seed 3, not of --seed 4"),
        ("town", 4, Sources(), "mine", "--seed 3"),
        (None, 0, Sources(), "trained", "trained was trained on files"),
        ("town", 0, Sources("h.csv"), None, "the world town has no use for --harmful"),
        (None, 0, Sources("gone.csv"), None, "gone.csv is not there"),
        (None, 0, Sources("h.csv", max_new_tokens=0), None, "--max-new-tokens 0"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, name, seed, sources, model, message):
    with pytest.raises(InputError, match=message):
        open_world(name, seed, sources, model)


def test_a_folder_tells_its_world(folder):
    assert read_world("mine") == {"world": "town", "seed": 3} and read_world("theirs") == {}
    for text in ("", "[]", "{}", '{"world": "moon", "seed": 0}', '{"world": "town", "seed": null}'):
        (folder / "mine/world.json").write_text(text)
        with pytest.raises(InputError, match="world.json"):
            read_world("mine")


def test_variants_of_a_response():
    text, rng = " ".join(f"w{i}" for i in range(30)), random.Random(0)
    assert vary_response("sdd", text, rng) == text
    assert vary_response("sdd_reject", text, rng) == f"{REJECT_PREFIX} {text}"
    shuffled = vary_response("shuffled", text, rng)
    assert shuffled != text and sorted(shuffled.split()) == sorted(text.split())
    with pytest.raises(InputError, match="--mode sadd is not known"):
        vary_response("sadd", text, rng)
