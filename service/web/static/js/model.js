// A model's page: its versions, and everything about the one in hand.
import { getJson } from "./api.js";
import { savings } from "./bars.js";
import { certificateCard } from "./certificate.js";
import { Conversion } from "./conversion.js";
import { badge, byId, fill } from "./dom.js";
import { formatsOf, showDownloads } from "./downloads.js";
import { plural, shape } from "./format.js";
import { lastBenchmark, showLatency } from "./latency.js";
import { showNetwork } from "./network.js";
import { errorBox, problemBox } from "./problem.js";
import { showTry } from "./tryit.js";
import { deleteModelButton, showVersions } from "./versions.js";

const name = /** @type {string} */ (byId("model").dataset.name);
/** @type {any} */
let model = null;
/** @type {number | null} */
let shown = Number(new URLSearchParams(location.search).get("version")) || null;

/** Read the model and show it; the version in hand stays if it is still there. */
async function load() {
  try {
    model = await getJson(`/v1/models/${name}`);
  } catch (error) {
    fill(byId("model-problem"), errorBox(error));
    byId("versions").removeAttribute("aria-busy");
    for (const id of ["versions-section", "version", "summary"]) byId(id).hidden = true;
    return;
  }
  fill(
    byId("model-actions"),
    deleteModelButton(name, (error) => fill(byId("model-problem"), errorBox(error))),
  );
  const numbers = model.versions.map((/** @type {any} */ each) => each.version);
  if (shown === null || (!numbers.includes(shown) && model.next === null))
    shown = model.default_version ?? numbers[0] ?? null;
  versions();
  await version();
}

function versions() {
  showVersions(byId("versions"), { model, shown, changed: load, select });
  byId("versions").removeAttribute("aria-busy");
}

/** @param {number} number */
function select(number) {
  shown = number;
  history.replaceState(null, "", `?version=${number}`);
  versions();
  version();
}

async function version() {
  if (shown === null) {
    byId("version").hidden = true;
    byId("summary").textContent = "No versions.";
    return;
  }
  const asked = shown;
  try {
    const found = await getJson(`/v1/models/${name}/versions/${asked}`);
    if (asked === shown) await show(found);
  } catch (error) {
    fill(byId("model-problem"), errorBox(error));
  }
}

/** @param {any} found */
async function show(found) {
  const ready = found.state === "ready";
  byId("summary").textContent = inShort(found);
  for (const id of ["certificate", "saved", "network"]) byId(`${id}-section`).hidden = !ready;
  if (!ready) state(found);
  else fill(byId("state-section"));
  const servable = ready && found.architecture.input_shape !== null;
  for (const id of ["latency", "try"]) byId(`${id}-section`).hidden = !servable;
  const [openapi, report, benchmark] = await Promise.all([
    getJson("/openapi.json"),
    ready ? getJson(found.links.report) : null,
    servable ? lastBenchmark(name, found.version) : null,
  ]);
  if (found.version !== shown) return;
  byId("version").hidden = false;
  showDownloads(byId("downloads"), found, formatsOf(openapi));
  if (!ready) return;
  fill(byId("certificate"), certificateCard(found));
  const measured = (/** @type {any} */ result) => {
    fill(byId("saved"), ...savings(found.fusion, result?.batches ?? []));
    if (servable) showLatency(byId("latency"), found, result, measured);
  };
  showNetwork(byId("network"), report);
  if (servable) showTry(byId("try"), found);
  measured(benchmark);
}

/** A version that is not ready: under way, or refused with the reason. @param {any} found */
function state(found) {
  if (found.state === "rejected") {
    fill(byId("state-section"), found.error === null ? badge("rejected") : problemBox(found.error));
    return;
  }
  const conversion = new Conversion(
    name,
    found.checkpoint.filename ?? "",
    found.checkpoint.bytes,
    found.version,
  );
  fill(byId("state-section"), conversion.element);
  conversion
    .follow(found.version)
    .catch((error) => conversion.failed(error))
    .then(load);
}

/** @param {any} found */
function inShort(found) {
  const { architecture } = found;
  if (architecture === null) return `Version ${found.version} is ${found.state}.`;
  const parts = [architecture.name];
  if (architecture.input_shape !== null) parts.push(`input ${shape(architecture.input_shape)}`);
  if (architecture.num_classes !== null)
    parts.push(plural(architecture.num_classes, "class").replace("classs", "classes"));
  return `Version ${found.version}: ${parts.join(", ")}`;
}

load();
