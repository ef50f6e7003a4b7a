// Training form against deploy form as pairs of bars.
import { h, svg } from "./dom.js";
import { bytes, count, milliseconds, significant } from "./format.js";

/**
 * @param {any} totals The report's totals.
 * @param {any[]} batches Of a benchmark, or none.
 * @returns {HTMLElement[]}
 */
export function savings(totals, batches) {
  const of = (
    /** @type {string} */ field,
    /** @type {string} */ name,
    /** @type {(value: number) => string} */ format,
  ) => pair(name, totals[`${field}_before`], totals[`${field}_after`], format, null);
  return [
    of("convolutions", "Convolutions", count),
    of("macs", "MACs a row", count),
    of("parameters", "Parameters", count),
    of("bytes", "Weights", bytes),
    ...batches.map((batch) =>
      pair(
        `Latency, batch ${batch.batch_size}`,
        batch.train.median_ms,
        batch.deploy.median_ms,
        milliseconds,
        batch.saving_percent === null ? batch.verdict : null,
      ),
    ),
  ];
}

/**
 * @param {string} name @param {number} before @param {number} after @param {(value: number) => string} format
 * @param {string | null} verdict Said in place of the saving.
 */
function pair(name, before, after, format, verdict) {
  const percent = before > 0 ? 100 * (1 - after / before) : 0;
  const change =
    verdict !== null
      ? `${verdict}: no claim`
      : percent === 0
        ? "the same"
        : `${significant(Math.abs(percent))} % ${percent > 0 ? "less" : "more"}`;
  const kind = verdict !== null || percent === 0 ? "faint" : percent > 0 ? "less" : "more";
  const most = Math.max(before, after, 1e-9);
  return h(
    "div",
    {},
    h("h3", {}, name, h("span", { class: kind }, change)),
    bar("training", before, most, format),
    bar("deploy", after, most, format),
  );
}

/** @param {string} form @param {number} value @param {number} most @param {(value: number) => string} format */
function bar(form, value, most, format) {
  const rect = svg("rect", { width: ((100 * value) / most).toFixed(2), height: 8, rx: 1 });
  return h(
    "div",
    { class: `bar ${form}` },
    h("span", {}, form),
    svg("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" }, rect),
    h("b", {}, format(value)),
  );
}
