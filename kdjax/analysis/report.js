// Token details on hover and on tap. Without scripts the browser shows the same text as a plain title.
(() => {
  const pages = document.querySelectorAll(".page");
  if (!pages.length) return;
  const tip = document.body.appendChild(Object.assign(document.createElement("div"), { id: "tip" }));
  const show = (event) => {
    const token = event.target.closest("span[title], span[data-tip]");
    tip.style.visibility = token ? "visible" : "hidden";
    if (!token) return;
    if (token.title) {
      token.dataset.tip = token.title;
      token.removeAttribute("title");
    }
    tip.textContent = token.dataset.tip;
    const at = token.getClientRects()[0];
    const left = Math.min(at.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const above = at.top - tip.offsetHeight - 6;
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = (above > 4 ? above : at.bottom + 6) + "px";
  };
  for (const page of pages) {
    page.addEventListener("pointerover", show);
    page.addEventListener("click", show);
    page.addEventListener("pointerleave", () => (tip.style.visibility = "hidden"));
  }
  addEventListener("scroll", () => (tip.style.visibility = "hidden"), { passive: true, capture: true });
})();

// Tables that are sorted by a click on a heading: by data-value where a cell has one, empty ones last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.ariaSort === "ascending" ? -1 : 1;
      heads.forEach((other) => (other.ariaSort = null));
      head.ariaSort = sign > 0 ? "ascending" : "descending";
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const by = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return sign * by;
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    });
  });
}
