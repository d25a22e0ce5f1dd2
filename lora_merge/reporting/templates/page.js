"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const themes = ["system", "light", "dark"];
  const remembered = () => { try { return localStorage.getItem("lora-merge-theme"); } catch { return null; } };
  const choose = (theme) => {
    if (theme === "system") delete root.dataset.theme; else root.dataset.theme = theme;
    button.textContent = "Theme: " + theme;
    try { localStorage.setItem("lora-merge-theme", theme); } catch { /* a file may have no storage */ }
  };
  let theme = themes.includes(remembered()) ? remembered() : "system";
  choose(theme);
  button.hidden = false;
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    choose(theme);
  });

  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  for (const figure of document.querySelectorAll("figure.chart")) {
    const readout = figure.querySelector(".readout");
    const cells = new Map();
    let rows = 0, columns = 0;
    for (const cell of figure.querySelectorAll(".cells g[role]")) {
      const [r, c] = [Number(cell.dataset.r), Number(cell.dataset.c)];
      cells.set(r + "," + c, cell);
      [rows, columns] = [Math.max(rows, r + 1), Math.max(columns, c + 1)];
    }
    let current = figure.querySelector('.cells g[tabindex="0"]');
    const tell = (cell) => {
      readout.textContent = cell.getAttribute("aria-label");
      readout.classList.add("live");
    };
    const svg = figure.querySelector(".cells");
    const cellOf = (event) => event.target.closest("g[role]");
    svg.addEventListener("focusin", (event) => {
      const cell = cellOf(event);
      if (!cell) return;
      if (current) current.setAttribute("tabindex", "-1");
      cell.setAttribute("tabindex", "0");
      current = cell;
      tell(cell);
    });
    svg.addEventListener("pointerover", (event) => { const cell = cellOf(event); if (cell) tell(cell); });
    svg.addEventListener("keydown", (event) => {
      if (!current) return;
      let [r, c] = [Number(current.dataset.r), Number(current.dataset.c)];
      if (event.key === "Home" || event.key === "End") {
        const inRow = [...cells.values()].filter((cell) => Number(cell.dataset.r) === r);
        const place = (cell) => Number(cell.dataset.c);
        inRow.sort((one, other) => place(one) - place(other));
        event.preventDefault();
        inRow[event.key === "Home" ? 0 : inRow.length - 1].focus();
        return;
      }
      const step = steps[event.key];
      if (!step) return;
      event.preventDefault();
      for (;;) {
        r += step[0];
        c += step[1];
        if (r < 0 || c < 0 || r >= rows || c >= columns) return;
        const next = cells.get(r + "," + c);
        if (next) { next.focus(); return; }
      }
    });
  }

  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details.job:not([open])")];
    for (const one of closed) one.open = true;
  });
  window.addEventListener("afterprint", () => { for (const one of closed) one.open = false; });
})();
