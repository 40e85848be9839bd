// The page: asks its daemon each second, or shows what a report carries.
import { clock, count, short } from "./numbers.js";
import { NOTHING, between, frameOf, rowOf, unfold } from "./interval.js";
import { columns, heatColumn, heatmap, lines } from "./draw.js";
import { extent, health, make, sessionTable, slowest, stageBars, stageLegend, stageTable, tiles, told, volumeTable, way } from "./views.js";

const EVERY_MS = 1000;
const PATIENCE_MS = 5000;
/** Intervals in the pictures over time, and whole snapshots for other windows. */
const MOST_FRAMES = 300;
const MOST_SNAPSHOTS = 62;
/** Requests in the waterfall, and how far back they are looked for. */
const MOST_SLOW = 12;
const SLOW_NS = 60e9;
/** Records that are looked at again: one may be numbered before it is written. */
const LATE = 512;
const MOST_RECORDS = 8192;

const $ = (id) => document.getElementById(id);
const state = {
  snapshots: [], frames: [], records: new Map(), last: 0, counted: 0, lost: 0, token: null,
  volume: null, marked: null, chosen: null, paused: false, sort: { column: "requests", down: true }, report: null,
};

/** The snapshot that is about `seconds` older than the last; 0: none at all. */
function earlier(seconds) {
  const { snapshots } = state;
  if (seconds === 0 || snapshots.length < 2) return NOTHING;
  if (state.report) return snapshots[0];
  const since = snapshots.at(-1).now_ns - seconds * 1e9 - 0.3e9;
  return snapshots.slice(0, -1).find((snapshot) => snapshot.now_ns >= since) ?? snapshots.at(-2);
}

/** Takes a snapshot in: the pictures over time grow by one column. */
function take(snapshot) {
  const before = state.snapshots.at(-1);
  state.snapshots.push(snapshot);
  if (before) state.frames.push(frameOf(between(before, snapshot)));
  if (state.report) return;
  if (state.snapshots.length > MOST_SNAPSHOTS) state.snapshots.shift();
  if (state.frames.length > MOST_FRAMES) {
    state.frames.shift();
    if (state.marked !== null) state.marked = Math.max(0, state.marked - 1);
  }
}

/** Takes records in; `last` is the number of the newest. */
function takeRecords(records, last) {
  if (last < state.last) {
    // Another daemon counts from the beginning.
    state.records.clear();
    state.last = 0;
    state.counted = last;
  }
  for (const record of records) state.records.set(record.number, record);
  state.last = Math.max(state.last, last);
  const surplus = state.records.size - MOST_RECORDS;
  if (surplus > 0) for (const number of [...state.records.keys()].sort((a, b) => a - b).slice(0, surplus)) state.records.delete(number);
}

function names() {
  return new Map((state.snapshots.at(-1)?.volumes ?? []).map(({ volume, name }) => [volume, name]));
}

function nameOf(volume) {
  return names().get(volume) ?? "?";
}

/** The last two snapshots, or a report's first and last. */
function latest() {
  const { snapshots } = state;
  return between(snapshots.length > 1 ? snapshots.at(state.report ? 0 : -2) : NOTHING, snapshots.at(-1));
}

/** Frames of the chosen volume, as many as there is room for. */
function shown(canvas) {
  const most = columns(canvas, Math.max(state.frames.length, state.report ? 10 : 60));
  const frames = state.frames.slice(-most).map((frame) => ({ ...frame, row: frame.rows.get(state.volume) }));
  const none = { heat: new Map(), p50: 0, p99: 0, count: 0, timed: 0, inFlight: 0, requests: {}, bytes: {} };
  return { most, frames: frames.map((frame) => ({ ...frame, row: frame.row ?? none })) };
}

function showPictures() {
  const { most, frames } = shown($("heat"));
  const offset = state.frames.length - frames.length;
  heatmap($("heat"), frames, most, state.marked === null ? null : state.marked - offset);
  const peak = Math.max(0, ...frames.flatMap(({ row }) => [...row.heat.values()]));
  $("scale").setAttribute("aria-label", `from 1 to ${count(peak)} requests`);
  $("scale").replaceChildren("1", make("i", { className: "ramp" }), count(Math.max(peak, 1)));
  const last = frames.at(-1);
  $("heat").setAttribute("aria-label", last ? `Heatmap of ${frames.length} intervals. Last: ${told(last, last.row)}` : "Heatmap: nothing recorded yet");
  if (state.marked !== null && frames[state.marked - offset]) {
    const frame = frames[state.marked - offset];
    const text = told(frame, frame.row);
    if ($("readout").textContent !== text) $("readout").textContent = text;
  }
  const perSecond = (of) => (frame) => of(frame.row) / frame.seconds;
  const charts = [
    ["requests", [["read", "line-1", perSecond((row) => row.requests.read ?? 0)], ["write", "line-2", perSecond((row) => row.requests.write ?? 0), [5, 3]],
      ["flush", "line-3", perSecond((row) => row.requests.flush ?? 0), [2, 2]]]],
    ["bytes", [["read", "line-1", perSecond((row) => (row.bytes.read ?? 0) / 1e6)], ["written", "line-2", perSecond((row) => (row.bytes.write ?? 0) / 1e6), [5, 3]]]],
    ["depth", [["under way", "line-1", (frame) => frame.row.inFlight]]],
  ];
  for (const [id, series] of charts) {
    const { most, frames } = shown($(id));
    lines($(id), frames, most, series.map(([, colour, value, dash]) => ({ colour, value, dash })));
    const texts = series.map(([title, , value]) => `${title} ${frames.length ? short(value(frames.at(-1))) : "–"}`);
    $(id).setAttribute("aria-label", `Over time; last: ${texts.join(", ")}`);
    $(`${id}-legend`).replaceChildren(...texts.map((text, at) => make("span", { className: `key k-line-${at + 1}` }, text)));
  }
}

/** Offers what the daemon can choose from; keeps the choice. */
function offer(select, options) {
  const same = options.length === select.options.length && options.every(([value, text], at) => select.options[at].value === value && select.options[at].text === text);
  if (same) return;
  const chosen = select.value;
  select.replaceChildren(...options.map(([value, text]) => make("option", { value, textContent: text })));
  if (options.some(([value]) => value === chosen)) select.value = chosen;
}

function showStages() {
  const { report } = state.snapshots.at(-1);
  const probes = report.source === "ebpf";
  offer($("clock"), [...(probes ? [["ebpf", "eBPF probes"]] : []), ["daemon", "the daemon's clock"]]);
  const source = probes ? $("clock").value || "ebpf" : "daemon";
  $("clock").disabled = !probes;
  $("stages-source").textContent = source === "ebpf" ? "by eBPF probes in the kernel" : "by the daemon's own clock";
  const interval = between(earlier(Number($("window").value)), state.snapshots.at(-1));
  stageBars($("bars"), interval, source, state.volume);
  stageTable($("stages"), interval, source, state.volume);
}

function showRequests() {
  const now = state.snapshots.at(-1).now_ns;
  const wanted = (record) => (state.volume === null || record.volume === state.volume) && (state.report || extent(record).ended > now - SLOW_NS || record.number === state.chosen);
  const records = [...state.records.values()].filter(wanted).sort((a, b) => extent(b).took - extent(a).took).slice(0, MOST_SLOW);
  const chosen = state.records.get(state.chosen);
  if (chosen && !records.includes(chosen)) records.push(chosen);
  if (records.length === 0) $("slow").replaceChildren(make("li", { className: "empty" }, "Nothing recorded yet."));
  else slowest($("slow"), records, nameOf, state.chosen, choose);
  $("slow-about").textContent = `of those recorded ${state.report ? "meanwhile" : "in the last minute"}: the slowest of each second and lane, failures, a sample`;
  if (chosen ? $("way").dataset.number !== String(chosen.number) : !$("way").hidden) {
    $("way").dataset.number = chosen?.number ?? "";
    way($("way"), chosen, nameOf);
  }
}

function choose(number) {
  state.chosen = state.chosen === number ? null : number;
  showRequests();
}

/** Shows all that there is. */
function show() {
  if (state.snapshots.length === 0) return;
  const snapshot = state.snapshots.at(-1);
  const { report } = snapshot;
  const interval = latest();
  const ever = between(NOTHING, snapshot);
  offer($("volume"), [["", "all"], ...snapshot.volumes.map(({ volume, name }) => [String(volume), name])]);
  const row = rowOf(interval, state.volume) ?? interval.all;
  tiles($("tiles"), row, interval, report);
  showPictures();
  showStages();
  showRequests();
  volumeTable($("volumes"), interval, ever, state.sort, (column) => {
    state.sort = { column, down: state.sort.column === column ? !state.sort.down : column !== "name" };
    show();
  });
  sessionTable($("sessions"), report);
  health($("health"), report, { records_lost: state.lost + (report.counters.records_lost ?? 0), left_out: snapshot.left_out });
  const source = report.source === "ebpf" ? "Stages are timed by eBPF probes in the kernel, and beside that by the daemon's own clock." : "No probes: stages are timed by the daemon's own clock.";
  $("source").textContent = report.source_note ? `${source} ${report.source_note}` : source;
  $("about").textContent = `posternd ${snapshot.version}`;
  document.documentElement.dataset.requests = String(ever.all.count);
  if (!state.report) document.title = `${short(interval.all.count / interval.seconds)} requests/s · Postern`;
}

/** Says how it stands; repeats nothing to those who listen. */
function say(name, text) {
  document.documentElement.dataset.state = name;
  if ($("status").textContent !== text) $("status").textContent = text;
}

async function ask(path) {
  const headers = state.token ? { Authorization: `Bearer ${state.token}` } : {};
  const answer = await fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
  if (!answer.ok) throw Object.assign(new Error(`${answer.status} ${answer.statusText}`), { status: answer.status });
  return answer.json();
}

/** Reads the records that are new. */
async function askRecords() {
  let first = Math.max(1, state.last - LATE);
  const before = state.last;
  for (let pages = 0; pages < 64; pages += 1) {
    const page = await ask(`api/records?first=${first}`);
    takeRecords(page.items, page.last_record);
    if (page.next <= first) break;
    first = page.next;
  }
  // What was there before the page is no loss. What was numbered the last time and has not come
  // since was overwritten.
  if (before === 0) state.counted = state.last;
  while (state.counted < Math.min(before, state.last)) {
    state.counted += 1;
    if (!state.records.has(state.counted)) state.lost += 1;
  }
}

async function poll() {
  try {
    const snapshot = await ask("api/snapshot");
    if (!state.paused) await askRecords();
    $("token-form").hidden = true;
    if (state.paused) {
      say("paused", "Paused");
    } else {
      take({ ...snapshot, at: Date.now() });
      show();
      const quiet = document.documentElement.dataset.requests === "0";
      say(quiet ? "empty" : "live", quiet ? "Live. Nothing recorded yet: no program has used a volume." : "Live");
    }
  } catch (error) {
    if (error.status === 401) {
      $("token-form").hidden = false;
      say("token", state.token ? "That is not the token." : "The token is wanted.");
      return;
    }
    const since = state.snapshots.at(-1)?.at;
    say("gone", `The daemon does not answer${since ? ` since ${clock(since)}` : ""}; it is asked again.`);
  }
  setTimeout(poll, EVERY_MS);
}

function listen() {
  $("volume").addEventListener("change", () => { state.volume = $("volume").value === "" ? null : Number($("volume").value); show(); });
  $("window").addEventListener("change", show);
  $("clock").addEventListener("change", show);
  $("theme").addEventListener("change", () => {
    if ($("theme").value) document.documentElement.dataset.theme = $("theme").value;
    else delete document.documentElement.dataset.theme;
    show();
  });
  $("pause").addEventListener("click", () => {
    state.paused = !state.paused;
    $("pause").setAttribute("aria-pressed", String(state.paused));
    if (state.paused) say("paused", "Paused");
  });
  $("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    state.token = $("token").value.trim();
    sessionStorage.setItem("postern-token", state.token);
    $("token").value = "";
    poll();
  });
  const mark = (index) => {
    state.marked = index;
    showPictures();
  };
  $("heat").addEventListener("pointermove", (event) => {
    const { most, frames } = shown($("heat"));
    const at = heatColumn($("heat"), event.clientX, frames.length, most);
    if (at !== null) mark(at + state.frames.length - frames.length);
  });
  $("heat").addEventListener("pointerleave", () => mark(null));
  $("heat").addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    const last = state.frames.length - 1;
    if (event.key === "Escape") mark(null);
    if (!(event.key in steps) || last < 0) return;
    event.preventDefault();
    const first = last + 1 - shown($("heat")).frames.length;
    mark(Math.min(last, Math.max(first, (state.marked ?? last) + steps[event.key])));
  });
  window.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && state.chosen !== null) choose(state.chosen);
  });
  new ResizeObserver(show).observe($("main"));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
}

/** Shows what a report carries. */
function showReport(report) {
  state.report = report;
  $("pause").hidden = true;
  offer($("window"), [["1", "the whole report"], ["0", "since the daemon started"]]);
  unfold(report.snapshots).forEach(take);
  takeRecords(report.records, 0);
  const first = state.snapshots[0];
  const seconds = (state.snapshots.at(-1).now_ns - first.now_ns) / 1e9;
  say("report", `Report of ${short(seconds)} s from ${new Date(first.at).toLocaleString()}`);
  document.title = "Postern report";
  show();
}

function start() {
  stageLegend($("stage-legend"));
  listen();
  const carried = $("data");
  if (carried) return showReport(JSON.parse(carried.textContent));
  state.token = sessionStorage.getItem("postern-token");
  poll();
}

start();
