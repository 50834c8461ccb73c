// The networks of the living figure without a page: gradients, BatchEnsemble's members, what the figure claims.
const assert = require("node:assert");
const test = require("node:test");
const { Ensemble, evaluate, samplePoints, truth, NOISE, MORE, LR } = require("../chapters/effens_book/players/living.js");

const METHODS = ["single", "deep", "batch", "snapshot"], DEPTHS = [1, 2];
const arrays = (points) => ["x", "y"].map((key) => Float64Array.from(points, (point) => point[key]));
const three = [-0.4, 0, 0.4].map((x) => ({ x, y: truth(x) }));

function trained(ensemble) {
  while (!ensemble.finished) ensemble.step();
  return evaluate(ensemble);
}

// Away from its start, where the vectors of BatchEnsemble are signs.
function shaken(settings) {
  const ensemble = new Ensemble({ members: 3, width: 8, seed: 3, ...settings });
  ensemble.w.forEach((w, k) => { ensemble.w[k] = w + 0.2 * Math.sin(1 + 7 * k); });
  return ensemble;
}

for (const method of METHODS)
  for (const depth of DEPTHS)
    test(`gradients are those of finite differences: ${method}, ${depth} hidden`, () => {
      const ensemble = shaken({ method, depth }), [x, y] = arrays(samplePoints(5).slice(0, 11)), h = 1e-5;
      ensemble.gradient(x, y);
      const found = ensemble.g.slice(), { w } = ensemble;
      assert(found.some((g) => Math.abs(g) > 0.1));
      for (let k = 0; k < w.length; k++) {
        const at = w[k];
        const [up, down] = [at + h, at - h].map((value) => {
          w[k] = value;
          return ensemble.gradient(x, y);
        });
        w[k] = at;
        const error = Math.abs((up - down) / 2 / h - found[k]) / (1 + Math.abs(found[k]));
        assert(error < 1e-6, `weight ${k}: ${error}`);
      }
    });

test("the loss is the negative log-likelihood with the known noise, but for a constant", () => {
  const ensemble = shaken({ method: "deep" }), points = samplePoints(1), [x, y] = arrays(points);
  let expected = 0;
  for (const mean of ensemble.predict(x))
    for (let i = 0; i < x.length; i++) expected += ((y[i] - mean[i]) / NOISE) ** 2 / 2 / x.length;
  assert(Math.abs(ensemble.gradient(x, y) - expected) < 1e-9 * expected);
});

for (const depth of DEPTHS)
  test(`BatchEnsemble's folded members are those of an explicit loop: ${depth} hidden`, () => {
    const ensemble = shaken({ method: "batch", depth }), { w } = ensemble, x = Float64Array.of(-1.3, 0, 0.2, 2.5);
    ensemble.predict(x).forEach((found, m) => {
      const expected = Array.from(x, (value) => {
        let h = [value];
        for (const { inputs, outputs, at, r, s, b } of ensemble.vectors(m)) {
          const out = [];
          for (let o = 0; o < outputs; o++) {
            let sum = 0;
            for (let i = 0; i < inputs; i++) sum += h[i] * w[r + i] * w[at + i * outputs + o];
            const z = sum * w[s + o] + w[b + o];
            out.push(outputs === 1 ? z : z / (1 + Math.exp(-z)));
          }
          h = out;
        }
        return h[0];
      });
      expected.forEach((value, i) => assert(Math.abs(value - found[i]) < 1e-12 * (1 + Math.abs(value))));
    });
  });

for (const method of ["deep", "batch"])
  test(`the spread is in the gap, and falls when points are put there: ${method}`, () => {
    for (const seed of [1, 2]) { // of the starts and of the points
      const points = samplePoints(seed), ensemble = new Ensemble({ method, seed, members: 4, width: 20 }).fit(points);
      const before = trained(ensemble);
      assert(before.gap > 3 * before.data, `seed ${seed}: ${before.gap} in the gap, ${before.data} on the points`);
      const after = trained(ensemble.fit([...points, ...three], MORE, LR / 2));
      assert(after.gap < before.gap / 2, `seed ${seed}: ${before.gap}, then ${after.gap}`);
    }
  });

test("BatchEnsemble started at ones stays one network", () => {
  const ensemble = new Ensemble({ method: "batch", start: "ones", members: 4 }).fit(samplePoints(), 50);
  const { members, data, gap } = trained(ensemble);
  for (const mean of members) assert.deepStrictEqual(mean, members[0]);
  assert(data < 1e-12 && gap < 1e-12);
});

test("snapshots are as many as the members, differ, and fit the points", () => {
  const points = samplePoints(), ensemble = new Ensemble({ method: "snapshot", members: 5 }).fit(points);
  const { members, gap } = trained(ensemble), [x, y] = arrays(points);
  assert.strictEqual(members.length, 5);
  assert(gap > 0);
  for (const mean of ensemble.predict(x))
    assert(Math.hypot(...mean.map((at, i) => at - y[i])) < 1.3 * NOISE * Math.sqrt(x.length));
});

for (const method of METHODS)
  test(`the same seed gives the same result, another seed another: ${method}`, () => {
    const [first, again, other] = [1, 1, 2].map((seed) =>
      trained(new Ensemble({ method, members: 3, seed }).fit(samplePoints(), 50)));
    assert.deepStrictEqual(first, again);
    assert.notDeepStrictEqual(first.mean, other.mean);
  });

test("the single network is the first member of the deep ensemble", () => {
  const [single, deep] = ["single", "deep"].map((method) =>
    trained(new Ensemble({ method, members: 2 }).fit(samplePoints(), 50)));
  assert.deepStrictEqual(single.members[0], deep.members[0]);
  assert.strictEqual(single.gap, 0);
});

test("what is stored is counted", () => {
  const count = (method) => new Ensemble({ method, members: 4, width: 8, depth: 2 }).stored, one = 2 * 8 + 8 * 9 + 9;
  const batch = 8 + 64 + 8 + 4 * (1 + 8 + 8 + 8 + 8 + 1 + 8 + 8 + 1); // W shared; r, s and biases for each of 4
  assert.deepStrictEqual(METHODS.map(count), [one, 4 * one, batch, 4 * one]);
});
