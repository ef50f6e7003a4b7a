// Sending a checkpoint. XMLHttpRequest, because fetch does not tell how much has left.
import { parsedProblem, Refusal, UNREACHABLE } from "./api.js";

/** What the command's client makes of a file name too: `RepVGG-A0-train.pth` gives `repvgg-a0-train`. @param {string} file */
export function modelName(file) {
  const stem = file.replace(/(\.(pth|pt2?|tar|safetensors|hdf5|h5|bundle))+$/i, "").toLowerCase();
  return stem
    .replace(/[^a-z0-9._-]+/g, "-")
    .replace(/^[._-]+|[._-]+$/g, "")
    .slice(0, 63);
}

/**
 * @param {string} model
 * @param {File} file
 * @param {string} config JSON, or empty.
 * @param {(sent: number, total: number) => void} progress
 * @param {AbortSignal} signal
 * @returns {Promise<any>} The version's resource.
 */
export async function upload(model, file, config, progress, signal) {
  const answer = await send(model, file, config, progress, signal);
  if (answer.status < 300) return JSON.parse(answer.body);
  throw new Refusal(parsedProblem(answer.status, answer.body));
}

/** @param {string} model @param {File} file @param {string} config @param {(sent: number, total: number) => void} progress @param {AbortSignal} signal @returns {Promise<{status: number, body: string}>} */
function send(model, file, config, progress, signal) {
  const form = new FormData();
  if (config !== "") form.append("config", config); // first: it is checked before the file is received
  form.append("checkpoint", file);
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", `/v1/models/${encodeURIComponent(model)}/versions`);
    request.upload.addEventListener("progress", (event) => progress(event.loaded, event.total));
    request.addEventListener("load", () =>
      resolve({ status: request.status, body: request.responseText }),
    );
    request.addEventListener("error", () => reject(new Refusal(UNREACHABLE)));
    request.addEventListener("abort", () => reject(new DOMException("Cancelled", "AbortError")));
    signal.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}
