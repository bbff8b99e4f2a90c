// The gallery and the large view.

import { ago, button, byId, call, el, keyed } from "./dom.js";
import { again, startFrom } from "./form.js";

const PAGE = 24;
const SHOWN_AS_PICTURE = ["webp", "png", "jpg", "gif"];
let limit = PAGE;
let shownCount = -1;

export async function refreshGallery(doneCount) {
  byId("gallery-box").hidden = doneCount === 0;
  byId("gallery-count").textContent = doneCount || "";
  byId("more").hidden = doneCount <= limit;
  if (doneCount === shownCount) return;
  const { jobs } = await call("GET", `/api/jobs?status=done&limit=${limit}`);
  keyed(byId("gallery"), jobs, (job) => job.jobId, card);
  shownCount = doneCount;
}

byId("more").addEventListener("click", async () => {
  const doneCount = shownCount;
  limit += PAGE;
  shownCount = -1;
  await refreshGallery(doneCount);
});

const seedOf = (job) => job.generationMeta?.seed ?? job.task.seed;
const isPicture = (job) => SHOWN_AS_PICTURE.includes(job.result.ext);

function media(job) {
  return el("img", { src: job.result.url, alt: job.result.prompt, loading: "lazy", decoding: "async" });
}

function card(job) {
  const facts = el("p", { class: "facts" });
  const tellFacts = (size) => {
    const seed = seedOf(job);
    facts.textContent = [size, seed === undefined ? null : `seed ${seed}`, `${job.result.seconds.toFixed(1)} s`,
      job.worker].filter(Boolean).join(" · ");
  };
  tellFacts(null);
  let inside = el("span", { class: "other" }, job.result.ext.toUpperCase());
  if (isPicture(job)) {
    inside = media(job);
    inside.addEventListener("load", () => tellFacts(`${inside.naturalWidth} × ${inside.naturalHeight}`));
  }
  const frame = button(inside, () => view(job), { class: "frame", "aria-label": `Show: ${job.result.prompt}` });
  return el("figure", { class: "picture" }, frame,
    el("figcaption", {}, el("p", { class: "prompt", title: job.result.prompt }, job.result.prompt), facts,
      el("div", { class: "buttons" }, download(job),
        button("Again", () => again(job), { title: "Again with this prompt" }))));
}

function download(job) {
  return el("a", { href: job.result.url, download: `${job.jobId}.${job.result.ext}` }, "Download");
}

async function remove(job) {
  if (!confirm("Delete this picture for good?")) return;
  await call("DELETE", `/api/jobs/${job.jobId}`);
  shownCount = -1; // another one may have been finished meanwhile: the count alone does not tell
}

function view(job) {
  const viewer = byId("viewer");
  const size = el("dd");
  const picture = isPicture(job) ? media(job) : el("p", {}, download(job));
  picture.addEventListener("load", () => { size.textContent = `${picture.naturalWidth} × ${picture.naturalHeight}`; });
  const rows = [
    ["Without", job.task.negativePrompt], ["Model", job.model], ["Size", size], ["Seed", seedOf(job)],
    ["Steps", job.task.steps], ["Guidance", job.task.cfgScale], ["Sampler", job.task.samplingMethod],
    ["Took", `${job.result.seconds.toFixed(1)} s`], ["Worker", job.worker],
    ["Made", ago(job.finishedAt)], ["File", `${job.result.ext}, ${Math.ceil(job.result.sizeBytes / 1000)} kB`],
  ].filter(([, value]) => value !== undefined && value !== null);
  const act = (label, action) => button(label, async () => { viewer.close(); await action(); });
  viewer.replaceChildren(el("div", { class: "viewing" }, picture,
    el("div", {}, el("p", { class: "prompt" }, job.result.prompt),
      el("dl", {}, rows.flatMap(([name, value]) => [el("dt", {}, name),
        value instanceof HTMLElement && value.tagName === "DD" ? value : el("dd", {}, value instanceof Node ? value : String(value))])),
      el("div", { class: "buttons" }, download(job), act("Again", () => again(job)),
        isPicture(job) ? act("Start from it", () => startFrom(job)) : null,
        act("Delete", () => remove(job)),
        button("Close", () => viewer.close())))));
  viewer.showModal();
}

byId("viewer").addEventListener("click", (event) => {
  if (event.target === byId("viewer")) byId("viewer").close();
});
