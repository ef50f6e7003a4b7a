// What a version can be downloaded as.
import { fill, h } from "./dom.js";
import { bytes } from "./format.js";

/** Formats of the deploy form with what each is for. @type {Record<string, string>} */
const USES = {
  safetensors: "state dict; official deploy keys for known dialects",
  pth: "the same for torch.load",
  bundle: "program and weights; runs without the network's code",
  onnx: "for ONNX Runtime and others; dynamic batch",
  openvino: "OpenVINO IR as a zip",
};

/**
 * @param {Element} place @param {any} version
 * @param {string[]} formats Deploy formats that the service's API names.
 */
export function showDownloads(place, version, formats) {
  const ready = version.state === "ready";
  const deploy = ready ? formats.map((format) => item(`Deploy form, ${format}`, USES[format] ?? "", `${version.links.deploy}?format=${encodeURIComponent(format)}`)) : [];
  fill(
    place,
    h(
      "ul",
      { class: "downloads" },
      ...deploy,
      item("Training form", `the uploaded file, unchanged, ${bytes(version.checkpoint.bytes)}`, version.links.train),
      ready && item("Report", "every block, rule and error as JSON", version.links.report),
    ),
    h("p", { class: "hint checksum" }, "SHA-256 of the uploaded file: ", h("code", {}, version.checkpoint.sha256)),
  );
}

/** @param {string} name @param {string} use @param {string} address */
function item(name, use, address) {
  return h("li", {}, h("a", { class: "button small", href: address, download: true }, name), h("span", { class: "hint" }, use));
}

/** Deploy formats as the OpenAPI document names them. @param {any} openapi @returns {string[]} */
export function formatsOf(openapi) {
  const operation = openapi.paths?.["/v1/models/{name}/versions/{version}/checkpoints/deploy"]?.get;
  const parameter = operation?.parameters?.find((/** @type {any} */ each) => each.name === "format");
  return parameter?.schema?.enum ?? ["safetensors", "pth", "bundle"];
}
