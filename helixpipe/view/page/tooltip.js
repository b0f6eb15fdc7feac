// What the tooltip tells of an action, of standing idle, and of live bytes.

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
  const [, kept, transit, workspace = 0] = point;
  const rows = [["rank", lane.rank], ["kept", bytes(kept)], ["workspace", bytes(workspace)], ["in transit", bytes(transit)]];
  if (lane.standing) rows.push(["standing", bytes(lane.standing)], ["all", bytes(kept + transit + workspace + lane.standing)]);
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
