// What report.py is for Python: where the server is, what is asked, and one line of JSON for each thing that was tried.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { z } from "zod";

export const URL_ = process.env.EIGHTFOLD_URL; // ends in /v1
export const THINKING_URL = process.env.EIGHTFOLD_THINKING_URL;
export const KEY = process.env.EIGHTFOLD_API_KEY;
export const MODEL = process.env.EIGHTFOLD_MODEL;

export const HELLO = "Say hello.";
export const SUM = "What is 2 + 3?";
export const SYSTEM =
  "You are a helpful assistant. If you see a tool response, do not call the function again: " +
  "answer the question with a sentence.";
export const SYSTEM_IN_JSON = SYSTEM.replace("with a sentence", 'in JSON, such as {"answer": "It is sunny."}');
export const WEATHER = "What is the weather in Paris?";
export const RAIN = { weather: "rain", degrees: 12 };
export const FAMILY =
  "Ada is 36. She lives in the city of London, postcode N1. Her child Byron is 7 and lives in Paris, postcode 75.";
export const TOO_LONG = "one two three four ".repeat(4000);

const address = z.object({ city: z.enum(["London", "Paris"]), postcode: z.string().max(10) }).meta({ id: "Address" });
const child = z.object({ name: z.string().max(20), age: z.int(), address }).meta({ id: "Child" });
// With ids zod writes $defs and $ref, as pydantic does.
export const Parent = z.object({ name: z.string().max(20), age: z.int(), address, children: z.array(child).max(2) });

export function check(condition, found) {
  if (!condition) throw new Error(`unexpected: ${JSON.stringify(found)}`);
}

export function isAda(found) {
  const parent = Parent.parse(found);
  check(parent.name === "Ada" && parent.address.city === "London", parent);
  return JSON.stringify(parent);
}

export async function refused(call, fits, ...words) {
  let found;
  try {
    found = await call();
  } catch (error) {
    check(fits(error) && words.every((word) => error.message.includes(word)), `${error.name}: ${error.message}`);
    return `${error.name}: ${error.message}`;
  }
  throw new Error(`not refused, but ${JSON.stringify(found)}`);
}

// `name` is the package whose version the row shows.
export async function run(client, name, capabilities) {
  const folder = createRequire(import.meta.url).resolve.paths(name).map((at) => path.join(at, name, "package.json"));
  const version = folder.flatMap((at) => {
    try {
      return [JSON.parse(readFileSync(at)).version];
    } catch {
      return [];
    }
  })[0];
  for (const [capability, attempt] of Object.entries(capabilities)) {
    let ok = true;
    let detail;
    try {
      detail = await attempt();
    } catch (error) {
      console.error(error);
      ok = false;
      detail = `${error.name}: ${error.message}`;
    }
    console.log(JSON.stringify({ client, package: name, version, capability, ok, detail: String(detail).slice(0, 300) }));
  }
}
