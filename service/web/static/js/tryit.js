// An image to both forms: what each says, side by side.
import { getJson } from "./api.js";
import { announce, fill, h, svg } from "./dom.js";
import { takeDropped } from "./drop.js";
import { milliseconds, shape, significant } from "./format.js";
import { errorBox } from "./problem.js";

const TYPES = ["image/jpeg", "image/png", "image/webp"];

/** @param {Element} place @param {any} version */
export function showTry(place, version) {
  if (version.preprocessing === null || version.preprocessing.error !== undefined) {
    const why =
      version.preprocessing?.error ??
      `Rows of shape ${shape(version.architecture?.input_shape ?? [])} are no images: post arrays to the predict route instead.`;
    fill(place, h("p", { class: "card empty" }, why));
    return;
  }
  const input = h("input", { type: "file", accept: TYPES.join(","), hidden: true });
  const choose = h("button", { type: "button", onclick: () => input.click() }, "Choose an image");
  const preview = h("img", { alt: "The chosen image", hidden: true });
  const drop = h(
    "div",
    { class: "drop try-drop" },
    preview,
    h("p", { class: "big" }, "Drop an image here"),
    choose,
    h("p", { class: "hint" }, recipe(version.preprocessing)),
    input,
  );
  const results = h("div", { class: "forms" });
  const take = (/** @type {FileList | null | undefined} */ files) => {
    const file = files?.[0];
    if (file === undefined) return;
    if (preview.src !== "") URL.revokeObjectURL(preview.src);
    preview.src = URL.createObjectURL(file);
    preview.hidden = false;
    run(version, file, results);
  };
  input.addEventListener("change", () => {
    take(input.files);
    input.value = ""; // so that the same file may be chosen again
  });
  takeDropped(drop, drop, take);
  fill(
    results,
    h("p", { class: "card empty" }, "The five best classes of both forms appear here."),
  );
  fill(place, h("div", { class: "try" }, drop, results));
}

/** @param {any} how */
function recipe(how) {
  return `JPEG, PNG or WebP; becomes ${shape(how.shape)} (${how.origin})`;
}

/** @param {any} version @param {File} file @param {Element} results */
async function run(version, file, results) {
  results.setAttribute("aria-busy", "true");
  const deploy = await asked(version, file, "deploy");
  const train = version.checkpoint.form === "train" ? await asked(version, file, "train") : null;
  results.removeAttribute("aria-busy");
  fill(
    results,
    card("Deploy form", deploy),
    train && card("Training form", train),
    train && h("p", { class: "agreement" }, agreement(deploy, train)),
  );
  announce(`${agreement(deploy, train ?? deploy)}`);
}

/** @typedef {{top?: {label: string, score: number}[], text?: string, ms?: number, error?: unknown}} Outcome */

/** @param {any} version @param {File} file @param {string} form @returns {Promise<Outcome>} */
async function asked(version, file, form) {
  const start = performance.now();
  try {
    const path = `/v1/models/${version.model}/predict?version=${version.version}&form=${form}&top_k=5`;
    const answer = await getJson(path, {
      method: "POST",
      body: file,
      headers: {
        "Content-Type": TYPES.includes(file.type) ? file.type : "application/octet-stream",
      },
    });
    const ms = performance.now() - start;
    if (answer.predictions === undefined)
      return {
        ms,
        text: `Outputs of shape ${answer.outputs.map((/** @type {any} */ each) => shape(each.shape)).join(", ")}: no classes to name.`,
      };
    return { ms, top: answer.predictions[0].top };
  } catch (error) {
    return { error };
  }
}

/** @param {string} name @param {Outcome} outcome */
function card(name, outcome) {
  if (outcome.error !== undefined)
    return h("div", { class: "card stack" }, h("h3", {}, name), errorBox(outcome.error));
  return h(
    "div",
    { class: "card stack" },
    h("h3", {}, name, h("small", {}, ` ${milliseconds(outcome.ms ?? 0)} round trip`)),
    outcome.text !== undefined
      ? h("p", {}, outcome.text)
      : h("ol", { class: "top" }, ...(outcome.top ?? []).map(entry)),
  );
}

/** @param {{label: string, score: number}} one */
function entry({ label, score }) {
  return h(
    "li",
    {},
    h("span", { class: "clip", title: label }, label),
    h("b", {}, `${(100 * score).toFixed(1)} %`),
    svg(
      "svg",
      { viewBox: "0 0 100 4", preserveAspectRatio: "none", "aria-hidden": "true" },
      svg("rect", { class: "track", width: 100, height: 4 }),
      svg("rect", { class: "value", width: (100 * score).toFixed(2), height: 4 }),
    ),
  );
}

/** @param {Outcome} deploy @param {Outcome} train */
function agreement(deploy, train) {
  if (deploy.top === undefined || train.top === undefined) return "";
  const scores = new Map(train.top.map((each) => [each.label, each.score]));
  const shared = deploy.top.filter((each) => scores.has(each.label));
  const apart = Math.max(
    0,
    ...shared.map((each) => Math.abs(each.score - /** @type {number} */ (scores.get(each.label)))),
  );
  const same = deploy.top.every((each, at) => each.label === train.top?.[at]?.label);
  return `${same ? "Both forms give the same classes in the same order" : "The forms differ in the order of their classes"}; their scores differ by at most ${apart < 5e-6 ? "0.0005" : significant(100 * apart)} percentage points.`;
}
