"""Attention, the only place where tokens meet: packed rows, and a cache for decoding.

Shape letters: B rows, T tokens of a row, N tokens of all packed rows (one row after the other,
without padding), S places in view, H heads, G key-value heads, D head_dim.
"""

import itertools

import torch
import torch.nn.functional as F

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # this PyTorch or GPU is without it
    varlen_attn = None


class PackedRows:
    """Causal attention within each of some rows that lie one after the other, without padding.

    lengths: of the rows, in their order. Call with q (N,H,D), k and v (N,G,D) -> (N,H,D).
    Never compiled: torch.compile would make a new graph for every list of lengths.
    """

    def __init__(self, lengths: list[int]):
        self.lengths = lengths

    @torch.compiler.disable
    def __call__(self, q, k, v):
        if varlen_attn and q.is_cuda and q.dtype != torch.float32:
            return self.on_cuda(q, k, v)
        return self.row_by_row(q, k, v)

    def row_by_row(self, q, k, v):
        """The plain way. Neighbouring rows of one length are computed together."""
        dtype = q.dtype
        if q.device.type == "cpu" and q.requires_grad:
            q, k, v = q.float(), k.float(), v.float()  # its backward pass in bf16 is far slower
        lengths = []
        sizes = []  # tokens of each group
        for T, same in itertools.groupby(self.lengths):
            lengths.append(T)
            sizes.append(sum(same))
        parts = []
        # split, not slices: the backward pass of a slice fills a tensor of all tokens with zeros.
        groups = zip(q.split(sizes), k.split(sizes), v.split(sizes))
        with torch.autocast(q.device.type, enabled=False):
            for T, group in zip(lengths, groups):
                heads = [h.unflatten(0, (-1, T)).transpose(1, 2) for h in group]  # (B,H,T,D)
                y = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
                parts.append(y.transpose(1, 2).flatten(0, 1))  # (n,H,D)
        return torch.cat(parts).to(dtype)

    def on_cuda(self, q, k, v):
        """One kernel for all rows (PyTorch's flash attention of unequal lengths)."""
        ends = [0, *itertools.accumulate(self.lengths)]
        ends = torch.tensor(ends, device=q.device, dtype=torch.int32)
        longest = max(self.lengths)
        causal = (-1, 0)  # any number of places back, none ahead
        return varlen_attn(
            q, k, v, ends, ends, longest, longest, window_size=causal, enable_gqa=True
        )


class KVCache:
    """Keys and values of every layer for B rows of up to `size` tokens each.

    Row b holds lengths[b] tokens so far, none more than `longest`.
    """

    def __init__(self, config, lengths: list[int], size: int, device, dtype):
        shape = (len(lengths), config.num_key_value_heads, size, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.lengths = torch.tensor(lengths, device=device)
        self.longest = max(lengths)
        self.size = size

    @torch.compiler.disable
    def read_prompts(self, layer: int, rows: PackedRows, q, k, v):
        """Attention of packed prompts, whose keys and values are kept."""
        keys = k.split(rows.lengths)
        values = v.split(rows.lengths)
        for b, T in enumerate(rows.lengths):
            self.keys[layer][b, :, :T] = keys[b].transpose(0, 1)  # (G,T,D)
            self.values[layer][b, :, :T] = values[b].transpose(0, 1)
        return rows(q, k, v)

    def read_token(self, layer: int, visible: torch.Tensor, q, k, v):
        """Attention of one new token in each row: q (B,H,D), k and v (B,G,D) -> (B,H,D).

        visible: (B,S) bool, the places that a row's new token may look at.
        """
        B, H, D = q.shape
        G = k.shape[1]
        S = visible.shape[1]
        keys = self.keys[layer]  # (B,G,size,D)
        values = self.values[layer]
        rows = torch.arange(B, device=q.device)
        keys[rows, :, self.lengths] = k.to(keys.dtype)
        values[rows, :, self.lengths] = v.to(keys.dtype)
        # The H/G heads of a group take the place of query positions: no kernel copies their keys.
        y = F.scaled_dot_product_attention(
            q.reshape(B, G, H // G, D).to(keys.dtype),
            keys[:, :, :S],
            values[:, :, :S],
            attn_mask=visible[:, None, None],
        )
        return y.view(B, H, D).to(q.dtype)

    def keep(self, rows: list[int]) -> list[int]:
        """Drop all other rows in place; returns which old row each row now is.

        The last of the kept rows fill the gaps, so that little is copied.
        """
        n = len(rows)
        kept = list(range(n))
        late = [row for row in rows if row >= n]
        for gap in set(kept) - set(rows):
            kept[gap] = late.pop()
            for tensor in [self.lengths, *self.keys, *self.values]:
                tensor[gap] = tensor[kept[gap]]
        self.keys = [keys[:n] for keys in self.keys]
        self.values = [values[:n] for values in self.values]
        self.lengths = self.lengths[:n]
        return kept
