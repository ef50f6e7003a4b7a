// One checkpoint on its way: upload, stages, blocks, and what came of it.
import { getJson } from "./api.js";
import { briefly, inWords } from "./certificate.js";
import { announce, badge, fill, h } from "./dom.js";
import { follow } from "./events.js";
import { bytes, plural } from "./format.js";
import { errorBox, problemBox } from "./problem.js";

/** Stages in order with what they do; the API's names. @type {[string, string][]} */
const STAGES = [
  ["upload", "Upload"],
  ["read", "Read"],
  ["recognise", "Recognise"],
  ["build", "Build"],
  ["fuse", "Fuse"],
  ["certify", "Certify"],
  ["write", "Write"],
  ["store", "Store"],
  ["prepare", "Warm up"],
];

export class Conversion {
  /** @param {string} model @param {string} file @param {number | null} size @param {number | null} version */
  constructor(model, file, size, version) {
    this.model = model;
    this.version = version;
    this.stage = "upload";
    this.title = h("h3");
    this.state = h("span");
    this.steps = h("ol", { class: "steps" }, ...STAGES.map(([, name]) => h("li", {}, name)));
    this.line = h("p", { class: "hint numeric line" });
    this.bar = h("progress", { max: 1, "aria-label": `Progress of ${model}` });
    this.cells = h("div", { class: "cells", "aria-hidden": "true" });
    this.outcome = h("div", { class: "stack" });
    this.actions = h("div", { class: "row" });
    this.element = h(
      "article",
      { class: "card stack conversion" },
      h(
        "div",
        { class: "row head" },
        this.title,
        this.state,
        h(
          "span",
          { class: "hint clip", title: file },
          file,
          size === null ? "" : `, ${bytes(size)}`,
        ),
        this.actions,
      ),
      this.steps,
      h("div", { class: "stack under-way" }, this.bar, this.cells, this.line),
      this.outcome,
    );
    this.#named();
    this.#at("upload");
  }

  /** Offer to stop the upload. @param {() => void} cancel */
  cancelWith(cancel) {
    fill(
      this.actions,
      h("button", { type: "button", class: "small quiet", onclick: cancel }, "Cancel"),
    );
  }

  #named() {
    if (this.version !== null) this.element.dataset.key = `${this.model}/${this.version}`;
    fill(
      this.title,
      h("a", { href: `/models/${this.model}` }, this.model),
      this.version === null ? "" : h("small", {}, ` version ${this.version}`),
    );
  }

  /** @param {string} stage */
  #at(stage) {
    const position = STAGES.findIndex(([name]) => name === stage);
    if (position < 0) return; // a stage that this page does not know yet
    this.stage = stage;
    [...this.steps.children].forEach((item, at) => {
      item.className = at < position ? "done" : at === position ? "now" : "";
      if (at === position) item.setAttribute("aria-current", "step");
      else item.removeAttribute("aria-current");
    });
  }

  /** @param {number} sent @param {number} total @param {number} seconds */
  uploaded(sent, total, seconds) {
    this.bar.value = sent / total;
    const rate = seconds > 0.2 ? `, ${bytes(sent / seconds)}/s` : "";
    this.line.textContent =
      sent < total
        ? `${bytes(sent)} of ${bytes(total)} sent${rate}`
        : "Sent; the service is checking and storing it.";
  }

  /** Follow the version to its end. @returns {Promise<any>} Its resource. */
  async follow(/** @type {number} */ version) {
    this.version = version;
    this.#named();
    fill(this.actions);
    const path = `/v1/models/${this.model}/versions/${version}`;
    fill(this.state, badge("queued"));
    this.bar.removeAttribute("value");
    this.line.textContent = "Waiting for its turn.";
    for await (const event of follow(`${path}/events`)) {
      if (event.kind === "progress") this.#progress(event.data);
      else if (event.data.state === "converting") fill(this.state, badge("converting"));
    }
    const resource = await getJson(path);
    this.#ended(resource);
    return resource;
  }

  /** @param {{stage: string, done: number, total: number}} progress */
  #progress({ stage, done, total }) {
    if (stage !== this.stage) announce(`${this.model}: ${stage}`);
    this.#at(stage);
    fill(this.state, badge("converting"));
    if (total > 1) {
      this.bar.value = done / total;
      this.line.textContent = `${done} of ${plural(total, "block")} proved equal`;
      this.#blocks(done, total);
    } else {
      this.bar.removeAttribute("value");
      this.line.textContent =
        {
          read: "Reading the file as data.",
          fuse: "Folding branches.",
          prepare: "Loading the folded network and trying every batch size.",
        }[stage] ?? "";
    }
  }

  /** @param {number} done @param {number} total */
  #blocks(done, total) {
    if (this.cells.childElementCount !== total)
      fill(this.cells, ...Array.from({ length: total }, () => h("span")));
    [...this.cells.children].forEach((cell, at) => cell.classList.toggle("done", at < done));
  }

  /** @param {any} resource */
  #ended(resource) {
    fill(this.state, badge(resource.state));
    this.#underWay(false);
    if (resource.state === "ready") {
      this.steps.hidden = true;
      announce(
        `${this.model} version ${resource.version} is ready. ${inWords(resource).join(" ")}`,
      );
      fill(
        this.outcome,
        h("div", { class: "words" }, ...inWords(resource).map((text) => h("p", {}, text))),
        briefly(resource.fusion),
      );
      fill(
        this.actions,
        h(
          "a",
          { class: "button small", href: `/models/${this.model}?version=${resource.version}` },
          "Open",
        ),
      );
    } else if (resource.error !== null) {
      this.#failedStep();
      announce(`${this.model} version ${resource.version} was rejected: ${resource.error.detail}`);
      fill(this.outcome, problemBox(resource.error));
    }
  }

  /** Nothing more will come. @param {unknown} error */
  failed(error) {
    fill(this.state, badge("failed"));
    this.#failedStep();
    this.#underWay(false);
    const box = errorBox(error);
    announce(`${this.model}: ${box.textContent}`);
    fill(this.outcome, box);
    fill(
      this.actions,
      h(
        "button",
        { type: "button", class: "small quiet", onclick: () => this.element.remove() },
        "Dismiss",
      ),
    );
  }

  #failedStep() {
    this.steps.querySelector(".now")?.classList.add("broken");
  }

  /** @param {boolean} shown */
  #underWay(shown) {
    this.element.querySelector(".under-way").hidden = !shown;
  }
}
