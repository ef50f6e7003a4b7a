// A refusal as people read it: the same words as the API's, with the remedy.
import { Refusal } from "./api.js";
import { h } from "./dom.js";

/** @param {import("./api.js").ProblemDocument} problem @returns {HTMLElement} */
export function problemBox(problem) {
  // The address is made here: a stored document must not choose where a link leads.
  const code =
    typeof problem.code === "string" && /^[a-z0-9_]+$/.test(problem.code) ? problem.code : null;
  return h(
    "div",
    { class: "problem" },
    h("p", { class: "title" }, problem.title),
    h("p", {}, problem.detail),
    problem.remedy && h("p", { class: "remedy" }, problem.remedy),
    code &&
      h(
        "p",
        { class: "code" },
        h("a", { href: `/problems/${code}#${code}` }, code),
        code === "forbidden" && " · ",
        code === "forbidden" && h("a", { href: "/login" }, "Log in with another key"),
      ),
  );
}

/** What went wrong, whatever it was. @param {unknown} error @returns {HTMLElement} */
export function errorBox(error) {
  if (error instanceof Refusal) return problemBox(error.problem);
  console.error(error);
  return problemBox({
    title: "This page failed",
    detail: String(error),
    remedy: "Reload it; if it fails again, report it.",
  });
}
