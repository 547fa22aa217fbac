"""How alike two texts are: SentenceBERT's cosine, or that of shared words without any weights."""

from pathlib import Path

import torch

from data.sentence import SentenceEncoder, package_folder
from data.tfidf import Tfidf
from data.worlds import Sources
from nanosdd.checkpoint import check_readable
from nanosdd.errors import InputError


def similarity(sources: Sources, corpus: list[str]):
    """The function (texts, other texts) -> their cosines that the sources ask for.

    corpus: texts whose words tf-idf counts. InputError as of similarity_files.
    """
    files = similarity_files(sources)
    if not files:
        return Tfidf(corpus).cosines
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return SentenceEncoder(files[0].parent, device).cosines


def similarity_files(sources: Sources) -> list[Path]:
    """The files of SentenceBERT's weights, none for tf-idf.

    InputError for weights that are not there, and for flags that do not go together.
    """
    threshold = sources.similarity_threshold
    if not -1 <= threshold <= 1:
        raise InputError(f"--similarity-threshold {threshold} is no cosine; give -1 to 1")
    if sources.similarity == "tfidf":
        if sources.similarity_model:
            raise InputError("--similarity-model goes with --similarity minilm; leave one out")
        return []
    folder = Path(sources.similarity_model or package_folder())
    files = [folder / "model.safetensors", folder / "vocab.txt"]
    for file in files:
        check_readable(file)
    return files
