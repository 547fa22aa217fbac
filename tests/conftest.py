import os
import signal

import pytest
import torch
from small import TINY_SETTINGS, tiny_town, town_tokenizer

from nanosdd.device import Compute
from train import train_arm

# In the background, or under nohup, these are ignored, here and in all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # Windows has none
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(1)  # tiny models: threads cost more than they bring


def pytest_addoption(parser):
    parser.addoption(
        "--slow", action="store_true", help="also run tests that take longer than a few seconds"
    )
    parser.addoption("--full", action="store_true", help="also run tests that take minutes")


def pytest_make_parametrize_id(config, val):
    return "bytes" if isinstance(val, bytes) else None  # a gzip file holds the time


def pytest_collection_modifyitems(config, items):
    for marker, options in (("slow", ("--slow", "--full")), ("full", ("--full",))):
        if not any(config.getoption(option) for option in options):
            skip = pytest.mark.skip(reason=f"{marker}: run with --{marker}")
            for item in items:
                if marker in item.keywords:
                    item.add_marker(skip)
    for item in items:
        if "posix" in item.keywords and os.name != "posix":
            item.add_marker(pytest.mark.skip(reason="needs POSIX: signals, fork or pipes"))


@pytest.fixture
def cpu():
    return Compute()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return town_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_arms(tmp_path_factory):
    """A folder with base, aligned, refusal and sdd of town 0, tiny and trained for a few steps:
    plumbing, not learning. Copy what a test changes."""
    town = tiny_town(tmp_path_factory.mktemp("arms"))
    for mode in ("refusal", "sdd"):
        train_arm(mode, town, Compute(), table={"town": TINY_SETTINGS})
    return town.root


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
