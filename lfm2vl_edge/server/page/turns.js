"use strict";
/** How turns appear: the question with its images, the answer as it comes, boxes, times and what went wrong. */

import { counted, duration, element, tell } from "./dom.js";
import { drawRegions, framed, inWords } from "./overlay.js";

/**
 * The elements of a turn.
 * @param {object} turn see conversation.js.
 * @param {number} number of the turn, from 0.
 * @param {function} onRetry called to ask again.
 */
export class TurnView {
  constructor(turn, number, onRetry) {
    this.turn = turn;
    this.text = element("div.text");
    this.regions = element("div.regions", { hidden: true });
    this.note = element("p.note", { hidden: true });
    this.problem = element("p.problem", { hidden: true });
    this.retry = element("button.quiet", { type: "button", click: onRetry, hidden: true }, "Try again");
    this.answer = element("div.answer", {}, element("h2.hidden", {}, `Answer ${number + 1}`), this.regions, this.text,
      this.note, this.problem, this.retry);
    this.root = element("article.turn", {}, this.question(number), this.answer);
  }

  question(number) {
    const { images, text, mode } = this.turn;
    const items = images.map((image, index) => element("li", {}, shownImage(image, index)));
    const label = { detect: "Detect", json: "JSON" }[mode];
    return element("div.question", {}, element("h2.hidden", {}, `Question ${number + 1}`),
      items.length ? element("ul.images", { "aria-label": "Images" }, ...items) : null,
      element("p", {}, label ? element("span.tag", {}, label) : null, text));
  }

  /** Show the state of the turn, with the images that its boxes are in. */
  update(images) {
    const { status, answer, note, problem, mode, regions } = this.turn;
    this.answer.dataset.status = status;
    this.answer.setAttribute("aria-busy", String(status === "running"));
    this.text.textContent = mode === "json" && status === "done" ? indented(answer) : answer;
    this.text.classList.toggle("code", mode !== "ask");
    this.drawAll(images);
    if (mode === "detect" && status === "done") this.fold(regions.length === 0);
    tell(this.note, note);
    tell(this.problem, problem);
    this.retry.hidden = status !== "failed" && status !== "stopped";
  }

  /** Append a piece of the answer. */
  append(piece) {
    this.text.append(piece);
  }

  /** Put the model's own words of a detection below a line that opens. */
  fold(isEmpty) {
    const answer = this.turn.answer;
    const words = element("details", {}, element("summary", {}, "The model's answer"), element("pre", {}, answer));
    this.text.replaceChildren(isEmpty ? element("p", {}, "Nothing found.") : "", words);
    this.text.classList.remove("code");
  }

  /** Draw the regions of the turn on its images. */
  drawAll(images) {
    const { regions } = this.turn;
    this.regions.hidden = regions.length === 0;
    const shown = images.map((image, index) => [image, regions.filter((one) => one.image === index), index]);
    this.regions.replaceChildren(...shown.filter(([, inside]) => inside.length).map(([...one]) => annotated(...one)));
  }
}

/** Return an image with its regions drawn, and a list of them. */
function annotated(image, regions, index) {
  const { frame, layer } = image.url === null
    ? { frame: missing(image), layer: element("div") } : framed(image.url, altOf(image, index));
  const boxes = drawRegions(layer, regions);
  const items = regions.map((region, number) => {
    const { label, where, content } = inWords(region, image);
    const mark = (isMarked) => () => boxes[number].classList.toggle("marked", isMarked);
    return element("li", { mouseenter: mark(true), mouseleave: mark(false) }, element("b", {}, label), ` ${where}`,
      content ? element("p", {}, content) : null);
  });
  return element("figure", {}, frame, element("figcaption", {}, element("ul", { "aria-label": "Found" }, ...items)));
}

function shownImage(image, index) {
  return image.url === null ? missing(image) : element("img", { src: image.url, alt: altOf(image, index) });
}

const missing = ({ name }) => element("span.missing", {}, `${name} (not kept)`);
const altOf = ({ name, height, width }, index) => `Image ${index + 1}: ${name}, ${width} by ${height} pixels`;

function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** Return in words what an answer took, of the server's `timings` and `usage`, summed over its requests. */
export function noteOf(timings, usage) {
  const [views, encoded] = [timings.views ?? 0, timings.encoded_views ?? 0];
  const took = duration((timings.preprocess_ms + timings.encode_ms) / 1000);
  const image = views === 0 ? null : encoded === 0 ? `image reused, ${took}`
    : encoded === views ? `image encoded in ${took}` : `${encoded} of ${counted(views, "view")} encoded in ${took}`;
  const known = timings.cache_n ? ` (${timings.cache_n} known already)` : "";
  const prompt = usage ? `${usage.prompt_tokens} prompt tokens${known}` : null;
  const speed = timings.predicted_ms > 0 ? `, ${Math.round(timings.predicted_n / (timings.predicted_ms / 1000))} per second` : "";
  return [image, prompt, `${counted(timings.predicted_n, "token")}${speed}`].filter(Boolean).join(" · ");
}
