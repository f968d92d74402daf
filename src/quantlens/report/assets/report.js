document.documentElement.classList.add("js");
document.addEventListener("DOMContentLoaded", () => {
  const root = document.documentElement;
  const all = (selector, inside = document) => Array.from(inside.querySelectorAll(selector));
  const block = document.getElementById("data");
  const data = block ? JSON.parse(block.textContent) : { deltas: {} };

  // Theme: the system's, until the reader chooses; the choice is kept where the browser allows it.
  const theme = document.getElementById("theme") || document.createElement("button");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const store = (value) => {
    try {
      if (value) localStorage.setItem("quantlens-theme", value);
      return localStorage.getItem("quantlens-theme");
    } catch {
      return null;
    }
  };
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const showTheme = () => theme.setAttribute("aria-pressed", String(isDark()));
  const kept = store();
  if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  showTheme();
  system.addEventListener("change", showTheme);
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    store(root.dataset.theme);
    showTheme();
  });

  // Selectors: a chart or table that belongs to a score or a precision shows when that one is chosen.
  const names = ["score", "bits", "group", "picture", "scene"];
  const choices = Object.fromEntries(names.map((name) => [name, document.getElementById(`choose-${name}`)]));
  const chosen = (name) => (choices[name] ? choices[name].value : "");
  const fits = (element, name) => !element.dataset[name] || !chosen(name) || element.dataset[name] === chosen(name);
  const showChoices = () => {
    charts.choose(Object.fromEntries(["score", "bits"].filter(chosen).map((name) => [name, chosen(name)])));
    for (const element of all("[data-score], [data-bits], [data-group], [data-picture], [data-scene]")) {
      element.classList.toggle("alt", !names.every((name) => fits(element, name)));
    }
    for (const name of ["score", "bits"]) {
      if (!choices[name]) continue;
      const words = choices[name].selectedOptions[0].textContent;
      for (const element of all(`[data-${name}-name]`)) element.textContent = words;
    }
  };
  const showDeltas = () => {
    const columns = data.deltas[chosen("score")];
    if (!columns) return;
    for (const row of all("#delta-table tbody tr")) {
      const texts = columns[Number(row.dataset.row)];
      texts.forEach((text, i) => (row.cells[row.cells.length - texts.length + i].textContent = text));
    }
  };

  // Sorting: column titles become buttons; numbers by value, missing ones last.
  const numberOf = (text) => parseFloat(text.replace("−", "-"));
  const sortTable = (table, header, direction) => {
    const heads = all("thead tr:last-child > *", table);
    const column = heads.indexOf(header);
    const numeric = header.dataset.sort === "num";
    const sign = direction === "ascending" ? 1 : -1;
    const body = table.tBodies[0];
    const keyed = Array.from(body.rows, (row) => {
      const text = row.cells[column].textContent.trim();
      return { row, key: numeric ? numberOf(text) : text };
    });
    keyed.sort((a, b) => {
      if (!numeric) return sign * a.key.localeCompare(b.key, undefined, { numeric: true });
      if (isNaN(a.key) || isNaN(b.key)) return isNaN(a.key) - isNaN(b.key);
      return sign * (a.key - b.key);
    });
    body.append(...keyed.map((item) => item.row));
    for (const head of heads) if (head.dataset.sort) head.setAttribute("aria-sort", head === header ? direction : "none");
  };
  for (const table of all("table.sortable")) {
    for (const header of all("th[data-sort]", table)) {
      if (!header.hasAttribute("aria-sort")) header.setAttribute("aria-sort", "none");
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () =>
        sortTable(table, header, header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending"));
    }
  }

  // The filters of the per-set table.
  const form = document.getElementById("filters");
  const filterRows = () => {
    if (!form) return;
    const words = document.getElementById("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = all("select", form).filter((s) => s.value).map((s) => [Number(s.dataset.col), s.value]);
    const rows = Array.from(document.getElementById("set-table").tBodies[0].rows);
    let shown = 0;
    for (const row of rows) {
      let keep = wanted.every(([column, value]) => row.cells[column].textContent.trim() === value);
      if (keep && words.length) {
        const text = Array.from(row.cells, (cell) => cell.textContent).join(" ").toLowerCase();
        keep = words.every((word) => text.includes(word));
      }
      row.hidden = !keep;
      shown += keep;
    }
    document.getElementById("shown").textContent = `${shown} of ${rows.length} rows`;
  };
  if (form) {
    form.addEventListener("input", filterRows);
    form.addEventListener("submit", (event) => event.preventDefault());
  }
  const followScore = () => {
    const own = form && form.querySelector('select[data-col="5"]');
    if (own && choices.score) own.value = choices.score.selectedOptions[0].textContent;
  };
  if (choices.score) {
    choices.score.addEventListener("change", () => {
      showChoices();
      showDeltas();
      followScore();
      filterRows();
    });
  }
  for (const name of ["bits", "group", "picture", "scene"]) if (choices[name]) choices[name].addEventListener("change", showChoices);

  // Legend: an entry hides or shows its lines in every chart.
  for (const button of all(".legend button")) {
    button.addEventListener("click", () => {
      const off = button.getAttribute("aria-pressed") === "true";
      for (const twin of all(".legend button")) {
        if (twin.dataset.line === button.dataset.line) twin.setAttribute("aria-pressed", String(!off));
      }
      const hidden = all('.legend button[aria-pressed="false"]').map((one) => one.dataset.line);
      charts.choose({ hidden: [...new Set(hidden)] });
    });
  }

  for (const button of all("button.more")) {
    const table = button.parentElement.querySelector("table");
    const words = button.textContent;
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") === "true";
      table.classList.toggle("trunc", open);
      button.setAttribute("aria-expanded", String(!open));
      button.textContent = open ? words : "Show the 10 worst only";
    });
  }
  showChoices();
  showDeltas();
  followScore();
  filterRows();
  for (const table of all(".perset")) table.tBodies[0].classList.add("ready");
});
