"use strict";
// Every table's headings become buttons: first press sorts up, the next down. Without script the tables just stand.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sign = down ? -1 : 1;
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const numeric = heading.classList.contains("n");
      const rows = [...body.rows].map((row) => [key(row), row]);
      // A missing value is neither small nor large: it stays last both ways.
      rows.sort(([a], [b]) => (a === "") - (b === "") ||
        sign * (numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true })));
      body.append(...rows.map(([, row]) => row));
    });
  });
}
// What is wider than its frame says so.
for (const frame of document.querySelectorAll(".scroll")) {
  const mark = () => frame.toggleAttribute("data-wider", frame.scrollWidth > frame.clientWidth + 2);
  new ResizeObserver(mark).observe(frame);
  mark();
}
// The CSV below each table: a button copies it. Without script, or where nothing may be copied, it unfolds.
for (const fold of document.querySelectorAll("details.csv")) {
  const text = fold.querySelector("pre");
  const bar = document.createElement("p");
  const button = document.createElement("button");
  const said = document.createElement("span");
  bar.className = "copy";
  button.type = "button";
  button.textContent = "Copy as CSV";
  button.setAttribute("aria-label", `Copy as CSV: ${fold.dataset.label}`);
  said.setAttribute("role", "status");
  bar.append(button, said);
  fold.before(bar);
  fold.hidden = true;
  const failed = () => {
    fold.hidden = false;
    fold.open = true;
    getSelection().selectAllChildren(text);
    said.textContent = "cannot be copied from here: the text below is selected";
  };
  button.addEventListener("click", () => {
    const done = () => { said.textContent = "copied"; };
    if (!navigator.clipboard) { failed(); return; }
    navigator.clipboard.writeText(text.textContent).then(done, failed);
  });
}
