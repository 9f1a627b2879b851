"use strict";
// Fills the routing figures and colours the sample by what is selected above them.
(() => {
  const runs = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const chosen = { run: at("run"), block: at("block"), layer: at("layer"), expert: at("expert") };

  // --- numbers -------------------------------------------------------------------------------------------------
  function unpacked(packed) {
    const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
    const values = new Int16Array(bytes.buffer);
    const [first, ...rest] = packed.shape;
    const size = rest.reduce((a, b) => a * b, 1);
    // [layer] -> its values, flat
    return Array.from({ length: first }, (_, i) => Float64Array.from(values.subarray(i * size, (i + 1) * size), (v) => v * packed.scale));
  }
  const kept = new Map();
  function numbers(packed) {
    if (!kept.has(packed)) kept.set(packed, unpacked(packed));
    return kept.get(packed);
  }

  // --- choices -------------------------------------------------------------------------------------------------
  function offer(select, options) {
    const old = select.value;
    select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
    if (options.some(([value]) => value === old)) select.value = old;
  }
  const run = () => runs[Number(chosen.run.value)];
  const block = () => run().blocks[chosen.block.value];
  const layer = () => Number(chosen.layer.value);
  const nameOf = (i) => {
    const heads = block().heads;
    if (!heads) return `expert ${i}`;
    return heads === 1 ? `expert ${i} (head ${i})` : `expert ${i} (heads ${i * heads}–${(i + 1) * heads - 1})`;
  };

  function offerAll() {
    offer(chosen.block, Object.keys(run().blocks).map((name) => [name, name]));
    offer(chosen.layer, Array.from({ length: run().layers }, (_, i) => [String(i), String(i)]));
    if (!block()) return;
    const experts = Array.from({ length: block().n }, (_, i) => [String(i), nameOf(i)]);
    offer(chosen.expert, [["best", "the expert with the highest weight"], ...experts]);
  }

  // --- figures -------------------------------------------------------------------------------------------------
  function fill(name, data) {
    for (const doc of Bokeh.documents) {
      const source = doc.get_model_by_name(name);
      if (source) source.data = data;
    }
  }

  function drawFigures() {
    const b = block();
    if (!b || !b.edges) return;
    const n = b.n, times = b.edges.length - 1, load = numbers(b.load)[layer()];
    const cells = { left: [], right: [], top: [], bottom: [], value: [], expert: [], step: [] };
    for (let t = 0; t < times; t++) {
      for (let i = 0; i < n; i++) {
        cells.left.push(b.edges[t]); cells.right.push(b.edges[t + 1]);
        cells.bottom.push(i - 0.5); cells.top.push(i + 0.5);
        cells.value.push(load[t * n + i]); cells.expert.push(nameOf(i)); cells.step.push(b.edges[t]);
      }
    }
    fill("cells", cells);
    const step = b.edges.slice(0, -1);
    for (const [name, packed] of Object.entries(b.lines)) fill(name, { step, value: Array.from(numbers(packed)[layer()]) });
    fill("even: ln N", { step: [b.edges[0], b.edges[times]], value: [b.even, b.even] });
    const quarters = numbers(b.quarters)[layer()];
    ["first", "second", "third", "last"].forEach((which, q) => {
      fill(`${which} quarter`, { step, value: step.map((_, t) => quarters[4 * t + q]) });
    });
  }

  // --- the sample ----------------------------------------------------------------------------------------------
  const hue = (i, n) => `hsl(${Math.round((360 * i) / n)}, 70%, 78%)`;

  function patchWeights(row, token) {
    // Weights of all experts for a token's patch; null beyond the patches shown.
    const b = block(), [, rows, patches, n] = b.routes.shape;
    const patch = Math.floor((token + run().sample.before) / b.patch);
    if (row >= rows || patch >= patches) return null;
    const start = (row * patches + patch) * n;
    return numbers(b.routes)[layer()].subarray(start, start + n);
  }
  const taken = (w) => w >= 0;

  function colour(weights, top) {
    if (!weights) return "";
    if (chosen.expert.value === "best") {
      let best = -1;
      weights.forEach((w, i) => { if (taken(w) && (best < 0 || w > weights[best])) best = i; });
      return best < 0 ? "" : hue(best, weights.length);
    }
    const w = weights[Number(chosen.expert.value)];
    return taken(w) ? `rgba(31, 119, 180, ${(0.15 + (0.6 * w) / top).toFixed(3)})` : "";
  }

  function tooltip(what, row, token) {
    const weights = patchWeights(row, token);
    if (!weights) return `${what}: not looked at`;
    const own = Array.from(weights, (w, i) => [w, i]).filter(([w]) => taken(w)).sort((a, b) => b[0] - a[0]);
    const patch = Math.floor((token + run().sample.before) / block().patch);
    return `${what} · patch ${patch} · ` + (own.length ? own.map(([w, i]) => `${nameOf(i)}: ${w.toFixed(2)}`).join(", ") : "no expert took it");
  }

  function drawSample() {
    const s = run().sample, b = block(), place = at("sample");
    place.replaceChildren();
    at("of-sample").hidden = !(s && b && b.routes);
    at("why").textContent = run().why || (b && !b.routes ? "Of this block there is no sample to show." : `At step ${run().step}. Point at a token or a square to see who took it.`);
    if (!s || !b || !b.routes) return;
    const top = Math.max(...numbers(b.routes)[layer()], 1e-9);
    drawLegend(b);
    s.titles.forEach((title, row) => {
      const heading = document.createElement("h4");
      heading.textContent = title;
      place.append(heading, s.texts ? passage(s.texts[row], row, top) : pictures(s.pictures[row], row, s.grid, b));
    });
  }

  function drawLegend(b) {
    const keys = Array.from({ length: b.n }, (_, i) => {
      const key = document.createElement("span");
      key.className = "key";
      key.style.background = hue(i, b.n);
      key.textContent = nameOf(i);
      return key;
    });
    at("legend").replaceChildren(...(chosen.expert.value === "best" && run().sample.texts ? keys : []));
  }

  function passage(tokens, row, top) {
    const box = document.createElement("div");
    box.className = "passage";
    const spans = tokens.map((text, i) => {
      const span = document.createElement("span");
      span.textContent = text;
      span.style.background = colour(patchWeights(row, i), top);
      span.dataset.row = row;
      span.dataset.token = i;
      return span;
    });
    box.append(...spans);
    return box;
  }

  function pictures(source, row, grid, b) {
    // The picture, and for every expert the picture with the patches it did not take faded.
    const box = document.createElement("div");
    box.className = "pictures";
    const only = chosen.expert.value;
    const shown = only === "best" ? [-1, ...Array.from({ length: b.n }, (_, i) => i)] : [-1, Number(only)];
    const image = new Image();
    image.onload = () => box.append(...shown.map((i) => picture(image, row, grid, i)));
    image.src = source;
    return box;
  }

  function picture(image, row, [high, wide], expert) {
    const figure = document.createElement("figure"), canvas = document.createElement("canvas"), caption = document.createElement("figcaption");
    const scale = Math.max(1, Math.round(128 / Math.max(image.width, image.height)));
    canvas.width = image.width * scale;
    canvas.height = image.height * scale;
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    const w = canvas.width / wide, h = canvas.height / high;
    let count = 0;
    for (let token = 0; expert >= 0 && token < high * wide; token++) {
      const weights = patchWeights(row, token), x = (token % wide) * w, y = Math.floor(token / wide) * h;
      if (weights && taken(weights[expert])) {
        count++;
        pen.strokeStyle = "rgba(214, 39, 40, .9)";
        if (w > 5) pen.strokeRect(x + 0.5, y + 0.5, w - 1, h - 1);
      } else {
        pen.fillStyle = "rgba(255, 255, 255, .8)";
        pen.fillRect(x, y, w, h);
      }
    }
    caption.textContent = expert < 0 ? "the picture" : `${nameOf(expert)}: ${Math.round((100 * count) / (high * wide))} %`;
    canvas.dataset.row = row;
    canvas.dataset.wide = wide;
    canvas.dataset.high = high;
    figure.append(canvas, caption);
    return figure;
  }

  function point(event) {
    const tip = at("tip"), target = event.target, row = Number(target.dataset.row);
    let text = "";
    if (target.dataset.token !== undefined) {
      text = tooltip(JSON.stringify(target.textContent), row, Number(target.dataset.token));
    } else if (target.tagName === "CANVAS" && target.dataset.wide) {
      const wide = Number(target.dataset.wide), high = Number(target.dataset.high);
      const x = Math.min(wide - 1, Math.floor((event.offsetX / target.clientWidth) * wide));
      const y = Math.min(high - 1, Math.floor((event.offsetY / target.clientHeight) * high));
      text = tooltip(`square ${y}, ${x}`, row, y * wide + x);
    }
    tip.hidden = !text;
    tip.textContent = text;
    tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - 340)}px`;
    tip.style.top = `${event.clientY + 16}px`;
  }

  // --- start ---------------------------------------------------------------------------------------------------
  function draw() {
    offerAll();
    drawFigures();
    drawSample();
  }

  function overSteps() {
    const which = at("over").value;
    const models = Bokeh.documents.flatMap((doc) => doc.roots()).flatMap((root) => [...root.references()]);
    for (const model of models) {
      if (model.tags.includes("over")) model.axis_label = which;
      if (model.data && model.data.tokens) model.data = { ...model.data, x: model.data[which] };
    }
  }

  function start() {
    const charts = document.querySelector(".charts > div");  // none before the first logged step
    if (charts && !Bokeh.documents.length) return setTimeout(start, 20);
    at("routed").hidden = !runs.some((r) => Object.keys(r.blocks).length);
    offer(chosen.run, runs.map((r, i) => [String(i), r.name]).filter(([i]) => Object.keys(runs[i].blocks).length));
    if (at("routed").hidden) return;
    Object.values(chosen).forEach((select) => select.addEventListener("change", draw));
    at("sample").addEventListener("mousemove", point);
    at("sample").addEventListener("mouseleave", () => { at("tip").hidden = true; });
    draw();
    document.body.dataset.ready = "yes";
  }
  at("over").addEventListener("change", overSteps);
  start();
})();
