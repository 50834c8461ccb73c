(function () {
  const box = document.currentScript.closest(".effens-chooser");
  const [task, ...limits] = box.querySelectorAll("label:not([data-task]) select");
  const parts = [...box.querySelectorAll("section")].map(section => ({
    section, body: section.querySelector("tbody"), words: section.querySelector("caption").textContent,
    label: box.querySelector(`label[data-task="${section.dataset.task}"]`),
    rows: [...section.querySelector("tbody").rows].map((row, i) => ({row, i, name: row.cells[0].textContent,
      ...Object.fromEntries(["costs", "scores", "places", "same"].map(key => [key, JSON.parse(row.dataset[key])]))})),
  }));
  function show() {
    parts.forEach((part, i) => {
      part.section.hidden = i !== +task.value;
      part.label.hidden = part.section.hidden || part.label.querySelectorAll("option").length < 2;  // nothing to choose
    });
    const {body, rows, words, label} = parts[+task.value], goal = +label.querySelector("select").value;
    const most = limits.map(s => s.value === "any" ? Infinity : +s.value);
    for (const r of rows) r.out = r.costs.some((cost, i) => cost > most[i]);
    rows.sort((a, b) => a.out - b.out || a.places[goal] - b.places[goal]);
    for (const r of rows) {
      r.row.classList.toggle("out", r.out);
      r.row.lastElementChild.textContent = r.scores[goal].toFixed(3);
      body.append(r.row);
    }
    const fit = rows.filter(r => !r.out), best = fit[0];
    const same = fit.slice(1).filter(r => best.same[goal].includes(r.i)).map(r => r.name);
    box.querySelector("p").textContent = fit.length ?
      fit.length + " of " + rows.length + " methods are within your limits. On " + words + ", " + best.name +
      " has the best mean. " + (same.length ? "Not distinguishable from it: " + same.join("; ") :
      "All others are distinguishable from it") + "." :
      "No method is within your limits: a single network is the cheapest there is.";
  }
  box.querySelectorAll("select").forEach(s => s.addEventListener("change", show));
  show();
})();
