// Small tools: elements without markup strings (so nothing shown can be markup), calls, lists that keep focus.

/** An element. Strings become text; properties are set as they are; null children are left out. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("aria-") || name.startsWith("data-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export const byId = (id) => document.getElementById(id);

/** One call to the studio: its JSON, or an Error with the studio's own sentence. */
export async function call(method, path, body) {
  const isPlain = body !== undefined && !(body instanceof Blob);
  const answer = await fetch(path, {
    method,
    headers: isPlain ? { "Content-Type": "application/json" } : {},
    body: isPlain ? JSON.stringify(body) : body,
  });
  if (answer.status === 401) location.assign("/");
  if (answer.status === 204) return null;
  const said = await answer.json().catch(() => ({ error: `the studio answered ${answer.status}` }));
  if (!answer.ok) throw new Error(said.error);
  return said;
}

/**
 * Bring a list up to date without touching what did not change: focus, loaded pictures and selections stay.
 * A row is made anew only where the JSON of its item changed.
 */
export function keyed(container, items, keyOf, render) {
  const before = container.rows ?? new Map();
  const after = new Map();
  let place = container.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    const json = JSON.stringify(item);
    let row = before.get(key);
    if (!row || row.json !== json) {
      const node = render(item);
      if (row) {
        if (place === row.node) place = node;
        row.node.replaceWith(node);
      }
      row = { json, node };
    }
    after.set(key, row);
    if (row.node === place) place = place.nextElementSibling;
    else container.insertBefore(row.node, place);
  }
  const kept = new Set([...after.values()].map((row) => row.node));
  for (const node of [...container.children]) if (!kept.has(node)) node.remove();
  container.rows = after;
}

/** A time that says how long ago it is, kept current by tick(). */
export function ago(iso, { running = false } = {}) {
  const node = el("time", { dateTime: iso, title: new Date(iso).toLocaleString() });
  if (running) node.dataset.running = "yes";
  node.textContent = since(node);
  return node;
}

function since(node) {
  const s = Math.max(0, Math.round((Date.now() - Date.parse(node.dateTime)) / 1000));
  const text = s < 60 ? `${s} s` : s < 3600 ? `${Math.floor(s / 60)} min` : s < 172800
    ? `${Math.floor(s / 3600)} h` : `${Math.floor(s / 86400)} days`;
  if (node.dataset.running) return text;
  return s < 3 ? "just now" : `${text} ago`;
}

export function tick() {
  for (const node of document.querySelectorAll("time")) {
    const text = since(node);
    if (node.textContent !== text) node.textContent = text;
  }
}

/** A button that does something; while it does, it cannot be pressed again, and it tells what went wrong. */
export function button(label, action, props = {}) {
  const node = el("button", { type: "button", ...props }, label);
  node.addEventListener("click", async () => {
    node.disabled = true;
    try {
      await action();
    } catch (error) {
      alert(error.message);
    } finally {
      node.disabled = false;
    }
  });
  return node;
}
