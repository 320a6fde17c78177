"use strict";
/** What is chosen on the page and kept in this browser: colors, mode, detail, schema, decoding settings. */

import { byId } from "./dom.js";

const NAME = "lfm2vl-edge:settings";
const THEMES = { auto: "as the system", light: "light", dark: "dark" };
const EXAMPLE = {
  type: "object",
  properties: { description: { type: "string", maxLength: 200 }, count: { type: "integer", minimum: 0, maximum: 99 } },
  required: ["description", "count"],
  additionalProperties: false,
};
const FIELDS = ["schema", "temperature", "most", "system"];

/** Return what is kept. */
function read() {
  try {
    return JSON.parse(localStorage.getItem(NAME) ?? "{}") ?? {};
  } catch {
    return {};
  }
}

/** Keep one value more. */
export function keep(name, value) {
  try {
    localStorage.setItem(NAME, JSON.stringify({ ...read(), [name]: value }));
  } catch {
    // without space, the choice is for this visit
  }
}

/** Return a kept value. */
export const kept = (name) => read()[name];

/** Fill the fields with what is kept, and keep what is changed. */
export function listen() {
  setTheme(kept("theme") ?? "auto");
  byId("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES);
    const next = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
    setTheme(next);
    keep("theme", next);
  });
  for (const id of FIELDS) {
    byId(id).value = kept(id) ?? (id === "schema" ? JSON.stringify(EXAMPLE, null, 2) : "");
    byId(id).addEventListener("change", ({ target }) => keep(id, target.value));
  }
}

function setTheme(name) {
  const known = name in THEMES ? name : "auto";
  document.documentElement.dataset.theme = known;
  byId("theme").setAttribute("aria-label", `Colors: ${THEMES[known]}`);
  byId("theme").title = `Colors: ${THEMES[known]}`;
}

/** Return the decoding fields of a request; empty ones have other defaults, or else the server's. */
export function decoding(defaults = {}) {
  const number = (id) => (byId(id).value === "" ? undefined : byId(id).valueAsNumber);
  return { temperature: number("temperature") ?? defaults.temperature, max_tokens: number("most") };
}

/** Return the system prompt. */
export const systemPrompt = () => byId("system").value.trim();

/**
 * Return the response format of the schema field; an empty one means any JSON object.
 * @throws {SyntaxError} it is not a JSON object.
 */
export function responseFormat() {
  const text = byId("schema").value.trim();
  if (text === "") return { type: "json_object" };
  const schema = JSON.parse(text);
  if (typeof schema !== "object" || schema === null || Array.isArray(schema)) throw new SyntaxError("it is not an object");
  return { type: "json_schema", json_schema: { name: "answer", schema } };
}
