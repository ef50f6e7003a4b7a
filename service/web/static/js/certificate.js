// The certificate of a conversion, in words and in numbers.
import { fact, h, svg } from "./dom.js";
import { error, plural } from "./format.js";

/**
 * What was proved, as sentences.
 * @param {any} version A version's resource.
 * @returns {string[]}
 */
export function inWords(version) {
  const { fusion } = version;
  const certificate = fusion.certificate ?? {};
  const words = [counted(fusion)];
  if (version.checkpoint.form === "deploy") {
    words.push(
      "The checkpoint was already in deploy form, so there was little or nothing to fold.",
    );
  }
  if (fusion.error_float64 !== null && fusion.fused > 0) {
    words.push(
      "On random probes that reach into the borders, every fused block computes what its branches did, " +
        `to ${error(fusion.error_float64)} of its rms in float64.`,
    );
  }
  if (fusion.error_end_to_end !== null) {
    const same =
      certificate.top1_agreement === 1 ? ", and names the same class for every probe" : "";
    words.push(
      `The whole network as served in ${certificate.precision ?? "float32"} differs by ` +
        `${error(fusion.error_end_to_end)} of how much its output varies between probes${same}.`,
    );
  }
  return words;
}

/** @param {any} fusion */
function counted(fusion) {
  const { blocks, fused, kept, refused } = fusion;
  if (blocks === 0) return "The network has no linear region that could be folded.";
  const rest = [];
  if (kept > 0)
    rest.push(
      `${kept} left as ${kept === 1 ? "it is" : "they are"}, because folding would gain nothing`,
    );
  if (refused > 0) rest.push(`${refused} refused, because folding would not be exact`);
  const head =
    fused === blocks
      ? `All ${plural(blocks, "block")} folded`
      : `${fused} of ${plural(blocks, "block")} folded`;
  return `${[head, ...rest].join("; ")}.`;
}

/** @param {any} version @returns {HTMLElement} */
export function certificateCard(version) {
  const { fusion } = version;
  const certificate = fusion.certificate ?? {};
  const limits = certificate.limits ?? {};
  const errors = [
    scale("Largest error of a block, float64", fusion.error_float64, limits.region_error),
    scale(
      "Whole network, float64",
      certificate.error_end_to_end_float64,
      limits.end_to_end_float64,
    ),
    scale(
      `Whole network, ${certificate.precision ?? "float32"}`,
      fusion.error_end_to_end,
      limits.end_to_end,
    ),
  ].filter((row) => row !== null);
  return h(
    "div",
    { class: "card certificate" },
    h(
      "div",
      { class: "words" },
      h("p", {}, h("span", { class: "badge ready" }, "proved equal")),
      ...inWords(version).map((text) => h("p", {}, text)),
      probes(certificate),
      served(version.execution),
    ),
    errors.length > 0 && h("div", { class: "scales" }, ...errors),
  );
}

/** @param {any} certificate */
function probes(certificate) {
  if (certificate.probes === undefined) return null;
  const seconds =
    certificate.seconds === undefined
      ? ""
      : ` in ${Math.max(0.1, certificate.seconds).toFixed(1)} s`;
  return h(
    "p",
    { class: "hint" },
    `${plural(certificate.probes, "probe")}, seed ${certificate.seed}${seconds}. The errors of every block are in the report.`,
  );
}

/** How it ran where it was published, and what was measured to choose that. @param {any} execution */
function served(execution) {
  if (!execution?.backend) return null;
  const version = (execution.backend_version ?? "").split("-")[0];
  const how = [`${execution.backend} ${version}`.trim(), execution.precision, execution.device];
  const notes = (execution.notes ?? []).map((/** @type {string} */ note) => ` ${note}.`).join("");
  return h("p", { class: "hint" }, `Published with ${how.filter(Boolean).join(", ")}.${notes}`);
}

const LOWEST = -17;

/**
 * An error on a logarithmic scale from 1e-17 to 1, with the limit it had to keep.
 * @param {string} name @param {number | null | undefined} value @param {number | undefined} limit
 */
function scale(name, value, limit) {
  if (value === null || value === undefined) return null;
  const at = (/** @type {number} */ x) => 100 * (1 - Math.log10(Math.max(x, 1e-17)) / LOWEST);
  return h(
    "div",
    { class: "scale" },
    h("p", {}, h("span", {}, name), h("b", {}, error(value))),
    svg(
      "svg",
      { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
      svg("rect", { class: "track", y: 3, width: 100, height: 4 }),
      svg("rect", { class: "value", y: 3, width: Math.max(at(value), 0.6).toFixed(2), height: 4 }),
      limit !== undefined &&
        svg("rect", { class: "limit", x: at(limit).toFixed(2), width: 0.6, height: 10 }),
    ),
    limit !== undefined && h("p", { class: "hint" }, `limit ${error(limit)}`),
  );
}

/** The certificate's head line for places with little room. @param {any} fusion */
export function briefly(fusion) {
  return h(
    "dl",
    { class: "facts" },
    fact("Blocks folded", `${fusion.fused} of ${fusion.blocks}`),
    fact("Convolutions", `${fusion.convolutions_before} → ${fusion.convolutions_after}`),
    fact("Block error, float64", error(fusion.error_float64)),
    fact("Network error as served", error(fusion.error_end_to_end)),
  );
}
