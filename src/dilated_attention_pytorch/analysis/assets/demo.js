const data = JSON.parse(document.getElementById("data").textContent);
const methods = Object.keys(data);
const dashes = { dense: "7 4", adaptive: "", local: "2 3", strided: "9 3 2 3", dilated: "4 2" };
const color = (name) => `var(--${name})`;

for (const key of document.querySelectorAll(".key[data-method]"))
  key.style.setProperty("--c", color(key.dataset.method));

const style = (name) => ({
  color: color(name), width: name === "adaptive" ? 3 : 2, dashes: dashes[name],
});
const pick = (task, field) => Object.fromEntries(methods.map((m) => [m, data[m][task][field]]));
lineChart(document.getElementById("accuracy-chart"), "Accuracy by training step",
  pick("needle", "curve"), 0, 1, (x, axis) => axis ? Math.round(100 * x) + "%" : percent(x), style);
const losses = pick("text", "curve");
const everyLoss = Object.values(losses).flat().map((p) => p[1]);
/* The steep start would flatten everything else. */
const settled = Object.values(losses).map((c) => c[Math.min(2, c.length - 1)][1]);
lineChart(document.getElementById("loss-chart"), "Training loss by step", losses,
  Math.floor(10 * Math.min(...everyLoss)) / 10, Math.ceil(10 * Math.max(...settled)) / 10,
  (x, axis) => x.toFixed(axis ? 1 : 3), style);

const bars = document.getElementById("accuracy-bars");
for (const name of methods) {
  const value = data[name].needle.accuracy;
  const bar = make("div", { class: "bar" + (name === "adaptive" ? " own" : "") },
    make("span", {}, name), make("i", {}, make("b", { style: `width:${100 * value}%` })),
    make("span", {}, percent(value)));
  bar.style.setProperty("--c", color(name));
  bars.append(bar);
}

/* Block maps. */
function blockMap(name, lists, label, describe, answers) {
  const n = lists.length;
  const svg = make("svg", {
    class: "map", viewBox: `-.2 -.2 ${n + .4} ${n + .4}`, role: "img", tabindex: 0,
    "aria-label": `${label}. Arrow keys move over the tiles.`,
  });
  svg.style.setProperty("--c", color(name));
  const square = (i, j) => `M${j + .06} ${i + .06}h.88v.88h-.88z`;
  let field = "", kept = "";
  lists.forEach((row, i) => {
    for (let j = 0; j <= i; j++) if (!row.includes(j)) field += square(i, j);
    for (const j of row) kept += square(i, j);
  });
  svg.append(make("path", { class: "field", d: field }), make("path", { class: "kept", d: kept }));
  if (answers) answers.forEach((j, i) => {
    if (i) svg.append(make("circle", { class: "ring", cx: j + .5, cy: i + .5, r: .36 }));
  });
  const at = make("rect", { class: "at", width: 1, height: 1, visibility: "hidden" });
  svg.append(at);
  let [row, column] = [n - 1, n - 1];
  const show = (i, j, x, y) => {
    [row, column] = [Math.max(0, Math.min(n - 1, i)), Math.max(0, Math.min(n - 1, j))];
    at.setAttribute("x", column);
    at.setAttribute("y", row);
    at.setAttribute("visibility", "visible");
    const box = svg.getBoundingClientRect();
    const state = column > row ? "in the future" : lists[row].includes(column) ? "read" : "not read";
    showTip(`query block ${row}, key block ${column}: ${state}` + describe(row, column),
      x ?? box.left + ((column + 1) * box.width) / n, y ?? box.top + (row * box.height) / n);
  };
  const hide = () => { at.setAttribute("visibility", "hidden"); hideTip(); };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const cell = (value, start, size) => Math.floor(((value - start) / size) * (n + .4) - .2);
    show(cell(event.clientY, box.top, box.height), cell(event.clientX, box.left, box.width),
      event.clientX, event.clientY);
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    show(row + move[0], column + move[1]);
  });
  return svg;
}

/* Heads and layers with one and the same pattern share a map. */
function groups(layers) {
  const found = new Map();
  layers.forEach((heads, layer) => heads.forEach((lists, head) => {
    const key = JSON.stringify(lists);
    if (!found.has(key)) found.set(key, { lists, places: [] });
    found.get(key).places.push([layer, head]);
  }));
  const total = layers.reduce((sum, heads) => sum + heads.length, 0);
  return [...found.values()].map(({ lists, places }) => {
    let where = "every head";
    if (places.length < total) {
      const numbers = (index) => [...new Set(places.map((p) => p[index] + 1))];
      const [l, h] = [numbers(0), numbers(1)];
      where = (layers.length > 1 ? (l.length === layers.length ? "all layers, " : `layer ${l.join(", ")}, `) : "")
        + `head ${h.join(", ")}`;
    }
    return { lists, where };
  });
}

function addMap(host, name, where, note, map) {
  host.append(make("figure", {}, map,
    make("figcaption", {}, make("strong", {}, name), ` ${where}`,
      ...(note ? [make("br"), note] : []))));
}

const order = ["adaptive", ...methods.filter((m) => m !== "adaptive")];
for (const name of order) {
  const { layers, answers, right } = data[name].needle;
  for (const { lists, where } of groups(layers)) {
    const rows = lists.map((row, i) => i && row.includes(answers[i])).filter(Boolean).length;
    const note = `reads ${rows} of ${lists.length - 1} answers`;
    const describe = (i, j) => !i ? "\nno question here"
      : `\nthe answer is in block ${answers[i]}` + (j === answers[i] ? " (this one)" : "")
        + `\nanswered ${right[i] ? "right" : "wrong"}`;
    addMap(document.getElementById("needle-maps"), name, where, note,
      blockMap(name, lists, `${name}, ${where}: ${note}`, describe, answers));
  }
}

const blocks = data[methods[0]].text.blocks;
const brief = (k) => JSON.stringify(blocks[k]);
const describeText = (i, j) => j > i ? "" : `\n${brief(j)}`;
for (const name of order)
  for (const { lists, where } of groups(data[name].text.layers))
    addMap(document.getElementById("text-maps"), name, where, "",
      blockMap(name, lists, `${name}, ${where}`, describeText, null));

/* Read along. */
const chosen = { method: "adaptive", layer: 0, head: 0, block: blocks.length - 2 };
const area = document.getElementById("reader-text");
const spans = blocks.map((words, number) => {
  const span = make("span", { role: "option", id: `block-${number}` }, words);
  span.addEventListener("click", () => choose({ block: number }));
  area.append(span);
  return span;
});
area.addEventListener("keydown", (event) => {
  const move = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -1e9, End: 1e9 }[event.key];
  if (move === undefined) return;
  event.preventDefault();
  choose({ block: Math.max(0, Math.min(blocks.length - 1, chosen.block + move)) });
});

function buttons(name, field, values) {
  const set = make("fieldset", {}, make("legend", {}, name));
  for (const [value, words] of values) {
    const button = make("button", { type: "button", "data-value": value }, words);
    if (field === "method") {
      const key = make("span", { class: "key" });
      key.style.setProperty("--c", color(value));
      button.prepend(key);
    }
    button.addEventListener("click", () => choose({ [field]: value }));
    set.append(button);
  }
  set.dataset.field = field;
  return set;
}

const controls = document.getElementById("reader-controls");
function choose(change) {
  Object.assign(chosen, change);
  const layers = data[chosen.method].text.layers;
  chosen.layer = Math.min(chosen.layer, layers.length - 1);
  if (change.block === undefined) {
    const focused = document.activeElement?.dataset?.value;
    const inField = document.activeElement?.parentElement?.dataset?.field;
    const heads = Math.max(...methods.map((m) => data[m].text.layers[0].length));
    const numbers = (count) => [...Array(count).keys()].map((k) => [k, String(k + 1)]);
    controls.replaceChildren(
      buttons("Attention", "method", order.map((m) => [m, m])),
      buttons("Layer", "layer", numbers(layers.length)), buttons("Head", "head", numbers(heads)));
    if (inField) controls.querySelector(
      `[data-field="${inField}"] [data-value="${focused}"]`)?.focus();
  }
  for (const button of controls.querySelectorAll("button"))
    button.setAttribute("aria-pressed",
      String(chosen[button.parentElement.dataset.field]) === button.dataset.value);
  const heads = layers[chosen.layer];
  const lists = heads[chosen.head % heads.length];
  const read = lists[chosen.block];
  area.style.setProperty("--c", color(chosen.method));
  spans.forEach((span, number) => {
    span.className = number === chosen.block ? "here" : read.includes(number) ? "read" : "";
    span.setAttribute("aria-selected", number === chosen.block);
  });
  area.setAttribute("aria-activedescendant", `block-${chosen.block}`);
  const others = read.filter((number) => number !== chosen.block);
  document.getElementById("reader-says").textContent = `Block ${chosen.block} reads itself`
    + (others.length ? ` and block${others.length > 1 ? "s" : ""} ${others.join(", ")}` : " only")
    + ` (${read.length} of ${chosen.block + 1}).`;
  const map = blockMap(chosen.method, lists,
    `${chosen.method}, layer ${chosen.layer + 1}, head ${chosen.head + 1}`, describeText, null);
  const host = document.getElementById("reader-map");
  host.replaceChildren(map);
  map.addEventListener("click", (event) => {
    const box = map.getBoundingClientRect();
    const row = Math.floor(((event.clientY - box.top) / box.height) * (blocks.length + .4) - .2);
    choose({ block: Math.max(0, Math.min(blocks.length - 1, row)) });
  });
  const mark = make("rect", { class: "at", x: 0, y: chosen.block, height: 1, width: chosen.block + 1 });
  map.append(mark);
}
choose({});
