// A model's versions: states, the default, roll back, deletion.
import { call, getJson, sendJson } from "./api.js";
import { confirmed } from "./confirm.js";
import { announce, badge, fill, h } from "./dom.js";
import { bytes, when } from "./format.js";
import { errorBox } from "./problem.js";

/**
 * @typedef {{model: any, shown: number | null, changed: () => Promise<void>, select: (version: number) => void}} Context
 */

/** @param {Element} place @param {Context} context */
export function showVersions(place, context) {
  const { model } = context;
  const body = h(
    "tbody",
    {},
    ...model.versions.map((/** @type {any} */ version) => row(version, context)),
  );
  const said = h("div", { role: "alert", class: "said" });
  const more = h(
    "button",
    { type: "button", class: "small", hidden: model.next === null },
    "Older versions",
  );
  let next = model.next;
  more.addEventListener("click", () =>
    guarded(more, async () => {
      const page = await getJson(next);
      body.append(...page.items.map((/** @type {any} */ version) => row(version, context)));
      next = page.next;
      more.hidden = next === null;
    }),
  );
  const heads = ["Version", "State", "Network", "File", "Uploaded"].map((name) =>
    h("th", { scope: "col" }, name),
  );
  const table = h(
    "table",
    { class: "folding" },
    h(
      "thead",
      {},
      h("tr", {}, ...heads, h("th", { scope: "col" }, h("span", { class: "unseen" }, "Actions"))),
    ),
    body,
  );
  fill(
    place,
    said,
    table,
    h("div", { class: "table-foot row", hidden: model.next === null }, more),
  );
}

/** @param {any} version @param {Context} context */
function row(version, context) {
  const chosen = version.version === context.shown;
  const open = h(
    "a",
    { href: `?version=${version.version}`, "aria-current": chosen ? "true" : null },
    `Version ${version.version}`,
  );
  open.addEventListener("click", (/** @type {MouseEvent} */ event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    context.select(version.version);
  });
  return h(
    "tr",
    { class: chosen ? "chosen" : null },
    h("th", { scope: "row" }, open),
    h(
      "td",
      {},
      h(
        "span",
        { class: "row" },
        badge(version.state),
        version.default &&
          h("span", { class: "badge plain" }, context.model.pinned ? "default, pinned" : "default"),
      ),
    ),
    h(
      "td",
      { "data-label": "Network" },
      version.architecture?.name ??
        h("span", { class: "faint" }, version.error?.title ?? "not known yet"),
    ),
    h(
      "td",
      { "data-label": "File", class: "file" },
      h(
        "span",
        { class: "clip", title: version.checkpoint.filename ?? "" },
        version.checkpoint.filename ?? "unnamed",
      ),
      " ",
      h("small", {}, bytes(version.checkpoint.bytes)),
    ),
    h(
      "td",
      { "data-label": "Uploaded" },
      h("time", { datetime: version.created_at }, when(version.created_at)),
    ),
    h("td", { class: "actions" }, h("span", { class: "row" }, ...actions(version, context))),
  );
}

/** @param {any} version @param {Context} context */
function actions(version, context) {
  const { model } = context;
  const newest = model.versions.find((/** @type {any} */ each) => each.state === "ready");
  const made = [];
  if (version.state === "ready" && !version.default) {
    const back = model.default_version !== null && version.version < model.default_version;
    made.push(
      button(
        back ? "Roll back" : "Make default",
        `${back ? "Roll back to" : "Make default:"} version ${version.version}`,
        () => setDefault(model, version.version, context),
        context,
      ),
    );
  } else if (version.default && model.pinned) {
    const title =
      newest?.version === version.version ? "Let later versions take over" : "Follow the newest";
    made.push(
      button(
        "Unpin",
        `${title}: unpin version ${version.version}`,
        () => setDefault(model, null, context),
        context,
      ),
    );
  }
  made.push(
    button(
      "Delete",
      `Delete version ${version.version}`,
      () => remove(version, context),
      context,
      "danger",
    ),
  );
  return made;
}

/** @param {string} name @param {string} label @param {() => Promise<void>} act @param {Context} context @param {string} [kind] */
function button(name, label, act, context, kind = "") {
  const made = h("button", { type: "button", class: `small ${kind}`, "aria-label": label }, name);
  made.addEventListener("click", () => guarded(made, act));
  return made;
}

/** Run an action with its button switched off, and show what went wrong. @param {HTMLButtonElement} made @param {() => Promise<void>} act */
async function guarded(made, act) {
  made.disabled = true;
  try {
    await act();
  } catch (error) {
    const said = made.closest("#versions")?.querySelector(".said");
    if (said) fill(said, errorBox(error));
  } finally {
    made.disabled = false;
  }
}

/** @param {any} model @param {number | null} version @param {Context} context */
async function setDefault(model, version, context) {
  const changed = await sendJson(`/v1/models/${model.name}/default`, "PUT", { version });
  announce(`Version ${changed.default_version} of ${model.name} serves now.`);
  await context.changed();
}

/** @param {any} version @param {Context} context */
async function remove(version, context) {
  const serving = version.default
    ? " It is the default: the newest ready version left takes its place."
    : "";
  const sure = await confirmed(
    `Delete version ${version.version}?`,
    `Version ${version.version} of ${version.model} and its files are forgotten. This cannot be undone.${serving}`,
    "Delete version",
  );
  if (!sure) return;
  await call(`/v1/models/${version.model}/versions/${version.version}`, { method: "DELETE" });
  announce(`Version ${version.version} was deleted.`);
  await context.changed();
}

/** The button that deletes the whole model. @param {string} name @param {(error: unknown) => void} failed */
export function deleteModelButton(name, failed) {
  return h(
    "button",
    {
      type: "button",
      class: "small danger",
      onclick: async () => {
        const sure = await confirmed(
          `Delete ${name}?`,
          `The model ${name} and all its versions are forgotten. This cannot be undone.`,
          "Delete model",
        );
        if (!sure) return;
        try {
          await call(`/v1/models/${name}`, { method: "DELETE" });
          location.assign("/");
        } catch (error) {
          failed(error);
        }
      },
    },
    "Delete model",
  );
}
