// The list of models: state, network, what folding saved.
import { getJson } from "./api.js";
import { badge, byId, fill, h } from "./dom.js";
import { plural, significant } from "./format.js";
import { errorBox } from "./problem.js";

/**
 * Fill the list, and hand over every newest version that is still under way.
 * @param {(version: any) => void} underWay
 */
export async function showModels(underWay) {
  const list = byId("models");
  try {
    const [page, health] = await Promise.all([getJson("/v1/models"), getJson("/health")]);
    fill(list, page.items.length === 0 ? nothing() : table(page, health, underWay));
  } catch (error) {
    fill(list, errorBox(error));
  }
  list.removeAttribute("aria-busy");
}

function nothing() {
  return h(
    "div",
    { class: "card empty stack" },
    h("p", {}, "No model yet. Drop a checkpoint above, or upload one from a terminal:"),
    h(
      "pre",
      {},
      h(
        "code",
        {},
        `curl -F checkpoint=@RepVGG-A0-train.pth -H 'Prefer: wait=120' \\\n     ${location.origin}/v1/models/repvgg-a0/versions`,
      ),
    ),
  );
}

/** @param {any} page @param {any} health @param {(version: any) => void} underWay */
function table(page, health, underWay) {
  const body = h("tbody");
  const more = h("button", { type: "button", class: "small" }, "Show more");
  const rows = (/** @type {any} */ from) => {
    for (const model of from.items) {
      const row = h(
        "tr",
        {},
        h("th", { scope: "row" }, h("a", { href: `/models/${model.name}` }, model.name)),
        ...Array.from({ length: 4 }, () => h("td", {}, "\u00a0")),
      );
      body.append(row);
      fillRow(row, model, health, underWay);
    }
    more.hidden = from.next === null;
    more.onclick = () =>
      getJson(from.next).then(rows, (error) => more.replaceWith(errorBox(error)));
  };
  rows(page);
  const heads = ["Model", "State", "Network", "Convolutions", "Latency saved"];
  return h(
    "div",
    { class: "stack" },
    h(
      "div",
      { class: "card tight" },
      h(
        "table",
        { class: "folding" },
        h("thead", {}, h("tr", {}, ...heads.map((name) => h("th", { scope: "col" }, name)))),
        body,
      ),
    ),
    more,
  );
}

/** @param {HTMLTableRowElement} row @param {any} model @param {any} health @param {(version: any) => void} underWay */
async function fillRow(row, model, health, underWay) {
  const [, state, network, convolutions, saved] = row.children;
  try {
    const { versions } = await getJson(`/v1/models/${model.name}`);
    const newest = versions[0];
    const serving = versions.find((/** @type {any} */ each) => each.default) ?? newest;
    if (newest === undefined) return fill(state, "no versions");
    fill(
      state,
      badge(serving.state),
      " ",
      h("small", {}, `version ${serving.version}${also(newest, serving)}`),
    );
    fill(
      network,
      serving.architecture?.name ??
        h("span", { class: "faint" }, serving.error?.title ?? "not known yet"),
    );
    if (serving.fusion !== null)
      fill(
        convolutions,
        `${serving.fusion.convolutions_before} → ${serving.fusion.convolutions_after}`,
      );
    if (serving.fusion !== null) fill(saved, saving(health, model.name, serving.version));
    [network, convolutions, saved].forEach(
      (cell, at) =>
        cell.textContent.trim() !== "" &&
        cell.setAttribute("data-label", ["Network", "Convolutions", "Latency saved"][at]),
    );
    if (newest.state === "queued" || newest.state === "converting") underWay(newest);
  } catch (error) {
    fill(state, errorBox(error));
  }
}

/** @param {any} newest @param {any} serving */
function also(newest, serving) {
  return newest.version === serving.version ? "" : `; version ${newest.version} ${newest.state}`;
}

/** The best measured saving. @param {any} health @param {string} model @param {number} version */
function saving(health, model, version) {
  const row = health.models.find(
    (/** @type {any} */ each) => each.model === model && each.version === version,
  );
  if (row === undefined || row.latency_saving === null)
    return h("span", { class: "faint" }, "not measured");
  const claimed = row.latency_saving.batches.filter(
    (/** @type {any} */ each) => each.saving_percent !== null,
  );
  if (claimed.length === 0) return h("span", { class: "faint" }, "no claim");
  const best = claimed.reduce((/** @type {any} */ a, /** @type {any} */ b) =>
    b.saving_percent > a.saving_percent ? b : a,
  );
  return `${significant(best.saving_percent)} % at ${plural(best.batch_size, "row")}`;
}
