// Files dropped onto a place, which shows that it would take them.

/**
 * @param {EventTarget} area Where they may be dropped: the window, or the place itself.
 * @param {Element} place What shows it.
 * @param {(files: FileList | null) => void} take
 */
export function takeDropped(area, place, take) {
  let depth = 0; // entering a child comes before leaving its parent
  const shown = (/** @type {number} */ now) => {
    depth = now;
    place.classList.toggle("over", depth > 0);
  };
  area.addEventListener("dragover", (event) => event.preventDefault());
  area.addEventListener("dragenter", () => shown(depth + 1));
  area.addEventListener("dragleave", () => shown(depth - 1));
  area.addEventListener("drop", (event) => {
    event.preventDefault();
    shown(0);
    take(/** @type {DragEvent} */ (event).dataTransfer?.files ?? null);
  });
}
