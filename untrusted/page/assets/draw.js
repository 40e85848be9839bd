// Pictures on canvases. Colours come from the style sheet, so they follow the theme.
import { short, time } from "./numbers.js";
import { HEAT_ROWS, heatFloor, heatRow } from "./interval.js";

const GUTTER = 56;
const FOOT = 18;

/** A colour of the style sheet, resolved. */
export function colour(name) {
  const probe = document.createElement("i");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const resolved = getComputedStyle(probe).color;
  probe.remove();
  return resolved;
}

/** A cleared canvas in the screen's resolution, with what is drawn with. */
function begin(canvas) {
  const { width, height } = canvas.getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const g = canvas.getContext("2d");
  g.scale(ratio, ratio);
  g.font = "11px system-ui, sans-serif";
  g.textBaseline = "middle";
  return { g, width, height, plot: { x: GUTTER, y: 6, w: width - GUTTER - 4, h: height - FOOT - 10 } };
}

/** How many intervals a canvas shows. */
export function columns(canvas, most) {
  const room = Math.floor((canvas.getBoundingClientRect().width - GUTTER - 4) / 3);
  return Math.max(10, Math.min(most, room));
}

function empty({ g, plot }) {
  g.fillStyle = colour("muted");
  g.textAlign = "center";
  g.fillText("nothing recorded yet", plot.x + plot.w / 2, plot.y + plot.h / 2);
}

/** A label to the left of the plot, and a line across it. */
function grid({ g, plot }, y, label) {
  g.strokeStyle = colour("line");
  g.lineWidth = 1;
  g.beginPath();
  g.moveTo(plot.x, Math.round(y) + 0.5);
  g.lineTo(plot.x + plot.w, Math.round(y) + 0.5);
  g.stroke();
  g.fillStyle = colour("muted");
  g.textAlign = "right";
  g.fillText(label, plot.x - 6, y);
}

/** The ends of the time axis. */
function span({ g, plot, height }, frames, width) {
  if (frames.length === 0) return;
  const begin = plot.x + plot.w - frames.length * width;
  const seconds = frames.reduce((sum, frame) => sum + frame.seconds, 0);
  g.fillStyle = colour("muted");
  g.textAlign = "left";
  if (begin < plot.x + plot.w - 90) g.fillText(`${Math.round(seconds)} s ago`, begin, height - 7);
  g.textAlign = "right";
  g.fillText("now", plot.x + plot.w, height - 7);
}

function mix(stops, share) {
  const at = share * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2);
  const part = (i) => Math.round(stops[low][i] + (stops[low + 1][i] - stops[low][i]) * (at - low));
  return `rgb(${part(0)} ${part(1)} ${part(2)})`;
}

/** From few to many. */
function ramp() {
  return ["heat-0", "heat-1", "heat-2", "heat-3"].map((name) => colour(name).match(/[\d.]+/g).map(Number));
}

/** The heatmap of `frames` (rows of one volume), in room for `most` of them; marks one of them. */
export function heatmap(canvas, frames, most, marked) {
  const c = begin(canvas);
  const { g, plot } = c;
  const used = frames.flatMap((frame) => [...frame.row.heat.keys()]);
  if (used.length === 0) return empty(c);
  const low = Math.max(0, Math.min(...used) - 2);
  const high = Math.min(HEAT_ROWS - 1, Math.max(...used) + 2);
  const rowHeight = plot.h / (high - low + 1);
  const y = (row) => plot.y + plot.h - (row - low) * rowHeight;
  const width = plot.w / most;
  const x = (index) => plot.x + plot.w - (frames.length - index) * width;
  const peak = Math.max(...frames.flatMap((frame) => [...frame.row.heat.values()]));
  const stops = ramp();
  frames.forEach((frame, index) => {
    for (const [row, n] of frame.row.heat) {
      g.fillStyle = mix(stops, Math.log1p(n) / Math.log1p(peak));
      g.fillRect(x(index), y(row + 1), Math.max(1, width - (width > 4 ? 0.5 : 0)), rowHeight + 0.3);
    }
  });
  for (let ns = 1e3; ns < 2e10; ns *= 10) {
    const row = heatRow(ns);
    if (row >= low && row <= high) grid(c, y(row), time(ns).replace(/\.0+ /, " "));
  }
  for (const [name, dash] of [["p50", []], ["p99", [4, 3]]]) {
    for (const [style, thickness] of [[colour("panel"), 4], [colour(name), 1.75]]) {
      g.strokeStyle = style;
      g.lineWidth = thickness;
      g.setLineDash(style === colour("panel") ? [] : dash);
      g.beginPath();
      let down = false;
      frames.forEach((frame, index) => {
        if (frame.row.timed === 0) { down = false; return; }
        const at = y(4 * Math.log2(Math.max(frame.row[name], 1)) - 4 * Math.log2(heatFloor(0)));
        const middle = x(index) + width / 2;
        if (down) g.lineTo(middle, at);
        else g.moveTo(middle - 1, at);
        down = true;
      });
      g.stroke();
    }
  }
  g.setLineDash([]);
  if (marked !== null && frames[marked]) {
    g.strokeStyle = colour("accent");
    g.lineWidth = 2;
    g.strokeRect(x(marked), plot.y, Math.max(2, width), plot.h);
  }
  span(c, frames, width);
}

/** The interval under a pointer; null where there is none. */
export function heatColumn(canvas, clientX, length, most) {
  const box = canvas.getBoundingClientRect();
  const plot = box.width - GUTTER - 4;
  const index = length - Math.ceil((GUTTER + plot - (clientX - box.left)) / (plot / most));
  return index >= 0 && index < length ? index : null;
}

/** Lines over time, from 0; `series` are {value, colour, dash}. */
export function lines(canvas, frames, most, series) {
  const c = begin(canvas);
  const { g, plot } = c;
  if (frames.length === 0) return empty(c);
  const values = series.map(({ value }) => frames.map(value));
  const peak = Math.max(1e-9, ...values.flat());
  const step = 10 ** Math.floor(Math.log10(peak));
  const top = [1, 2, 5, 10].map((n) => n * step).find((n) => n >= peak) ?? peak;
  for (const share of [0, 0.5, 1]) grid(c, plot.y + plot.h * (1 - share), short(top * share));
  const width = plot.w / most;
  series.forEach(({ colour: name, dash }, at) => {
    g.strokeStyle = colour(name);
    g.lineWidth = 1.75;
    g.setLineDash(dash ?? []);
    g.beginPath();
    values[at].forEach((value, index) => {
      const x = plot.x + plot.w - (frames.length - index - 0.5) * width;
      const y = plot.y + plot.h * (1 - value / top);
      if (index === 0) g.moveTo(x - 1, y);
      g.lineTo(x, y);
    });
    g.stroke();
  });
  g.setLineDash([]);
  span(c, frames, width);
}
