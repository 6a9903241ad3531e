// Where an answer looked: the pictures with a map of weights over each, for the whole answer or for one of its words.
//
// `props.value` is {pictures: [{url}], side, words: [{text, maps: [base64 of side * side bytes, one per picture]}]}.

function make(tag, options, ...children) {
  const made = Object.assign(document.createElement(tag), options);
  made.append(...children);
  return made;
}

const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

/** The mean of several maps. */
function meanOf(maps) {
  const mean = new Float32Array(maps[0].length);
  for (const map of maps) map.forEach((weight, i) => (mean[i] += weight / maps.length));
  return mean;
}

function paint(canvas, side, map, most) {
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  const image = context.createImageData(side, side);
  map.forEach((weight, i) => {
    const part = most ? weight / most : 0;
    image.data.set([255, Math.round(220 - 180 * part), 0, Math.round(215 * part ** 1.5)], 4 * i);
  });
  context.putImageData(image, 0, 0);
}

/** A picture in the middle of the padded square that the model sees, with the square's map over it. */
function framed(url, number) {
  const canvas = make("canvas", {});
  const image = make("img", { src: url, alt: `Picture ${number}` });
  const frame = make("div", { className: "frame" }, image, canvas);
  image.onload = () => {
    const { naturalWidth: width, naturalHeight: height } = image;
    const side = Math.max(width, height);
    canvas.style.width = `${(100 * side) / width}%`;
    canvas.style.height = `${(100 * side) / height}%`;
  };
  return [frame, canvas];
}

function show({ pictures, side, words }) {
  const maps = words.map((word) => word.maps.map(bytesOf));
  const whole = pictures.map((_, i) => meanOf(maps.map((each) => each[i])));
  const frames = pictures.map(({ url }, i) => framed(url, i + 1));
  const look = (weights) => {
    const most = Math.max(...weights.map((map) => Math.max(...map)));
    frames.forEach(([, canvas], i) => paint(canvas, side, weights[i], most));
  };
  const spans = words.flatMap(({ text }, i) => {
    const span = make("button", { type: "button", className: "word", textContent: text.trim() });
    span.onpointerenter = span.onfocus = () => look(maps[i]);
    span.onpointerleave = span.onblur = () => look(whole);
    return [text.slice(0, text.length - text.trimStart().length), span];
  });
  const close = make("button", { type: "button", className: "close", textContent: "✕", onclick: () => dialog.close() });
  close.setAttribute("aria-label", "Close");
  const dialog = make(
    "dialog",
    { className: "looked", onclose: () => dialog.remove() },
    close,
    make("h2", {}, "Where it looked"),
    make("div", { className: "frames" }, ...frames.map(([frame]) => frame)),
    make("p", { className: "words" }, ...spans),
    make("p", { className: "hint" }, "The whole answer; point at a word, or go to it with Tab, for that word alone."),
  );
  dialog.setAttribute("aria-label", "Where it looked");
  element.replaceChildren(dialog);
  dialog.showModal();
  look(whole);
}

watch("value", () => {
  if (props.value?.words?.length) show(props.value);
});
