"""Make `definitions.npz`: ``python -m effens_book.data.make_definitions WORDNET AUSTEN WEIGHTS``.

WORDNET is the folder of WordNet 3.0's files, ``data.noun`` and ``data.adj``; AUSTEN is the file ``janeaustenr.rdb`` of
the R package janeaustenr, where the texts of the novels are; WEIGHTS is what `minilm.weights` reads, of which only the
vocabulary is needed.

A text is a definition without its examples, and without a beginning that gives the class away: "the act of ...". Each
class holds out branches of WordNet's tree, of which nothing is in the other sets: a shift that people would meet.
"""

import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from effens_book.benchmark.packing import write_arrays
from effens_book.minilm import LENGTH, tokenize, vocabulary

KINDS = ("act", "attribute", "cognition", "communication", "event", "group", "possession", "state")
NOUNS = (  # the files of nouns, from number 3 on
    *("Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling"),
    *("food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process"),
    *("quantity", "relation", "shape", "state"),
)
SIZES = {"train": 150, "val": 60, "test": 120}  # of each kind
BRANCHES, TYPOS, OTHERS = 60, 600, 300
HELD, LARGEST = 0.2, 0.1  # branches held out: of a fifth of the definitions, each of at most a tenth
SEED = 19
LEAD = re.compile(
    r"^(?:(?:the|an?) )?(?:act|action|activity|quality|state|condition|process|property|trait|fact|event|group|"
    r"communication|attribute)s? (?:or \w+ )?(?:of|by|in|that|which|when|where)(?: being| having)?\b"
)
UNFIT = re.compile(  # what one would not print, by stems
    r"sex|slur|offensive|disparag|derogat|insult|abus|obscen|vulgar|coarse|prostitut|brothel|homosex|lesbian|genital|"
    r"penis|vagina|breast|copulat|intercourse|masturbat|orgasm|ejaculat|rape|incest|nude|naked|porn|erotic|lust|"
    r"seduc|concubin|excre|feces|faeces|urin|defecat|vomit|semen|menstru|abort|suicid|murder|kill|slaughter|tortur|"
    r"genocid|lynch|behead|execut|slave|negro|racial|racis|ethnic|jew|nazi|muslim|islam|terroris|whore|bastard|damn|"
    r"idiot|moron|retard|stupid|drunk|cocaine|heroin|marijuana|suffocat|corpse|massacre|castrat|circumcis|mutilat|"
    r"blacks|whites|crippled|handicap|fetus|mating|own kind|vulva|drug|psychedel|narcotic|lame|whipping|shed blood|"
    r"testes|spermatic|syphilis|groin|human races|virtue|d--|indelicate|provocative|in heat|without clothes|ovulat|"
    r"ovar|conception|substances|strong drink|brutal|behind|intelligence|husband|cohabit|live human|\bvice\b|opposed|"
    r"hobo|asian|aged|wom[ae]n|perver|sinful|sensuous|lovers|cervix|neuter|crab lice|alcohol|stupef|wound|throwing|"
    r"short chopping|breaking|die|for men|both male|respiration|guerrilla|insan|primitiv|"
    r"promiscu|dissolut|adulter|indecen|steriliz|scrot|rectum|rectal|feculent",
    re.IGNORECASE,
)


class Synset(NamedTuple):
    """An entry of WordNet: where it is, its file of meanings, its definition, and the entry above it."""

    offset: str
    file: int
    text: str
    above: str


def synsets(path: Path) -> Iterator[Synset]:
    """Read a file of WordNet."""
    for line in path.read_text("ascii").splitlines():
        if line.startswith("  "):
            continue
        head, gloss = line.split(" | ", 1)
        text = re.sub(r'\s*;?\s*"[^"]*"?', "", gloss).strip().rstrip(";").strip()
        above = re.search(r" @i? (\d{8}) n", head)
        yield Synset(head[:8], int(head.split()[1]), text, above[1] if above else "")


def fits(text: str, vocab: dict[str, int]) -> bool:
    """Say whether a text can be used: of 3 words or more, no longer than the network reads, and fit for print."""
    whole = len(tokenize([text], vocab, length=100)[1][0].nonzero()) <= LENGTH
    return whole and len(text.split()) >= 3 and not UNFIT.search(text)


def kinds_and_branches(folder: Path, vocab: dict[str, int]) -> dict[str, dict[str, list[str]]]:
    """Return the definitions of each kind, by branch: the ancestor one below the highest of the same file."""
    nouns = {entry.offset: entry for entry in synsets(folder / "data.noun")}
    files = {3 + i: name for i, name in enumerate(NOUNS)}
    found: dict[str, dict[str, list[str]]] = {kind: defaultdict(list) for kind in KINDS}
    seen = set()
    for entry in nouns.values():
        kind, text = files.get(entry.file), LEAD.sub("", entry.text).strip()
        if kind in found and text not in seen and fits(text, vocab):
            seen.add(text)
            path = [entry.offset]
            while (above := nouns[path[-1]].above) and nouns[above].file == entry.file:
                path.append(above)
            found[kind][path[-2] if len(path) > 1 else path[-1]].append(text)
    return found


def misspell(text: str, generator: np.random.Generator, share: float = 0.3) -> str:
    """Swap two letters, or drop one, in a share of the words of four letters and more."""
    words = text.split()
    for i, word in enumerate(words):
        if len(word) >= 4 and word.isalpha() and generator.random() < share:
            at = generator.integers(1, len(word) - 1)
            swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
            words[i] = swapped if generator.random() < 0.5 else word[:at] + word[at + 1 :]
    return " ".join(words)


def novels(path: Path) -> list[str]:
    """Return sentences of Jane Austen: strings of R's format, which is XDR in zlib streams with their lengths."""
    content, at, lines = path.read_bytes(), 0, []
    while at < len(content):  # four bytes, which say how long the text is, and a stream
        reader = zlib.decompressobj()
        stream = reader.decompress(content[at + 4 :])
        at = len(content) - len(reader.unused_data)
        for found in re.finditer(rb"\x00\x04\x00\x09(.{4})", stream, re.DOTALL):
            length = int.from_bytes(found[1], "big")
            lines.append(stream[found.end() : found.end() + length].decode("utf-8", "replace"))
    text = re.sub(r"\s+", " ", " ".join(lines).replace("_", ""))
    return re.findall(r"(?<=[.!?] )[A-Z][^.!?;\"]{40,}[.!?;]", text)


def definitions(wordnet: Path, austen: Path, vocab: dict[str, int]) -> dict[str, NDArray[Any]]:
    """Draw the sets."""
    generator = np.random.default_rng(SEED)

    def shuffled(items: Any) -> list[Any]:
        items = list(items)
        return [items[i] for i in generator.permutation(len(items))]

    sets: dict[str, list[tuple[str, int]]] = {name: [] for name in (*SIZES, "branches")}
    for kind, branches in kinds_and_branches(wordnet, vocab).items():
        total, held = sum(map(len, branches.values())), list[str]()
        for name in shuffled(branches):
            if len(held) < HELD * total and len(branches[name]) < LARGEST * total:
                held += branches.pop(name)
        home, label = shuffled(text for texts in branches.values() for text in texts), KINDS.index(kind)
        for name, size in SIZES.items():
            sets[name] += [(text, label) for text in home[:size]]
            home = home[size:]
        sets["branches"] += [(text, label) for text in shuffled(held)[:BRANCHES]]
        print(kind, total, len(held))
    sets = {name: shuffled(rows) for name, rows in sets.items()}
    sets["typos"] = [(misspell(text, generator), label) for text, label in sets["test"][:TYPOS]]
    for name, file, number in (("adjectives", "data.adj", 0), ("animals", "data.noun", NOUNS.index("animal") + 3)):
        pool = sorted({entry.text for entry in synsets(wordnet / file) if entry.file == number})
        sets[name] = [(text, -1) for text in shuffled(text for text in pool if fits(text, vocab))[:OTHERS]]
    lengths = [len(text.split()) for text, _ in sets["test"]]
    cut = (" ".join(text.split()[: generator.choice(lengths)]) for text in shuffled(novels(austen)))
    sets["austen"] = [(text, -1) for text in cut if fits(text, vocab)][:OTHERS]
    arrays: dict[str, NDArray[Any]] = {"kinds": np.array(KINDS)}
    for name, rows in sets.items():
        texts, labels = zip(*rows, strict=True)
        ids = tokenize(texts, vocab)[0].numpy().astype(np.uint16)
        arrays |= {f"text_{name}": np.frombuffer("\n".join(texts).encode(), np.uint8), f"ids_{name}": ids}
        arrays |= {} if name in ("adjectives", "animals", "austen") else {f"y_{name}": np.array(labels, np.uint8)}
        print(name, len(rows), (ids != 0).sum(1).mean())
    return arrays


if __name__ == "__main__":
    wordnet, austen, weights = map(Path, sys.argv[1:])
    write_arrays(Path(__file__).with_name("definitions.npz"), definitions(wordnet, austen, vocabulary(weights)))
