// Histograms and how numbers are written. A histogram is {buckets: Map(largest ns -> count), overflows, sum, max}.

export const OPERATIONS = ["read", "write", "flush", "discard"];
export const WHOLE = "end_to_end";
/** Stages in the order of a request's way; `claimed`: one of its ends is told by the enclave. */
export const STAGES = [
  { name: "crossing_out", title: "crossing out", claimed: true },
  { name: "host_submit", title: "submit", claimed: false },
  { name: "device", title: "device", claimed: false },
  { name: "reap", title: "reap", claimed: false },
  { name: "crossing_in", title: "crossing in", claimed: true },
];

export function emptyHistogram() {
  return { buckets: new Map(), overflows: 0, sum: 0, max: 0 };
}

/** Adds `from` to `into`. */
export function absorb(into, from) {
  for (const [top, count] of from.buckets) {
    into.buckets.set(top, (into.buckets.get(top) ?? 0) + count);
  }
  into.overflows += from.overflows;
  into.sum += from.sum;
  into.max = Math.max(into.max, from.max);
}

/** Number of values. */
export function total(histogram) {
  let all = histogram.overflows;
  for (const count of histogram.buckets.values()) all += count;
  return all;
}

/** The smallest bucket top that `perMille` of a thousand values do not exceed; 0 without values. */
export function quantile(histogram, perMille) {
  const all = total(histogram);
  if (all === 0) return 0;
  const wanted = Math.max(1, Math.ceil((all * perMille) / 1000));
  let seen = 0;
  for (const [top, count] of [...histogram.buckets].sort((a, b) => a[0] - b[0])) {
    seen += count;
    if (seen >= wanted) return Math.min(top, histogram.max);
  }
  return histogram.max;
}

const grouped = new Intl.NumberFormat("en", { useGrouping: true });

/** A count, in groups of three digits with narrow spaces. */
export function count(n) {
  return grouped.format(n).replaceAll(",", "\u202f");
}

/** A number with three digits that matter. */
export function short(n) {
  if (n >= 100) return count(Math.round(n));
  return Number.isInteger(n) ? count(n) : n.toFixed(n >= 10 ? 1 : 2);
}

/** Nanoseconds as a person reads them; three digits that matter. */
export function time(ns) {
  if (ns < 1000) return `${Math.round(ns)} ns`;
  for (const [unit, size] of [["µs", 1e3], ["ms", 1e6]]) {
    if (ns < size * 999.5) return `${(ns / size).toPrecision(3)} ${unit}`;
  }
  return `${short(ns / 1e9)} s`;
}

/** Bytes as a person reads them, powers of 1024. */
export function size(bytes) {
  for (const [unit, size] of [["B", 1], ["KiB", 2 ** 10], ["MiB", 2 ** 20], ["GiB", 2 ** 30]]) {
    if (bytes < size * 1024) return `${bytes % size === 0 ? bytes / size : (bytes / size).toFixed(1)} ${unit}`;
  }
  return `${(bytes / 2 ** 40).toFixed(1)} TiB`;
}

/** A time of day, from milliseconds since 1970. */
export function clock(ms) {
  const two = (n) => String(n).padStart(2, "0");
  const at = new Date(ms);
  return `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
}
