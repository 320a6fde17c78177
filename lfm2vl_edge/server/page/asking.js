"use strict";
/**
 * Asking the model for the answer of a turn, which grows in the turn itself.
 *
 * `show` has two functions: `piece(text)` is called with each piece of the answer, `regions()` when places were found.
 */

import { post, stream } from "./api.js";
import { contentOf, lastWithImages, messagesOf } from "./conversation.js";
import { decoding } from "./settings.js";
import { noteOf } from "./turns.js";

/** Ask with the whole conversation, and read what the answer says about places. */
export async function ask(turns, turn, signal, show) {
  const messages = messagesOf(turns, turn, turn.system);
  const body = { messages, response_format: turn.schema ?? undefined, ...decoding() };
  const { timings, usage } = await answered(turn, body, signal, show.piece);
  turn.note = noteOf(timings, usage);
  const shownOn = lastWithImages(turns, turns.indexOf(turn));
  if (shownOn >= 0 && /[{]|image_index/.test(turn.answer)) {
    turn.regions = await regionsIn(turn.answer, turns[shownOn].images);
    turn.shownOn = shownOn;
  }
}

/**
 * Ask for places in the images of the turn, or the last ones before it, alone: models were trained on that without a
 * conversation. Those that do not write which image a place is in are asked about each image.
 */
export async function detect(turns, turn, signal, show) {
  turn.shownOn = lastWithImages(turns, turns.indexOf(turn));
  const { images } = turns[turn.shownOn];
  const what = { what: turn.text === "everything" ? undefined : turn.text, n_images: images.length };
  const { all_at_once: isAtOnce, ...how } = await post("v1/boxes/question", what, signal);
  turn.question = how.question;
  const [timings, usage] = [{}, {}];
  for (const first of isAtOnce ? [0] : images.keys()) {
    const took = await detectIn(turn, isAtOnce ? images : [images[first]], first, how, signal, show);
    add(timings, took.timings);
    add(usage, took.usage);
  }
  turn.note = noteOf(timings, usage);
}

/** Ask for places in some images, of which the first has this number, and return timings and usage. */
async function detectIn(turn, images, first, { system, question, schema }, signal, show) {
  const messages = [{ role: "user", content: contentOf(images, question) }];
  if (system) messages.unshift({ role: "system", content: system });
  const format = schema ? { type: "json_schema", json_schema: { name: "boxes", schema } } : undefined;
  if (turn.answer) turn.answer += "\n";
  const start = turn.answer.length;
  const took = await answered(turn, { messages, response_format: format, ...decoding({ temperature: 0 }) }, signal, show.piece);
  const found = await regionsIn(turn.answer.slice(start), images);
  turn.regions = [...turn.regions, ...found.map((region) => ({ ...region, image: region.image + first }))];
  show.regions();
  return took;
}

/** Return the places in an answer about images; none if the server cannot tell. */
async function regionsIn(answer, images) {
  const sizes = images.map(({ height, width }) => ({ height, width }));
  return post("v1/boxes", { answer, images: sizes }).then(({ found }) => found, () => []);
}

function add(sums, values) {
  for (const [name, value] of Object.entries(values ?? {})) {
    if (typeof value === "number") sums[name] = (sums[name] ?? 0) + value;
  }
}

/** Stream an answer into a turn, and return its timings and usage. */
async function answered(turn, body, signal, onPiece) {
  const took = { timings: {}, usage: null };
  for await (const chunk of stream(body, signal)) {
    took.timings = chunk.timings ?? took.timings;
    took.usage = chunk.usage ?? took.usage;
    const piece = chunk.choices[0]?.delta.content;
    if (!piece) continue;
    turn.answer += piece;
    onPiece(piece);
  }
  return took;
}
