// A box for a text, which the program that serves this page shows to the model.

const typed = el("input", { ariaLabel: "Text", placeholder: "type a text", autocomplete: "off", spellcheck: false });
let waiting = null;

async function ask() {
  const text = typed.value, reply = await fetch("/", { method: "POST", body: JSON.stringify({ text }) });
  const scene = await reply.json();
  if (text !== typed.value) return; // a newer one is under way
  if (scene.error) return ($("notices").textContent = scene.error);
  scenes[1] = prepare(scene);
  openScene(scene, state.frame.panels.indexOf(state.panel));
}

typed.oninput = () => {
  clearTimeout(waiting);
  waiting = setTimeout(ask, 150); // milliseconds without a key
};
$("text").before(el("form", { onsubmit: (event) => event.preventDefault() }, typed));
