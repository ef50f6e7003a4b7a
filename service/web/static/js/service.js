// The service's page: what it does now, read from /health and /metrics while the page is in view.
import { call, getJson } from "./api.js";
import { chart } from "./chart.js";
import { badge, byId, fact, fill, h } from "./dom.js";
import { buckets, quantile, samples, total } from "./exposition.js";
import { bytes, count, duration, milliseconds, plural, significant } from "./format.js";
import { errorBox } from "./problem.js";

const EVERY_MS = 2000;
const KEPT = 300;
const NONE = "–";
const SECONDS = "foldserve_http_request_seconds";

/** Routes that answer predictions. @param {Record<string, string>} labels */
const predicting = (labels) => /\/(predict|infer)$/.test(labels.route ?? "");

/** @typedef {{at: number, answered: number, rows: number, histogram: Map<number, number>}} Reading */

/** @type {Reading[]} */
const readings = [];
/** Times, predictions a second, p50 and p99, for the charts. @type {(number | null)[][]} */
const series = [[], [], [], []];
/** @type {{setData: (data: any[]) => void}[]} */
let charts = [];

async function refresh() {
  try {
    const [health, text] = await Promise.all([
      getJson("/health"),
      call("/metrics").then((answer) => answer.text()),
    ]);
    const all = samples(text);
    readings.push({
      at: Date.now() / 1000,
      answered: total(all, `${SECONDS}_count`, predicting),
      rows: total(all, "foldserve_rows_total"),
      histogram: buckets(all, SECONDS, predicting),
    });
    if (readings.length > KEPT) readings.shift();
    show(health, all);
    fill(byId("service-problem"));
  } catch (error) {
    fill(byId("service-problem"), errorBox(error));
  }
}

/** @param {any} health @param {import("./exposition.js").Sample[]} all */
function show(health, all) {
  const now = readings[readings.length - 1];
  const before = readings[readings.length - 2];
  const seconds = before === undefined ? 0 : now.at - before.at;
  const rate = (/** @type {"answered" | "rows"} */ field) =>
    before === undefined ? null : Math.max(0, now[field] - before[field]) / seconds;
  const minute = readings.find((each) => each.at >= now.at - 60) ?? now;
  const recent = minute === now ? null : minute.histogram;
  const ms = (/** @type {number} */ q, /** @type {Map<number, number> | null} */ since) => {
    const value = quantile(now.histogram, since, q);
    return value === null ? null : value * 1e3;
  };
  const device = total(all, "foldserve_device_memory_bytes", (labels) => labels.kind === "used");
  fill(byId("service-state"), badge(health.status));
  byId("summary").textContent =
    `Foldserve ${health.version}, up ${duration(health.uptime_seconds)}${health.loading ? ", loading models" : ""}`;
  fill(
    byId("now"),
    figure("Predictions a second", rate("answered"), significant),
    figure("Rows a second", rate("rows"), significant),
    figure("Rows waiting", total(all, "foldserve_queue_rows"), count),
    figure("p50, last minute", recent && ms(0.5, recent), milliseconds),
    figure("p99, last minute", recent && ms(0.99, recent), milliseconds),
    figure("p99, since the start", ms(0.99, null), milliseconds),
    figure("Memory", total(all, "process_resident_memory_bytes"), bytes),
    figure("Weights loaded", health.weight_bytes, bytes),
    device > 0 && figure("Device memory in use", device, bytes),
  );
  record(
    now.at,
    rate("answered"),
    ms(0.5, before?.histogram ?? now.histogram),
    ms(0.99, before?.histogram ?? now.histogram),
  );
  loaded(health.models);
  fill(byId("process"), ...facts(health, all));
  sandbox(health.sandbox);
}

/** @param {string} name @param {number | null} value @param {(value: number) => string} format */
function figure(name, value, format) {
  return fact(name, value === null ? NONE : format(value));
}

/** @param {...(number | null)} values */
function record(...values) {
  series.forEach((column, at) => {
    column.push(values[at]);
    if (column.length > KEPT) column.shift();
  });
  if (charts.length === 0) charts = drawn();
  charts[0].setData([series[0], series[1]]);
  charts[1].setData([series[0], series[2], series[3]]);
}

function drawn() {
  const axes = (/** @type {any} */ paint, /** @type {(value: number) => string} */ format) => [
    {
      ...paint.axis,
      space: 90,
      values: (/** @type {any} */ _, /** @type {number[]} */ ticks) => ticks.map(clock),
    },
    {
      ...paint.axis,
      size: 62,
      values: (/** @type {any} */ _, /** @type {number[]} */ ticks) => ticks.map(format),
    },
  ];
  const shared = { legend: { show: false }, cursor: { show: false } };
  const range = (/** @type {any} */ _, /** @type {number} */ __, /** @type {number} */ high) => [
    0,
    Math.max(1, (high || 0) * 1.15),
  ];
  const minute = () => {
    const times = /** @type {number[]} */ (series[0]);
    const end = times[times.length - 1];
    return [Math.min(times[0], end - 60), end];
  };
  const scales = { x: { range: minute }, y: { range } };
  return [
    chart(byId("throughput"), [series[0], series[1]], (paint) => ({
      ...shared,
      scales,
      axes: axes(paint, significant),
      series: [{}, { stroke: paint.deploy, width: 2, points: { show: false } }],
    })),
    chart(byId("quantiles"), [series[0], series[2], series[3]], (paint) => ({
      ...shared,
      scales,
      axes: axes(paint, milliseconds),
      series: [
        {},
        { stroke: paint.deploy, width: 2, spanGaps: true },
        { stroke: paint.warn, width: 2, spanGaps: true },
      ],
    })),
  ];
}

/** @param {number} seconds Since 1970. */
function clock(seconds) {
  return new Date(seconds * 1e3).toLocaleTimeString(undefined, {
    hour: "2-digit",
    minute: "2-digit",
    second: "2-digit",
    hourCycle: "h23",
  });
}

/** @param {any[]} models */
function loaded(models) {
  const rows = models.flatMap((model) =>
    Object.entries(model.forms).map(([form, how]) => row(model, form, how)),
  );
  if (rows.length === 0)
    return fill(
      byId("loaded"),
      h(
        "p",
        { class: "empty" },
        "Nothing is loaded. Models load when they are published or first asked.",
      ),
    );
  const heads = ["Model", "Form", "Backend", "Device", "Weights", "Answered", "Waiting"].map(
    (name) => h("th", { scope: "col" }, name),
  );
  fill(
    byId("loaded"),
    h(
      "div",
      { class: "scroll" },
      h(
        "table",
        { class: "folding" },
        h("thead", {}, h("tr", {}, ...heads)),
        h("tbody", {}, ...rows),
      ),
    ),
  );
}

/** @param {any} model @param {string} form @param {any} how */
function row(model, form, how) {
  const cell = (/** @type {string} */ name, /** @type {...any} */ ...children) =>
    h("td", { "data-label": name }, ...children);
  return h(
    "tr",
    {},
    h(
      "th",
      { scope: "row" },
      h("a", { href: `/models/${model.model}?version=${model.version}` }, model.model),
      h("small", {}, ` version ${model.version}`),
    ),
    cell("Form", form === "train" ? "training" : form),
    cell(
      "Backend",
      `${how.backend} ${(how.backend_version ?? "").split("-")[0]}, ${how.precision}`,
    ),
    cell(
      "Device",
      how.device,
      how.threads ? h("small", {}, ` ${plural(how.threads, "thread")}`) : null,
    ),
    cell("Weights", bytes(how.weight_bytes)),
    cell("Answered", count(how.requests)),
    cell("Waiting", plural(how.waiting_rows, "row")),
  );
}

/** @param {any} health @param {import("./exposition.js").Sample[]} all */
function facts(health, all) {
  const checks = Object.entries(health.checks).map(([name, well]) =>
    fact(name.charAt(0).toUpperCase() + name.slice(1), badge(well ? "ok" : "failed")),
  );
  return [
    ...checks,
    fact(
      "Versions",
      Object.entries(health.versions)
        .filter(([, number]) => Number(number) > 0)
        .map(([state, number]) => `${number} ${state}`)
        .join(", ") || "none",
    ),
    fact("CPU time", duration(total(all, "process_cpu_seconds_total"))),
    fact(
      "Open files",
      `${total(all, "process_open_fds")} of ${count(total(all, "process_max_fds"))}`,
    ),
    fact("Requests under way", String(total(all, "foldserve_http_requests_running"))),
    ...health.failures.map((/** @type {any} */ each) =>
      fact(`${each.model} version ${each.version}`, badge("failed"), " ", each.detail),
    ),
  ];
}

/** How conversions are confined, by name; the service may not know yet. @param {Record<string, boolean> | null | undefined} measures */
function sandbox(measures) {
  byId("sandbox-section").hidden = !measures;
  const named = (/** @type {string} */ name) =>
    `${name.charAt(0).toUpperCase()}${name.slice(1).replace(/_/g, " ")}`.replace("Cpu", "CPU");
  fill(
    byId("sandbox"),
    ...Object.entries(measures ?? {}).map(([name, on]) =>
      fact(named(name), badge(on ? "on" : "off")),
    ),
  );
}

async function turn() {
  if (byId("live").checked && document.visibilityState === "visible") await refresh();
  setTimeout(turn, EVERY_MS);
}

await refresh();
setTimeout(turn, EVERY_MS);
