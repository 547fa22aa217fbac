"""Greedy decoding beside the plain loop without a cache."""

import pytest
import torch
from small import LLAMA3_SCALING, small_model

import decode
from decode import KVCache, generate
from errors import InputError

PROMPTS = [[5, 9, 2], [11] * 17, [1, 2, 3, 4, 5, 6, 7], [80]]


def greedy_without_cache(model, prompt, count, stop):
    ids = list(prompt)
    for _ in range(count):
        token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt):]


def test_generate_equals_the_loop_without_cache_row_by_row():
    model = small_model(rope_scaling=LLAMA3_SCALING)
    free = [greedy_without_cache(model, prompt, 24, ()) for prompt in PROMPTS]
    stop = {free[0][5], free[2][9]}  # rows stop at different steps, some perhaps never
    alone = [greedy_without_cache(model, prompt, 24, stop) for prompt in PROMPTS]
    assert len({len(answer) for answer in alone}) > 1
    assert generate(model, PROMPTS, 24, stop) == alone
    assert [generate(model, [prompt], 24, stop)[0] for prompt in PROMPTS] == alone


def test_generate_stops_at_the_context_and_refuses_what_does_not_fit():
    model = small_model(max_position_embeddings=20)
    assert [len(answer) for answer in generate(model, PROMPTS, 50)] == [17, 3, 13, 19]
    assert generate(model, [], 5) == []
    for prompt in ([], [1] * 20):
        with pytest.raises(InputError, match="context"):
            generate(model, [prompt], 5)
