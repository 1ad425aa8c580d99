"use strict";
// What the pages of the dashboard do beyond the report's: follow the run, lead from a point to its trial, copy texts.
(function () {
  const places = new WeakSet();
  const trials = document.body.dataset.trials;

  window.heddleDrawn = function (place) {
    if (places.has(place)) return;
    places.add(place);
    place.on("plotly_click", function (event) {
      // The number of a trial of this run, or the address of one of any run.
      const found = event.points[0].customdata;
      if (Number.isInteger(found) && trials) window.location.href = trials + found;
      else if (typeof found === "string" && found.startsWith("/run/")) window.location.href = found;
    });
  };

  function replace(old, fresh) {
    // A choice that somebody is making is not taken away, but what was sent is shown.
    if (old.contains(document.activeElement) && !document.activeElement.matches("a, [data-submit]")) return;
    const held = document.activeElement.name && old.contains(document.activeElement) ? document.activeElement.name : null;
    old.replaceWith(fresh);
    if (held) fresh.querySelector("[name='" + CSS.escape(held) + "']")?.focus();
  }

  // The page as the server has it at an address: only sections that differ are put in, so that scroll, focus and zoom stay.
  async function show(address) {
    const answer = await fetch(address);
    if (!answer.ok) return;
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    const held = document.getElementById("figures"), figures = fresh.getElementById("figures");
    const now = document.querySelectorAll("[data-live]"), then = fresh.querySelectorAll("[data-live]");
    if (figures && !held) {
      // The first figures of a young run: the scripts that draw are not loaded yet.
      window.location.reload();
      return;
    }
    if (now.length !== then.length) {
      document.querySelector("main").replaceWith(fresh.querySelector("main"));
    } else {
      now.forEach((old, index) => { if (old.dataset.live !== then[index].dataset.live) replace(old, then[index]); });
    }
    if (figures && figures.textContent !== held.textContent) held.textContent = figures.textContent;
    if (window.heddleDraw) window.heddleDraw();
  }

  async function go(address) {
    history.pushState(null, "", address);
    await show(address);
  }

  window.addEventListener("popstate", () => show(window.location.href));

  // What changes while a page is being fetched is fetched after it, so that the last change is never missed.
  let busy = false, again = false;
  async function follow() {
    again = true;
    if (busy) return;
    busy = true;
    try {
      while (again) {
        again = false;
        await show(window.location.href);
      }
    } finally { busy = false; }
  }

  // Once the page is drawn: what the server reads on for its events would keep it from sending the page's own files.
  window.addEventListener("load", function () {
    if (!document.body.dataset.events) return;
    const source = new EventSource(document.body.dataset.events);
    const tell = (text) => { document.getElementById("link").textContent = text; };
    source.onmessage = follow;
    source.onopen = () => tell("live");
    source.onerror = () => tell("not connected: is heddle dashboard still running?");
  });

  document.addEventListener("click", function (event) {
    const link = event.target.closest(".pages a[data-stay]");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    go(link.href);
  });

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
    if (!event.target.matches("select[data-submit]")) return;
    const chosen = new URLSearchParams(window.location.search);
    chosen.set(event.target.name, event.target.value);
    // Another choice of trials begins at their first page.
    chosen.delete("page");
    go(window.location.pathname + "?" + chosen);
  });
})();
