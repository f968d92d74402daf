"use strict";
// The figures: Vega and all data stand compressed in the page; a chart is drawn when it is first displayed.
const charts = (() => {
  const views = [];
  const chosen = {};
  const options = { ast: true, logLevel: 1, actions: false, renderer: "svg", defaultStyle: false, tooltip: { disableDefaultStyle: true } };
  const show = (view) => {
    for (const [name, value] of Object.entries(chosen)) view.signal(name, value);
    return view.runAsync();
  };
  const unpack = async (text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return JSON.parse(await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text());
  };
  document.addEventListener("DOMContentLoaded", async () => {
    const block = document.getElementById("charts");
    if (!block) return;
    const { library, specs } = await unpack(block.textContent);
    const script = document.createElement("script");
    script.textContent = library;
    document.head.append(script);
    const draw = async (element) => {
      const { view } = await vegaEmbed(element, specs[element.dataset.chart], options);
      views.push(view);
      await show(view);
      element.classList.add("drawn");
    };
    const observer = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        observer.unobserve(entry.target);
        draw(entry.target);
      }
    }, { rootMargin: "100000px" });
    for (const element of document.querySelectorAll("[data-chart]")) observer.observe(element);
  });
  return {
    choose(values) {
      Object.assign(chosen, values);
      views.forEach(show);
    },
  };
})();
