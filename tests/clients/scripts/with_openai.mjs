// OpenAI's own client for Node: chat completions and responses.
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import {
  FAMILY, HELLO, KEY, MODEL, Parent, RAIN, SUM, SYSTEM, THINKING_URL, TOO_LONG, URL_, WEATHER,
  check, isAda, refused, run,
} from "./report.mjs";

const options = { apiKey: KEY, maxRetries: 0 };
const client = new OpenAI({ baseURL: URL_, ...options });
const thinking = new OpenAI({ baseURL: THINKING_URL, ...options });
const chats = client.chat.completions;
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const weather = { name: "get_weather", description: "Current weather of a city.", parameters };
const tools = [{ type: "function", function: weather }];
const asked = (content, more = {}) => ({ model: MODEL, messages: [{ role: "user", content }], temperature: 0, ...more });
const input = (text, more = {}) => ({ model: MODEL, input: text, temperature: 0, ...more });

async function text(stream) {
  let found = "";
  for await (const chunk of stream) found += chunk.choices[0]?.delta?.content ?? "";
  return found;
}

await run("openai (npm)", "openai", {
  chat: async () => {
    const answer = await chats.create(asked(HELLO, { max_tokens: 20 }));
    check(answer.choices[0].message.content && answer.usage.completion_tokens, answer);
    return answer.choices[0].message.content;
  },
  stream: async () => {
    const whole = (await chats.create(asked(HELLO, { max_tokens: 20 }))).choices[0].message.content;
    const streamed = await text(await chats.create(asked(HELLO, { max_tokens: 20, stream: true })));
    check(streamed === whole, streamed);
    const final = await chats.stream(asked(HELLO, { max_tokens: 20 })).finalContent();
    check(final === whole, final);
    return whole;
  },
  "nested models": async () => {
    const tool = zodFunction({ name: "parent", parameters: Parent });
    const answer = await chats.parse(asked(FAMILY, { tools: [tool], tool_choice: "required" }));
    return isAda(answer.choices[0].message.tool_calls[0].function.parsed_arguments);
  },
  "forced tools": async () => {
    for (const choice of ["required", { type: "function", function: { name: "get_weather" } }]) {
      const answer = await chats.create(asked(WEATHER, { tools, tool_choice: choice }));
      check(JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments).city === "Paris", answer);
    }
    return "required and named";
  },
  "automatic tools": async () => {
    const runnable = { ...weather, parse: JSON.parse, function: ({ city }) => (city === "Paris" ? RAIN : "unknown") };
    const messages = [{ role: "system", content: SYSTEM }, { role: "user", content: WEATHER }];
    let answer;
    for (const stream of [true, false]) {
      const fields = { model: MODEL, temperature: 0, max_tokens: 60, messages, stream };
      answer = await chats.runTools({ ...fields, tools: [{ type: "function", function: runnable }] }).finalContent();
      check(answer.includes("12"), answer);
    }
    return answer;
  },
  "structured output": async () => {
    const answer = await chats.parse(asked(FAMILY, { response_format: zodResponseFormat(Parent, "parent") }));
    return isAda(answer.choices[0].message.parsed);
  },
  reasoning: async () => {
    const { message } = (await thinking.chat.completions.create(asked(SUM, { max_tokens: 60 }))).choices[0];
    check(message.reasoning_content?.includes("5"), message);
    return message.reasoning_content;
  },
  errors: async () => {
    const wrong = new OpenAI({ baseURL: URL_, apiKey: "wrong", maxRetries: 0 });
    await refused(() => wrong.models.list(), (error) => error instanceof OpenAI.AuthenticationError);
    await refused(() => chats.create(asked(HELLO, { model: "x" })), (error) => error.code === "model_not_found");
    await refused(() => client.embeddings.create({ model: MODEL, input: "x" }), (error) => error.status < 500, "mbed");
    return refused(() => chats.create(asked(TOO_LONG)), (error) => error.code === "context_length_exceeded");
  },
});

await run("openai (npm), responses", "openai", {
  chat: async () => (await client.responses.create(input(HELLO, { max_output_tokens: 20 }))).output_text,
  stream: async () => {
    const whole = (await client.responses.create(input(HELLO, { max_output_tokens: 20 }))).output_text;
    const final = await client.responses.stream(input(HELLO, { max_output_tokens: 20 })).finalResponse();
    check(final.output_text === whole, final);
    return whole;
  },
  "automatic tools": async () => {
    const items = [{ role: "user", content: WEATHER }];
    const flat = { tools: [{ type: "function", ...weather, strict: false }], instructions: SYSTEM };
    const first = await client.responses.create(input(items, flat));
    const call = first.output.find((item) => item.type === "function_call");
    check(call && JSON.parse(call.arguments).city === "Paris", first);
    items.push(...first.output, { type: "function_call_output", call_id: call.call_id, output: JSON.stringify(RAIN) });
    const answer = (await client.responses.create(input(items, flat))).output_text;
    check(answer.includes("12"), answer);
    return answer;
  },
  "structured output": async () =>
    isAda((await client.responses.parse(input(FAMILY, { text: { format: zodTextFormat(Parent, "parent") } }))).output_parsed),
  reasoning: async () => {
    const answer = await thinking.responses.create(input(SUM, { max_output_tokens: 60 }));
    const item = answer.output.find((item) => item.type === "reasoning");
    check(JSON.stringify(item).includes("5"), answer);
    return JSON.stringify(item.content ?? item.summary);
  },
  errors: async () => {
    await refused(() => client.responses.create(input(HELLO, { model: "x" })), (error) => error.code === "model_not_found");
    return refused(() => client.responses.create(input(TOO_LONG)), (error) => error.code === "context_length_exceeded");
  },
});
