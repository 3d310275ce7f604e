"use strict";

// A slider shows one round of a map at a time.
for (const slider of document.querySelectorAll("input[data-frames]")) {
  const frames = document.getElementById(slider.dataset.frames).querySelectorAll("g[data-caption]");
  const output = slider.closest(".slider").querySelector("output");
  slider.addEventListener("input", () => {
    frames.forEach((frame, number) => {
      if (number === Number(slider.value)) frame.removeAttribute("display");
      else frame.setAttribute("display", "none");
    });
    output.textContent = frames[slider.value].dataset.caption;
  });
}

// A strategy's box in the summary shows and hides its curves.
for (const box of document.querySelectorAll("input[data-toggle]")) {
  box.addEventListener("change", () => {
    for (const part of document.querySelectorAll(`[data-series="${box.dataset.toggle}"]`)) {
      if (box.checked) part.removeAttribute("display");
      else part.setAttribute("display", "none");
    }
  });
}

// On paper, all is unfolded but the numbers beside plots.
const folded = () => [...document.querySelectorAll("section > details:not([open])")];
let opened = [];
addEventListener("beforeprint", () => (opened = folded()).forEach((part) => (part.open = true)));
addEventListener("afterprint", () => opened.forEach((part) => (part.open = false)));
