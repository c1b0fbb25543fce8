"use strict";
(() => {
  // ---------------------------------------------------------------- tips of the charts
  const tip = document.getElementById("tip");
  const showTip = (event) => {
    const text = event.target.dataset && event.target.dataset.tip;
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const box = tip.getBoundingClientRect();
    const x = Math.min(Math.max(8, event.clientX - box.width / 2), innerWidth - box.width - 8);
    const above = event.clientY - box.height - 14;
    tip.style.left = `${x}px`;
    tip.style.top = `${above > 4 ? above : event.clientY + 18}px`;
  };
  document.addEventListener("pointermove", showTip);
  document.addEventListener("pointerdown", showTip);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  // ---------------------------------------------------------------- data
  const data = JSON.parse(document.getElementById("data").textContent);
  const canvas = document.getElementById("canvas");
  if (!data || !canvas) return;
  const unpack = (text, Type) => {
    const raw = atob(text);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return new Type(bytes.buffer);
  };
  const n = data.n;
  const maps = data.maps.map((xy) => unpack(xy, Uint16Array));
  const ids = unpack(data.id, Float64Array);
  const timestamps = unpack(data.timestamp, Float64Array);
  const columns = { age: new Float32Array(n) };
  for (const name of ["rate", "retrievals", "successes", "priority", "reward", "confidence"]) {
    columns[name] = unpack(data[name], Float32Array);
  }
  for (let i = 0; i < n; i++) columns.age[i] = Math.max(0, data.now - timestamps[i]);
  const coded = {};
  for (const name of ["question", "answer", "label", "picture"]) {
    coded[name] = unpack(data[name], Uint32Array);
  }
  const word = (name, i) => data.strings[coded[name][i]];

  // ---------------------------------------------------------------- words
  const number = (x) => {
    if (Number.isNaN(x)) return "unknown";
    const size = Math.abs(x);
    if (size >= 1000) return Math.round(x).toLocaleString("en");
    return String(Number(x.toPrecision(3)));
  };
  const percent = (x) => `${Math.round(100 * x)}%`;
  const span = (s) => {
    for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]]) {
      if (s >= 2 * length) return `${Math.round(s / length)} ${unit}`;
    }
    return `${Math.round(s)} s`;
  };
  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  // ---------------------------------------------------------------- colours
  const SHADES = 10;
  const LIGHT = ["#2c6e8f", "#c2662d", "#6b8f3d", "#8b5a9e", "#b8942b", "#c0506f", "#3f9a8c", "#7d6a55"];
  const DARK = ["#6db5d8", "#ee9a62", "#a5cc74", "#c99adb", "#e5c964", "#f08fab", "#74d3c2", "#c0a98e"];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const mixed = (stops, share) => {
    const at = Math.min(0.9999, Math.max(0, share)) * (stops.length - 1);
    const [a, b] = [rgb(stops[Math.floor(at)]), rgb(stops[Math.floor(at) + 1])];
    return `rgb(${a.map((x, i) => Math.round(x + (b[i] - x) * (at % 1))).join(" ")})`;
  };
  const quantile = (sorted, share) => sorted[Math.round(share * (sorted.length - 1))];

  // Each experience gets a class; classes are drawn one by one, the last on top.
  let classes = new Uint8Array(n);
  let colours = [];
  const legend = document.getElementById("legend");

  const ramp = (stops, low, high) => {
    const bar = element("div", "ramp");
    bar.style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
    const ends = element("div", "ends");
    ends.append(element("span", "", low), element("span", "", high));
    return [bar, ends];
  };
  const keys = (pairs) => {
    const list = element("ul");
    for (const [colour, meaning, count] of pairs) {
      const item = element("li");
      const swatch = element("span", "swatch");
      swatch.style.background = colour;
      const text = element("span", "", `${meaning} (${count.toLocaleString("en")})`);
      text.title = meaning;
      item.append(swatch, text);
      list.append(item);
    }
    return list;
  };

  const byNumber = (name, stops, format, missing) => {
    const values = columns[name];
    const known = values.filter((x) => !Number.isNaN(x)).sort();
    // A few extreme values must not take all the colours.
    let [low, high] = known.length ? [quantile(known, 0.01), quantile(known, 0.99)] : [0, 1];
    if (name === "rate" || name === "confidence") [low, high] = [0, 1];
    if (name === "reward") { high = Math.max(Math.abs(low), Math.abs(high), 1e-9); low = -high; }
    if (!(high > low)) high = low + 1;
    colours = [variable("--none")];
    for (let i = 0; i < SHADES; i++) colours.push(mixed(stops, (i + 0.5) / SHADES));
    let unknown = 0;
    for (let i = 0; i < n; i++) {
      const share = (values[i] - low) / (high - low);
      if (Number.isNaN(share)) { classes[i] = 0; unknown++; continue; }
      classes[i] = 1 + Math.min(SHADES - 1, Math.max(0, Math.floor(share * SHADES)));
    }
    legend.replaceChildren(...ramp(stops, format(low), format(high)));
    if (unknown) legend.append(keys([[colours[0], missing, unknown]]));
  };

  const byAnswer = () => {
    const counts = new Map();
    for (const code of coded.answer) counts.set(code, (counts.get(code) || 0) + 1);
    const palette = dark.matches ? DARK : LIGHT;
    const common = [...counts].sort((a, b) => b[1] - a[1]).slice(0, palette.length);
    const place = new Map(common.map(([code], i) => [code, i + 1]));
    colours = [variable("--none"), ...palette];
    let others = 0;
    for (let i = 0; i < n; i++) {
      classes[i] = place.get(coded.answer[i]) || 0;
      if (!classes[i]) others++;
    }
    const pairs = common.map(([code, count], i) => [
      palette[i], data.strings[code] || "no answer", count,
    ]);
    if (others) pairs.push([colours[0], "others", others]);
    legend.replaceChildren(keys(pairs));
  };

  const shades = () => Array.from({ length: SHADES }, (_, i) => variable(`--s${i}`));
  const blues = () => ["--q0", "--q1", "--q2"].map(variable);
  const colouring = {
    rate: () => byNumber("rate", shades(), percent, "never retrieved"),
    answer: byAnswer,
    priority: () => byNumber("priority", blues(), number, "unknown"),
    reward: () => byNumber("reward", shades(), number, "unknown"),
    confidence: () => byNumber("confidence", blues(), percent, "unknown"),
    retrievals: () => byNumber("retrievals", blues(), number, "unknown"),
    age: () => byNumber("age", blues(), span, "unknown"),
  };

  // ---------------------------------------------------------------- drawing
  const context = canvas.getContext("2d");
  let layout = 0;
  let [scale, left, top] = [1, 0, 0]; // of the view: 1 shows all of it
  let [width, height, side] = [0, 0, 0];
  let [pointed, held] = [-1, -1];
  const sx = new Float32Array(n);
  const sy = new Float32Array(n);
  let cells = new Map(); // what lies where, to find it quickly
  const CELL = 24;
  let waiting = false;

  const place = () => {
    const xy = maps[layout];
    const size = side * scale;
    const x0 = (width - side) / 2 * scale + left;
    const y0 = (height - side) / 2 * scale + top;
    cells = new Map();
    for (let i = 0; i < n; i++) {
      sx[i] = x0 + (xy[2 * i] / 65535) * size;
      sy[i] = y0 + (1 - xy[2 * i + 1] / 65535) * size;
      if (sx[i] < -20 || sy[i] < -20 || sx[i] > width + 20 || sy[i] > height + 20) continue;
      const cell = Math.floor(sx[i] / CELL) * 4096 + Math.floor(sy[i] / CELL);
      const here = cells.get(cell);
      if (here) here.push(i); else cells.set(cell, [i]);
    }
  };
  const radius = () => {
    const sparse = Math.min(6, Math.max(1.7, 0.8 * side / Math.sqrt(n + 1) / 3));
    return sparse * Math.min(3, Math.sqrt(scale));
  };
  const draw = () => {
    waiting = false;
    const ratio = devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const r = radius();
    const order = Array.from({ length: colours.length }, () => []);
    for (const here of cells.values()) for (const i of here) order[classes[i]].push(i);
    context.globalAlpha = n > 3000 ? 0.8 : 0.92;
    order.forEach((members, c) => {
      context.fillStyle = colours[c];
      context.beginPath();
      for (const i of members) {
        context.moveTo(sx[i] + r, sy[i]);
        context.arc(sx[i], sy[i], r, 0, 7);
      }
      context.fill();
    });
    context.globalAlpha = 1;
    for (const i of [held, pointed]) {
      if (i < 0) continue;
      context.beginPath();
      context.arc(sx[i], sy[i], Math.max(r, 3) + 3, 0, 7);
      context.strokeStyle = variable("--ink");
      context.lineWidth = 2;
      context.stroke();
      context.fillStyle = colours[classes[i]];
      context.beginPath();
      context.arc(sx[i], sy[i], Math.max(r, 3), 0, 7);
      context.fill();
    }
  };
  const redraw = () => {
    if (!waiting) { waiting = true; requestAnimationFrame(draw); }
  };
  const moved = () => { place(); showCard(); redraw(); };
  const resized = () => {
    const box = canvas.getBoundingClientRect();
    const ratio = devicePixelRatio || 1;
    [width, height] = [box.width, box.height];
    side = Math.max(10, Math.min(width, height) - 48);
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    moved();
  };

  // ---------------------------------------------------------------- the card
  const card = document.getElementById("card");
  const showCard = () => {
    const i = pointed >= 0 ? pointed : held;
    card.hidden = i < 0;
    if (i < 0) return;
    const top_ = element("div", "top");
    if (word("picture", i)) {
      const picture = element("img");
      picture.alt = "";
      picture.src = word("picture", i);
      top_.append(picture);
    }
    const words = element("div", "words");
    const question = element("div", word("question", i) ? "" : "muted", word("question", i) || "no question");
    question.dir = "auto";
    words.append(question);
    if (word("answer", i)) {
      const answer = element("div", "answer", word("answer", i));
      answer.dir = "auto";
      words.append(answer);
    }
    if (word("label", i)) words.append(element("div", "label", word("label", i)));
    top_.append(words);
    const facts = element("div", "facts");
    const used = columns.retrievals[i];
    for (const [name, value] of [
      ["id", String(ids[i])],
      used ? ["right", `${number(columns.successes[i])} of ${number(used)}`] : ["retrieved", "never"],
      ["priority", number(columns.priority[i])],
      ["reward", number(columns.reward[i])],
      ["confidence", number(columns.confidence[i])],
      ["age", span(columns.age[i])],
    ]) {
      const fact = element("span", "", `${name} `);
      fact.append(element("b", "", value));
      facts.append(fact);
    }
    card.replaceChildren(top_, facts);
    if (innerWidth <= 760) { card.style.left = card.style.top = ""; return; }
    const box = card.getBoundingClientRect();
    const fits = sx[i] + 18 + box.width < width;
    card.style.left = `${Math.max(8, fits ? sx[i] + 18 : sx[i] - 18 - box.width)}px`;
    card.style.top = `${Math.min(Math.max(8, sy[i] - box.height / 2), height - box.height - 8)}px`;
  };
  const nearest = (x, y) => {
    let [best, distance] = [-1, 18 * 18];
    const [cx, cy] = [Math.floor(x / CELL), Math.floor(y / CELL)];
    for (let a = cx - 1; a <= cx + 1; a++) {
      for (let b = cy - 1; b <= cy + 1; b++) {
        for (const i of cells.get(a * 4096 + b) || []) {
          const d = (sx[i] - x) ** 2 + (sy[i] - y) ** 2;
          if (d < distance) [best, distance] = [i, d];
        }
      }
    }
    return best;
  };
  const point = (i) => {
    if (i === pointed) return;
    pointed = i;
    showCard();
    redraw();
  };

  // ---------------------------------------------------------------- moving about
  const zoom = (factor, x = width / 2, y = height / 2) => {
    const next = Math.min(60, Math.max(1, scale * factor));
    left = x - (x - left) * (next / scale);
    top = y - (y - top) * (next / scale);
    scale = next;
    if (scale === 1) left = top = 0;
    canvas.style.touchAction = scale > 1 ? "none" : "pan-y";
    moved();
  };
  const fingers = new Map();
  let travelled = 0;
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, at(event));
    travelled = 0;
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = at(event);
    const before = fingers.get(event.pointerId);
    if (!before) { point(nearest(x, y)); return; }
    const others = [...fingers].filter(([id]) => id !== event.pointerId);
    fingers.set(event.pointerId, [x, y]);
    travelled += Math.hypot(x - before[0], y - before[1]);
    if (others.length) {
      const [ox, oy] = others[0][1];
      zoom(Math.hypot(x - ox, y - oy) / Math.max(1, Math.hypot(before[0] - ox, before[1] - oy)), ox, oy);
    } else if (scale > 1 && travelled > 4) {
      canvas.classList.add("dragged");
      left += x - before[0];
      top += y - before[1];
      moved();
    }
  });
  const released = (event) => {
    if (fingers.delete(event.pointerId) && event.type === "pointerup" && travelled <= 4) {
      const found = nearest(...at(event));
      held = found === held ? -1 : found;
      pointed = -1;
      showCard();
      redraw();
    }
    canvas.classList.remove("dragged");
  };
  canvas.addEventListener("pointerup", released);
  canvas.addEventListener("pointercancel", released);
  canvas.addEventListener("pointerleave", () => point(-1));
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 200), ...at(event));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const step = 60;
    const keys_ = {
      "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), "0": () => zoom(0),
      Escape: () => { held = pointed = -1; moved(); },
      ArrowLeft: () => { left += step; moved(); }, ArrowRight: () => { left -= step; moved(); },
      ArrowUp: () => { top += step; moved(); }, ArrowDown: () => { top -= step; moved(); },
    };
    if (keys_[event.key]) { event.preventDefault(); keys_[event.key](); }
  });
  document.getElementById("in").addEventListener("click", () => zoom(1.6));
  document.getElementById("out").addEventListener("click", () => zoom(1 / 1.6));
  document.getElementById("whole").addEventListener("click", () => zoom(0));

  const choice = document.getElementById("colour");
  const recolour = () => { colouring[choice.value](); redraw(); };
  choice.addEventListener("change", recolour);
  dark.addEventListener("change", recolour);
  for (const input of document.querySelectorAll("input[name=layout]")) {
    input.addEventListener("change", () => {
      layout = Number(input.value);
      for (const text of document.querySelectorAll("[data-layout]")) {
        text.hidden = Number(text.dataset.layout) !== layout;
      }
      zoom(0);
    });
  }
  const rowOf = new Map(Array.from(ids, (id, i) => [id, i]));
  for (const button of document.querySelectorAll("button[data-id]")) {
    button.addEventListener("click", () => {
      const i = rowOf.get(Number(button.dataset.id));
      if (i === undefined) return;
      zoom(0);
      held = i;
      pointed = -1;
      showCard();
      redraw();
      canvas.scrollIntoView({ behavior: "smooth", block: "center" });
    });
  }
  new ResizeObserver(resized).observe(canvas);
  // A browser may keep the choices of the last visit.
  const chosen = document.querySelector("input[name=layout]:checked");
  if (chosen && chosen.value !== "0") chosen.dispatchEvent(new Event("change"));
  recolour();
  resized();
})();
