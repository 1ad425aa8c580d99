"use strict";
// Draws the figures with the page's own colours, and again when the colour scheme changes.
(function () {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  // Places as far below the window as this are drawn at once with those in it.
  const MARGIN = 100;
  // What is seen is painted, and answers, for so many milliseconds before plots out of sight take the browser's time.
  const PAUSE = 150;
  const drawn = new WeakMap();
  let figures = [], later = 0, colours = new Map();

  function colour(name) {
    if (!colours.has(name)) {
      colours.set(name, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
    }
    return colours.get(name);
  }

  // A colour in a figure is the name of a CSS variable. What has a long list of texts or numbers has none in it.
  function painted(value) {
    if (typeof value === "string" && value.startsWith("--")) return colour(value);
    if (Array.isArray(value)) return typeof value[0] === "object" || /^--/.test(value[0]) ? value.map(painted) : value;
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, painted(inner)]));
    }
    return value;
  }

  function axis(given) {
    return Object.assign(
      { gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false, automargin: true },
      given
    );
  }

  function placeOf(index) {
    return document.getElementById("plot-" + index);
  }

  // Drawing takes most of the time of a page; what is as it was stays.
  function told(figure) {
    return (figure.digest || JSON.stringify(figure)) + dark.matches;
  }

  function isWaiting(figure, index) {
    const place = placeOf(index);
    return place && drawn.get(place) !== told(figure);
  }

  function isNear(index) {
    const { top, bottom } = placeOf(index).getBoundingClientRect();
    return bottom > -MARGIN && top < window.innerHeight + MARGIN;
  }

  function drawOne(figure, index) {
    const place = placeOf(index);
    drawn.set(place, told(figure));
    const layout = Object.assign(
      {
        legend: { orientation: "h", x: 0, y: -0.26, yanchor: "top" },
        margin: { l: 55, r: 15, t: 28, b: 45 },
        hovermode: "closest",
        // Of lines that have no colour of their own: Okabe and Ito's, told apart by all, on light and on dark.
        colorway: ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"],
        // Zoom and hidden traces outlive a redraw.
        uirevision: figure.name,
      },
      painted(figure.layout),
      {
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("--ink") },
      }
    );
    Object.keys(layout).filter((name) => /^[xy]axis/.test(name)).forEach(function (name) {
      layout[name] = axis(layout[name]);
      if (layout[name].title) layout[name].title.standoff = 8;
    });
    Plotly.react(place, painted(figure.data), layout, { responsive: true, displaylogo: false, displayModeBar: false });
    if (window.heddleDrawn) window.heddleDrawn(place);
  }

  // A page whose plots stand below what is seen first comes without plotly, which a browser reads for longer than the page.
  let isLoading = false;
  function hasPlotly() {
    if (window.Plotly) return true;
    if (!isLoading) {
      isLoading = true;
      const script = document.createElement("script");
      script.src = "/assets/plotly.js";
      script.onload = () => draw();
      document.head.append(script);
    }
    return false;
  }

  // The plots out of sight one by one, whenever the browser has nothing else to do.
  function soon() {
    const wait = window.requestIdleCallback || ((act) => setTimeout(act, 50));
    const turn = ++later;
    const next = () => wait(function () {
      if (turn !== later) return;
      const index = figures.findIndex(isWaiting);
      if (index < 0 || !hasPlotly()) return;
      drawOne(figures[index], index);
      next();
    });
    requestAnimationFrame(() => setTimeout(next, PAUSE));
  }

  // Whether nothing that is wanted waits any more.
  function drawAll(wanted) {
    const waiting = figures.map((figure, index) => index).filter((index) => isWaiting(figures[index], index) && wanted(index));
    if (waiting.length && !hasPlotly()) return false;
    waiting.forEach((index) => drawOne(figures[index], index));
    return true;
  }

  function draw(fresh) {
    if (fresh) figures = fresh;
    colours = new Map();
    // First what is seen: all places are looked at before a plot makes the page lay itself out anew.
    const near = new Set(figures.map((figure, index) => index).filter((index) => placeOf(index) && isNear(index)));
    if (!drawAll((index) => near.has(index))) return;
    document.documentElement.dataset.drawn = "yes";
    soon();
  }

  function scrolled() {
    drawAll(isNear);
  }

  // The picture as it is seen, zoom and hidden traces included, on the colour of its panel.
  async function save(place, format) {
    const layout = Object.assign({}, place.layout, { paper_bgcolor: colour("--panel") });
    const { width, height } = place.getBoundingClientRect();
    const link = document.createElement("a");
    link.href = await Plotly.toImage({ data: place.data, layout }, { format, width, height, scale: format === "png" ? 3 : 1 });
    link.download = figures[Number(place.id.slice("plot-".length))].name + "." + format;
    link.click();
  }

  document.addEventListener("click", function (event) {
    const button = event.target.closest("button[data-save]");
    if (button && window.Plotly) save(button.closest("figure").querySelector(".plot"), button.dataset.save);
  });

  const held = document.getElementById("figures");
  window.heddleDraw = draw;
  window.heddleFigures = () => figures;
  draw(held ? JSON.parse(held.textContent) : []);
  dark.addEventListener("change", () => draw());
  window.addEventListener("scroll", scrolled, { passive: true });
  window.addEventListener("beforeprint", () => drawAll(() => true));
})();
