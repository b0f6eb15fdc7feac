"use strict";
// Draws the lanes of a timeline page: what is in sight, at the scale of `view`. Everything else of the page is HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const [chart, axis, tip, cursor] = [$("chart"), $("axis"), $("tip"), $("cursor")];
  const whole = Math.max(...data.timelines.map((t) => t.makespan)) || 1;
  const nearest = whole * 1e-7; // the shortest time that a page's width may show
  const view = { from: 0, to: whole };
  const letter = 6.1; // width of a letter at the labels' size
  let style = {}, hovered = null, awaitedOf = null, // the action under the cursor, and the one it waited for
    mostBytes = 1, withStanding = true, wanted = false;

  // ---- numbers in words ----
  const seconds = [[1, "s"], [1e-3, "ms"], [1e-6, "us"], [1e-9, "ns"]];
  const sizes = [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"], [1, "B"]];
  const fitting = (number, scales) => scales.find(([size]) => number >= size) || scales[scales.length - 1];
  const timeScale = (longest) => (data.unit === "s" ? (longest > 0 ? fitting(longest, seconds) : seconds[0]) : [1, data.unit]);
  const figure = (number, digits) => String(Number(number.toPrecision(digits)));
  function duration(time) {
    const [size, name] = timeScale(time);
    return `${figure(time / size, 4)} ${name}`;
  }
  function moment(time) { // to a thousandth of what is in sight
    const [size, name] = timeScale(whole);
    const decimals = Math.min(12, Math.max(0, 3 - Math.floor(Math.log10((view.to - view.from) / size))));
    return `${Number((time / size).toFixed(decimals))} ${name}`;
  }
  function bytes(number) {
    const [size, name] = fitting(number, sizes);
    return `${figure(number / size, 4)} ${name}`;
  }

  // ---- the timelines, as lanes ----
  const moving = new Set(data.moving);
  const lanes = [...document.querySelectorAll(".lane")].map((element) => {
    const [t, rank] = [Number(element.dataset.timeline), Number(element.dataset.rank)];
    const timeline = data.timelines[t];
    const lane = { element, rank, t, timeline, canvas: element.querySelector("canvas") };
    lane.points = timeline.memory[rank] || [];
    lane.standing = timeline.standing[rank] || 0;
    lane.spans = timeline.spans[rank].map(([stage, kind, microbatch, segment, start, end, awaited]) => {
      const label = `${stage}${kind}${microbatch}${segment ? `.${segment}` : ""}`;
      const took = duration(end - start);
      return { lane, took, stage, kind, microbatch, segment, start, end, awaited: awaited || "", label };
    });
    return lane;
  });
  const found = data.timelines.map(() => new Map()); // per timeline, an action's text -> its span
  for (const lane of lanes) for (const span of lane.spans) found[lane.t].set(span.label, span);
  const oneStage = lanes.every((lane) => new Set(lane.spans.map((span) => span.stage)).size <= 1);
  const hasMemory = lanes.some((lane) => lane.points.length);
  const perTimeline = Math.max(...data.timelines.map((t) => t.spans.length));
  const bar = perTimeline <= 8 ? 28 : Math.max(14, 36 - perTimeline);
  const curve = hasMemory ? (perTimeline <= 8 ? 32 : Math.max(12, 40 - perTimeline)) : 0;
  chart.classList.toggle("thin", bar + curve < 34);
  for (const lane of lanes) lane.canvas.style.height = `${bar + curve}px`;

  // ---- drawing ----
  let width = 0, marks = []; // of a track, once a drawing: the page is slow to tell
  const scale = () => width / (view.to - view.from);
  const x = (time) => (time - view.from) * scale();

  function surface(canvas) {
    const ratio = window.devicePixelRatio || 1;
    const [w, h] = [canvas.clientWidth, canvas.clientHeight];
    if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) {
      canvas.width = Math.round(w * ratio);
      canvas.height = Math.round(h * ratio);
    }
    const g = canvas.getContext("2d");
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    g.clearRect(0, 0, w, h);
    g.font = "10px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace";
    g.textBaseline = "middle";
    return [g, w, h];
  }

  function draw(everything = false) {
    wanted = false;
    width = axis.lastElementChild.clientWidth;
    marks = ticks();
    drawAxis();
    for (const lane of lanes) {
      const box = lane.canvas.getBoundingClientRect();
      if (everything || (box.bottom > -200 && box.top < window.innerHeight + 200)) drawLane(lane);
    }
    $("range").textContent = `${moment(view.from).split(" ")[0]} to ${moment(view.to)}`;
    $("window").style.left = `${(100 * view.from) / whole}%`;
    $("window").style.width = `${(100 * (view.to - view.from)) / whole}%`;
    $("window").hidden = view.to - view.from >= whole;
  }

  function redraw() {
    if (!wanted) requestAnimationFrame(() => draw());
    wanted = true;
  }

  function ticks() { // round times, far enough apart for their labels
    const [size] = timeScale(whole);
    const least = (90 / scale()) / size;
    const power = 10 ** Math.floor(Math.log10(least));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= least);
    const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    const times = [];
    for (let i = Math.ceil(view.from / size / step - 1e-9); i * step * size <= view.to * (1 + 1e-12); i++) times.push(i * step);
    return times.map((time) => [time * size, time.toFixed(decimals)]);
  }

  function drawAxis() {
    const [g, w, h] = surface(axis.querySelector("canvas"));
    const unit = timeScale(whole)[1];
    g.fillStyle = style.muted;
    for (const [time, label] of marks) {
      const at = x(time);
      g.fillRect(Math.round(at), h - 9, 1, 6);
      const half = g.measureText(label).width / 2;
      g.textAlign = at - half < 0 ? "left" : at + half > w - 40 ? "right" : "center";
      if (at < w - 40) g.fillText(label, g.textAlign === "left" ? Math.max(0, at - half) : at, 9);
    }
    g.textAlign = "right";
    g.fillText(unit, w, 9);
    g.fillRect(0, h - 3, w, 1);
  }

  function firstAfter(spans, time) { // index of the first span that ends after `time`
    let [low, high] = [0, spans.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (spans[middle].end > time) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  function drawLane(lane) {
    const [g, w] = surface(lane.canvas);
    const end = Math.min(w, x(lane.timeline.makespan));
    g.fillStyle = style.lane;
    if (end > 0) g.fillRect(0, 0, end, bar);
    g.fillStyle = style.grid;
    for (const [time] of marks) g.fillRect(Math.round(x(time)), 0, 1, bar + curve);
    if (lane.points.length) drawMemory(lane, g, w, end);
    // spans under a pixel become one column, as dense as the rank was busy
    let column = -1, longest = null, covered = 0;
    const flush = () => {
      if (longest) fill(g, longest, column, 1, Math.max(0.3, Math.min(1, covered)));
      longest = null;
      covered = 0;
    };
    for (let i = firstAfter(lane.spans, view.from); i < lane.spans.length && lane.spans[i].start < view.to; i++) {
      const span = lane.spans[i], a = x(span.start), b = x(span.end);
      if (b - a < 1.5) {
        if (Math.floor(a) !== column) flush();
        column = Math.floor(a);
        covered += b - a;
        if (!longest || span.end - span.start > longest.end - longest.start) longest = span;
        continue;
      }
      flush();
      drawSpan(g, span, a, b, w);
    }
    flush();
  }

  function fill(g, span, at, size, alpha) {
    const told = data.passes[span.kind];
    g.globalAlpha = alpha * (hovered && hovered.microbatch !== span.microbatch ? 0.22 : 1);
    g.fillStyle = told.colours[span.microbatch];
    g.fillRect(at, 0, size, bar);
    g.globalAlpha = 1;
  }

  function drawSpan(g, span, a, b, w) {
    const size = b - a - (b - a > 4 ? 1 : 0);
    const [left, right] = [Math.max(a, -2), Math.min(a + size, w + 2)]; // canvases dislike very large numbers
    fill(g, span, left, right - left, 1);
    const isDark = data.passes[span.kind].dark;
    const dim = hovered && hovered.microbatch !== span.microbatch;
    g.globalAlpha = dim ? 0.25 : 1;
    if (data.segments > 1 && size > 7) { // which piece of the sequence: the first left, the last right
      g.fillStyle = isDark ? "rgb(255 255 255 / 60%)" : "rgb(0 0 0 / 45%)";
      g.fillRect(a + (size * span.segment) / data.segments, 2, size / data.segments, 3);
    }
    if (moving.has(span.stage)) {
      g.fillStyle = isDark ? "rgb(255 255 255 / 85%)" : "rgb(0 0 0 / 75%)";
      g.fillRect(left, bar - 4, right - left, 2);
    }
    const [from, to] = [Math.max(0, left), Math.min(w, right)];
    const text = to - from > 2 * letter && labels(span).find((label) => label.length * letter + 3 <= to - from);
    if (text) {
      g.fillStyle = dim ? style.ink : isDark ? "#ffffff" : "#16181b";
      g.textAlign = "center";
      g.fillText(text, (from + to) / 2, bar / 2 + 0.5);
    }
    g.globalAlpha = 1;
    const outlined = hovered && (span === hovered || (span.label === hovered.label && span.lane.t !== hovered.lane.t));
    if (outlined || span === awaitedOf) {
      g.strokeStyle = style.accent;
      g.lineWidth = 2;
      g.setLineDash(outlined ? [] : [4, 3]);
      g.strokeRect(left + 1, 1, Math.max(1, right - left - 2), bar - 2);
      g.setLineDash([]);
    }
  }

  function labels(span) { // the most told first
    const name = oneStage ? span.label.slice(String(span.stage).length) : span.label;
    const parts = data.stages[span.stage] ? `  ${data.stages[span.stage]}` : "";
    const took = `${name}  ${span.took}`;
    return [took + parts, took, name, ...(span.segment ? [`.${span.segment}`] : [])];
  }

  function drawMemory(lane, g, w, end) {
    const points = lane.points, base = withStanding ? lane.standing : 0, columns = Math.max(0, Math.ceil(end));
    const [kept, all] = [new Float64Array(columns), new Float64Array(columns)]; // the most of what a column of pixels spans
    for (let i = 0; i < points.length; i++) {
      const [time, activations, buffers] = points[i];
      const until = i + 1 < points.length ? points[i + 1][0] : lane.timeline.makespan;
      if (until < view.from || time > view.to) continue;
      const last = Math.min(columns - 1, Math.floor(x(until)));
      for (let c = Math.max(0, Math.floor(x(time))); c <= last; c++) {
        kept[c] = Math.max(kept[c], activations);
        all[c] = Math.max(all[c], activations + buffers);
      }
    }
    const height = curve - 3, bottom = bar + curve;
    g.fillStyle = style.curve;
    g.fillRect(0, bottom - height, columns, height);
    const area = (values, colour) => { // a rectangle for every run of equal columns
      g.fillStyle = colour;
      for (let c = 0, first = 0; c < columns; c++) {
        if (c + 1 < columns && values && values[c + 1] === values[first]) continue;
        if (c + 1 < columns && !values) continue;
        const tall = (height * (base + (values ? values[first] : 0))) / mostBytes;
        g.fillRect(first, bottom - tall, c + 1 - first, tall);
        first = c + 1;
      }
    };
    area(all, style.buffers);
    area(kept, style.activations);
    if (base) area(null, style.stands);
  }

  function measureMemory() {
    const held = (lane) => lane.points.reduce((most, p) => Math.max(most, p[1] + p[2]), 0) + (withStanding ? lane.standing : 0);
    mostBytes = Math.max(1, ...lanes.map(held));
    if ($("height")) $("height").textContent = `a curve's full height: ${bytes(mostBytes)}`;
  }

  function readStyle() {
    const read = getComputedStyle(document.documentElement);
    for (const name of ["ink", "muted", "lane", "grid", "curve", "activations", "buffers", "stands", "accent"])
      style[name] = read.getPropertyValue(`--${name}`).trim();
  }

  // ---- moving about ----
  function show(from, to) {
    const size = Math.min(whole, Math.max(nearest, to - from));
    if (to - from < nearest) from = (from + to - size) / 2;
    view.from = Math.min(whole - size, Math.max(0, from));
    view.to = view.from + size;
    redraw();
  }
  function zoom(factor, at = (view.from + view.to) / 2) {
    show(at - (at - view.from) * factor, at + (view.to - at) * factor);
  }
  const pan = (share) => show(view.from + share * (view.to - view.from), view.to + share * (view.to - view.from));
  const all = () => show(0, whole);
  const timeAt = (event) => view.from + (event.clientX - axis.lastElementChild.getBoundingClientRect().left) / scale();

  // ---- the tooltip ----
  function producer(span) { // the action that made what `span` waited for
    const match = span && / of (\S+) from rank /.exec(span.awaited);
    return match ? found[span.lane.t].get(match[1]) : undefined;
  }
  function describe(span) {
    const { lane, stage } = span, rows = [];
    const before = lane.spans[lane.spans.indexOf(span) - 1];
    const idle = span.start - (before ? before.end : 0);
    rows.push(["rank", `${lane.rank}${data.timelines.length > 1 ? `, ${lane.timeline.name}` : ""}`]);
    rows.push(["stage", data.stages[stage] ? `${stage}: ${data.stages[stage]}` : stage]);
    rows.push(["pass", data.passes[span.kind].name], ["micro-batch", span.microbatch]);
    if (data.segments > 1) rows.push(["segment", `${span.segment} (0 to ${data.segments - 1})`]);
    rows.push(["start", moment(span.start)], ["end", moment(span.end)], ["duration", span.took]);
    if (idle > whole * 1e-9) rows.push(["idle before", duration(idle)]);
    rows.push(["waited for", span.awaited || "nothing"]);
    data.timelines.forEach((other, t) => {
      const same = t !== lane.t && found[t].get(span.label);
      if (same) rows.push([other.name, `${duration(same.end - same.start)}, from ${moment(same.start)}`]);
    });
    return [span.label, rows];
  }
  function describeIdle(lane, time, next) {
    const spans = lane.spans, before = spans[next - 1], after = spans[next];
    const [from, to] = [before ? before.end : 0, after ? after.start : lane.timeline.makespan];
    if (time > to) return null;
    const rows = [["rank", lane.rank], ["from", moment(from)], ["to", moment(to)], ["duration", duration(to - from)]];
    if (after) rows.push(["then", after.label], ["waits for", after.awaited || "its turn"]);
    return ["idle", rows];
  }
  function describeMemory(lane, time) {
    let point = null;
    for (const each of lane.points) if (each[0] <= time) point = each;
    if (!point || time > lane.timeline.makespan) return null;
    const rows = [["rank", lane.rank], ["activations", bytes(point[1])], ["message buffers", bytes(point[2])]];
    if (lane.standing) rows.push(["standing", bytes(lane.standing)], ["all", bytes(point[1] + point[2] + lane.standing)]);
    return [`held at ${moment(time)}`, rows];
  }
  function tell(told, left, top) {
    tip.hidden = !told;
    if (!told) return;
    const [head, rows] = told;
    const list = document.createElement("dl");
    for (const row of rows)
      row.forEach((text, i) => (list.appendChild(document.createElement(i ? "dd" : "dt")).textContent = text));
    const strong = document.createElement("strong");
    strong.textContent = head;
    tip.replaceChildren(strong, list);
    const [w, h] = [tip.offsetWidth, tip.offsetHeight];
    const at = left + 16 + w > window.innerWidth ? Math.max(8, left - w - 16) : left + 16;
    const under = top + 18 + h > window.innerHeight ? Math.max(8, top - h - 12) : top + 18;
    tip.style.transform = `translate(${Math.round(at)}px, ${Math.round(under)}px)`;
  }
  function highlight(span) {
    if (span === hovered) return;
    hovered = span;
    awaitedOf = producer(span);
    redraw();
  }
  function point(lane, event) {
    const time = timeAt(event), y = event.clientY - lane.canvas.getBoundingClientRect().top;
    const next = firstAfter(lane.spans, time);
    const span = lane.spans[next] && lane.spans[next].start <= time ? lane.spans[next] : null;
    const inBar = y <= bar;
    highlight(inBar ? span : null);
    const told = !inBar ? describeMemory(lane, time) : span ? describe(span) : describeIdle(lane, time, next);
    tell(told, event.clientX, event.clientY);
    cursor.hidden = false;
    cursor.style.transform = `translateX(${event.clientX - chart.getBoundingClientRect().left}px)`;
  }
  function leave() {
    highlight(null);
    tell(null);
    cursor.hidden = true;
  }
  function step(by) { // to the next action of the hovered one's rank, by key
    const lane = hovered ? hovered.lane : lanes[0];
    const span = lane && lane.spans[hovered ? lane.spans.indexOf(hovered) + by : 0];
    if (!span) return;
    const middle = (span.start + span.end) / 2, half = (view.to - view.from) / 2;
    if (middle < view.from || middle > view.to) show(middle - half, middle + half);
    highlight(span);
    lane.element.scrollIntoView({ block: "nearest" });
    const box = lane.canvas.getBoundingClientRect();
    tell(describe(span), box.left + x(middle), box.top + bar);
  }

  // ---- events ----
  let drag = null;
  for (const lane of lanes) {
    const track = lane.element.querySelector(".track");
    track.addEventListener("pointermove", (event) => {
      if (!drag) return point(lane, event);
      const moved = (drag.x - event.clientX) / scale();
      show(drag.from + moved, drag.from + moved + (view.to - view.from));
      if (event.pointerType === "mouse") window.scrollBy(0, drag.y - event.clientY);
      drag.y = event.clientY;
    });
    track.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      drag = { x: event.clientX, y: event.clientY, from: view.from };
      track.setPointerCapture(event.pointerId);
      chart.classList.add("dragging");
      leave();
    });
    for (const name of ["pointerup", "pointercancel"])
      track.addEventListener(name, () => {
        drag = null;
        chart.classList.remove("dragging");
      });
    track.addEventListener("pointerleave", leave);
    track.addEventListener("dblclick", all);
    track.addEventListener("wheel", (event) => {
      const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY) || event.shiftKey;
      if (!sideways && event.deltaY > 0 && view.to - view.from >= whole) return; // nothing more to zoom out: the page scrolls
      event.preventDefault();
      const lines = (event.deltaMode === 1 ? 20 : 1) * (event.ctrlKey ? 4 : 1); // a pinch comes as small turns with ctrl
      if (sideways) pan(((event.deltaX || event.deltaY) * lines) / width);
      else zoom(Math.exp(event.deltaY * lines * 0.002), timeAt(event));
      point(lane, event);
    }, { passive: false });
  }
  const keys = {
    ArrowLeft: () => pan(-0.15), ArrowRight: () => pan(0.15), "+": () => zoom(0.7), "=": () => zoom(0.7),
    "-": () => zoom(1 / 0.7), 0: all, Home: all, n: () => step(1), p: () => step(-1), Escape: leave,
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  $("in").addEventListener("click", () => zoom(0.5));
  $("out").addEventListener("click", () => zoom(2));
  $("all").addEventListener("click", all);
  const toggle = (id, act) => $(id) && $(id).addEventListener("click", () => {
    const on = $(id).getAttribute("aria-pressed") !== "true";
    $(id).setAttribute("aria-pressed", on);
    act(on);
    redraw();
  });
  toggle("standing", (on) => {
    withStanding = on;
    measureMemory();
  });
  const order = [...$("lanes").children]; // headings and lanes, a timeline after the other
  toggle("pair", (on) => {
    chart.classList.toggle("paired", on);
    const sorted = [...lanes].sort((a, b) => a.rank - b.rank || a.t - b.t);
    sorted.forEach((lane, i) => lane.element.classList.toggle("last", !sorted[i + 1] || sorted[i + 1].rank !== lane.rank));
    const heads = order.filter((element) => element.tagName === "H2");
    $("lanes").append(...(on ? [...heads, ...sorted.map((lane) => lane.element)] : order));
  });
  window.addEventListener("scroll", redraw, { passive: true });
  window.addEventListener("resize", redraw);
  window.addEventListener("beforeprint", () => draw(true));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    readStyle();
    redraw();
  });
  readStyle();
  measureMemory();
  draw();
  window.helixpipe = { view, get hovered() { return hovered && hovered.label; } }; // for tests and the curious
})();
