// The timelines as lanes of spans, what is in sight of them, and numbers in words.

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

// ---- lanes and their spans ----
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
