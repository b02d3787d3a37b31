// The server, from this page: relative to where it is served, with the key that its user gave.

const base = new URL(location.pathname.replace(/\/?$/, "/"), location.origin);

async function ask(path, key, options = {}) {
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(new URL(path, base), { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the server answered ${response.status}`);
}

export async function graphs(key) {
  const { data } = await (await ask("v1/models", key)).json();
  return data.map((card) => card.id).filter((id) => !id.includes("/"));
}

export async function graph(name, key) {
  return (await ask(`v1/graphs/${encodeURIComponent(name)}`, key)).json();
}

export async function judge(id, thumb, key) {
  await ask("v1/feedback", key, { method: "POST", body: JSON.stringify({ id, thumb }) });
}

// Every event of a run, as it comes.
export async function* events(model, question, key, signal) {
  const body = JSON.stringify({ model, messages: [{ role: "user", content: question }] });
  const response = await ask("v1/runs", key, { method: "POST", body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection broke");
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue; // a comment that keeps the connection open
      const event = JSON.parse(data);
      if (event.error && !event.event) throw new Error(event.error.message);
      yield event;
    }
  }
}
