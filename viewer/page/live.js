// A box for a text, which visualize.py shows to the model.

const typed = el("textarea", { placeholder: "type a text", rows: 1, spellcheck: false });
let waiting = null;

async function ask() {
  const text = typed.value, body = JSON.stringify({ text });
  const reply = await fetch("/", { method: "POST", body }).catch(() => null);
  if (text !== typed.value) return; // a newer one is under way
  const scene = reply ? await reply.json() : { error: "visualize.py has stopped: start it again." };
  if (scene.error) return ($("notices").textContent = scene.error);
  const { frames } = state.scene, isOpen = state.scene === scenes[1];
  scenes[1] = prepare(scene);
  openScene(scene, isOpen ? frames.indexOf(state.frame) : -1);
}

typed.oninput = () => {
  clearTimeout(waiting);
  waiting = setTimeout(ask, 150); // ms without a key
};
$("text").before(el("form", {}, typed));
