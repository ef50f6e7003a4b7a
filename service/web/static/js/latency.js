// The latency chart: training form against deploy form over batch sizes, and the button that measures.
import { getJson, sendJson } from "./api.js";
import { announce, fill, h } from "./dom.js";
import { milliseconds, plural, significant, when } from "./format.js";
import { chart, colours } from "./chart.js";
import { errorBox } from "./problem.js";

/**
 * @param {Element} place @param {any} version
 * @param {any | null} benchmark The last measurement, if there is one.
 * @param {(benchmark: any) => void} measured
 */
export function showLatency(place, version, benchmark, measured) {
  if (version.checkpoint.form === "deploy") {
    fill(
      place,
      h(
        "p",
        { class: "empty" },
        "The upload was in deploy form: there is no training form to measure it against.",
      ),
    );
    return;
  }
  const sizes = h("input", {
    type: "text",
    id: "batch-sizes",
    inputmode: "numeric",
    placeholder: "as configured",
    autocomplete: "off",
    "aria-describedby": "batch-hint",
  });
  const start = h(
    "button",
    { type: "submit", class: "primary" },
    benchmark === null ? "Measure" : "Measure again",
  );
  const said = h("div", { role: "alert" });
  const busy = h("progress", { "aria-label": "Measuring", hidden: true });
  const form = h(
    "form",
    { class: "measure" },
    h(
      "div",
      { class: "field" },
      h("label", { for: "batch-sizes" }, "Batch sizes"),
      sizes,
      h("span", { class: "hint", id: "batch-hint" }, "Rows at once, such as 1, 8, 32."),
    ),
    start,
  );
  form.addEventListener("submit", async (/** @type {Event} */ event) => {
    event.preventDefault();
    const wanted = sizes.value
      .split(/[\s,;]+/)
      .filter((/** @type {string} */ text) => text !== "")
      .map(Number);
    start.disabled = true;
    busy.hidden = false;
    fill(
      said,
      h(
        "p",
        { class: "hint" },
        "Both forms run in turn, with the deploy form once more as a control. Serving goes on meanwhile.",
      ),
    );
    try {
      const body = wanted.length > 0 ? { batch_sizes: wanted } : {};
      const result = await sendJson(
        `/v1/models/${version.model}/benchmark?version=${version.version}`,
        "POST",
        body,
      );
      announce(result.batches.map((/** @type {any} */ batch) => batch.statement).join(" "));
      measured(result);
    } catch (error) {
      fill(said, errorBox(error));
    }
    start.disabled = false;
    busy.hidden = true;
  });
  fill(
    place,
    benchmark === null
      ? h("p", { class: "empty" }, "Not measured on this machine yet.")
      : results(benchmark),
    form,
    busy,
    said,
  );
}

/** @param {any} benchmark */
function results(benchmark) {
  const plot = h("div", { class: "chart", "aria-hidden": "true" });
  requestAnimationFrame(() => drawn(plot, benchmark.batches));
  const facts = [
    benchmark.device,
    benchmark.backend,
    benchmark.precision,
    benchmark.threads && plural(benchmark.threads, "thread"),
  ]
    .filter(Boolean)
    .join(", ");
  return h(
    "figure",
    { class: "latency" },
    h(
      "figcaption",
      { class: "row" },
      h(
        "span",
        { class: "keys" },
        h("span", { class: "series train" }, "Training form"),
        h("span", { class: "series deploy" }, "Deploy form"),
      ),
      h(
        "span",
        { class: "hint" },
        "Median milliseconds a batch; bars from the 5th to the 95th percentile",
      ),
    ),
    plot,
    table(benchmark.batches),
    h(
      "p",
      { class: "hint" },
      `${facts}. Measured ${when(benchmark.measured_at)} in ${significant(benchmark.seconds)} s.`,
    ),
  );
}

/** @param {any[]} batches */
function table(batches) {
  const spread = (/** @type {any} */ side) => [
    milliseconds(side.median_ms),
    h("small", {}, ` ${significant(side.p5_ms)} to ${milliseconds(side.p95_ms)}`),
  ];
  const cell = (/** @type {string} */ label, /** @type {...any} */ ...children) =>
    h("td", { "data-label": label }, ...children);
  const rows = batches.map((batch) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, batch.batch_size),
      cell("Training form", ...spread(batch.train)),
      cell("Deploy form", ...spread(batch.deploy)),
      cell(
        "Speed-up",
        `${batch.speedup.toFixed(2)}×`,
        h(
          "small",
          {},
          ` ${batch.speedup_interval.low.toFixed(2)} to ${batch.speedup_interval.high.toFixed(2)}`,
        ),
      ),
      cell("A/A control", `${batch.control.ratio.toFixed(3)}×`),
      cell("Verdict", batch.verdict),
    ),
  );
  const heads = [
    "Batch",
    "Training form",
    "Deploy form",
    "Speed-up, 95 %",
    "A/A control",
    "Verdict",
  ].map((name) => h("th", { scope: "col" }, name));
  return h(
    "div",
    { class: "scroll" },
    h(
      "table",
      { class: "folding" },
      h("thead", {}, h("tr", {}, ...heads)),
      h("tbody", {}, ...rows),
    ),
  );
}

/** @param {HTMLElement} place @param {any[]} batches */
function drawn(place, batches) {
  const at = batches.map((_, position) => position);
  const of = (/** @type {string} */ form, /** @type {string} */ field) =>
    batches.map((batch) => batch[form][field]);
  const whiskers = (/** @type {any} */ plot) => {
    const { ctx } = plot;
    const { train, deploy } = colours();
    [
      ["train", train, -5],
      ["deploy", deploy, 5],
    ].forEach(([form, colour, shift]) => {
      ctx.save();
      ctx.strokeStyle = colour;
      ctx.lineWidth = 2 * devicePixelRatio;
      batches.forEach((batch, position) => {
        const x = plot.valToPos(position, "x", true) + Number(shift) * devicePixelRatio;
        const [low, high] = [
          plot.valToPos(batch[form].p5_ms, "y", true),
          plot.valToPos(batch[form].p95_ms, "y", true),
        ];
        const cap = 4 * devicePixelRatio;
        ctx.beginPath();
        ctx.moveTo(x, low);
        ctx.lineTo(x, high);
        for (const y of [low, high]) {
          ctx.moveTo(x - cap, y);
          ctx.lineTo(x + cap, y);
        }
        ctx.stroke();
      });
      ctx.restore();
    });
  };
  const most = Math.max(...of("train", "p95_ms"), ...of("deploy", "p95_ms"));
  chart(place, [at, of("train", "median_ms"), of("deploy", "median_ms")], (paint) => ({
    legend: { show: false },
    cursor: { show: false },
    scales: {
      x: { time: false, range: [-0.5, batches.length - 0.5] },
      y: { range: [0, most * 1.08] },
    },
    axes: [
      {
        ...paint.axis,
        splits: () => at,
        values: () => batches.map((batch) => String(batch.batch_size)),
        label: "Batch size",
        labelSize: 26,
      },
      {
        ...paint.axis,
        size: 64,
        values: (/** @type {any} */ _, /** @type {number[]} */ values) => values.map(milliseconds),
      },
    ],
    series: [
      {},
      { stroke: paint.train, width: 2, points: { size: 8, fill: paint.train } },
      { stroke: paint.deploy, width: 2.5, points: { size: 8, fill: paint.deploy } },
    ],
    hooks: { draw: [whiskers] },
  }));
}

/** The last measurement, or null. @param {string} model @param {number} version @returns {Promise<any | null>} */
export async function lastBenchmark(model, version) {
  // Asked of /health first: a version that was never measured answers with a refusal, which is no news.
  const health = await getJson("/health");
  const row = health.models.find(
    (/** @type {any} */ each) => each.model === model && each.version === version,
  );
  if (row !== undefined && row.latency_saving === null) return null;
  return getJson(`/v1/models/${model}/benchmark?version=${version}`).catch(() => null);
}
