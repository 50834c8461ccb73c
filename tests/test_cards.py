"""Cards beside links: what a paper found, what a term means."""

from types import SimpleNamespace
from typing import Any

import pytest
from docutils import nodes
from docutils.utils import new_document

from effens_book import cards


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A builder of pages, and a glossary of two terms and one that is not linked."""
    meanings = {
        "NLL": ("term-NLL", "Minus the log likelihood."),
        "nats": ("term-nats", "A unit."),
        "member": ("m", "One."),
    }
    monkeypatch.setattr(cards, "terms", lambda app: meanings)
    return SimpleNamespace(builder=SimpleNamespace(format="html"))


def test_a_paper_says_who_when_what_and_what_it_found() -> None:
    found = cards.papers()
    assert found["https://arxiv.org/abs/1612.01474"].startswith("Lakshminarayanan et al. (2017): Simple and Scalable")
    assert found["https://arxiv.org/abs/1612.01474"].endswith("better uncertainty than Monte Carlo dropout.")
    assert found["https://doi.org/10.1145/1498765.1498785"].startswith("Williams et al. (2009): Roofline")
    assert not [words for words in found.values() if "{" in words or "?." in words]


def test_a_term_is_linked_where_it_is_first_used_and_nowhere_else(app: Any) -> None:
    page = new_document("page")
    for words in ("The NLL in nats, for each member.", "An NLL-like score, NLL again."):
        page += nodes.paragraph("", "", nodes.Text(words))
    page += nodes.literal_block("", "nats")
    cards.link_terms(app, page, "chapters/swag")
    links = [(link["refuri"], link.astext()) for link in page.findall(nodes.reference)]
    assert links == [("glossary.html#term-NLL", "NLL"), ("glossary.html#term-nats", "nats")]
    assert page.astext().split("\n\n")[0] == "The NLL in nats, for each member."


@pytest.mark.parametrize("name", ["chapters/glossary", "genindex"])
def test_other_pages_stay_as_they_are(app: Any, name: str) -> None:
    page = new_document("page")
    page += nodes.paragraph("", "", nodes.Text("NLL"))
    cards.link_terms(app, page, name)
    assert not list(page.findall(nodes.reference))


def test_links_get_the_text_of_their_card(app: Any) -> None:
    body = (
        '<a class="reference external" href="https://arxiv.org/abs/2002.06715">BatchEnsemble</a> '
        '<a class="reference internal" href="glossary.html#term-nats">nats</a> '
        '<a class="reference external" href="https://example.org">elsewhere</a>'
    )
    context = {"body": body}
    cards.add_cards(app, "chapters/swag", "", context, None)
    first, second, third = context["body"].split("</a>")[:3]
    assert 'data-card="Wen et al. (2020): ' in first
    assert 'data-card="A unit."' in second
    assert "data-card" not in third
