// uPlot in the page's colours, as wide as its place, redrawn when the theme changes.

/** The theme's colours as the canvas needs them: resolved. */
export function colours() {
  const probe = document.createElement("span");
  document.body.append(probe);
  const resolved = (/** @type {string} */ name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  };
  const found = {
    ink: resolved("--ink"),
    faint: resolved("--faint"),
    line: resolved("--line"),
    train: resolved("--before"),
    deploy: resolved("--accent"),
    warn: resolved("--warn"),
  };
  probe.remove();
  return found;
}

/**
 * @typedef {ReturnType<typeof colours> & {axis: Record<string, unknown>}} Paint
 */

/**
 * @param {HTMLElement} place
 * @param {any[]} data As uPlot takes it.
 * @param {(paint: Paint) => any} options
 * @returns {{setData: (data: any[]) => void}}
 */
export function chart(place, data, options) {
  let now = data;
  /** @type {any} */
  let plot = null;
  const draw = () => {
    plot?.destroy();
    const paint = colours();
    const font = "12px system-ui, sans-serif";
    const axis = {
      stroke: paint.faint,
      grid: { stroke: paint.line, width: 1 },
      ticks: { stroke: paint.line, width: 1 },
      font,
      labelFont: font,
    };
    plot = new /** @type {any} */ (globalThis).uPlot(
      {
        width: Math.max(place.clientWidth, 200),
        height: Math.max(place.clientHeight, 160),
        ...options({ ...paint, axis }),
      },
      now,
      place,
    );
  };
  draw();
  addEventListener("themechange", draw);
  let width = place.clientWidth;
  new ResizeObserver(() => {
    if (place.clientWidth === width || place.clientWidth === 0) return;
    width = place.clientWidth;
    plot.setSize({ width, height: place.clientHeight });
  }).observe(place);
  return {
    setData(fresh) {
      now = fresh;
      plot.setData(fresh);
    },
  };
}
