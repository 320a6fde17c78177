"use strict";
/** The images that go with the next question: shown with their tiles, tokens and predicted seconds. */

import { announce, byId, counted, duration, element, tell } from "./dom.js";
import { openImage, planOf, prepared } from "./images.js";
import { drawTiles, framed } from "./overlay.js";

/**
 * The list of pending images.
 * @param {function} detail returns the level of detail now.
 * @param {function} onProblem called with an error and the name of its image.
 */
export class Pending {
  constructor(detail, onProblem) {
    this.detail = detail;
    this.onProblem = onProblem;
    this.entries = [];
  }

  get count() {
    return this.entries.length;
  }

  /** Add files as images, in their order. */
  async add(files) {
    for (const file of files) {
      try {
        const entry = this.entry(await openImage(file));
        this.entries = [...this.entries, entry];  // another list: a refresh that still waits for plans sees the change
        announce(`${file.name || "image"} added`);
      } catch (error) {
        this.onProblem(error, file.name || "image");
      }
    }
    await this.refresh();
  }

  entry(image) {
    const { frame, layer } = image.shown ? framed(image.shown, image.name)
      : { frame: element("span.missing", {}, image.name), layer: element("div") };
    const plan = element("p.hint");
    const remove = element("button.remove", { type: "button", "aria-label": `Remove ${image.name}` }, "×");
    const item = element("li", {}, frame, plan, remove);
    const made = { image, item, layer, plan };
    remove.addEventListener("click", () => this.remove(made));
    return made;
  }

  remove(entry) {
    this.entries = this.entries.filter((one) => one !== entry);
    URL.revokeObjectURL(entry.image.shown);
    announce(`${entry.image.name} removed`);
    this.refresh();
    byId("text").focus();
  }

  /** Remove all images. */
  clear() {
    for (const { image } of this.entries) URL.revokeObjectURL(image.shown);
    this.entries = [];
    return this.refresh();
  }

  /** Show the plans of all images at the level of detail now. */
  async refresh() {
    const [entries, detail] = [this.entries, this.detail()];
    const list = byId("pending");
    list.replaceChildren(...entries.map(({ item }) => item));
    for (const id of ["pending", "detail-row", "grid-row"]) byId(id).hidden = entries.length === 0;
    try {
      const plans = await Promise.all(entries.map(({ image }) => planOf(image, detail)));
      if (entries !== this.entries || detail !== this.detail()) return;
      entries.forEach((entry, index) => showPlan(entry, plans[index]));
      tell(byId("plan"), plans.length ? inAll(plans) : "");
    } catch (error) {
      if (entries !== this.entries || detail !== this.detail()) return;
      tell(byId("plan"), "");
      this.onProblem(error, "the plan");
    }
  }

  /** Return all images as they are sent. */
  prepared() {
    const detail = this.detail();
    return Promise.all(this.entries.map(({ image }) => prepared(image, detail)));
  }
}

function showPlan({ image, layer, plan }, planned) {
  drawTiles(layer, planned);
  const { rows, cols, views } = planned;
  const isTiled = rows * cols > 1;
  const overview = views.some(({ kind }) => kind === "thumbnail") ? " + overview" : "";
  const shape = isTiled ? `${cols} × ${rows} tiles${overview}` : "one view";
  plan.textContent = `${image.width} × ${image.height}, ${shape}, ${counted(planned.image_tokens, "token")}`;
}

/** Return the plans of all images in words. */
function inAll(plans) {
  const sum = (value) => plans.reduce((total, plan) => total + value(plan), 0);
  const [tokens, seconds] = [sum((plan) => plan.prompt_tokens), sum((plan) => plan.seconds.all)];
  const { n_ctx: context, measured, costs_from: source } = plans[0];
  const certainty = measured ? "" : ` (${source})`;
  const room = tokens >= context ? ` That is more than the model's ${context} tokens: lower the detail.` : "";
  return `${counted(plans.length, "image")}: ${counted(tokens, "token")}, about ${duration(seconds)}${certainty}.${room}`;
}
