"""How much memory a training step takes, by arithmetic, with split weights (`train.py --weights bf16`).

    python -m bench.memory                                Llama-2-7B, 24 rows of 512 tokens, --checkpoint-activations
    python -m bench.memory --model DIR --micro-batch 8    the model of another config.json, 8 rows at once

Prints what is held, in GiB, at the three moments that can be the peak of a step. Shape letters as in model.py; bf16
takes 2 bytes. Rows are full, N = B T, and all of their tokens count as response, so real data take less. Not counted:
the CUDA context (about 0.5 GiB), fragmentation, and the workspace of matrix products. Attention never holds its (T,S)
scores. tests/bench/test_memory.py measures a step on a CPU.
"""

import argparse

from model import LlamaConfig
from nanosdd.checkpoint import read_config
from nanosdd.errors import InputError, run_script
from nanosdd.split_adamw import SLICE
from sdd_loss import CHUNK_LOGITS

GPU_GIB = 74  # usable memory of an 80 GB GPU


def parameter_counts(config: LlamaConfig) -> tuple[int, int, int]:
    """Parameters of (the embedding, one layer, the head and the last norm): V C, C (2 H D + 2 G D + 3 I + 2), V C + C.
    A tied head is the embedding and counts there."""
    C, I, H, G, D = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    embedding, layer = config.vocab_size * C, C * (2 * H * D + 2 * G * D + 3 * I + 2)
    return embedding, layer, C if config.tie_word_embeddings else embedding + C


def layer_bytes(config: LlamaConfig, N: int) -> tuple[int, int]:
    """(what one layer keeps for its backward pass, the most that this pass adds to it) for N tokens.

    Kept: of each of the two norms its input in fp32, the normalised bf16 and the product with the weight, 8 N C, and
    4 N of scales; bf16 cos and sin for q and k, 4 N D; of attention q, k, v (k and v once for each of the H heads) and
    the output, 8 N H D, a copy of the output for o_proj, 2 N H D, and the softmax's scale, 4 N H; of the MLP the gate,
    silu(gate), up and their product, 8 N I.
    Added, in the backward pass of the MLP's product: gradients of silu(gate) and up, 4 N I (that of the product takes
    the product's place), of the layer's output, 2 N C, and of down_proj, 2 C I.
    """
    C, I, H, D = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.head_dim,
    )
    return N * (16 * C + 8 + 4 * D + 10 * H * D + 4 * H + 8 * I), N * (4 * I + 2 * C) + 2 * C * I


def step_memory(
    config: LlamaConfig, rows: int, length: int, checkpointed=True, accumulating=False
) -> dict:
    """{moment of a step: {what is held: bytes}}; the peak is the largest sum.

    rows: at once. accumulating: they are not the first micro-batch, so all gradients exist already. With P parameters:

    always: weights 2 P, low halves 2 P, two moments of AdamW 4 P, and before the optimizer's step 4 N D of cos and sin
        in fp32.
    loss: what layers keep, or with checkpointed only the input of each, 2 N C; of the last norm and the gradient by
        its output 10 N C; of the head the weight's gradient in fp32 and a bf16 part of it, 6 V C, and a chunk of
        logits: bf16, fp32 and their gradient in bf16, 8 bytes each, or 12 where the previous chunk is still held.
    backward: the worst layer: what the layers below it keep, its own activations again, and gradients, 2 bytes a
        parameter, of what is above it; while gradients outgrow what is freed this is the first layer. With
        accumulating, gradients are 2 P at all three moments.
    optimizer: gradients 2 P, and 26 bytes for each element of a slice.
    """
    N, L, C, V = rows * length, config.num_hidden_layers, config.hidden_size, config.vocab_size
    embedding, layer, head = parameter_counts(config)
    P = embedding + L * layer + head
    kept, added = layer_bytes(config, N)
    inputs, again = (2 * N * C, kept) if checkpointed else (kept, 0)
    held = {"weights": 2 * P, "low halves": 2 * P, "two moments": 4 * P}
    tables = {"cos and sin": 4 * N * config.head_dim}

    def at_layer(l):
        above = head + (L - 1 - l) * layer
        if config.tie_word_embeddings:
            above += embedding
        return {
            **held,
            "gradients": 2 * (P if accumulating else above),
            **tables,
            "kept by layers": (l + 1) * inputs,
            "one layer again": again,
            "its gradients": added,
        }

    chunk = min(N, max(1, CHUNK_LOGITS // V))
    head_bytes = (8 if chunk == N else 12) * chunk * V + 6 * V * C + 10 * N * C
    largest = max(embedding, C * config.intermediate_size)  # elements of a tensor
    return {
        "loss": {
            **held,
            "gradients": 2 * P if accumulating else 0,
            **tables,
            "kept by layers": L * inputs,
            "head": head_bytes,
        },
        "backward": max((at_layer(l) for l in range(L)), key=lambda terms: sum(terms.values())),
        "optimizer": {**held, "gradients": 2 * P, "slices": 26 * min(SLICE, largest)},
    }


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--model",
        metavar="DIR",
        help="folder with a config.json (default: the shape of Llama-2-7B)",
    )
    p.add_argument("--batch-size", type=int, default=24, help="rows of a step (default: 24)")
    p.add_argument(
        "--micro-batch", type=int, default=0, help="rows at once (default: the whole batch)"
    )
    p.add_argument("--max-length", type=int, default=512, help="tokens of a row (default: 512)")
    p.add_argument(
        "--keep-activations", action="store_true", help="without --checkpoint-activations"
    )
    args = p.parse_args(argv)
    if min(args.batch_size, args.max_length) < 1 or args.micro_batch < 0:
        raise InputError(
            "--batch-size and --max-length must be 1 or more, and --micro-batch 0 or more"
        )
    rows = min(args.micro_batch or args.batch_size, args.batch_size)
    config = LlamaConfig.from_dict(read_config(args.model)) if args.model else LlamaConfig()
    moments = step_memory(
        config, rows, args.max_length, not args.keep_activations, rows < args.batch_size
    )
    print(f"GiB for {rows} rows of {args.max_length} tokens at once")
    for moment, terms in moments.items():
        terms["sum"] = sum(terms.values())
        print(
            "\n".join(
                [
                    f"\n{moment}",
                    *(f"  {name:<20}{size / 2**30:>8.2f}" for name, size in terms.items()),
                ]
            )
        )
    peak = max(terms["sum"] for terms in moments.values()) / 2**30
    print(
        f"\npeak {peak:.1f} GiB: {'fits' if peak <= GPU_GIB else 'does not fit'} in {GPU_GIB} GiB"
    )


if __name__ == "__main__":
    run_script(main)
