let from = null;
addEventListener("click", event => {
  const link = event.target.closest("a[href^='#n']");
  if (link && !link.closest(".panel")) from = link;
});
addEventListener("keydown", event => {
  if (event.key === "Escape" && document.querySelector(".panel:target")) location.hash = "closed";
});
const show = () => {
  const panel = document.querySelector(".panel:target");
  document.querySelectorAll("a[aria-current]").forEach(link => link.removeAttribute("aria-current"));
  if (panel) {
    document.querySelector(`.tiles a[href="#${panel.id}"]`).setAttribute("aria-current", "true");
    panel.focus({ preventScroll: true });
  } else if (from && location.hash === "#closed") from.focus({ preventScroll: true });
};
addEventListener("hashchange", show);
addEventListener("load", show);
