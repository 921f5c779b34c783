// Requests to the server, and the stream of what becomes of a conversation.

let key = sessionStorage.getItem("key") || "";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function useKey(text) {
  key = text.trim();
  sessionStorage.setItem("key", key);
}

async function send(method, path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let reply;
  try {
    reply = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "the server does not answer");
  }
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => null);
  throw new Refused(reply.status, told?.error?.message || `the server refused it (${reply.status})`);
}

export const get = async (path) => (await send("GET", path)).json();
export const post = async (path, body) => (await send("POST", path, body)).json();
export const patch = async (path, body) => (await send("PATCH", path, body)).json();
export const remove = async (path) => (await send("DELETE", path)).json();
export const file = async (path) => (await send("GET", path)).blob();

// Calls `tell` with each event of a conversation until `signal` ends it; a broken connection is made anew.
export async function follow(id, tell, broken, signal) {
  for (let wait = 250; !signal.aborted; wait = Math.min(wait * 2, 8000)) {
    try {
      const reply = await send("GET", `/api/conversations/${encodeURIComponent(id)}/events`, undefined, signal);
      const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        wait = 250;
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        for (const line of lines) tell(JSON.parse(line));
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error.status === 404 || error.status === 401) return broken(error, true);
      broken(error, false);
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}
