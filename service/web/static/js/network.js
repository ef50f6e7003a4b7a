// The network as a picture: every block's branches, folding into one; details of the block in hand.
import { badge, fact, fill, h } from "./dom.js";
import { count, error, plural, shape } from "./format.js";
import { figure, glyph } from "./glyph.js";

const MANY = 48;

/**
 * @param {Element} place
 * @param {any} report The fusion report.
 */
export function showNetwork(place, report) {
  if (report.blocks.length === 0) {
    fill(
      place,
      h("p", { class: "card empty" }, "The network has no linear region that could be folded."),
    );
    return;
  }
  const warnings = new Map(
    (report.quantisation ?? [])
      .filter((/** @type {any} */ row) => row.warning)
      .map((/** @type {any} */ row) => [row.module, row.warning]),
  );
  const panel = h("aside", { class: "card block-panel", "aria-label": "The block in hand" });
  const map = h("div", { class: "map", "data-form": "train" });
  const show = (/** @type {any} */ block, /** @type {HTMLElement} */ button) => {
    map
      .querySelectorAll(".block[aria-pressed=true]")
      .forEach((/** @type {Element} */ other) => other.setAttribute("aria-pressed", "false"));
    button.setAttribute("aria-pressed", "true");
    fill(panel, ...details(block, warnings.get(block.module)));
  };
  fill(
    map,
    ...groups(report.blocks).map(({ name, blocks }, at) =>
      group(name, blocks, report.blocks.length <= MANY || at === 0, show),
    ),
  );
  fill(
    place,
    h("div", { class: "network-tools row" }, forms(map), legend(report.totals)),
    h("div", { class: "network" }, map, panel),
    merges(report.merges ?? []),
  );
  const first =
    report.blocks.find((/** @type {any} */ block) => block.status === "fused") ?? report.blocks[0];
  show(first, map.querySelectorAll(".block")[report.blocks.indexOf(first)]);
}

/** Training form or deploy form. @param {HTMLElement} map */
function forms(map) {
  const choice = (/** @type {string} */ form, /** @type {string} */ name) =>
    h(
      "label",
      {},
      h("input", {
        type: "radio",
        name: "form",
        value: form,
        checked: form === "train",
        onchange: () => (map.dataset.form = form),
      }),
      h("span", {}, name),
    );
  return h(
    "fieldset",
    { class: "segments" },
    h("legend", { class: "unseen" }, "Show the network"),
    choice("train", "Before: branches"),
    choice("deploy", "After: folded"),
  );
}

/** @param {any} totals */
function legend(totals) {
  const parts = ["fused", "kept", "refused"].filter((status) => totals[status] > 0);
  return h(
    "p",
    { class: "legend" },
    ...parts.map((status) => h("span", { class: `key ${status}` }, `${totals[status]} ${status}`)),
  );
}

/**
 * Blocks by the first part of their path that tells them apart, in order.
 * @param {any[]} blocks
 * @returns {{name: string, blocks: any[]}[]}
 */
export function groups(blocks) {
  const paths = blocks.map((block) => block.module.split("."));
  let depth = 0;
  while (paths.every((path) => path.length > depth + 1 && path[depth] === paths[0][depth]))
    depth += 1;
  const by = (/** @type {number} */ parts) => {
    /** @type {Map<string, any[]>} */
    const found = new Map();
    blocks.forEach((block, at) => {
      const name = paths[at].slice(0, parts).join(".") || "network";
      found.set(name, [...(found.get(name) ?? []), block]);
    });
    return [...found].map(([name, members]) => ({ name, blocks: members }));
  };
  const coarse = by(depth + 1);
  const crowded = coarse.some(
    (each) => each.blocks.length > 12 && each.blocks.length > 0.6 * blocks.length,
  );
  const fine = crowded ? by(depth + 2) : coarse;
  return fine.length <= Math.max(8, blocks.length / 2) ? fine : coarse;
}

/** @param {string} name @param {any[]} blocks @param {boolean} open @param {(block: any, button: HTMLElement) => void} show */
function group(name, blocks, open, show) {
  const before = sum(blocks, "convolutions_before");
  const after = sum(blocks, "convolutions_after");
  const buttons = blocks.map((block, at) => blockButton(block, at, show));
  const flow = h(
    "div",
    {
      class: "flow",
      role: "group",
      "aria-label": `Blocks of ${name}`,
      onkeydown: (/** @type {KeyboardEvent} */ event) => move(event, buttons),
    },
    ...buttons,
  );
  return h(
    "details",
    { class: "stage", open },
    h(
      "summary",
      {},
      h("code", {}, name),
      " ",
      h(
        "span",
        { class: "hint" },
        `${plural(blocks.length, "block")}, ${before === after ? plural(before, "convolution") : `${before} → ${after} convolutions`}`,
      ),
    ),
    flow,
  );
}

/** @param {any[]} blocks @param {string} field */
function sum(blocks, field) {
  return blocks.reduce((total, block) => total + block[field], 0);
}

/** @param {any} block @param {number} at @param {(block: any, button: HTMLElement) => void} show */
function blockButton(block, at, show) {
  const words =
    block.status === "fused"
      ? `fused from ${plural(block.operators_before, "operator")} into ${kernelName(block)}`
      : `${block.status}: ${block.reason}`;
  const button = h(
    "button",
    {
      type: "button",
      class: `block ${block.status}`,
      "aria-pressed": "false",
      "aria-label": `${block.module || "network"}, ${words}`,
      tabindex: at === 0 ? 0 : -1,
    },
    glyph(block),
    h("span", { class: "kernel", "aria-hidden": "true" }, kernelName(block, true)),
  );
  const select = () => show(block, button);
  button.addEventListener("mouseenter", select);
  button.addEventListener("focus", select);
  button.addEventListener("click", select);
  return button;
}

/** Arrow keys walk within a stage; Tab goes on to the next. @param {KeyboardEvent} event @param {HTMLElement[]} buttons */
function move(event, buttons) {
  const at = buttons.indexOf(/** @type {HTMLElement} */ (document.activeElement));
  const to = {
    ArrowRight: at + 1,
    ArrowDown: at + 1,
    ArrowLeft: at - 1,
    ArrowUp: at - 1,
    Home: 0,
    End: buttons.length - 1,
  }[event.key];
  if (at < 0 || to === undefined || buttons[to] === undefined) return;
  event.preventDefault();
  buttons[at].tabIndex = -1;
  buttons[to].tabIndex = 0;
  buttons[to].focus();
}

/** @param {any} block @param {boolean} [short] */
function kernelName(block, short = false) {
  const kernel = block.kernel.length > 0 ? shape(block.kernel) : "";
  if (block.convolutions_after === 0) return block.kernel.length > 0 ? "scale" : "linear";
  return short ? kernel : `${kernel} conv`;
}

/** @param {any} block @param {string | undefined} warning @returns {(Node | null | false)[]} */
function details(block, warning) {
  const change = (/** @type {string} */ field) =>
    block[`${field}_before`] === block[`${field}_after`]
      ? count(block[`${field}_after`])
      : `${count(block[`${field}_before`])} → ${count(block[`${field}_after`])}`;
  return [
    h(
      "p",
      { class: "row" },
      badge(block.status),
      h("strong", {}, h("code", { class: "module" }, block.module || "network")),
    ),
    block.reason !== "" && h("p", { class: "reason" }, sentence(block.reason)),
    h("div", { class: "scroll" }, figure(block, kernelName(block))),
    h(
      "dl",
      { class: "facts" },
      fact(
        "Kernel",
        `${shape(block.kernel) || "1"}${block.groups > 1 ? `, ${block.groups} groups` : ""}`,
      ),
      fact("Channels", `${block.in_channels} → ${block.out_channels}`),
      fact("Stride", shape(block.stride) || "1"),
      fact(
        "Operators",
        block.operators_before === block.operators_after
          ? String(block.operators_after)
          : `${block.operators_before} → ${block.operators_after}`,
      ),
      fact("MACs", change("macs")),
      fact("Parameters", change("parameters")),
      block.error_float64 !== null &&
        block.error_float64 !== undefined &&
        fact("Error, float64", error(block.error_float64)),
    ),
    block.rules.length > 0 &&
      h(
        "div",
        {},
        h("h3", {}, "Rules"),
        h("p", { class: "hint" }, block.rules.join(", ")),
        h(
          "ul",
          { class: "sources" },
          ...block.sources.map((/** @type {string} */ source) => h("li", {}, source)),
        ),
      ),
    warning !== undefined && h("p", { class: "note" }, `int8: ${warning}.`),
    h(
      "details",
      {},
      h("summary", { class: "hint" }, plural(block.modules.length, "module")),
      h(
        "ul",
        { class: "sources" },
        ...block.modules.map((/** @type {string} */ module) => h("li", {}, h("code", {}, module))),
      ),
    ),
  ];
}

/** @param {string} text */
function sentence(text) {
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}${text.endsWith(".") ? "" : "."}`;
}

/** @param {any[]} merged */
function merges(merged) {
  if (merged.length === 0) return null;
  return h(
    "p",
    { class: "note section" },
    `Siblings that read the same input were merged afterwards: ${merged.map((each) => each.modules.join(" + ")).join("; ")}.`,
  );
}
