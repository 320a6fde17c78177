"use strict";
/** The page: connects to the server, and asks its model. */

import { Problem, get, isAlive, setKey } from "./api.js";
import { ask, detect } from "./asking.js";
import { listen as listenToImages } from "./attach.js";
import { lastWithImages, newTurn, store, stored } from "./conversation.js";
import { announce, byId, element, tell } from "./dom.js";
import { forgetPlans } from "./images.js";
import { Pending } from "./pending.js";
import * as settings from "./settings.js";
import { TurnView } from "./turns.js";

const RETRY_MS = 1500;
const LEVELS = ["fast", "balanced", "full"];
const HINTS = {
  ask: ["Question", "Ask a question"],
  detect: ["What to detect", "Such as: red car"],
  json: ["Question", "Ask; the answer is JSON"],
};
let turns = [];
let views = [];
let running = null;
let isBusy = false;
let isWaiting = false;
let isFollowing = true;
const levels = [...LEVELS];
const pending = new Pending(() => levels[byId("detail").value], onImageProblem);
const mode = () => document.querySelector("input[name=mode]:checked").value;

// --- the server ---

/** Read what the server has, and show it; wait for the server if it is not ready. */
async function connect() {
  try {
    const [{ data: [model] }, props] = await Promise.all([get("v1/models"), get("props")]);
    forgetPlans();
    showModel(model, props);
    setState("ready", "ready");
    byId("key-form").hidden = true;
    byId("composer").hidden = false;
    await pending.refresh();
  } catch (error) {
    onServerProblem(error);
  }
}

function setState(state, text) {
  Object.assign(byId("state").dataset, { state });
  byId("state").textContent = text;
}

/** Show the state that an error of the server means; return whether it is one of the server, not of the request. */
function onServerProblem(error) {
  if (!(error instanceof Problem)) throw error;
  if (error.status === 401) {
    askForKey(error);
  } else if (error.status === 0 || error.code === "loading") {
    setState(error.status ? "loading" : "gone", error.status ? "loading the model" : "no connection");
    waitForServer();
  } else {
    setState("gone", "refused");
    tell(byId("problem"), error.message);
  }
}

/** Ask now and then whether the server is there, and connect once it is. */
async function waitForServer() {
  if (isWaiting) return;
  isWaiting = true;
  do {
    await new Promise((resolve) => { setTimeout(resolve, RETRY_MS); });
  } while (!await isAlive());
  isWaiting = false;
  await connect();
  announce("The server is ready.");
}

function askForKey(error) {
  const hadKey = !byId("key-form").hidden && byId("key").value !== "";
  setState("gone", "key needed");
  byId("key-form").hidden = false;
  byId("composer").hidden = true;
  tell(byId("key-problem"), hadKey ? error.message : "");
  byId("key").focus();
}

function showModel(model, props) {
  byId("model").textContent = model.id;
  document.title = `${model.id} · lfm2vl-edge`;
  const { params } = props.default_generation_settings;
  byId("temperature").placeholder = params.temperature ?? "the model's";
  byId("most").placeholder = params.max_tokens ?? "the server's";
  showLevels(props.detail);
  const facts = {
    Model: [model.id, ...model.aliases].join(", "),
    Context: `${model.max_model_len} tokens`,
    "Image settings": props.image_settings,
    Sampling: Object.entries(params).map(([name, value]) => `${name} ${value}`).join(", "),
    "Answers at the same time": props.total_slots,
    "Largest request": `${props.limits.max_images} images, ${props.limits.max_body / 1e6} MB`,
    Server: props.build_info,
  };
  byId("facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [
    element("dt", {}, name), element("dd", {}, String(value)),
  ]));
}

/** Put the slider to the level that was chosen, else to the server's own, which is `auto` if it has no name in a request. */
function showLevels(own) {
  levels.splice(0, levels.length, ...LEVELS);
  if (!LEVELS.includes(own)) levels.splice(2, 0, "auto");
  const chosen = levels.indexOf(settings.kept("detail"));
  const slider = byId("detail");
  slider.max = levels.length - 1;
  slider.value = chosen >= 0 ? chosen : Math.max(levels.indexOf(own), levels.indexOf("auto"));
  showLevel();
}

function showLevel() {
  const name = levels[byId("detail").value];
  byId("detail-name").textContent = name;
  byId("detail").setAttribute("aria-valuetext", name);
}

// --- turns ---

/** Add a turn to the page. */
function show(turn) {
  const number = turns.push(turn) - 1;
  const view = new TurnView(turn, number, () => run(number));
  views.push(view);
  byId("conversation").append(view.root);
  byId("welcome").hidden = true;
  refresh(number);
}

function refresh(number) {
  const { shownOn } = turns[number];
  views[number].update(shownOn === null ? [] : turns[shownOn]?.images ?? []);
}

/** Keep the end of the conversation in view while it grows, unless the person has scrolled up. */
function follow() {
  const page = document.documentElement;
  const toEnd = () => { if (isFollowing) page.scrollTop = page.scrollHeight; };
  document.addEventListener("scroll", () => {
    isFollowing = page.scrollHeight - page.scrollTop - page.clientHeight < 40;
  }, { passive: true });
  const observer = new ResizeObserver(toEnd);
  for (const part of [byId("conversation"), document.querySelector("footer")]) observer.observe(part);
}

/** Send what is in the composer as the next turn. */
async function send() {
  const text = byId("text").value.trim();
  tell(byId("problem"), "");
  if (isBusy || (text === "" && !(mode() === "detect"))) return;
  let schema = null;
  try {
    schema = mode() === "json" ? settings.responseFormat() : null;
  } catch (error) {
    byId("schema-row").open = true;
    tell(byId("schema-problem"), `The schema is not valid JSON: ${error.message}`);
    byId("schema").focus();
    return;
  }
  if (mode() === "detect" && pending.count === 0 && lastWithImages(turns, turns.length - 1) < 0) {
    tell(byId("problem"), "Add an image to detect something in.");
    return;
  }
  setBusy(true);
  try {
    const images = await pending.prepared();
    const turn = newTurn({ mode: mode(), text: text || "everything", images, schema, system: settings.systemPrompt() });
    byId("text").value = "";
    fit();
    await pending.clear();
    isFollowing = true;
    show(turn);
  } catch (error) {
    setBusy(false);
    onImageProblem(error, "the image");
    return;
  }
  setBusy(false);
  await run(turns.length - 1);
}

/** Ask for the answer of a turn, for the first time or again. */
async function run(number) {
  if (isBusy) return;
  const turn = turns[number];
  Object.assign(turn, { status: "running", answer: "", problem: "", note: "", regions: [], shownOn: null });
  running = new AbortController();
  setBusy(true);
  refresh(number);
  save();
  try {
    await (turn.mode === "detect" ? detect : ask)(turns, turn, running.signal, shownBy(number, turn));
    turn.status = "done";
  } catch (error) {
    onAnswerProblem(turn, error);
  }
  running = null;
  setBusy(false);
  refreshIfThere(number, turn);
  announce(turn.status === "failed" ? turn.problem : `Answer: ${spoken(turn)}`);
  await save();
}

/** Return what shows a turn while it is answered, until the conversation is cleared. */
function shownBy(number, turn) {
  const isThere = () => turns[number] === turn;
  return {
    piece: (text) => { if (isThere()) views[number].append(text); },
    regions: () => { if (isThere()) views[number].drawAll(turns[turn.shownOn].images); },
  };
}

const spoken = ({ mode: kind, regions, answer, status }) =>
  kind === "detect" && status === "done" ? `${regions.length} found: ${regions.map(({ label }) => label).join(", ")}` : answer;

/** Show a turn, unless the conversation was cleared in the meantime. */
function refreshIfThere(number, turn) {
  if (turns[number] === turn) refresh(number);
}

function onAnswerProblem(turn, error) {
  if (error.name === "AbortError") {
    Object.assign(turn, { status: "stopped", note: "stopped" });
    return;
  }
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  const known = error instanceof Problem ? `${error.message}${wait}` : `This page failed: ${error.message}`;
  Object.assign(turn, { status: "failed", problem: known });
  if (error.status === 0 || error.status === 401 || error.code === "loading") onServerProblem(error);
}

async function save() {
  const missing = await store(turns);
  if (missing) tell(byId("problem"), missing);
}

// --- the composer ---

function setBusy(busy) {
  const wasStop = document.activeElement === byId("stop");
  const wasSend = document.activeElement === byId("send");
  isBusy = busy;
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  if (busy && wasSend) byId("stop").focus();
  if (!busy && wasStop) byId("text").focus();
}

const stop = () => running?.abort();

function clear() {
  stop();
  [turns, views] = [[], []];
  byId("conversation").replaceChildren();
  byId("welcome").hidden = false;
  tell(byId("problem"), "");
  pending.clear();
  save();
  announce("The conversation is cleared.");
  byId("text").focus();
}

function onImageProblem(error, name) {
  if (error.status === 0 || error.status === 401 || error.code === "loading") onServerProblem(error);
  if (error.status !== 401) tell(byId("problem"), `${name}: ${error.message}`);
}

/** Make the text field as high as its text, within limits that the style sheet has. */
function fit() {
  const field = byId("text");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

function showMode() {
  const [label, hint] = HINTS[mode()];
  byId("text-label").textContent = label;
  byId("text").placeholder = hint;
  byId("schema-row").hidden = mode() !== "json";
}

function onKey(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
}

function listen() {
  settings.listen();
  listenToImages((files) => { tell(byId("problem"), ""); pending.add(files); });
  byId("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  byId("key-form").addEventListener("submit", (event) => { event.preventDefault(); setKey(byId("key").value); connect(); });
  byId("stop").addEventListener("click", stop);
  byId("clear").addEventListener("click", clear);
  byId("text").addEventListener("keydown", onKey);
  byId("text").addEventListener("input", fit);
  byId("schema").addEventListener("input", () => tell(byId("schema-problem"), ""));
  byId("grid").addEventListener("change", ({ target }) => byId("pending").classList.toggle("plain", !target.checked));
  byId("detail").addEventListener("input", () => {
    showLevel();
    settings.keep("detail", levels[byId("detail").value]);
    pending.refresh();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && running) stop(); });
  for (const input of document.querySelectorAll("input[name=mode]")) {
    input.checked = input.value === (settings.kept("mode") ?? "ask");
    input.addEventListener("change", () => { settings.keep("mode", mode()); showMode(); });
  }
  if (!document.querySelector("input[name=mode]:checked")) byId("mode-ask").checked = true;
  showMode();
}

listen();
follow();
stored().forEach(show);
connect();
