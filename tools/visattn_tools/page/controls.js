"use strict";
// What people click, tap and type; `page` holds what attention.js shares.
function visattnControls(page) {
  const { $, data, state, pictures, image, entries, entry, cells, asked, cellAt, cellIn, headName, show } = page;

  function choices(name, labels, chosen, choose, names = []) {
    const box = $(name);
    const legend = box.querySelector("legend");
    box.replaceChildren(legend, ...labels.map((content, i) => {
      const label = document.createElement("label");
      label.className = "choice";
      const input = label.appendChild(document.createElement("input"));
      Object.assign(input, { type: "radio", name, value: String(i), checked: i === chosen });
      if (names[i]) input.setAttribute("aria-label", names[i]);
      input.addEventListener("change", () => choose(i));
      const text = label.appendChild(document.createElement("span"));
      text.append(...content);
      return label;
    }));
    box.hidden = labels.length < 2;
  }

  function select(name, i) {
    const input = $(name).querySelectorAll("input")[i];
    if (!input) return;
    input.checked = true;
    input.parentElement.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  function keepPlace(change) {
    const before = asked(entry());
    change();
    state.cell = cellIn(entry(), before, state.cell);
  }

  function setImage(i) {
    keepPlace(() => { state.image = i; });
    rebuild();
  }

  function setMode(mode) {
    keepPlace(() => {
      const share = state.layer / Math.max(1, entries().length - 1);
      state.mode = mode;
      state.layer = Math.round(share * (entries().length - 1));
    });
    rebuild();
  }

  function setLayer(i) {
    keepPlace(() => { state.layer = Math.max(0, Math.min(entries().length - 1, i)); });
    select("layers", state.layer);
    buildHeads();
    show();
  }

  function setHead(i) {
    state.head = i;
    select("heads", i);
    show();
  }

  function buildHeads() {
    const e = entry();
    const count = e.heads ? e.heads.length : 0;
    state.head = Math.min(state.head, Math.max(0, count - 1));
    const heads = Array.from({ length: count }, (_, i) => i);
    choices("heads", heads.map((i) => [i ? String(i) : "all"]), state.head, setHead, heads.map(headName));
    $("switches").hidden = e.what !== "view";
    buildExtras();
  }

  function buildExtras() {
    const [grid, more] = asked(entry());
    $("extras").replaceChildren(...more.map((name, i) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = name;
      button.addEventListener("click", () => {
        state.cell = cells(grid) + i;
        pin(true);
        show();
      });
      return button;
    }));
  }

  function buildLayers() {
    const { width, height } = image();
    choices("layers", entries().map((e) => {
      const canvas = document.createElement("canvas");
      canvas.width = Math.min(160, 2 * width);
      canvas.height = Math.round((canvas.width * height) / width);
      canvas.setAttribute("aria-hidden", "true");
      return [canvas, e.title.replace(", ", "\n")];
    }), state.layer, setLayer, entries().map((e) => e.title));
  }

  function rebuild() {
    const modes = [...new Set(image().entries.map((e) => e.kind))];
    if (!modes.includes(state.mode)) state.mode = modes[0];
    choices("modes", modes.map((mode) => [mode]), modes.indexOf(state.mode), (i) => setMode(modes[i]));
    buildLayers();
    buildHeads();
    fit();
  }

  const canvas = $("canvas");
  function fit() {
    const { width, height } = image();
    canvas.style.aspectRatio = `${width} / ${height}`;
    const wide = Math.max(1, Math.round(canvas.clientWidth * devicePixelRatio));
    if (canvas.width !== wide || canvas.height !== Math.round((wide * height) / width)) {
      canvas.width = wide;
      canvas.height = Math.round((wide * height) / width);
    }
    show();
  }

  function pin(on) {
    state.pinned = on;
    $("pin").setAttribute("aria-pressed", String(on));
    $("pin").textContent = on ? "Pinned" : "Pin";
  }

  function point(event) {
    const box = canvas.getBoundingClientRect();
    const cell = cellAt(asked(entry())[0], (event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width);
    if (cell === state.cell) return;
    state.cell = cell;
    show();
  }

  canvas.addEventListener("pointermove", (event) => {
    if (!state.pinned) point(event);
  });
  canvas.addEventListener("click", (event) => {
    const before = state.cell;
    point(event);
    // A tap only chooses; a click with a mouse also holds what it chose, and lets go on the second.
    if (event.pointerType !== "touch") pin(!(state.pinned && before === state.cell));
  });
  $("pin").addEventListener("click", () => pin(!state.pinned));
  for (const name of ["reverse", "reach"]) {
    $(name).addEventListener("change", (event) => {
      keepPlace(() => { state[name] = event.target.checked; });
      buildExtras();
      show();
    });
  }

  const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  canvas.addEventListener("keydown", (event) => {
    const move = MOVES[event.key];
    if (move) {
      const [grid] = asked(entry());
      const cell = Math.min(state.cell, cells(grid) - 1);
      const row = Math.max(0, Math.min(grid.rows - 1, Math.floor(cell / grid.columns) + move[0]));
      const column = Math.max(0, Math.min(grid.columns - 1, (cell % grid.columns) + move[1]));
      state.cell = row * grid.columns + column;
      show();
    } else if (event.key === " " || event.key === "Enter") pin(!state.pinned);
    else return;
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const heads = entry().heads?.length ?? 1;
    const actions = {
      PageUp: () => setLayer(state.layer - 1),
      PageDown: () => setLayer(state.layer + 1),
      h: () => setHead((state.head + 1) % heads),
      H: () => setHead((state.head + heads - 1) % heads),
      r: () => $("reverse").click(),
      b: () => $("reach").click(),
    };
    const action = actions[event.key];
    if (!action || (entry().what !== "view" && event.key.length === 1)) return;
    event.preventDefault();
    action();
  });

  $("model").textContent = data.model;
  $("source").textContent = data.source;
  $("random").hidden = !data.random;
  choices("images", data.images.map(({ name, src }) => {
    const picture = new Image();
    picture.src = src;
    picture.alt = name;
    picture.title = name;
    return [picture];
  }), 0, setImage);
  state.mode = image().entries[0].kind;
  // Cells of about a tenth of the image say the most at a glance.
  const far = (e) => Math.abs(asked(e)[0].rows - 12);
  state.layer = entries().reduce((best, e, i, all) => (far(e) <= far(all[best]) ? i : best), 0);
  state.cell = cellAt(asked(entry())[0], ...image().start);
  Promise.all(pictures.map((picture) => picture.decode())).then(() => {
    rebuild();
    new ResizeObserver(fit).observe(canvas);
  });
}
