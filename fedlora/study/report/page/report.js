"use strict";

// Show and hide a run in all charts.
for (const button of document.querySelectorAll("[data-toggle]")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    for (const part of document.querySelectorAll(`.series[data-series="${button.dataset.toggle}"]`)) {
      part.classList.toggle("off", !shown);
    }
  });
}

// Hide all runs, to look at a few of many, and show all again.
for (const all of document.querySelectorAll("[data-all]")) {
  all.addEventListener("click", () => {
    const hiding = all.dataset.all === "hide";
    for (const button of document.querySelectorAll(`[data-toggle][aria-pressed=${hiding}]`)) button.click();
    all.dataset.all = hiding ? "show" : "hide";
    all.textContent = hiding ? "Show all" : "Hide all";
  });
}

// Sort a table by a column; numbers start with the largest, or where less is better with the smallest; missing
// values stay last.
function compare(a, b) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const numbers = [Number(a), Number(b)];
  return numbers.some(Number.isNaN) ? a.localeCompare(b) : numbers[0] - numbers[1];
}

function sortBy(table, header, column) {
  const numeric = header.classList.contains("number");
  const before = header.getAttribute("aria-sort");
  const descending = before === null ? numeric && !("lower" in header.dataset) : before === "ascending";
  const value = (row) => row.cells[column].dataset.value;
  const rows = [...table.tBodies[0].rows].sort((first, second) => {
    const [a, b] = [value(first), value(second)];
    return descending && a !== "" && b !== "" ? compare(b, a) : compare(a, b);
  });
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll(".sortable")) {
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => sortBy(table, header, column));
  });
}

// A table as text, as it is shown: its visible columns, in its order.
function cellsOf(table) {
  return [...table.rows].map((row) => [...row.cells].filter((cell) => !cell.hidden).map((cell) => {
    const [main, ...small] = [...(cell.querySelector("button") ?? cell).childNodes].map((part) => part.textContent.trim());
    return small.filter(Boolean).length ? `${main} (${small.filter(Boolean).join(" ")})` : main;
  }));
}

const LATEX = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "\u2013": "--", "\u2212": "$-$", "\u00a0": "~"};
const FORMS = {
  csv: (rows) => rows.map((row) => row.map((text) => /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text).join(",")).join("\n"),
  Markdown: (rows) => {
    const lines = rows.map((row) => `| ${row.map((text) => text.replaceAll("|", "\\|")).join(" | ")} |`);
    return [lines[0], `|${rows[0].map((_, column) => column ? " ---: " : " --- ").join("|")}|`, ...lines.slice(1)].join("\n");
  },
  LaTeX: (rows) => {
    const plain = (text) => text.replace(/[&%_#${}]/g, "\\$&").replace(/[\\](?![&%_#${}])|[~^\u2013\u2212\u00a0]/g, (sign) => LATEX[sign]);
    const lines = rows.map((row) => `${row.map(plain).join(" & ")} \\\\`);
    return [`\\begin{tabular}{l${"r".repeat(rows[0].length - 1)}}`, "\\toprule", lines[0], "\\midrule", ...lines.slice(1), "\\bottomrule", "\\end{tabular}"].join("\n");
  },
};

function tableText(table, form) {
  return FORMS[form](cellsOf(table)) + "\n";
}

function button(parent, text, act) {
  const made = document.createElement("button");
  [made.type, made.textContent] = ["button", text];
  made.addEventListener("click", () => act(made));
  parent.append(made);
  return made;
}

// By a text field where the browser keeps the clipboard from a file's page.
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = document.createElement("textarea");
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
}

for (const table of document.querySelectorAll(".scroll table")) {
  const tools = document.createElement("div");
  tools.className = "tools";
  tools.append("Copy as");
  for (const form of Object.keys(FORMS)) button(tools, form, async (made) => {
    await copy(tableText(table, form));
    made.textContent = `${form}: copied`;
    setTimeout(() => { made.textContent = form; }, 1500);
  });
  table.parentElement.after(tools);
}

// Columns of the table of all runs: those that fit, until a reader chooses.
function chooseColumns(table) {
  const headers = [...table.tHead.rows[0].cells], room = table.parentElement;
  const tools = room.nextElementSibling, more = document.createElement("details"), boxes = document.createElement("div");
  const summary = document.createElement("summary");
  boxes.className = "columns";
  more.append(summary, boxes);
  tools.append(more);
  let chosen = false;
  const show = (column, shown) => {
    for (const row of table.rows) row.cells[column].hidden = !shown;
    if (headers[column].box) headers[column].box.checked = shown;
    const hidden = headers.filter((header) => header.hidden).length;
    summary.textContent = hidden ? `Columns (${hidden} more)` : "Columns";
  };
  headers.forEach((header, column) => {
    if (!column) return;
    const label = document.createElement("label"), box = document.createElement("input");
    [box.type, box.checked, header.box] = ["checkbox", true, box];
    box.addEventListener("change", () => { chosen = true; show(column, box.checked); });
    label.append(box, header.querySelector("button").textContent);
    boxes.append(label);
  });
  const fit = () => {
    if (chosen) return;
    headers.forEach((_, column) => show(column, true));
    const order = headers.map((_, column) => column).slice(1);
    order.sort((a, b) => headers[b].dataset.rank - headers[a].dataset.rank || b - a);
    while (order.length > 1 && room.scrollWidth > room.clientWidth) show(order.shift(), false);
  };
  fit();
  addEventListener("resize", fit);
}
chooseColumns(document.querySelector("#all-runs"));

// A chart by itself: colours as they are now, a legend of the runs that are shown.
function chartText(chart) {
  const styles = getComputedStyle(document.documentElement), drawn = chart.querySelector("svg").cloneNode(true);
  for (const part of drawn.querySelectorAll(".off")) part.remove();
  const [, , width, height] = drawn.getAttribute("viewBox").split(" ").map(Number);
  const keys = new Set([...drawn.querySelectorAll("[data-series]")].map((part) => part.dataset.series));
  const named = [...document.querySelectorAll("[data-toggle]")].filter((one) => keys.has(one.dataset.toggle));
  const columns = 3, size = drawn.namespaceURI;
  named.forEach((one, place) => {
    const [x, y] = [(place % columns) * width / columns + 8, height + 14 + 18 * Math.floor(place / columns)];
    const mark = one.querySelector("svg").cloneNode(true), name = document.createElementNS(size, "text");
    for (const [key, value] of Object.entries({x, y: y - 7, width: 30, height: 14})) mark.setAttribute(key, value);
    for (const [key, value] of Object.entries({x: x + 36, y: y + 4, "font-size": 10.5})) name.setAttribute(key, value);
    name.textContent = one.textContent.trim();
    drawn.append(mark, name);
  });
  const whole = height + 18 * Math.ceil(named.length / columns) + (named.length ? 8 : 0);
  for (const [key, value] of Object.entries({viewBox: `0 0 ${width} ${whole}`, width, height: whole})) drawn.setAttribute(key, value);
  const look = document.createElementNS(size, "style"), paper = document.createElementNS(size, "rect");
  look.textContent = "text { font-family: sans-serif; fill: var(--ink); }";
  for (const [key, value] of Object.entries({width: "100%", height: "100%", fill: "var(--paper)"})) paper.setAttribute(key, value);
  drawn.prepend(look, paper);
  return new XMLSerializer().serializeToString(drawn).replace(/var\((--[\w-]+)\)/g, (_, name) => styles.getPropertyValue(name).trim());
}

function save(name, blob) {
  const link = document.createElement("a");
  [link.download, link.href] = [name, URL.createObjectURL(blob)];
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function chartImage(chart, scale = 2) {
  const image = new Image();
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(chartText(chart));
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [scale * image.width, scale * image.height];
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

for (const chart of document.querySelectorAll(".chart")) {
  const tools = document.createElement("div"), name = chart.id.replace("chart-", "");
  tools.className = "tools";
  tools.append("Save as");
  button(tools, "svg", () => save(`${name}.svg`, new Blob([chartText(chart)], {type: "image/svg+xml"})));
  button(tools, "png", async () => save(`${name}.png`, await chartImage(chart)));
  chart.querySelector("svg").after(tools);
}
