// Prometheus' exposition text, as far as the service page reads it.

/**
 * @typedef {{name: string, labels: Record<string, string>, value: number}} Sample
 */

/** @param {string} text @returns {Sample[]} */
export function samples(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const [, name, labels, value] = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line) ?? [];
    if (name === undefined) continue; // a comment, or the end
    found.push({
      name,
      labels: parsedLabels(labels ?? ""),
      value: Number(value.replace("Inf", "Infinity")),
    });
  }
  return found;
}

/** @param {string} text */
function parsedLabels(text) {
  /** @type {Record<string, string>} */
  const labels = {};
  for (const [, name, value] of text.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g))
    labels[name] = value.replace(/\\(.)/g, (_, sign) => (sign === "n" ? "\n" : sign));
  return labels;
}

/** The sum of a family's samples that `wanted` lets through. @param {Sample[]} all @param {string} name @param {(labels: Record<string, string>) => boolean} [wanted] */
export function total(all, name, wanted = () => true) {
  return all.reduce(
    (sum, each) => (each.name === name && wanted(each.labels) ? sum + each.value : sum),
    0,
  );
}

/**
 * Cumulative counts of a histogram by upper bound, ascending, over all series that `wanted` lets through.
 * @param {Sample[]} all @param {string} name @param {(labels: Record<string, string>) => boolean} wanted
 * @returns {Map<number, number>}
 */
export function buckets(all, name, wanted) {
  /** @type {Map<number, number>} */
  const found = new Map();
  for (const each of all) {
    if (each.name !== `${name}_bucket` || !wanted(each.labels)) continue;
    const bound = Number(each.labels.le.replace("+Inf", "Infinity"));
    found.set(bound, (found.get(bound) ?? 0) + each.value);
  }
  return new Map([...found].sort(([a], [b]) => a - b));
}

/**
 * The quantile of what was counted between two readings, linear inside a bucket; null without counts.
 * @param {Map<number, number>} now @param {Map<number, number> | null} before @param {number} q
 * @returns {number | null}
 */
export function quantile(now, before, q) {
  const counts = [...now].map(
    ([bound, count]) =>
      /** @type {[number, number]} */ ([bound, count - (before?.get(bound) ?? 0)]),
  );
  const all = counts.length > 0 ? counts[counts.length - 1][1] : 0;
  if (all <= 0) return null;
  const rank = q * all;
  let [low, below] = [0, 0];
  for (const [bound, count] of counts) {
    if (count >= rank)
      return bound === Infinity ? low : low + ((bound - low) * (rank - below)) / (count - below);
    [low, below] = [bound, count];
  }
  return low;
}
