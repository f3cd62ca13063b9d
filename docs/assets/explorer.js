// The form says which rows are drawn, Vega-Lite draws them; every number is one of the rows in #data.
(() => {
  const { rows, plans, metrics, methods, names } = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  const EMBED = { renderer: "svg", actions: false, ast: true, tooltip: { theme: "custom" } }; // ast: no code is made of text
  const CONFIG = { background: null, view: { stroke: null }, font: "system-ui, sans-serif", axis: { labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" } };
  const SHAPES = Object.fromEntries(Object.keys(methods).map((group, i) => [group, ["circle", "square", "triangle-up"][i]]));
  const KINDS = { mlp: "#0072B2", attention: "#E69F00" };
  const SHOWN = 7; // methods that are chosen at first: more lines cannot be told apart
  const WIDE = 700; // pixels from which on lines have labels
  const CEILING = 10; // of perplexity ratios at first: beyond it a model is broken
  const HIDDEN = new Set(["group", "on", "method", "label", "domain", "task", "score", "measure", "tuned", "note"]);

  const finite = (value) => typeof value === "number" && Number.isFinite(value);
  const drawable = (row, metric) => finite(row[metric]) && (metrics[metric].scale !== "log" || row[metric] > 0);
  const short = (value) => (Number.isInteger(value) ? value.toLocaleString("en") : value.toPrecision(3));
  const percent = (share) => `${+(100 * share).toFixed(1)} %`;
  const make = (tag, text, attributes = {}) => Object.assign(document.createElement(tag), { textContent: text }, attributes);

  function options(select, names, titles) {
    const before = select.value;
    select.replaceChildren(...names.map((name) => make("option", titles(name), { value: name })));
    if (names.includes(before)) select.value = before;
  }

  function metricsOfText() {
    const here = rows.filter((row) => row.on === element("on").value && row.method !== "dense");
    options(element("metric"), Object.keys(metrics).filter((m) => here.some((row) => drawable(row, m))), (m) => metrics[m].title);
  }

  // The methods of a group that cost least where the middle plan of the first one stands.
  function leading(group) {
    const mine = rows.filter((row) => row.group === group && row.on === rows[0].on && finite(row.perplexity_ratio) && row.method !== "dense");
    const sizes = [...new Set(mine.map((row) => row.sparsity))].sort();
    const middle = mine.filter((row) => row.sparsity === 0.25 || sizes.length < 2);
    return middle.toSorted((a, b) => a.perplexity_ratio - b.perplexity_ratio).slice(0, SHOWN).map((row) => row.method);
  }

  const boxes = [];
  function methodBoxes() {
    Object.entries(methods).forEach(([group, colours], i) => {
      const set = make("details", "", { open: i === 0 });
      const first = i === 0 ? leading(group) : [];
      const mine = Object.entries(colours).map(([method, colour]) => {
        const box = make("input", "", { type: "checkbox", checked: first.includes(method) });
        Object.assign(box.dataset, { group, method });
        const label = make("label", "");
        const swatch = make("span", { circle: "●", square: "■", "triangle-up": "▲" }[SHAPES[group]], { className: "swatch" });
        swatch.style.color = colour;
        label.append(box, swatch, ` ${names[method]}`);
        set.append(label);
        return box;
      });
      const every = make("button", "all", { type: "button", onclick: () => choose(true) });
      const none = make("button", "none", { type: "button", onclick: () => choose(false) });
      const choose = (on) => { mine.forEach((box) => { box.checked = on; }); draw(); };
      set.prepend(make("summary", group), every, none);
      boxes.push(...mine);
      element("methods").append(set);
    });
  }

  function chosenRows() {
    const on = element("on").value, metric = element("metric").value;
    const { interval, error } = metrics[metric];
    const here = rows.filter((row) => row.on === on && drawable(row, metric));
    boxes.forEach((box) => {
      box.disabled = !here.some((row) => row.group === box.dataset.group && row.method === box.dataset.method);
      box.parentElement.classList.toggle("absent", box.disabled);
    });
    const shown = new Set(boxes.filter((box) => box.checked).map((box) => `${box.dataset.group}|${box.dataset.method}`));
    const points = here.filter((row) => shown.has(`${row.group}|${row.method}`)).map((row) => ({
      row,
      series: `${row.group}|${row.method}`,
      group: row.group,
      method: row.method,
      colour: methods[row.group][row.method],
      title: `${names[row.method]}: ${short(row[metric])}`,
      name: names[row.method],
      x: row.sparsity_achieved ?? row.sparsity,
      y: row[metric],
      low: interval ? row[interval[0]] : error ? row[metric] - row[error] : row[metric],
      high: interval ? row[interval[1]] : error ? row[metric] + row[error] : row[metric],
    }));
    const dense = here.find((row) => row.method === "dense");
    const all = metric !== "perplexity_ratio" || element("all").checked;
    return { points: points.filter((p) => all || p.y <= CEILING), dense: dense ? [{ y: dense[metric] }] : [], metric };
  }

  // The last point of each line, moved apart where labels would cover each other.
  function labelled(points, scale) {
    const up = scale === "log" ? Math.log : (v) => v, down = scale === "log" ? Math.exp : (v) => v;
    const ends = points.map((p) => up(p.y)), apart = (Math.max(...ends) - Math.min(...ends)) / 22;
    const last = Object.values(Object.groupBy(points, (p) => p.series)).map((line) => line.reduce((a, b) => (b.x > a.x ? b : a)));
    const placed = [];
    last.toSorted((a, b) => a.y - b.y).forEach((p) => {
      const below = placed.filter((q) => Math.abs(q.x - p.x) < 0.05).map((q) => up(q.y) + apart);
      placed.push({ ...p, y: down(Math.max(up(p.y), ...below)) });
    });
    return placed;
  }

  let drawn = Promise.resolve();
  const draw = () => { drawn = drawn.then(redraw); return drawn; }; // one after the other: the last choice is what stays

  function redraw() {
    const { points, dense, metric } = chosenRows();
    remember();
    table(points, metric);
    if (!points.length) {
      element("chart").replaceChildren(make("p", "Nothing to draw: no method is chosen that was measured so."));
      return undefined;
    }
    const { title, scale } = metrics[metric];
    const labels = window.innerWidth < WIDE ? [] : labelled(points, scale);
    const x = { field: "x", type: "quantitative", title: "share of attention and MLP parameters removed", axis: { format: "%", tickCount: 6, grid: false }, scale: { nice: false, padding: 12, zero: false, ...(labels.length ? { domainMax: Math.max(...points.map((p) => p.x)) + 0.045 } : {}) } };
    const y = { field: "y", type: "quantitative", title, scale: { type: scale, nice: false, padding: 12, ...(scale === "log" ? {} : { zero: false }) }, axis: { tickCount: 6, gridOpacity: 0.6, format: "~g" } };
    const colour = { field: "colour", type: "nominal", scale: null };
    const form = Object.entries(SHAPES);
    const layer = [
      ...dense.map((value) => ({ name: "dense", data: { values: [value] }, mark: { type: "rule", tooltip: "the dense model", strokeDash: [4, 3], color: "#888" }, encoding: { y } })),
      { mark: { type: "rule", opacity: 0.6 }, encoding: { x, y: { ...y, field: "low" }, y2: { field: "high" }, color: colour } },
      { mark: { type: "line", strokeWidth: 1.8 }, encoding: { x, y, color: colour, detail: { field: "series" } } },
      { data: { values: labels }, mark: { type: "text", align: "left", dx: 8, fontSize: 11 }, encoding: { x, y, color: colour, text: { field: "name", type: "nominal" } } },
      {
        name: "points",
        mark: { type: "point", filled: true, size: 90, opacity: 1, cursor: "pointer" },
        encoding: { x, y, color: colour, tooltip: { field: "title", type: "nominal" }, shape: { field: "group", type: "nominal", legend: null, scale: { domain: form.map((f) => f[0]), range: form.map((f) => f[1]) } } },
      },
    ];
    const spec = { width: "container", height: Math.min(420, 260 + window.innerWidth / 10), autosize: { type: "fit", contains: "padding" }, data: { values: points }, layer, config: CONFIG };
    return vegaEmbed("#chart", spec, EMBED).then(({ view }) => {
      const show = (event, item) => item?.datum?.row && details(item.datum.row);
      view.addEventListener("pointerover", show);
      view.addEventListener("click", show);
    });
  }

  // What is drawn, as a table; a click on a head sorts by it.
  let order = { column: "y", down: false };
  function table(points, metric) {
    const columns = { name: "method", x: "removed", y: metrics[metric].title };
    const sorted = points.toSorted((a, b) => (a[order.column] < b[order.column] ? -1 : 1) * (order.down ? -1 : 1));
    const head = make("tr", "");
    Object.entries(columns).forEach(([column, title]) => {
      const sort = () => { order = { column, down: order.column === column && !order.down }; table(points, metric); };
      const cell = make("th", "", { ariaSort: order.column === column ? (order.down ? "descending" : "ascending") : "none" });
      cell.append(make("button", title, { type: "button", onclick: sort }));
      head.append(cell);
    });
    const lines = sorted.map((p) => {
      const line = make("tr", "", { onclick: () => details(p.row) });
      line.append(make("td", p.name), make("td", percent(p.x)), make("td", short(p.y)));
      return line;
    });
    element("table").replaceChildren(head, ...lines);
  }

  // The choice is in the address, so that it can be shared.
  function remember() {
    const chosen = boxes.filter((box) => box.checked).map((box) => boxes.indexOf(box)).join(".");
    const state = new URLSearchParams({ on: element("on").value, metric: element("metric").value, methods: chosen, all: +element("all").checked });
    history.replaceState(null, "", `#${state}`);
  }
  function recall() {
    const state = new URLSearchParams(location.hash.slice(1));
    if (!state.has("on")) return;
    element("on").value = state.get("on");
    metricsOfText();
    element("metric").value = state.get("metric");
    element("all").checked = state.get("all") === "1";
    const chosen = new Set(state.get("methods").split(".").map(Number));
    boxes.forEach((box, i) => { box.checked = chosen.has(i); });
  }

  function details(row) {
    const facts = make("dl", "");
    Object.entries(row).filter(([key, value]) => !HIDDEN.has(key) && value !== null && value !== "").forEach(([key, value]) => {
      const share = /^(sparsity|params_removed|saved)/.test(key);
      const pair = make("div", "");
      pair.append(make("dt", key.replaceAll("_", " ")), make("dd", ""));
      pair.lastChild.append(key === "figure" ? make("a", value, { href: `gallery.html#${value}` }) : share ? percent(value) : finite(value) ? short(value) : String(value));
      facts.append(pair);
    });
    const removed = row.sparsity_achieved ?? row.sparsity;
    element("point").replaceChildren(make("h2", `${names[row.method]}, ${percent(removed)} removed, on ${names[row.on]}`), facts);
    const plan = plans.filter((p) => p.group === row.group && p.method === row.method && p.sparsity === row.sparsity);
    element("plan").replaceChildren();
    if (!plan.length) return;
    element("point").append(make("h3", "Kept of each block"));
    const kinds = Object.keys(KINDS).filter((kind) => plan.some((p) => p.kind === kind));
    const spec = {
      width: "container", height: 150, autosize: { type: "fit", contains: "padding" }, config: CONFIG,
      data: { values: plan },
      mark: { type: "bar" },
      encoding: {
        x: { field: "layer", type: "ordinal", axis: { labelAngle: 0, labelOverlap: true } },
        xOffset: { field: "kind", type: "nominal", scale: { domain: kinds } },
        y: { field: "kept", type: "quantitative", title: "kept", axis: { format: "%", tickCount: 3 }, scale: { domain: [0, 1] } },
        color: { field: "kind", type: "nominal", title: null, scale: { domain: kinds, range: kinds.map((k) => KINDS[k]) }, legend: { orient: "top" } },
        tooltip: ["layer", "kind", { field: "kept", format: ".1%" }, ...("family" in plan[0] ? ["family"] : [])].map((f) => ({ type: "nominal", ...(f.field ? f : { field: f }) })),
      },
    };
    vegaEmbed("#plan", spec, EMBED);
  }

  options(element("on"), [...new Set(rows.map((row) => row.on))], (name) => names[name]);
  metricsOfText();
  methodBoxes();
  recall();
  element("on").addEventListener("change", metricsOfText);
  element("choice").addEventListener("change", draw);
  draw().then(() => {
    const [group] = Object.keys(methods);
    const known = plans.filter((p) => p.group === group).map((p) => rows.find((r) => r.group === p.group && r.method === p.method && r.sparsity === p.sparsity)).filter(Boolean);
    const first = known.toSorted((a, b) => a.perplexity_ratio - b.perplexity_ratio)[0]; // the best of those whose plan is known
    if (first) details(first);
  });
})();
