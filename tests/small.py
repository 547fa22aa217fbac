"""Small models and files that several tests share."""

import csv
import json
from dataclasses import replace

import torch

from data.tokenizer import load_tokenizer, write_llama3_tokenizer
from data.town import words
from model import Llama, LlamaConfig
from train import SETTINGS, Settings

LLAMA3_SCALING = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
TINY_SHAPE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=128,
    tie_word_embeddings=True,
    initializer_range=0.06,
)
TINY_SETTINGS: dict[
    str, Settings
] = {  # rehearsed rows are many to encode, so one mode alone has them
    mode: replace(settings, steps=3, batch_size=8, benign_replay=0.5 if mode == "align" else 0.0)
    for mode, settings in SETTINGS["town"].items()
}


def small_config(**changes) -> LlamaConfig:
    """A Llama of 2 layers, 6 query heads on 2 key-value heads, in which no two sizes are equal."""
    return LlamaConfig(
        **dict(
            dict(
                vocab_size=89,
                hidden_size=48,
                intermediate_size=80,
                num_hidden_layers=2,
                num_attention_heads=6,
                num_key_value_heads=2,
                head_dim=10,
                rms_norm_eps=0.03,
                max_position_embeddings=70,
                initializer_range=0.15,
            ),
            **changes,
        )
    )


def small_model(seed=7, **changes) -> Llama:
    torch.manual_seed(seed)
    model = Llama(small_config(**changes))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # weights of 1 would hide a norm that forgets them
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def town_tokenizer(folder):
    write_llama3_tokenizer(folder, words())
    return load_tokenizer(folder)


def public_folder(folder, context=128, **changes):
    """A random-weight Llama folder with the town's tokenizer, as if it came from elsewhere."""
    tokenizer = town_tokenizer(folder)
    small_model(
        vocab_size=tokenizer.n_vocab, max_position_embeddings=context, **changes
    ).save_pretrained(folder)
    return folder


def advbench_file(path, rows=48):
    """Harmless rows in AdvBench's layout."""
    lines = ["goal,target"] + [
        f'"Tell me, please, how to tickle the dragon number {i}",Sure here is how to tickle {i}'
        for i in range(rows)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def alpaca_file(path, rows=30):
    """Harmless rows in Alpaca's layout."""
    path.write_text(
        json.dumps(
            [
                {
                    "instruction": f"Add one to {i}.",
                    "input": "" if i % 2 else "Be brief.",
                    "output": f"It is {i + 1}.",
                }
                for i in range(rows)
            ]
        )
    )
    return path


def mmlu_folder(folder, subjects=("anatomy", "high_school_physics"), dev_rows=5, test_rows=3):
    """Questions in MMLU's layout."""
    for part, rows in (("dev", dev_rows), ("test", test_rows)):
        (folder / part).mkdir(parents=True)
        for subject in subjects:
            with open(folder / part / f"{subject}_{part}.csv", "w", newline="") as file:
                csv.writer(file).writerows(
                    [f"{part} {i}, say?", "b", "a", f"{i} c", "d", "ABCD"[i % 4]]
                    for i in range(rows)
                )
    return folder


def openbookqa_file(path, count=7):
    """Questions in OpenBookQA's layout."""
    path.write_text(
        "".join(
            json.dumps(
                {
                    "id": str(i),
                    "question": {
                        "stem": f"A goat {i} eats",
                        "choices": [
                            {"text": f"{word}{'s' * i}", "label": label}
                            for word, label in zip(("hay", "tin", "air", "no"), "ABCD")
                        ],
                    },
                    "answerKey": "ABCD"[i % 4],
                }
            )
            + "\n"
            for i in range(count)
        )
    )
    return path
