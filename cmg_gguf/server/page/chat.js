// One chat completion as a stream: calls said(chunk) for each. Throws with the server's own message.
export class Refused extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

export async function ask(body, key, signal, said) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch("/v1/chat/completions", {
    method: "POST", headers, signal, body: JSON.stringify({ ...body, stream: true }),
  });
  if (!response.ok) throw new Refused(await messageOf(response), response.status);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Refused("the stream broke off; ask again", 0);
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(chunk.error.message, 0);
      said(chunk);
    }
  }
}

async function messageOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}
