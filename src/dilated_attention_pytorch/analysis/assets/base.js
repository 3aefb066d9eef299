"use strict";
const percent = (x) => (100 * x).toFixed(1) + "%";

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "rect", "circle", "line", "text", "polyline"].includes(tag);
  const node = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const tip = document.getElementById("tip");
function showTip(words, x, y) {
  tip.textContent = words;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const right = document.documentElement.clientWidth - box.width - 8;
  tip.style.left = Math.max(8, Math.min(x + 14, right)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18) + "px";
}
const hideTip = () => { tip.hidden = true; };
addEventListener("scroll", hideTip, { passive: true });

/* Line charts: one cursor for all curves, by pointer or arrow keys.
   style(name) gives { color, width, dashes }. */
function ticks(low, high) {
  const rough = (high - low) / 5.5;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= rough);
  const found = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + 1e-9; t += step) found.push(t);
  return found;
}

function lineChart(host, label, curves, low, high, format, style, axis = "step") {
  const [width, height, left, top, right, bottom] = [640, 300, 58, 10, 20, 34];
  const names = Object.keys(curves);
  const steps = curves[names[0]].map((point) => point[0]);
  const last = steps[steps.length - 1] || 1;
  const px = (step) => left + ((width - left - right) * step) / last;
  const py = (y) => top + (height - top - bottom) * (1 - (Math.min(y, high) - low) / (high - low));
  const svg = make("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0,
    "aria-label": `${label}. ` + names.map(
      (name) => `${name} ends at ${format(curves[name][steps.length - 1][1])}`).join(", ")
      + ". Arrow keys read values.",
  });
  for (const t of ticks(low, high)) {
    svg.append(
      make("line", { class: "grid", x1: left, x2: width - right, y1: py(t), y2: py(t) }),
      make("text", { x: left - 8, y: py(t) + 4, "text-anchor": "end" }, format(t, true)));
  }
  for (const t of ticks(0, last))
    svg.append(make("text", { x: px(t), y: height - 12, "text-anchor": "middle" }, String(t)));
  const cursor = make("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  svg.append(cursor);
  /* The widest lie on top. */
  for (const name of [...names].sort((a, b) => style(a).width - style(b).width)) {
    const { color, width, dashes } = style(name);
    const points = curves[name].filter((p) => p[1] <= high);
    svg.append(make("polyline", {
      points: points.map((p) => `${px(p[0]).toFixed(1)},${py(p[1]).toFixed(1)}`).join(" "),
      fill: "none", "stroke-width": width, "stroke-linejoin": "round",
      "stroke-dasharray": dashes, style: `stroke:${color}`,
    }));
  }
  let at = steps.length - 1;
  const show = (index, x, y) => {
    at = Math.max(0, Math.min(steps.length - 1, index));
    cursor.setAttribute("x1", px(steps[at]));
    cursor.setAttribute("x2", px(steps[at]));
    cursor.setAttribute("visibility", "visible");
    const values = names.map((name) => [name, curves[name][at][1]]).sort((a, b) => b[1] - a[1]);
    const words = values.map(([name, value]) => `${format(value)}  ${name}`).join("\n");
    const box = svg.getBoundingClientRect();
    showTip(`${axis} ${steps[at]}\n${words}`,
      x ?? box.left + (px(steps[at]) * box.width) / width, y ?? box.top + box.height / 3);
  };
  const hide = () => { cursor.setAttribute("visibility", "hidden"); hideTip(); };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const step = (((event.clientX - box.left) * width) / box.width - left)
      / (width - left - right) * last;
    const distances = steps.map((s) => Math.abs(s - step));
    show(distances.indexOf(Math.min(...distances)), event.clientX, event.clientY);
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    show(at + move);
  });
  const legend = make("div", { class: "legend", "aria-hidden": "true" });
  for (const name of names)
    legend.append(make("span", {},
      make("svg", { viewBox: "0 0 26 8" }, make("line", {
        x1: 0, x2: 26, y1: 4, y2: 4, "stroke-width": style(name).width + .5,
        "stroke-dasharray": style(name).dashes, style: `stroke:${style(name).color}` })), name));
  host.append(svg, legend);
}
