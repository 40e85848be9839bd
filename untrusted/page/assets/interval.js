// What a daemon did between two of its snapshots. A daemon that took another's place counts from
// nothing again: what shrank counts whole.
import { OPERATIONS, WHOLE, absorb, emptyHistogram, quantile, total } from "./numbers.js";

/** The snapshot of a daemon that has just started. */
export const NOTHING = { now_ns: 0, at: 0, report: { counters: {}, each_session: [] }, volumes: [], latency: [] };

/** Rows of the heatmap: four to a power of two, from 1 µs to 17 s. */
export const HEAT_ROWS = 96;
const HEAT_FIRST = 40;

/** The row of a latency. */
export function heatRow(ns) {
  const row = Math.floor(4 * Math.log2(Math.max(ns, 1))) - HEAT_FIRST;
  return Math.min(Math.max(row, 0), HEAT_ROWS - 1);
}

/** The least latency of a row, nanoseconds. */
export function heatFloor(row) {
  return 2 ** ((row + HEAT_FIRST) / 4);
}

function keyOf(series) {
  return `${series.source} ${series.volume ?? ""} ${series.stage} ${series.operation}`;
}

/** What a series grew by, as a histogram. */
function growth(before, after) {
  const is = new Map(after.buckets);
  let was = new Map(before?.buckets ?? []);
  const shrank = [...was].some(([top, n]) => (is.get(top) ?? 0) < n);
  if (shrank) was = new Map();
  const fresh = shrank || before === undefined;
  const grown = emptyHistogram();
  for (const [top, n] of is) {
    const more = n - (was.get(top) ?? 0);
    if (more > 0) {
      grown.buckets.set(top, more);
      grown.max = Math.max(grown.max, Math.min(top, after.max_ns));
    }
  }
  grown.overflows = after.overflows - (fresh ? 0 : before.overflows);
  grown.sum = Math.max(0, after.sum_ns - (fresh ? 0 : before.sum_ns));
  if (grown.overflows > 0) grown.max = after.max_ns;
  return grown;
}

/** What happened between two snapshots. */
export function between(before, after) {
  const seconds = Math.max(1e-3, (after.now_ns - before.now_ns) / 1e9);
  const was = new Map(before.latency.map((series) => [keyOf(series), series]));
  const series = after.latency.map((s) => ({ ...s, histogram: growth(was.get(keyOf(s)), s) }));
  const interval = { seconds, at: after.at, series, volumes: [] };
  for (const volume of after.volumes) {
    const old = before.volumes.find((v) => v.volume === volume.volume);
    interval.volumes.push(volumeRow(interval, old, volume));
  }
  interval.all = sumRow(interval);
  return interval;
}

/** Requests, bytes and errors of a volume, and percentiles of the whole way. */
function volumeRow(interval, before, after) {
  const row = { volume: after.volume, name: after.name, inFlight: after.in_flight, requests: {}, bytes: {}, errors: 0, claimed: after.claimed ?? {} };
  for (const operation of OPERATIONS) {
    const is = after.operations[operation] ?? { bytes: 0, outcomes: {} };
    const was = before?.operations[operation] ?? { bytes: 0, outcomes: {} };
    const grown = (now, then) => (now < then ? now : now - then);
    row.requests[operation] = 0;
    for (const [outcome, n] of Object.entries(is.outcomes)) {
      const more = grown(n, was.outcomes[outcome] ?? 0);
      row.requests[operation] += more;
      if (outcome !== "ok" && outcome !== "short") row.errors += more;
    }
    row.bytes[operation] = grown(is.bytes, was.bytes);
  }
  row.whole = merged(interval, { volume: after.volume, stage: WHOLE });
  return withPercentiles(row);
}

function sumRow(interval) {
  const row = { volume: null, name: "all", inFlight: 0, requests: {}, bytes: {}, errors: 0, whole: emptyHistogram() };
  for (const operation of OPERATIONS) {
    row.requests[operation] = 0;
    row.bytes[operation] = 0;
  }
  for (const volume of interval.volumes) {
    row.inFlight += volume.inFlight;
    row.errors += volume.errors;
    for (const operation of OPERATIONS) {
      row.requests[operation] += volume.requests[operation];
      row.bytes[operation] += volume.bytes[operation];
    }
    absorb(row.whole, volume.whole);
  }
  return withPercentiles(row);
}

function withPercentiles(row) {
  [row.p50, row.p99, row.p999] = [500, 990, 999].map((n) => quantile(row.whole, n));
  row.count = OPERATIONS.reduce((sum, operation) => sum + row.requests[operation], 0);
  return row;
}

/** The row of a volume in an interval, or that of all. */
export function rowOf(interval, volume) {
  if (volume === null) return interval.all;
  return interval.volumes.find((row) => row.volume === volume) ?? null;
}

/** The histogram of a stage: of one volume or of all, of one operation or of all. */
export function merged(interval, { source = "daemon", volume = null, stage, operation = null }) {
  const all = emptyHistogram();
  for (const s of interval.series) {
    const wanted = s.source === source && s.stage === stage && (volume === null || s.volume === volume)
      && (operation === null || s.operation === operation);
    if (wanted) absorb(all, s.histogram);
  }
  return all;
}

/** What is kept of an interval for the pictures over time: a small row for each volume. */
export function frameOf(interval) {
  const rows = new Map();
  for (const { volume, whole, p50, p99, count, inFlight, requests, bytes } of [interval.all, ...interval.volumes]) {
    const heat = new Map();
    for (const [top, n] of whole.buckets) heat.set(heatRow(top), (heat.get(heatRow(top)) ?? 0) + n);
    const timed = total(whole);
    rows.set(volume, { heat, p50, p99, count, timed, inFlight, requests, bytes });
  }
  return { at: interval.at, seconds: interval.seconds, rows };
}

/** Snapshots that name only what changed since the one before, whole again. */
export function unfold(snapshots) {
  let known = new Map();
  return snapshots.map((snapshot) => {
    known = new Map(known);
    for (const series of snapshot.latency) {
      const before = series.fresh ? undefined : known.get(keyOf(series));
      const buckets = new Map([...(before?.buckets ?? []), ...series.buckets]);
      known.set(keyOf(series), { ...series, buckets: [...buckets] });
    }
    return { ...snapshot, latency: [...known.values()] };
  });
}
