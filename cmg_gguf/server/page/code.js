// A request as others would send it. The picture's data is left to a file of theirs.
function shortened(body) {
  return JSON.stringify(body, (name, value) => (name === "url" ? "data:image/png;base64,..." : value), 2);
}

export function curl(body) {
  const quoted = shortened(body).replaceAll("'", "'\\''");
  return `curl ${location.origin}/v1/chat/completions \\\n  -H 'Content-Type: application/json' \\\n  -H "Authorization: Bearer $API_KEY" \\\n  -d '${quoted}'`;
}

export function python({ cmg, ...body }) {
  const known = JSON.stringify(shortened({ model: "default", ...body }));
  const extra = cmg === undefined ? "" : `, extra_body={"cmg": json.loads(${JSON.stringify(JSON.stringify(cmg))})}`;
  return `import json\nfrom openai import OpenAI\n\nclient = OpenAI(base_url="${location.origin}/v1", api_key="...")\nbody = json.loads(${known})\nreply = client.chat.completions.create(**body${extra})\nprint(reply.choices[0].message.content)`;
}
