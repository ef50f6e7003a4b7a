// What a version can be downloaded as.
import { call } from "./api.js";
import { announce, fill, h } from "./dom.js";
import { bytes } from "./format.js";
import { errorBox } from "./problem.js";

/** Formats of the deploy form with what each is for. @type {Record<string, string>} */
const USES = {
  safetensors: "state dict; official deploy keys for known dialects",
  pth: "the same for torch.load",
  bundle: "program and weights; runs without the network's code",
  onnx: "for ONNX Runtime and others, any batch size; made when first asked for",
  openvino: "OpenVINO IR in a zip, any batch size; made when first asked for",
};

/** Formats that are made on demand: that can take a while, or be refused with a reason. */
const MADE = ["onnx", "openvino"];

/**
 * @param {Element} place @param {any} version
 * @param {string[]} formats Deploy formats that the service's API names.
 */
export function showDownloads(place, version, formats) {
  const ready = version.state === "ready";
  const said = h("div", { role: "alert" });
  const deploy = ready
    ? formats.map((format) =>
        item(
          `Deploy form, ${format}`,
          USES[format] ?? "",
          `${version.links.deploy}?format=${encodeURIComponent(format)}`,
          MADE.includes(format) ? said : null,
        ),
      )
    : [];
  fill(
    place,
    said,
    h(
      "ul",
      { class: "downloads" },
      ...deploy,
      item(
        "Training form",
        `the uploaded file, unchanged, ${bytes(version.checkpoint.bytes)}`,
        version.links.train,
      ),
      ready && item("Report", "every block, rule and error as JSON", version.links.report),
    ),
    h(
      "p",
      { class: "hint checksum" },
      "SHA-256 of the uploaded file: ",
      h("code", {}, version.checkpoint.sha256),
    ),
  );
}

/** @param {string} name @param {string} use @param {string} address @param {Element | null} [said] Where a refusal is shown, for a file that is made first. */
function item(name, use, address, said = null) {
  const link = h("a", { class: "button small", href: address, download: true }, name);
  const hint = h("span", { class: "hint" }, use);
  if (said !== null) {
    link.addEventListener("click", async (/** @type {MouseEvent} */ event) => {
      event.preventDefault();
      if (hint.textContent !== use) return; // it is on its way
      fill(said);
      hint.textContent = "Being made and checked; the download starts by itself.";
      announce(hint.textContent);
      await save(address).catch((error) => fill(said, errorBox(error)));
      hint.textContent = use;
    });
  }
  return h("li", {}, link, hint);
}

/** Fetch a file and hand it to the browser. @param {string} address */
async function save(address) {
  const answer = await call(address);
  const [, name] = /filename="([^"]+)"/.exec(answer.headers.get("content-disposition") ?? "") ?? [];
  const local = URL.createObjectURL(await answer.blob());
  h("a", { href: local, download: name ?? "deploy" }).click();
  setTimeout(() => URL.revokeObjectURL(local), 60_000);
}

/** Deploy formats as the OpenAPI document names them. @param {any} openapi @returns {string[]} */
export function formatsOf(openapi) {
  const operation = openapi.paths?.["/v1/models/{name}/versions/{version}/checkpoints/deploy"]?.get;
  const parameter = operation?.parameters?.find(
    (/** @type {any} */ each) => each.name === "format",
  );
  return parameter?.schema?.enum ?? ["safetensors", "pth", "bundle"];
}
