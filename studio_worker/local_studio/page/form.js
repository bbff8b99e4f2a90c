// The form that queues pictures, and the little one that adds models.

import { byId, button, call, el, keyed } from "./dom.js";

const form = byId("new-job");
const field = form.elements;
const says = byId("form-says");
let models = [];
field.submitter.value = localStorage.getItem("submitter") ?? "";
const inputs = { init: null, mask: null }; // paths of input pictures that are already in the studio

export async function refreshModels() {
  models = (await call("GET", "/api/models")).models;
  const isFirst = field.model.options.length === 0;
  const first = models.find((model) => model.modelSource.engine !== "synthetic") ?? models[0];
  const chosen = (isFirst ? localStorage.getItem("model") ?? first?.id : field.model.value) || first?.id;
  keyed(field.model, models, (model) => model.id, (model) => el("option", { value: model.id }, model.label));
  if (models.some((model) => model.id === chosen)) field.model.value = chosen;
  keyed(byId("models"), models, (model) => model.id, modelRow);
  showDefaults();
}

function modelRow(model) {
  return el("li", {},
    el("span", {}, model.label, " ", el("span", { class: "hint" }, model.modelSource.engine)),
    button("Edit", () => editModel(model), { class: "quiet" }),
    button("Remove", async () => {
      if (confirm(`Remove ${model.label} from the form? Queued jobs keep it.`)) {
        await call("DELETE", `/api/models/${encodeURIComponent(model.id)}`);
      }
    }, { class: "quiet" }));
}

function editModel(model) {
  const to = byId("new-model").elements;
  to.id.value = model.id;
  to.label.value = model.label;
  to.vramGbEstimate.value = model.vramGbEstimate;
  to.source.value = JSON.stringify(model.modelSource, null, 1);
  to.source.focus();
}

/** What the chosen model does where nothing is asked for stands in the empty fields. */
function showDefaults() {
  const model = models.find((entry) => entry.id === field.model.value);
  const own = model?.modelSource.cliDefaults ?? {};
  field.width.placeholder = own.width || 512;
  field.height.placeholder = own.height || 512;
  field.steps.placeholder = own.steps || 20;
  field.cfgScale.placeholder = own.cfgScale || "auto";
}

function tell(text, isBad = false, node = says) {
  node.textContent = text;
  node.classList.toggle("bad", isBad);
}

/** Show an input picture; with a path it is in the studio, without one it is a file still to be sent. */
function choose(which, path, shownUrl) {
  inputs[which] = path;
  if (path !== null || shownUrl === null) field[which].value = "";
  const chosen = byId(`${which}-chosen`);
  chosen.hidden = shownUrl === null;
  chosen.replaceChildren();
  if (shownUrl !== null) {
    chosen.append(el("img", { src: shownUrl, alt: which === "init" ? "start picture" : "mask" }),
      button("Remove", () => choose(which, null, null), { class: "quiet" }));
  }
}

/** The path of an input picture; a file is sent once, whatever number of pictures is made from it. */
async function stored(which) {
  if (field[which].files.length) {
    const { path } = await call("POST", "/api/files", field[which].files[0]);
    choose(which, path, path);
  }
  return inputs[which];
}

async function taskFromForm() {
  const task = { kind: "image", prompt: field.prompt.value.trim(), ext: field.ext.value };
  if (field.negativePrompt.value.trim()) task.negativePrompt = field.negativePrompt.value.trim();
  for (const name of ["width", "height", "steps", "cfgScale"]) {
    if (field[name].value !== "") task[name] = Number(field[name].value);
  }
  if (field.samplingMethod.value) task.samplingMethod = field.samplingMethod.value;
  const init = await stored("init");
  const mask = await stored("mask");
  if (mask && !init) throw new Error("A mask needs a start picture.");
  if (init) {
    task.initImageUrl = init;
    task.denoise = Number(field.denoise.value);
  }
  if (mask) task.maskUrl = mask;
  return task;
}

const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const submit = form.querySelector("[type=submit]");
  submit.disabled = true;
  try {
    const task = await taskFromForm();
    const count = Number(field.count.value);
    const turn = { submitter: field.submitter.value.trim(), priority: Number(field.priority.value || 0) };
    // Chosen here where none is given, so that every picture can be made again.
    const first = field.seed.value === "" ? null : Number(field.seed.value);
    for (let n = 0; n < count; n += 1) {
      const seed = first === null ? randomSeed() : (first + n) % 2 ** 32;
      await call("POST", "/api/jobs", { model: field.model.value, task: { ...task, seed }, ...turn });
    }
    localStorage.setItem("model", field.model.value);
    localStorage.setItem("submitter", turn.submitter);
    tell(count === 1 ? "Queued." : `${count} pictures queued.`);
  } catch (error) {
    tell(error.message, true);
  } finally {
    submit.disabled = false;
  }
});

field.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    form.requestSubmit();
  }
});
field.model.addEventListener("change", showDefaults);
field.denoise.addEventListener("input", () => { byId("denoise-shown").value = field.denoise.value; });
for (const chip of form.querySelectorAll("[data-size]")) {
  chip.addEventListener("click", () => {
    const [width = "", height = ""] = chip.dataset.size.split("x");
    field.width.value = width;
    field.height.value = height;
  });
}
for (const which of ["init", "mask"]) {
  field[which].addEventListener("change", () => {
    const [file] = field[which].files;
    choose(which, null, file ? URL.createObjectURL(file) : null);
  });
}

/** Put a finished job's request back into the form. */
export function again(job) {
  const task = job.task;
  if (models.some((model) => model.id === job.model)) field.model.value = job.model;
  field.prompt.value = task.prompt ?? "";
  for (const name of ["negativePrompt", "width", "height", "steps", "cfgScale", "samplingMethod"]) {
    field[name].value = task[name] ?? "";
  }
  field.seed.value = "";
  for (const [which, address] of [["init", task.initImageUrl], ["mask", task.maskUrl]]) {
    const isOurs = address?.startsWith("/files/") ?? false;
    choose(which, isOurs ? address : null, isOurs ? address : null);
  }
  if (task.denoise !== undefined) byId("denoise-shown").value = field.denoise.value = task.denoise;
  byId("start-picture").open = inputs.init !== null;
  if ([...field.ext.options].some((option) => option.value === task.ext)) field.ext.value = task.ext;
  showDefaults();
  tell("The request is back in the form; the seed is left open for a new picture.");
  field.prompt.focus();
  form.scrollIntoView({ block: "start", behavior: "smooth" });
}

/** Keep a result as input picture and start the next one from it. */
export async function startFrom(job) {
  const bytes = await (await fetch(job.result.url)).blob();
  const { path } = await call("POST", "/api/files", new Blob([bytes]));
  again(job);
  choose("init", path, path);
  choose("mask", null, null);
  byId("start-picture").open = true;
  tell("The picture is the start of the next one; say in the prompt what should change.");
}

byId("new-model").addEventListener("submit", async (event) => {
  event.preventDefault();
  const from = event.target.elements;
  const said = byId("model-says");
  try {
    const body = {
      label: from.label.value.trim(),
      modelSource: JSON.parse(from.source.value),
      vramGbEstimate: Number(from.vramGbEstimate.value || 0),
    };
    await call("PUT", `/api/models/${encodeURIComponent(from.id.value.trim())}`, body);
    await refreshModels();
    field.model.value = from.id.value.trim();
    showDefaults();
    tell("Saved; it is in the form now.", false, said);
    event.target.reset();
  } catch (error) {
    const text = error instanceof SyntaxError ? `The model source is not JSON: ${error.message}` : error.message;
    tell(text, true, said);
  }
});
