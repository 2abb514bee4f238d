// Token details on hover and on tap. Without scripts the browser shows the same text as a plain title.
(() => {
  const page = document.querySelector(".page");
  if (!page) return;
  const tip = document.body.appendChild(Object.assign(document.createElement("div"), { id: "tip" }));
  for (const token of page.querySelectorAll("span[title]")) {
    token.dataset.tip = token.title;
    token.removeAttribute("title");
  }
  const show = (event) => {
    const token = event.target.closest("span[data-tip]");
    tip.style.visibility = token ? "visible" : "hidden";
    if (!token) return;
    tip.textContent = token.dataset.tip;
    const at = token.getClientRects()[0];
    const left = Math.min(at.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const above = at.top - tip.offsetHeight - 6;
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = (above > 4 ? above : at.bottom + 6) + "px";
  };
  page.addEventListener("pointerover", show);
  page.addEventListener("click", show);
  page.addEventListener("pointerleave", () => (tip.style.visibility = "hidden"));
  addEventListener("scroll", () => (tip.style.visibility = "hidden"), { passive: true });
})();
