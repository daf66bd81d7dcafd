// The openai package of npm. Arguments: base model, model with tools.
import assert from "node:assert/strict";
import OpenAI, { toFile } from "openai";

const [model, toolsModel] = process.argv.slice(2);
const client = new OpenAI();
const messages = [{ role: "user", content: "Hello!" }];
const settings = { model, messages, temperature: 0, max_tokens: 8 };

const answer = await client.chat.completions.create(settings);
assert.ok(answer.usage.completion_tokens <= 8);
assert.match(answer.system_fingerprint, /^fp_/);
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...settings, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(streamed, answer.choices[0].message.content);
const echoed = await client.completions.create({ model, prompt: "Once", echo: true, logprobs: 1, max_tokens: 1 });
assert.ok(echoed.choices[0].text.startsWith("Once"));
assert.equal(echoed.choices[0].logprobs.token_logprobs[0], null);

// The model with tools is tiny and random: an open text would not end.
const city = { type: "string", enum: ["Rome", "Paris"] };
const parameters = { type: "object", properties: { city }, required: ["city"] };
const tools = [{ type: "function", function: { name: "weather", parameters } }];
const called = await client.chat.completions.create({
  model: toolsModel, messages, tools, tool_choice: "required", max_tokens: 400,
});
const [call] = called.choices[0].message.tool_calls;
assert.ok(city.enum.includes(JSON.parse(call.function.arguments).city));
assert.equal(called.choices[0].finish_reason, "tool_calls");
const schema = { ...parameters, additionalProperties: false };
const parsed = await client.chat.completions.parse({
  model: toolsModel, messages, max_tokens: 400, seed: 3,
  response_format: { type: "json_schema", json_schema: { name: "city", strict: true, schema } },
});
assert.ok(city.enum.includes(JSON.parse(parsed.choices[0].message.content).city));

await assert.rejects(client.chat.completions.create({ ...settings, temperature: 9 }), OpenAI.BadRequestError);
await assert.rejects(client.models.retrieve("nothing"), OpenAI.NotFoundError);
await assert.rejects(new OpenAI({ apiKey: "wrong" }).models.list(), OpenAI.AuthenticationError);

const row = { messages: [...messages, { role: "assistant", content: "Hi!" }] };
const rows = Array.from({ length: 12 }, () => JSON.stringify(row)).join("\n");
const file = await client.files.create({ file: await toFile(Buffer.from(rows), "rows.jsonl"), purpose: "fine-tune" });
const job = await client.fineTuning.jobs.create({ model, training_file: file.id });
assert.equal((await client.fineTuning.jobs.cancel(job.id)).status, "cancelled");
const ids = [];
for await (const each of client.fineTuning.jobs.list({ limit: 1 })) ids.push(each.id);
assert.ok(ids.includes(job.id));
assert.equal((await client.files.delete(file.id)).deleted, true);
