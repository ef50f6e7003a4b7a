// The chosen theme, set before the first paint; a classic script, because modules run too late.
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("foldserve.theme");
  } catch {
    // Storage is off: the system's theme it is.
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
