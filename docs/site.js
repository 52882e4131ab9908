// A page that was opened from disk may neither start search/main.js's worker nor read its search_index.json, but it may
// load scripts. So this class replaces the worker, and tools/docs_pages.py writes the index as a script.
if (location.protocol === "file:") {
  const load = (name, then) => {
    const script = document.createElement("script");
    script.src = `${base_url}/search/${name}`;
    script.onload = then;
    document.head.append(script);
  };

  window.Worker = class {
    postMessage({ query }) {
      if (query === undefined) load("lunr.js", () => load("search_index.js", () => this.start(window.search_index)));
      else this.onmessage({ data: { results: this.search(query) } });
    }

    start({ config, docs }) {
      lunr.tokenizer.separator = new RegExp(config.separator);
      this.docs = new Map(docs.map((doc) => [doc.location, doc]));
      this.index = lunr(function () {
        this.field("title");
        this.field("text");
        this.ref("location");
        docs.forEach((doc) => this.add(doc));
      });
      this.onmessage({ data: { config } });
      this.onmessage({ data: { allowSearch: true } });
    }

    search(query) {
      const found = this.index.search(query).map(({ ref }) => this.docs.get(ref));
      return found.map((doc) => ({ ...doc, summary: doc.text.slice(0, 200) }));
    }
  };
}
