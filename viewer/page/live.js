// A box to type a text in, which visualize.py runs the model on.

const typed = el("textarea", { placeholder: "Type a text", rows: 1, spellcheck: false });
let waiting = null;

async function ask() {
  const text = typed.value;
  const reply = await fetch("/", { method: "POST", body: text }).catch(() => null);
  if (text !== typed.value) return; // a newer text is on its way
  const scene = reply ? await reply.json() : { error: "visualize.py has stopped: start it again." };
  if (scene.error) return ($("notices").textContent = scene.error);
  const { frames } = state.scene, isOpen = state.scene === scenes[1];
  scenes[1] = prepare(scene);
  openScene(scene, isOpen ? frames.indexOf(state.frame) : -1);
}

typed.oninput = () => {
  clearTimeout(waiting);
  waiting = setTimeout(ask, 150); // ms after the last key
};
$("text").before(el("form", {}, typed));
