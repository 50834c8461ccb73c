// What is wider than its place scrolls: keys reach it, and the side on which more is hidden fades.
(() => {
  const BOXES = ".wide-figure, .effens-table, .pst-scrollable-table-container, .effens-player .picture, "
    + ".effens-chooser, .katex-display, div.highlight pre";
  function look(box) {
    const hidden = box.scrollWidth - box.clientWidth;
    hidden > 1 ? box.tabIndex = 0 : box.removeAttribute("tabindex");
    box.classList.toggle("more-left", box.scrollLeft > 1);
    box.classList.toggle("more-right", box.scrollLeft < hidden - 1);
  }
  const reach = new ResizeObserver(seen => seen.forEach(({target}) => look(target)));
  document.querySelectorAll(BOXES).forEach(box => {
    reach.observe(box);
    box.addEventListener("scroll", () => look(box), {passive: true});
  });
})();
