"use strict";
/** Requests to the server that this page comes from, and its errors. */

const KEY = "lfm2vl-edge:key";
const LARGE_BYTES = 500_000;
const AGAIN_MS = 200;

/** An error of a request: a status of HTTP, 0 if the server does not answer, and a text for people. */
export class Problem extends Error {
  constructor(status, message, code = null, retryAfter = null) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

/** Keep the API key until the tab is closed. */
export const setKey = (key) => sessionStorage.setItem(KEY, key);

/** Return the headers of a request. */
function headersOf(body) {
  const key = sessionStorage.getItem(KEY);
  return { ...(body ? { "Content-Type": "application/json" } : {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

/**
 * Return the response of a request; the path is relative to the page, so that a proxy may put it anywhere.
 * @throws {Problem}
 */
async function request(path, body, signal) {
  const text = body === undefined ? undefined : JSON.stringify(body);
  let response;
  try {
    const method = text === undefined ? "GET" : "POST";
    response = await fetch(new URL(path, document.baseURI), { method, body: text, headers: headersOf(text), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw await unanswered(text?.length ?? 0);
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

/** Return the error of a request without a response: servers close the connection in the middle of a very large one. */
async function unanswered(size) {
  if (size > LARGE_BYTES && await isAlive()) {
    return new Problem(413, `The message has ${(size / 1e6).toFixed(1)} MB, more than the server accepts.`, "too_large");
  }
  return new Problem(0, "The server does not answer. Once it runs again, this page goes on.");
}

/** Return the error that a response is: OpenAI's error object, or a proxy's page. */
async function problemOf(response) {
  const { error } = await response.json().catch(() => ({}));
  const message = error?.message ?? `The server answered with ${response.status} ${response.statusText}.`;
  const seconds = Number.parseInt(response.headers.get("Retry-After"), 10);
  return new Problem(response.status, message, error?.code ?? null, Number.isFinite(seconds) ? seconds : null);
}

/** Return whether the server answers, and has loaded its model. */
export async function isAlive() {
  try {
    return (await fetch(new URL("health", document.baseURI), { cache: "no-store" })).ok;
  } catch {
    return false;
  }
}

/** Return the object that the server has at a path. */
export const get = async (path) => (await request(path)).json();

/**
 * Return the server's answer to an object, for requests that change nothing: without a response, as from a connection
 * that was closed while it was idle, it is sent once more.
 */
export async function post(path, body, signal) {
  const again = async (error) => {
    if (error.status !== 0) throw error;
    await new Promise((resolve) => { setTimeout(resolve, AGAIN_MS); });
    return request(path, body, signal);
  };
  return (await request(path, body, signal).catch(again)).json();
}

/**
 * Yield the chunks of a streamed chat completion.
 * @throws {Problem} also in the middle.
 */
export async function* stream(body, signal) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", { ...body, ...options }, signal);
  for await (const data of events(response.body.pipeThrough(new TextDecoderStream()).getReader())) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Problem(500, chunk.error.message, chunk.error.code);
    yield chunk;
  }
  throw new Problem(0, "The server went away before the answer was complete.");
}

/** Yield the data of server-sent events, each of one line, as this server sends them. */
async function* events(reader) {
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ")) yield part.slice(6);
    }
  }
}
