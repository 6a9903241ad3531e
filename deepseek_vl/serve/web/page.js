// What Gradio's components lack: text without marks (see marks.py), names for screen readers, large pictures.
(() => {
  const MARK = "\u2064";
  const unmarked = (text) => text.replace(/\u2064(\u2064?)/g, "$1");

  // ---- marks ----

  function takeMarksOut(root) {
    const texts = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      const node = texts.currentNode;
      if (node.data.includes(MARK)) node.data = unmarked(node.data);
    }
    for (const element of root.querySelectorAll?.(`[aria-label*="${MARK}"]`) ?? []) {
      element.setAttribute("aria-label", unmarked(element.getAttribute("aria-label")));
    }
    for (const field of root.querySelectorAll?.("textarea") ?? []) {
      if (!field.value.includes(MARK)) continue;
      field.value = unmarked(field.value);
      field.dispatchEvent(new Event("input", { bubbles: true }));
    }
  }

  // Gradio copies the text that it was given.
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => write(unmarked(text));
  }
  document.addEventListener("copy", (event) => {
    const field = document.activeElement;
    const isField = field instanceof HTMLTextAreaElement;
    const text = isField ? field.value.slice(field.selectionStart, field.selectionEnd) : `${getSelection()}`;
    if (!text.includes(MARK)) return;
    event.clipboardData.setData("text/plain", unmarked(text));
    event.preventDefault();
  });

  // ---- names ----

  const NAMES = [
    ["#conversations-side > .toggle-button", "Conversations"],
    ["#settings-side > .toggle-button", "Settings"],
    ["#message textarea", "Message"],
    ["#message .upload-button", "Add pictures"],
    ["#message .submit-button", "Send"],
    ["#message .stop-button", "Stop"],
    ["#chat .edit-textarea", "Your message"],
    ["#chat .message-buttons [aria-label=Retry]", "Regenerate"],
    ["#chat .message-buttons [aria-label=Undo]", "Remove"],
  ];

  function nameParts() {
    for (const [selector, name] of NAMES) {
      for (const element of document.querySelectorAll(selector)) {
        if (element.getAttribute("aria-label") === name) continue;
        element.setAttribute("aria-label", name);
        if (element.tagName === "BUTTON") element.title = name;
      }
    }
    for (const toggle of document.querySelectorAll(".sidebar > .toggle-button")) {
      toggle.setAttribute("aria-expanded", `${toggle.parentElement.classList.contains("open")}`);
    }
    document.querySelector("#status")?.setAttribute("role", "status");
    const frames = document.querySelectorAll("#chat .image-container > button");
    frames.forEach((frame, i) => frame.setAttribute("aria-label", `Picture ${i + 1} of ${frames.length}, open it large`));
  }

  // ---- large pictures ----

  let dialog;

  function showLarge(source, opener) {
    if (!dialog) {
      dialog = document.createElement("dialog");
      dialog.id = "large";
      dialog.setAttribute("aria-label", "Picture");
      dialog.onclick = () => dialog.close();
      const close = document.createElement("button");
      close.textContent = "✕";
      close.setAttribute("aria-label", "Close");
      dialog.append(close, document.createElement("img"));
      document.querySelector(".gradio-container").append(dialog);
    }
    dialog.onclose = () => opener.focus();
    Object.assign(dialog.querySelector("img"), { src: source, alt: opener.getAttribute("aria-label") ?? "" });
    dialog.showModal();
  }

  document.addEventListener("click", (event) => {
    const frame = event.target.closest?.("#chat .image-container > button");
    if (frame) showLarge(frame.querySelector("img").src, frame);
    // The button that was pressed is replaced by another; the keyboard's focus would go to the page's start.
    if (event.detail === 0 && event.target.closest?.("#message .submit-button, #message .stop-button")) {
      document.querySelector("#message textarea").focus();
    }
  });

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    document.querySelector(".sidebar.open > .toggle-button:focus, .sidebar.open:focus-within > .toggle-button")?.click();
  });

  // ---- colours ----

  window.chooseColours = (choice) => {
    const isDark = choice === "System" ? matchMedia("(prefers-color-scheme: dark)").matches : choice === "Dark";
    document.body.classList.toggle("dark", isDark);
    document.body.style.background = "var(--body-background-fill)";
    localStorage.setItem("deepseek-vl-colours", choice);
  };

  // ---- what changes ----

  let isDue = false;
  const observer = new MutationObserver((changes) => {
    for (const { target, addedNodes, type } of changes) {
      if (!target.isConnected || !target.parentElement?.closest?.("#chat")) continue;
      if (type === "childList") addedNodes.forEach((node) => takeMarksOut(node.nodeType === 1 ? node : node.parentNode ?? node));
      else takeMarksOut(target.parentElement);
    }
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(() => {
      isDue = false;
      nameParts();
    });
  });

  function begin() {
    observer.observe(document.body, {
      childList: true,
      subtree: true,
      characterData: true,
      attributeFilter: ["class", "aria-label"],
    });
    nameParts();
  }

  if (document.body) begin();
  else document.addEventListener("DOMContentLoaded", begin);
})();
