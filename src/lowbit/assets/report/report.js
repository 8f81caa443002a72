"use strict";
for (const view of document.querySelectorAll(".views")) {
  for (const image of view.querySelectorAll("img[data-copy]")) {
    image.src = view.querySelector("img." + image.dataset.copy).src;
  }
}
for (const input of document.querySelectorAll(".divider input")) {
  const move = () => {
    input.parentElement.style.setProperty("--divider", input.value + "%");
    input.setAttribute("aria-valuetext", Math.round(input.value) + "% reference");
  };
  input.addEventListener("input", move);
  move();
}
const amplify = document.getElementById("amplify");
const amplified = document.getElementById("amplify-value");
const scale = () => {
  const factor = 2 ** amplify.value;
  amplified.textContent = factor + "×";
  document.documentElement.style.setProperty("--amplify", factor);
};
amplify.addEventListener("input", scale);
scale();
