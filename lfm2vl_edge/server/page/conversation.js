"use strict";
/**
 * The conversation: a list of turns, what of it the server gets, and its copy in this browser.
 *
 * A turn: {mode, text, question, system, schema, images, answer, status, problem, note, regions, shownOn}.
 * `text` is what the person wrote and `question` what the model got; `images` are as `prepared` returns them; `status` is
 * running, done, stopped or failed; `regions` are places in the images of the turn with the number `shownOn`.
 */

import { reduced } from "./images.js";

const NAME = "lfm2vl-edge:conversation";
const SIDES = [1024, 512, 0];  // of images in the copy, if it has no space for all pixels; 0 leaves them out
const KEPT = ["mode", "text", "question", "system", "schema", "images", "answer", "status", "problem", "note", "regions",
  "shownOn"];

/** Return a new turn. */
export function newTurn(fields) {
  return { question: fields.text, system: "", schema: null, answer: "", status: "running", problem: "", note: "",
    regions: [], shownOn: null, ...fields };
}

/** Return the parts of a message with images and a text. */
export function contentOf(images, text) {
  const parts = images.map(({ url, detail }) => ({ type: "image_url", image_url: { url, detail } }));
  return [...parts, { type: "text", text }];
}

/** Return the messages of a conversation up to and with a turn; turns without an answer are left out. */
export function messagesOf(turns, last, system) {
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns.slice(0, turns.indexOf(last))) {
    if (!turn.answer) continue;
    messages.push({ role: "user", content: contentOf(sendable(turn), turn.question) });
    messages.push({ role: "assistant", content: turn.answer });
  }
  return [...messages, { role: "user", content: contentOf(sendable(last), last.question) }];
}

/** Return the images of a turn that are still there. */
const sendable = (turn) => turn.images.filter(({ url }) => url !== null);

/** Return the number of the last turn with images, up to and with one; -1 if there is none. */
export function lastWithImages(turns, number) {
  while (number >= 0 && turns[number].images.length === 0) number -= 1;
  return number;
}

const isTurn = (turn) => typeof turn?.text === "string" && typeof turn.answer === "string" && Array.isArray(turn.images);

/** Return the turns that this browser keeps; what was running when the page was closed can be tried again. */
export function stored() {
  try {
    const { version, turns } = JSON.parse(localStorage.getItem(NAME) ?? "{}");
    if (version !== 1) return [];
    return turns.filter(isTurn).map((turn) => newTurn(turn.status === "running"
      ? { ...turn, status: "failed", problem: "The page was closed before the answer was complete." } : turn));
  } catch {
    return [];
  }
}

/**
 * Keep turns in this browser, with smaller images if there is no space for all, and return what is missing, in words.
 */
export async function store(turns) {
  if (turns.length === 0) {
    localStorage.removeItem(NAME);
    return "";
  }
  if (written(turns.map(plain))) return "";
  for (const side of SIDES) {
    if (written(await Promise.all(turns.map((turn) => withSmaller(plain(turn), side))))) {
      return side ? "This browser keeps smaller copies of the images only: the conversation is long."
        : "This browser has no space for the images: after a reload, the conversation goes on without them.";
    }
  }
  return "This browser has no space for the conversation: a reload loses it.";
}

const plain = (turn) => Object.fromEntries(KEPT.map((name) => [name, turn[name]]));

function written(turns) {
  try {
    localStorage.setItem(NAME, JSON.stringify({ version: 1, turns }));
    return true;
  } catch {
    return false;
  }
}

async function withSmaller(turn, side) {
  const images = turn.images.map(async (image) => ({
    ...image, url: side && image.url ? await reduced(image.url, side).catch(() => null) : null,
  }));
  return { ...turn, images: await Promise.all(images) };
}
