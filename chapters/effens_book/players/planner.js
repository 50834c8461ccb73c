document.querySelectorAll(".effens-planner").forEach(box => {
  const fields = [...box.querySelectorAll("input")], rows = [...box.querySelector("tbody").rows];
  const words = s => s < 60 ? s.toFixed(0) + " s" :
    s < 3600 ? (s / 60).toFixed(1) + " min" : (s / 3600).toFixed(1) + " h";
  function show() {
    const [n, t, start, price] = fields.map(field => field.valueAsNumber), free = fields[3].value === "";
    const fine = [n > 0 && Number.isInteger(n), t > 0, start >= 0, price >= 0 || free && !fields[3].validity.badInput];
    fields.forEach((field, i) => field.setAttribute("aria-invalid", !fine[i]));
    box.querySelector("p").textContent = fields.filter((_, i) => !fine[i]).map(field => field.dataset.rule).join("; ");
    for (const part of box.querySelectorAll("tr > :nth-child(6)")) part.hidden = !(price > 0);
    for (const row of rows) {
      const count = +row.cells[0].textContent, took = start + t * Math.ceil(n / count), hours = count * took / 3600;
      const busy = 100 * n * t / (count * took), faster = (start + t * n) / took;
      [words(took), faster.toFixed(1) + "x", busy.toFixed(0) + "%", hours.toFixed(2), (hours * price).toFixed(2)]
        .forEach((text, i) => { row.cells[i + 1].textContent = fine.includes(false) ? "" : text; });
    }
  }
  fields.forEach(field => { field.oninput = show; });
  show();
});
