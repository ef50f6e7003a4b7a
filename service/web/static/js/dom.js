// Building the page. Text goes in as text nodes, so nothing a file or a client says becomes markup.

const SVG = "http://www.w3.org/2000/svg";

/**
 * @typedef {Node | string | number | null | undefined | false} Child
 * @typedef {Record<string, unknown>} Attributes
 */

/**
 * An HTML element. Attributes that start with `on` are listeners; true is an empty attribute; null,
 * undefined and false leave one out.
 * @param {string} tag
 * @param {Attributes} [attributes]
 * @param {...(Child | Child[])} children
 * @returns {any}
 */
export function h(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/**
 * An SVG element; see `h`.
 * @param {string} tag
 * @param {Attributes} [attributes]
 * @param {...(Child | Child[])} children
 * @returns {any}
 */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

/** @param {Element} element @param {Attributes} attributes @param {(Child | Child[])[]} children */
function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), /** @type {any} */ (value));
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(
    ...children
      .flat()
      .filter(shown)
      .map((child) => (child instanceof Node ? child : String(child))),
  );
  return element;
}

/** @param {Child} child */
function shown(child) {
  return child !== null && child !== undefined && child !== false;
}

/** @param {string} id @returns {any} The page's element with that id, which must be there. */
export function byId(id) {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`The page has no #${id}.`);
  return found;
}

/** Put `children` in the place of what `element` holds. @param {Element} element @param {...Child} children */
export function fill(element, ...children) {
  element.replaceChildren(
    ...children.filter(shown).map((child) => (child instanceof Node ? child : String(child))),
  );
}

/** Tell screen readers. @param {string} text */
export function announce(text) {
  byId("announcer").textContent = text;
}

/** A pair of a `dl`. @param {string} name @param {...Child} value */
export function fact(name, ...value) {
  return h("div", {}, h("dt", {}, name), h("dd", {}, ...value));
}

/** A state or status as a word with a dot. @param {string} state */
export function badge(state) {
  return h("span", { class: `badge ${state}` }, state);
}
