// The list of past conversations, kept in the browser's IndexedDB with their pictures.
//
// The server's record of the page's conversation comes as `props.value`, in a list: a row of training data whose images
// are files of the server. What is to be shown instead goes back the same way, with the event "open".

const MOST = 20;
const TAG = "<image_placeholder>\n";

// ---- the database ----

let database;

function openDatabase() {
  database ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("deepseek-vl", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return database;
}

async function inStore(mode, act) {
  const transaction = (await openDatabase()).transaction("conversations", mode);
  const request = act(transaction.objectStore("conversations"));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

const store = {
  all: async () => (await inStore("readonly", (s) => s.getAll())).sort((a, b) => b.time - a.time),
  get: (id) => inStore("readonly", (s) => s.get(id)),
  put: (conversation) => inStore("readwrite", (s) => s.put(conversation)),
  remove: (id) => inStore("readwrite", (s) => s.delete(id)),
};

// ---- keeping ----

const pictures = new Map(); // by their paths on the server

function picture(file) {
  if (!pictures.has(file.path)) {
    const got = fetch(file.url).then(async (response) => {
      if (!response.ok) throw new Error(`${file.url}: ${response.status}`);
      return { name: file.orig_name || "picture", blob: await response.blob() };
    });
    got.catch(() => pictures.delete(file.path));
    pictures.set(file.path, got);
  }
  return pictures.get(file.path);
}

const all = (values, change) => Promise.all((values ?? []).map(change));

/** A record with each image replaced by what `change` makes of it. */
async function withImages(record, change) {
  const messages = await all(record.messages, async (message) =>
    message.images ? { ...message, images: await all(message.images, change) } : message,
  );
  const unsent = record.unsent && { ...record.unsent, files: await all(record.unsent.files, change) };
  return { messages, system: record.system, unsent };
}

function titleOf(record) {
  const message = record.messages[0]?.content ?? record.unsent?.text ?? "";
  const words = message.replaceAll(TAG, "").replace(/\s+/g, " ").trim();
  return (words.length > 60 ? `${words.slice(0, 59)}…` : words) || "Pictures";
}

const textOf = (record) => JSON.stringify([record.messages.map((m) => m.content), record.unsent?.text]);

async function keep(record) {
  if (deleted.has(record.id)) return;
  current(record.id);
  const old = await store.get(record.id);
  if (!record.messages.length && !record.unsent) {
    if (old) await store.remove(record.id);
  } else {
    const time = old && textOf(old) === textOf(record) ? old.time : Date.now();
    const title = old?.isRenamed ? old.title : titleOf(record);
    const rest = { title, isRenamed: !!old?.isRenamed, time };
    await put({ id: record.id, ...rest, ...(await withImages(record, picture)) });
    for (const { id } of (await store.all()).slice(MOST)) await store.remove(id);
  }
  await draw();
}

const deleted = new Set(); // ids, of which records may still arrive

async function put(conversation) {
  await store.put(conversation);
  if (deleted.has(conversation.id)) await store.remove(conversation.id); // meanwhile
}

let newest = null;
let isKeeping = false;
let isAnswered = false; // whether a record has come from the server

/** Keep the newest record. Of those that arrive while one is being kept, only the last is kept. */
async function keepNewest() {
  if (!Array.isArray(props.value)) return; // it is what is to be shown
  newest = props.value[0];
  isAnswered = true;
  if (isKeeping) return;
  isKeeping = true;
  while (newest) {
    const record = newest;
    newest = null;
    await keep(record).catch((error) => console.warn("The conversation is not kept:", error));
  }
  isKeeping = false;
}

/** The id of this tab's conversation, which outlives a reload. */
function current(id) {
  try {
    if (id === undefined) return sessionStorage.getItem("deepseek-vl");
    sessionStorage.setItem("deepseek-vl", id);
  } catch (error) {
    console.warn(error);
  }
  return id;
}

// ---- showing ----

async function asFile({ name, blob }) {
  const { path } = await upload(new File([blob], name, { type: blob.type }));
  pictures.set(path, Promise.resolve({ name, blob }));
  return { path, orig_name: name, mime_type: blob.type, meta: { _type: "gradio.FileData" } };
}

async function show(id, isRestored = false) {
  const conversation = await store.get(id);
  if (!conversation) return;
  const { messages, system, unsent } = await withImages(conversation, asFile);
  const row = messages.length ? { messages, ...(system == null ? {} : { system }) } : null;
  props.value = { id, row, unsent, isRestored };
  trigger("open");
}

/** Show this tab's conversation again after a reload, unless another has begun meanwhile. A page that is still being set
 * up may miss the event, or fail to upload. */
async function restore(id) {
  for (let tries = 0; tries < 5 && !isAnswered; tries++) {
    await show(id, true).catch((error) => console.warn("The conversation is not restored:", error));
    await new Promise((resolve) => setTimeout(resolve, 3000));
  }
}

/** Upload the pictures of a row, in whatever form it is, and put files in their place. */
async function lifted(value, key) {
  if (Array.isArray(value)) return all(value, (item) => lifted(item, key));
  if (value && typeof value === "object") {
    const entries = await all(Object.entries(value), async ([name, item]) => [name, await lifted(item, name)]);
    return Object.fromEntries(entries);
  }
  const isText = ["content", "text", "value"].includes(key);
  if (typeof value !== "string" || isText || !value.startsWith("data:image/")) return value;
  const blob = await (await fetch(value)).blob();
  return asFile({ name: `picture.${blob.type.split("/")[1].split("+")[0]}`, blob });
}

/** What a file of JSON has, or of JSON Lines. */
function parse(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    const lines = text.split("\n").filter((line) => line.trim());
    if (lines.length < 2) throw error;
    return lines.map((line) => JSON.parse(line));
  }
}

async function showFile(file) {
  let row = null;
  try {
    row = await lifted(parse(await file.text()));
  } catch (error) {
    console.warn(error); // the server reports that the file is not JSON
  }
  props.value = { row };
  trigger("open");
}

// ---- downloading ----

function asDataUrl({ blob }) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

async function download(id) {
  const conversation = await store.get(id);
  const { messages, system } = await withImages(conversation, asDataUrl);
  const text = JSON.stringify([{ messages, ...(system == null ? {} : { system }) }]);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([`${text}\n`], { type: "application/json" }));
  link.download = `${conversation.title.replace(/[^\p{L}\p{N}]+/gu, " ").trim() || "conversation"}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// ---- the list ----

function make(tag, options, ...children) {
  const made = Object.assign(document.createElement(tag), options);
  made.append(...children);
  return made;
}

function action(sign, label, act) {
  const made = make("button", { type: "button", className: "action", title: label, textContent: sign, onclick: act });
  made.setAttribute("aria-label", label);
  return made;
}

function rename(item, { id, title }) {
  const field = make("input", { type: "text", value: title, maxLength: 100 });
  field.setAttribute("aria-label", "New name");
  let isOver = false;
  const end = async (isWanted) => {
    if (isOver) return;
    isOver = true;
    field.remove();
    const conversation = await store.get(id);
    if (isWanted && conversation && field.value.trim()) {
      await put({ ...conversation, title: field.value.trim(), isRenamed: true });
    }
    await draw();
    list.querySelector(`[data-id="${CSS.escape(id)}"] .title`)?.focus();
  };
  field.onkeydown = (event) => {
    if (event.key === "Enter") end(true);
    if (event.key === "Escape") end(false);
  };
  field.onblur = () => end(true);
  item.replaceChildren(field);
  field.select();
}

async function remove(id) {
  deleted.add(id);
  await store.remove(id);
  if (id === current()) trigger("forget");
  await draw();
}

async function draw() {
  const shown = current();
  const items = (await store.all()).map((conversation) => {
    const { id, title } = conversation;
    const open = make("button", { type: "button", className: "title", textContent: title, title });
    open.onclick = () => show(id);
    if (id === shown) open.setAttribute("aria-current", "true");
    const item = make("li", {}, open);
    item.dataset.id = id;
    item.append(
      action("✎", `Rename ${title}`, () => rename(item, conversation)),
      action("⤓", `Download ${title}`, () => download(id)),
      action("✕", `Delete ${title}`, () => remove(id)),
    );
    return item;
  });
  if (!list.querySelector("input")) list.replaceChildren(...items); // not while a conversation is being renamed
  none.hidden = items.length > 0;
}

const list = make("ul", {});
const none = make("p", { textContent: "What you talk about is kept here, in this browser." });
const chooser = make("input", { type: "file", accept: ".json,.jsonl", hidden: true });
chooser.onchange = async () => {
  const [file] = chooser.files;
  if (file) await showFile(file);
  chooser.value = "";
};
const opener = make("button", { type: "button", className: "upload", onclick: () => chooser.click() }, "Upload a conversation");
const nav = make("nav", {}, make("h2", {}, "Conversations"), opener, chooser, list, none);
nav.setAttribute("aria-label", "Conversations");
element.append(nav);

watch("value", keepNewest);
draw().catch((error) => {
  console.warn(error);
  none.textContent = "This browser keeps no conversations: it has no IndexedDB for this page.";
});
if (current()) restore(current());
