document.querySelectorAll(".effens-bet").forEach(function (root) {
  if (root.effensStarted) return;
  root.effensStarted = true;
  var buttons = root.querySelectorAll("button"), facts = JSON.parse(root.querySelector("script").textContent);
  buttons.forEach(function (button, i) {
    button.addEventListener("click", function () {
      buttons.forEach(function (each) { each.setAttribute("aria-pressed", each === button); });
      if (!buttons[facts.right].textContent.startsWith("✓")) buttons[facts.right].prepend("✓ ");
      root.querySelector(".reply").textContent = facts.said[i];
      root.querySelector("details").hidden = true;
      var part = root.closest(".cell");
      while (part && (part = part.nextElementSibling) && !part.matches("section, h1, h2, h3, h4"))
        [part, ...part.querySelectorAll("details")].forEach(function (fold) {
          if (fold.matches("details.answer, details.below-input")) fold.open = true;
        });
    });
  });
});
