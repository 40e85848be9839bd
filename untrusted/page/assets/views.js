// Tables, bars and the waterfall. Text of the daemon goes through textContent only.
import { OPERATIONS, STAGES, WHOLE, clock, count, quantile, short, size, time, total } from "./numbers.js";
import { merged, rowOf } from "./interval.js";

const PERCENTILES = [["p50", 500], ["p99", 990], ["p99.9", 999]];

/** An element with properties, data and children; strings become text. */
export function make(tag, properties = {}, ...children) {
  const { data, attributes, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  for (const [name, value] of Object.entries(attributes ?? {})) element.setAttribute(name, value);
  for (const [name, value] of Object.entries(data ?? {})) element.dataset[name] = value;
  element.append(...children);
  return element;
}

/** A number as a machine reads it, too. */
function number(value, text) {
  return make("data", { value: String(value) }, text);
}

function cell(value, text) {
  return make("td", { className: "number" }, number(value, text));
}

function swatch(stage) {
  const claimed = STAGES.find(({ name }) => name === stage)?.claimed;
  return make("i", { className: `swatch s-${stage}${claimed ? " claimed" : ""}`, ariaHidden: "true" });
}

/** The figures of the last interval. */
export function tiles(place, row, interval, report) {
  const perSecond = (n) => n / interval.seconds;
  const figures = [
    ["requests", "requests/s", short(perSecond(row.count))],
    ["read", "read MB/s", short(perSecond(row.bytes.read) / 1e6)],
    ["written", "written MB/s", short(perSecond(row.bytes.write) / 1e6)],
    ["in-flight", "under way", count(row.inFlight)],
    ["p50", "p50", row.p50 ? time(row.p50) : "–"],
    ["p99", "p99", row.p99 ? time(row.p99) : "–"],
    ["p999", "p99.9", row.p999 ? time(row.p999) : "–"],
    ["errors", "errors", count(row.errors)],
    ["sessions", "sessions", count(report.sessions)],
    ["lanes", "lanes", count(report.lanes)],
  ];
  place.replaceChildren(...figures.map(([name, title, text]) =>
    make("div", { data: { tile: name } }, make("dt", {}, title), make("dd", {}, text))));
}

/** What stage has which colour. */
export function stageLegend(place) {
  place.replaceChildren(...STAGES.map(({ name, title, claimed }) =>
    make("span", {}, swatch(name), claimed ? `${title} (claimed)` : title)));
}

/** Stacked bars of the stages' percentiles. */
export function stageBars(place, interval, source, volume) {
  const groups = PERCENTILES.map(([label, perMille]) => {
    const bars = OPERATIONS.flatMap((operation) => {
      const parts = STAGES.map(({ name }) => [name, quantile(merged(interval, { source, volume, stage: name, operation }), perMille)]);
      const whole = quantile(merged(interval, { source: "daemon", volume, stage: WHOLE, operation }), perMille);
      const sum = parts.reduce((all, [, ns]) => all + ns, 0);
      return sum > 0 ? [{ operation, parts: parts.filter(([, ns]) => ns > 0), whole, sum }] : [];
    });
    return { label, bars };
  });
  if (groups[0].bars.length === 0) {
    place.replaceChildren(make("p", { className: "empty" }, "No request ended in this time."));
    return;
  }
  place.replaceChildren(...groups.map(({ label, bars }) => {
    const longest = Math.max(...bars.map(({ sum, whole }) => Math.max(sum, whole)));
    return make("div", { className: "bars" }, make("h3", {}, label), ...bars.map(({ operation, parts, whole, sum }) => {
      const told = parts.map(([name, ns]) => `${name} ${time(ns)}`).join(", ");
      const bar = make("div", { className: "bar", role: "img", ariaLabel: `${operation} ${label}: ${told}; whole way ${time(whole)}` });
      for (const [name, ns] of parts) {
        const part = swatch(name);
        part.className += " part";
        part.style.width = `${(100 * ns) / longest}%`;
        part.title = `${name} ${time(ns)}`;
        bar.append(part);
      }
      if (whole > 0) {
        const mark = make("i", { className: "mark", title: `whole way ${time(whole)}` });
        mark.style.left = `${(100 * whole) / longest}%`;
        bar.append(mark);
      }
      return make("div", { className: "line" }, make("span", {}, operation), bar, number(sum, time(whole || sum)));
    }));
  }));
}

/** The stages' percentiles as numbers. */
export function stageTable(place, interval, source, volume) {
  const head = ["operation", "stage", "requests", "mean", "p50", "p99", "p99.9", "max"];
  const rows = [];
  for (const operation of OPERATIONS) {
    for (const stage of [...STAGES, { name: WHOLE, title: "whole way", claimed: true }]) {
      const histogram = merged(interval, { source, volume, stage: stage.name, operation });
      const requests = total(histogram);
      if (requests === 0) continue;
      const title = make("th", { scope: "row" }, swatch(stage.name), stage.title);
      if (stage.claimed) title.append(make("small", {}, " claimed"));
      const row = make("tr", { data: { operation, stage: stage.name, sumNs: histogram.sum } }, make("td", {}, operation), title, cell(requests, count(requests)));
      const times = [histogram.sum / requests, ...PERCENTILES.map(([, n]) => quantile(histogram, n)), histogram.max];
      row.append(...times.map((ns) => cell(ns, time(ns))));
      rows.push(row);
    }
  }
  place.replaceChildren(
    make("thead", {}, make("tr", {}, ...head.map((title, at) => make("th", { scope: "col", className: at > 1 ? "number" : "" }, title)))),
    make("tbody", {}, ...rows),
  );
}

const REASONS = [[8, "failed"], [2, "slow"], [4, "slowest of its second"], [1, "of the sample"]];

/** A record's way: each stage's begin and end, null where it is not known. */
function wayOf(record) {
  const { enqueued_ns, picked_ns, submitted_ns, reaped_ns, delivered_ns } = record;
  const stages = [["crossing_out", enqueued_ns, picked_ns], ["host_submit", picked_ns, submitted_ns], ["device", submitted_ns, reaped_ns], ["crossing_in", reaped_ns, delivered_ns]];
  return stages.map(([name, from, to]) => ({ name, from, to, known: from > 0 && to >= from }));
}

/** When a record began, ended, and how long that took, as far as is known. */
export function extent(record) {
  const begun = record.enqueued_ns || record.picked_ns;
  const ended = record.delivered_ns || record.reaped_ns;
  return { begun, ended, took: Math.max(0, ended - begun) };
}

function operationOf(record) {
  return OPERATIONS[record.operation - 1] ?? "?";
}

/** The waterfall of the slowest requests; `choose` is told which is wanted. */
export function slowest(place, records, nameOf, chosen, choose) {
  const longest = Math.max(1, ...records.map((record) => extent(record).took));
  const known = new Map([...place.children].map((item) => [item.dataset.number, item]));
  const items = records.map((record) => {
    const { begun, took } = extent(record);
    let item = known.get(String(record.number));
    if (!item) {
      const bar = make("span", { className: "bar" });
      const button = make("button", { type: "button" },
        make("span", { className: "what" }, record.length > 0 ? `${operationOf(record)} ${size(record.length)}` : operationOf(record)),
        make("span", { className: "whose" }, nameOf(record.volume)), bar,
        make("span", { className: "number" }, time(took)));
      button.addEventListener("click", () => choose(record.number));
      item = make("li", { data: { number: record.number } }, button);
      for (const { name, from, to, known } of wayOf(record)) {
        if (!known) continue;
        const part = swatch(name);
        part.className += " part";
        part.dataset.ns = to - from;
        bar.append(part);
      }
    }
    for (const part of item.querySelectorAll(".part")) part.style.width = `${(100 * part.dataset.ns) / longest}%`;
    const button = item.firstElementChild;
    button.setAttribute("aria-expanded", String(record.number === chosen));
    button.setAttribute("aria-controls", "way");
    return item;
  });
  // Those that stay are not moved: whoever stands on one goes on standing there.
  const same = items.length === place.children.length && items.every((item, at) => place.children[at] === item);
  if (same) return;
  const focused = place.contains(document.activeElement) ? document.activeElement : null;
  place.replaceChildren(...items);
  if (focused?.isConnected) focused.focus({ preventScroll: true });
}

/** One request's whole way. */
export function way(place, record, nameOf) {
  place.hidden = !record;
  if (!record) return;
  const { begun, took } = extent(record);
  const reasons = REASONS.filter(([bit]) => Math.floor(record.why / bit) % 2 === 1).map(([, name]) => name).join(", ");
  const facts = [
    ["request", record.request], ["volume", nameOf(record.volume)], ["operation", operationOf(record)],
    ["offset in the host file", count(record.offset)], ["length", size(record.length)],
    ["result", record.result < 0 ? `errno ${-record.result}` : size(record.result)],
    ["session", String(record.session)], ["whole way", time(took)], ["kept because", reasons],
  ];
  const steps = wayOf(record).map(({ name, from, to, known }) => {
    const bar = make("span", { className: "bar" });
    const stage = STAGES.find((stage) => stage.name === name);
    if (known) {
      const part = swatch(name);
      part.className += " part";
      part.style.marginLeft = `${(100 * (from - begun)) / Math.max(took, 1)}%`;
      part.style.width = `${(100 * (to - from)) / Math.max(took, 1)}%`;
      bar.append(part);
    }
    return make("li", { data: { stage: name, ns: known ? to - from : "" } },
      make("span", { className: "what" }, stage.title, stage.claimed ? make("small", {}, " claimed") : ""),
      make("span", { className: "number" }, known ? `+${time(from - begun)}` : "–"), bar,
      make("span", { className: "number" }, known ? time(to - from) : "unknown"));
  });
  const list = make("dl", { className: "facts" }, ...facts.map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, text))));
  place.replaceChildren(make("h3", {}, `Request ${record.request}`), list, make("ol", { className: "steps" }, ...steps));
}

const VOLUME_COLUMNS = [
  ["name", "volume", (row) => row.name, (value) => value],
  ["read", "reads/s", (row, s) => row.requests.read / s, short],
  ["write", "writes/s", (row, s) => row.requests.write / s, short],
  ["flush", "flushes/s", (row, s) => row.requests.flush / s, short],
  ["in", "read MB/s", (row, s) => row.bytes.read / s / 1e6, short],
  ["out", "written MB/s", (row, s) => row.bytes.write / s / 1e6, short],
  ["depth", "under way", (row) => row.inFlight, count],
  ["p50", "p50", (row) => row.p50, (ns) => (ns ? time(ns) : "–")],
  ["p99", "p99", (row) => row.p99, (ns) => (ns ? time(ns) : "–")],
  ["errors", "errors", (row) => row.errors, count],
  ["requests", "requests so far", (row, s, ever) => ever?.count ?? 0, count],
  ["moved", "bytes so far", (row, s, ever) => (ever ? ever.bytes.read + ever.bytes.write : 0), size],
  ["checkpoints", "checkpoints (claimed)", (row) => row.claimed.checkpoints ?? 0, count],
  ["journal", "journal blocks (claimed)", (row) => row.claimed.journal_blocks ?? 0, count],
  ["used", "used (claimed)", (row) => (row.claimed.used_blocks ?? 0) * 4096, size],
  ["free", "free (claimed)", (row) => (row.claimed.free_blocks ?? 0) * 4096, size],
  ["damaged", "damage found (claimed)", (row) => row.claimed.integrity_failures ?? 0, count],
];

/** A table whose columns sort; `sort` is {column, down}, `resort` is told of another wish. */
export function volumeTable(place, interval, ever, sort, resort) {
  const columns = VOLUME_COLUMNS.map(([key, title, value, text]) => ({ key, title, value, text }));
  if (!place.tHead) {
    place.append(make("thead", {}, make("tr", {}, ...columns.map(({ key, title }) => {
      const button = make("button", { type: "button" }, title);
      button.addEventListener("click", () => resort(key));
      return make("th", { scope: "col", className: key === "name" ? "" : "number", data: { key } }, button);
    }))), make("tbody"));
  }
  for (const head of place.tHead.rows[0].cells) {
    head.setAttribute("aria-sort", head.dataset.key === sort.column ? (sort.down ? "descending" : "ascending") : "none");
  }
  const by = columns.find(({ key }) => key === sort.column);
  const rows = interval.volumes.map((row) => ({ row, whole: rowOf(ever, row.volume) }));
  const valueOf = ({ row, whole }, column) => column.value(row, interval.seconds, whole);
  rows.sort((a, b) => {
    const [x, y] = [valueOf(a, by), valueOf(b, by)];
    const order = typeof x === "string" ? x.localeCompare(y) : x - y;
    return sort.down ? -order : order;
  });
  place.tBodies[0].replaceChildren(...rows.map((row) => make("tr", { data: { volume: row.row.volume } }, ...columns.map((column) => {
    const value = valueOf(row, column);
    if (column.key === "name") return make("th", { scope: "row" }, value);
    const made = cell(value, column.text(value));
    made.dataset.key = column.key;
    return made;
  }))));
}

/** What each session has. */
export function sessionTable(place, report) {
  const columns = [["session", (s) => s.session], ["process", (s) => s.process], ["lanes", (s) => s.lanes], ["files", (s) => s.files],
    ["ports MiB", (s) => Math.round(s.memory_bytes / 2 ** 20)], ["under way", (s) => s.in_flight], ["requests", (s) => s.requests],
    ["held: depth", (s) => s.held_depth], ["held: rate", (s) => s.held_rate], ["refused", (s) => s.refused]];
  const rows = report.each_session.map((session) => make("tr", {}, ...columns.map(([, value], at) => cell(value(session), at < 2 ? String(value(session)) : count(value(session))))));
  if (rows.length === 0) rows.push(make("tr", {}, make("td", { colSpan: columns.length }, "no session")));
  place.replaceChildren(make("thead", {}, make("tr", {}, ...columns.map(([title]) => make("th", { scope: "col", className: "number" }, title)))), make("tbody", {}, ...rows));
}

/** Counters that tell of trouble, by what each means; the page's own count is among them. */
const TROUBLE = [
  ["errors", "requests that failed"], ["broken_rings", "lanes ended by a broken ring"],
  ["refused_descriptors", "descriptors refused"], ["refused_connections", "connections refused"],
  ["leases_taken", "leases taken from a silent holder"], ["unmatched_completions", "completions of no request"],
  ["claims_missing", "claimed times missing"], ["claims_negative", "claimed times that contradict the clock"],
  ["claims_undelivered", "deliveries never claimed"], ["stage_overflows", "times beyond the histogram"],
  ["records_lost", "records overwritten before this page read them"], ["left_out", "series left out for want of room"],
];
/** What the probes count that is no loss. */
const NO_LOSS = ["probe_requests_seen", "probe_completed_in_submit", "probe_device_end_unknown", "probe_not_accepted", "probe_untagged"];

/** Whether anything was lost or went wrong. */
export function health(place, report, own) {
  const counters = { ...report.counters, ...own };
  const rows = TROUBLE.map(([name, title]) => [name, title, counters[name] ?? 0]);
  const probes = Object.keys(counters).filter((name) => name.startsWith("probe_") && !NO_LOSS.includes(name));
  const dropped = probes.filter((name) => counters[name] > 0);
  if (probes.length > 0 && dropped.length === 0) rows.push(["probes", "dropped by the probes", 0]);
  for (const name of dropped) rows.push([name, `probes: ${name.slice(6).replaceAll("_", " ")}`, counters[name]]);
  place.replaceChildren(...rows.map(([name, title, n]) => make("li", { className: n > 0 ? "trouble" : "", data: { counter: name } },
    make("span", { className: "sign", ariaHidden: "true" }, n > 0 ? "▲" : "·"), number(n, count(n)), ` ${title}`)));
}

/** A frame in words. */
export function told(frame, row) {
  if (!row || row.count === 0) return `${clock(frame.at)}: no request`;
  return `${clock(frame.at)}: ${count(row.count)} requests in ${short(frame.seconds)} s, p50 ${time(row.p50)}, p99 ${time(row.p99)}, ${count(row.inFlight)} under way`;
}
