// Numbers and times as people read them.

const THIN = "\u202f";

/** 1512581120 is `1.51 G`. @param {number} value */
export function count(value) {
  for (const [size, sign] of /** @type {[number, string][]} */ ([
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
    [1e4, "k"],
  ])) {
    if (value >= size) return `${significant(value / (sign === "k" ? 1e3 : size))}${THIN}${sign}`;
  }
  return significant(value);
}

/** 36650025 is `36.7 MB`. @param {number} value */
export function bytes(value) {
  for (const [size, sign] of /** @type {[number, string][]} */ ([
    [1e9, "GB"],
    [1e6, "MB"],
    [1e3, "kB"],
  ])) {
    if (value >= size) return `${significant(value / size)}${THIN}${sign}`;
  }
  return `${value}${THIN}B`;
}

/** Three significant digits, no exponent. @param {number} value */
export function significant(value) {
  if (Number.isInteger(value) && Math.abs(value) < 1e4) return String(value);
  return Math.abs(value) >= 1000 ? String(Math.round(value)) : String(Number(value.toPrecision(3)));
}

/** Milliseconds. @param {number} value */
export function milliseconds(value) {
  return value >= 1000 ? `${significant(value / 1000)}${THIN}s` : `${significant(value)}${THIN}ms`;
}

/** A small error such as 2.3e-14, written 2.3 x 10^-14. @param {number | null | undefined} value */
export function error(value) {
  if (value === null || value === undefined) return "not measured";
  if (value === 0) return "0";
  const [digits, exponent] = value.toExponential(1).split("e");
  if (Number(exponent) > -3) return significant(value);
  return `${digits}${THIN}×${THIN}10${superscript(Number(exponent))}`;
}

/** @param {number} exponent */
function superscript(exponent) {
  return String(exponent).replace(/./g, (sign) =>
    sign === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(sign)],
  );
}

/** 93784 seconds are `1 d 2 h`. @param {number} seconds */
export function duration(seconds) {
  const whole = Math.floor(seconds);
  const parts = /** @type {[number, string][]} */ ([
    [Math.floor(whole / 86400), "d"],
    [Math.floor(whole / 3600) % 24, "h"],
    [Math.floor(whole / 60) % 60, "min"],
    [whole % 60, "s"],
  ]);
  const first = Math.max(
    0,
    parts.findIndex(([amount]) => amount > 0),
  );
  const some = parts
    .slice(first === 0 && parts[0][0] === 0 ? 3 : first, first + 2)
    .filter(([amount], at) => amount > 0 || at === 0);
  return some.map(([amount, unit]) => `${amount}${THIN}${unit}`).join(" ");
}

/** A time of the API in the reader's own. @param {string} time */
export function when(time) {
  return new Date(time).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

/** [3, 224, 224] is `3×224×224`. @param {number[]} shape */
export function shape(shape) {
  return shape.join("×");
}

/** @param {number} amount @param {string} noun */
export function plural(amount, noun) {
  return `${amount} ${noun}${amount === 1 ? "" : "s"}`;
}
