"use strict";
// Sorting of tables, and the explorer of the graph. Texts reach the page by textContent only.

function element(name, options = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (value === undefined || value === null) continue;
    if (key === "text") made.textContent = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// --- tables: numbers before text, cells without a value last in either direction
function compare(a, b) {
  const known = (cell) => cell.dataset.value !== "";
  if (!known(a) || !known(b)) return { last: Number(known(b)) - Number(known(a)) };
  const numbers = [a, b].map((cell) => cell.classList.contains("number"));
  if (numbers[0] && numbers[1]) return { order: Number(a.dataset.value) - Number(b.dataset.value) };
  if (numbers[0] !== numbers[1]) return { order: numbers[0] ? -1 : 1 };
  return { order: a.dataset.value.localeCompare(b.dataset.value, undefined, { numeric: true }) };
}

function sortBy(heading) {
  const table = heading.closest("table");
  const column = heading.cellIndex;
  const direction = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const body = table.tBodies[0];
  const rows = [...body.rows].sort((a, b) => {
    const { last, order } = compare(a.cells[column], b.cells[column]);
    return last !== undefined ? last : direction * order;
  });
  body.append(...rows);
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
}

for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}

// --- the explorer. Addresses: #output-12, #input-7; with several runs #run-1-output-12 for the second.
const RUNS = JSON.parse(document.getElementById("explorer-data").textContent);
const LIST_LENGTH = 400;
const EDGES_SHOWN = 24; // the page holds at least so many of the strongest edges of each latent of its lists
const byId = (id) => document.getElementById(id);
const format = (value) => (value === null || value === undefined ? "unknown" : Number(value.toPrecision(3)).toString());
const whole = (value) => (value === null || value === undefined ? "unknown" : value.toLocaleString("en"));

function parseHash(hash) {
  const match = /^#(?:run-(\d+)-)?(output|input)-(\d+)$/.exec(hash);
  return match && { run: Number(match[1] ?? 0), side: match[2], latent: Number(match[3]) };
}

function address(run, side, latent) {
  return `#${run ? `run-${run}-` : ""}${side}-${latent}`;
}

function neighbours(run, side, latent) {
  // An edge is [output, input, mean |J|, mean J, count], and edges come strongest first.
  const [own, other] = side === "output" ? [0, 1] : [1, 0];
  const found = run.edges.filter((edge) => edge[own] === latent).slice(0, EDGES_SHOWN);
  return found.map((edge) => ({ latent: edge[other], edge }));
}

function latentsOf(run, side, order) {
  const rows = Object.entries(run.latents)
    .filter(([key]) => key.startsWith(`${side}-`))
    .map(([key, about]) => ({ latent: Number(key.slice(side.length + 1)), ...about }));
  if (side === "input") {
    const strength = new Map();
    for (const edge of run.edges) strength.set(edge[1], (strength.get(edge[1]) ?? 0) + edge[2]);
    for (const row of rows) row.strength = strength.get(row.latent) ?? 0;
  }
  const value = (row) => (order === "number" ? -row.latent : row[order] ?? -1);
  return rows.sort((a, b) => value(b) - value(a) || a.latent - b.latent);
}

function showList(number, side, latent) {
  const run = RUNS[number];
  const order = byId("order-choice").value;
  const links = latentsOf(run, side, order).slice(0, LIST_LENGTH).map((row) =>
    element("a", { href: address(number, side, row.latent), "aria-current": row.latent === latent ? "true" : null },
      element("b", { text: `${side} ${row.latent}` }),
      element("span", { text: order === "count" ? `${whole(row.count)} tokens` : format(row.strength) })));
  const list = byId("latent-list");
  list.replaceChildren(...links);
  // Within the list alone: scrollIntoView would move the page too.
  const current = list.querySelector("[aria-current]");
  if (current) list.scrollTop += current.getBoundingClientRect().top - list.getBoundingClientRect().top - list.clientHeight / 2;
}

function bar(share, kind) {
  const made = element("div", { class: `bar ${kind}` });
  made.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return made;
}

function edgeRows(number, side, latent) {
  const found = neighbours(RUNS[number], side, latent);
  const other = side === "output" ? "input" : "output";
  const largest = Math.max(...found.map(({ edge }) => edge[2]), 1e-30);
  return found.map(({ latent: neighbour, edge }) => element("div", { class: "edge" },
    element("a", { href: address(number, other, neighbour), text: `${other} ${neighbour}` }),
    element("div", { class: "bars", "aria-hidden": "true" },
      bar(edge[2] / largest, "size"), bar(Math.abs(edge[3]) / largest, edge[3] < 0 ? "negative" : "positive")),
    element("div", { class: "values", text: `|J| ${format(edge[2])}, J ${format(edge[3])}` })));
}

function context(example, values, title, inputs) {
  const largest = Math.max(...values.map(Math.abs), 1e-30);
  const text = element("div", { dir: "auto" });
  const place = ["document", "sequence", "position"].filter((key) => key in example)
    .map((key) => `${key} ${whole(example[key])}`).join(", ");
  const where = element("div", { class: "where", text: `${title} ${format(values[example.peak] ?? largest)}; ${place}` });
  example.tokens.forEach((token, index) => {
    // A line break is shown where it stands, and as a sign, so that it can be marked too.
    const shown = token.replace(/\n/g, "\u21b5\n").replace(/\t/g, "\u21e5");
    const span = element("span", { class: "token", text: shown === "" ? "\u2205" : shown });
    let note = `${title} ${format(values[index])}`;
    if (values[index]) span.style.backgroundColor = `rgba(var(--mark), ${(0.15 + 0.75 * Math.abs(values[index]) / largest).toFixed(3)})`;
    if (inputs && inputs[index]) {
      span.classList.add("input-mark");
      note += `, input latent ${format(inputs[index])}`;
    }
    if (index === example.peak) span.classList.add("peak");
    span.setAttribute("title", note);
    text.append(span);
  });
  return element("div", { class: "context" }, where, text);
}

function showLatent(number, side, latent) {
  const run = RUNS[number];
  const key = `${side}-${latent}`;
  const about = run.latents[key];
  const view = byId("latent-view");
  if (!about) {
    byId("explorer-message").textContent =
      `There is no ${side} latent ${latent} in this page: it never fired, or it is not among the strongest.`;
    return false;
  }
  byId("explorer-message").textContent = "";
  const facts = [`active on ${whole(about.count)} tokens`, `mean activation ${format(about.mean)}`, `largest ${format(about.max)}`];
  const parts = [element("h3", { text: `${side === "output" ? "Output" : "Input"} latent ${latent}` }),
    element("p", { class: "note", text: facts.join(", ") })];
  for (const score of run.scores[key] ?? []) {
    const suffix = score.score === null ? "" : ` (score ${format(score.score)}${score.scorer ? `, ${score.scorer}` : ""})`;
    parts.push(element("p", { class: "explanation" },
      element("b", { text: "Explanation: " }), (score.explanation ?? "none") + suffix));
  }
  const rows = edgeRows(number, side, latent);
  if (side === "output" && !run.outputs.includes(latent)) {
    parts.push(element("p", { class: "note", text: "It is not among the strongest output latents: stronger edges of it may be left out." }));
  }
  parts.push(element("h3", { text: side === "output" ? "Input latents it depends on" : "Output latents it feeds" }));
  if (rows.length) {
    parts.push(element("p", { class: "note", text: "Upper bar: mean |J|. Lower bar, striped: mean J, blue where positive, orange where negative." }));
    parts.push(element("div", { class: "edges" }, ...rows));
  } else parts.push(element("p", { text: "No edge of it is in this page." }));
  const examples = run.contexts[key] ?? [];
  parts.push(element("h3", { text: "Contexts in which it is most active" }));
  if (!examples.length) parts.push(element("p", { text: "None are in this page." }));
  for (const example of examples) parts.push(context(example, example.activations, "activation"));
  parts.push(...edgeContexts(number, side, latent));
  view.replaceChildren(...parts);
  return true;
}

function edgeContexts(number, side, latent) {
  const run = RUNS[number];
  const parts = [];
  for (const { edge } of neighbours(run, side, latent)) {
    for (const example of run.edge_contexts[`${edge[0]}-${edge[1]}`] ?? []) {
      parts.push(element("p", { class: "note", text: `Edge input ${edge[1]} \u2192 output ${edge[0]}` }),
        context(example, example.jacobian, "J", example.activations_input));
    }
  }
  if (!parts.length) return [];
  const intro = "Background: size of J at each token. Underlined: the input latent is active.";
  return [element("h3", { text: "Contexts of its edges" }), element("p", { class: "note", text: intro }), ...parts];
}

function route() {
  const wanted = parseHash(location.hash);
  if (!wanted) return;
  const number = wanted.run in RUNS ? wanted.run : 0;
  byId("run-choice").value = String(number);
  byId("side-choice").value = wanted.side;
  if (showLatent(number, wanted.side, wanted.latent)) {
    byId("latent-number").value = String(wanted.latent);
    byId("explorer").scrollIntoView();
  }
  showList(number, wanted.side, wanted.latent);
  showLeftOut(number);
}

function showLeftOut(number) {
  const left = RUNS[number].left_out;
  byId("explorer-left-out").textContent = left.length ? `Left out to keep the page small: ${left.join("; ")}.` : "";
}

function first(number, side) {
  const rows = latentsOf(RUNS[number], side, byId("order-choice").value);
  if (rows.length) showLatent(number, side, rows[0].latent);
  showList(number, side, rows[0]?.latent);
  showLeftOut(number);
}

if (RUNS.length) {
  RUNS.forEach((run, number) => byId("run-choice").append(element("option", { value: number, text: run.name })));
  byId("run-label").hidden = RUNS.length === 1;
  const chosen = () => [Number(byId("run-choice").value), byId("side-choice").value];
  for (const id of ["run-choice", "side-choice"]) byId(id).addEventListener("change", () => first(...chosen()));
  byId("order-choice").addEventListener("change", () => showList(...chosen(), parseHash(location.hash)?.latent));
  byId("explorer-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = byId("latent-number").value.trim();
    if (!/^\d+$/.test(text)) {
      byId("explorer-message").textContent = "Give the number of a latent, such as 12.";
      return;
    }
    const target = address(...chosen(), Number(text));
    if (location.hash === target) route();
    else location.hash = target;
  });
  window.addEventListener("hashchange", route);
  byId("run-choice").value = "0";
  first(0, "output");
  route();
}
