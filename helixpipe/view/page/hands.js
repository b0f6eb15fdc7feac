// Moving about by wheel, drag, keys and buttons; and the start.

function show(from, to) {
  const size = Math.min(whole, Math.max(nearest, to - from));
  if (to - from < nearest) from = (from + to - size) / 2;
  view.from = Math.min(whole - size, Math.max(0, from));
  view.to = view.from + size;
  tell(null);
  redraw();
}

function zoom(factor, at = (view.from + view.to) / 2) {
  show(at - (at - view.from) * factor, at + (view.to - at) * factor);
}
const pan = (share) => show(view.from + share * (view.to - view.from), view.to + share * (view.to - view.from));
const all = () => show(0, whole);
const timeAt = (event) => view.from + (event.clientX - axis.lastElementChild.getBoundingClientRect().left) / scale();

// ---- the pointer ----
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
  "-": () => zoom(1 / 0.7), 0: all, n: () => step(1), p: () => step(-1), Escape: leave,
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
  if (event.target.closest && event.target.closest(".scroll")) return; // the table scrolls by the same keys
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
window.addEventListener("beforeprint", () => lanes.forEach(drawLane));
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  readStyle();
  redraw();
});
readStyle();
measureMemory();
draw();
window.helixpipe = { view, get hovered() { return hovered && hovered.label; } }; // for tests and the curious
