// Draws the axis and the lanes: what is in sight, at the scale of `view`.

let later = 0, width = 0, marks = []; // of a track, once a drawing: the page is slow to tell
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

function draw() {
  wanted = false;
  width = axis.lastElementChild.clientWidth;
  marks = ticks();
  drawAxis();
  const inSight = (lane) => {
    const box = lane.canvas.getBoundingClientRect();
    return box.bottom > -200 && box.top < window.innerHeight + 200;
  };
  const rest = lanes.filter((lane) => !inSight(lane));
  lanes.filter(inSight).forEach(drawLane);
  clearTimeout(later);
  later = setTimeout(() => rest.forEach(drawLane), 200); // once nothing moves
  $("range").textContent = `${moment(view.from).split(" ")[0]} to ${moment(view.to)}`;
  $("window").style.left = `${(100 * view.from) / whole}%`;
  $("window").style.width = `${(100 * (view.to - view.from)) / whole}%`;
  $("window").hidden = view.to - view.from >= whole;
}

function redraw() {
  if (!wanted) requestAnimationFrame(draw);
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
  const [activations, all] = [new Float64Array(columns), new Float64Array(columns)]; // the most of what a column of pixels spans
  for (let i = 0; i < points.length; i++) {
    const [time, kept, transit, workspace = 0] = points[i], working = kept + workspace;
    const until = i + 1 < points.length ? points[i + 1][0] : lane.timeline.makespan;
    if (until < view.from || time > view.to) continue;
    const last = Math.min(columns - 1, Math.floor(x(until)));
    for (let c = Math.max(0, Math.floor(x(time))); c <= last; c++) {
      activations[c] = Math.max(activations[c], working);
      all[c] = Math.max(all[c], working + transit);
    }
  }
  const height = curve - 3, bottom = bar + curve;
  g.fillStyle = style.curve;
  g.fillRect(0, bottom - height, columns, height);
  const area = (values, colour) => { // a rectangle for every run of equal columns
    g.fillStyle = colour;
    for (let c = 0, first = 0; c < columns; c++) {
      if (c + 1 < columns && (!values || values[c + 1] === values[first])) continue;
      const tall = (height * (base + (values ? values[first] : 0))) / mostBytes;
      g.fillRect(first, bottom - tall, c + 1 - first, tall);
      first = c + 1;
    }
  };
  area(all, style.buffers);
  area(activations, style.activations);
  if (base) area(null, style.stands);
}

function measureMemory() {
  const held = (lane) => lane.points.reduce((most, p) => Math.max(most, p[1] + p[2] + (p[3] || 0)), 0) + (withStanding ? lane.standing : 0);
  mostBytes = Math.max(1, ...lanes.map(held));
  if ($("height")) $("height").textContent = `a curve's full height: ${bytes(mostBytes)}`;
}

function readStyle() {
  const read = getComputedStyle(document.documentElement);
  for (const name of ["ink", "muted", "lane", "grid", "curve", "activations", "buffers", "stands", "accent"])
    style[name] = read.getPropertyValue(`--${name}`).trim();
}
