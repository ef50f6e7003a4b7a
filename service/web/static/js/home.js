// The first page: upload a checkpoint, see it through, and the list of models.
import { Conversion } from "./conversion.js";
import { announce, byId } from "./dom.js";
import { takeDropped } from "./drop.js";
import { bytes } from "./format.js";
import { showModels } from "./models.js";
import { modelName, upload } from "./upload.js";

/** @type {File | null} */
let file = null;

/** @param {File} chosen */
function choose(chosen) {
  file = chosen;
  byId("file-name").textContent = chosen.name;
  byId("file-size").textContent = bytes(chosen.size);
  byId("model-name").value = modelName(chosen.name);
  byId("drop").hidden = true;
  byId("chosen").hidden = false;
  byId("send").focus();
  announce(`${chosen.name} chosen.`);
}

function discard() {
  file = null;
  byId("file").value = "";
  byId("config").value = "";
  complain("");
  byId("chosen").hidden = true;
  byId("drop").hidden = false;
}

/** Files by hand or dropped: a JSON file is the config, anything else the checkpoint. @param {FileList | null} files */
async function take(files) {
  for (const each of files ?? []) {
    if (/\.json$/i.test(each.name)) {
      byId("config").value = await each.text();
      byId("options").open = true;
      checkedConfig();
    } else {
      choose(each);
    }
  }
}

/** @param {string} reason Empty when the config is fine. */
function complain(reason) {
  byId("config-error").textContent = reason;
  byId("config").setAttribute("aria-invalid", String(reason !== ""));
}

/** The config's text, or null when it is no JSON. @returns {string | null} */
function checkedConfig() {
  const text = byId("config").value.trim();
  try {
    if (text !== "") JSON.parse(text);
  } catch (error) {
    complain(`This is not JSON: ${/** @type {Error} */ (error).message}`);
    byId("options").open = true;
    return null;
  }
  complain("");
  return text;
}

/** @param {Conversion} conversion */
function show(conversion) {
  byId("conversions").hidden = false;
  byId("conversion-list").prepend(conversion.element);
}

/** @param {SubmitEvent} event */
async function send(event) {
  event.preventDefault();
  const config = checkedConfig();
  if (file === null) return;
  if (config === null) return byId("config").focus();
  const sent = file;
  const name = byId("model-name").value.trim();
  const conversion = new Conversion(name, sent.name, sent.size, null);
  const cancel = new AbortController();
  conversion.cancelWith(() => cancel.abort());
  show(conversion);
  discard();
  byId("choose").focus({ preventScroll: true });
  const start = performance.now();
  try {
    const resource = await upload(
      name,
      sent,
      config,
      (done, total) => conversion.uploaded(done, total, (performance.now() - start) / 1000),
      cancel.signal,
    );
    await conversion.follow(resource.version);
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") conversion.element.remove();
    else conversion.failed(error);
  }
  await showModels(resume);
}

/** A conversion that was under way when the page was opened. @param {any} version */
function resume(version) {
  const known = [...document.querySelectorAll(".conversion")].some(
    (card) => card.getAttribute("data-key") === `${version.model}/${version.version}`,
  );
  if (known) return;
  const conversion = new Conversion(
    version.model,
    version.checkpoint.filename ?? "",
    version.checkpoint.bytes,
    version.version,
  );
  show(conversion);
  conversion
    .follow(version.version)
    .catch((error) => conversion.failed(error))
    .then(() => showModels(resume));
}

byId("choose").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", () => take(byId("file").files));
byId("discard").addEventListener("click", () => {
  discard();
  byId("choose").focus();
});
byId("config").addEventListener("change", checkedConfig);
byId("upload").addEventListener("submit", send);
takeDropped(window, byId("drop"), take);
showModels(resume);
