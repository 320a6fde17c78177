"use strict";
/** Elements: made, found, shown and filled. Text is only ever set as text, never as markup. */

/** Return the element with an id. */
export const byId = (id) => document.getElementById(id);

/**
 * Return a new element.
 * @param {string} tag its name, with classes after dots, such as "p.hint".
 * @param {Object<string, *>} attributes functions are listeners of the event of that name; false and null are left out.
 * @param {...(Node|string|null)} children null is left out.
 */
export function element(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const made = document.createElement(name);
  made.classList.add(...classes);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(key, value);
    else if (value !== false && value !== null) made.setAttribute(key, value === true ? "" : String(value));
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Show a text in an element that is hidden without one. */
export function tell(target, text) {
  target.textContent = text ?? "";
  target.hidden = !text;
}

/** Have a screen reader say a text once. */
export function announce(text) {
  const target = byId("announcer");
  target.textContent = "";
  setTimeout(() => { target.textContent = text; }, 50);
}

/** Return a duration in the unit that people read: "3.2 ms", "120 ms", "4.1 s". */
export function duration(seconds) {
  if (seconds >= 100) return `${Math.round(seconds)} s`;
  if (seconds >= 1) return `${seconds.toFixed(1)} s`;
  const ms = seconds * 1000;
  return `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

/** Return a count with its noun: "1 tile", "4 tiles". */
export const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
