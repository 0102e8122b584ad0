// Every method of Ollama's package for Node, against the server named by the first argument; the second names the
// installed package, the third a model's name at a registry, or nothing. Prints what each method said, as JSON.

const [host, location, remote] = process.argv.slice(2);
const { Ollama } = await import(location);

const asked = [];
const client = new Ollama({ host });
const abroad = new Ollama({
  host,
  fetch: async (url) => {
    asked.push(String(url));
    return new Response(JSON.stringify({ error: "not today" }), {
      status: 403,
      headers: { "content-type": "application/json" },
    });
  },
});

const said = {};
const messages = [{ role: "user", content: "What is the capital of France?" }];
const options = { temperature: 0 };
const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Tell the weather",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];
const weather = [{ role: "user", content: "What is the weather in Paris?" }];

async function all(stream) {
  const parts = [];
  for await (const part of await stream) parts.push(part);
  return parts;
}

async function refusal(promise) {
  try {
    await promise;
    return null;
  } catch (error) {
    return { name: error.name, message: error.message, status: error.status_code ?? null };
  }
}

said.methods = Object.getOwnPropertyNames(Object.getPrototypeOf(Ollama.prototype))
  .concat(Object.getOwnPropertyNames(Ollama.prototype))
  .filter((name) => !["constructor", "encodeImage", "fileExists", "processStreamableRequest"].includes(name));

said.version = await client.version();
said.list = await client.list();
said.show = await client.show({ model: "demo" });
said.verbose = await client.show({ model: "demo", verbose: true });

said.chat = await client.chat({ model: "demo", messages, think: true, options });
said.chatStream = await all(client.chat({ model: "demo", messages, think: true, options, stream: true }));
said.tools = await client.chat({ model: "demo", messages: weather, tools, think: false, options });
said.toolsStream = await all(client.chat({ model: "demo", messages: weather, tools, think: false, options, stream: true }));
said.format = await client.chat({ model: "demo", messages, format: "json", think: false, options: { ...options, num_predict: 40 } });
said.generate = await client.generate({ model: "demo", prompt: messages[0].content, think: false, options });
said.generateStream = await all(client.generate({ model: "demo", prompt: messages[0].content, options, stream: true }));
said.logprobs = await client.generate({
  model: "demo",
  prompt: "Once upon a time",
  raw: true,
  logprobs: true,
  top_logprobs: 2,
  options: { ...options, num_predict: 5 },
});
said.ps = await client.ps();

said.embed = await client.embed({ model: "demo", input: ["one", "two"] });
said.embeddings = await client.embeddings({ model: "demo", prompt: "one" });

said.create = await client.create({ model: "made", from: "demo", system: "Be brief." });
said.createStream = await all(client.create({ model: "made", from: "demo", system: "Be very brief.", stream: true }));
said.copy = await client.copy({ source: "made", destination: "copied" });
said.delete = [await client.delete({ model: "made" }), await client.delete({ model: "copied" })];

if (remote) {
  await client.copy({ source: "demo", destination: remote });
  said.push = await client.push({ model: remote, insecure: true });
  said.pushStream = await all(client.push({ model: remote, insecure: true, stream: true }));
  await client.delete({ model: remote });
  said.pull = await client.pull({ model: remote, insecure: true });
  said.pullStream = await all(client.pull({ model: remote, insecure: true, stream: true }));
  await client.delete({ model: remote });
}

said.unknown = {
  chat: await refusal(client.chat({ model: "nope", messages })),
  stream: await refusal(client.generate({ model: "nope", prompt: "x", stream: true })),
  show: await refusal(client.show({ model: "nope" })),
  delete: await refusal(client.delete({ model: "nope" })),
  copy: await refusal(client.copy({ source: "nope", destination: "there" })),
  embed: await refusal(client.embed({ model: "nope", input: "x" })),
  systemone: await refusal(client.systemone({ model: "demo", state: "s", questions: {} })),
};

await refusal(abroad.webSearch({ query: "headwater" }));
await refusal(abroad.webFetch({ url: "https://example.com" }));
said.abroad = asked;

const story = { model: "demo", prompt: "Once upon a time", raw: true, stream: true };
const endless = { ...story, options: { ...options, ignore_eos: true, num_predict: 100000 } };
const stream = await client.generate(endless);
let seen = 0;
said.abort = await refusal(
  (async () => {
    for await (const part of stream) if (part && ++seen === 3) client.abort();
  })(),
);
const single = await client.generate(endless);
said.abortOne = await refusal(
  (async () => {
    for await (const part of single) if (part) single.abort();
  })(),
);

console.log(JSON.stringify(said));
