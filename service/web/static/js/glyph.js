// A block in two sizes: a glyph in the network's flow, and a figure with the operators' names.
import { svg } from "./dom.js";
import { placed } from "./drawing.js";

const WIDE = 64;
const HIGH = 48;

/**
 * A small picture: lanes that meet, and the one operator that they fold into; style sheets show either.
 * @param {any} block A block of the report.
 * @returns {SVGElement}
 */
export function glyph(block) {
  const drawing = placed(block.operations ?? []);
  const spread = Math.min(9, 36 / Math.max(1, drawing.lanes - 1));
  const x = (/** @type {number} */ column) => 8 + (column * (WIDE - 16)) / (drawing.columns + 1);
  const y = (/** @type {number} */ lane) => HIGH / 2 + (lane - (drawing.lanes - 1) / 2) * spread;
  const end = last(drawing);
  const size =
    drawing.nodes.length === 1
      ? 11
      : Math.min(5.5, spread * 0.62, (WIDE - 16) / (drawing.columns + 1) - 1.5);
  return svg(
    "svg",
    {
      viewBox: `0 0 ${WIDE} ${HIGH}`,
      width: WIDE,
      height: HIGH,
      "aria-hidden": "true",
      class: "glyph",
    },
    svg("path", { class: "through", d: `M0 ${HIGH / 2}H${WIDE}` }),
    svg(
      "g",
      { class: "branches" },
      ...drawing.nodes.flatMap((node) =>
        node.reads.map((read) =>
          svg("path", { d: edge(drawing, read, node, x, y) }),
        ),
      ),
      svg("path", { d: wire(0, HIGH / 2, x(0), y(drawing.entry)) }),
      end && svg("path", { d: wire(x(end.column), y(end.lane), WIDE, HIGH / 2) }),
      ...drawing.nodes.map((node) => mark(node, x(node.column), y(node.lane), size)),
    ),
    svg("rect", {
      class: "whole",
      x: WIDE / 2 - 13,
      y: HIGH / 2 - 9,
      width: 26,
      height: 18,
      rx: 4,
    }),
  );
}

/** @param {import("./drawing.js").Placed} node @param {number} x @param {number} y @param {number} size */
function mark(node, x, y, size) {
  if (node.kind === "pass") return null;
  if (node.kind === "join")
    return svg("circle", { class: "join", cx: x, cy: y, r: Math.min(2.6, size / 2) });
  const half = size / 2;
  return svg("rect", {
    class: node.kind,
    x: x - half,
    y: y - half,
    width: size,
    height: size,
    rx: node.kind === "conv" ? 1.2 : half,
  });
}

const STEP = 66;
const LANE = 40;
const BOX = 52;

/**
 * The block before and after, with names.
 * @param {any} block A block of the report.
 * @param {string} after What the folded operator is called.
 * @returns {SVGElement}
 */
export function figure(block, after) {
  const drawing = placed(block.operations ?? []);
  const high = Math.max(1, drawing.lanes) * LANE + 16;
  const folds = block.status === "fused" && drawing.nodes.length > 1;
  const x = (/** @type {number} */ column) => 14 + column * STEP - (column > 0 ? 10 : 0);
  const wide = x(drawing.columns) + (folds ? 162 : 40);
  const y = (/** @type {number} */ lane) => high / 2 + (lane - (drawing.lanes - 1) / 2) * LANE;
  const end = last(drawing);
  return svg(
    "svg",
    {
      viewBox: `0 0 ${wide} ${high}`,
      width: wide,
      height: high,
      role: "img",
      "aria-label": inShort(drawing, folds ? after : null),
      class: `figure ${block.status}`,
    },
    svg("circle", { class: "port", cx: 10, cy: y(drawing.entry), r: 4 }),
    ...drawing.nodes.flatMap((node) =>
      node.reads.map((read) =>
        svg("path", { d: edge(drawing, read, node, x, y) }),
      ),
    ),
    ...drawing.nodes.map((node) => box(node, x(node.column), y(node.lane))),
    end &&
      folds &&
      svg("path", { class: "becomes", d: `M${x(end.column) + 30} ${high / 2}h26m-6 -5l6 5l-6 5` }),
    folds &&
      svg(
        "g",
        { class: "result" },
        svg("rect", { x: wide - 88, y: high / 2 - 18, width: 84, height: 36, rx: 7 }),
        label(wide - 46, high / 2, after),
      ),
  );
}

/** @param {import("./drawing.js").Placed} node @param {number} x @param {number} y */
function box(node, x, y) {
  const title = svg(
    "title",
    {},
    node.module === "" ? node.label : `${node.label} (${node.module})`,
  );
  if (node.kind === "join" && node.label.length === 1) {
    return svg(
      "g",
      { class: "op join" },
      title,
      svg("circle", { cx: x, cy: y, r: 11 }),
      label(x, y, node.label),
    );
  }
  const wide = node.kind === "pass" ? 56 : Math.max(BOX, node.label.length * 7 + 10);
  return svg(
    "g",
    { class: `op ${node.kind}` },
    title,
    svg("rect", { x: x - wide / 2, y: y - 13, width: wide, height: 26, rx: 5 }),
    label(x, y, node.label),
  );
}

/** @param {number} x @param {number} y @param {string} text */
function label(x, y, text) {
  return svg(
    "text",
    { x, y, dy: ".35em", "text-anchor": "middle" },
    text.length > 11 ? `${text.slice(0, 10)}…` : text,
  );
}

/**
 * The edge from what a node reads, level in the lane of the branch so that it crosses no other step: it changes lane
 * between the last two columns before a join, and between the first two of any other.
 * @param {import("./drawing.js").Drawing} drawing
 * @param {number} read
 * @param {import("./drawing.js").Placed} node
 * @param {(column: number) => number} x
 * @param {(lane: number) => number} y
 */
function edge(drawing, read, node, x, y) {
  const source = read < 0 ? { column: 0, lane: drawing.entry } : drawing.nodes[read];
  const change = node.reads.length > 1 ? node.column - 1 : source.column;
  const [from, to] = [y(source.lane), y(node.lane)];
  const level = wire(x(source.column), from, x(change), from);
  const changed = wire(x(change), from, x(change + 1), to);
  return `${level}${changed}H${x(node.column)}`;
}

/** A line that leaves and arrives level. @param {number} x1 @param {number} y1 @param {number} x2 @param {number} y2 */
function wire(x1, y1, x2, y2) {
  if (Math.abs(y1 - y2) < 0.1) return `M${x1} ${y1}H${x2}`;
  const middle = (x1 + x2) / 2;
  return `M${x1} ${y1}C${middle} ${y1} ${middle} ${y2} ${x2} ${y2}`;
}

/** @param {import("./drawing.js").Drawing} drawing */
function last(drawing) {
  return drawing.nodes[drawing.nodes.length - 1];
}

/** @param {import("./drawing.js").Drawing} drawing @param {string | null} after */
function inShort(drawing, after) {
  const operators = drawing.nodes
    .filter((node) => node.kind !== "pass")
    .map((node) => ({ "+": "add", "−": "subtract", "×": "scale" })[node.label] ?? node.label);
  return `${operators.join(", ")}${after === null ? "" : `; folded into ${after}`}`;
}
