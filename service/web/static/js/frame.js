// What every page has: the theme's button.

/** @type {Record<string, string>} */
const NEXT = { system: "light", light: "dark", dark: "system" };

function setUpTheme() {
  const button = /** @type {HTMLButtonElement} */ (document.getElementById("theme"));
  const root = document.documentElement;
  const current = () => root.dataset.theme ?? "system";
  const show = () => {
    button.textContent = `Theme: ${current()}`;
  };
  button.addEventListener("click", () => {
    const next = NEXT[current()];
    if (next === "system") delete root.dataset.theme;
    else root.dataset.theme = next;
    try {
      if (next === "system") localStorage.removeItem("foldserve.theme");
      else localStorage.setItem("foldserve.theme", next);
    } catch {
      // Storage is off: the choice lasts as long as the page.
    }
    show();
    dispatchEvent(new Event("themechange"));
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
    dispatchEvent(new Event("themechange")),
  );
  show();
  button.hidden = false;
}

setUpTheme();
