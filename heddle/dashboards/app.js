"use strict";
// What the pages of the dashboard do beyond the report's: follow the run, lead from a point to its trial, copy texts.
(function () {
  const places = new WeakSet();
  const trials = document.body.dataset.trials;

  window.heddleDrawn = function (place) {
    if (places.has(place) || !trials) return;
    places.add(place);
    place.on("plotly_click", function (event) {
      const number = event.points[0].customdata;
      if (Number.isInteger(number)) window.location.href = trials + number;
    });
  };

  // The page as the server has it now: only sections that differ are put in, so that scroll, focus and zoom stay.
  async function refresh() {
    const answer = await fetch(window.location.href);
    if (!answer.ok) return;
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const section of fresh.querySelectorAll("[data-live]")) {
      const old = document.getElementById(section.id);
      if (!old) {
        // A section that was not there before: the figures' numbers have moved, so everything is put in.
        document.querySelector("main").replaceWith(fresh.querySelector("main"));
        break;
      }
      if (old.dataset.live !== section.dataset.live && !old.contains(document.activeElement)) old.replaceWith(section);
    }
    const figures = fresh.getElementById("figures");
    const held = document.getElementById("figures");
    if (figures && !held) {
      // The first figures of a young run: the scripts that draw are not loaded yet.
      window.location.reload();
      return;
    }
    if (figures && figures.textContent !== held.textContent) held.textContent = figures.textContent;
    if (window.heddleDraw) window.heddleDraw();
  }

  let waiting = false;
  const source = document.body.dataset.events ? new EventSource(document.body.dataset.events) : null;
  if (source) {
    source.onmessage = async function () {
      if (waiting) return;
      waiting = true;
      try { await refresh(); } finally { waiting = false; }
    };
    const tell = (text) => { document.getElementById("link").textContent = text; };
    source.onopen = () => tell("live");
    source.onerror = () => tell("not connected: is heddle dashboard still running?");
  }

  document.addEventListener("click", async function (event) {
    const button = event.target.closest("button[data-copy]");
    if (!button) return;
    const text = document.getElementById(button.dataset.copy).textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      // Without a secure origin browsers give no clipboard; the text can still be selected.
      window.getSelection().selectAllChildren(document.getElementById(button.dataset.copy));
      button.textContent = "Selected: press Ctrl+C";
    }
  });

  document.addEventListener("change", function (event) {
    if (event.target.matches("select[data-submit]")) event.target.form.submit();
  });
})();
