// One run on the page: a consumer of its events. Text is only ever set as text, never as markup.

const seconds = (s) => (s == null ? "–" : s < 10 ? `${s.toFixed(2)} s` : `${s.toFixed(1)} s`);

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

const waiting = () => ({ text: "", state: "waiting", tokens: 0, wrong: "" });

export class RunView {
  constructor(graph, onJudge) {
    this.graph = graph;
    this.root = document.getElementById("run").content.cloneNode(true).firstElementChild;
    this.calls = new Map();
    this.attempts = new Map();
    this.answerText = "";
    this.t = 0;
    this.stale = false;
    this.began = performance.now();
    this.ended = false;
    const find = (selector) => this.root.querySelector(selector);
    [this.note, this.dag, this.layers, this.lines] = [".note", ".dag", ".layers", ".dag svg"].map(find);
    [this.answer, this.totals, this.thumbs] = [".answer", ".totals", ".thumbs"].map(find);
    [this.panes, this.gantt] = [".panes", ".gantt"].map(find);
    find("h2").textContent = graph.name;
    this.thumbs.addEventListener("click", (click) => click.target.value && onJudge(this, click.target.value));
    this.#drawGraph();
    new ResizeObserver(() => this.#drawLines()).observe(this.layers);
  }

  // ---------------------------------------------------------------- events

  add(event) {
    this.t = Math.max(this.t, event.t ?? 0);
    const call = event.call ? this.#call(event) : null;
    switch (event.event) {
      case "request.started":
        this.id = event.id;
        this.judged = event.feedback;
        break;
      case "run.started": // once more where a router died: from the beginning
        this.began = performance.now() - event.t * 1000;
        this.answerText = "";
        this.attempts.clear();
        for (const known of this.calls.values()) Object.assign(known, waiting());
        break;
      case "gate.decided":
        this.#gate(event);
        break;
      case "run.notice":
        this.#tell(event.text);
        break;
      case "agent.started":
        call.state = "running";
        call.wrong = "";
        if (!event.continued && !event.hedge && event.stage === 1) call.text = "";
        this.attempts.set(`${event.call} ${event.attempt} ${event.stage}`, { call: event.call, attempt: event.attempt, start: event.t });
        break;
      case "agent.delta":
        call.text += event.text;
        call.tokens += event.tokens;
        break;
      case "agent.finished":
        call.text = event.text;
        call.tokens = event.usage.completion_tokens;
        call.state = "finished";
        this.#ended(event);
        break;
      case "agent.paused":
        this.#ended(event);
        break;
      case "agent.failed":
        call.state = event.will_retry ? "running" : "failed";
        call.wrong = event.will_retry ? `trying again: ${event.message}` : event.message;
        this.#ended(event, true);
        break;
      case "agent.cancelled":
        if (call.state === "running") call.state = "cancelled";
        call.wrong = event.reason;
        this.#ended(event, true);
        break;
      case "agent.skipped":
        call.state = "skipped";
        break;
      case "answer.delta":
        this.answerText += event.text;
        break;
      case "run.finished":
        this.finish(event);
        break;
    }
    this.#later();
  }

  finish(event) {
    this.ended = true;
    this.t = event.t;
    this.answerText = event.text || this.answerText;
    const { prompt_tokens, cached_tokens, completion_tokens } = event.usage;
    this.totals.textContent =
      `first token after ${seconds(event.ttft_s)}, all after ${seconds(event.t)}; ` +
      `${prompt_tokens} prompt tokens (${cached_tokens} cached), ${completion_tokens} written` +
      (event.dollars == null ? "" : `, $${event.dollars.toFixed(6)}`);
    if (event.note) this.#tell(event.note);
    if (event.error) this.fail(event.message);
    this.thumbs.hidden = !this.judged || Boolean(event.error);
    this.#later();
  }

  fail(message) {
    this.ended = true;
    this.#tell(message);
    for (const call of this.calls.values()) if (call.state === "running") call.state = "cancelled";
    this.#later();
  }

  #ended(event, lost = false) {
    const found = [...this.attempts.values()].find((a) => a.call === event.call && a.attempt === event.attempt && a.end == null);
    if (found) Object.assign(found, { end: event.t, first: event.ttft_s, prefill: event.prefill_s, lost });
  }

  #call(event) {
    if (!this.calls.has(event.call)) {
      this.calls.set(event.call, { id: event.call, agent: event.agent, ...waiting() });
    }
    return this.calls.get(event.call);
  }

  #gate(event) {
    const weights = Object.entries(event.weights).sort((a, b) => b[1] - a[1]);
    const told = weights.map(([agent, weight]) => `${agent} ${weight.toFixed(2)}`).join(", ");
    this.#tell(event.failed ? `gate ${event.kind}: everybody answers, since ${event.failed}` : `gate ${event.kind}: ${told} ${event.note}`);
    const chosen = new Set(event.layers.flatMap((agents, layer) => agents.map((agent) => `${layer + 1}/${agent}`)));
    for (const call of this.calls.values()) {
      if (/^\d+\//.test(call.id) && !chosen.has(call.id.split("#")[0])) call.state = "skipped";
    }
  }

  #tell(text) {
    this.note.hidden = false;
    this.note.append(element("span", "", `${this.note.textContent ? " · " : ""}${text}`));
  }

  // ---------------------------------------------------------------- drawing, at most once a frame

  #later() {
    if (this.stale) return;
    this.stale = true;
    requestAnimationFrame(() => {
      this.stale = false;
      this.#draw();
    });
  }

  #drawGraph() {
    const all = [...this.graph.calls, ...(this.graph.answer ? [this.graph.answer] : [])];
    const columns = new Map();
    for (const { id, agent, layer } of all) {
      this.calls.set(id, { id, agent, ...waiting() });
      if (!columns.has(layer)) columns.set(layer, this.layers.appendChild(element("div", "layer")));
      const chip = columns.get(layer).appendChild(element("div", "call", id.includes("/") ? id.slice(id.indexOf("/") + 1) : agent));
      this.calls.get(id).chip = chip;
    }
    this.edges = all.flatMap((to) => to.inputs.map((from) => [from, to.id]));
    this.dag.setAttribute("aria-label", `${this.graph.name}: ${columns.size} layers, ${all.length} calls`);
    this.gantt.setAttribute("aria-label", "When each call waited, read its prompt and wrote");
  }

  #drawLines() {
    const frame = this.dag.getBoundingClientRect();
    this.lines.replaceChildren();
    for (const [from, to] of this.edges) {
      const [a, b] = [from, to].map((id) => this.calls.get(id)?.chip?.getBoundingClientRect());
      if (!a || !b) continue;
      const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
      const at = { x1: a.right, y1: a.top + a.height / 2, x2: b.left, y2: b.top + b.height / 2 };
      for (const [key, value] of Object.entries(at)) {
        line.setAttribute(key, value - (key[0] === "x" ? frame.left - this.dag.scrollLeft : frame.top));
      }
      line.classList.toggle("lit", this.calls.get(from).state === "finished" && ["running", "finished"].includes(this.calls.get(to).state));
      this.lines.append(line);
    }
  }

  #draw() {
    this.answer.textContent = this.answerText;
    const answers = this.graph.answer?.id;
    for (const call of this.calls.values()) {
      if (call.chip && call.chip.className !== `call ${call.state}`) {
        call.chip.className = `call ${call.state}`;
        call.chip.setAttribute("aria-label", `${call.agent}: ${call.state}`);
        this.linesAreOld = true;
      }
      if (call.id !== answers && call.state !== "waiting" && call.state !== "skipped") this.#drawPane(call);
    }
    if (this.linesAreOld) this.#drawLines();
    this.linesAreOld = false;
    this.#drawGantt();
  }

  #drawPane(call) {
    if (!call.pane) {
      call.pane = this.panes.appendChild(element("div", "pane"));
      const title = call.pane.appendChild(element("h3", ""));
      title.append(call.id, (call.count = element("span", "")));
      call.told = call.pane.appendChild(element("p", ""));
      call.told.tabIndex = 0;
      call.bad = call.pane.appendChild(element("p", "wrong"));
    }
    call.count.textContent = `${call.state === "running" ? "…" : call.state} ${call.tokens}`;
    if (call.drawn !== call.text) {
      const atEnd = call.told.scrollTop + call.told.clientHeight >= call.told.scrollHeight - 8;
      if (call.drawn !== undefined && call.text.startsWith(call.drawn)) call.told.append(call.text.slice(call.drawn.length));
      else call.told.textContent = call.text;
      call.drawn = call.text;
      if (atEnd) call.told.scrollTop = call.told.scrollHeight;
    }
    call.bad.textContent = call.wrong;
  }

  #drawGantt() {
    const now = this.ended ? this.t : Math.max(this.t, (performance.now() - this.began) / 1000);
    const rows = new Map();
    for (const attempt of this.attempts.values()) {
      if (!rows.has(attempt.call)) rows.set(attempt.call, []);
      const end = attempt.end ?? now;
      const first = attempt.first == null ? end : attempt.start + attempt.first;
      const read = attempt.prefill == null ? attempt.start : Math.max(attempt.start, first - attempt.prefill);
      if (attempt.lost) rows.get(attempt.call).push(["lost", attempt.start, end]);
      else rows.get(attempt.call).push(["wait", attempt.start, read], ["read", read, first], ["write", first, end]);
    }
    const legend = element("p", "legend");
    for (const [kind, name] of [["wait", "waits"], ["read", "reads its prompt"], ["write", "writes"], ["lost", "lost"]]) {
      const key = legend.appendChild(element("span", ""));
      key.append(element("b", kind), name);
    }
    const drawn = [...rows].map(([call, spans]) => {
      const row = element("div", "");
      const bar = element("i", "");
      for (const [kind, start, end] of spans) {
        if (end <= start) continue;
        const part = bar.appendChild(element("b", kind));
        part.style.left = `${(100 * start) / now}%`;
        part.style.width = `${(100 * (end - start)) / now}%`;
      }
      row.append(element("span", "", call), bar);
      return row;
    });
    this.gantt.replaceChildren(...drawn, legend);
  }
}
