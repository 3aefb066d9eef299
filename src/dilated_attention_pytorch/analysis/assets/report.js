const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const root = getComputedStyle(document.documentElement);
const kindColors = {
  local: "--local", sink: "--sink", periodic: "--periodic", "content-driven": "--content",
  "long-range": "--long", mixed: "--mixed",
};
for (const mark of document.querySelectorAll(".kind"))
  mark.style.setProperty("--c", `var(${kindColors[mark.dataset.kind]})`);
const limited = data.limit !== null;
const clamp = (x, low, high) => Math.max(low, Math.min(high, x));

/* Unpacking: see report.py. */
function varints(bytes) {
  const out = new Uint32Array(bytes.length);
  let count = 0, value = 0, shift = 0;
  for (const byte of bytes) {
    value |= (byte & 127) << shift;
    if (byte & 128) { shift += 7; continue; }
    out[count++] = value;
    value = shift = 0;
  }
  return out.subarray(0, count);
}

async function unpack(sample, layer) {
  const text = atob($(`chunk-${sample}-${layer}`).textContent);
  const packed = Uint8Array.from(text, (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const view = new DataView(buffer);
  const [heads, rows] = [view.getUint32(0, true), view.getUint32(4, true)];
  let at = 8 + 8 * heads;
  const streams = [];
  while (at < buffer.byteLength) {
    const length = view.getUint32(at, true);
    streams.push(new Uint8Array(buffer, at + 4, length));
    at += 4 + length;
  }
  const [kept, listed, differences] = streams.slice(0, 3).map(varints);
  const [mass, score, grid] = streams.slice(3);
  const out = [];
  let slot = 0;
  for (let head = 0; head < heads; head++) {
    const starts = new Uint32Array(rows + 1);
    const first = slot;
    for (let row = 0; row < rows; row++) starts[row + 1] = starts[row] + listed[head * rows + row];
    const keys = new Uint32Array(starts[rows]);
    for (let row = 0; row < rows; row++) {
      let key = 0;
      for (let n = starts[row]; n < starts[row + 1]; n++) keys[n] = key += differences[slot++];
    }
    const cells = data.grid * data.grid;
    out.push({
      kept: kept.subarray(head * rows, (head + 1) * rows), starts, keys,
      mass: mass.length ? mass.subarray(first, slot) : null,
      score: score.length ? score.subarray(first, slot) : null,
      grid: grid.length ? grid.subarray(head * cells, (head + 1) * cells) : null,
      low: view.getFloat32(8 + 8 * head, true), high: view.getFloat32(12 + 8 * head, true),
    });
  }
  return out;
}

const unpacked = new Map();
function lists(sample, layer) {
  const key = `${sample} ${layer}`;
  if (!unpacked.has(key)) {
    /* A few layers at a time: each may take tens of megabytes. */
    if (unpacked.size > 8) unpacked.delete(unpacked.keys().next().value);
    unpacked.set(key, unpack(sample, layer));
  }
  return unpacked.get(key);
}

const massOf = (level) => level ? 10 ** (-4 + 4 * (level - 1) / 254) : 0;
const scoreOf = (list, level) => list.low + (list.high - list.low) * (level - 1) / 254;
const massWords = (level) => level ? (100 * massOf(level)).toPrecision(2) + " %" : "below 0.01 %";

/* State. */
const chosen = { sample: 0, layer: 0, head: 0, row: 0 };
let list = null, shape = data.samples[0], cursor = [0, 0];

function fill(select, words) {
  select.replaceChildren(...words.map((word, n) => make("option", { value: n }, word)));
}
fill($("sample"), data.samples.map((s, n) => `${n + 1} of ${data.samples.length}`));
fill($("layer"), data.layers.map((name, n) => `${n + 1}: ${name}`));

function rgb(name) {
  const hex = root.getPropertyValue(name).trim().slice(1);
  return [0, 2, 4].map((n) => parseInt(hex.slice(n, n + 2), 16));
}
function ramp(low, high, t) { return low.map((x, n) => Math.round(x + (high[n] - x) * t)); }
function ramps() {
  return { low: rgb("--low"), high: rgb("--high"), forced: rgb("--forced"), cell: rgb("--cell"),
    future: rgb("--future"), row: rgb("--row"), ink: rgb("--ink") };
}

function tileLevel(n) {
  const by = $("colour").value;
  if (by === "score") return list.score[n] ? (list.score[n] - 1) / 254 : null;
  if (by === "attention") return list.mass[n] / 255;
  return 1;
}

/* The map: one pixel per tile, drawn once per head; the marks lie on a copy of it. */
let picture = null;
function paint() {
  const colors = ramps();
  const [rows, columns] = [shape.rows, shape.columns];
  const image = new ImageData(columns, rows);
  const put = (row, column, color) => {
    const at = 4 * (row * columns + column);
    image.data.set(color, at);
    image.data[at + 3] = 255;
  };
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++) {
      if (column > shape.own[row] && shape.causal) { put(row, column, colors.future); continue; }
      let color = colors.cell;
      if (list.grid) {
        const cell = Math.floor(row * data.grid / rows) * data.grid
          + Math.floor(column * data.grid / columns);
        color = ramp(colors.cell, colors.low, Math.min(1, 1.5 * list.grid[cell] / 255));
      }
      put(row, column, color);
    }
  for (let row = 0; row < rows; row++)
    for (let n = list.starts[row]; n < list.starts[row + 1]; n++) {
      const level = tileLevel(n);
      put(row, list.keys[n], level === null ? colors.forced : ramp(colors.low, colors.high, level));
    }
  picture = document.createElement("canvas");
  [picture.width, picture.height] = [columns, rows];
  picture.getContext("2d").putImageData(image, 0, 0);
  mark();
}

function mark() {
  const canvas = $("map");
  const side = Math.max(shape.rows, shape.columns);
  const scale = Math.max(1, Math.ceil(720 / side));
  [canvas.width, canvas.height] = [shape.columns * scale, shape.rows * scale];
  canvas.style.aspectRatio = `${shape.columns} / ${shape.rows}`;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  /* Two pixels of the screen, however large the canvas is shown. */
  const line = (2 * canvas.width) / Math.max(canvas.clientWidth, 1);
  context.lineWidth = line;
  context.strokeStyle = root.getPropertyValue("--row");
  context.strokeRect(line / 2, chosen.row * scale - line / 2, canvas.width - line, scale + line);
  context.strokeStyle = root.getPropertyValue("--ink");
  context.strokeRect(cursor[1] * scale - line / 2, cursor[0] * scale - line / 2,
    scale + line, scale + line);
  /* The lens: 21 x 21 tiles around the cursor. */
  const lens = $("lens").getContext("2d");
  lens.imageSmoothingEnabled = false;
  lens.fillStyle = root.getPropertyValue("--page");
  lens.fillRect(0, 0, 168, 168);
  lens.drawImage(picture, cursor[1] - 10, cursor[0] - 10, 21, 21, 0, 0, 168, 168);
  lens.strokeStyle = root.getPropertyValue("--ink");
  lens.lineWidth = 2;
  lens.strokeRect(80, 80, 8, 8);
}

function slotOf(row, column) {
  for (let n = list.starts[row]; n < list.starts[row + 1]; n++)
    if (list.keys[n] === column) return n;
  return -1;
}

function say(row, column) {
  cursor = [clamp(row, 0, shape.rows - 1), clamp(column, 0, shape.columns - 1)];
  [row, column] = cursor;
  const slot = slotOf(row, column);
  let state = "not read";
  if (slot >= 0) state = list.score && !list.score[slot] ? "read: forced" : "read";
  else if (shape.causal && column > shape.own[row]) state = "in the future";
  else if (limited && list.kept[row] > list.starts[row + 1] - list.starts[row])
    state = "not among the strongest of its row";
  const parts = [make("strong", {}, `query block ${row}, key block ${column}: ${state}`)];
  const terms = [];
  if (slot >= 0 && list.score && list.score[slot])
    terms.push(["score", scoreOf(list, list.score[slot]).toFixed(2)]);
  if (slot >= 0 && list.mass) terms.push(["attention", massWords(list.mass[slot])]);
  if (shape.texts) {
    const brief = (n) => shape.texts[n] === undefined ? "" : shape.texts[n].slice(0, 240);
    terms.push(["query", brief(shape.own[row])], ["key", brief(column)]);
  }
  parts.push(make("dl", {}, ...terms.flatMap(
    ([name, words]) => [make("dt", {}, name), make("dd", {}, words)])));
  $("tile").replaceChildren(...parts);
  mark();
}

/* The text. */
let spans = [];
function writeText() {
  spans = Array.from({ length: shape.columns }, (_, n) => make("span",
    { role: "option", id: `block-${n}`, "data-block": n },
    shape.texts ? shape.texts[n] : `${n} `));
  $("text").replaceChildren(...spans);
}
$("text").addEventListener("click", (event) => {
  const block = event.target.dataset.block;
  if (block !== undefined) chooseRow(rowOf(Number(block)));
});
const rowOf = (block) => {
  const row = shape.own.indexOf(block);
  return row < 0 ? 0 : row;
};

function scrollTo(block) {
  const text = $("text"), top = spans[block].offsetTop;
  if (top < text.scrollTop || top > text.scrollTop + text.clientHeight - 40)
    text.scrollTop = top - text.clientHeight / 2;
}

/* What a row reads may lie far away in a long text: buttons scroll there, the strongest first. */
function offerJumps(row, own) {
  const slots = [];
  for (let n = list.starts[row]; n < list.starts[row + 1]; n++)
    if (list.keys[n] !== own) slots.push(n);
  if (list.mass) slots.sort((a, b) => list.mass[b] - list.mass[a]);
  $("jumps").replaceChildren(...slots.slice(0, 12).map((n) => {
    const words = list.mass ? ` (${massWords(list.mass[n])})` : "";
    const button = make("button", { type: "button" }, `block ${list.keys[n]}${words}`);
    button.addEventListener("click", () => scrollTo(list.keys[n]));
    return button;
  }));
}

function lightUp() {
  const { row } = chosen;
  const own = shape.own[row];
  for (const span of spans) { span.className = ""; span.removeAttribute("aria-selected"); }
  const read = [];
  for (let n = list.starts[row]; n < list.starts[row + 1]; n++) {
    const key = list.keys[n];
    if (key === own) continue;
    read.push(key);
    spans[key].className = "read";
    const much = list.mass ? 15 + 60 * list.mass[n] / 255 : 35;
    spans[key].style.setProperty("--much", `${much.toFixed(0)}%`);
  }
  spans[own].className = "here";
  spans[own].setAttribute("aria-selected", "true");
  $("text").setAttribute("aria-activedescendant", `block-${own}`);
  scrollTo(own);
  offerJumps(row, own);
  const shown = list.starts[row + 1] - list.starts[row];
  const of = shown < list.kept[row] ? `; the ${shown} strongest of ${list.kept[row]} are marked` : "";
  const names = read.length > 12 ? `${read.slice(0, 12).join(", ")} and ${read.length - 12} more`
    : read.join(", ");
  $("reads").textContent = `Query block ${row} reads ${list.kept[row]} of ${
    shape.causal ? own + 1 : shape.columns} blocks: itself`
    + (read.length ? ` and ${names}` : " only") + of + ".";
}

function chooseRow(row) {
  chosen.row = clamp(row, 0, shape.rows - 1);
  lightUp();
  mark();
}

const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
  PageUp: [-16, 0], PageDown: [16, 0], Home: [0, -1e9], End: [0, 1e9] };
function fromPointer(event) {
  const box = $("map").getBoundingClientRect();
  return [Math.floor(((event.clientY - box.top) / box.height) * shape.rows),
    Math.floor(((event.clientX - box.left) / box.width) * shape.columns)];
}
$("map").addEventListener("pointermove", (event) => { if (list) say(...fromPointer(event)); });
$("map").addEventListener("click", (event) => {
  if (!list) return;
  say(...fromPointer(event));
  chooseRow(cursor[0]);
});
$("map").addEventListener("keydown", (event) => {
  if (!list) return;
  if (event.key === "Enter" || event.key === " ") chooseRow(cursor[0]);
  else if (moves[event.key]) say(cursor[0] + moves[event.key][0], cursor[1] + moves[event.key][1]);
  else return;
  event.preventDefault();
});
$("text").addEventListener("keydown", (event) => {
  const move = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -1e9, End: 1e9 }[event.key];
  if (move === undefined || !list) return;
  event.preventDefault();
  chooseRow(chosen.row + move);
});

/* Choosing sample, layer and head. */
let turn = 0;
async function show(change) {
  const before = { ...chosen };
  Object.assign(chosen, change);
  const heads = data.heads[chosen.layer];
  chosen.head = clamp(chosen.head, 0, heads - 1);
  const mine = ++turn;
  const every = await lists(chosen.sample, chosen.layer);
  /* A later choice overtook this one. */
  if (mine !== turn) return;
  list = every[chosen.head];
  const fresh = shape !== data.samples[chosen.sample] || !spans.length;
  shape = data.samples[chosen.sample];
  if (fresh) {
    writeText();
    chosen.row = Math.floor(0.8 * (shape.rows - 1));
    cursor = [chosen.row, shape.own[chosen.row]];
  }
  if (before.layer !== chosen.layer || !$("head").options.length)
    fill($("head"), Array.from({ length: heads }, (_, n) => `${n + 1} of ${heads}`));
  for (const name of ["sample", "layer", "head"]) $(name).value = chosen[name];
  const colours = [...(list.mass ? ["attention"] : []), ...(list.score ? ["score"] : []), "read"];
  const wanted = $("colour").value || colours[0];
  $("colour").replaceChildren(...colours.map((c) => make("option", { value: c }, c)));
  $("colour").value = colours.includes(wanted) ? wanted : colours[0];
  redraw();
}

function swatch(name, words, kind = "") {
  const mark = make("i", { class: kind });
  mark.style.setProperty("--c", `var(${name})`);
  return make("span", {}, mark, words);
}

function redraw() {
  const by = $("colour").value;
  const numbers = data.statistics.map(
    (s) => [s.name, s.values[chosen.layer][chosen.head]]).filter(([, x]) => x !== null);
  const kind = data.kinds[chosen.layer][chosen.head];
  const period = data.periods[chosen.layer][chosen.head];
  const words = kind === "periodic" ? `${kind} (every ${period} blocks)` : kind;
  $("about-head").textContent = `Layer ${chosen.layer + 1}, head ${chosen.head + 1}: ${words}; `
    + numbers.map(([name, x]) => `${name} ${x.toFixed(2)}`).join(", ") + ".";
  const legend = {
    attention: [make("span", {}, "attention 0.01 %", make("i", { class: "ramp" }), "100 %")],
    score: [make("span", {}, `score ${list.low.toFixed(1)}`, make("i", { class: "ramp" }),
      list.high.toFixed(1)), swatch("--forced", "forced")],
    read: [swatch("--high", "read")],
  }[by];
  $("scale").replaceChildren(...legend, swatch("--cell", "not read"), swatch("--row", "chosen row"));
  $("limit").hidden = !limited;
  $("limit").textContent = `So that the file stays small, every row shows its ${data.limit} `
    + "strongest tiles; the shade behind them is the share of tiles that are read there.";
  $("map").setAttribute("aria-label", `Block map of layer ${chosen.layer + 1}, head ${
    chosen.head + 1}: ${shape.rows} query blocks by ${shape.columns} key blocks. ${kind}.`);
  paint();
  say(...cursor);
  lightUp();
  for (const cell of cells.flat())
    cell.setAttribute("aria-selected",
      Number(cell.dataset.layer) === chosen.layer && Number(cell.dataset.head) === chosen.head);
  drawProfile();
}
for (const name of ["sample", "layer", "head"])
  $(name).addEventListener("change", () => show({ [name]: Number($(name).value) }));
$("colour").addEventListener("change", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => list && redraw());

/* The matrix of heads. */
const matrix = $("matrix");
const most = Math.max(...data.heads);
matrix.style.gridTemplateColumns = `auto repeat(${most}, 1.25rem)`;
const cells = data.layers.map((name, layer) => {
  const row = make("div", { role: "row" },
    make("span", { class: "name", role: "rowheader", title: name }, String(layer + 1)));
  const made = Array.from({ length: most }, (_, head) => {
    if (head >= data.heads[layer]) { row.append(make("span")); return null; }
    const cell = make("span", {
      role: "gridcell", tabindex: layer || head ? -1 : 0, "data-layer": layer, "data-head": head });
    row.append(cell);
    return cell;
  }).filter(Boolean);
  matrix.append(row);
  return made;
});
fill($("statistic"), ["kind", ...data.statistics.map((s) => s.name)]);

function colourMatrix() {
  const number = Number($("statistic").value) - 1;
  const statistic = number < 0 ? null : data.statistics[number];
  $("about-statistic").textContent = statistic ? `${statistic.name}: ${statistic.about}`
    : "kind: by the rules below";
  const values = statistic ? statistic.values.flat().filter((x) => x !== null) : [];
  const [low, high] = [Math.min(...values), Math.max(...values)];
  for (const cell of cells.flat()) {
    const [layer, head] = [Number(cell.dataset.layer), Number(cell.dataset.head)];
    const kind = data.kinds[layer][head];
    const value = statistic ? statistic.values[layer][head] : null;
    const share = high > low ? (value - low) / (high - low) : 1;
    cell.style.setProperty("--c", !statistic ? `var(${kindColors[kind]})` : value === null
      ? "var(--cell)" : `color-mix(in srgb, var(--high) ${100 * share}%, var(--low))`);
    const says = statistic ? (value === null ? "not measured" : value.toFixed(3)) : kind;
    cell.setAttribute("aria-label", `layer ${layer + 1}, head ${head + 1}: ${says}`);
  }
  const kinds = [...new Set(data.kinds.flat())];
  $("matrix-scale").replaceChildren(...(statistic
    ? [make("span", {}, low.toFixed(3), make("i", { class: "ramp" }), high.toFixed(3))]
    : kinds.map((kind) => swatch(kindColors[kind],
      `${kind} (${data.kinds.flat().filter((k) => k === kind).length})`))));
}
$("statistic").addEventListener("change", colourMatrix);
const tell = (cell) => { $("about-cell").textContent = cell.getAttribute("aria-label"); };
matrix.addEventListener("pointerover", (event) => {
  if (event.target.dataset.head !== undefined) tell(event.target);
});
matrix.addEventListener("focusin", (event) => tell(event.target));
matrix.addEventListener("click", (event) => {
  const { layer, head } = event.target.dataset;
  if (head !== undefined) show({ layer: Number(layer), head: Number(head) });
});
matrix.addEventListener("keydown", (event) => {
  const { layer, head } = event.target.dataset;
  if (head === undefined) return;
  if (event.key === "Enter" || event.key === " ") event.target.click();
  else if (moves[event.key]) {
    const row = clamp(Number(layer) + moves[event.key][0], 0, cells.length - 1);
    const next = cells[row][clamp(Number(head) + moves[event.key][1], 0, cells[row].length - 1)];
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  } else return;
  event.preventDefault();
});

/* Charts. */
const plain = (color, width = 2, dashes = "") => ({ color, width, dashes });
function drawProfile() {
  const profile = data.profiles[chosen.layer][chosen.head];
  const step = shape.columns / profile.length;
  const points = profile.map((y, n) => [Math.round(n * Math.max(1, step)), y]);
  $("profile").replaceChildren();
  lineChart($("profile"), "Share of the tiles that are read, by distance in blocks",
    { "share read": points }, 0, 1, (x, axis) => axis ? x.toFixed(1) : percent(x),
    () => plain("var(--high)"), "distance");
}

const palette = ["--high", "--local", "--long", "--periodic", "--mixed", "--sink"];
for (const chart of data.charts) {
  const host = make("div", { class: "chart" });
  $("charts").append(make("figure", {}, make("figcaption", {}, chart.title), host));
  const values = Object.values(chart.series).flat().map((p) => p[1]);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (high - low < 1e-6) [low, high] = [low - 0.5, high + 0.5];
  const room = 0.05 * (high - low);
  const names = Object.keys(chart.series);
  const styleOf = (name) => {
    const n = names.indexOf(name);
    return plain(`var(${palette[n % palette.length]})`, 2, n < palette.length ? "" : "5 3");
  };
  lineChart(host, chart.title, chart.series, low - room, high + room,
    (x, axis) => Number(x.toPrecision(axis ? 2 : 4)).toString(), styleOf);
}

/* Means by layer. */
const mean = (values) => {
  const known = values.filter((x) => x !== null);
  return known.length ? (known.reduce((a, b) => a + b, 0) / known.length).toFixed(3) : "–";
};
$("means").append(
  make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "Layer"),
    ...data.statistics.map((s) => make("th", { scope: "col" }, s.name)))),
  make("tbody", {}, ...data.layers.map((name, layer) => make("tr", {},
    make("th", { scope: "row" }, `${layer + 1}`),
    ...data.statistics.map((s) => make("td", {}, mean(s.values[layer])))))));

colourMatrix();
show({});
