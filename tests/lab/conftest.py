import pytest
from small import tiny_town

from data.chat_model import load_chat, new_chat, save_chat
from nanosdd.device import Compute


def short_town(root):
    """A tiny town with few rows and short answers: plumbing, not learning."""
    world = tiny_town(root)
    world.max_new_tokens = 6
    for group in ("defender", "evaluation", "held_out"):
        world.groups[group] = world.groups[group][:2]
    few = world.rehearsal()[:50]  # thousands take seconds to encode
    world.rehearsal = lambda: few
    return world


@pytest.fixture
def town(tmp_path):
    return short_town(tmp_path)


@pytest.fixture(scope="session")
def aligned(tmp_path_factory):
    """The folder of a random model, as if it had been aligned on the town."""
    folder = tmp_path_factory.mktemp("aligned")
    world = short_town(folder)
    chat = new_chat(world, Compute())
    save_chat(folder, chat, chat.model.state_dict())
    world.save(folder, [])
    return folder


@pytest.fixture
def chat(aligned, cpu):
    return load_chat(aligned, cpu)
