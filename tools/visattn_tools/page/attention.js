"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const MEMORY = 256e6; // bytes of unpacked weights that are kept
  const state = { image: 0, mode: "", layer: 0, head: 0, cell: 0, reverse: false, reach: false, pinned: false };
  const pictures = data.images.map((image) => {
    const picture = new Image();
    picture.src = image.src;
    return picture;
  });

  // Weights are unpacked when they are first shown.
  const unpacked = new Map();
  let memory = 0;
  async function unpack(packed) {
    if (unpacked.has(packed)) {
      const found = unpacked.get(packed);
      unpacked.delete(packed);
      unpacked.set(packed, found); // the latest used is the last
      return found;
    }
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const buffer = await new Response(stream).arrayBuffer();
    unpacked.set(packed, buffer);
    memory += buffer.byteLength;
    for (const [key, old] of unpacked) {
      if (memory <= MEMORY || key === packed) break;
      unpacked.delete(key);
      memory -= old.byteLength;
    }
    return buffer;
  }

  const image = () => data.images[state.image];
  const entries = (mode = state.mode) => image().entries.filter((entry) => entry.kind === mode);
  const entry = () => entries()[Math.min(state.layer, entries().length - 1)];
  const cells = (grid) => grid.rows * grid.columns;
  // The grid that is pointed at, and what stands there besides.
  const asked = (e) => (e.what !== "view" ? [e.grid, []] : state.reverse ? [e.keys, e.moreKeys] : [e.queries, e.moreQueries]);
  const answered = (e) => (state.reverse ? [e.queries, e.moreQueries] : [e.keys, e.moreKeys]);

  function cellAt(grid, y, x) {
    const row = Math.max(0, Math.min(grid.rows - 1, Math.floor(y / grid.height)));
    return row * grid.columns + Math.max(0, Math.min(grid.columns - 1, Math.floor(x / grid.width)));
  }
  const middle = (grid, cell) => [
    (Math.floor(cell / grid.columns) + 0.5) * grid.height,
    ((cell % grid.columns) + 0.5) * grid.width,
  ];
  // What is pointed at in `from`, in another entry: the same place of the image, or the same token without one.
  function cellIn(e, [from], cell) {
    const [grid, more] = asked(e);
    if (cell < cells(from)) return cellAt(grid, ...middle(from, cell));
    return Math.min(cells(grid) + cell - cells(from), cells(grid) + more.length - 1);
  }

  async function weights(e, head, cell) {
    const buffer = await unpack(e.heads[Math.min(head, e.heads.length - 1)]);
    const rows = cells(e.queries) + e.moreQueries.length;
    const columns = cells(e.keys) + e.moreKeys.length;
    const most = new Float32Array(buffer, 0, rows);
    const levels = new Uint8Array(buffer, 4 * rows);
    if (!state.reverse) return Float32Array.from(levels.subarray(cell * columns, (cell + 1) * columns), (x) => (x / 255) * most[cell]);
    return Float32Array.from({ length: rows }, (_, row) => (levels[row * columns + cell] / 255) * most[row]);
  }

  const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  function viridis(share) {
    const place = Math.min(share, 0.9999) * 4;
    const low = VIRIDIS[Math.floor(place)];
    const high = VIRIDIS[Math.floor(place) + 1];
    return low.map((value, i) => value + (place % 1) * (high[i] - value));
  }
  // Where little is taken a dark veil, where much is taken an orange light.
  function spotlight(share) {
    const veil = 0.72 * (1 - share);
    const light = 0.42 * share;
    const alpha = 1 - (1 - veil) * (1 - light);
    const part = alpha ? light / alpha : 0;
    return [246 * part, 173 * part, 85 * part, alpha];
  }

  function overlay(context, grid, colour, width, height) {
    const small = document.createElement("canvas");
    small.width = grid.columns;
    small.height = grid.rows;
    const target = small.getContext("2d");
    const block = target.createImageData(grid.columns, grid.rows);
    for (let i = 0; i < cells(grid); i++) {
      const [red, green, blue, alpha] = colour(i);
      block.data.set([red, green, blue, 255 * alpha], 4 * i);
    }
    target.putImageData(block, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, grid.columns * grid.width * width, grid.rows * grid.height * height);
  }

  function lines(context, grid, width, height) {
    const wide = grid.width * width;
    const tall = grid.height * height;
    if (Math.min(wide, tall) < 14 * devicePixelRatio) return;
    context.beginPath();
    for (let x = wide; x < width; x += wide) context.rect(Math.round(x), 0, 0, height);
    for (let y = tall; y < height; y += tall) context.rect(0, Math.round(y), width, 0);
    context.lineWidth = 1;
    context.strokeStyle = "rgb(255 255 255 / 0.16)";
    context.stroke();
  }

  function frame(context, grid, cell, width, height, thick) {
    if (cell >= cells(grid)) return;
    const left = (cell % grid.columns) * grid.width * width;
    const top = Math.floor(cell / grid.columns) * grid.height * height;
    const box = [left, top, Math.min(grid.width * width, width - left), Math.min(grid.height * height, height - top)];
    for (const [colour, line] of [["#fff", thick + 2 * devicePixelRatio], ["#e53e3e", thick]]) {
      context.strokeStyle = colour;
      context.lineWidth = line;
      context.strokeRect(...box);
    }
  }

  function depends(tree, cell) {
    const path = [cell];
    while (tree.parents[path.at(-1)] >= 0 && path.length <= tree.parents.length) path.push(tree.parents[path.at(-1)]);
    const below = new Set([cell]);
    let grown = true;
    while (grown) {
      grown = false;
      tree.parents.forEach((parent, child) => {
        if (below.has(parent) && !below.has(child)) grown = !!below.add(child);
      });
    }
    return { path, below };
  }

  function drawTree(context, e, cell, width, height) {
    const { path, below } = depends(e, cell);
    overlay(context, e.grid, (i) => [...e.colours[i], below.has(i) ? 0.62 : 0.2], width, height);
    const x = (i) => ((i % e.grid.columns) + 0.5) * e.grid.width * width;
    const y = (i) => (Math.floor(i / e.grid.columns) + 0.5) * e.grid.height * height;
    const line = (child, parent, colour, thick) => {
      context.strokeStyle = colour;
      context.lineWidth = thick * devicePixelRatio;
      context.beginPath();
      context.moveTo(x(child), y(child));
      context.lineTo(x(parent), y(parent));
      context.stroke();
    };
    e.parents.forEach((parent, child) => {
      if (parent < 0) return;
      if (below.has(child)) line(child, parent, "rgb(0 0 0 / 0.7)", 2.6);
      line(child, parent, `rgb(${e.colours[child].join(" ")} / ${below.has(child) ? 1 : 0.6})`, 1.4);
    });
    path.slice(1).forEach((parent, i) => {
      line(path[i], parent, "#fff", 4.5);
      line(path[i], parent, "#e53e3e", 2.5);
    });
    context.strokeStyle = "#fff";
    context.lineWidth = 2 * devicePixelRatio;
    context.beginPath();
    context.arc(x(e.root), y(e.root), Math.max(5 * devicePixelRatio, (e.grid.width * width) / 3), 0, 7);
    context.stroke();
  }

  async function paint(canvas, e, thumbnail) {
    const { width, height } = canvas;
    const [grid] = asked(e);
    const cell = cellIn(e, asked(entry()), state.cell);
    let values = null;
    if (e.what === "view") values = await weights(e, state.head, cell);
    else if (e.what === "map") values = new Float32Array(await unpack(e.values));
    const context = canvas.getContext("2d");
    return { values, draw };
    function draw() {
      const picture = pictures[state.image];
      context.imageSmoothingEnabled = picture.width > 200 || width < picture.width;
      context.drawImage(picture, 0, 0, width, height);
      if (e.what === "view") {
        const shown = answered(e)[0];
        const most = Math.max(...values.subarray(0, cells(shown)), 1e-30);
        const share = (x) => (state.reach ? Number(x > 0) : (x / most) ** 0.6);
        overlay(context, shown, (i) => spotlight(share(values[i])), width, height);
      } else if (e.what === "map") {
        const range = e.high - e.low || 1;
        const colour = e.binary
          ? (x) => [0, 0, 0, x ? 0 : 0.78]
          : (x) => [...viridis((x - e.low) / range), 0.62];
        overlay(context, grid, (i) => colour(values[i]), width, height);
      } else drawTree(context, e, cell, width, height);
      if (!thumbnail) lines(context, e.what === "view" ? answered(e)[0] : grid, width, height);
      frame(context, grid, cell, width, height, (thumbnail ? 1.2 : 2.5) * (thumbnail ? 1 : devicePixelRatio));
    }
  }

  const capital = (words) => words[0].toUpperCase() + words.slice(1);
  const percent = (x) => `${x >= 0.1 ? (100 * x).toFixed(0) : (100 * x).toPrecision(2)} %`;
  const plain = (x) => (Math.abs(x) >= 1e-3 || x === 0 ? x.toPrecision(3) : x.toExponential(1));
  function place(cell, grid, more) {
    if (cell >= cells(grid)) return more[cell - cells(grid)];
    return `row ${Math.floor(cell / grid.columns) + 1}, column ${(cell % grid.columns) + 1}`;
  }

  function report(e, values) {
    const [grid, more] = asked(e);
    const here = place(state.cell, grid, more);
    const where = capital(here);
    let summary = "";
    let top = [];
    let note = e.note;
    if (e.what === "view") {
      const [shown, others] = answered(e);
      const order = Array.from(values.keys()).sort((a, b) => values[b] - values[a]);
      const total = values.reduce((a, b) => a + b, 0);
      const seen = values.subarray(0, cells(shown)).reduce((count, x) => count + (x > 0), 0);
      let half = 0;
      for (let sum = 0; sum < total / 2 && half < order.length; half++) sum += values[order[half]];
      const verb = state.reverse ? "is seen by" : "sees";
      summary = total ? `${verb} ${seen} of ${cells(shown)}; half of the weight lies on ${half}` : `${verb} nothing here`;
      top = order.slice(0, 5).filter((i) => values[i] > 0).map((i) => [place(i, shown, others), values[i]]);
      for (const [i, name] of others.entries()) {
        const value = values[cells(shown) + i];
        if (value > 0 && !order.slice(0, 5).includes(cells(shown) + i)) top.push([name, value]);
      }
    } else if (e.what === "map") {
      const value = values[state.cell];
      summary = e.binary ? (value ? "goes on" : "was dropped") : `${e.kind}: ${plain(value)}`;
    } else {
      const { path, below } = depends(e, state.cell);
      const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
      summary = `${count(path.length - 1, "link")} to the root; ${count(below.size - 1, "token")} below it`;
    }
    const head = e.heads && e.heads.length > 1 ? `, ${headName(state.head)}` : "";
    $("what").textContent = `${capital(e.kind)}, ${e.title}${head}`;
    $("where").textContent = where;
    $("summary").textContent = capital(summary);
    const most = Math.max(...top.map(([, value]) => value), 1e-30);
    $("top").replaceChildren(...top.map(([name, value]) => {
      const item = document.createElement("li");
      const [label, bar, number] = ["span", "i", "span"].map((tag) => item.appendChild(document.createElement(tag)));
      label.textContent = name;
      bar.style.width = `${(100 * value) / most}%`;
      bar.setAttribute("aria-hidden", "true");
      number.textContent = percent(value);
      return item;
    }));
    $("note").textContent = note;
    $("live").textContent = `${where}: ${summary}${top.length ? `, most ${top[0][0]}, ${percent(top[0][1])}` : ""}`;
    $("canvas").setAttribute("aria-label", `${image().name}, ${e.kind}, ${e.title}. ${$("live").textContent}`);
    legend(e, values);
  }

  function legend(e, values) {
    const bar = $("bar");
    bar.parentElement.hidden = e.what === "tree";
    const steps = Array.from({ length: 9 }, (_, i) => i / 8);
    if (e.what === "view") {
      const most = Math.max(...values.subarray(0, cells(answered(e)[0])));
      $("low").textContent = state.reach ? "unseen" : "0";
      $("high").textContent = state.reach ? "seen" : percent(most);
      // As on a grey image.
      const mixed = steps.map((x) => [x, spotlight(state.reach ? Math.round(x) : x ** 0.6)]);
      const stops = mixed.map(([x, [r, g, b, a]]) => `rgb(${[r, g, b].map((c) => c * a + 170 * (1 - a)).join(" ")}) ${100 * x}%`);
      bar.style.background = `linear-gradient(90deg, ${stops})`;
    } else if (e.what === "map") {
      $("low").textContent = e.binary ? "dropped" : plain(e.low);
      $("high").textContent = e.binary ? "kept" : plain(e.high);
      bar.style.background = e.binary
        ? "linear-gradient(90deg, #222 50%, #ddd 50%)"
        : `linear-gradient(90deg, ${steps.map((x) => `rgb(${viridis(x).join(" ")})`)})`;
    }
  }

  // Drawings overtake each other when weights are still being unpacked: the latest wins.
  let turn = 0;
  async function show() {
    const mine = ++turn;
    document.body.dataset.asked = String(mine);
    try {
      const e = entry();
      const main = await paint($("canvas"), e, false);
      if (mine !== turn) return;
      main.draw();
      report(e, main.values);
      for (const [i, other] of entries().entries()) {
        const canvas = $("layers").querySelectorAll("canvas")[i];
        const small = await paint(canvas, other, true);
        if (mine !== turn) return;
        small.draw();
      }
      document.body.dataset.ready = String(mine);
    } catch (error) {
      $("trouble").hidden = false;
      $("trouble").textContent = typeof DecompressionStream === "undefined"
        ? "This browser cannot unpack the data; one of 2023 or later can."
        : `This page cannot be shown: ${error.message}`;
      throw error;
    }
  }

  visattnControls({ $, data, state, pictures, image, entries, entry, cells, asked, cellAt, cellIn, headName, show });

  function headName(head) {
    return head === 0 ? "all heads" : `head ${head}`;
  }
})();
