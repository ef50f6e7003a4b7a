// Requests to the service. Every refusal is a problem document and becomes a `Refusal`.

/**
 * @typedef {{title: string, detail: string, remedy?: string, code?: string, type?: string, status?: number}} ProblemDocument
 */

export class Refusal extends Error {
  /** @param {ProblemDocument} problem */
  constructor(problem) {
    super(problem.detail);
    this.problem = problem;
  }
}

/** What is said when no answer came at all. @type {ProblemDocument} */
export const UNREACHABLE = {
  title: "The service did not answer",
  detail: "The connection was refused or broke off.",
  remedy: "Check that the service runs and repeat the step.",
};

/**
 * The answer to a request. The login's cookie goes with it; where it is missing or no longer good, the
 * reader is sent to the login and back.
 * @param {string} path
 * @param {RequestInit} [options]
 * @returns {Promise<Response>}
 * @throws {Refusal} for every answer that is not a success
 */
export async function call(path, options = {}) {
  const answer = await sent(path, options);
  if (answer.ok) return answer;
  throw new Refusal(parsedProblem(answer.status, await answer.text()));
}

/** @param {string} path @param {RequestInit} options */
async function sent(path, options) {
  try {
    return await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new Refusal(UNREACHABLE);
  }
}

/** @param {string} path @param {RequestInit} [options] @returns {Promise<any>} */
export async function getJson(path, options) {
  return (await call(path, options)).json();
}

/** @param {string} path @param {string} method @param {unknown} value @returns {Promise<any>} */
export async function sendJson(path, method, value) {
  return getJson(path, {
    method,
    body: JSON.stringify(value),
    headers: { "Content-Type": "application/json" },
  });
}

/**
 * The problem in a body, or one made of the status where there is none.
 * @param {number} status @param {string} body @returns {ProblemDocument}
 */
export function parsedProblem(status, body) {
  if (status === 401) location.assign(`/login?next=${encodeURIComponent(location.pathname)}`);
  try {
    const parsed = JSON.parse(body);
    if (typeof parsed.detail === "string" && typeof parsed.title === "string") return parsed;
  } catch {
    // Not from the service itself: a proxy answers in its own words.
  }
  return {
    title: `The answer was ${status}`,
    detail: body.slice(0, 300) || "It had no body.",
    status,
  };
}
