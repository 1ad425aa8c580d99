"use strict";
// Draws the figures with the page's own colours, and again when the colour scheme changes.
(function () {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  const drawn = new WeakMap();

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  // A colour in a figure is the name of a CSS variable.
  function painted(value) {
    if (typeof value === "string" && value.startsWith("--")) return colour(value);
    if (Array.isArray(value)) return value.map(painted);
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

  function drawOne(figure, index) {
    const place = document.getElementById("plot-" + index);
    const told = JSON.stringify(figure) + dark.matches;
    // Drawing takes most of the time of a page; what is as it was stays.
    if (!place || drawn.get(place) === told) return;
    drawn.set(place, told);
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

  function draw() {
    const held = document.getElementById("figures");
    if (held) JSON.parse(held.textContent).forEach(drawOne);
    document.documentElement.dataset.drawn = "yes";
  }

  window.heddleDraw = draw;
  draw();
  dark.addEventListener("change", draw);
})();
