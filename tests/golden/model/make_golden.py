"""Make the golden files beside this script, by transformers.

They are two tiny random Llamas, their logits and their greedy text.

    pip install transformers==5.23.0 tokenizers==0.23.3 torch==2.13.0
    python tests/golden/model/make_golden.py

It imports nothing of nanoSDD. A folder for each model holds config.json, which says what kind it
is, and model.safetensors as transformers saves it; golden.json the peers' versions, a row of token
ids, the places in it at which logits are kept, and of each model

    logits_fp32_base64    there, by rows
    prompts               texts of unequal lengths, their ids by the tokenizer at TOKENIZER, and
                          what greedy decoding of each alone adds to them in 64 steps, as ids and
                          as text

llama3 has grouped queries, a tied head, scaled rotation, and heads wider than hidden_size / heads;
llama2 a key-value head for each head, a head of its own on top, and rotation slowed evenly.
Embeddings are of standard deviation 0.1 and the layers' weights of 0.3, which at this width is as
strong as 0.1 in a wider model: a slip in a layer shows in the logits. Seed 388 makes varied texts
without near ties.
"""

import base64
import json
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
TOKENIZER = HERE / "../chat/tiny_llama3/tokenizer.json"
PLACES = [17, 1023, 2051, 2099]
PROMPTS = [
    "The baker",
    "Hello, world! The bread is ready at 7, and 120 loaves are left.",
    "def area(w, h):\n    return",
]


def random_model(seed, folder):
    """In the dtype of its file, so that the file and this model agree, but computing in fp32."""
    torch.manual_seed(seed)
    config = LlamaConfig.from_pretrained(folder)
    model = LlamaForCausalLM(config).float()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(mean=float("norm" in name), std=0.1 if "embed" in name else 0.3)
        parameter.data = parameter.data.to(config.dtype).float()
    return model.eval()


@torch.no_grad()
def greedy(model, ids, steps):
    """The ids that argmax adds.

    A near tie, with which rounding could play, is an error, and so is a monotone text.
    """
    ids = list(ids)
    for _ in range(steps):
        best = model(torch.tensor([ids])).logits[0, -1].topk(2)
        assert best.values[0] - best.values[1] > 1e-4 * best.values[0].abs(), (
            "a near tie: take another seed"
        )
        ids.append(int(best.indices[0]))
    assert len(set(ids[-steps:])) > 24, "few different tokens: take another seed"
    return ids[-steps:]


def main():
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 456, (1, 2100), generator=draw)
    golden = {
        "versions": {peer.__name__: peer.__version__ for peer in (transformers, tokenizers, torch)},
        "ids": ids[0].tolist(),
        "places": PLACES,
        "models": {},
    }
    for name in ("llama3", "llama2"):
        model = random_model(388, HERE / name)
        with torch.no_grad():
            logits = model(ids).logits[0, PLACES]
        prompts = []
        for text in PROMPTS:
            prompt = tokenizer.encode(text, add_special_tokens=False).ids
            answer = greedy(model, prompt, 64)
            prompts.append(
                {
                    "text": text,
                    "ids": prompt,
                    "greedy_ids": answer,
                    "greedy_text": tokenizer.decode(answer, skip_special_tokens=False),
                }
            )
        golden["models"][name] = {
            "prompts": prompts,
            "logits_fp32_base64": base64.b64encode(logits.numpy().astype("<f4").tobytes()).decode(),
        }
        model.to(model.config.dtype).save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        (HERE / name / "model.safetensors").chmod(0o644)
    (HERE / "golden.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
