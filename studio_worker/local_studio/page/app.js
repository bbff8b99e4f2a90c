// The page: fetches the state at every change the studio tells of, and shows it.

import { ago, button, byId, call, el, keyed, tick } from "./dom.js";
import { again, refreshModels } from "./form.js";
import { refreshGallery } from "./pictures.js";

const shortId = (id) => id.slice(0, 8);
const plural = (n, one, many) => `${n} ${n === 1 ? one : many}`;

function askRow(entry) {
  const gb = entry.vramTotalGb ? `${entry.vramTotalGb} GiB device memory` : "no GPU";
  return el("div", { class: "ask" },
    el("div", {}, el("strong", {}, entry.machineName), " wants to work here",
      el("div", { class: "hint" }, `${entry.username} · install ${shortId(entry.installId)} · version ${entry.agentVersion} · ${gb} · `,
        ago(entry.requestedAt))),
    el("div", { class: "buttons" },
      button("Approve", () => call("POST", `/api/registrations/${entry.requestId}/approve`), { class: "primary" }),
      button("Reject", () => call("POST", `/api/registrations/${entry.requestId}/reject`, { reason: "rejected by the operator" }))));
}

function workerRow(worker) {
  const job = worker.currentJob;
  const isNew = !worker.online && !worker.lastHeartbeatAt; // it asks every half minute whether it may
  const doing = { offline: isNew ? "approved, connects within half a minute" : "offline", paused: "paused", idle: "ready" }[worker.state]
    ?? (job?.status === "offered" ? "being asked" : "working");
  const own = worker.capabilities;
  return el("li", { class: "item" }, el("span", { class: `dot ${worker.state}` }),
    el("div", { class: "what" }, el("strong", {}, worker.name), " ", doing,
      job ? el("div", { class: "title" }, job.prompt ?? job.model) : null,
      el("div", { class: "facts" }, `${own.vramTotalGb ? `${own.vramTotalGb} GiB` : "no GPU"} · ${own.taskKinds.join(", ")} · version ${own.agentVersion} · ${shortId(worker.workerId)}`)),
    el("span", { class: "tag" }, worker.lastHeartbeatAt ? el("span", {}, "heartbeat ", ago(worker.lastHeartbeatAt)) : "never seen"),
    button("Delete", async () => {
      if (confirm(`Delete ${worker.name}? It has to register again to come back.`)) {
        await call("DELETE", `/api/workers/${worker.workerId}`);
      }
    }, { class: "quiet" }));
}

function activeRow(job) {
  const isQueued = job.status === "queued";
  const tries = job.attempts ? ` · try ${job.attempts}${isQueued ? " over" : ""} of ${job.maxAttempts}` : "";
  const urgent = job.priority ? ` · priority ${job.priority}` : "";
  const last = isQueued && job.reason ? ` · last: ${job.reason}` : "";
  return el("li", { class: "item" }, el("span", { class: `dot ${isQueued ? "" : "working"}` }),
    el("div", { class: "what" }, el("div", { class: "title" }, job.task.prompt ?? job.task.kind),
      el("div", { class: "facts" }, `${[job.submitter, job.model].filter(Boolean).join(" · ")}${urgent}${tries}${last}`),
      job.waitingFor ? el("div", { class: "facts" }, `waiting: ${job.waitingFor}`) : null),
    el("span", { class: "tag" }, isQueued ? el("span", {}, "queued ", ago(job.createdAt))
      : el("span", {}, `${job.worker} · `, ago(job.startedAt ?? job.offeredAt, { running: true }))),
    isQueued && job.rejections.length ? button("Ask again", () => call("POST", `/api/jobs/${job.jobId}/retry`)) : null,
    isQueued ? button("Remove", () => call("DELETE", `/api/jobs/${job.jobId}`), { class: "quiet" }) : null);
}

function failedRow(job) {
  return el("li", { class: "item" }, el("span", { class: "dot failed" }),
    el("div", { class: "what" }, el("div", { class: "title" }, job.task.prompt ?? job.task.kind),
      el("div", { class: "facts bad" }, job.reason ?? "no reason given"),
      el("div", { class: "facts" }, [job.model, job.worker, plural(job.attempts, "try", "tries")].filter(Boolean).join(" · "),
        " · ", ago(job.finishedAt))),
    button("Retry", () => call("POST", `/api/jobs/${job.jobId}/retry`)),
    button("Edit", () => again(job)),
    button("Remove", () => call("DELETE", `/api/jobs/${job.jobId}`), { class: "quiet" }));
}

function showWelcome(state) {
  const total = Object.values(state.queue).reduce((sum, n) => sum + n, 0);
  byId("welcome").hidden = state.queue.done > 0;
  byId("snippet").textContent = `[studio]\napi_base_url = "${state.baseUrl}"${insecure(state.baseUrl)}`;
  byId("step-worker").classList.toggle("done", state.workers.length > 0 || state.registrations.length > 0);
  byId("step-approve").classList.toggle("done", state.workers.length > 0);
  byId("step-queue").classList.toggle("done", total > 0);
}

/** Workers fetch model files and input pictures over plain http from their own machine only, unless told. */
function insecure(baseUrl) {
  const { protocol, hostname } = new URL(baseUrl);
  const isOwn = hostname === "localhost" || hostname === "[::1]" || hostname.startsWith("127.");
  return protocol === "https:" || isOwn ? "" : "\n\n[models]\nallow_insecure_urls = true   # this studio speaks plain http";
}

function showSummary(state) {
  const online = state.workers.filter((worker) => worker.online).length;
  const inHand = state.queue.offered + state.queue.running;
  byId("summary").textContent = [
    `${plural(online, "worker", "workers")} connected`,
    inHand ? `${inHand} being made` : null,
    state.queue.queued ? `${state.queue.queued} queued` : null,
  ].filter(Boolean).join(" · ");
  document.title = inHand + state.queue.queued ? `(${inHand + state.queue.queued}) Local studio` : "Local studio";
}

function showList(name, jobs, count, render) {
  byId(`${name}-box`).hidden = jobs.length === 0;
  byId(`${name}-count`).textContent = count;
  keyed(byId(name), jobs, (job) => job.jobId, render);
}

async function refreshLogs() {
  if (!byId("logs-box").open) return;
  const { lines } = await call("GET", "/api/logs?limit=200");
  const box = byId("logs");
  const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  box.replaceChildren(...lines.map((line) => el("p", { class: line.level },
    `${new Date(line.ts).toLocaleTimeString()} ${line.worker} ${line.category}: ${line.message}`)));
  if (!lines.length) box.append(el("p", {}, "Nothing yet."));
  if (isAtEnd) box.scrollTop = box.scrollHeight;
}

async function refresh() {
  const state = await call("GET", "/api/state");
  keyed(byId("pending"), state.registrations, (entry) => entry.requestId, askRow);
  keyed(byId("workers"), state.workers, (worker) => worker.workerId, workerRow);
  byId("no-workers").hidden = state.workers.length > 0;
  const { queued, offered, running, failed, done } = state.queue;
  showList("active", state.active, queued + offered + running, activeRow);
  showList("failed", state.failed, failed, failedRow);
  showSummary(state);
  showWelcome(state);
  await Promise.all([refreshGallery(done), refreshModels(), refreshLogs()]);
}

// Changes may come faster than the page can fetch: one refresh at a time, and one more if something came meanwhile.
let refreshing = false;
let isStale = false;
async function changed() {
  isStale = true;
  if (refreshing) return;
  refreshing = true;
  try {
    while (isStale) {
      isStale = false;
      await refresh();
    }
  } catch (error) {
    console.warn(error); // the event stream tells people that the studio is away
  } finally {
    refreshing = false;
  }
}

function showLive(isOn) {
  byId("live").classList.toggle("on", isOn);
  byId("live").querySelector(".text").textContent = isOn ? "live" : "studio not reachable, trying again";
}

const events = new EventSource("/api/events");
events.addEventListener("open", () => showLive(true));
events.addEventListener("error", () => showLive(false));
events.addEventListener("change", changed);
byId("logs-box").addEventListener("toggle", refreshLogs);
setInterval(tick, 1000);
changed();
