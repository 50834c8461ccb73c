"""Cards: what a link leads to, shown where the pointer rests. A paper shows what it found, a term what it means.

The first time that a page uses a term of the glossary, the term becomes a link, so that writers need not mark it.
"""

from __future__ import annotations

import html
import re
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from pybtex.database import parse_file
from sphinx.application import Sphinx

REFERENCES = Path(__file__).parents[1] / "references.bib"
GLOSSARY = "chapters/glossary"
# Not links: they are common words, or stand for a method that has a chapter of its own.
UNLINKED = {
    "kernel",
    "player",
    "benchmark",
    "deep ensemble",
    "MIMO",
    "SWAG",
    "TabM",
    "snapshot ensemble",
    "member",
    "stream",
}
LINK = re.compile(r'<a class="reference (?:external|internal)" href="([^"]+)"')


@cache
def papers() -> dict[str, str]:
    """Return what each paper is and what it found, by its address, with lower-case letters."""
    found = {}
    for entry in parse_file(str(REFERENCES)).entries.values():
        fields, people = entry.fields, entry.persons["author"]
        names = [" ".join(person.last_names) for person in people]
        who = names[0] + (" et al." if len(names) > 2 else f" and {names[1]}" if len(names) > 1 else "")
        title = fields["title"] + ("" if fields["title"].endswith("?") else ".")
        words = f"{who} ({fields['year']}): {title} {fields.get('note', '')}"
        for kind, start in {"eprint": "https://arxiv.org/abs/", "doi": "https://doi.org/"}.items():
            if kind in fields:
                found[(start + fields[kind]).lower()] = re.sub(r"[{}]|\\['`\"^]", "", words).strip()
    return found


def terms(app: Sphinx) -> dict[str, tuple[str, str]]:
    """Return the place and the meaning of each term of the glossary, by its name."""
    found = {}
    for item in app.env.get_doctree(GLOSSARY).findall(nodes.definition_list_item):
        meaning = item.next_node(nodes.paragraph)
        for term in item.findall(nodes.term):  # those that mean the same
            if meaning is not None:
                found[term.astext()] = (term["ids"][0], " ".join(meaning.astext().split()))
    return found


def link_terms(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Make a link of each term where a page first uses it in its text."""
    if page == GLOSSARY or not page.startswith("chapters/") or app.builder.format != "html":
        return
    left = {name: place for name, (place, _) in terms(app).items() if name not in UNLINKED}
    pattern = re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, left)) + r")(?![\w-])")
    for paragraph in doctree.findall(nodes.paragraph):
        for text in [child for child in paragraph.children if isinstance(child, nodes.Text)]:
            parts: list[nodes.Node] = []
            for i, words in enumerate(pattern.split(text.astext())):  # text, term, text, term, ... text
                if i % 2 and words in left:
                    place = f"{Path(GLOSSARY).name}.html#{left.pop(words)}"
                    parts.append(nodes.reference("", words, refuri=place, internal=True))
                elif words:
                    parts.append(nodes.Text(words))
            text.parent.replace(text, parts)


def add_cards(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Write the text of its card into each link that leads to a paper or a term."""
    meanings = {f"glossary.html#{place}": meaning for place, meaning in terms(app).values()}

    def carded(link: re.Match[str]) -> str:
        address = html.unescape(link[1])
        words = papers().get(address.lower()) or meanings.get(address)
        return f'{link[0]} data-card="{html.escape(words)}"' if words else link[0]

    if "body" in context and page != GLOSSARY:
        context["body"] = LINK.sub(carded, context["body"])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the above with Sphinx."""
    app.add_js_file("cards.js", defer="")
    app.connect("doctree-resolved", link_terms)
    app.connect("html-page-context", add_cards)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
