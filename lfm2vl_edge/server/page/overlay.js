"use strict";
/** What is drawn over an image: the tiles of its plan, boxes and points. Positions are fractions, so that all sizes fit. */

import { element } from "./dom.js";

const N_COLORS = 6;
const percent = (fraction) => `${(fraction * 100).toFixed(3)}%`;

/** Return an image with a layer over it, to be filled by `drawTiles` or `drawRegions`. */
export function framed(url, alt) {
  const layer = element("div.layer", { "aria-hidden": "true" });
  const image = element("img", { src: url, alt });
  return { frame: element("div.frame", {}, image, layer), layer };
}

/** Draw the lines between the tiles of a plan. */
export function drawTiles(layer, { rows, cols }) {
  const lines = [];
  for (let row = 1; row < rows; row += 1) lines.push(place(element("i.line.across"), { top: row / rows }));
  for (let col = 1; col < cols; col += 1) lines.push(place(element("i.line.down"), { left: col / cols }));
  layer.replaceChildren(...lines);
}

/** Draw boxes and points, each in the color of its label, and return their elements. */
export function drawRegions(layer, regions) {
  const labels = [...new Set(regions.map(({ label }) => label))];
  const made = regions.map((region) => {
    const color = `color-${labels.indexOf(region.label) % N_COLORS}`;
    return region.is_point ? point(region, color) : box(region, color);
  });
  layer.replaceChildren(...made);
  return made;
}

function box({ corners: [left, top, right, bottom], label }, color) {
  const name = element(`span.${top > 0.08 ? "above" : bottom < 0.92 ? "below" : "within"}`, {}, label);
  return place(element(`div.box.${color}`, {}, name), { left, top, width: right - left, height: bottom - top });
}

function point({ corners: [left, top], label }, color) {
  return place(element(`div.point.${color}`, {}, element("span", {}, label)), { left, top });
}

/** Set the position of an element, in fractions of the layer. */
function place(target, position) {
  for (const [side, fraction] of Object.entries(position)) target.style[side] = percent(fraction);
  return target;
}

/** Return a region in words: its label, and its place in pixels of the image. */
export function inWords({ label, corners, is_point: isPoint, content }, { height, width }) {
  const [left, top, right, bottom] = corners.map((value, index) => Math.round(value * (index % 2 ? height : width)));
  const where = isPoint ? `at ${left}, ${top}` : `${left}, ${top} to ${right}, ${bottom}`;
  return { label, where, content };
}
