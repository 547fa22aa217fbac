"""Greedy decoding beside the plain loop without a cache."""

import pytest
import torch
from small import LLAMA3_SCALING, small_model

from nanosdd import generate as decode
from nanosdd.generate import KVCache, generate
from nanosdd.errors import InputError

PROMPTS = [[5, 9, 2], [11] * 17, [1, 2, 3, 4, 5, 6, 7], [80]]


def greedy_without_cache(model, prompt, count, stop):
    ids = list(prompt)
    for _ in range(count):
        token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt):]


def test_generate_equals_the_loop_without_cache_row_by_row(monkeypatch):
    model = small_model(rope_scaling=LLAMA3_SCALING)
    free = [greedy_without_cache(model, prompt, 24, ()) for prompt in PROMPTS]
    stop = {free[0][5], free[2][9]}  # rows stop at different steps, some perhaps never
    alone = [greedy_without_cache(model, prompt, 24, stop) for prompt in PROMPTS]
    assert len({len(answer) for answer in alone}) > 1
    assert generate(model, PROMPTS, 24, stop) == alone
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # the fixed shapes; test_compile.py compiles
    assert generate(model, PROMPTS, 24, stop, compiled=True) == alone
    assert [generate(model, [prompt], 24, stop)[0] for prompt in PROMPTS] == alone


def test_generate_stops_at_the_context_and_refuses_what_does_not_fit(monkeypatch):
    model = small_model(max_position_embeddings=20)
    assert [len(answer) for answer in generate(model, PROMPTS, 50)] == [17, 3, 13, 19]
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert generate(model, PROMPTS, 50, compiled=True) == generate(model, PROMPTS, 50)  # some rows go on when done
    assert generate(model, [], 5) == []
    for prompt in ([], [1] * 20):
        with pytest.raises(InputError, match="context"):
            generate(model, [prompt], 5)


def test_in_bf16_as_well_compiled_steps_give_the_same(monkeypatch):
    model = small_model()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(model, PROMPTS, 24, {4, 70}, compiled=True) == generate(model, PROMPTS, 24, {4, 70})


def test_rows_that_leave_move_no_others_than_they_must():
    cache = KVCache(small_model().config, 6, 5)
    for layer, cached in enumerate(part for pair in cache.layers for part in pair):
        cached += torch.arange(6)[:, None, None, None] + 10 * layer
    cache.lengths = torch.tensor([7, 8, 9, 10, 11, 12])
    before = [part for pair in cache.layers for part in pair]
    assert cache.keep([1, 3, 4, 5]) == [4, 1, 5, 3]
    assert cache.lengths.tolist() == [11, 8, 12, 10]
    for layer, (cached, whole) in enumerate(zip((part for pair in cache.layers for part in pair), before)):
        assert (cached[:, 0, 0, 0] - 10 * layer).tolist() == [4, 1, 5, 3]
        assert cached.data_ptr() == whole.data_ptr()  # in place


@pytest.mark.parametrize("tied", [False, True])
def test_weights_cast_once_compute_what_autocast_does(tied):
    model = small_model(tie_word_embeddings=tied)
    tokens = torch.randint(0, 89, (3, 11), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert decode.cast_once(model) is model
        with torch.autocast("cpu", torch.bfloat16):
            expected, cast = model(tokens), decode.cast_once(model)
            assert torch.equal(cast(tokens), expected)
    assert cast.lm_head.weight.dtype == torch.bfloat16 and model.lm_head.weight.dtype == torch.float32
    assert cast.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert cast.model.norm.weight is model.model.norm.weight
