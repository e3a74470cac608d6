"""What the gallery adds to the look of a report, and its few lines of script."""

STYLE = """
body { max-width: 66rem; padding-bottom: 18rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin-top: .8rem; font-size: .875rem; }
a { color: var(--a); text-underline-offset: .15em; }
a:focus-visible { outline: 3px solid var(--a);
  outline-offset: 2px; }
.tiles, .strip { list-style: none; margin: .6rem 0 1.2rem; padding: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(4.4rem, 1fr)); gap: .35rem; }
.tiles a { display: block; text-decoration: none; border-radius: 4px; }
.tiles a:hover { box-shadow: 0 0 0 2px var(--c); } a[aria-current] { box-shadow: 0 0 0 3px var(--b); }
.strip { display: flex; gap: .5rem; overflow-x: auto; align-items: flex-start; }
.strip, .groups .strip, .panel .strip { margin-inline: -3px; padding: 3px; }
.strip li { flex: 0 0 5.1rem; min-width: 0; } .strip a { display: block; text-decoration: none; border-radius: 4px; }
.strip .query { padding-right: .55rem; margin-right: .05rem; border-right: 1px solid var(--rule); flex-basis: 5.7rem; }
.strip b, .strip small { display: block; font-size: .75rem; line-height: 1.35; }
.strip b { margin-top: .15rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.strip small { color: var(--soft); overflow: hidden; overflow-wrap: anywhere; display: -webkit-box;
  -webkit-box-orient: vertical; -webkit-line-clamp: 2; }
.tiles svg, .strip svg { margin: 0; border-radius: 4px; overflow: hidden; }
.gone { display: flex; aspect-ratio: 1; padding: .25rem; align-items: center; justify-content: center; overflow: hidden;
  border: 1px dashed var(--c); border-radius: 4px; color: var(--soft); font-size: .65rem; line-height: 1.15;
  text-align: center; overflow-wrap: anywhere; }
.groups { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); gap: 1rem 2rem; }
.groups figure { min-width: 0; } .groups .strip { margin-block: 0; } .groups figcaption { margin: .1rem 0 .6rem; }
#duplicates h3 { margin-top: 1.4rem; } #duplicates h3 small { margin-left: .4rem; }
.panel { display: none; position: fixed; inset: auto 0 0; z-index: 1; max-height: 70vh; overflow-y: auto;
  padding: .7rem max(1.25rem, 50vw - 31.75rem) .4rem; background: var(--paper); border-top: 2px solid var(--b);
  outline: none; box-shadow: 0 -6px 24px rgb(0 0 0 / .18); }
.panel:target { display: block; } .panel > div { display: flex; justify-content: space-between; gap: 1rem; }
.panel h3 { overflow-wrap: anywhere; } .panel .strip { margin-block: .3rem 0; }
.panel [href="#closed"] { flex: none; width: 2.2rem; height: 2.2rem; margin: -.3rem -.5rem 0 0; font-size: 1.6rem;
  line-height: 2.1rem; text-align: center; text-decoration: none; color: var(--soft); }
@media print { .panel, nav { display: none !important; } body { padding-bottom: 0; } .strip { flex-wrap: wrap; } }
"""

SCRIPT = """
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
"""

__all__ = ["SCRIPT", "STYLE"]
