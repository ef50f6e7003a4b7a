// Server-sent events over fetch: unlike EventSource it tells why it was refused. Resumes where it broke off.
import { call, Refusal } from "./api.js";

const PATIENCE_MS = 1000;

/** @typedef {{id: string, kind: string, data: any}} ServerEvent */

/**
 * A version's events until its final state.
 * @param {string} path
 * @returns {AsyncGenerator<ServerEvent>}
 */
export async function* follow(path) {
  let last = "";
  for (;;) {
    try {
      /** @type {Record<string, string>} */
      const headers = last === "" ? {} : { "Last-Event-ID": last };
      const answer = await call(path, { headers: { Accept: "text/event-stream", ...headers } });
      for await (const event of parsed(/** @type {ReadableStream<Uint8Array>} */ (answer.body))) {
        last = event.id;
        yield event;
        if (event.kind === "state" && ["ready", "rejected"].includes(event.data.state)) return;
      }
    } catch (error) {
      if (error instanceof Refusal && error.problem.status !== undefined) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, PATIENCE_MS));
  }
}

/** @param {ReadableStream<Uint8Array>} body @returns {AsyncGenerator<ServerEvent>} */
export async function* parsed(body) {
  const reader = body.pipeThrough(/** @type {any} */ (new TextDecoderStream())).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = /** @type {string} */ (blocks.pop());
    for (const block of blocks) {
      const event = one(block);
      if (event !== null) yield event;
    }
  }
}

/** @param {string} block @returns {ServerEvent | null} */
function one(block) {
  const fields = new Map();
  for (const line of block.split("\n")) {
    const [, name, value] = /^([^:]+): ?(.*)$/.exec(line) ?? [];
    if (name !== undefined) fields.set(name, value);
  }
  if (!fields.has("data")) return null; // a heartbeat
  return {
    id: fields.get("id") ?? "",
    kind: fields.get("event") ?? "message",
    data: JSON.parse(fields.get("data")),
  };
}
