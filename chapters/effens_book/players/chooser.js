(function () {
  const box = document.currentScript.closest(".effens-chooser");
  const selects = [...box.querySelectorAll("select")], body = box.querySelector("tbody");
  const rows = [...body.rows].map((row, i) => ({row, i, name: row.cells[0].textContent,
    ...Object.fromEntries(["costs", "scores", "places", "same"].map(key => [key, JSON.parse(row.dataset[key])]))}));
  function show() {
    const limits = selects.slice(0, 4).map(s => s.value === "any" ? Infinity : +s.value), goal = +selects[4].value;
    for (const r of rows) r.out = r.costs.some((cost, i) => cost > limits[i]);
    rows.sort((a, b) => a.out - b.out || a.places[goal] - b.places[goal]);
    for (const r of rows) {
      r.row.classList.toggle("out", r.out);
      r.row.lastElementChild.textContent = r.scores[goal].toFixed(3);
      body.append(r.row);
    }
    const fit = rows.filter(r => !r.out), best = fit[0];
    const same = fit.slice(1).filter(r => best.same[goal].includes(r.i)).map(r => r.name);
    box.querySelector("p").textContent = fit.length ?
      fit.length + " of " + rows.length + " methods are within your limits. On digits " + best.name +
      " has the best mean. " + (same.length ? "Not distinguishable from it: " + same.join("; ") :
      "All others are distinguishable from it") + "." :
      "No method is within your limits: a single network is the cheapest there is.";
  }
  selects.forEach(s => s.addEventListener("change", show));
  show();
})();
