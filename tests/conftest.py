import argparse

import pytest
import torch

import train
from small import town_tokenizer

torch.set_num_threads(1)  # tiny models: threads cost more than they give, most of all on a busy machine


@pytest.fixture
def cpu():
    """Resolved device arguments."""
    return argparse.Namespace(device="cpu", dtype="fp32", compile=False, fresh=False)


@pytest.fixture
def quick_town(monkeypatch, tmp_path):
    """The town's own commands in an empty folder, with a tiny model and a few steps: plumbing, not learning."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "TOWN_MODEL", train.TOWN_MODEL | dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1))
    quick = {mode: settings | dict(steps=3, batch_size=8) for mode, settings in train.TOWN.items()}
    monkeypatch.setattr(train, "TOWN", quick)
    monkeypatch.setattr(train, "DISTINCT_BASE", {})
    monkeypatch.setitem(train.ARMS, "refusal", ("align", "aligned", quick["sdd"]))
    return tmp_path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return town_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
