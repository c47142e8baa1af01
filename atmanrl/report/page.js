"use strict";
(() => {
  const card = document.getElementById("card");
  const loaded = new WeakMap();
  let current = null;
  let pinned = false;
  let pointer = "";
  const { body } = document;
  const scales = JSON.parse(body.dataset.scales);

  // A chain of thought's tokens and numbers, read on first use: a page may hold very many.
  const chain = (box) => {
    if (!loaded.has(box)) {
      const data = JSON.parse(box.parentElement.querySelector("script").textContent);
      loaded.set(box, { data, tokens: box.querySelectorAll(".t") });
    }
    return loaded.get(box);
  };

  const level = (value, { centre, reach, curve }) => {
    const x = (value - centre) / reach;
    const share = -Math.sign(x) * Math.expm1(-Math.abs(x));
    return Math.round(10 * (curve === "share" ? share : Math.max(-1, Math.min(1, x))));
  };

  // The shade is the one class that is a letter and a number, or z.
  const tint = (unit, values, first, count, scale) => {
    let sum = 0;
    for (let i = first; i < first + count; i++) sum += values?.[i] ?? 0;
    const shade = values ? level(sum / count, scale) : 0;
    unit.className = unit.className.replace(/ (?:z|[ud]\d+)(?= |$)/, ` ${shade > 0 ? `u${shade}` : shade < 0 ? `d${-shade}` : "z"}`);
  };

  const repaint = () => {
    const { score } = body.dataset;
    const scale = scales[score][body.dataset.scale];
    for (const box of document.querySelectorAll(".cot")) {
      const { data, tokens } = chain(box);
      tokens.forEach((token, i) => tint(token, data.scores[score], i, 1, scale));
      for (const unit of box.querySelectorAll(".w, .s")) {
        const inner = unit.querySelectorAll(".t");
        tint(unit, data.scores[score], Number(inner[0].dataset.i), inner.length, scale);
      }
    }
    for (const part of document.querySelectorAll("[data-for]"))
      part.hidden = part.dataset.for !== score || (part.dataset.kind ?? body.dataset.scale) !== body.dataset.scale;
  };

  // What the reader chose; a score without a fixed scale does not change it.
  let wantsFixed = true;
  const choose = (name, value) => {
    body.dataset[name] = value;
    if (name === "scale") wantsFixed = value === "fixed";
    if (name === "score") {
      const [fixed, fitted] = document.querySelectorAll("input[name=scale]");
      fixed.disabled = !scales[value].fixed;
      (wantsFixed && !fixed.disabled ? fixed : fitted).checked = true;
      body.dataset.scale = fitted.checked ? "fitted" : "fixed";
    }
    if (name !== "unit") repaint();
  };

  const element = (name, text, parent) => {
    const node = document.createElement(name);
    node.textContent = text;
    parent.append(node);
    return node;
  };

  const curve = (values, name) => {
    const low = Math.min(...values), span = Math.max(...values) - low || 1;
    const points = values.map((v, i) => `${(100 * i) / Math.max(1, values.length - 1)},${40 - (40 * (v - low)) / span}`);
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", `M${points.join("L")}`);
    path.setAttribute("class", name);
    return path;
  };

  const fill = (token, data) => {
    const i = Number(token.dataset.i);
    card.replaceChildren();
    element("b", token.textContent.trim() || "(white space)", card);
    const list = element("dl", "", card);
    const row = (name, value) => { element("dt", name, list); element("dd", value, list); };
    row("token id", data.ids[i]);
    row("position", `${i + 1} of ${data.ids.length}`);
    if (data.classes.length) row("class", data.classes[i]);
    for (const [name, values] of Object.entries(data.scores)) {
      const nats = scales[name].fixed?.curve === "share";
      row(name, nats ? `${values[i]} nats${name === "deletion" ? " of loss if hidden" : ""}` : values[i]);
      if (name === "restored") row("normalised mask", Number((1 - values[i]).toPrecision(4)));
    }
    const course = data.trajectory;
    if (pinned && course) {
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      svg.setAttribute("viewBox", "0 0 100 40");
      svg.setAttribute("preserveAspectRatio", "none");
      svg.append(curve(course.loss, "loss"), curve(course.restored.map((step) => step[i]), "restored"));
      card.append(svg);
      const ends = (values) => `${values[0]} → ${values.at(-1)}`;
      row("steps", ends(course.steps));
      row("enabled, line", ends(course.restored.map((step) => step[i])));
      row("loss, dashes", ends(course.loss));
    }
  };

  const show = (token) => {
    current?.classList.remove("at");
    current = token;
    token.classList.add("at");
    fill(token, chain(token.closest(".cot")).data);
    card.hidden = false;
    card.toggleAttribute("data-pinned", pinned);
    const at = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const left = Math.max(8, Math.min(at.left, innerWidth - card.offsetWidth - 8));
    const below = at.bottom + 8 + card.offsetHeight < innerHeight;
    card.style.left = `${left}px`;
    card.style.top = `${below ? at.bottom + 8 : Math.max(8, at.top - card.offsetHeight - 8)}px`;
  };

  const hide = () => {
    pinned = false;
    current?.classList.remove("at");
    current = null;
    card.hidden = true;
  };

  const pin = (token) => { pinned = !(pinned && token === current); show(token); };

  const walk = (box, event) => {
    const { tokens } = chain(box);
    if (!tokens.length) return;
    const at = current && box.contains(current) ? Number(current.dataset.i) : -1;
    const target = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    const token = tokens[Math.max(0, Math.min(tokens.length - 1, target))];
    token.scrollIntoView({ block: "nearest" });
    show(token);
  };

  document.addEventListener("pointerover", (event) => {
    // A scroll moves tokens under a pointer that rests; only a pointer that moved takes the card from the keyboard.
    const moved = pointer !== `${event.clientX} ${event.clientY}`;
    pointer = `${event.clientX} ${event.clientY}`;
    if (pinned || !moved || event.pointerType === "touch") return;
    const token = event.target.closest(".cot .t");
    if (token) show(token);
    else if (current && !current.closest(".cot").matches(":focus")) hide();
  });
  document.addEventListener("click", (event) => {
    const token = event.target.closest(".cot .t");
    if (token) pin(token);
    else if (pinned) hide();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const box = event.target.closest?.(".cot");
    if (!box) return;
    if (event.key === "Enter" && current) return pin(current);
    walk(box, event);
  });
  document.addEventListener("focusin", (event) => {
    if (event.target.matches(".cot:focus-visible") && !event.target.contains(current) && chain(event.target).tokens.length)
      show(chain(event.target).tokens[0]);
  });
  document.addEventListener("focusout", (event) => { if (event.target.matches(".cot") && !pinned) hide(); });
  document.addEventListener("scroll", () => { if (current) show(current); }, { passive: true, capture: true });

  // What explains the colours goes along on paper.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("footer details:not([open])")];
    for (const part of closed) part.open = true;
  });
  addEventListener("afterprint", () => { for (const part of closed) part.open = false; });

  document.querySelector(".controls").addEventListener("change", (event) => {
    if (event.target.name !== "filter") choose(event.target.name, event.target.value);
    else
      for (const example of document.querySelectorAll(".example"))
        example.hidden = event.target.value !== "all" && example.dataset[event.target.value] !== "yes";
  });
})();
