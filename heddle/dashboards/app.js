"use strict";
// What the pages of the dashboard do beyond the report's: follow the run, lead from a point to its trial, copy texts.
(function () {
  const places = new WeakSet();
  let path = window.location.pathname;

  window.heddleDrawn = function (place) {
    if (places.has(place)) return;
    places.add(place);
    place.on("plotly_click", function (event) {
      // The number of a trial of this run, or the address of one of any run.
      const found = event.points[0].customdata, trials = document.body.dataset.trials;
      if (Number.isInteger(found) && trials) visit(trials + found);
      else if (typeof found === "string" && found.startsWith("/run/")) visit(found);
    });
  };

  function replace(old, fresh) {
    // A choice that somebody is making is not taken away, but what was sent is shown.
    if (old.contains(document.activeElement) && !document.activeElement.matches("a, [data-submit]")) return;
    const held = document.activeElement.name && old.contains(document.activeElement) ? document.activeElement.name : null;
    // A plot is changed in its place, which is far quicker than to draw it from nothing.
    fresh.querySelectorAll(".plot").forEach(function (place) {
      const was = old.querySelector("#" + place.id);
      if (!was) return;
      was.setAttribute("aria-label", place.getAttribute("aria-label"));
      place.replaceWith(was);
    });
    old.replaceWith(fresh);
    if (held) fresh.querySelector("[name='" + CSS.escape(held) + "']")?.focus();
  }

  async function page(address, has) {
    const answer = await fetch(address, { headers: { "heddle-has": has.join(",") } });
    const isPage = answer.ok && (answer.headers.get("content-type") || "").startsWith("text/html");
    const fresh = isPage ? new DOMParser().parseFromString(await answer.text(), "text/html") : null;
    return { fresh, address: answer.url };
  }

  // The script that draws, which a page without figures, as of a young run, came without.
  let loading = null;
  function drawing() {
    if (window.heddleDraw) return null;
    loading ||= new Promise(function (done) {
      const script = document.createElement("script");
      script.src = "/assets/report.js";
      script.onload = script.onerror = done;
      document.head.append(script);
    });
    return loading;
  }

  function figuresOf(fresh) {
    const held = fresh.getElementById("figures");
    return held ? JSON.parse(held.textContent) : [];
  }

  // The page as the server has it at an address: only sections that differ are put in, so that scroll, focus and zoom stay.
  // What the page has already is named, and comes without its inside.
  async function show(address) {
    const known = window.heddleFigures ? window.heddleFigures() : [], here = path;
    const now = [...document.querySelectorAll("[data-live]")];
    const { fresh } = await page(address, [...now.map((part) => part.dataset.live), ...known.map((one) => one.digest)]);
    if (!fresh || path !== here) return;
    const figures = figuresOf(fresh), then = [...fresh.querySelectorAll("[data-live]")];
    if (figures.length) await drawing();
    if (path !== here) return;
    const parts = new Map(now.map((part) => [part.dataset.live, part]));
    const isMoved = (part, index) => "same" in part.dataset && part.dataset.live !== now[index].dataset.live;
    if (now.length !== then.length || then.some(isMoved)) {
      for (const part of then.filter((one) => "same" in one.dataset)) {
        const kept = parts.get(part.dataset.live);
        kept.id = part.id;
        part.replaceWith(kept);
      }
      change(fresh);
    } else {
      now.forEach((old, index) => { if (old.dataset.live !== then[index].dataset.live) replace(old, then[index]); });
    }
    const before = new Map(known.map((one) => [one.digest, one]));
    if (window.heddleDraw) window.heddleDraw(figures.map((one) => one.data ? one : before.get(one.digest)));
  }

  function change(fresh) {
    const main = document.querySelector("main");
    if (window.Plotly) main.querySelectorAll(".js-plotly-plot").forEach((place) => Plotly.purge(place));
    main.replaceWith(fresh.querySelector("main"));
  }

  // To another page without loading the scripts anew, which a browser reads for longer than all else takes.
  async function visit(address, scroll) {
    const isNew = scroll === undefined;
    const found = await page(address, []).catch(() => ({}));
    const { fresh } = found, figures = fresh ? figuresOf(fresh) : [];
    if (figures.length) await drawing();
    if (!fresh?.querySelector("main") || (figures.length && !window.heddleDraw)) {
      window.location.assign(address);
      return;
    }
    const hash = new URL(address, window.location.href).hash;
    if (isNew) {
      history.replaceState({ scroll: window.scrollY }, "");
      history.pushState({ scroll: 0 }, "", found.address.split("#")[0] + hash);
    }
    path = window.location.pathname;
    delete document.documentElement.dataset.drawn;
    document.title = fresh.title;
    document.querySelector("nav.top").replaceWith(fresh.querySelector("nav.top"));
    for (const name of ["trials", "events"]) {
      if (name in fresh.body.dataset) document.body.dataset[name] = fresh.body.dataset[name];
      else delete document.body.dataset[name];
    }
    change(fresh);
    const aim = hash ? document.getElementById(hash.slice(1)) : null;
    if (aim && isNew) aim.scrollIntoView();
    else window.scrollTo(0, scroll || 0);
    // As after a load, what is read or tabbed to next is this page's beginning.
    document.querySelector("main").focus({ preventScroll: true });
    if (window.heddleDraw) window.heddleDraw(figures);
    else document.documentElement.dataset.drawn = "yes";
    listen();
  }

  async function go(address) {
    history.pushState(null, "", address);
    await show(address);
  }

  window.addEventListener("popstate", function (event) {
    if (window.location.pathname === path) show(window.location.href);
    else visit(window.location.href, event.state?.scroll || 0);
  });

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

  let source = null;
  function listen() {
    if (source) source.close();
    source = null;
    if (!document.body.dataset.events) return;
    source = new EventSource(document.body.dataset.events);
    const tell = (text) => { document.getElementById("link").textContent = text; };
    source.onmessage = follow;
    source.onopen = () => tell("live");
    source.onerror = () => tell("not connected: is heddle dashboard still running?");
  }

  // Once the page is drawn: what the server reads on for its events would keep it from sending the page's own files.
  window.addEventListener("load", listen);

  // A page of ours, and not the doors to other programs or a picture.
  function isOurs(link) {
    const { origin, pathname } = new URL(link.href);
    if (origin !== window.location.origin || link.target || link.hasAttribute("download")) return false;
    if (pathname === path && link.hash) return false;
    return /^\/($|compare$|kernels$|(training|spec)\/[^/]+$|run\/[^/]+($|\/(compare|placement|latency|tools|trial\/-?\d+)$))/.test(pathname);
  }

  document.addEventListener("click", function (event) {
    const link = event.target.closest("a[href]");
    if (!link || event.defaultPrevented || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
    if (link.matches(".pages a[data-stay]")) {
      event.preventDefault();
      go(link.href);
    } else if (isOurs(link)) {
      event.preventDefault();
      visit(link.href);
    }
  });

  document.addEventListener("submit", function (event) {
    const form = event.target;
    if (!form.hasAttribute("action")) return;
    event.preventDefault();
    visit(form.action + "?" + new URLSearchParams(new FormData(form)));
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
