"use strict";
/** Images: read, turned upright, planned by the server, and shrunk to what the plan needs before they are sent. */

import { post } from "./api.js";

const KEPT_TYPES = new Set(["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"]);
const MOST_KEPT_BYTES = 4_000_000;
const LEAST_GAIN = 0.8;  // an image that would keep more than this share of its sides is sent as it is
const MARGINS = [1, 1.5, 2.2];  // how much larger than needed, if the smallest size would get another plan
const QUALITY = 0.95;
const plans = new Map();

/**
 * Return an image to send: its file, name, height and width in pixels once upright, and a URL to show it with, or null
 * if this browser cannot decode it; then the server may be able to.
 * @throws {Problem} the server cannot decode it either.
 */
export async function openImage(file) {
  const name = file.name || "image";
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" }).catch(() => null);
  if (bitmap === null) {
    const { height, width } = await post("v1/plan", { image: await dataUrl(file) });
    return { file, name, height, width, shown: null };
  }
  const { height, width } = bitmap;
  bitmap.close();
  return { file, name, height, width, shown: URL.createObjectURL(file) };
}

/** Return the server's plan of a size at a level of detail; the same one is requested once. */
export function planOf({ height, width }, detail) {
  const key = `${height}x${width} ${detail}`;
  if (!plans.has(key)) {
    const planned = post("v1/plan", { height, width, detail });
    plans.set(key, planned);
    planned.catch(() => plans.delete(key));
  }
  return plans.get(key);
}

/** Forget all plans: another server may have other settings. */
export const forgetPlans = () => plans.clear();

/**
 * Return what is sent of an image: {url, name, height, width, detail}, the URL with the data.
 * A file that is hardly larger than its plan needs is sent as it is; the server turns it upright as well.
 */
export async function prepared(image, detail) {
  const { file, name, height, width, shown } = image;
  const small = shown === null ? null : await smallerSize(image, detail);
  const isKept = shown === null || (small === null && KEPT_TYPES.has(file.type) && file.size <= MOST_KEPT_BYTES);
  if (isKept) return { url: await dataUrl(file), name, height, width, detail };
  const size = small ?? { height, width };
  return { url: await redrawn(file, size), name, ...size, detail };
}

/** Return the smallest size that gets the same plan, or null if that is not much smaller. */
async function smallerSize(image, detail) {
  const plan = await planOf(image, detail);
  const least = Math.max(...needed(plan).map((side, axis) => side / (axis ? image.width : image.height)));
  for (const margin of MARGINS) {
    if (least * margin > LEAST_GAIN) return null;
    const size = sameShape(image, least * margin);
    if (isSame(plan, await planOf(size, detail))) return size;
  }
  return null;
}

/** Return height and width of what a plan resizes an image to: the whole grid, or the largest view. */
function needed({ rows, cols, views }) {
  const sides = views.map(({ kind, height, width }) => (kind === "tile" ? [rows * height, cols * width] : [height, width]));
  return [0, 1].map((axis) => Math.max(...sides.map((side) => side[axis])));
}

/** Return a size of at least this share of the sides, with a shape as close to the image's as nearby sizes allow. */
function sameShape({ height, width }, share) {
  const first = Math.ceil(height * share);
  const sizes = Array.from({ length: 17 }, (_, more) => ({
    height: first + more, width: Math.ceil(((first + more) * width) / height - 1e-9),
  }));
  const error = (size) => Math.abs((size.width / size.height) * (height / width) - 1);
  return sizes.reduce((best, size) => (error(size) < error(best) ? size : best));
}

const isSame = (one, other) =>
  one.rows === other.rows && one.cols === other.cols && JSON.stringify(one.views) === JSON.stringify(other.views);

/** Return the data URL of a file's pixels, upright, at a size: JPEG if it was one, else PNG unless that is very large. */
async function redrawn(file, { height, width }) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  const canvas = paint(bitmap, height, width);
  bitmap.close();
  if (file.type !== "image/jpeg") {
    const png = await blobOf(canvas, "image/png");
    if (png.size <= MOST_KEPT_BYTES) return dataUrl(png);
  }
  return dataUrl(await blobOf(canvas, "image/jpeg", QUALITY));
}

/** Return a canvas with an image over white, as the server lays transparent ones over white. */
function paint(source, height, width) {
  const canvas = Object.assign(document.createElement("canvas"), { height, width });
  const context = canvas.getContext("2d", { alpha: false });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, width, height);
  return canvas;
}

/** Return what a video shows now, as a JPEG file. */
export async function frameOf(video) {
  const blob = await blobOf(paint(video, video.videoHeight, video.videoWidth), "image/jpeg", QUALITY);
  return new File([blob], "camera.jpg", { type: blob.type });
}

/** Return a data URL with at most a number of pixels along the longer side, as JPEG. */
export async function reduced(url, longest) {
  const source = new Image();
  source.src = url;
  await source.decode();
  const share = Math.min(1, longest / Math.max(source.naturalHeight, source.naturalWidth));
  const [height, width] = [source.naturalHeight, source.naturalWidth].map((side) => Math.max(1, Math.round(side * share)));
  return dataUrl(await blobOf(paint(source, height, width), "image/jpeg", 0.8));
}

const blobOf = (canvas, type, quality) => new Promise((resolve) => { canvas.toBlob(resolve, type, quality); });

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
