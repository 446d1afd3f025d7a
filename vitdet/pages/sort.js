// In tables of class "sortable", the button in a column header sorts the rows: numbers by value, missing values last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const read = (row, column) => row.cells[column].textContent.trim();
  const number = (text) => Number(text.replaceAll(",", ""));
  for (const button of table.tHead.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const title = button.closest("th");
      const column = title.cellIndex;
      const numeric = title.classList.contains("n");
      const before = title.getAttribute("aria-sort");
      // sort in ascending order first, so that the weakest classes are at the top
      const sign = before === "ascending" ? -1 : 1;
      for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
      title.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [read(row, column), row]);
      rows.sort(([a], [b]) => {
        if (a === "–" || b === "–") return (a === "–") - (b === "–");
        return sign * (numeric ? number(a) - number(b) : a.localeCompare(b));
      });
      body.append(...rows.map(([, row]) => row));
    });
  }
}
