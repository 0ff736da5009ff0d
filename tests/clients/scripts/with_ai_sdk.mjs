// Vercel's AI SDK: @ai-sdk/openai as it is made, which speaks the responses API; its chat; @ai-sdk/openai-compatible.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, embed, generateText, isStepCount, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import {
  FAMILY, HELLO, KEY, MODEL, Parent, RAIN, SUM, SYSTEM, SYSTEM_IN_JSON, THINKING_URL, TOO_LONG, URL_, WEATHER,
  check, isAda, refused, run,
} from "./report.mjs";

const getWeather = tool({
  description: "Current weather of a city.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => (city === "Paris" ? RAIN : "unknown"),
});
const remember = tool({ description: "Remember a person.", inputSchema: Parent, execute: async (person) => isAda(person) });
const loop = { system: SYSTEM, SYSTEM_IN_JSON, prompt: WEATHER, tools: { get_weather: getWeather }, stopWhen: (stepCountIs ?? isStepCount)(3) };

function capabilities(provider, thinking = { temperature: 0 }) {
  const model = (url = URL_, name = MODEL, key = KEY) => provider(url, key)(name);
  const asked = (more) => ({ model: model(), temperature: 0, maxOutputTokens: 200, maxRetries: 0, ...more });
  const status = (...all) => (error) => APICallError.isInstance(error) && all.includes(error.statusCode);
  return {
    chat: async () => {
      const answer = await generateText(asked({ prompt: HELLO }));
      check(answer.text && answer.usage.outputTokens, answer.usage);
      return answer.text;
    },
    stream: async () => {
      const whole = (await generateText(asked({ prompt: HELLO }))).text;
      let streamed = "";
      for await (const part of streamText(asked({ prompt: HELLO })).textStream) streamed += part;
      check(streamed === whole, streamed);
      const tools = await streamText(asked(loop)).text;
      check(tools.includes("12"), tools);
      const object = await streamText(asked({ prompt: FAMILY, output: Output.object({ schema: Parent }) })).output;
      isAda(object);
      return whole;
    },
    "nested models": async () => {
      const answer = await generateText(asked({ prompt: FAMILY, tools: { remember }, toolChoice: "required" }));
      return answer.toolResults[0].output;
    },
    "forced tools": async () => {
      for (const toolChoice of ["required", { type: "tool", toolName: "get_weather" }]) {
        const answer = await generateText(asked({ ...loop, stopWhen: undefined, toolChoice }));
        check(answer.toolCalls[0].input.city === "Paris", answer.toolCalls);
      }
      return "required and named";
    },
    "automatic tools": async () => {
      const answer = await generateText(asked(loop));
      check(answer.text.includes("12"), answer.text);
      return answer.text;
    },
    "structured output": async () => {
      const output = Output.object({ schema: z.object({ answer: z.string().max(60) }) });
      const found = (await generateText(asked({ ...loop, system: SYSTEM_IN_JSON, output }))).output;
      check(found.answer.includes("rain"), found); // which only the tool could tell
      return isAda((await generateText(asked({ prompt: FAMILY, output: Output.object({ schema: Parent }) }))).output);
    },
    reasoning: async () => {
      const answer = await generateText(asked({ model: model(THINKING_URL), prompt: SUM, ...thinking }));
      check(answer.reasoningText, answer.content);
      return answer.reasoningText;
    },
    errors: async () => {
      await refused(() => generateText(asked({ model: model(URL_, MODEL, "wrong"), prompt: HELLO })), status(401));
      await refused(() => generateText(asked({ model: model(URL_, "x"), prompt: HELLO })), status(404));
      const embedding = provider(URL_, KEY).embedding(MODEL);
      await refused(() => embed({ model: embedding, value: "x", maxRetries: 0 }), status(400, 404), "mbed");
      return refused(() => generateText(asked({ prompt: TOO_LONG })), status(400), "maximum context length");
    },
  };
}

const openai = (baseURL, apiKey) => createOpenAI({ baseURL, apiKey });
const chat = (baseURL, apiKey) => {
  const made = createOpenAI({ baseURL, apiKey });
  return Object.assign((name) => made.chat(name), { embedding: (name) => made.embedding(name) });
};
const compatible = (baseURL, apiKey) => {
  const made = createOpenAICompatible({ name: "eightfold", baseURL, apiKey, supportsStructuredOutputs: true });
  return Object.assign((name) => made(name), { embedding: (name) => made.embeddingModel(name) });
};

// It asks for thoughts, and shows them, only with models that it knows to think or is told so of.
const told = { temperature: undefined, providerOptions: { openai: { forceReasoning: true, reasoningSummary: "auto" } } };
await run("ai-sdk (@ai-sdk/openai)", "ai", capabilities(openai, told));
const { reasoning, ...withoutReasoning } = capabilities(chat); // its chat does not read reasoning_content
await run("ai-sdk (@ai-sdk/openai), chat", "ai", withoutReasoning);
await run("ai-sdk (@ai-sdk/openai-compatible)", "ai", capabilities(compatible));
