"""Our Llama beside the logits and texts that transformers gave; test_hub_folders.py asks it anew.

tests/golden/model/make_golden.py made the golden files. Weights are larger than freshly initialised
ones, and rows pass 2,000 positions: at small weights a wrong rotation or norm hides below the
tolerance.
"""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data.tokenizer import load_tokenizer
from model import Llama

FOLDER = Path(__file__).parent.parent / "golden" / "model"
GOLDEN = json.loads((FOLDER / "golden.json").read_text())


@torch.no_grad()
@pytest.mark.parametrize("name, golden", GOLDEN["models"].items())
def test_golden_logits_and_greedy_text(name, golden):
    """Logits beyond 2,000 positions, and answers in a batch of unequal prompts."""
    places = GOLDEN["places"]
    model = Llama.from_pretrained(FOLDER / name)
    stored = np.frombuffer(base64.b64decode(golden["logits_fp32_base64"]), "<f4")
    theirs = torch.tensor(stored).view(len(places), -1)
    ours = model(torch.tensor([GOLDEN["ids"]]))[0, places]
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
    tokenizer = load_tokenizer(FOLDER.parent / "chat" / "tiny_llama3")
    prompts = golden["prompts"]
    answers = model.generate([tokenizer.encode(prompt["text"]) for prompt in prompts], 64)
    assert answers == [prompt["greedy_ids"] for prompt in prompts]
    texts = [tokenizer.decode(answer) for answer in answers]
    assert texts == [prompt["greedy_text"] for prompt in prompts]
