// Draws every chart with the fonts and colours of the page, again when light turns to dark.
function draw() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const grid = { gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--line") };
  for (const place of document.querySelectorAll(".chart")) {
    const figure = JSON.parse(place.querySelector("script").textContent);
    const layout = Object.assign({}, figure.layout, {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--ink") },
      hoverlabel: { bgcolor: colour("--card"), font: { color: colour("--ink") } },
    });
    for (const axis of Object.keys(layout).filter((key) => /^[xy]axis/.test(key)))
      layout[axis] = Object.assign({ automargin: true }, grid, layout[axis]);
    Plotly.react(place.querySelector("div"), figure.data, layout, { responsive: true, displayModeBar: false });
  }
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
