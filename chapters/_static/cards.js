// A card beside a link: what a paper found, what a term means. By pointer, by keyboard; Escape closes it.
(() => {
  const card = document.createElement("div");
  card.className = "effens-card";
  card.id = "effens-card";
  card.setAttribute("role", "tooltip");
  let link = null, timer = 0;
  function close() {
    clearTimeout(timer);
    if (link) link.removeAttribute("aria-describedby");
    link = null;
    card.remove();
  }
  function open(next) {
    close();
    link = next;
    card.textContent = link.dataset.card;
    link.setAttribute("aria-describedby", card.id);
    document.body.append(card);
    const lines = link.getClientRects(), first = lines[0], last = lines[lines.length - 1];  // a link may wrap
    const text = (link.closest("article") || document.body).getBoundingClientRect();
    const width = Math.min(360, innerWidth - 32), right = Math.min(text.right, innerWidth - 16);
    card.style.width = width + "px";
    card.style.left = scrollX + Math.max(16, Math.min(first.left, right - width)) + "px";
    const below = last.bottom + 8 + card.offsetHeight < innerHeight || first.top < card.offsetHeight + 16;
    card.style.top = scrollY + (below ? last.bottom + 8 : first.top - 8 - card.offsetHeight) + "px";
  }
  const linkOf = event => event.target.closest?.("a[data-card]");
  document.addEventListener("pointerover", event => {
    const next = linkOf(event);
    if (event.pointerType !== "mouse" || (!next && !event.target.closest?.(".effens-card") && !link)) return;
    clearTimeout(timer);
    if (event.target.closest?.(".effens-card") || (next && next === link)) return;
    timer = setTimeout(next ? () => open(next) : close, next ? 250 : 200);
  });
  document.addEventListener("focusin", event => { const next = linkOf(event); if (next?.matches(":focus-visible")) open(next); });
  document.addEventListener("focusout", event => { if (linkOf(event)) close(); });
  document.addEventListener("keydown", event => { if (event.key === "Escape") close(); });
})();
