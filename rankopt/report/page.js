"use strict";
// What the page does: it draws what is chosen. All text is set as text, never as HTML.

const report = JSON.parse(document.getElementById("data").textContent);
const state = { plan: 0, view: 0, layer: report.first };
const scales = { frontier: "log", layer: "log", predicted: "log" };
const sorted = { column: -1, up: true };
const one = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];

function made(tag, text, attributes = {}) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

const figure = (value) => (value === null ? "" : String(Number(value.toPrecision(4))));
const percent = (value, digits = 1) => (100 * value).toFixed(digits) + " %";
const rankOf = (rank) => (rank === null ? "dense" : String(rank));

// ---------------------------------------------------------------- charts

// One drawing of a chart after another, so that the last that was asked for is what stays.
const drawings = {};

function draw(id, spec, datasets, ready = () => {}) {
  const drawn = async () => {
    const before = drawings[id].result;
    if (before) before.finalize();
    // Expressions are interpreted, because the page's policy allows no code made from text.
    // Errors only: a plan that leaves a layer dense has no mark there, which is nothing to warn of.
    const logLevel = 1;
    const options = { actions: false, renderer: "svg", ast: true, hover: false, logLevel };
    drawings[id].result = await vegaEmbed("#" + id, { ...spec, datasets }, options);
    ready(drawings[id].result.view);
  };
  drawings[id] = drawings[id] || { queue: Promise.resolve(), result: null };
  drawings[id].queue = drawings[id].queue.then(drawn);
  return drawings[id].queue;
}

function drawFrontier() {
  const spec = report.charts.frontier[state.view][scales.frontier];
  return draw("frontier-chart", spec, report.views[state.view].frontier);
}

// Layers that share a cell are counted together; rankopt.report.content does the same for pictures.
function cellsOf(plan) {
  const cells = new Map();
  report.layers.forEach((layer, number) => {
    const key = JSON.stringify([layer.block, layer.kind]);
    cells.set(key, [...(cells.get(key) || []), number]);
  });
  return [...cells.values()].map((members) => {
    const layers = members.map((number) => report.layers[number]);
    const dense = layers.reduce((sum, layer) => sum + layer.parameters, 0);
    const kept = members.reduce((sum, k) => sum + report.layers[k].parameters * plan.kept[k], 0);
    const alone = members.length === 1;
    return {
      layer: members.includes(state.layer) ? state.layer : members[0],
      block: layers[0].block,
      kind: layers[0].kind,
      name: alone ? layers[0].name : members.length + " layers",
      rank: alone ? rankOf(plan.ranks[members[0]]) : "",
      kept: kept / dense,
    };
  });
}

function drawRanks() {
  if (!report.plans.length) return Promise.resolve();
  const cells = cellsOf(report.plans[state.plan]);
  return draw("ranks-chart", report.charts.ranks, { cells }, (view) => {
    view.signal("chosen", state.layer).run();
    view.addEventListener("click", (_, item) => {
      if (item && item.datum && item.datum.layer !== undefined) choose("layer", item.datum.layer);
    });
  });
}

function drawLayer() {
  const { layer, view } = state;
  const about = report.layers[layer];
  const curve = report.views[view].curves[layer];
  const points = curve.rank.map((rank, k) => ({ rank, loss: curve.loss[k] }));
  const marks = report.plans
    .filter((plan) => plan.given && plan.ranks[layer] !== null && plan.lost[view])
    .map((plan) => ({ name: plan.name, rank: plan.ranks[layer], loss: plan.lost[view][layer] }));
  const tied = about.members.length > 1 ? ` One matrix of ${about.members.join(" and ")}.` : "";
  const silent = points.length ? "" : " It loses nothing at any rank.";
  one("#layer-words").textContent =
    `${about.name}: ${about.out} × ${about.in}, ${about.parameters.toLocaleString("en")} parameters; ` +
    `in the form ${report.form}, ranks up to ${about.largest} save some.${tied}${silent}`;
  listRanks();
  return draw("layer-chart", report.charts.layer[view][scales.layer], { curve: points, marks });
}

function listRanks() {
  const list = one("#layer-ranks");
  list.replaceChildren();
  report.plans.forEach((plan, number) => {
    if (!plan.given && number !== state.plan) return;
    const rank = plan.ranks[state.layer];
    const lost = plan.lost[state.view];
    const kept = rank === null ? "dense" : `rank ${rank}, keeps ${percent(plan.kept[state.layer])}`;
    const loses = lost && rank !== null ? `, loses ${figure(lost[state.layer])}` : "";
    const item = made("li", `${plan.name}: ${kept}${loses}`);
    if (plan.given) item.style.setProperty("--colour", `var(--series-${(number % 8) + 1})`);
    list.append(item);
  });
}

function drawPredicted() {
  if (!report.points || !report.points.length) return Promise.resolve();
  const scale = scales.predicted;
  const hidden = report.points.filter((p) => p.predicted <= 0 || p.measured <= 0).length;
  one("#predicted-note").textContent =
    scale === "log" && hidden
      ? `${hidden} without an increase above zero: see the linear scale.` : "";
  const datasets = { points: report.points, diagonal: report.diagonal[scale] };
  return draw("predicted-chart", report.charts.predicted[scale], datasets);
}

// ---------------------------------------------------------------- tables

function fill(id, table) {
  const head = made("tr");
  table.columns.forEach((column, k) =>
    head.append(made("th", column, { scope: "col", class: k ? "" : "left" })));
  const body = made("tbody");
  for (const row of table.rows) {
    const line = made("tr");
    row.forEach((text, k) =>
      line.append(k ? made("td", text) : made("th", text, { scope: "row", class: "left" })));
    body.append(line);
  }
  const top = made("thead");
  top.append(head);
  one("#" + id).replaceChildren(top, body);
  one(`#${id}-note`).textContent = table.note;
}

// Title, value to sort by, text, and whether it is text rather than a number.
function columns() {
  const plan = report.plans[state.plan];
  const layers = report.layers;
  const found = [
    ["layer", (k) => k, (k) => layers[k].name, true],
    ["kind", (k) => layers[k].kind, (k) => layers[k].kind, true],
    ["shape", (k) => layers[k].out * layers[k].in, (k) => `${layers[k].out} × ${layers[k].in}`],
    ["parameters", (k) => layers[k].parameters, (k) => layers[k].parameters.toLocaleString("en")],
  ];
  if (!plan) return found;
  const full = (k) => Math.min(layers[k].out, layers[k].in);
  found.push(["rank", (k) => plan.ranks[k] ?? full(k), (k) => rankOf(plan.ranks[k])]);
  found.push(["kept", (k) => plan.kept[k], (k) => percent(plan.kept[k])]);
  const { retained, margins } = plan;
  if (retained) found.push(["retained", (k) => retained[k], (k) => percent(retained[k], 2)]);
  if (margins) found.push(["margin", (k) => margins[k], (k) => figure(margins[k])]);
  return found;
}

function fillLayers() {
  const shown = columns();
  if (sorted.column >= shown.length) sorted.column = -1;
  const order = report.layers.map((_, k) => k);
  if (sorted.column >= 0) {
    const value = shown[sorted.column][1];
    const sign = sorted.up ? 1 : -1;
    order.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      // What has no value is the last, either way.
      if (x === null || y === null) return (x === null) - (y === null) || a - b;
      return (typeof x === "string" ? x.localeCompare(y) : x - y) * sign || a - b;
    });
  }
  const head = made("tr");
  shown.forEach(([title, , , text], k) => {
    const way = sorted.column !== k ? "none" : sorted.up ? "ascending" : "descending";
    const cell = made("th", undefined, { scope: "col", "aria-sort": way, class: text ? "left" : "" });
    const button = made("button", title, { type: "button" });
    button.addEventListener("click", () => {
      sorted.up = sorted.column === k ? !sorted.up : true;
      sorted.column = k;
      fillLayers();
      all("#layers-table thead button")[k].focus();
    });
    cell.append(button);
    head.append(cell);
  });
  const body = made("tbody");
  for (const k of order) {
    const line = made("tr", undefined, { "data-layer": k });
    shown.forEach(([, , words, text], column) => {
      if (column) {
        line.append(made("td", words(k), { class: text ? "left" : "" }));
        return;
      }
      const cell = made("th", undefined, { scope: "row", class: "left" });
      const button = made("button", words(k), { type: "button" });
      button.addEventListener("click", () => {
        choose("layer", k);
        one("#layer").scrollIntoView();
      });
      cell.append(button);
      line.append(cell);
    });
    body.append(line);
  }
  const top = made("thead");
  top.append(head);
  one("#layers-table").replaceChildren(one("#layers-table caption"), top, body);
  search();
}

function search() {
  const wanted = one("#search").value.trim().toLowerCase();
  let found = 0;
  for (const line of all("#layers-table tbody tr")) {
    const layer = report.layers[Number(line.dataset.layer)];
    const fits = [...layer.members, layer.kind].some((text) => text.toLowerCase().includes(wanted));
    line.hidden = !fits;
    found += fits;
  }
  one("#found").textContent = `${found} of ${report.layers.length} layers`;
}

// ---------------------------------------------------------------- choices

function choose(what, number) {
  state[what] = number;
  for (const select of all(`select[data-state="${what}"]`)) select.value = String(number);
  if (what === "plan") fillLayers();
  const redrawn = { plan: [drawRanks, drawLayer], view: [drawFrontier, drawLayer], layer: [drawLayer] };
  const ranks = drawings["ranks-chart"];
  if (what === "layer" && ranks && ranks.result) ranks.result.view.signal("chosen", number).run();
  return Promise.all(redrawn[what].map((each) => each()));
}

function offer(what, names, groups = null) {
  for (const select of all(`select[data-state="${what}"]`)) {
    const boxes = new Map();
    names.forEach((name, number) => {
      const option = made("option", name, { value: number });
      if (!groups) { select.append(option); return; }
      const group = groups[number];
      if (!boxes.has(group)) {
        boxes.set(group, made("optgroup", undefined, { label: group }));
        select.append(boxes.get(group));
      }
      boxes.get(group).append(option);
    });
    select.value = String(state[what]);
    select.addEventListener("change", () => choose(what, Number(select.value)));
  }
}

function themed() {
  const root = document.documentElement;
  const dark = () => root.dataset.theme
    ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const told = () => {
    one("#theme").textContent = dark() ? "Light" : "Dark";
    one("#theme").setAttribute("aria-label", dark() ? "Show in light colours" : "Show in dark colours");
  };
  one("#theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    told();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", told);
  told();
}

function start() {
  const given = report.plans.filter((plan) => plan.given);
  const there = {
    plans: given.length > 0,
    views: report.views.length > 1,
    choices: report.plans.length > 0,
    rows: report.plans.length > given.length,
    points: Boolean(report.points && report.points.length),
    results: Boolean(report.measured),
  };
  for (const part of all("[data-if]")) part.hidden = !there[part.dataset.if];
  for (const part of all("section")) {
    if (part.hidden) continue;
    const item = made("li");
    item.append(made("a", part.dataset.title, { href: "#" + part.id }));
    one("#sections").append(item);
  }
  one("#version").textContent = report.rankopt;
  for (const [name, value] of report.facts.rows) {
    one("#facts").append(made("dt", name), made("dd", value));
  }
  if (there.plans) fill("certificates", report.certificates);
  if (there.results) fill("measured-table", report.measured);
  if (there.points) fill("correlations", report.correlations);
  const both = there.rows && there.plans;
  offer("plan", report.plans.map((plan) => plan.name),
    both ? report.plans.map((plan) => (plan.given ? "plans" : "measured")) : null);
  offer("view", report.views.map((view) => view.name));
  offer("layer", report.layers.map((layer) => layer.name), report.layers.map((layer) => layer.kind));
  for (const select of all("select[data-scale]")) {
    select.value = scales[select.dataset.scale];
    select.addEventListener("change", () => {
      scales[select.dataset.scale] = select.value;
      ({ frontier: drawFrontier, layer: drawLayer, predicted: drawPredicted })[select.dataset.scale]();
    });
  }
  one("#search").addEventListener("input", search);
  themed();
  fillLayers();
  return Promise.all([drawFrontier(), drawRanks(), drawLayer(), drawPredicted()]);
}

start().then(() => { document.documentElement.dataset.ready = "yes"; });
