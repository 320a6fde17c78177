"use strict";
/** How images come in: dropped, pasted, chosen, or from a camera. */

import { byId, tell } from "./dom.js";
import { frameOf } from "./images.js";

/** Have a function get the files that are dropped, pasted, chosen or taken. */
export function listen(onFiles) {
  listenToDrops(onFiles);
  document.addEventListener("paste", (event) => {
    const files = filesOf(event.clipboardData);
    if (files.length === 0) return;
    event.preventDefault();
    onFiles(files);
  });
  for (const id of ["files", "capture"]) {
    byId(id).addEventListener("change", ({ target }) => {
      onFiles([...target.files]);
      target.value = "";
    });
  }
  byId("choose").addEventListener("click", () => byId("files").click());
  listenToCamera(onFiles);
}

/** Return the image files in a drop or a paste. A pasted text may come with an image of itself: then it is a text. */
function filesOf(data) {
  if (data === null || data.types.includes("text/plain")) return [];
  return [...data.files];
}

function listenToDrops(onFiles) {
  const hint = byId("drop");
  let depth = 0;
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  const on = (name, act) => document.addEventListener(name, (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    act(event);
    hint.hidden = depth === 0;
  });
  on("dragenter", () => { depth += 1; });
  on("dragleave", () => { depth = Math.max(0, depth - 1); });
  on("dragover", () => {});
  on("drop", (event) => {
    depth = 0;
    onFiles([...event.dataTransfer.files]);
  });
}

/** Open the camera in the page if the browser allows it here (HTTPS or this machine), else by an upload input. */
function listenToCamera(onFiles) {
  const dialog = byId("camera-dialog");
  const video = byId("video");
  byId("camera").addEventListener("click", () => {
    if (navigator.mediaDevices?.getUserMedia) openCamera(dialog, video);
    else byId("capture").click();
  });
  byId("shoot").addEventListener("click", async () => {
    const file = await frameOf(video);
    dialog.close();
    onFiles([file]);
  });
  byId("camera-file").addEventListener("click", () => {
    dialog.close();
    byId("capture").click();
  });
  byId("camera-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    for (const track of video.srcObject?.getTracks() ?? []) track.stop();
    video.srcObject = null;
  });
}

async function openCamera(dialog, video) {
  const [problem, shoot] = [byId("camera-problem"), byId("shoot")];
  tell(problem, "");
  shoot.disabled = true;
  dialog.showModal();
  try {
    const wanted = { facingMode: "environment", width: { ideal: 1920 }, height: { ideal: 1080 } };
    const stream = await navigator.mediaDevices.getUserMedia({ video: wanted });
    if (!dialog.open) {
      stream.getTracks().forEach((track) => track.stop());
      return;
    }
    video.srcObject = stream;
    await video.play();
    shoot.disabled = false;
    shoot.focus();
  } catch (error) {
    const reason = error.name === "NotAllowedError" ? "This page may not use the camera." : "There is no camera to use.";
    tell(problem, `${reason} Choose a file instead.`);
    byId("camera-file").focus();
  }
}
