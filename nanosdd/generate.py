"""Greedy decoding: the answers to prompts of unequal lengths, argmax at every step, from cached keys and values.

Shape letters as in model.py: B rows, T tokens, G key-value heads, S places of the cache, D head_dim, V vocabulary.
"""

from contextlib import nullcontext
from copy import copy, deepcopy

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from nanosdd.errors import InputError


class KVCache:
    """Keys and values of every layer for B rows of at most `size` tokens; row b holds lengths[b] of them so far, none
    more than `longest`: attention looks no further than that and the new tokens."""

    def __init__(self, config, batch: int, size: int, device=None, dtype=None):
        shape = (batch, config.num_key_value_heads, size, config.head_dim)
        self.layers = [[torch.zeros(shape, device=device, dtype=dtype) for _ in "kv"]
                       for _ in range(config.num_hidden_layers)]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.size, self.longest = size, 0

    def take(self, rows: torch.Tensor) -> "KVCache":
        """A new cache with copies of these rows (n,), any of them as often as it is named."""
        taken = copy(self)
        taken.layers = [[cached[rows] for cached in layer] for layer in self.layers]
        taken.lengths = self.lengths[rows]
        return taken

    def keep(self, rows: list[int]) -> list[int]:
        """Drop all but these rows, in place; gives which old row each one now is. The last fill the gaps of the
        others, so that little is copied."""
        n = len(rows)
        fill = dict(zip(sorted(set(range(n)) - set(rows)), (row for row in rows if row >= n)))
        to, source = (torch.tensor(list(part), dtype=torch.long, device=self.lengths.device)
                      for part in (fill.keys(), fill.values()))
        for tensor in [self.lengths, *(cached for layer in self.layers for cached in layer)]:
            tensor[to] = tensor[source]
        self.layers = [[cached[:n] for cached in layer] for layer in self.layers]
        self.lengths = self.lengths[:n]
        return [fill.get(i, i) for i in range(n)]


# ---- one step ----

class FewRows(TorchFunctionMode):
    """While on, x @ weight.T of few rows is (weight @ x.T).T: the same, but a CPU reads the weight up to twice as fast.

    What decides is which routine of the BLAS library is called. One row is computed twice where there are more
    outputs than inputs: there two are faster than one.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:  # no layer has a bias
            x, weight = args[0].flatten(0, -2), args[1]  # (n,C), (V,C)
            if 1 < len(x) <= 32 or len(x) == 1 and len(weight) > weight.shape[1]:
                y = (weight @ (x if len(x) > 1 else x.repeat(2, 1)).T).T[:len(x)]
                return y.view(*args[0].shape[:-1], -1)
        return function(*args, **(kwargs or {}))


def next_tokens(model, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """The next token of every row, (B,), after these (B,) are read; the cache's rows grow by one, up to its size."""
    new = model(tokens[:, None], cache=cache)[:, 0].argmax(dim=-1)
    cache.lengths.add_(1).clamp_(max=cache.size - 1)  # rows that are done may be carried on for a while
    return new


def compiled_step(model, tokens: torch.Tensor, cache: KVCache):
    """`next_tokens` as a function of tokens (B,) alone, compiled; on a GPU replayed as one CUDA graph, to which no
    shape may change: so attention looks at the whole cache, under the mask."""
    cache.longest = cache.size - 1
    step = torch.compile(next_tokens, dynamic=True, fullgraph=True)
    if not tokens.is_cuda:
        return lambda tokens: step(model, tokens, cache)
    given, lengths, side = tokens.clone(), cache.lengths.clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles; what is written behind a row's end is written again before it is seen
            step(model, given, cache)
    torch.cuda.current_stream().wait_stream(side)
    cache.lengths.copy_(lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        new = step(model, given, cache)

    def replay(tokens):
        given.copy_(tokens)
        graph.replay()
        return new
    return replay


def cast_once(model):
    """Under autocast, a model that shares all with this one but the weights of linear layers, which are cast now
    rather than in every compiled step; else the model itself. Computes the same."""
    weight = model.lm_head.weight
    if not torch.is_autocast_enabled(weight.device.type):
        return model
    dtype, embedding = torch.get_autocast_dtype(weight.device.type), model.model.embed_tokens.weight
    shared = {id(parameter): parameter for parameter in model.parameters()}
    shared |= {id(module.weight): torch.nn.Parameter(module.weight.to(dtype), requires_grad=False)
               for module in model.modules() if isinstance(module, torch.nn.Linear)}
    model = deepcopy(model, shared)  # what is in its memo is taken, not copied
    model.model.embed_tokens.weight = embedding  # a tied head is cast, the embedding is not
    return model


# ---- answers ----

@torch.no_grad()
def generate(model, prompts: list[list[int]], max_new_tokens: int, stop_tokens=(), compiled=False) -> list[list[int]]:
    """Greedy answers: token ids in, the new token ids out, without the stop token.

    Prompts may differ in length. Each gets the tokens that it gets alone (in fp32, ties within rounding aside): rows
    are padded on the right, keep their own positions, stop on their own and then leave the batch. A row also stops
    where the context ends. InputError for an empty or too long prompt.

    compiled: steps of fixed shapes, see `compiled_step`; rows then leave when half of the batch is done.
    """
    context = model.config.max_position_embeddings
    for prompt in prompts:
        if not 0 < len(prompt) < context:
            raise InputError(f"a prompt has {len(prompt)} tokens; it needs 1 to {context - 1} to leave room for "
                             f"an answer in this model's context of {context}: shorten it")
    answers = [[] for _ in prompts]
    if not prompts or max_new_tokens < 1:
        return answers
    model = cast_once(model) if compiled else model
    device = model.lm_head.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    plain = not torch.is_autocast_enabled(device.type)
    dtype = model.model.embed_tokens.weight.dtype if plain else torch.get_autocast_dtype(device.type)
    cache = KVCache(model.config, len(prompts), min(longest + max_new_tokens, context), device, dtype)
    new = model(tokens, positions=lengths[:, None] - 1, cache=cache)[:, 0].argmax(dim=-1)  # (B,)
    cache.lengths, cache.longest = lengths, longest  # what was padding is overwritten before it can be seen
    rows = list(range(len(prompts)))  # which answer each row of the batch belongs to
    going, step = set(rows), None
    for left in reversed(range(max_new_tokens)):
        for row, token in zip(rows, new.tolist()):
            if row in going and token not in stop_tokens:
                answers[row].append(token)
            if token in stop_tokens or len(prompts[row]) + len(answers[row]) == context:
                going.discard(row)
        if not going or not left:
            break
        if len(going) < len(rows) and (not compiled or len(going) <= len(rows) / 2):
            kept = cache.keep([i for i, row in enumerate(rows) if row in going])
            rows, new, step = [rows[i] for i in kept], new[kept], None
        if compiled:
            step = step or compiled_step(model, new, cache)
            new = step(new)
        else:
            with FewRows() if plain and device.type == "cpu" else nullcontext():
                new = next_tokens(model, new, cache)
            cache.longest = min(cache.longest + 1, cache.size - 1)
    return answers
