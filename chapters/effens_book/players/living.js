// A figure in which an ensemble of neural networks is trained in the reader's browser, with no kernel and no library:
//   <effens-living method="deep" members="8" width="32">What it shows, for browsers without script.</effens-living>
// The first half knows nothing of the page, so that node can test it. The second half is the element.
(() => {
"use strict";

// ---- The task: two clusters of points on a curve, and a gap between them

const NOISE = 0.15; // the standard deviation of y around the curve, which the networks are told
const GAP = 0.75, EDGE = 2, SIDE = 3; // points stand where GAP < |x| < EDGE; what is drawn ends at SIDE
const GRID = Float64Array.from({ length: 121 }, (_, i) => (i - 60) * SIDE / 60);

function truth(x) {
  return 1.06 + 1.96 * Math.sin(0.54 * x - 1.31) + 1.26 * Math.sin(1.37 * x + 1.64) + 1.15 * Math.sin(2.52 * x + 1.07);
}

// Random numbers that are the same at each load (mulberry32).
function generator(state) {
  const uniform = () => {
    state = (state + 1831565813) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t ^= t + Math.imul(t ^ (t >>> 7), 61 | t);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  const normal = () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  return { uniform, normal };
}

function samplePoints(seed = 0) {
  const { uniform, normal } = generator(1e6 + seed);
  return Array.from({ length: 60 }, (_, i) => {
    const x = (i % 2 ? 1 : -1) * (GAP + (EDGE - GAP) * uniform());
    return { x, y: truth(x) + NOISE * normal() };
  });
}

// ---- One network, 1 -> width (-> width) -> 1 with SiLU, which predicts the mean of y

class Network {
  constructor(width, depth) {
    this.layers = [];
    this.size = 0;
    for (let d = 0; d <= depth; d++) {
      const inputs = d ? width : 1, outputs = d < depth ? width : 1;
      const at = this.size, bias = at + inputs * outputs; // where weights (inputs, outputs) and biases start
      this.layers.push({ inputs, outputs, at, bias });
      this.size = bias + outputs;
    }
  }

  // Wider than PyTorch's start, so that members differ where there are no points.
  start(w, { normal }) {
    for (const { inputs, outputs, at, bias } of this.layers) {
      const scale = inputs === 1 ? 2 : (outputs === 1 ? 1 : 1.6) / Math.sqrt(inputs);
      for (let k = at; k < bias + outputs; k++) w[k] = (k < bias || inputs === 1 ? scale : 0.3) * normal();
    }
  }

  forward(w, x) {
    let below = x;
    for (const layer of this.layers) {
      const { inputs, outputs, at, bias } = layer, z = new Float64Array(x.length * outputs);
      for (let r = 0; r < x.length; r++) {
        const row = r * outputs;
        for (let o = 0; o < outputs; o++) z[row + o] = w[bias + o];
        for (let i = 0; i < inputs; i++) {
          const h = below[r * inputs + i], k = at + i * outputs;
          for (let o = 0; o < outputs; o++) z[row + o] += h * w[k + o];
        }
      }
      if (layer === this.layers.at(-1)) return z;
      layer.h = new Float64Array(z.length);
      layer.slope = new Float64Array(z.length);
      for (let j = 0; j < z.length; j++) {
        const s = 1 / (1 + Math.exp(-z[j]));
        layer.h[j] = z[j] * s;
        layer.slope[j] = s * (1 + z[j] * (1 - s));
      }
      below = layer.h;
    }
  }

  // Returns the mean negative log-likelihood, but for a constant, and adds its gradient to g.
  backward(w, x, y, g) {
    const { layers } = this, errors = this.forward(w, x).map((mean, r) => (mean - y[r]) / NOISE);
    let d = errors.map((error) => error / NOISE / x.length); // the gradient at a layer's outputs, before SiLU
    for (let l = layers.length - 1; l >= 0; l--) {
      const { inputs, outputs, at, bias } = layers[l], below = l ? layers[l - 1] : { h: x };
      const next = new Float64Array(x.length * inputs);
      for (let r = 0; r < x.length; r++) {
        const row = r * outputs;
        for (let o = 0; o < outputs; o++) g[bias + o] += d[row + o];
        for (let i = 0; i < inputs; i++) {
          const p = r * inputs + i, h = below.h[p], k = at + i * outputs;
          let sum = 0;
          for (let o = 0; o < outputs; o++) {
            g[k + o] += h * d[row + o];
            sum += w[k + o] * d[row + o];
          }
          if (l) next[p] = sum * below.slope[p];
        }
      }
      d = next;
    }
    return errors.reduce((sum, error) => sum + error ** 2 / 2, 0) / x.length;
  }
}

// ---- Ensembles: what members share, and what is each member's own

const LR = 0.015, STEPS = 600; // from new random weights
const MORE = 300; // steps when points are added to a trained ensemble, with half the learning rate
const CYCLE = 100; // steps for each snapshot after the first
const DEFAULTS = { method: "deep", members: 8, width: 32, depth: 2, start: "signs", seed: 1 };

class Ensemble {
  constructor(settings) {
    const { method, members, width, depth, start, seed } = { ...DEFAULTS, ...settings };
    const net = (this.net = new Network(width, depth)), batch = method === "batch";
    this.method = method;
    this.members = method === "single" ? 1 : members; // networks that predict
    this.trained = method === "deep" || batch ? this.members : 1; // networks computed in a training step
    const sum = (count) => net.layers.reduce((total, layer) => total + count(layer), 0);
    this.own = batch ? sum(({ inputs, outputs }) => inputs + 2 * outputs) : net.size; // r, s and biases, or all
    const shared = batch ? net.size : 0, size = shared + this.trained * this.own;
    // Members of BatchEnsemble have their own biases; the shared ones are never used.
    this.stored = batch ? size - sum(({ outputs }) => outputs) : this.members * net.size;
    [this.w, this.g, this.first, this.second] = Array.from({ length: 4 }, () => new Float64Array(size));
    this.steps = 0;
    this.kept = []; // snapshots

    const random = (member) => generator(1000 * seed + member);
    if (!batch) {
      for (let m = 0; m < this.trained; m++) net.start(this.weights(m), random(m));
      return;
    }
    this.folded = new Float64Array(net.size);
    this.slopes = new Float64Array(net.size);
    net.start(this.w, random(0));
    for (let m = 0; m < members; m++) {
      const { uniform } = random(m + 1);
      for (const { bias, r, s, b, outputs } of this.vectors(m)) {
        for (let k = r; k < b; k++) this.w[k] = start === "ones" || uniform() < 0.5 ? 1 : -1;
        this.w.copyWithin(b, bias, bias + outputs);
      }
    }
  }

  // Where a member of BatchEnsemble has its vectors r (inputs) and s (outputs) and its biases b, layer by layer.
  *vectors(m) {
    let r = this.net.size + m * this.own;
    for (const layer of this.net.layers) {
      const s = r + layer.inputs, b = s + layer.outputs;
      yield { ...layer, r, s, b };
      r = b + layer.outputs;
    }
  }

  // Member m's weights as those of a plain network. For BatchEnsemble: w[i, o] r[i] s[o].
  weights(m) {
    if (this.method !== "batch") return this.w.subarray(m * this.own, (m + 1) * this.own);
    const { w, folded } = this;
    for (const { inputs, outputs, at, bias, r, s, b } of this.vectors(m)) {
      for (let i = 0, k = at; i < inputs; i++)
        for (let o = 0; o < outputs; o++, k++) folded[k] = w[k] * w[r + i] * w[s + o];
      for (let o = 0; o < outputs; o++) folded[bias + o] = w[b + o];
    }
    return folded;
  }

  // From the gradient for a folded member to that for what it was folded from.
  unfold(m) {
    const { w, g, slopes } = this;
    for (const { inputs, outputs, at, bias, r, s, b } of this.vectors(m)) {
      for (let i = 0, k = at; i < inputs; i++)
        for (let o = 0; o < outputs; o++, k++) {
          g[k] += slopes[k] * w[r + i] * w[s + o];
          g[r + i] += slopes[k] * w[k] * w[s + o];
          g[s + o] += slopes[k] * w[k] * w[r + i];
        }
      for (let o = 0; o < outputs; o++) g[b + o] += slopes[bias + o];
    }
  }

  // The gradient, in g, of the sum of the members' losses, which is returned.
  gradient(x, y) {
    let loss = 0;
    this.g.fill(0);
    for (let m = 0; m < this.trained; m++) {
      const g = this.method === "batch" ? this.slopes.fill(0) : this.g.subarray(m * this.own, (m + 1) * this.own);
      loss += this.net.backward(this.weights(m), x, y, g);
      if (this.method === "batch") this.unfold(m);
    }
    return loss;
  }

  // Trains on these points from now on: the learning rate falls to 0 once, or for snapshots once for each of them.
  fit(points, steps = STEPS, lr = LR) {
    this.x = Float64Array.from(points, ({ x }) => x);
    this.y = Float64Array.from(points, ({ y }) => y);
    this.cycles = this.method === "snapshot" ? [steps, ...Array(this.members - 1).fill(CYCLE)] : [steps];
    this.length = this.cycles.reduce((a, b) => a + b);
    this.lr = lr;
    this.done = this.at = 0; // steps in all, and in this cycle
    return this;
  }

  get finished() { return !this.cycles.length; }

  step() { // of Adam, on all points
    this.gradient(this.x, this.y);
    const { w, g, first, second } = this, t = ++this.steps;
    const cosine = (1 + Math.cos((Math.PI * this.at) / this.cycles[0])) / 2;
    const lr = this.lr * cosine * Math.sqrt(1 - 0.999 ** t) / (1 - 0.9 ** t);
    for (let k = 0; k < w.length; k++) {
      first[k] += 0.1 * (g[k] - first[k]);
      second[k] += 0.001 * (g[k] ** 2 - second[k]);
      w[k] -= lr * first[k] / (Math.sqrt(second[k]) + 1e-8);
    }
    this.done++;
    if (++this.at < this.cycles[0]) return;
    if (this.method === "snapshot") this.kept = [...this.kept, w.slice()].slice(-this.members);
    this.cycles.shift();
    this.at = 0;
  }

  // Each member's predictions. Snapshots in training: those kept so far, and the network that moves.
  predict(x) {
    const { net, kept, w } = this;
    if (this.method === "snapshot") return (this.finished ? kept : [...kept, w]).map((copy) => net.forward(copy, x));
    return Array.from({ length: this.members }, (_, m) => net.forward(this.weights(m), x));
  }
}

// What is drawn on the grid, and the members' spread: its mean where there are data and its mean in the gap.
function evaluate(ensemble) {
  const members = ensemble.predict(GRID), { length } = members;
  const mean = GRID.map((_, i) => members.reduce((sum, ys) => sum + ys[i], 0) / length);
  const spread = GRID.map((_, i) => Math.sqrt(members.reduce((sum, ys) => sum + (ys[i] - mean[i]) ** 2, 0) / length));
  const average = (inside) => {
    const found = spread.filter((_, i) => inside(Math.abs(GRID[i])));
    return found.reduce((a, b) => a + b) / found.length;
  };
  return { members, mean, spread, data: average((x) => x >= GAP && x <= EDGE), gap: average((x) => x < GAP) };
}

if (typeof module === "object") module.exports = { Ensemble, evaluate, samplePoints, truth, NOISE, MORE, LR };
if (typeof customElements === "undefined" || customElements.get("effens-living")) return;

// ---- The element

const METHODS = { // name, the book's color, what it is
  single: ["One network", "#5b5b5b", "One network is trained. It knows how noisy y is, but nothing tells it where it has never looked."],
  deep: ["Deep ensemble", "#0072b2", "Each network starts from its own random weights. All are trained on the same points."],
  batch: ["BatchEnsemble", "#d55e00", "The networks share their weights. Each scales the rows and columns by its own vectors."],
  snapshot: ["Snapshots", "#009e73", "One network is trained. Its learning rate falls to zero several times, and each time we keep a copy."],
};
const LOW = -3, HIGH = 3.4; // of y
const PLOT = 80, FLOOR = 93; // the bottom of the plot and that of the strip with the spread, in % of the picture

const STYLE = `
:host { display: block; margin: 0 0 1.25rem; line-height: 1.45; color: inherit; }
figure { --color: color-mix(in srgb, currentColor 15%, var(--hue)); }
figure, fieldset, p { margin: 0 0 .5rem; padding: 0; border: 0; min-width: 0; }
.row { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; }
.about { min-height: 1.45em; }
svg { display: block; overflow: hidden; width: 100%; }
figure > svg { height: clamp(300px, 40vw, 380px); cursor: crosshair; touch-action: manipulation; user-select: none; -webkit-user-select: none; }
path { fill: none; stroke: var(--color); stroke-width: 1; vector-effect: non-scaling-stroke; }
.mean { stroke-width: 3; }
.members { opacity: .75; }
.band, .spread { fill: var(--color); fill-opacity: .25; stroke: none; }
.spread { fill-opacity: .6; }
.noise { fill: currentColor; fill-opacity: .2; stroke: none; }
.truth { stroke: currentColor; stroke-dasharray: 5 4; opacity: .7; }
.data { fill: currentColor; opacity: .06; }
text { font-size: 12px; fill: currentColor; opacity: .8; }
.middle { text-anchor: middle; }
.end { text-anchor: end; }
circle { r: 2.5px; fill: currentColor; stroke: transparent; stroke-width: 5px; pointer-events: all; cursor: grab; }
.own { r: 6px; fill: #d81b60; stroke: Canvas; stroke-width: 1.5px; outline: none; }
.own:focus-visible { stroke: currentColor; stroke-width: 4px; }
.key { column-gap: 1rem; font-size: .8em; }
.key svg { display: inline-block; width: 24px; height: 10px; margin-right: .35em; }
label.pill, button { font: inherit; font-size: .9em; color: inherit; background: none; padding: .25em .8em; border: 1px solid currentColor; border-radius: 1.3em; cursor: pointer; }
.pill { position: relative; }
.pill input { position: absolute; opacity: 0; }
.pill:has(:checked) { border-color: var(--color); box-shadow: inset 0 0 0 1.5px var(--color); font-weight: 600; }
.toggle { min-width: 7.5em; }
button:focus-visible, summary:focus-visible, select:focus-visible, .slide input:focus-visible, .pill:has(:focus-visible) { outline: 2px solid currentColor; outline-offset: 2px; }
.slides { gap: .2rem 1.5rem; }
.slide { display: flex; align-items: center; gap: .5rem; flex: 1 1 14rem; }
.slide input { flex: 1; min-width: 0; height: 1.8em; accent-color: #0072b2; }
.slide span { min-width: 2ch; }
.said { font-weight: 600; }
.note, details, .slide { font-size: .85em; }
.note { margin-bottom: .25rem; }
select { font: inherit; min-height: 2em; color: CanvasText; background: Canvas; }
@media (pointer: coarse) {
  .keys { display: none; }
  circle { pointer-events: none; }
  .own { r: 9px; pointer-events: all; }
  label.pill, button { padding-block: .5em; }
}
@media (max-width: 500px) { .about { min-height: 2.9em; } .steps { display: none; } }
@media print {
  figure { color: #000; background: #fff; }
  .controls, details, .hint { display: none; }
}`;

const path = (name) => `<path class="${name}"/>`;
const button = (name, words) => `<button type="button" class="${name}">${words}</button>`;
const key = (name, words) => `<span><svg aria-hidden="true" viewBox="0 0 24 10"><path class="${name}" d="M0 5H24"/></svg>${words}</span>`;
const area = (name, words) => key(name, words).replace("M0 5H24", "M0 0H24V10H0Z");
const slide = (name, min, max, step) =>
  `<label class="slide">${name}<input type="range" name="${name}" min="${min}" max="${max}" step="${step}"><span aria-hidden="true"></span></label>`;
const select = (name, words, options) =>
  `<label>${words} <select name="${name}">${options.map((option) => `<option>${option}</option>`).join("")}</select></label>`;
const across = (x) => 50 + 50 * x / SIDE; // % of the picture's width
const down = (y) => PLOT * (HIGH - y) / (HIGH - LOW); // and of its height
const text = (x, y, words, name = "middle", more = "") => `<text class="${name}" x="${x}%" y="${y}%" ${more}>${words}</text>`;

const PAGE = `<style>${STYLE}</style>
<figure aria-label="Neural networks that are being trained">
<fieldset class="row controls" aria-label="Method">${Object.entries(METHODS).map(([value, [name]]) =>
  `<label class="pill"><input type="radio" name="method" value="${value}">${name}</label>`).join("")}</fieldset>
<p class="about"></p>
<svg role="group" aria-label="Picture">
<g role="img">
${[-EDGE, GAP].map((x) => `<rect class="data" x="${across(x)}%" width="${across(EDGE) - across(GAP)}%" height="${FLOOR}%"/>`).join("")}
<svg viewBox="${-SIDE} ${-HIGH} ${2 * SIDE} ${HIGH - LOW}" height="${PLOT}%" preserveAspectRatio="none">
${["band", "noise", "truth", "members", "mean"].map(path).join("")}</svg>
<svg viewBox="${-SIDE} -1 ${2 * SIDE} 1" y="${PLOT}%" height="${FLOOR - PLOT}%" preserveAspectRatio="none">${path("spread")}</svg>
${[-2, 0, 2].map((v) => text(across(v), 99, v) + text(0.6, down(v) + 1, v, "")).join("")}
${text(across(-1.375), 5, "points") + text(across(0), 5, "gap") + text(across(1.375), 5, "points")}
${text(0.6, PLOT + 1, "spread of the members", "")}
${text(99, 5, "", "end steps")}
<g class="invite hint">${text(50, 71, "Click here to") + text(50, 76, "add a point.")}</g>
</g>
<g class="points"></g>
</svg>
<p class="row key">${key("mean", "mean")}${key("members", "members")}${area("band", "95% band")}${area("noise", "noise (known)")}${key("truth", "truth (unknown)")}</p>
<p class="said" role="status"></p>
<div class="controls">
<p class="row">${button("toggle", "Pause")}${button("another", "Add a point in the gap")}${button("starts", "Other random starts")}${button("again", "Start again")}</p>
<p class="row slides">${slide("members", 1, 20, 1)}${slide("width", 4, 64, 4)}</p>
</div>
<p class="note hint" id="help">Click in the picture to add a point. Drag a point to move it, and click on a point to remove it. <span class="keys">With the keyboard, choose one of your points with Tab, move it with the arrow keys and remove it with Delete.</span></p>
<p class="note which"></p>
<p class="note cost"></p>
<details class="controls"><summary>More settings</summary>
<p class="row slides">${select("depth", "hidden layers", [1, 2])}${select("start", "vectors of BatchEnsemble start as", ["signs", "ones"])}</p></details>
</figure>`;

const curve = (ys) => "M" + Array.from(ys, (y, i) => `${GRID[i].toFixed(2)} ${(-y).toFixed(3)}`).join("L");
const ribbon = (low, high) => `${curve(low)}L${curve(high).slice(1).split("L").reverse().join("L")}Z`;
const clamp = (value, low, high) => Math.max(low, Math.min(value, high));
const fixed = (value) => value.toFixed(2).replace("-", "−");
const calm = matchMedia("(prefers-reduced-motion: reduce)");

customElements.define("effens-living", class extends HTMLElement {
  connectedCallback() {
    if (!this.shadowRoot) this.build();
    this.away = new AbortController(); // ends what would outlive the element
    const { signal } = this.away, paper = matchMedia("print");
    const finish = () => {
      this.work(4000, Infinity);
      this.show();
    };
    addEventListener("beforeprint", finish, { signal });
    paper.addEventListener("change", () => paper.matches && finish(), { signal });
    this.watch = new IntersectionObserver((entries) => {
      this.seen = entries.at(-1).isIntersecting;
      this.wake();
    }, { threshold: 0.2 });
    this.watch.observe(this.picture);
  }

  disconnectedCallback() {
    this.away.abort();
    this.watch.disconnect();
    this.seen = false;
    cancelAnimationFrame(this.frame);
  }

  build() {
    const root = this.attachShadow({ mode: "open" });
    root.innerHTML = PAGE;
    this.$ = (selector) => root.querySelector(selector);
    this.picture = this.$("figure > svg");
    this.settings = {};
    for (const name in DEFAULTS) {
      this.set(name, this.getAttribute(name) ?? DEFAULTS[name]);
      const control = this.$(name === "method" ? `[value=${this.settings.method}]` : `[name=${name}]`);
      if (name === "method") control.checked = true;
      else if (control) control.value = this.settings[name];
    }
    root.addEventListener("input", ({ target }) => {
      this.set(target.name, target.value);
      this.restart(true);
    });
    for (const name of ["toggle", "another", "starts", "again"]) this.$(`.${name}`).onclick = () => this[name]();
    // A page that turns at an arrow key does not see that something in here has the focus.
    root.addEventListener("keydown", (event) => event.ctrlKey || event.metaKey || event.altKey || event.stopPropagation());
    this.listen();
    this.again();
  }

  // ---- What the reader does

  set(name, value) { this.settings[name] = isNaN(value) ? value : +value; }

  // Networks do not forget where a point has been: when one is moved or removed they start anew.
  restart(changed = false) {
    if (changed) this.earlier = 0;
    this.ensemble = new Ensemble(this.settings).fit(this.points);
    this.go();
  }

  go() {
    this.paused = false;
    this.wake();
  }

  toggle() {
    if (this.ensemble.finished) return this.restart();
    this.paused = !this.paused;
    this.wake();
  }

  starts() {
    this.settings.seed++;
    this.restart(true);
  }

  again() {
    this.points = samplePoints();
    this.restart(true);
  }

  another() {
    const count = this.points.filter(({ own }) => own).length, x = [0, -0.4, 0.4, -0.2, 0.2, -0.6, 0.6][count % 7];
    this.add({ x, y: truth(x) });
    this.dots.lastChild.focus();
  }

  filled() { return this.points.some(({ x }) => Math.abs(x) < GAP); }

  add(point) {
    if (this.ensemble.finished && !this.filled()) this.earlier = this.found.gap;
    this.points = [...this.points, this.inside(point)];
    this.more();
  }

  more() {
    this.ensemble.fit(this.points, MORE, LR / 2);
    this.go();
  }

  move(i, point) { this.points = this.points.with(i, this.inside(point)); }

  drop(i) {
    this.points = this.points.filter((_, k) => k !== i);
    this.restart();
  }

  inside({ x, y }) { return { x: clamp(x, -SIDE, SIDE), y: clamp(y, LOW, HIGH), own: true }; }

  // Pointer: a click adds, a click on a point removes, a drag moves. Keys: on a point of the reader's.
  listen() {
    const { picture } = this, dots = (this.dots = this.$(".points"));
    let from = null, i = -1, moved = false;
    const place = ({ clientX, clientY }) => {
      const { left, top, width, height } = picture.getBoundingClientRect();
      return {
        x: ((clientX - left) / width * 2 - 1) * SIDE,
        y: HIGH - (clientY - top) / height * 100 / PLOT * (HIGH - LOW),
      };
    };
    picture.onpointerdown = (event) => {
      if (event.button || !event.isPrimary) return;
      [from, i, moved] = [event, [...dots.children].indexOf(event.target), false];
      if (i >= 0) picture.setPointerCapture(event.pointerId);
    };
    // A finger scrolls the page, unless it holds a point.
    picture.addEventListener("touchstart", (event) => i >= 0 && event.preventDefault(), { passive: false });
    picture.onpointermove = (event) => {
      moved ||= from && Math.hypot(event.clientX - from.clientX, event.clientY - from.clientY) > 5;
      if (!moved || i < 0) return;
      this.move(i, place(event));
      this.more();
    };
    picture.onpointerup = (event) => {
      if (i >= 0 && moved) this.restart();
      else if (i >= 0) this.drop(i);
      else if (from && !moved) this.add(place(event));
      [from, i] = [null, -1];
    };
    picture.onpointercancel = () => {
      if (moved && i >= 0) this.restart();
      [from, i] = [null, -1];
    };
    dots.onkeydown = (event) => {
      const at = [...dots.children].indexOf(event.target), { x, y } = this.points[at];
      const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key] ?? [];
      if (dx !== undefined) {
        this.move(at, { x: x + dx / 10, y: y + dy / 10 });
        this.restart();
      } else if (event.key === "Delete" || event.key === "Backspace") {
        this.drop(at);
        this.$(".another").focus();
      } else return;
      event.preventDefault();
    };
  }

  // ---- Training, while it is seen

  wake() {
    cancelAnimationFrame(this.frame);
    this.show();
    let last = performance.now(), owed = 0;
    const tick = (now) => {
      owed = Math.min(owed + clamp(now - last, 0, 100) / 1000 * (40 + 0.3 * this.ensemble.done), 15); // slow at first
      last = now;
      owed -= calm.matches ? this.work(40, Infinity) : this.work(8, Math.floor(owed));
      if (!calm.matches || this.ensemble.finished) this.show();
      if (!this.ensemble.finished) this.frame = requestAnimationFrame(tick);
    };
    if (this.seen && !this.paused && !this.ensemble.finished) this.frame = requestAnimationFrame(tick);
  }

  work(milliseconds, steps) {
    const end = performance.now() + milliseconds;
    let done = 0;
    for (; done < steps && !this.ensemble.finished && performance.now() < end; done++) this.ensemble.step();
    return done;
  }

  // ---- The picture, and what is said of it

  show() {
    const { ensemble, settings, points } = this, { members, mean, spread, data, gap } = (this.found = evaluate(ensemble));
    const draw = (name, d) => this.$(`figure > svg .${name}`).setAttribute("d", d);
    const edge = (width) => mean.map((y, i) => y + 1.96 * width(spread[i]));
    draw("band", ribbon(edge((s) => -Math.hypot(NOISE, s)), edge((s) => Math.hypot(NOISE, s))));
    draw("noise", ribbon(edge(() => -NOISE), edge(() => NOISE)));
    draw("truth", curve(GRID.map(truth)));
    draw("members", members.length > 1 ? members.map(curve).join("") : "");
    draw("mean", curve(mean));
    draw("spread", ribbon(spread.map(() => 0), spread.map((s) => Math.min(1, s / 1.4))));

    while (this.dots.childElementCount > points.length) this.dots.lastChild.remove();
    points.forEach(({ x, y, own }, i) => {
      const dot = this.dots.children[i] ?? this.dots.appendChild(document.createElementNS(this.picture.namespaceURI, "circle"));
      const spot = `x ${x.toFixed(1)}, y ${y.toFixed(1)}`.replaceAll("-", "−");
      const role = { class: "own", role: "slider", tabindex: 0, "aria-label": "your point", "aria-describedby": "help",
        "aria-valuemin": -SIDE, "aria-valuemax": SIDE, "aria-valuenow": x.toFixed(1), "aria-valuetext": spot };
      for (const name in role) own ? dot.setAttribute(name, role[name]) : dot.removeAttribute(name);
      dot.setAttribute("cx", `${across(x)}%`);
      dot.setAttribute("cy", `${down(y)}%`);
    });

    const [name, hue, about] = METHODS[settings.method], { finished, trained } = ensemble, filled = this.filled();
    const many = (count) => `${count} network${count > 1 ? "s" : ""}`, thousands = (count) => count.toLocaleString("en");
    const said = !finished ? (this.paused ? "Training is paused." : `The network${trained > 1 ? "s are" : " is"} being trained.`)
      : ensemble.members === 1 ? "One network cannot disagree with itself, so its band is as narrow in the gap as on the points."
      : data < 1e-9 ? "All members started from the same weights and stay the same network, so their spread is 0."
      : !filled ? `The members' spread is ${fixed(data)} on the points and ${fixed(gap)} in the gap, ${(gap / data).toFixed(1)} times as much.`
      : `With points in the gap, the members' spread there ${this.earlier ? `went from ${fixed(this.earlier)} to` : "is"} ${fixed(gap)}.`;
    const say = (selector, words) => {
      const part = this.$(selector);
      if (part.textContent !== words) part.textContent = words;
    };
    say(".said", said);
    say(".about", about);
    say(".steps", finished ? "" : `step ${ensemble.done} of ${ensemble.length}`);
    say(".toggle", finished ? "Train again" : this.paused ? "Continue" : "Pause");
    say(".which", settings.seed === 1 ? "These random starts (seed 1) were chosen because they show the matter well. Press “Other random starts” for others."
      : `These are the random starts of seed ${settings.seed}.`);
    say(".cost", `${many(trained)} ${trained > 1 ? "are" : "is"} trained, and a prediction runs ${many(ensemble.members)}. ` +
      `The method stores ${thousands(ensemble.stored)} numbers; one network has ${thousands(ensemble.net.size)}.`);
    say("[name=members] + span", `${ensemble.members}`);
    say("[name=width] + span", `${settings.width}`);
    this.$("[name=members]").disabled = settings.method === "single";
    this.$("[name=start]").disabled = settings.method !== "batch";
    this.$(".invite").style.display = finished && !filled ? "" : "none";
    this.$("figure").style.setProperty("--hue", hue);
    this.$("g[role=img]").setAttribute("aria-label", `${points.length} points in two clusters with a gap between them, the ` +
      `mean of the predictions, its 95% band and the spread of the members. ${name}: ${said}`);
  }
});
})();
