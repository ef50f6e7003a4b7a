// A question before something that cannot be undone.
import { h } from "./dom.js";

/**
 * @param {string} title
 * @param {string} text
 * @param {string} action What the button says.
 * @returns {Promise<boolean>}
 */
export function confirmed(title, text, action) {
  return new Promise((resolve) => {
    const dialog = h(
      "dialog",
      {
        "aria-labelledby": "confirm-title",
        "aria-describedby": "confirm-text",
        role: "alertdialog",
      },
      h("h2", { id: "confirm-title" }, title),
      h("p", { id: "confirm-text" }, text),
      h(
        "div",
        { class: "row" },
        h("button", { type: "button", autofocus: true, onclick: () => dialog.close("") }, "Cancel"),
        h(
          "button",
          { type: "button", class: "danger", onclick: () => dialog.close("yes") },
          action,
        ),
      ),
    );
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
