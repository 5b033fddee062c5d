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

// Sort a table by a column; numbers start with the largest, missing values stay last.
function compare(a, b) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const numbers = [Number(a), Number(b)];
  return numbers.some(Number.isNaN) ? a.localeCompare(b) : numbers[0] - numbers[1];
}

function sortBy(table, header, column) {
  const numeric = header.classList.contains("number");
  const before = header.getAttribute("aria-sort");
  const descending = before === null ? numeric : before === "ascending";
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
